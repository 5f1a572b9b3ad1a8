# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Images as users have them, their labels, and the stream of samples that training consumes."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from image_folders import save_class_folders

from diffusers_lsep.data.archives import pair_labels
from diffusers_lsep.data.encoding import open_images_to_encode
from diffusers_lsep.data.images import (
    ImageSource,
    center_crop,
    convert_mode,
    load_image_dataset,
    open_images,
    read_labels,
)
from diffusers_lsep.data.moments import sample_posterior
from diffusers_lsep.data.sources import cut_off
from diffusers_lsep.data.stream import SampleStream, epoch_order


DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"


# --- Images


def test_every_mode_of_image_is_converted():
    rgb = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    grey = rgb.convert("L")
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA"):
        image = rgb.convert("L" if mode == "LA" else "P" if mode == "PA" else "RGB").convert(mode)
        for channels, wanted in ((1, "L"), (3, "RGB")):
            assert convert_mode(image, channels).mode == wanted, mode
    np.testing.assert_array_equal(np.asarray(convert_mode(rgb, 3)), np.asarray(rgb))
    np.testing.assert_array_equal(np.asarray(convert_mode(grey, 3))[..., 1], np.asarray(grey))
    np.testing.assert_array_equal(np.asarray(convert_mode(rgb.convert("CMYK"), 3)), np.asarray(rgb))


def test_sixteen_bits_become_eight():
    values = np.array([[0, 257], [256 * 128, 65535]], dtype=np.uint16)
    image = PIL.Image.fromarray(values)
    assert image.mode.startswith("I")
    np.testing.assert_array_equal(np.asarray(convert_mode(image, 1)), [[0, 1], [128, 255]])
    np.testing.assert_array_equal(np.asarray(convert_mode(image.convert("I"), 1)), [[0, 1], [128, 255]])


def test_transparent_pixels_show_white():
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0, :, 3] = 0, 255, 51
    for image in (PIL.Image.fromarray(pixels), PIL.Image.fromarray(pixels[..., [0, 3]], mode="LA")):
        np.testing.assert_array_equal(np.asarray(convert_mode(image, 1)), [[255, 0, 204]])


@pytest.mark.parametrize(
    "image, message",
    [
        (PIL.Image.new("F", (2, 2)), "no known range"),
        (PIL.Image.fromarray(np.array([[-1, 70000]], dtype=np.int32)), "from -1 to 70000 are outside 0..65535"),
    ],
)
def test_pixels_without_a_range_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        convert_mode(image, 3)


def test_center_crop():
    # 17 x 40, to 4: halved by a box filter twice (8 x 20, 4 x 10), then the middle of the longer side
    pixels = np.random.default_rng(0).integers(0, 256, (40, 17), dtype=np.uint8)
    halved = np.asarray(PIL.Image.fromarray(pixels).resize((8, 20), PIL.Image.Resampling.BOX))
    quartered = halved.reshape(10, 2, 4, 2).mean(axis=(1, 3))
    cropped = np.asarray(center_crop(PIL.Image.fromarray(pixels), 4))
    np.testing.assert_allclose(cropped, quartered[3:7], atol=1.01)  # rounded twice
    # less than twice too large, or too small: one bicubic step, whose longer side is rounded
    for width, height in ((7, 5), (5, 7), (3, 2), (4, 4)):
        image = PIL.Image.fromarray(pixels[:height, :width])
        scale = 4 / min(width, height)
        resized = np.asarray(image.resize((round(width * scale), round(height * scale)), PIL.Image.Resampling.BICUBIC))
        top, left = (resized.shape[0] - 4) // 2, (resized.shape[1] - 4) // 2
        np.testing.assert_array_equal(np.asarray(center_crop(image, 4)), resized[top : top + 4, left : left + 4])


def test_exif_rotation_is_applied(tmp_path):
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8, 0] = 255  # left half red
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    (tmp_path / "a").mkdir()
    PIL.Image.fromarray(pixels).save(tmp_path / "a" / "photo.png", exif=exif)
    dataset = datasets.load_dataset("imagefolder", data_files=str(tmp_path / "**"), split="train")
    images = ImageSource(dataset, np.zeros(1, np.int64), 8).load(np.array([0]), np.array([False]))
    assert images[0, 0, :3].mean() > 0.9 and images[0, 0, 5:].mean() < -0.9  # the top is red


