"""A disk that loses its power after every event, by record and replay.

Two disks are told apart. An *ordered* one has made every change of names that was asked for so far,
and of every file what was brought to the disk (fsync); what was not is lost, so that the file is
empty. A *lazy* one has of every directory only the names that were brought to the disk, too.
"""

import os
import threading
from pathlib import Path

CHANGES = ("replace", "rename", "unlink", "mkdir", "rmdir")
DIRECTORY = None


class Disk:
    """Records what a power cut would leave of a directory after every event within.

    states: {path: content, or DIRECTORY} each, no two alike. lazy: the last state of a lazy disk.
    """

    def __init__(self, root, monkeypatch):
        self.root, self.lock, self.states = root, threading.RLock(), []
        self.seen = set()
        self.id_of = {}  # inode -> a number of its own, since inodes are used again
        self.next_id = 0
        self.content = {}  # id of a file -> what was brought to the disk
        self.names = {}  # id of a directory -> {name: id} that were brought to the disk
        self.directories = {}  # id -> whether it is one
        for name in CHANGES:
            monkeypatch.setattr(os, name, self.recorded(getattr(os, name)))
        self.fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.recorded_fsync)
        self.record()

    def recorded(self, change):
        def call(*arguments, **named):
            with self.lock:
                try:
                    return change(*arguments, **named)
                finally:
                    self.record()

        return call

    def recorded_fsync(self, descriptor):
        with self.lock:
            self.fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path == self.root or self.root in path.parents:
                self.scan()
                id = self.id_of[os.fstat(descriptor).st_ino]
                if path.is_dir():
                    self.names[id] = {
                        part.name: self.id_of[part.lstat().st_ino] for part in path.iterdir()
                    }
                else:
                    self.content[id] = path.read_bytes()
            self.record()

    def scan(self):
        """{path: id} of what is there; an inode that is gone loses its id."""
        paths = [self.root, *self.root.rglob("*")]
        inodes = {path: path.lstat().st_ino for path in paths}
        self.id_of = {i: id for i, id in self.id_of.items() if i in set(inodes.values())}
        for inode in inodes.values():
            if inode not in self.id_of:
                self.id_of[inode] = self.next_id
                self.next_id += 1
        return {path: self.id_of[inode] for path, inode in inodes.items()}

    def record(self):
        with self.lock:
            now = self.scan()
            is_directory = {id: path.is_dir() for path, id in now.items()}
            ordered = {
                str(path.relative_to(self.root)): DIRECTORY
                if path.is_dir()
                else self.content.get(id, b"")
                for path, id in now.items()
                if path != self.root
            }
            self.directories |= is_directory
            self.lazy = dict(self.lazy_tree(now[self.root], ""))
            self.add(ordered)
            self.add(self.lazy)

    def lazy_tree(self, directory, prefix):
        for name, id in self.names.get(directory, {}).items():
            path = f"{prefix}{name}"
            if self.directories.get(id):
                yield path, DIRECTORY
                yield from self.lazy_tree(id, f"{path}/")
            else:
                yield path, self.content.get(id, b"")

    def add(self, state):
        key = hash(frozenset(state.items()))
        if key not in self.seen:
            self.seen.add(key)
            self.states.append(state)


def restore(state, root):
    """Make a directory as a power cut has left it."""
    root.mkdir(parents=True)
    for path, content in state.items():
        if content is DIRECTORY:
            (root / path).mkdir(parents=True, exist_ok=True)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
    return root
