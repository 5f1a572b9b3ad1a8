# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Counts what a process changes on disk, and kills it at one of these changes."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch

from diffusers_lsep import files


# Python's audit events of the system calls that change a folder, the path first.
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"}
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class FileEvents:
    """
    Watches this process from now on. An event is a system call that changes something below a folder, just before it
    is made: files that are opened for writing, allocated, renamed or removed, folders that are made or removed. A file
    that is made or emptied as it is opened is two events: the second one when that has happened. What changes nothing
    is none, such as the removal of what is not there.

    Args:
        root (`Path`): The folder.
        kill_at (`int`, *optional*): SIGKILL at the event of this number, counted from 0; none if not given.
        log (`Path`, *optional*): A file that gets a line for each event.
    """

    def __init__(self, root: Path, kill_at: int | None = None, log: Path | None = None):
        self.root, self.kill_at, self.count = f"{root}{os.sep}", kill_at, 0
        self.log = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.is_killing = False
        sys.addaudithook(self._hear)
        # System calls that Python does not tell of, and the code in Rust that writes weights.
        self._wrap(files, "_exchange", lambda one, other: str(one))
        self._wrap(os, "posix_fallocate", lambda descriptor, *sizes: os.readlink(f"/proc/self/fd/{descriptor}"))
        self._wrap(safetensors.torch, "serialize_file", lambda tensors, path, *more, **options: str(path))

    def _wrap(self, module, name: str, path_of: Callable[..., str]):
        function = getattr(module, name)

        def call(*args, **options):
            self._count(name, path_of(*args, **options))
            return function(*args, **options)

        setattr(module, name, call)

    def _hear(self, event: str, args: tuple):
        if self.is_killing:
            return
        if event == "open":
            path, _, flags = args
            if flags & TO_WRITE and isinstance(path, (str, bytes)):
                path = os.path.abspath(os.fsdecode(path))
                if path.startswith(self.root) and not os.path.isdir(path):  # of a file without a name
                    makes_it = flags & os.O_CREAT and not os.path.lexists(path)
                    self._count("open", path)
                    if makes_it or flags & os.O_TRUNC:
                        self._count("opened", path, lambda: os.close(os.open(path, flags, 0o666)))
        elif event in CHANGES:
            path = os.fsdecode(args[0])
            folder = next((value for value in args[1:] if isinstance(value, int) and value >= 0), None)
            if event in ("os.remove", "os.rmdir") and folder is not None and not os.path.isabs(path):
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
            if os.path.lexists(path) == (event not in ("os.mkdir", "os.symlink")):
                self._count(event, os.path.abspath(path))

    def _count(self, event: str, path: str, before_kill: Callable[[], object] = lambda: None):
        if not path.startswith(self.root):
            return
        number, self.count = self.count, self.count + 1
        if self.log is not None:
            os.write(self.log, f"{number} {event} {path.removeprefix(self.root)}\n".encode())
        if number == self.kill_at:
            self.is_killing = True
            before_kill()
            os.kill(os.getpid(), signal.SIGKILL)
