# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Data that have changed since a run began are noticed when it goes on; data that were moved or copied go on."""

import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from image_folders import save_class_folders
from PIL import Image

from diffusers_lsep.data.encoding import open_images_to_encode
from diffusers_lsep.data.fingerprint import Fingerprint, fingerprint_files, join
from diffusers_lsep.data.moments import OriginalMomentsDataset


SIZES = [(8, 8)] * 6


@pytest.fixture
def images(tmp_path):
    return save_class_folders(tmp_path / "images", ["ant", "bee"], SIZES)


def repaint(path: Path):
    """Other pixels in a file of the same size and time."""
    before = path.stat()
    image = Image.open(path)
    while True:
        image.putpixel((3, 3), tuple(np.random.default_rng().integers(0, 256, 3).tolist()))
        image.save(path)
        data = path.read_bytes()
        if len(data) <= before.st_size:
            break
    path.write_bytes(data + bytes(before.st_size - len(data)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def copy(path: Path) -> Path:
    """Elsewhere, and with other times."""
    target = path.with_name(f"copy-{path.name}")
    (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    for folder, _, files in os.walk(target):
        for name in files:
            os.utime(os.path.join(folder, name), (1e9, 1e9))
    return target


def as_folder(images: Path) -> Path:
    return images


def as_tar(images: Path) -> Path:
    with tarfile.open(images.with_suffix(".tar"), "w") as archive:
        archive.add(images, ".")
    return images.with_suffix(".tar")


def as_zip(images: Path) -> Path:
    with zipfile.ZipFile(images.with_suffix(".zip"), "w") as archive:
        for path in sorted(images.rglob("*.png")):
            archive.write(path, path.relative_to(images))
    return images.with_suffix(".zip")


def as_parquet(images: Path) -> Path:
    folder = images.parent / "parquet"
    folder.mkdir(exist_ok=True)
    dataset = datasets.load_dataset("imagefolder", data_files={"train": f"{images}/**"}, split="train")
    dataset.to_parquet(folder / "train.parquet")
    return folder


@pytest.mark.parametrize("store", [as_folder, as_tar, as_zip, as_parquet])
def test_images_to_encode(images, store):
    """Moved and copied they are the same; one other pixel is found, and named."""
    source = store(images)
    before = open_images_to_encode(source).fingerprint()
    assert open_images_to_encode(copy(source)).fingerprint().value == before.value
    before.save(images.parent / "before.npy")
    repaint(images / "bee" / "3.png")
    after = open_images_to_encode(store(images)).fingerprint()
    assert after.value != before.value
    changes = after.find_changes(images.parent / "before.npy")
    assert len(changes) == 1 and "3.png" in after.describe(changes, "an image")
    assert before.find_changes(images.parent / "before.npy") == []


def test_places_in_large_files_and_many_files(tmp_path):
    paths = [tmp_path / f"{index}.arrow" for index in range(2)]
    for path in paths:
        path.write_bytes(bytes(1_000_000))
    before = fingerprint_files(paths)
    before.save(tmp_path / "before.npy")
    for place, seen in ((0, True), (999_999, True), (5_000, False)):  # between two of the 256 places
        with open(paths[1], "r+b") as file:
            file.seek(place)
            file.write(b"\1")
        after = fingerprint_files(paths)
        assert (after.find_changes(tmp_path / "before.npy") == [1]) == seen
        assert after.describe([1], "") == str(paths[1])
        paths[1].write_bytes(bytes(1_000_000))
    assert fingerprint_files(paths[::-1]).value == before.value  # both are the same
    paths[0].unlink()
    assert fingerprint_files(paths).value != before.value

    read = []
    sizes = np.full(30_000, 10)
    of_many = Fingerprint(sizes, lambda index, *_: read.append(index) or b"", lambda index: f"image {index}")
    assert len(read) == 10_000 and (read[0], read[-1]) == (0, 29_999)
    sizes[12_345] += 1
    of_many.save(tmp_path / "many.npy")
    assert Fingerprint(sizes, lambda *_: b"", str).find_changes(tmp_path / "many.npy") == [12_345]
    assert Fingerprint(sizes[1:], lambda *_: b"", str).find_changes(tmp_path / "many.npy") == []


def test_several_sources_are_one(tmp_path):
    parts = [Fingerprint([1] * count, lambda *_: b"", f"{name} {{}}".format) for count, name in ((2, "a"), (3, "b"))]
    whole = join(*parts)
    assert [whole.name_of(index) for index in range(5)] == ["a 0", "a 1", "b 0", "b 1", "b 2"]
    whole.save(tmp_path / "before.npy")
    parts[1].digests[1] = 7
    assert join(*parts).find_changes(tmp_path / "before.npy") == [3]
    assert whole.describe([3, 4], "") == "b 1 (and 1 more)" and whole.describe([], "an image") == "an image"


@pytest.mark.slow
@pytest.mark.parametrize("store", [as_folder, as_parquet])
def test_training_goes_on_with_the_same_images_alone(train, images, tmp_path, store):
    source = store(images)
    flags = ["--resolution", 8, "--validation_split", 0.2, "--max_train_steps"]
    assert train("--train_data_dir", source, *flags, 2) == 0
    resume = ["--resume_from_checkpoint", "latest"]
    assert train("--train_data_dir", copy(source), *flags, 3, *resume) == 0
    repaint(images / "ant" / "2.png")
    with pytest.raises(ValueError, match=r"a run with other data: .*2\.png has changed since it began"):
        train("--train_data_dir", store(images), *flags, 4, *resume)
    # A checkpoint by itself does not know which image it is. One of an older version knows nothing, and goes on.
    shutil.copytree(tmp_path / "run" / "checkpoint-3", tmp_path / "alone" / "checkpoint-3")
    resume[1] = tmp_path / "alone" / "checkpoint-3"
    with pytest.raises(ValueError, match="other data: an image has changed since it began"):
        train("--train_data_dir", store(images), *flags, 4, *resume, output_dir=tmp_path / "other")


@pytest.mark.slow
def test_training_goes_on_with_the_same_latents_alone(train, tiny_vae_folder, tmp_path):
    folder = tmp_path / "vae-sd"
    folder.mkdir()
    for index in range(6):
        np.save(folder / f"img-mean-std-{index:08d}.npy", np.full((8, 4, 4), index, np.float32))
    (folder / "dataset.json").write_text(
        '{"labels": [' + ", ".join(f'["img-mean-std-{index:08d}.npy", {index % 2}]' for index in range(6)) + "]}"
    )
    flags = ["--pretrained_vae_model_name_or_path", tiny_vae_folder, "--max_train_steps"]
    assert train("--latents_dir", folder, *flags, 1) == 0
    path = folder / "img-mean-std-00000004.npy"
    np.save(path, np.load(path) + 1)
    with pytest.raises(ValueError, match=r"img-mean-std-00000004\.npy has changed since it began"):
        train("--latents_dir", folder, *flags, 2, "--resume_from_checkpoint", "latest")
    assert len(OriginalMomentsDataset(folder).fingerprint().digests) == 6
