"""Commands and scripts in processes of their own, which start at once.

A new Python takes seconds to import torch. Here one process imports minimore, and every command is
a fork of it.
"""

import multiprocessing
import os
import runpy
import shutil
import socket
import sys
import tempfile
import warnings
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
# Several processes that train as one import the other two, each of them for a second.
FORKS.set_forkserver_preload(
    ["minimore.cli", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
)


class Command:
    """`minimore` with some words, or a script. `said` and `error` are what it has printed so far.

    variables: of its environment. before: a function that it calls before it begins.
    """

    def __init__(self, words, directory=".", script=None, variables=None, before=None):
        self.folder = Path(tempfile.mkdtemp())
        self.outputs = [self.folder / name for name in ("said", "error")]
        for path in self.outputs:
            path.touch()
        words, outputs = [str(word) for word in words], [str(path) for path in self.outputs]
        arguments = words, str(directory), outputs, script, variables or {}, before
        self.process = FORKS.Process(target=run, args=arguments)
        self.process.start()

    def __getattr__(self, name):
        if name in ("said", "error"):
            return (self.folder / name).read_text()
        raise AttributeError(name)

    @property
    def is_running(self):
        return self.process.is_alive()

    def signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self, seconds=None):
        """The exit code, that of a signal negative; None if it still runs after so long."""
        self.process.join(seconds)
        if self.process.exitcode is not None and self.folder.exists():
            self.said, self.error = (path.read_text() for path in self.outputs)
            shutil.rmtree(self.folder)
        return self.process.exitcode


def run(words, directory, outputs, script, variables, before):
    """What the forked process does."""
    os.environ.update(variables)
    for path, stream in zip(outputs, (1, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(directory)
    if script is not None:
        run_script(script, words)
        return
    from minimore.cli import main

    if before:
        before()
    sys.exit(main(words))


def run_script(path, words):
    """`python PATH WORDS`."""
    sys.argv = [str(path), *words]
    sys.path.insert(0, str(Path(path).parent))
    warnings.simplefilter(os.environ.get("PYTHONWARNINGS", "default"))
    runpy.run_path(str(path), run_name="__main__")


def group_variables(count):
    """What torchrun tells each of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in map(str, range(count)):
        yield {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }


def group(words, count, befores=None):
    """`minimore` as torchrun would start it: so many processes with the same words.

    befores: a function for some of them, by rank.
    """
    befores = befores or {}
    return [
        Command(words, variables=variables, before=befores.get(rank))
        for rank, variables in enumerate(group_variables(count))
    ]


def run_to_the_end(words, directory=".", script=None, variables=None):
    """What a command or a script printed; it must end without an error."""
    command = Command(words, directory, script, variables)
    assert command.wait() == 0, command.error
    return command.said
