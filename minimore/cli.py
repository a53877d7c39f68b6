"""The verbs. An error that a user can cause ends in one line and exit code 2."""

import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from . import __version__
from .alignment.compare import CompareOptions, compare
from .alignment.finetune import FinetuneOptions, finetune
from .alignment.perplexity import PerplexityOptions, perplexity
from .alignment.sample import SampleOptions, sample
from .alignment.selection import SelectOptions, select
from .check import CheckOptions, check
from .checksums import read_checked_json
from .data.foreign.convert import ConvertOptions, convert
from .data.inspection.look import LookOptions, look
from .data.public.get import GetOptions, get
from .data.split import SplitOptions, split
from .engine.distributed import started_processes
from .engine.plan import PlanOptions, plan
from .evaluate import EvaluateOptions, evaluate
from .exercises.exercise import ExerciseOptions, exercise
from .figures.plot import PlotOptions, plot
from .files import is_out_of_memory
from .lab.choosing.choose import ChooseOptions, choose
from .lab.demo import DemoOptions, demo
from .lab.features import FeaturesOptions, features
from .lab.grid import ReproduceOptions
from .lab.probe import ProbeOptions, probe
from .lab.reproduce import reproduce
from .lab.trial import TrialOptions, compare_methods
from .options import (
    InputError,
    Parser,
    add_options,
    flag_of,
    from_arguments,
    printable,
    require,
    to_arguments,
)
from .reward import device_of
from .reward_training import TrainOptions
from .schedule import LoopOptions
from .score import ScoreOptions, score
from .train import train


class Verb(NamedTuple):
    """What a command takes, the function that does it, and one line of help."""

    options: type
    run: Callable[..., int | None]
    help: str


GROUPS = {
    "align": "from a reward model to a policy, step by step",
    "data": "from files as people have them to pairs one can trust",
}

# By name; a command of a group has two words.
VERBS = {
    "align sample": Verb(
        SampleOptions, sample, "let a language model write responses to the prompts of a file"
    ),
    "align select": Verb(
        SelectOptions,
        select,
        "of several responses to every prompt keep one: the best by reward, or a control",
    ),
    "align finetune": Verb(
        FinetuneOptions, finetune, "train a language model on responses: the best ones, say"
    ),
    "align compare": Verb(
        CompareOptions,
        compare,
        "which of two files of responses a judge prefers, and how sure",
    ),
    "align perplexity": Verb(
        PerplexityOptions, perplexity, "how likely a language model finds the responses of a file"
    ),
    "data get": Verb(
        GetOptions, get, "a public set of preferences by its name, from the hub or from its files"
    ),
    "data convert": Verb(
        ConvertOptions, convert, "write the pairs of a public file, whatever its shape, and count"
    ),
    "data look": Verb(LookOptions, look, "what is in files of pairs, and what is wrong with them"),
    "data split": Verb(
        SplitOptions, split, "split a file by prompt into training, validation and test"
    ),
    "demo": Verb(
        DemoOptions, demo, "train uniform and MORE on a synthetic world, in about a minute"
    ),
    "plan": Verb(
        PlanOptions,
        plan,
        "what a training will take of memory and time, and the recipe that fits, from config.json "
        "alone",
    ),
    "train": Verb(
        TrainOptions, train, "train a reward model on one or more sources of preference pairs"
    ),
    "evaluate": Verb(
        EvaluateOptions, evaluate, "accuracy and calibration of a reward model, per source"
    ),
    "compare-methods": Verb(
        TrialOptions,
        compare_methods,
        "does a method help on these sources: train each with several seeds, and say how sure",
    ),
    "check": Verb(
        CheckOptions,
        check,
        "what is in a checkpoint, and does it work here: perplexity, rewards, memory, parity with "
        "transformers",
    ),
    "plot": Verb(
        PlotOptions,
        plot,
        "a page on one run or several: losses, accuracies, weights, cosines, calibration",
    ),
    "exercise": Verb(
        ExerciseOptions,
        exercise,
        "functions of this package to write yourself, with a check that says what is wrong",
    ),
    "features": Verb(FeaturesOptions, features, "store the pooled states of a frozen checkpoint"),
    "probe": Verb(
        ProbeOptions, probe, "train reward heads on stored states, by any method, over many seeds"
    ),
    "reproduce": Verb(
        ReproduceOptions,
        reproduce,
        "run one of the paper's experiments as a grid, on the built-in ladder or on real "
        "checkpoints",
    ),
    "choose": Verb(
        ChooseOptions,
        choose,
        "which point of a finished grid you want, learned from comparisons of two",
    ),
    "score": Verb(ScoreOptions, score, "add rewards to every line of a JSON lines file"),
}