# --- Data sets


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, (value, value, value)).save(path)


def test_bundled_digits():
    splits = load_image_dataset(train_data_dir=DIGITS)
    source, held_out, names = open_images(splits, 8, 1, validation_split="test")
    assert names == [str(digit) for digit in range(10)]
    assert (len(source.labels), len(held_out.labels)) == (1437, 360)
    counts = np.bincount(source.labels) / np.bincount(np.concatenate([source.labels, held_out.labels]))
    assert np.abs(counts - 0.8).max() < 0.01
    images = source.load(np.arange(100), np.zeros(100, dtype=bool))
    assert images.shape == (100, 1, 8, 8)
    sixteenths = (images + 1) * 8
    torch.testing.assert_close(sixteenths, sixteenths.round(), atol=0.035, rtol=0)
    assert images.min() == -1 and images.max() == 1


@pytest.mark.slow
def test_bundled_part_of_mnist():
    splits = load_image_dataset(train_data_dir=DIGITS.parent / "mnist")
    source, held_out, names = open_images(splits, 28, 1, validation_split="test")
    assert names == [str(digit) for digit in range(10)]
    assert (len(source.labels), len(held_out.labels)) == (8000, 2000)
    counts = np.bincount(source.labels) / np.bincount(np.concatenate([source.labels, held_out.labels]))
    assert np.abs(counts - 0.8).max() < 0.001
    both = [rows.load(np.arange(len(rows.labels)), np.zeros(len(rows.labels), bool)) for rows in (source, held_out)]
    assert both[0].shape == (8000, 1, 28, 28) and both[0].min() == -1 and both[0].max() == 1
    assert len({image.numpy().tobytes() for images in both for image in images}) == 10_000


def test_an_image_that_is_too_narrow_is_named(tmp_path):
    """Of 1 x 40,000 pixels, the scaled image would take gigabytes."""
    (tmp_path / "train").mkdir()
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir()
        PIL.Image.new("L", (1, 40_000)).save(tmp_path / "train" / name / "narrow.png")
    source, *_ = open_images(load_image_dataset(train_data_dir=tmp_path / "train"), 256, 1)
    with pytest.raises(ValueError, match="narrow.png.*1 x 40000 pixels are too narrow to be scaled to 256 x 10240000"):
        source.load(np.arange(1), np.zeros(1, bool))


@pytest.mark.parametrize("label", [100_000, 10**9, 2**62])
def test_labels_that_number_no_classes(tmp_path, label):
    rows = {"image": [PIL.Image.new("L", (8, 8))] * 2, "label": [0, label]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=f"number the classes from 0 on, and below 100,000, but one is {label}"):
        open_images(load_image_dataset(train_data_dir=tmp_path), 8, 1)
    with pytest.raises(ValueError, match=f"below 100,000, but one is {label}"):
        pair_labels(json.dumps({"labels": [["a.png", 0], ["b.png", label]]}), ["a.png", "b.png"])


def test_image_folder_with_a_subfolder_per_class(tmp_path):
    # names that `datasets` would take for a split
    for i, name in enumerate(("zebra/test_1.png", "ant/train-2.PNG", "ant/val 3.png")):
        write_image(tmp_path / name, 100 * i)
    splits = load_image_dataset(train_data_dir=tmp_path)
    source, held_out, names = open_images(splits, 8, 3)
    assert held_out is None and source.labels.tolist() == [0, 0, 1] and names == ["ant", "zebra"]


def test_image_folder_with_one_class(tmp_path):
    """`datasets` gives no labels where there is only one."""
    for folder in (tmp_path / "flat", tmp_path / "splits" / "train", tmp_path / "splits" / "test"):
        for i in range(2):
            write_image(folder / "bee" / f"{i}.png")
    for name in ("flat", "splits"):
        source, _, names = open_images(load_image_dataset(train_data_dir=tmp_path / name), 8, 3)
        assert names == ["bee"] and source.labels.tolist() == [0, 0]
    # images in no subfolder have no class
    write_image(tmp_path / "loose" / "1.png")
    write_image(tmp_path / "mixed" / "1.png")
    write_image(tmp_path / "mixed" / "bee" / "1.png")
    for name in ("loose", "mixed"):
        with pytest.raises(ValueError, match="if all its images lie in subfolders, one per class"):
            open_images(load_image_dataset(train_data_dir=tmp_path / name), 8, 3)


