# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Streamed data sets: the same samples whatever the batches, the processes and the interruptions."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from diffusers_lsep.data.images import load_image_dataset, open_images
from diffusers_lsep.data.streamed import StreamedImages, StreamedSamples, open_stream


DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
NUM_IMAGES = 360


@pytest.fixture(scope="module")
def digits():
    # Streamed from memory: `datasets` takes seconds to drop a file that was not read to its end.
    return load_image_dataset(train_data_dir=DIGITS)["test"].to_iterable_dataset(num_shards=3)


def make_stream(digits, seed=0, **options) -> StreamedSamples:
    source = StreamedImages(digits, seed, NUM_IMAGES, 8, num_channels=1, buffer_size=50, **options)
    return StreamedSamples(source, (1, 8, 8), seed)


def test_an_epoch_shows_every_image_once_with_its_label(digits):
    stream = make_stream(digits)
    batches = [stream.__getitems__(list(range(first, first + 40))) for first in range(0, 2 * NUM_IMAGES, 40)]
    epochs = [torch.cat([batch["images"] for batch in part]) for part in (batches[:9], batches[9:])]
    labels = torch.cat([batch["class_labels"] for batch in batches])

    splits = load_image_dataset(train_data_dir=DIGITS)
    source, _, names = open_images(datasets.DatasetDict(train=splits["test"]), 8, 1)
    images = source.load(np.arange(NUM_IMAGES), np.zeros(NUM_IMAGES, dtype=bool))
    assert stream.source.names == names
    label_of = {image.numpy().tobytes(): label for image, label in zip(images, source.labels)}
    for epoch in epochs:
        assert sorted(image.numpy().tobytes() for image in epoch) == sorted(label_of)
    assert [label_of[image.numpy().tobytes()] for image in torch.cat(epochs)] == labels.tolist()
    assert not torch.equal(*epochs) and not torch.equal(epochs[0], images)
    other = make_stream(digits, seed=1).__getitems__(list(range(40)))
    assert not torch.equal(other["images"], epochs[0][:40])


def test_samples_do_not_depend_on_what_was_read_before(digits):
    everything = make_stream(digits).__getitems__(list(range(NUM_IMAGES + 20)))
    names = ("images", "class_labels", "noise")
    for start in (0, NUM_IMAGES - 3, NUM_IMAGES + 5):  # continued at the end of an epoch, or in the middle
        batch = make_stream(digits).__getitems__(list(range(start, start + 6)))
        for name in names:
            assert torch.equal(batch[name], everything[name][start : start + 6]), (start, name)
    # as one of two processes, which takes every second batch, and starting anew
    stream = make_stream(digits)
    for start in (10, 30, 2):
        batch = stream.__getitems__(list(range(start, start + 10)))
        assert torch.equal(batch["images"], everything["images"][start : start + 10])


def test_labels_can_be_read_again(digits):
    source, rows = make_stream(digits).source, np.arange(5, 12)
    source.load(rows, np.zeros(len(rows), dtype=bool))
    labels = source.labels_of(rows)
    expected = make_stream(digits).__getitems__(rows.tolist())["class_labels"]
    assert labels.tolist() == source.labels_of(rows).tolist() == expected.tolist()
    assert len(source.labels) == NUM_IMAGES and set(source.labels) == {-1}


def test_no_worker_processes(digits):
    loader = torch.utils.data.DataLoader(make_stream(digits), 4, sampler=range(8), num_workers=1)
    with pytest.raises(ValueError, match="`num_workers` has to be 0 for a streamed data set"):
        next(iter(loader))


@pytest.mark.slow
def test_unreadable_images_are_replaced_by_the_next_ones(digits):
    """The same samples in any batches; the rows that were read ahead are not read again."""

    def stream(broken):
        def spoil(row, index):
            return {"image": {"bytes": b"no image", "path": f"{index}.png"}} if index % 50 in broken else {}

        spoilt = digits.cast_column("image", datasets.Image(decode=False)).map(spoil, with_indices=True)
        source = StreamedImages(spoilt.cast(digits.features), 0, NUM_IMAGES, 8, num_channels=1, buffer_size=50)
        return StreamedSamples(source, (1, 8, 8), 0, replace_unreadable=True)

    whole = stream((7, 8)).__getitems__(list(range(400)))
    good = stream(()).__getitems__(list(range(402)))
    same = [torch.equal(image, other) for image, other in zip(whole["images"], good["images"])]
    assert 16 <= same.count(False) <= len(whole["unreadable"])  # 8 pairs in an epoch
    names = {found["id"] for found in whole["unreadable"]}  # the same in every epoch, for `--max_errors`
    assert len(names) == 6 and all(name.startswith("crc32 ") for name in names)  # of 120 indices in each shard
    for g in np.flatnonzero(~np.array(same)).tolist():
        ahead = next(h for h in range(g + 1, 402) if h >= 400 or same[h])
        assert torch.equal(whole["images"][g], good["images"][ahead])
        assert whole["class_labels"][g] == good["class_labels"][ahead]
    parts, by_threes = [], stream((7, 8))
    by_threes.source.dataset.skip = None  # which is how to begin anew in the middle
    for first in range(0, 399, 3):
        parts.append(by_threes.__getitems__(list(range(first, first + 3))))
    for name in ("images", "class_labels"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name][:399])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"label_column": "digit"}, r"`label_column` .* no 'digit'; the columns are \['image', 'label'\]"),
        ({"image_column": "png"}, "`image_column` .* no 'png'"),
        ({"image_column": "label"}, "`image_column` has to hold images"),
        ({"num_classes": 4}, "`num_classes` has to be at least 10, but is 4"),
    ],
)
def test_wrong_arguments(digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_stream(digits, **arguments)


@pytest.mark.slow
def test_a_column_that_does_not_say_its_classes(digits):
    numbers = digits.cast_column("label", datasets.Value("int64"))
    with pytest.raises(ValueError, match="`num_classes` has to be given"):
        make_stream(numbers)
    assert make_stream(numbers, num_classes=12).source.names == [str(index) for index in range(12)]
    with pytest.raises(ValueError, match=r"labels in 0..4, but sample \d+ of the stream has [5-9]"):
        make_stream(numbers, num_classes=5).__getitems__(list(range(40)))


def test_a_wrong_number_of_images(digits):
    source = StreamedImages(digits, 0, NUM_IMAGES + 1, 8, num_channels=1)
    stream = StreamedSamples(source, (1, 8, 8), 0)
    with pytest.raises(ValueError, match="`num_train_images` says that the data set has 361 images, .* after 360"):
        stream.__getitems__(list(range(NUM_IMAGES + 1)))


def test_the_training_split(digits):
    splits = load_image_dataset(train_data_dir=DIGITS, streaming=True)
    assert len(open_stream(splits, 0, None, 8, 1).labels) == 1437
    assert len(open_stream(splits, 0, 1000, 8, 1).labels) == 1000
    with pytest.raises(ValueError, match=r"no split 'train'; the splits are \['test'\]"):
        open_stream({"test": digits}, 0, None, 8, 1)
