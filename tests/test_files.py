# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear whole or not at all."""

import errno
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffusers_lsep import files
from diffusers_lsep.data.moments_writer import MomentsShardWriter, moments_features, write_json
from diffusers_lsep.figures import save_figure
from diffusers_lsep.files import (
    held_folder,
    make_array,
    make_temporary_array,
    whole_file,
    whole_folder,
    write_rows,
    write_text,
)
from diffusers_lsep.training.log import plot_curves


ERRORS = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", [".partial", ".0123.tmp"])
def test_a_file_has_its_name_once_it_is_whole(tmp_path, suffix):
    path = tmp_path / "a.json"
    for text in ("old", "new"):
        before = path.read_text() if path.exists() else None
        with whole_file(str(path), suffix) as partial:
            partial.write_text(text)
            assert partial == tmp_path / f".a.json{suffix}"
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("was_there", [True, False])
def test_a_file_that_fails_is_as_it_was(tmp_path, error, was_there):
    path = tmp_path / "a.json"
    if was_there:
        path.write_text("old")
    with pytest.raises(type(error)):
        with whole_file(path) as partial:
            partial.write_text("half")
            raise error
    assert names(tmp_path) == (["a.json"] if was_there else [])
    assert not was_there or path.read_text() == "old"


def test_a_disk_that_is_too_small_for_weights_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match="a.safetensors could not be written: .*No space left"):
        with whole_file(tmp_path / "a.safetensors"):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert names(tmp_path) == []


@pytest.mark.parametrize("durable", [False, True])
def test_rows_are_written_and_what_is_beside_them_is_not(tmp_path, durable):
    path, expected = tmp_path / "array.npy", np.zeros((5, 3, 2), np.float32)
    make_array(path, np.float32, expected.shape)
    before = np.load(path, mmap_mode="r+")
    before[:] = expected[:] = 7
    before.flush()
    for first, count in ((3, 2), (0, 1)):
        expected[first : first + count] = np.arange(count * 6).reshape(count, 3, 2)
        write_rows(path, first, expected[first : first + count].astype(np.float64), durable)
    np.testing.assert_array_equal(np.load(path), expected)


def test_a_file_that_nobody_wrote_is_an_error(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(FileNotFoundError):
        with whole_file(tmp_path / "a.json"):
            pass
    assert (tmp_path / "a.json").read_text() == "old"


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)

        def record(*arguments, name=name, function=function):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(os, name, record)
    write_text(tmp_path / "a.json", "text")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder that holds the name


def test_write_text_keeps_the_old_file_if_it_fails(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old ×\n")
    assert path.read_bytes() == "old ×\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old ×\n" and names(tmp_path) == ["a.json"]
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "a.json", "new")
    assert names(tmp_path) == ["a.json"]


def fill(folder, text):
    (folder / "inner").mkdir()
    (folder / "inner" / "a").write_text(text)


@pytest.mark.parametrize("error", ERRORS)
def test_a_folder_is_replaced_as_a_whole(tmp_path, error):
    target = tmp_path / "deep" / "folder"
    with whole_folder(target) as partial:
        fill(partial, "old")
        assert not target.exists()
    with pytest.raises(type(error)):
        with whole_folder(target) as partial:
            fill(partial, "half")
            raise error
    assert names(target.parent) == ["folder"] and (target / "inner" / "a").read_text() == "old"
    with whole_folder(target) as partial:
        (partial / "b").write_text("new")
    assert names(target.parent) == ["folder"] and names(target) == ["b"]


def test_a_folder_that_cannot_take_its_name_leaves_the_old_one(tmp_path, monkeypatch):
    rename = Path.rename

    def fail(path, target):
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    with whole_folder(tmp_path / "folder") as partial:
        fill(partial, "old")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)  # a system that cannot
    with whole_folder(tmp_path / "folder") as partial:
        fill(partial, "old")
    assert names(tmp_path) == ["folder"]
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        with whole_folder(tmp_path / "folder") as partial:
            fill(partial, "new")
    assert names(tmp_path) == ["folder"] and (tmp_path / "folder" / "inner" / "a").read_text() == "old"


@pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
def test_a_folder_that_is_replaced_is_there_at_any_moment(tmp_path, monkeypatch):
    def fail(path, target):
        raise AssertionError(f"{path} is renamed, and something else is for a moment not there")

    with whole_folder(tmp_path / "folder") as partial:
        fill(partial, "old")
    monkeypatch.setattr(Path, "rename", fail)
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "b").write_text("new")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["b"]


def test_weights_that_cannot_be_written_are_an_error_of_the_disk(tmp_path):
    with pytest.raises(OSError, match="folder could not be written: .*No such file"):
        with whole_folder(tmp_path / "folder") as partial:
            save_file({"x": torch.zeros(1)}, partial / "none" / "x.safetensors")
    assert names(tmp_path) == []


# --- Arrays


