# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Generated and damaged files of data: moments, labels, folders and archives of images, samples, logs."""

import contextlib
import io
import json
import os
import pickle
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
from fuzz.cases import Case
from hypothesis import strategies as st

from diffusers_lsep.data.archives import open_image_files
from diffusers_lsep.data.moments import OriginalMomentsDataset
from diffusers_lsep.evaluation.images import open_images
from diffusers_lsep.training.log import read_metrics


def damage(draw, data: bytes) -> bytes:
    """A file with some of its bits flipped, or cut, or longer, or another one altogether."""
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "longer", "overwrite", "empty", "junk"]))
    if kind == "empty" or not data:
        return b""
    if kind == "junk":
        return draw(st.binary(max_size=64))
    place = draw(st.integers(0, len(data) - 1))
    if draw(st.booleans()):  # where headers are
        place = draw(st.sampled_from([place % 256 % len(data), len(data) - 1 - place % 256 % len(data)]))
    if kind == "flip":
        changed = bytearray(data)
        changed[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if kind == "cut":
        return data[:place]
    return data + draw(st.binary(max_size=64)) if kind == "longer" else data[:place] + b"\xff" * 8 + data[place + 8 :]


BAD_LABELS = (-1, 2**62, 10**6, 10**30, 1.5, True, None, "1", [1], {})
BAD_DOCUMENTS = (
    *(b"", b"\xff\xfe", b"null", b"[]", b"{}", b'{"labels": null}', b'{"labels": 3}', b'{"labels": "ab"}'),
    *(b'{"labels": [[1]]}', b'{"labels": [["a"]]}', b'{"labels": {"a": 1}}', b"[" * 100_000, b'{"labels": NaN}'),
    b'{"labels": [["00000.png", 1' + b"0" * 5000 + b"]]}",
)


def draw_document(draw, names: list[str], by_number: bool = False) -> tuple[bytes, list[int] | None]:
    """A `dataset.json` for these files, and their labels if it is right; of images only their numbers have to be."""
    labels = draw(st.lists(st.integers(0, 5), min_size=len(names), max_size=len(names)))
    pairs = [list(pair) for pair in zip(names, labels)]
    kind = draw(st.sampled_from(["right", "right", "label", "missing", "more", "twice", "bytes", "document"]))
    if kind == "label":
        pairs[draw(st.integers(0, len(names) - 1))][1] = draw(st.sampled_from(BAD_LABELS))
    elif kind == "missing":
        pairs.pop()
    elif kind == "more":
        pairs.append(["another.png", 1])
    elif kind == "twice":
        pairs.append(pairs[0])
    elif kind == "document":
        return draw(st.sampled_from(BAD_DOCUMENTS)), None
    document = json.dumps({"labels": pairs}).encode()
    if kind == "bytes":
        changed = damage(draw, document)
        try:
            found = json.loads(changed)["labels"]
            key = (lambda name: int(re.findall(r"\d+", name)[-1])) if by_number else str
            found, right = (sorted((key(name), label) for name, label in some) for some in (found, pairs))
            same = found == right
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            same = False
        return changed, labels if same else None
    return document, labels if kind == "right" else None


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def forged_npy(header: str, data: bytes = b"\0" * 64) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


HEADERS = (
    "{'descr': '|u1', 'fortran_order': False, 'shape': (4611686018427387904, 4, 4, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 4, 4, 3), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 8, 8), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': 3, }",
    "{'descr': '<f4', 'fortran_order': 1, 'shape': (2, 4, 4), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2, 4, 4), }",
    "{'descr': 'x', 'fortran_order': False, 'shape': (2, 4, 4), }",
    "{'shape': (2, 4, 4), }",
    "__import__('os').system('true')",
    "((((((((((",
)


TRAP = "FUZZ_TRAP"


class Trap:
    """A pickle that can be seen to have been run."""

    def __reduce__(self):
        return eval, (f"__import__('os').environ.__setitem__('{TRAP}', '1')",)


class CodeWasRunError(Exception):
    """Raised after a call that has run the code of what it was given."""


@contextlib.contextmanager
def without_code() -> Iterator[None]:
    """Notices if the code of a [`Trap`] is run."""
    os.environ.pop(TRAP, None)
    try:
        yield
    finally:
        if os.environ.pop(TRAP, None):
            raise CodeWasRunError


SHAPE = (4, 3, 3)


def draw_moments(draw, rng) -> tuple[bytes, np.ndarray | None]:
    """A file of moments, and its values if it is right; no values if some may be read from it."""
    values = rng.standard_normal(SHAPE).astype(draw(st.sampled_from([np.float32, np.float16])))
    values[2:] = np.abs(values[2:])
    kind = draw(
        st.sampled_from(["right", "fortran", "negative", "nan", "infinite", "dtype", "shape", "bytes", "other"])
    )
    if kind == "fortran":
        return npy(np.asfortranarray(values)), values
    if kind == "right":
        return npy(values), values
    if kind in ("negative", "nan", "infinite"):
        values[draw(st.integers(0, 3)) if kind != "negative" else 3, 0, 0] = {"negative": -1, "nan": np.nan}.get(
            kind, np.inf
        )
        return npy(values), None
    if kind == "dtype":
        wrong = draw(st.sampled_from([np.int64, np.complex64, bool, "S4", "M8[s]", object]))
        return npy(np.ones(SHAPE).astype(wrong), allow_pickle=True), None
    if kind == "shape":
        return npy(np.ones(draw(st.sampled_from([(4, 3), (3, 3, 3), (4, 3, 4), (0, 3, 3), (), (1, 4, 3, 3)])))), None
    if kind == "bytes":
        return damage(draw, npy(values)), np.empty(0)
    forged = forged_npy(draw(st.sampled_from(HEADERS)))
    return draw(st.sampled_from([forged, pickle.dumps(Trap()), b"PK\3\4", b"junk"])), None


@st.composite
def moments(draw) -> Case:
    """A folder `vae-sd`: what is right has to be read as it was written."""
    rng = np.random.default_rng(draw(st.integers(0, 3)))
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(3)]
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    files = {}
    for name in names:
        values = rng.standard_normal(SHAPE).astype(dtype)
        values[2:] = np.abs(values[2:])
        files[name] = npy(values), values
    if draw(st.booleans()):
        files[draw(st.sampled_from(names))] = draw_moments(draw, rng)
    of_images = draw(st.booleans())
    listed = [f"00000/img{i:08d}.png" if of_images else name for i, name in enumerate(names)]
    document, labels = draw_document(draw, listed, by_number=of_images)
    wrong = [name for name, (_, values) in files.items() if values is None]
    damaged = [name for name, (_, values) in files.items() if values is not None and values.size == 0]

    def call():
        with tempfile.TemporaryDirectory() as folder, without_code():
            for name, (data, _) in files.items():
                Path(folder, name).parent.mkdir(exist_ok=True)
                Path(folder, name).write_bytes(data)
            Path(folder, "dataset.json").write_bytes(document)
            dataset = OriginalMomentsDataset(folder)
            return dataset.labels.tolist(), dataset.load(range(3))

    def check(result) -> str | None:
        found, rows = result
        expected = np.stack([values for _, values in files.values()])
        return (
            None if found == labels and np.array_equal(rows.numpy(), expected.astype(rows.numpy().dtype)) else "others"
        )

    bad = [] if labels is not None else ["dataset.json", "`folder`"]
    bad += [*wrong, "`folder`"] if wrong else []
    # A flipped bit among the numbers makes other numbers, which nothing tells: they may be read.
    either = ["`folder`", *names] if damaged else []
    return Case(f"vae-sd {document[:60]!r}, {wrong}", call, bad, either, (lambda _: None) if damaged else check)


