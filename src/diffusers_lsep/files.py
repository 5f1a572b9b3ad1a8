# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, arrays on disk, and hashes of weights."""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open


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
        mode = _mode_of_a_new_file(partial) if durable else None
        yield partial
        if mode is not None:
            partial.chmod(mode)
            _sync(partial)
        os.replace(partial, path)
        if durable:
            _sync(path.parent)
    except SafetensorError as error:  # of a full disk, for one
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def parse_json(text: str | bytes) -> Any:
    """What a JSON document says. Raises a `ValueError` if it is none, or one that is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("the document is nested too deeply") from None


def write_text(path: str | os.PathLike, text: str, suffix: str = ".partial"):
    """Writes a text file in UTF-8 that appears whole or not at all, as [`whole_file`] has it."""
    with whole_file(path, suffix) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """
    Gives a new folder to write into, which takes the name `target` once the block ends and everything is on disk. If
    the block fails nothing of it stays, and a folder that was there before is as it was. On Linux there is at no time
    none of this name; elsewhere there may be for a moment, and the next call finds the old one.

    Raises:
        `ValueError`: if `target` is a mount point, which cannot be given another folder's place.
        `OSError`: if it cannot be written.
    """
    check_replaceable(target)
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():  # killed between the two renames below
        old.rename(target)
    for leftover in (partial, old):
        remove(leftover)
    partial.mkdir(parents=True)
    try:
        mode = _mode_of_a_new_file(partial / "file")
        yield partial
        for folder, _, files in os.walk(partial):
            for name in files:
                Path(folder, name).chmod(mode)
                _sync(Path(folder, name))
            Path(folder).chmod(stat.S_IMODE(partial.stat().st_mode))  # one that was copied has that of another place
            _sync(Path(folder))
        if not target.exists():
            partial.rename(target)
        elif not _exchange(partial, target):
            target.rename(old)
            partial.rename(target)
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # of a full disk, for one
            raise OSError(f"{target} could not be written: {error}") from error
        raise
    _sync(target.parent)
    for before in (partial, old):
        shutil.rmtree(before, ignore_errors=True)


def _mode_of_a_new_file(path: Path) -> int:
    """What the umask makes of it: safetensors makes files that only their owner can read."""
    with open(path, "xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    path.unlink()
    return mode


def check_replaceable(folder: Path):
    """Refuses a folder that [`whole_folder`] could not replace."""
    if os.path.ismount(folder):
        raise ValueError(f"{folder} is a mount point, which cannot be replaced as a whole: name a folder in it.")


def _exchange(one: Path, other: Path) -> bool:
    """Gives two folders each other's names, both at once; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


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


@contextmanager
def held_folder(folder: Path) -> Iterator[bool]:
    """
    Holds a folder that others may remove where nobody holds it: until the block ends, or the process, however that
    does. Gives whether it is held, which it is not if another process has it or the file system has no locks.
    """
    import fcntl  # which Windows does not have

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = True
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)


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


def make_array(path: Path, dtype: type, shape: tuple[int, ...]):
    """
    Writes an `.npy` of zeros, to be opened as a memory map. It has its space on disk at once: what is written to a map
    whose file has holes ends the process ("Bus error") where the disk is full.

    Raises:
        `OSError`: if the space is not there.
    """
    np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        _allocate(file, str(path))


def write_rows(path: Path, first: int, rows: np.ndarray, durable: bool = False):
    """
    Writes rows of an `.npy` from [`make_array`], which other processes may write to at the same time, from other
    machines too: not through a map, of which a network's file system writes back whole pages, with what lay beside the
    rows when they were read.

    Args:
        path (`Path`): The array.
        first (`int`): Where the rows go.
        rows (`np.ndarray`): The rows.
        durable (`bool`, defaults to `False`): Whether they are on disk afterwards.

    Raises:
        `OSError`: if they cannot be written.
    """
    array = np.load(path, mmap_mode="r")
    place = array.offset + first * array.strides[0]
    view = np.ascontiguousarray(rows, array.dtype).data.cast("B")
    descriptor = os.open(path, os.O_WRONLY)
    try:
        while view:
            written = os.pwrite(descriptor, view, place)
            view, place = view[written:], place + written
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_temporary_array(folder: str | os.PathLike, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """
    A memory-mapped array in a file without a name, in a folder. It is gone with the process, however that ends.

    Raises:
        `OSError`: if there is no space for it.
    """
    with tempfile.TemporaryFile(dir=os.fspath(folder)) as file:
        file.truncate(np.dtype(dtype).itemsize * int(np.prod(shape)))
        _allocate(file, str(folder))
        return np.memmap(file, dtype, "r+", shape=shape)


def _allocate(file: IO[bytes], where: str):
    """Takes the space of a file that has its length but holes, all of zeros."""
    size = os.fstat(file.fileno()).st_size
    try:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # macOS and some file systems have none
            if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            head, zeros = file.read(4096), bytes(1 << 20)
            file.seek(0)
            file.write(head)  # what there is already
            while size > file.tell():
                file.write(zeros[: size - file.tell()])
            file.flush()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {size / 1e9:.3f} GB are needed", where) from error


def hash_file(path: str | os.PathLike) -> str:
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

    def open_file(path: Path):
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or is no safetensors file ({error}).") from None

    with ExitStack() as stack:
        opened = [stack.enter_context(open_file(path)) for path in files]
        file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118, it is not a dictionary
        return _hash_tensors((name, cast(file_of[name].get_tensor(name))) for name in sorted(file_of))


def _hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
