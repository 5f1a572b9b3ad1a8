# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, and hashes of weights."""

import hashlib
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open


@contextmanager
def whole_file(path: str | os.PathLike, suffix: str = ".partial", durable: bool = True) -> Iterator[Path]:
    """
    Gives a name beside `path` to write a file under, which takes the name `path` once the block ends and it is on
    disk. If the block fails nothing of it stays, and a file that was there before is as it was.

    Args:
        path (`str` or `os.PathLike`): The file, in a folder that exists.
        suffix (`str`, defaults to `".partial"`):
            How the name ends that the file has until then; a random one where others may write the same file.
        durable (`bool`, defaults to `True`):
            Whether a power cut may not undo it, which takes some milliseconds a file.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}{suffix}")
    partial.unlink(missing_ok=True)  # what is written there would follow a link
    try:
        yield partial
        if durable:
            _sync(partial)
        os.replace(partial, path)
        if durable:
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str, suffix: str = ".partial"):
    """Writes a text file in UTF-8 that appears whole or not at all, as [`whole_file`] has it."""
    with whole_file(path, suffix) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """
    Gives a new folder to write into, which takes the name `target` once the block ends and everything is on disk. If
    the block fails nothing of it stays, and a folder that was there before is as it was.

    Raises:
        `ValueError`: if `target` is a mount point, which cannot be given another folder's place.
    """
    if os.path.ismount(target):
        raise ValueError(f"{target} is a mount point, which cannot be replaced as a whole: name a folder in it.")
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():  # killed between the two renames below
        old.rename(target)
    for leftover in (partial, old):
        remove(leftover)
    partial.mkdir(parents=True)
    # safetensors makes files that only their owner can read.
    mode = stat.S_IMODE(partial.stat().st_mode) & 0o666
    try:
        yield partial
        for folder, _, files in os.walk(partial):
            for name in files:
                Path(folder, name).chmod(mode)
                _sync(Path(folder, name))
            _sync(Path(folder))
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """
    Keeps other processes out of a folder until the block ends, by a lock on its file `.lock`: of those that ask for it
    here, and on file systems that have locks.

    Raises:
        `ValueError`: if another process has the folder, which is named.
    """
    import fcntl  # which Windows does not have

    path = folder / ".lock"
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{str(folder)!r} is in use by {file.read().strip() or 'another process'}.") from None
        except OSError:  # there are no locks here
            yield
            return
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            # The process that had the folder has removed this file meanwhile, and others may have made it anew.
            raise ValueError(f"{str(folder)!r} was in use by another process until now: try again.")
        file.truncate(0)
        file.write(f"the process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M')}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def remove(path: Path):
    """Deletes a file, a link (and not what it leads to) or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_weights(model: torch.nn.Module, prefixes: tuple[str, ...] = ("",)) -> str:
    """
    SHA-256 of the names and values of a model's state dict, which says whether two models are the same.

    Args:
        model (`torch.nn.Module`): The model.
        prefixes (`tuple[str, ...]`, defaults to all): How the names begin that count.
    """
    return _hash_tensors((k, v) for k, v in sorted(model.state_dict().items()) if k.startswith(prefixes))


def hash_saved_weights(files: Iterable[Path], *dtypes: torch.dtype) -> str:
    """
    [`hash_weights`] of the model in these safetensors files, whatever its shards, without building it.

    Args:
        files (`Iterable[Path]`): The files.
        dtypes (`torch.dtype`): What the model was cast to after loading, one after the other.
    """

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        for dtype in dtypes if tensor.is_floating_point() else ():
            tensor = tensor.to(dtype)
        return tensor

    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
        file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118, it is not a dictionary
        return _hash_tensors((name, cast(file_of[name].get_tensor(name))) for name in sorted(file_of))


def _hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