def test_image_folder_with_splits(tmp_path):
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            write_image(tmp_path / split / name / "1.png")
    splits = load_image_dataset(train_data_dir=tmp_path)
    source, held_out, names = open_images(splits, 8, 3, validation_split="test")
    assert names == ["ant", "bee"] and source.labels.tolist() == held_out.labels.tolist() == [0, 1]


def test_folders_are_found_from_where_one_stands(tmp_path, monkeypatch):
    for split, name in (("train", "ant"), ("train", "bee"), ("test", "bee")):
        write_image(tmp_path / "data" / split / name / "1.png")
    monkeypatch.chdir(tmp_path)
    for path in ("data", "./data", "data/", Path("data")):
        assert {name: len(rows) for name, rows in load_image_dataset(train_data_dir=path).items()} == {
            "train": 2,
            "test": 1,
        }


def test_names_of_splits_may_go_on(tmp_path):
    """As for `datasets`; hidden folders make no class of `train`; images beside classes of a split have no label."""
    names = ("training", "val_small", "test-2020", "test1", "masks", "tested")
    for name in names:
        write_image(tmp_path / "splits" / name / "ant" / "1.png")
    counts = {name: len(rows) for name, rows in load_image_dataset(train_data_dir=tmp_path / "splits").items()}
    assert counts == {"train": 1, "validation": 1, "test": 2}
    for name in ("car/1.png", "plane/1.png", "train/1.png", "train/.ipynb_checkpoints/1.png"):
        write_image(tmp_path / "classes" / name)
    source, _, names = open_images(load_image_dataset(train_data_dir=tmp_path / "classes"), 8, 3)
    assert names == ["car", "plane", "train"] and len(source.labels) == 3
    for name in ("train/1.png", "train/2.png", "val/1.png"):
        write_image(tmp_path / "flat" / name)
    flat = load_image_dataset(train_data_dir=tmp_path / "flat")
    assert {name: (len(rows), rows.column_names) for name, rows in flat.items()} == {
        "train": (2, ["image"]),
        "validation": (1, ["image"]),
    }


def test_classes_may_be_called_as_splits_are(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("bus", "train", "dev"):
            for i in range(count):
                write_image(tmp_path / "splits" / split / name / f"{i}.png")
    splits = load_image_dataset(train_data_dir=tmp_path / "splits")
    source, held_out, names = open_images(splits, 8, 3, validation_split="test")
    assert set(splits) == {"train", "test"} and names == ["bus", "dev", "train"]
    assert len(source.labels) == 9 and len(held_out.labels) == 6
    for name in ("bus", "car", "train"):
        write_image(tmp_path / "flat" / name / "1.png")
    source, _, names = open_images(load_image_dataset(train_data_dir=tmp_path / "flat"), 8, 3)
    assert names == ["bus", "car", "train"] and source.labels.tolist() == [0, 1, 2]


def test_the_name_of_a_folder_is_no_pattern(tmp_path):
    for folder, names in (("photos[2024]", ("ant", "bee")), ("photos2", ("wasp", "yak"))):
        for name in names:
            write_image(tmp_path / folder / name / "1.png")
            write_image(tmp_path / "splits" / folder / "train" / name / "1.png")
    for parent in (tmp_path, tmp_path / "splits"):
        assert open_images(load_image_dataset(train_data_dir=parent / "photos[2024]"), 8, 3)[2] == ["ant", "bee"]


def test_labels_of_edm2_are_not_passed_over(tmp_path):
    write_image(tmp_path / "00000" / "img00000000.png")
    (tmp_path / "dataset.json").write_text('{"labels": [["00000/img00000000.png", 3]]}')
    with pytest.raises(ValueError, match="has a dataset.json, whose labels only examples/encode_latents.py reads"):
        load_image_dataset(train_data_dir=tmp_path)
    assert len(load_image_dataset(train_data_dir=tmp_path, labelled=False)["train"]) == 1


def test_encoding_reads_the_labels_that_training_reads(tmp_path):
    lines = [{"file_name": f"images/{i}.png", "label": ["wasp", "ant", "wasp"][i]} for i in range(3)]
    for line in lines:
        write_image(tmp_path / "listed" / line["file_name"])
    (tmp_path / "listed" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("ant/1.png", "bee/1.png", ".thumbnails/1.png", "ant/.ipynb_checkpoints/1.png"):
        write_image(tmp_path / "hidden" / name)
    (tmp_path / "hidden" / "metadata.json").write_text("{}")  # somebody's own, which `datasets` does not read
    for folder in ("listed", "hidden"):
        source, _, names = open_images(load_image_dataset(train_data_dir=tmp_path / folder), 8, 3)
        encoded = open_images_to_encode(tmp_path / folder)
        assert encoded.id2label == dict(enumerate(names))
        assert sorted(encoded.labels.tolist()) == sorted(source.labels.tolist())


def test_image_folder_with_metadata(tmp_path):
    lines = [{"file_name": f"{i}.png", "species": ["wasp", "ant", "wasp"][i]} for i in range(3)]
    for line in lines:
        write_image(tmp_path / line["file_name"])
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source, _, names = open_images(load_image_dataset(train_data_dir=tmp_path), 8, 3, label_column="species")
    assert names == ["ant", "wasp"] and source.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one of `dataset_name` and `train_data_dir`"),
        ({"dataset_name": "a", "train_data_dir": "b"}, "exactly one of .* are 'a' and 'b'"),
        ({"train_data_dir": "no/such/folder"}, "`train_data_dir` has to be a folder, but 'no/such/folder' is none"),
        ({"dataset_name": "no/such-data"}, "`dataset_name` 'no/such-data' cannot be read"),
    ],
)
def test_wrong_sources(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(**arguments)


def test_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match="`train_data_dir` .* cannot be read as a data set of images"):
        load_image_dataset(train_data_dir=tmp_path)