def build_parser() -> Parser:
    """One sub-command a verb, its options generated from its dataclass."""
    parser = Parser(
        prog="minimore",
        description="Reward models from several sources of human preference (arXiv 2312.07401).",
    )
    parser.add_argument("--version", action="version", version=f"minimore {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    places = {"": verbs}  # where the commands of every group are added
    for name, verb in VERBS.items():
        group, _, last = name.rpartition(" ")
        if group not in places:
            of_group = verbs.add_parser(group, help=GROUPS[group], description=GROUPS[group])
            places[group] = of_group.add_subparsers(dest="step", required=True, metavar="STEP")
        command = places[group].add_parser(last, help=verb.help, description=verb.help)
        command.set_defaults(verb=name)
        add_options(command, verb.options)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    show_what_cannot_be_shown()
    command = "minimore"
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        name = name_of_verb(words)
        if name is not None:
            command = f"minimore {name}"
            words += options_of_run(VERBS[name], words)
        parsed = build_parser().parse_args(words)
        with termination_unwinds():
            return run(parsed)
    except BaseException as error:
        code, message = outcome_of(error)
    if message:
        print(f"{command}: {printable(message)}", file=sys.stderr)
    return code


def name_of_verb(words: list[str]) -> str | None:
    """The name of the command that these words begin with; None if there is no such command."""
    return next((name for name in VERBS if words[: len(name.split())] == name.split()), None)


def options_of_run(verb: Verb, words: list[str]) -> list[str]:
    """What a command that continues a run need not say: the options of the run, as further words.

    So `train --output RUN --resume` is the whole command with which the run began. Options that it
    has nevertheless are left to it.
    """
    named = words_of_resume(words)
    if not issubclass(verb.options, LoopOptions) or not named.resume or not named.output:
        return []
    flags = {word.partition("=")[0] for word in words}
    path = Path(named.output) / "options.json"
    if not path.is_file():
        require(
            {"--model", "--help", "-h"} & flags,
            f"--output {named.output}: there is no run to continue; to begin one, give --model and"
            " all other options",
        )
        return []
    stored = read_checked_json(path)
    missing = {name: value for name, value in stored.items() if flag_of(name) not in flags}
    return to_arguments(verb.options, missing)


def words_of_resume(words: list[str]) -> Namespace:
    """The values of --output and --resume among the words of a command, which may be wrong."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output", nargs="?")
    parser.add_argument("--resume", nargs="?", const=True)
    return parser.parse_known_args(words)[0]


def run(parsed: Namespace) -> int:
    """Check that the arguments are text, make the options of the verb, and carry it out."""
    for value in vars(parsed).values():
        is_text = not any("\udc80" <= c <= "\udcff" for c in str(value))  # bytes that no UTF-8 is
        require(is_text, f"{value}: not UTF-8; expected names that are")
    require(
        parsed.verb == "train" or "LOCAL_RANK" not in os.environ or started_processes() == 1,
        "torchrun: several processes can train a reward model (`train`), and nothing else",
    )
    verb = VERBS[parsed.verb]
    options = from_arguments(verb.options, parsed)
    computes = hasattr(options, "device") and parsed.verb != "plan"
    if computes and started_processes() == 1:  # several refuse a device together
        device_of(options)  # refused before any file is read
    return verb.run(options) or 0


def outcome_of(error: BaseException) -> tuple[int, str]:
    """The exit code of an error and its one line; what no user can cause is raised again.

    2    the user's to mend: input, disk, memory
    1    a model whose numbers are not finite
    130  Ctrl-C
    141  the reader of our output went away
    """
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141, ""
    if isinstance(error, FloatingPointError):
        return 1, str(error)
    if is_out_of_memory(error):
        return 2, (
            "out of memory; train with --memory, with a smaller --micro-tokens elsewhere,"
            " or look for a huge line in the input"
        )
    if isinstance(error, OSError):
        where = str(error)
        name = error.filename2 or error.filename  # of two, that which was to be made by renaming
        if name and error.strerror:
            where = f"{name}: {error.strerror}"
        return 2, f"{where}; check the path, its permissions and the space left"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    raise error


@contextmanager
def termination_unwinds() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise SystemExit, so that half-written files are removed."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, exit_by_signal)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def exit_by_signal(number: int, _: object) -> None:
    """Leave with the exit code that a shell gives to a signal."""
    sys.exit(128 + number)


def show_what_cannot_be_shown() -> None:
    """A name that the terminal cannot show is printed with escapes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