def png(seed: int, size: tuple[int, int] = (5, 4)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@st.composite
def image_folders(draw) -> Case:
    """Images in a folder, a zip or a tar: what is right is read as it was stored."""
    files = {
        f"{name}/{i}.png": png(i) for i, name in enumerate(draw(st.sampled_from(["ab", "aab", ["a b", "é", "ß"]])))
    }
    names = sorted(files)
    kind = draw(st.sampled_from(["folder", "zip", "deflated", "tar"]))
    document, labels = None, None
    if kind != "tar" and draw(st.booleans()):
        document, labels = draw_document(draw, names)
    trick = draw(st.sampled_from(["none", "none", "damage", "loose", "link", "fifo", "empty", "above", "unreadable"]))
    is_damaged = trick == "damage" and kind != "folder"

    def write(folder: Path) -> Path:
        more = {"loose": {"loose.png": png(9)}, "above": {"../../x.png": png(9)}}.get(trick, {})
        content = {} if trick == "empty" else {**files, **more}
        if document is not None:
            content["dataset.json"] = document
        if kind == "folder":
            folder = folder / "deeper" / "images"
            folder.mkdir(parents=True)
            for name, data in content.items():
                if ".." not in name:
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_bytes(data)
            if trick == "link":
                for name in ("self", "a/self", "a/other"):
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).symlink_to(folder)
            if trick == "fifo":
                (folder / "a").mkdir(exist_ok=True)
                os.mkfifo(folder / "a" / "9.png")
            return folder
        path = folder / ("images.tar" if kind == "tar" else "images.zip")
        if kind == "tar":
            with tarfile.open(path, "w") as archive:
                for name, data in content.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        else:
            method = zipfile.ZIP_STORED if kind == "zip" else zipfile.ZIP_DEFLATED
            with zipfile.ZipFile(path, "w", method) as archive:
                for name, data in content.items():
                    archive.writestr(name, data)
        if is_damaged:
            path.write_bytes(change(path.read_bytes()))
        return path

    seeds = draw(st.integers(0, 10**6))

    def change(data: bytes) -> bytes:
        rng = np.random.default_rng(seeds)
        changed = bytearray(data)
        place = int(rng.integers(len(data)))
        if seeds % 3 == 0:
            return data[:place]
        changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)

    def call():
        with tempfile.TemporaryDirectory() as folder:
            images = open_image_files(write(Path(folder)))
            return images.names, images.labels.tolist(), [images.read(row) for row in range(len(images.names))]

    def check(result) -> str | None:
        found_names, found_labels, data = result
        if is_damaged or trick in ("link", "fifo", "above", "loose"):
            return None
        expected = labels if labels is not None else [sorted({n[0] for n in names}).index(n[0]) for n in names]
        if found_names != names or found_labels != expected:
            return f"{found_names} {found_labels}, not {names} {expected}"
        return None if data == [files[name] for name in names] else "other bytes"

    bad = []
    if document is not None and labels is None or trick == "empty":
        bad = ["dataset.json", "`train_data_dir`"]
    either = []
    if is_damaged or trick in ("link", "fifo", "above", "loose"):
        either = ["`train_data_dir`", "dataset.json", ".png"]
    return Case(f"{kind} with {trick}, {str(document)[:60]}", call, bad, either, check)