@pytest.mark.parametrize("splits", [[""], ["train", "test"]])
def test_the_class_is_the_folder_below_the_data(tmp_path, splits):
    """One class is a class; deeper ones are in doubt, but for training without classes; `datasets` sees no links."""
    for split in splits:
        save_class_folders(tmp_path / "one" / split, ["ant"], [(8, 8)])
        for deeper in ("images", "day"):
            save_class_folders(tmp_path / "deep" / split / "ant", [deeper], [(8, 8)])
        save_class_folders(tmp_path / "linked" / split, ["ant"], [(8, 8)])
    assert open_images(load_image_dataset(train_data_dir=tmp_path / "one"), 8, 3)[2] == ["ant"]
    deep = load_image_dataset(train_data_dir=tmp_path / "deep")
    with pytest.raises(ValueError, match="there is no 'label'"):
        open_images(deep, 8, 3)
    assert len(open_images(deep, 8, 3, label_column=None)[0].labels) == 2
    link = tmp_path / "linked" / splits[0] / "bee"
    link.symlink_to(tmp_path / "one" / splits[0] / "ant")
    with pytest.raises(ValueError, match=f"`--data` has to hold no links to folders, .* but holds {link}"):
        load_image_dataset(train_data_dir=tmp_path / "linked", argument="--data")


def labelled(labels, feature=None) -> datasets.Dataset:
    dataset = datasets.Dataset.from_dict({"label": labels})
    return dataset if feature is None else dataset.cast_column("label", feature)


def test_labels():
    assert read_labels(labelled([2, 0, 2]))[1] == ["0", "1", "2"]
    assert read_labels(labelled([2, 0]), num_classes=5)[1] == ["0", "1", "2", "3", "4"]
    indices, names = read_labels(labelled(["b", "a"]))
    assert indices.dtype == np.int64 and indices.tolist() == [1, 0] and names == ["a", "b"]
    assert read_labels(labelled(["b"]), names=["a", "b"])[0].tolist() == [1]
    feature = datasets.ClassLabel(names=["x", "y", "z"])
    assert read_labels(labelled([1, 0], feature))[1] == ["x", "y", "z"]