def allocates_nothing(descriptor, start, size):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.mark.parametrize("allocate", [None, allocates_nothing, "none"])
def test_arrays_have_their_space_at_once(tmp_path, monkeypatch, allocate):
    if allocate == "none":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    elif allocate is not None:
        monkeypatch.setattr(os, "posix_fallocate", allocate, raising=False)
    shape = (3, 1 << 18)
    make_array(tmp_path / "a.npy", np.float32, shape)
    status = (tmp_path / "a.npy").stat()
    assert status.st_blocks * 512 >= status.st_size > 3 << 20
    array = np.load(tmp_path / "a.npy", mmap_mode="r+")
    assert array.shape == shape and array.dtype == np.float32 and not array.any()

    temporary = make_temporary_array(tmp_path, np.float32, shape)
    assert temporary.shape == shape and not temporary.any() and names(tmp_path) == ["a.npy"]
    temporary[2] = 1.0
    assert temporary.sum() == 1 << 18


def test_space_that_is_not_there_is_said(tmp_path, monkeypatch):
    def is_full(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", is_full, raising=False)
    with pytest.raises(OSError, match="No space left on device: 0.013 GB are needed: '.*a.npy'"):
        make_array(tmp_path / "a.npy", np.float32, (3, 1 << 20))
    with pytest.raises(OSError, match=f"No space left on device: 0.013 GB are needed: '{tempfile.gettempdir()}.*'"):
        make_temporary_array(tmp_path, np.float32, (3, 1 << 20))


def test_a_held_folder_is_known_as_such(tmp_path):
    with held_folder(tmp_path) as is_held, held_folder(tmp_path) as is_held_again:
        assert is_held and not is_held_again
    with held_folder(tmp_path) as is_held:
        assert is_held


# --- What is written so


class BrokenFigure(Figure):
    def savefig(self, path, **options):
        Path(path).write_bytes(b"half a picture")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_figures_are_whole(tmp_path, monkeypatch):
    metrics = [{"step": step, "denoising_loss": 1.0 / step} for step in (1, 2)]
    save_figure(tmp_path / "a.png", Figure())
    plot_curves(metrics, tmp_path / "curves.png")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert names(tmp_path) == ["a.png", "curves.png"] and all(data[:4] == b"\x89PNG" for data in before.values())
    monkeypatch.setattr("matplotlib.figure.Figure", BrokenFigure)
    with pytest.raises(OSError, match="No space"):
        save_figure(tmp_path / "a.png", BrokenFigure())
    with pytest.raises(OSError, match="No space"):
        plot_curves(metrics, tmp_path / "curves.png")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_machines_that_share_a_folder_of_latents_use_names_of_their_own(tmp_path):
    features = moments_features({0: "a"}, flip=False, images=False)
    row = {"id": ["x"], "label": [0], "moments": [b"0123"]}
    shard = tmp_path / "data-00000-of-00001.arrow"
    with MomentsShardWriter(shard, features) as one, MomentsShardWriter(shard, features) as two:
        one.write(row)
        two.write(row)
        temporary = names(tmp_path)
        assert len(set(temporary)) == 2
        assert all(name.startswith(f".{shard.name}.") and name.endswith(".tmp") for name in temporary)
    assert names(tmp_path) == [shard.name]

    before = shard.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        with MomentsShardWriter(shard, features) as writer:
            writer.write(row)
            raise KeyboardInterrupt
    with pytest.raises(Exception, match="int64"):  # found when the rows are put together, as the block ends
        with MomentsShardWriter(shard, features) as writer:
            writer.write({**row, "label": ["no number"]})
    assert names(tmp_path) == [shard.name] and shard.read_bytes() == before

    write_json(tmp_path / "metadata.json", {"a": "×"})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "metadata.json", {"a": object()})
    assert (tmp_path / "metadata.json").read_text(encoding="utf-8") == '{\n  "a": "×"\n}\n'
    assert names(tmp_path) == [shard.name, "metadata.json"]


def test_planted_links_are_not_followed(tmp_path):
    (tmp_path / "victim").write_text("private")
    (tmp_path / ".a.json.partial").symlink_to(tmp_path / "victim")
    write_text(tmp_path / "a.json", "text")
    assert (tmp_path / "victim").read_text() == "private" and not (tmp_path / "a.json").is_symlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("")
    (tmp_path / ".b.partial").symlink_to(tmp_path / "folder")
    with whole_folder(tmp_path / "b") as partial:
        (partial / "new").write_text("")
    assert names(tmp_path / "folder") == ["kept"] and names(tmp_path / "b") == ["new"]


def test_what_a_kill_between_the_renames_left_is_not_lost(tmp_path):
    (tmp_path / ".a.old").mkdir()
    (tmp_path / ".a.old" / "old").write_text("")
    with pytest.raises(KeyboardInterrupt):
        with whole_folder(tmp_path / "a"):
            raise KeyboardInterrupt
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["old"]


def test_files_can_be_read_by_those_who_may_read_the_folder(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "a") as partial:
            save_file({"x": torch.zeros(1)}, partial / "x.safetensors")
            (partial / "y.json").write_text("")
        with whole_file(tmp_path / "a" / "z.safetensors") as partial:
            save_file({"x": torch.zeros(1)}, partial)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()}
    assert modes == {"x.safetensors": 0o640, "y.json": 0o640, "z.safetensors": 0o640}


def test_mount_points_are_refused():
    with pytest.raises(ValueError, match="/proc is a mount point"):
        with whole_folder(Path("/proc")):
            pass