@st.composite
def samples(draw) -> Case:
    """An `.npz` of images: what is right is read as it was written."""
    pixels = np.random.default_rng(0).integers(0, 256, draw(st.sampled_from([(3, 4, 4, 3), (2, 4, 5, 1), (2, 4, 4)])))
    pixels = pixels.astype(np.uint8)
    arrays, settings = {"arr_0": npy(pixels), "arr_1": npy(np.arange(len(pixels)))}, None
    kind = draw(
        st.sampled_from(["right", "header", "dtype", "shape", "without", "bytes", "archive", "statistics", "json"])
    )
    if kind == "header":
        arrays["arr_0"] = forged_npy(draw(st.sampled_from(HEADERS)))
    elif kind == "dtype":
        arrays["arr_0"] = npy(pixels.astype(draw(st.sampled_from([np.float32, np.int8, bool, object]))))
    elif kind == "shape":
        arrays["arr_0"] = npy(
            np.zeros(draw(st.sampled_from([(3,), (0, 4, 4, 3), (2, 4, 4, 4), (), (2, 0, 4, 3)])), np.uint8)
        )
    elif kind == "without":
        del arrays["arr_0"]
    elif kind == "bytes":
        arrays["arr_0"] = damage(draw, arrays["arr_0"])
    elif kind == "statistics":
        arrays["mu"] = draw(st.sampled_from([npy(np.zeros(3)), forged_npy(HEADERS[2]), b"junk", npy(np.array(None))]))
        arrays["sigma"] = npy(np.zeros((3, 3)))
    elif kind == "json":
        settings = draw(st.sampled_from([b"", b"[]", b"\xff", b"[" * 100_000, b'{"class_labels": {}}', b"3"]))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    data = damage(draw, file.getvalue()) if kind == "archive" else file.getvalue()

    def call():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "samples.npz")
            path.write_bytes(data)
            if settings is not None:
                path.with_suffix(".json").write_bytes(settings)
            images = open_images(path)
            return np.concatenate([*images.batches(0, images.count, 2)])

    def check(found) -> str | None:
        expected = np.broadcast_to(pixels.reshape(*pixels.shape[:3], -1), (*pixels.shape[:3], 3))
        if kind == "bytes":  # whose checksum is right: other pixels may be meant
            return None if found.dtype == np.uint8 else f"pixels of {found.dtype}"
        return None if np.array_equal(found, expected) else "other pixels"

    bad = ["`samples`"] if kind in ("header", "dtype", "shape", "without", "statistics") else []
    either = ["`samples`"] if kind in ("bytes", "archive", "json") else []
    return Case(f"npz, {kind}", call, bad, either, check)


@st.composite
def logs(draw) -> Case:
    """A `metrics.jsonl` with lines that are none between those that are."""
    junk = st.sampled_from(
        [b"", b"{", b"\xff\xfe", b"nan", b"[1]", b"3", b'"a"', b'{"step": ', b"\0\0", b"[" * 100_000]
    )
    lines, right = [], []
    for step in range(draw(st.integers(0, 5))):
        lines.append(json.dumps({"step": step, "loss": 0.5}).encode())
        right.append(step)
        lines += draw(st.lists(junk, max_size=2))

    def call():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "metrics.jsonl")
            path.write_bytes(b"\n".join(lines))
            return [line["step"] for line in read_metrics(path)]

    return Case(
        f"metrics.jsonl {lines}"[:300], call, [], [], lambda found: None if found == right else f"steps {found}"
    )


SURFACES = {
    "vae-sd folder": moments(),
    "image folders and archives": image_folders(),
    "npz of samples": samples(),
    "metrics.jsonl": logs(),
}