@pytest.mark.parametrize(
    "dataset, arguments, message",
    [
        (labelled([0]), {"label_column": "class"}, r"`label_column` .* no 'class'; the columns are \['label'\]"),
        (labelled([0, -1]), {}, r"labels in 0..0, but row 1 has -1 \(1 such rows\)"),
        (labelled([0, 3, 4]), {"num_classes": 3}, r"labels in 0..2, but row 1 has 3 \(2 such rows\)"),
        (labelled([0, None]), {}, "has no label in row 1"),
        (labelled([0.5]), {}, "has to hold class indices or names, but 'label' holds float64"),
        (labelled(["a", "c"]), {"names": ["a", "b"]}, r"labels that the training split has not: \['c'\]"),
        (labelled([0], datasets.ClassLabel(names=["x"])), {"names": ["y"]}, "other class names than the training"),
        (labelled([0]).select([]), {}, "has no rows"),
    ],
)
def test_wrong_labels(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_labels(dataset, **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_column": "picture"}, r"`image_column` .* no 'picture'; the columns are \['image', 'label'\]"),
        ({"image_column": "label"}, "`image_column` has to hold images, but 'label' holds"),
        ({"validation_split": "val"}, r"`validation_split` has no split 'val'; the splits are \['train', 'test'\]"),
    ],
)
def test_wrong_columns(arguments, message):
    with pytest.raises(ValueError, match=message):
        open_images(load_image_dataset(train_data_dir=DIGITS), 8, 1, **arguments)


def test_a_data_set_without_a_training_split():
    splits = load_image_dataset(train_data_dir=DIGITS)
    with pytest.raises(ValueError, match=r"no split 'train'; the splits are \['test'\]"):
        open_images(datasets.DatasetDict(test=splits["test"]), 8, 1)


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_unreadable_images_are_named(tmp_path, damage):
    for i in range(3):
        write_image(tmp_path / "a" / f"{i}.png", size=(64, 64))
    broken = tmp_path / "a" / "1.png"
    broken.write_bytes({"cut": broken.read_bytes()[:60], "text": b"no image", "empty": b""}[damage])
    dataset = load_image_dataset(train_data_dir=tmp_path)["train"]
    source = ImageSource(dataset, np.zeros(3, np.int64), 8)
    source.load(np.array([0, 2]), np.zeros(2, dtype=bool))
    with pytest.raises(ValueError, match=r"the image of row 1 \(.*1\.png\) cannot be read"):
        source.load(np.array([0, 1, 2]), np.zeros(3, dtype=bool))


def test_unreadable_images_are_replaced_by_others_of_their_class(tmp_path):
    """By the same ones, whatever the batch and whoever asks, and never by a row that is held out."""
    for i in range(12):
        write_image(tmp_path / "ab"[i % 2] / f"{i:02d}.png", 20 * i, size=(8, 8))
    broken = {2, 3, 4, 11}
    for i in broken:
        (tmp_path / "ab"[i % 2] / f"{i:02d}.png").write_bytes(b"no image")
    source, _, _ = open_images(load_image_dataset(train_data_dir=tmp_path), 8, 3)
    numbers = [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]  # of the images, by row

    def stream(source):
        return SampleStream(source, (3, 8, 8), seed=0, replace_unreadable=True)

    def shown(batch):  # the numbers of the images
        return ((batch["images"][:, 0, 0, 0] + 1) * 127.5 / 20).round().int().tolist()

    whole = stream(source)
    batch = whole.__getitems__(list(range(36)))
    wanted = [numbers[row] for row in whole.rows(list(range(36)))]
    instead = {2: 6, 4: 6, 3: 5, 11: 1}
    assert shown(batch) == [instead.get(number, number) for number in wanted]
    assert batch["class_labels"].tolist() == [number % 2 for number in wanted]
    assert {Path(entry["id"]).name for entry in batch["unreadable"]} == {f"{i:02d}.png" for i in broken}
    for g in range(36):
        alone = stream(source).__getitems__([g])
        assert torch.equal(alone["images"][0], batch["images"][g])
        assert ("unreadable" in alone) == (wanted[g] in broken)

    kept, held_out = cut_off(source, 0.5, seed=0)
    for part in (kept, held_out):
        allowed = {numbers[row] for row in part.source_rows}
        batch = stream(part).held_out_batch(list(range(6)))
        assert set(shown(batch)) == allowed - broken and len(batch["images"]) == 6
    with pytest.raises(ValueError, match=r"the image of row \d+ .* cannot be read"):
        SampleStream(source, (3, 8, 8), seed=0).__getitems__(list(range(12)))
    for i in (0, 6, 8, 10):  # the rest of a class: then another one has to do
        (tmp_path / "a" / f"{i:02d}.png").write_bytes(b"no image")
    assert set(shown(stream(source).__getitems__(list(range(12))))) == {1, 5, 7, 9}
    for i in (1, 5, 7, 9):
        (tmp_path / "b" / f"{i:02d}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the images can be read"):
        stream(source).__getitems__([0])


def test_flips_mirror_left_and_right():
    source, _, _ = open_images(load_image_dataset(train_data_dir=DIGITS), 8, 1)
    images = source.load(np.array([5, 5]), np.array([False, True]))
    torch.testing.assert_close(images[1], images[0].flip(-1))


# --- The stream


class Numbers:
    """A source whose images say which row they are, and whether they are mirrored."""

    kind = "images"

    def __init__(self, num_rows: int):
        self.labels = np.arange(num_rows) % 7

    def load(self, rows, flips):
        return torch.stack([torch.tensor(rows), torch.tensor(flips).long()], dim=1)


def make_stream(num_rows=100, seed=3, **options) -> SampleStream:
    options = {"samples_per_step": 10, "grid_size": 16, "crop_size_min": 12, "random_flip": True, **options}
    return SampleStream(Numbers(num_rows), (2, 4, 4), seed, **options)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_samples_do_not_depend_on_their_batch():
    batch = make_stream(posterior_noise=True).__getitems__(list(range(95, 125)))  # over the end of an epoch
    for i, g in enumerate(range(95, 125)):
        alone = make_stream(posterior_noise=True).__getitems__([g])
        assert (len(alone.pop("separate_rows")) == 1) == (i in batch["separate_rows"])
        assert_same(alone, {name: value[i : i + 1] for name, value in batch.items() if name != "separate_rows"})


def test_every_epoch_shows_every_row_once_in_its_own_order():
    stream = make_stream(num_rows=37)
    epochs = [stream.rows(list(range(37 * e, 37 * (e + 1)))) for e in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(37))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], make_stream(num_rows=37, seed=4).rows(list(range(37))))
    assert epoch_order(10**6, 0, 5).shape == (10**6,)


def test_seeds_and_samples_have_noise_of_their_own():
    noise = [make_stream(seed=seed).__getitems__([0, 1, 2])["noise"] for seed in (0, 1)]
    flat = torch.cat(noise).flatten(1)
    assert len({tuple(row.tolist()) for row in flat}) == 6
    # swapping seed and index gives other numbers, and so does measuring on held-out images
    assert not torch.equal(
        make_stream(seed=5).__getitems__([9])["noise"], make_stream(seed=9).__getitems__([5])["noise"]
    )
    assert not torch.equal(make_stream().__getitems__([9])["noise"], make_stream().held_out_batch([9])["noise"])


def test_draws_have_their_distributions():
    stream = make_stream(num_rows=1000, class_dropout_prob=0.1, probe_dropout_prob=0.9, posterior_noise=True)
    batch = stream.__getitems__(list(range(20000)))
    error = 4 / np.sqrt(20000)
    assert abs(batch["timesteps"].mean() - 0.5) < error * 0.29 and abs(batch["timesteps"].var() - 1 / 12) < error / 12
    assert batch["timesteps"].min() >= 0 and batch["timesteps"].max() < 1
    both = batch["class_dropout_mask"] & batch["probe_dropout_mask"]
    for mask, p in ((batch["class_dropout_mask"], 0.1), (batch["probe_dropout_mask"], 0.9), (both, 0.09)):
        assert abs(mask.float().mean() - p) < error * np.sqrt(p * (1 - p))
    assert abs(batch["images"][:, 1].float().mean() - 0.5) < error * 0.5  # flips
    for name in ("noise", "posterior_noise"):
        assert abs(batch[name].mean()) < error / np.sqrt(32) and abs(batch[name].var() - 1) < 1.5 * error / np.sqrt(32)
    correlation = torch.corrcoef(torch.stack([batch["noise"].flatten(), batch["posterior_noise"].flatten()]))[0, 1]
    assert abs(correlation) < error / np.sqrt(32)


def test_streams_are_separate_where_their_labels_differ():
    batch = make_stream(class_dropout_prob=0.3, probe_dropout_prob=0.6).__getitems__(list(range(200)))
    differing = batch["class_dropout_mask"] != batch["probe_dropout_mask"]
    assert 0 < differing.sum() < 200 and torch.equal(batch["separate_rows"], differing.nonzero()[:, 0])


@pytest.mark.parametrize("samples_per_step", [32, 100, 256])
def test_coupled_dropout_is_even_over_a_step_and_agrees_most(samples_per_step):
    stream = make_stream(num_rows=999, samples_per_step=samples_per_step, coupled_dropout=True)
    for step in range(20):
        indices = list(range(step * samples_per_step, (step + 1) * samples_per_step))
        batch = stream.__getitems__(indices)
        main, probe = batch["class_dropout_mask"].numpy(), batch["probe_dropout_mask"].numpy()
        assert abs(main.mean() - 0.1) < 1 / samples_per_step and abs(probe.mean() - 0.9) < 1 / samples_per_step
        assert not (main & ~probe).any(), "what the main stream drops, the probe's drops too"
        assert abs(len(batch["separate_rows"]) - 0.8 * samples_per_step) < 1, "all steps cost the same"
        half = stream.__getitems__(indices[: samples_per_step // 2])
        assert len(half["separate_rows"]) == pytest.approx(0.4 * samples_per_step, abs=3)


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.125, 0.25, 0.3, 1.0])
@pytest.mark.parametrize("samples_per_step", [1, 2, 3, 5, 8, 32, 128])
def test_each_place_in_a_step_is_dropped_and_probed_with_its_probability(samples_per_step, fraction):
    """Over the steps, for batches of any size: of the samples that the probe is trained on as well."""
    options = {"samples_per_step": samples_per_step, "coupled_dropout": True, "probe_fraction": fraction}
    stream = SampleStream(Numbers(997), (1, 1, 1), 3, **options)
    num_steps = max(300, 3000 // samples_per_step)
    batch = stream.__getitems__(list(range(num_steps * samples_per_step)))

    def check(rate, probability, count, z=5):
        np.testing.assert_array_less(abs(rate - probability), z * np.sqrt(probability * (1 - probability) / count))

    shape = (num_steps, samples_per_step)
    chosen = np.ones(shape, dtype=bool)
    if fraction < 1:
        chosen.fill(False)
        chosen.flat[batch["probe_rows"].numpy()] = True
        check(chosen.mean(axis=0), fraction, num_steps)
        assert (abs(chosen.sum(axis=1) - fraction * samples_per_step) < 1).all(), "as many in every step"
    drops = [batch[f"{name}_dropout_mask"].numpy().reshape(shape) for name in ("class", "probe")]
    for drop, probability in zip(drops, (0.1, 0.9)):
        check(drop.mean(axis=0), probability, num_steps)
        check(drop.mean(), probability, num_steps)
        check(np.ma.array(drop, mask=~chosen).mean(axis=0), probability, chosen.sum(axis=0))
        check(drop[chosen].mean(), probability, num_steps * min(1, samples_per_step * fraction))
    separate = np.zeros(shape, dtype=bool)
    separate.flat[batch["separate_rows"].numpy()] = True
    np.testing.assert_array_equal(separate, chosen & (drops[0] != drops[1]))
    expected = 0.8 * chosen.sum(axis=1)
    assert (abs(separate.sum(axis=1) - expected) < 1).all(), "all steps cost the same"


def test_probe_on_a_part_of_the_samples():
    stream = make_stream(num_rows=999, samples_per_step=32, probe_fraction=0.25)
    whole = stream.__getitems__(list(range(64)))
    differing = whole["class_dropout_mask"] != whole["probe_dropout_mask"]
    rows = whole["probe_rows"]
    assert len(rows) == 16 and (rows[:8] < 32).all() and (rows[8:] >= 32).all()
    assert (rows[1:8] - rows[:7] == 4).all(), "spread out"
    assert whole["separate_rows"].tolist() == [row for row in rows.tolist() if differing[row]]
    # batches are parts of the step, and the other draws are the default's
    for first in range(0, 64, 8):
        part = stream.__getitems__(list(range(first, first + 8)))
        assert (part["probe_rows"] + first).tolist() == [row for row in rows.tolist() if first <= row < first + 8]
    plain = make_stream(num_rows=999, samples_per_step=32).__getitems__(list(range(64)))
    for name in plain.keys() - {"separate_rows"}:
        assert torch.equal(plain[name], whole[name]), name
    assert stream.held_out_batch([1, 2]).keys() == make_stream().held_out_batch([1, 2]).keys()


def test_crop_windows():
    batch = make_stream().__getitems__(list(range(10 * 400)))
    top, left, size = batch["crop_window"].unflatten(0, (400, 10)).unbind(-1)
    assert (size == size[:, :1]).all()  # one size per step
    counts = torch.bincount(size[:, 0], minlength=17)
    assert counts[:12].sum() == 0 and (counts[12:] > 400 / 5 / 2).all()
    assert top.min() == 0 and left.min() == 0 and ((top + size) <= 16).all() and ((left + size) <= 16).all()
    for start in (top, left):
        assert set(start[size == 12].tolist()) == {0, 1, 2, 3, 4}
    # all processes and accumulated batches of a step share its size, whatever the batches are
    parts = [make_stream().__getitems__(list(range(first, first + 5))) for first in (0, 5)]
    torch.testing.assert_close(torch.cat([part["crop_window"] for part in parts]), batch["crop_window"][:10])


def test_timestep_sampling_follows_the_path():
    uniform = make_stream().__getitems__(list(range(5000)))["timesteps"]
    for path, ratio in (("linear", lambda t: t / (1 - t)), ("cosine", lambda t: torch.tan(torch.pi / 2 * t))):
        stream = make_stream(path_type=path, timestep_sampling="logit_normal")
        t = stream.__getitems__(list(range(5000)))["timesteps"]
        logs = ratio(t.double()).log()
        assert abs(logs.mean()) < 0.06 and abs(logs.std() - 1) < 0.05
        assert torch.equal(t.argsort(), uniform.argsort())


def test_held_out_batches_are_fixed_and_hide_the_label_from_the_probe():
    stream = make_stream()
    batch = stream.held_out_batch([4, 9])
    assert_same(batch, stream.held_out_batch([4, 9]))
    assert batch["images"].tolist() == [[4, 0], [9, 0]]
    assert not batch["class_dropout_mask"].any() and batch["probe_dropout_mask"].all()
    assert batch["crop_window"].tolist() == [[0, 0, 16], [0, 0, 16]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_worker_processes_change_nothing(num_workers):
    source, _, _ = open_images(load_image_dataset(train_data_dir=DIGITS), 8, 1)
    stream = SampleStream(source, (1, 8, 8), seed=0)
    batches = torch.utils.data.BatchSampler(range(12), 4, drop_last=True)
    loader = torch.utils.data.DataLoader(
        stream, batch_sampler=batches, collate_fn=lambda batch: batch, num_workers=num_workers
    )
    for i, batch in enumerate(loader):
        assert_same(batch, stream.__getitems__(list(range(4 * i, 4 * i + 4))))


def test_cut_off():
    source = Numbers(50)
    parts = cut_off(source, 0.1, seed=0)
    rows = [part.load(np.arange(len(part.labels)), np.zeros(len(part.labels)))[:, 0] for part in parts]
    assert [len(part) for part in rows] == [45, 5]
    assert sorted(torch.cat(rows).tolist()) == list(range(50))
    for part, its_rows in zip(parts, rows):
        assert (its_rows % 7).tolist() == part.labels.tolist()
    assert not np.array_equal(cut_off(source, 0.1, seed=1)[1].source_rows, parts[1].source_rows)


def test_sample_posterior():
    moments = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1).half()
    noise = torch.full((1, 1, 1, 1), 0.5)
    torch.testing.assert_close(sample_posterior(moments, noise, 0.5).item(), 1.75)
    torch.testing.assert_close(sample_posterior(moments, noise, 0.5, 1.0).item(), 1.25)


def test_images_from_bytes_have_no_file_to_name():
    buffer = io.BytesIO()
    PIL.Image.new("L", (4, 4)).save(buffer, "PNG")
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"image": {"bytes": data, "path": None}} for data in (buffer.getvalue(), b"junk")]
    source = ImageSource(datasets.Dataset.from_list(rows, features=features), np.zeros(2, np.int64), 4, 1)
    with pytest.raises(ValueError, match="the image of row 1 cannot be read"):
        source.load(np.array([0, 1]), np.zeros(2, dtype=bool))
