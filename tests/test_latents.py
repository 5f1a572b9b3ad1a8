# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from diffusers import AutoencoderKL
from tiny_models import make_vae

from diffusers_lsep import FlowMatchSDEScheduler, LSEPPipeline
from diffusers_lsep.cli import main
from diffusers_lsep.data.archives import open_image_files, pair_labels
from diffusers_lsep.data.images import center_crop, convert_mode
from diffusers_lsep.data.moments import MomentsDataset, OriginalMomentsDataset, sample_posterior, shard_name
from diffusers_lsep.data.moments_writer import MomentsShardWriter, finish_moments, moments_features
from diffusers_lsep.data.stream import SampleStream


SCRIPT = Path(__file__).parents[1] / "examples" / "encode_latents.py"
RESOLUTION = 16
CLASSES = ["n01", "n02", "n03"]


@pytest.fixture(scope="module")
def vae_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    make_vae(latent_channels=2, scaling_factor=0.5, shift_factor=0.25).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory):
    """Three classes of seven images, of several sizes, modes and formats; by EXIF data one of each is to be turned."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for i in range(7):
            size = (int(rng.integers(12, 70)), int(rng.integers(12, 70)))
            image = PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            path = folder / name / f"{name}_{i}.JPEG"
            if i == 0:
                image = image.convert("RGBA" if label else "L")
                path = path.with_suffix(".png")
            exif = PIL.Image.Exif()
            if i == 1:
                exif[0x0112] = 6  # Orientation: turn a quarter
            image.save(path, exif=exif)
    (folder / "readme.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def script(load_example):
    return load_example("encode_latents")


@pytest.fixture(scope="module")
def arguments(vae_dir):
    """The command line of a small run on `source`."""

    def make(source, output_dir, *more, dtype="fp32"):
        return [
            *("--train_data_dir", str(source)),
            *("--output_dir", str(output_dir)),
            *("--pretrained_vae_model_name_or_path", str(vae_dir)),
            *("--resolution", str(RESOLUTION)),
            *("--dtype", dtype),
            *("--batch_size", "4"),
            *("--shard_size", "6"),
            *("--dataloader_num_workers", "0"),
            *(str(word) for word in more),
        ]

    return make


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The bits of a convolution on CPU depend on the number of threads; the processes of these tests all use one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    patch.undo()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoded(script, arguments, images_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded") / "moments"
    script.main(arguments(images_dir, folder, "--flip", "--keep_images", dtype="fp16"))
    return folder


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.*") if path.suffix != ".txt")


def file_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def compute_one_by_one(vae_dir, images_dir, turn):
    """By name of an image: its crop and the moments of the crop and of its mirror image."""
    vae = AutoencoderKL.from_pretrained(vae_dir)
    result = {}
    for name in names_in(images_dir):
        image = PIL.Image.open(images_dir / name)
        if turn and image.getexif().get(0x0112) == 6:
            image = image.transpose(PIL.Image.Transpose.ROTATE_270)  # clockwise by a quarter
        crop = np.asarray(center_crop(convert_mode(image, 3), RESOLUTION))
        moments = []
        for pixels in (crop, crop[:, ::-1]):
            pixels = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            with torch.no_grad():
                posterior = vae.encode(pixels).latent_dist
            moments.append(torch.cat([posterior.mean, torch.exp(0.5 * posterior.logvar)], dim=1)[0])
        result[name] = crop, *moments
    return result


@pytest.fixture(scope="module")
def expected(vae_dir, images_dir):
    return compute_one_by_one(vae_dir, images_dir, turn=False)


class TestEncoding:
    def test_rows_hold_the_moments_of_their_images(self, encoded, expected):
        dataset = MomentsDataset(encoded)
        names = datasets.load_from_disk(str(encoded))["id"][:]
        assert names == list(expected)
        moments = dataset.load(range(len(dataset)))
        flipped = dataset.load(range(len(dataset)), np.ones(len(dataset), bool))
        assert moments.dtype == flipped.dtype == torch.float16
        for row, name in enumerate(names):
            _, straight, mirrored = expected[name]
            torch.testing.assert_close(moments[row].float(), straight, rtol=2e-3, atol=1e-4)
            torch.testing.assert_close(flipped[row].float(), mirrored, rtol=2e-3, atol=1e-4)
            assert not torch.allclose(straight, mirrored, rtol=1e-2, atol=1e-2)

    def test_metadata_and_labels(self, encoded, vae_dir, images_dir):
        dataset = MomentsDataset(encoded)
        assert len(dataset) == 21
        assert dataset.labels.dtype == np.int64
        assert dataset.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
        assert dataset.id2label == dict(enumerate(CLASSES))
        assert dataset.num_classes == 3
        assert (dataset.scaling_factor, dataset.shift_factor) == (0.5, 0.25)
        assert dataset.moments_shape == (4, 8, 8)
        metadata = dataset.metadata
        assert metadata["vae"] == str(vae_dir)
        assert (metadata["resolution"], metadata["crop"], metadata["dtype"]) == (16, "ADM centre crop", "float16")
        assert metadata["rows_per_shard"] == [6, 6, 6, 3]
        assert (metadata["num_rows"], metadata["num_unreadable"]) == (21, 0)
        assert "standard deviation" in metadata["moments"]

    def test_opens_with_datasets_and_keeps_the_crops(self, encoded, expected):
        dataset = datasets.load_from_disk(str(encoded))
        assert dataset.features["label"].names == CLASSES
        for row in dataset:
            np.testing.assert_array_equal(np.asarray(row["image"]), expected[row["id"]][0])
            assert len(row["moments"]) == 2 * 4 * 8 * 8

    def test_places_are_absolute(self, script, arguments, images_dir, vae_dir, tmp_path, monkeypatch):
        """Training, started elsewhere, finds the VAE."""
        monkeypatch.chdir(vae_dir.parent)
        script.main(arguments(images_dir, tmp_path / "out", "--pretrained_vae_model_name_or_path", vae_dir.name))
        assert MomentsDataset(tmp_path / "out").metadata["vae"] == str(vae_dir)

    def test_fp32_without_mirror_images(self, script, arguments, images_dir, expected, tmp_path):
        script.main(arguments(images_dir, tmp_path / "out"))
        dataset = MomentsDataset(tmp_path / "out")
        moments = dataset.load(range(21))
        assert moments.dtype == torch.float32
        torch.testing.assert_close(moments, torch.stack([straight for _, straight, _ in expected.values()]))
        with pytest.raises(ValueError, match="`flips` asks for mirror images"):
            dataset.load([3, 4], [False, True])

    @pytest.mark.parametrize(
        "source",
        ["tar", "wrapped_tar", "tar_of_tars", "tar_per_class", "zip", "edm2_folder", "edm2_zip", "parquet", "dataset"],
    )
    def test_every_source_gives_the_same_rows(self, source, script, arguments, images_dir, expected, tmp_path):
        names = names_in(images_dir)
        edm2_names = {name: f"{i % 2:05d}/img{i:08d}{Path(name).suffix}" for i, name in enumerate(reversed(names))}
        # Labels in another order than the files, as in a data set that was put together in pieces.
        edm2_labels = {"labels": [[edm2_names[name], CLASSES.index(name[:3])] for name in names]}
        path = tmp_path / "source"
        if source in ("tar", "wrapped_tar"):
            path = path.with_suffix(".tar")
            with tarfile.open(path, "w") as archive:
                archive.add(images_dir, arcname="data/train" if source == "wrapped_tar" else ".")
        elif source in ("tar_of_tars", "tar_per_class"):
            path.mkdir()
            for label in CLASSES:
                with tarfile.open(path / f"{label}.tar", "w") as archive:
                    for file in (images_dir / label).iterdir():
                        archive.add(file, arcname=file.name)
            if source == "tar_of_tars":
                with tarfile.open(tmp_path / "all.tar", "w") as archive:
                    for file in path.iterdir():
                        archive.add(file, arcname=file.name)
                path = tmp_path / "all.tar"
        elif source == "zip":
            path = path.with_suffix(".zip")
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name in names:
                    archive.writestr(f"./everything/{name}", (images_dir / name).read_bytes())
        elif source == "edm2_folder":
            for name, edm2_name in edm2_names.items():
                (path / edm2_name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(images_dir / name, path / edm2_name)
            (path / "dataset.json").write_text(json.dumps(edm2_labels))
        elif source == "edm2_zip":
            path = path.with_suffix(".zip")
            with zipfile.ZipFile(path, "w") as archive:
                for name, edm2_name in edm2_names.items():
                    archive.write(images_dir / name, edm2_name)
                archive.writestr("dataset.json", json.dumps(edm2_labels))
        else:  # a folder of Parquet files with names for labels, and what a data set on the Hub is to `datasets`
            columns = {
                "image": [{"bytes": (images_dir / name).read_bytes(), "path": None} for name in names],
                "label": [name[:3] for name in names],
            }
            label = datasets.Value("string") if source == "parquet" else datasets.ClassLabel(names=CLASSES)
            path.mkdir()
            dataset = datasets.Dataset.from_dict(
                columns, datasets.Features({"image": datasets.Image(), "label": label})
            )
            dataset.to_parquet(path / "train-00000-of-00001.parquet")

        run = arguments(path, tmp_path / "out")
        script.main(["--dataset_name", *run[1:]] if source == "dataset" else run)
        ids = datasets.load_from_disk(str(tmp_path / "out"))["id"][:]
        if source.startswith("edm2"):
            original = {edm2_name: name for name, edm2_name in edm2_names.items()}
            row_names = [original[name] for name in ids]
        elif source in ("parquet", "dataset"):
            row_names = [names[int(row)] for row in ids]
        else:
            row_names = ["/".join(name.split("/")[-2:]) for name in ids]
        assert sorted(row_names) == names
        dataset = MomentsDataset(tmp_path / "out")
        moments = dataset.load(range(len(dataset)))
        for row, name in enumerate(row_names):
            torch.testing.assert_close(moments[row], expected[name][1])
            assert dataset.labels[row] == CLASSES.index(name[:3])

    @pytest.mark.parametrize("source", ["folder", "tar"])
    def test_photographs_are_turned_on_request(
        self, source, script, arguments, images_dir, vae_dir, expected, tmp_path
    ):
        path = images_dir
        if source == "tar":
            path = tmp_path / "images.tar"
            with tarfile.open(path, "w") as archive:
                archive.add(images_dir, arcname=".")
        script.main(arguments(path, tmp_path / "out", "--apply_exif", "--keep_images"))
        kept = datasets.load_from_disk(str(tmp_path / "out"))
        moments = MomentsDataset(tmp_path / "out").load(range(21))
        turned = compute_one_by_one(vae_dir, images_dir, turn=True)
        assert list(turned) == kept["id"][:]
        for row, (name, (crop, straight, _)) in enumerate(turned.items()):
            np.testing.assert_array_equal(np.asarray(kept[row]["image"]), crop)
            torch.testing.assert_close(moments[row], straight)
            assert np.array_equal(crop, expected[name][0]) == (not name.endswith("_1.JPEG"))

    def test_a_folder_says_whether_images_were_turned(self, script, arguments, images_dir, encoded, tmp_path, capsys):
        assert MomentsDataset(encoded).metadata["apply_exif"] is False
        flags = ("--flip", "--keep_images")
        with pytest.raises(ValueError, match=r"begun with other settings \(apply_exif: False -> True\)"):
            script.main(arguments(images_dir, encoded, *flags, "--apply_exif", dtype="fp16"))
        # What does not say it is of a version that always turned them.
        shutil.copytree(encoded, tmp_path / "old")
        metadata = json.loads((tmp_path / "old" / "metadata.json").read_text())
        del metadata["apply_exif"]
        (tmp_path / "old" / "metadata.json").write_text(json.dumps(metadata))
        with pytest.raises(ValueError, match=r"begun with other settings \(apply_exif: True -> False\)"):
            script.main(arguments(images_dir, tmp_path / "old", *flags, dtype="fp16"))
        capsys.readouterr()
        script.main(arguments(images_dir, tmp_path / "old", *flags, "--apply_exif", dtype="fp16"))
        assert "nothing is left to do" in capsys.readouterr().out

    @pytest.mark.slow
    def test_two_processes_killed_and_continued(self, arguments, script, images_dir, encoded, tmp_path, warm_python):
        source = tmp_path / "many"
        for copy in range(16):
            for name in CLASSES:
                (source / name).mkdir(parents=True, exist_ok=True)
                for path in (images_dir / name).iterdir():
                    shutil.copy(path, source / name / f"{copy}{path.name}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
        command += arguments(source, tmp_path / "out", "--flip", "--keep_images", dtype="fp16")

        # 1. Kill both processes without notice as soon as there is a shard.
        launcher = psutil.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not list((tmp_path / "out").glob("data-*.arrow")):
            assert launcher.poll() is None and time.monotonic() < deadline
            workers = launcher.children(recursive=True)
            time.sleep(0.001)
        for process in (launcher, *workers):
            process.kill()
        psutil.wait_procs([launcher, *workers])
        assert len(workers) == 2
        finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("data-*.arrow")}
        assert 0 < len(finished) < 56
        with pytest.raises(ValueError, match="not encoded to the end"):
            MomentsDataset(tmp_path / "out")
        (tmp_path / "out" / ".data-00055-of-00056.arrow.0123.tmp").write_bytes(b"half a shard")

        # 2. Start it again.
        command[0] = warm_python
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert (
            f"56 shards of float16 moments (4, 8, 8) in {tmp_path / 'out'}; {len(finished)} are there" in result.stdout
        )
        assert "336/336" in result.stderr and "images/s" in result.stderr
        after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("data-*.arrow")}
        assert finished.items() <= after.items()

        # 3. The same as from one process that was never stopped.
        script.main(arguments(source, tmp_path / "whole", "--flip", "--keep_images", dtype="fp16"))
        assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "whole")

    def test_what_a_kill_at_the_beginning_or_the_end_left_is_removed(
        self, script, arguments, images_dir, encoded, tmp_path
    ):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / ".encoding.json.0123.tmp").write_text("{")
        script.main(arguments(images_dir, tmp_path / "out", "--flip", "--keep_images", dtype="fp16"))
        assert file_bytes(tmp_path / "out") == file_bytes(encoded)
        (tmp_path / "out" / "encoding.json").write_bytes((encoded / "metadata.json").read_bytes())
        script.main(arguments(images_dir, tmp_path / "out", "--flip", "--keep_images", dtype="fp16"))
        assert file_bytes(tmp_path / "out") == file_bytes(encoded)

    def test_a_finished_folder_is_left_alone(self, script, arguments, images_dir, encoded, capsys):
        before = {path: path.stat().st_mtime_ns for path in encoded.iterdir()}
        script.main(arguments(images_dir, encoded, "--flip", "--keep_images", dtype="fp16"))
        assert "nothing is left to do" in capsys.readouterr().out
        assert {path: path.stat().st_mtime_ns for path in encoded.iterdir()} == before

    def test_a_lost_shard_is_made_again(self, script, arguments, images_dir, encoded, tmp_path):
        shutil.copytree(encoded, tmp_path / "out")
        (tmp_path / "out" / "data-00002-of-00004.arrow").unlink()
        script.main(arguments(images_dir, tmp_path / "out", "--flip", "--keep_images", dtype="fp16"))
        assert file_bytes(tmp_path / "out") == file_bytes(encoded)

    def test_the_source_may_move(self, script, arguments, images_dir, encoded, tmp_path):
        shutil.copytree(encoded, tmp_path / "out")
        (tmp_path / "out" / "data-00001-of-00004.arrow").unlink()
        shutil.copytree(images_dir, tmp_path / "moved")
        script.main(arguments(tmp_path / "moved", tmp_path / "out", "--flip", "--keep_images", dtype="fp16"))
        assert file_bytes(tmp_path / "out") == file_bytes(encoded)


class TestUnreadableImages:
    @pytest.fixture
    def damaged_dir(self, images_dir, tmp_path):
        folder = tmp_path / "damaged"
        shutil.copytree(images_dir, folder)
        (folder / "n01" / "n01_2.JPEG").write_bytes(b"nothing that Pillow knows")
        whole = (folder / "n03" / "n03_3.JPEG").read_bytes()
        (folder / "n03" / "n03_3.JPEG").write_bytes(whole[: len(whole) // 2])
        return folder

    def test_left_out_listed_and_counted(self, script, arguments, damaged_dir, expected, tmp_path, capsys):
        script.main(arguments(damaged_dir, tmp_path / "out", "--max_errors", 2))
        assert "19 rows are in" in (out := capsys.readouterr().out)
        assert "2 unreadable images are left out and listed in unreadable.jsonl" in out
        listed = [json.loads(line) for line in (tmp_path / "out" / "unreadable.jsonl").read_text().splitlines()]
        assert [entry["id"] for entry in listed] == ["n01/n01_2.JPEG", "n03/n03_3.JPEG"]
        assert listed[0]["error"] == "not an image that Pillow can read"
        assert "truncated" in listed[1]["error"]
        dataset = MomentsDataset(tmp_path / "out")
        assert dataset.metadata["num_unreadable"] == 2
        assert dataset.metadata["rows_per_shard"] == [5, 6, 5, 3]
        names = datasets.load_from_disk(str(tmp_path / "out"))["id"][:]
        torch.testing.assert_close(dataset.load(range(19)), torch.stack([expected[name][1] for name in names]))

    def test_changed_images_are_refused(self, script, arguments, images_dir, tmp_path):
        source = shutil.copytree(images_dir, tmp_path / "images")
        script.main(arguments(source, tmp_path / "out"))
        moved = source.rename(tmp_path / "moved")
        script.main(arguments(moved, tmp_path / "out"))
        shutil.copy(moved / "n02" / "n02_2.JPEG", moved / "n01" / "n01_3.JPEG")
        with pytest.raises(ValueError, match=r"was begun with other images: .*n01_3\.JPEG has changed\. Restore"):
            script.main(arguments(moved, tmp_path / "out"))

    def test_too_many_stop_the_run_and_repaired_ones_are_read(
        self, script, arguments, damaged_dir, images_dir, expected, tmp_path
    ):
        with pytest.raises(ValueError, match="1 unreadable images, more than `--max_errors 0`.*n01/n01_2.JPEG"):
            script.main(arguments(damaged_dir, tmp_path / "out"))
        with pytest.raises(ValueError, match="2 unreadable images, more than `--max_errors 1`"):
            script.main(arguments(damaged_dir, tmp_path / "out", "--max_errors", 1))
        listed = (tmp_path / "out" / "unreadable.jsonl").read_text().splitlines()
        assert len(listed) == 2
        assert not (tmp_path / "out" / "metadata.json").exists()
        for name in ("n01/n01_2.JPEG", "n03/n03_3.JPEG"):
            shutil.copy(images_dir / name, damaged_dir / name)
        script.main(arguments(damaged_dir, tmp_path / "out"))
        dataset = MomentsDataset(tmp_path / "out")
        assert (tmp_path / "out" / "unreadable.jsonl").read_text() == ""
        torch.testing.assert_close(
            dataset.load(range(21)), torch.stack([straight for _, straight, _ in expected.values()])
        )

    def test_moments_that_overflow_are_refused(self, script, arguments, images_dir, vae_dir, tmp_path):
        vae = AutoencoderKL.from_pretrained(vae_dir)
        with torch.no_grad():
            vae.quant_conv.bias[0] = 1e5
        vae.save_pretrained(tmp_path / "vae")
        run = arguments(
            images_dir, tmp_path / "out", "--pretrained_vae_model_name_or_path", tmp_path / "vae", dtype="fp16"
        )
        with pytest.raises(ValueError, match="moments of n01/n01_0.png are not finite in float16"):
            script.main(run)
        assert not list((tmp_path / "out").glob("*data*"))


class TestRefusals:
    @pytest.mark.parametrize(
        "option, value, message",
        [
            ("--resolution", "0", "argument --resolution: has to be at least 1, but is 0"),
            ("--batch_size", "0", "argument --batch_size: has to be at least 1, but is 0"),
            ("--shard_size", "-1", "argument --shard_size: has to be at least 1, but is -1"),
            ("--max_errors", "-1", "argument --max_errors: has to be at least 0, but is -1"),
            ("--dataloader_num_workers", "-1", "argument --dataloader_num_workers: has to be at least 0, but is -1"),
        ],
    )
    def test_numbers(self, option, value, message, script, arguments, tmp_path, capsys):
        with pytest.raises(SystemExit) as error:
            script.main(arguments(tmp_path, tmp_path / "out", option, value))
        assert error.value.code == 2
        assert message in capsys.readouterr().err

    def test_resolution_that_the_vae_cannot_halve(self, script, arguments, images_dir, tmp_path):
        with pytest.raises(ValueError, match="`--resolution` has to be a multiple of 2 .*, but is 17"):
            script.main(arguments(images_dir, tmp_path / "out", "--resolution", 17))
        assert not (tmp_path / "out").exists()

    def test_vae(self, script, arguments, images_dir, vae_dir, tmp_path):
        with pytest.raises(ValueError, match="_path` '.*nowhere' cannot be loaded: "):
            script.main(
                arguments(images_dir, tmp_path / "out", "--pretrained_vae_model_name_or_path", tmp_path / "nowhere")
            )
        shutil.copytree(vae_dir, tmp_path / "other")
        config = json.loads((vae_dir / "config.json").read_text()) | {"_class_name": "UNet2DModel"}
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="cannot be loaded: it is no autoencoder of diffusers, but UNet2DModel"):
            script.main(
                arguments(images_dir, tmp_path / "out", "--pretrained_vae_model_name_or_path", tmp_path / "other")
            )
        (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKL"}))
        AutoencoderKL(in_channels=5, norm_num_groups=1, block_out_channels=(4,)).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="_path` has to be for grey or RGB images, but Auto.* is for 5 channels"):
            script.main(
                arguments(images_dir, tmp_path / "out", "--pretrained_vae_model_name_or_path", tmp_path / "other")
            )

    def test_output_of_other_settings(self, script, arguments, images_dir, encoded, tmp_path):
        shutil.copytree(encoded, tmp_path / "out")
        with pytest.raises(ValueError, match=r"begun with other settings \(dtype: float16 -> float32; flip: True"):
            script.main(arguments(images_dir, tmp_path / "out"))
        assert file_bytes(tmp_path / "out") == file_bytes(encoded)

    def test_output_of_other_images(self, script, arguments, images_dir, encoded, tmp_path):
        shutil.copytree(images_dir, tmp_path / "fewer")
        (tmp_path / "fewer" / "n02" / "n02_4.JPEG").unlink()
        with pytest.raises(ValueError, match="source_sha256: .*; num_images: 21 -> 20"):
            script.main(arguments(tmp_path / "fewer", encoded, "--flip", "--keep_images", dtype="fp16"))

    def test_output_that_holds_something_else(self, script, arguments, images_dir, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")
        with pytest.raises(ValueError, match="`--output_dir` has to be new, empty, or begun by this script"):
            script.main(arguments(images_dir, tmp_path / "out"))
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]

    def test_too_little_space(self, script, arguments, images_dir, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
        with pytest.raises(ValueError, match="`--output_dir` needs 0.0 GB for the moments, 0.0 GB are free"):
            script.main(arguments(images_dir, tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_dataset_columns(self, script, arguments, images_dir, tmp_path):
        (tmp_path / "data").mkdir()
        datasets.Dataset.from_dict({"image": [1, 2], "label": [0, 1]}).to_parquet(tmp_path / "data" / "train.parquet")
        with pytest.raises(ValueError, match="`--image_column` has to be a column of images, but is image"):
            script.main(arguments(tmp_path / "data", tmp_path / "out"))
        with pytest.raises(ValueError, match="`--split` has to be one of train, but is test"):
            script.main(arguments(tmp_path / "data", tmp_path / "out", "--split", "test"))
        with pytest.raises(ValueError, match="`--split test` is of data sets, but .* is of files"):
            script.main(arguments(images_dir, tmp_path / "out", "--split", "test"))

    def test_unknown_hub_dataset(self, script, vae_dir, tmp_path):
        run = [
            "--dataset_name",
            "nobody/nothing",
            "--output_dir",
            str(tmp_path / "out"),
            "--pretrained_vae_model_name_or_path",
            str(vae_dir),
        ]
        with pytest.raises(ValueError, match="`--dataset_name` 'nobody/nothing'"):
            script.main(run)
        assert not (tmp_path / "out").exists()


class TestImageFiles:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match="`train_data_dir` has to be a folder, an uncompressed .tar or a .zip"):
            open_image_files(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="`train_data_dir` holds no images"):
            open_image_files(tmp_path)

    @pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
    def test_without_labels_folders_mean_nothing(self, kind, images_dir, tmp_path):
        folder = tmp_path / "images"
        shutil.copytree(images_dir, folder / "train" / "deeper")
        shutil.copy(images_dir / "n01" / "n01_0.png", folder / "loose.png")
        path = folder
        if kind != "folder":
            path = Path(shutil.make_archive(str(tmp_path / "images"), kind, folder))
        images = open_image_files(path, labelled=False)
        assert sorted(images.names) == sorted(["loose.png", *(f"train/deeper/{n}" for n in names_in(images_dir))])
        assert images.id2label == {0: "unconditional"} and not images.labels.any()
        assert images.read(images.names.index("loose.png")) == (folder / "loose.png").read_bytes()

    def test_archives_beside_folders(self, images_dir, tmp_path):
        folder = Path(shutil.copytree(images_dir, tmp_path / "images"))
        shutil.make_archive(str(folder / "n09"), "tar", images_dir / "n01")
        with pytest.raises(ValueError, match="either archives or folders of images, but .* has both, such as n09.tar"):
            open_image_files(folder)

    def test_images_without_a_class(self, tmp_path):
        (tmp_path / "loose.png").touch()
        with pytest.raises(ValueError, match="one folder of images per class, but loose.png lies in none"):
            open_image_files(tmp_path)

    def test_splits_are_not_classes(self, images_dir, tmp_path):
        for split in ("train", "val"):
            shutil.copytree(images_dir, tmp_path / split)
        with pytest.raises(ValueError, match="has to hold a folder per class, but train, val look like splits"):
            open_image_files(tmp_path)

    def test_folders_of_classes_one_level_deeper(self, images_dir, tmp_path):
        shutil.copytree(images_dir, tmp_path / "data" / "imagenet")
        with pytest.raises(ValueError, match="classes, which seem to be deeper: imagenet/n01"):
            open_image_files(tmp_path / "data")

    def test_parent_of_an_edm2_folder(self, tmp_path):
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "dataset.json").write_text('{"labels": []}')
        with pytest.raises(ValueError, match="has to be the folder of images itself: .*images"):
            open_image_files(tmp_path)

    def test_compressed_tar(self, images_dir, tmp_path):
        with tarfile.open(tmp_path / "images.tar", "w:gz") as archive:
            archive.add(images_dir, arcname=".")
        with pytest.raises(ValueError, match="has to be an uncompressed .tar"):
            open_image_files(tmp_path / "images.tar")

    def test_cut_tar(self, images_dir, tmp_path):
        with tarfile.open(tmp_path / "images.tar", "w") as archive:
            archive.add(images_dir, arcname=".")
        data = (tmp_path / "images.tar").read_bytes()
        (tmp_path / "images.tar").write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match="has to be an uncompressed .tar, but .* is not"):
            open_image_files(tmp_path / "images.tar")

    def test_webdataset_shards(self, tmp_path):
        with tarfile.open(tmp_path / "imagenet-000000.tar", "w") as archive:
            for name in ("0001.jpg", "0001.cls"):
                archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        with pytest.raises(ValueError, match="one .tar per class, .* is a WebDataset shard"):
            open_image_files(tmp_path)

    def test_folder_with_a_tar_of_tars(self, tmp_path):
        with tarfile.open(tmp_path / "train.tar", "w") as archive:
            archive.addfile(tarfile.TarInfo("n01.tar"), io.BytesIO())
        with pytest.raises(ValueError, match="one .tar per class, .* holds more: name it"):
            open_image_files(tmp_path)

    def test_zip_with_another_compression(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr("n01/a.png", b"123")
        with pytest.raises(ValueError, match="has to be a stored or deflated .zip, but n01/a.png is neither"):
            open_image_files(tmp_path / "images.zip")

    def test_zip_with_a_damaged_name(self, tmp_path):
        """Of what is no image as well: without its `dataset.json` the classes would be others."""
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            archive.writestr("n01/a.png", b"123")
            archive.writestr("dataset.json", b'{"labels": [["n01/a.png", 3]]}')
        data = (tmp_path / "images.zip").read_bytes()
        before, _, after = data.rpartition(b"dataset.json")
        (tmp_path / "images.zip").write_bytes(before + b"dataset.jsoo" + after)
        with pytest.raises(ValueError, match="is damaged .dataset.jsoo is encrypted, or not where the index says"):
            open_image_files(tmp_path / "images.zip")


class TestMomentsDataset:
    def test_shuffled_batches(self, encoded):
        dataset = MomentsDataset(encoded)
        rng = np.random.default_rng(0)
        straight = dataset.load(range(21))
        mirrored = dataset.load(range(21), [True] * 21)
        for _ in range(5):
            rows, flips = rng.permutation(21)[:9], rng.random(9) < 0.5
            expected = torch.where(torch.from_numpy(flips)[:, None, None, None], mirrored[rows], straight[rows])
            assert torch.equal(dataset.load(rows, flips), expected)
        assert dataset.load([]).shape == (0, 4, 8, 8)

    def test_many_record_batches(self, tmp_path):
        """Each value tells its row and whether it is the mirror image; the shards hold several record batches."""
        features = moments_features({0: "a", 1: "b"}, flip=True, images=False)
        shards = [range(0), range(2600), range(2600, 2601), range(2601, 5000)]
        for index, shard in enumerate(shards):
            with MomentsShardWriter(tmp_path / shard_name(index, len(shards)), features) as writer:
                for first in range(shard.start, shard.stop, 100):
                    rows = range(first, min(first + 100, shard.stop))
                    columns = {"id": [str(row) for row in rows], "label": [row % 2 for row in rows]}
                    columns["moments"] = [np.array([row, 0], np.float32).tobytes() for row in rows]
                    columns["moments_flipped"] = [np.array([row, 1], np.float32).tobytes() for row in rows]
                    writer.write(columns, [{"id": f"bad {first}", "error": "cut"}] if first % 1000 == 0 else [])
        settings = {"id2label": {0: "a", 1: "b"}, "moments_shape": [2, 1, 1], "dtype": "float32", "flip": True}
        metadata = finish_moments(
            tmp_path, settings | {"scaling_factor": 1.0, "shift_factor": None}, features, len(shards)
        )
        assert (metadata["num_rows"], metadata["num_unreadable"]) == (5000, 3)
        assert "bad 2000" in (tmp_path / "unreadable.jsonl").read_text()
        dataset = MomentsDataset(tmp_path)
        rng = np.random.default_rng(0)
        rows, flips = rng.permutation(5000), rng.random(5000) < 0.5
        assert dataset.load(rows, flips).flatten(1).tolist() == np.stack([rows, flips], axis=1).astype(float).tolist()
        assert dataset.labels.tolist() == [0, 1] * 2500

    def test_in_a_data_loader(self, encoded):
        dataset = pickle.loads(pickle.dumps(MomentsDataset(encoded)))  # as workers that are not forked get it
        batches = list(torch.utils.data.DataLoader(dataset, batch_size=5, shuffle=True, num_workers=1))
        moments, labels = (torch.cat([batch[key] for batch in batches]) for key in ("moments", "label"))
        assert moments.dtype == torch.float16
        order = [int((moments == row).flatten(1).all(dim=1).nonzero()) for row in dataset.load(range(21))]
        assert sorted(order) == list(range(21))
        assert torch.equal(labels[order], torch.from_numpy(dataset.labels))
        assert torch.equal(dataset[4]["moments"], moments[order[4]]) and dataset[4]["label"] == 0

    def test_needs_no_preadv(self, encoded, monkeypatch):
        """As some builds of Python for macOS have none."""
        expected = MomentsDataset(encoded).load(range(21))
        monkeypatch.delattr(os, "preadv", raising=False)
        assert torch.equal(MomentsDataset(encoded).load(range(21)), expected)

    def test_nothing_stays_mapped(self, encoded):
        """Memory does not grow with what was read: no page of a shard belongs to the process."""
        if not Path("/proc/self/maps").exists():
            pytest.skip("needs /proc")
        dataset = MomentsDataset(encoded)
        dataset.load(range(21), [True] * 21)
        assert str(encoded) not in Path("/proc/self/maps").read_text()
        assert len(pickle.dumps(dataset)) < (encoded / "data-00003-of-00004.arrow").stat().st_size

    def test_rows_outside(self, encoded):
        dataset = MomentsDataset(encoded)
        for row in (-1, 21):
            with pytest.raises(IndexError, match=r"`rows` has to lie in 0..20, but holds"):
                dataset.load([0, row])

    @pytest.mark.parametrize("damage", ["missing", "cut", "garbage", "other_shape", "other_format"])
    def test_damage_is_found_when_opened(self, damage, encoded, tmp_path):
        folder = tmp_path / "out"
        shutil.copytree(encoded, folder)
        shard, metadata = folder / "data-00002-of-00004.arrow", json.loads((folder / "metadata.json").read_text())
        if damage == "missing":
            shard.unlink()
            message = "lacks a shard: .*data-00002"
        elif damage == "cut":
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
            message = "damaged shard: .*data-00002"
        elif damage == "garbage":
            shard.write_bytes(b"\0" * 1000)
            message = "damaged shard: .*data-00002"
        elif damage == "other_shape":
            (folder / "metadata.json").write_text(json.dumps(metadata | {"moments_shape": [4, 8, 9]}))
            message = "rows in `moments` of another size than 576 bytes"
        else:
            (folder / "metadata.json").write_text(json.dumps(metadata | {"format_version": 2}))
            message = "has to hold diffusers_lsep.moments version 1, but metadata.json says .*2"
        with pytest.raises(ValueError, match=message):
            MomentsDataset(folder)

    def test_cut_while_open(self, encoded, tmp_path):
        shutil.copytree(encoded, tmp_path / "out")
        dataset = MomentsDataset(tmp_path / "out")
        os.truncate(tmp_path / "out" / "data-00000-of-00004.arrow", 100)
        with pytest.raises(OSError, match="ends early"):
            dataset.load([0])

    def test_folder_of_something_else(self, tmp_path):
        with pytest.raises(ValueError, match="`folder` has to be written by examples/encode_latents.py"):
            MomentsDataset(tmp_path)

    def test_names_of_classes_may_repeat(self, script, arguments, images_dir, tmp_path, monkeypatch):
        """As "crane" does in ImageNet."""
        source = open_image_files(images_dir)
        source.id2label = {0: "crane", 1: "crane", 2: "maillot"}
        monkeypatch.setattr("diffusers_lsep.data.encoding.open_image_files", lambda path, labelled: source)
        script.main(arguments(images_dir, tmp_path / "out"))
        assert MomentsDataset(tmp_path / "out").id2label == source.id2label
        assert datasets.load_from_disk(str(tmp_path / "out"))["label"][:] == source.labels.tolist()


@pytest.fixture(scope="module")
def save_vae(vae_dir, tmp_path_factory):
    """Saves the VAE of these tests after a change."""

    def save(change=None, **config):
        vae = AutoencoderKL.from_pretrained(vae_dir)
        vae.register_to_config(**config)
        if change is not None:
            with torch.no_grad():
                change(vae)
        folder = tmp_path_factory.mktemp("other-vae")
        vae.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def another_encoder(save_vae):
    return save_vae(lambda vae: vae.encoder.conv_in.bias[0].add_(1e-3))


@pytest.fixture(scope="module")
def another_decoder(save_vae):
    """What sd-vae-ft-ema is to sd-vae-ft-mse."""
    return save_vae(
        lambda vae: [weight.mul_(0.5) for m in (vae.decoder, vae.post_quant_conv) for weight in m.parameters()]
    )


@pytest.mark.slow
def test_training_and_probing_refuse_another_encoder(
    train, encoded, vae_dir, save_vae, another_encoder, another_decoder, tiny_transformer, tmp_path, capsys
):
    def save_pipeline(vae, folder):
        transformer = tiny_transformer(in_channels=2, num_classes=3, sample_size=RESOLUTION // 2)
        pipe = LSEPPipeline(transformer, FlowMatchSDEScheduler(), vae=AutoencoderKL.from_pretrained(vae))
        pipe.save_pretrained(tmp_path / folder)
        return str(tmp_path / folder)

    good, bad = save_pipeline(another_decoder, "good"), save_pipeline(another_encoder, "bad")
    latents = ("--latents_dir", encoded, "--dry_run")
    digest = MomentsDataset(encoded).metadata["vae_encoder_sha256"][:12]
    message = f"was encoded by the VAE {str(vae_dir)!r} .*{digest}.*, but `--pretrained_vae_model_name_or_path` "
    with pytest.raises(ValueError, match=f"{message}{str(another_encoder)!r} is another one"):
        train(*latents, "--pretrained_vae_model_name_or_path", another_encoder)
    # It is the weights that count, not where they are, and of these only what encodes.
    shutil.copytree(vae_dir, tmp_path / "moved")
    for vae in (tmp_path / "moved", another_decoder):
        assert train(*latents, "--pretrained_vae_model_name_or_path", vae) == 0
    assert train(*latents) == 0
    # What is not in the weights
    for config, problem in (
        ({"scaling_factor": 0.3}, r"\(scaling factor 0.5\), but .* is another one \(0.3\)"),
        ({"shift_factor": None}, r"\(shift factor 0.25\), but .* is another one \(None\)"),
        ({"norm_num_groups": 1}, r"\(SHA-256 of the encoder .*\), but .* is another one"),
    ):
        with pytest.raises(ValueError, match=problem):
            train(*latents, "--pretrained_vae_model_name_or_path", save_vae(**config))
    with pytest.raises(ValueError, match="is another one"):
        quant_conv = save_vae(lambda vae: vae.quant_conv.weight.mul_(2))
        train(*latents, "--pretrained_vae_model_name_or_path", quant_conv)

    # The VAE of a pipeline to start from
    shape = [flag for name in ("patch_size", "num_layers") for flag in (f"--{name}", "2")] + ["--probe_depth", "1"]
    with pytest.raises(ValueError, match=f"{message}{bad!r} is another one"):
        train(*latents, "--pretrained_model_name_or_path", bad, tiny=shape)
    assert train(*latents, "--pretrained_model_name_or_path", good, tiny=shape) == 0

    probe = ["--data", str(encoded), "--unseen_data", "--method", "ridge", "--timesteps", "0"]
    probe += ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=f"was encoded by the VAE .*, but that of `PIPELINE` {bad!r} is another one"):
        main(["probe", bad, *probe])
    capsys.readouterr()
    main(["probe", good, *probe])
    assert "good has no folder probe/: there is no probe of the training to measure" in capsys.readouterr().out


@pytest.mark.slow
def test_probing_measures_on_the_latents_that_the_run_held_out(train, encoded, tmp_path):
    def probe(run, *options):
        fixed = ["--data", str(encoded), "--method", "ridge", "--timesteps", "0", "--overwrite_output_dir"]
        main(["probe", str(tmp_path / run), *fixed, "--output_dir", str(tmp_path / "out"), *options])
        return json.loads((tmp_path / "out" / "probe_results.json").read_text())

    latents = ("--latents_dir", encoded, "--seed", 3)
    assert train(*latents, "--validation_split", 0.3, output_dir=tmp_path / "run") == 0
    for run in ("run", "run/checkpoint-2/pipeline"):
        results = probe(run)
        assert (results["num_training_images"], results["num_held_out_images"]) == (15, 6)
        assert results["held_out"] == "what the training run held out of the data"
        assert results["training_probe"]["layer"] == 1
    assert train(*latents, output_dir=tmp_path / "all") == 0
    with pytest.raises(ValueError, match="its training run held out no fraction of its data"):
        probe("all")


@pytest.mark.slow
def test_folder_of_an_older_version(script, arguments, images_dir, train, another_decoder, tmp_path, capsys):
    """Its metadata has the hash of the whole VAE alone: it opens, says what it does not know, and can be completed."""
    folder = tmp_path / "moments"
    script.main(arguments(images_dir, folder))
    complete = json.loads((folder / "metadata.json").read_text())
    older = {name: value for name, value in complete.items() if name != "vae_encoder_sha256"}
    (folder / "metadata.json").write_text(json.dumps(older))
    latents = ("--latents_dir", folder, "--dry_run")
    assert train(*latents) == 0
    with pytest.raises(
        ValueError, match="Whether the two have one encoder is not known.*run .*encode_latents.py again"
    ):
        train(*latents, "--pretrained_vae_model_name_or_path", another_decoder)

    capsys.readouterr()
    shards = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    script.main(arguments(images_dir, folder))
    assert "nothing is left to do" in capsys.readouterr().out
    assert shards == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    assert json.loads((folder / "metadata.json").read_text()) == complete
    assert train(*latents, "--pretrained_vae_model_name_or_path", another_decoder) == 0

    # One that was begun by it
    (folder / "metadata.json").unlink()
    result = ("format", "format_version", "moments", "num_rows", "num_unreadable", "rows_per_shard")
    (folder / "encoding.json").write_text(json.dumps({k: v for k, v in older.items() if k not in result}))
    next(folder.glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="was begun with other settings .*vae_sha256"):
        script.main([*arguments(images_dir, folder), "--pretrained_vae_model_name_or_path", str(another_decoder)])
    script.main(arguments(images_dir, folder))
    assert json.loads((folder / "metadata.json").read_text()) == complete


def test_source_of_the_training_stream(encoded):
    """Half of the samples come from mirror images, and the latents of one row differ by the posterior's noise."""
    dataset = MomentsDataset(encoded)
    stream = SampleStream(dataset, (2, 8, 8), seed=0, random_flip=True, posterior_noise=True)
    batch = stream.__getitems__(list(range(210)))
    rows = stream.rows(range(210))
    is_straight = (batch["moments"] == dataset.load(rows)).flatten(1).all(dim=1)
    is_mirrored = (batch["moments"] == dataset.load(rows, [True] * 210)).flatten(1).all(dim=1)
    assert (is_straight ^ is_mirrored).all()
    assert 60 < is_mirrored.sum() < 150
    assert batch["class_labels"].tolist() == dataset.labels[rows].tolist()
    latents = sample_posterior(
        batch["moments"], batch["posterior_noise"], dataset.scaling_factor, dataset.shift_factor
    )
    mean, std = batch["moments"].float().chunk(2, dim=1)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, (mean + std * batch["posterior_noise"] - 0.25) * 0.5)


class TestOriginalMomentsDataset:
    @pytest.fixture
    def folder(self, tmp_path):
        """`vae-sd/` of 12 images whose labels are listed in another order than the files sort."""
        folder = tmp_path / "vae-sd"
        rng = np.random.default_rng(0)
        labels = []
        for index in rng.permutation(12).tolist():
            name = f"{index // 10:05d}/img-mean-std-{index:08d}.npy"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            mean, std = rng.normal(size=(4, 8, 8)), rng.random((4, 8, 8))
            np.save(folder / name, np.concatenate([mean, std]).astype(np.float32))
            labels.append([name, index * 7 % 5])
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
        return folder

    @pytest.fixture
    def edit(self, folder):
        def apply(change):
            document = json.loads((folder / "dataset.json").read_text())
            (folder / "dataset.json").write_text(json.dumps({"labels": change(document["labels"])}))

        return apply

    def check(self, folder):
        dataset = OriginalMomentsDataset(folder)
        assert len(dataset) == 12
        assert dataset.labels.tolist() == [index * 7 % 5 for index in range(12)]
        assert (dataset.num_classes, dataset.id2label[4], dataset.moments_shape) == (5, "4", (8, 8, 8))
        rows = [7, 0, 11]
        files = [folder / f"{row // 10:05d}/img-mean-std-{row:08d}.npy" for row in rows]
        expected = torch.stack([torch.from_numpy(np.load(file)) for file in files])
        assert torch.equal(dataset.load(rows, [False] * 3), expected)

    def test_labels_are_paired_by_name(self, folder):
        self.check(folder)

    def test_labels_that_name_the_images(self, folder, edit):
        edit(lambda labels: [[f"00000/img{name[-12:-4]}.png", label] for name, label in labels])
        self.check(folder)

    def test_names_with_backslashes(self, folder, edit):
        edit(lambda labels: [[name.replace("/", "\\"), label] for name, label in labels])
        self.check(folder)

    def test_source_of_the_training_stream(self, folder):
        stream = SampleStream(OriginalMomentsDataset(folder), (4, 8, 8), seed=0, posterior_noise=True)
        batch = stream.__getitems__(list(range(24)))
        assert batch["moments"].shape == (24, 8, 8, 8)
        assert sorted(batch["class_labels"].tolist()) == sorted([index * 7 % 5 for index in range(12)] * 2)

    def test_mirror_images(self, folder):
        with pytest.raises(ValueError, match="`flips` asks for mirror images"):
            OriginalMomentsDataset(folder).load([0], [True])

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda labels: labels[1:], "no label for 0000[01]/img-mean-std-"),
            (lambda labels: [*labels, ["00000/img-mean-std-00000099.npy", 1]], "files that are not there: .*00000099"),
            (lambda labels: [*labels, labels[0]], "dataset.json names more than one file for 0000"),
            (
                lambda labels: [[name, [label]] for name, label in labels],
                "a class >= 0, but gives .*: \\[.* and 7 more",
            ),
            (lambda labels: [[name, -1] for name, _ in labels], "a class >= 0, but gives .*: -1"),
            (lambda labels: None, "with a class for every file"),
            (lambda labels: [[f"{index}.png", 0] for index in range(100, 112)], "no label for .* and 7 more"),
            (lambda labels: [[f"{chr(97 + index)}.png", 0] for index in range(12)], "a.png has no number to pair"),
        ],
    )
    def test_labels_that_do_not_pair(self, folder, edit, change, message):
        edit(change)
        with pytest.raises(ValueError, match=message):
            OriginalMomentsDataset(folder)

    def test_two_files_of_one_number(self, folder, edit):
        edit(lambda labels: [[f"00000/img{name[-12:-4]}.png", label] for name, label in labels])
        shutil.copy(folder / "00000" / "img-mean-std-00000003.npy", folder / "00001" / "img-mean-std-00000003.npy")
        with pytest.raises(ValueError, match="the folder holds more than one file for 3"):
            OriginalMomentsDataset(folder)

    def test_damaged_document(self):
        with pytest.raises(ValueError, match="dataset.json has to be"):
            pair_labels(b'{"labels": [["a.npy", 1], [', ["a.npy"])

    def test_folders_without_what_is_needed(self, folder, tmp_path):
        with pytest.raises(ValueError, match="has to hold dataset.json beside the .npy files"):
            OriginalMomentsDataset(tmp_path)
        shutil.rmtree(folder / "00000")
        shutil.rmtree(folder / "00001")
        with pytest.raises(ValueError, match="holds no .npy file"):
            OriginalMomentsDataset(folder)

    @pytest.mark.parametrize(
        "values, message",
        [
            (np.zeros((4, 8), np.float32), r"has to hold moments \[2 \* C, h, w\], but .* has shape \(4, 8\)"),
            (np.zeros((0, 8, 8), np.float32), r"has shape \(0, 8, 8\)"),
            (np.zeros((8, 8, 8), np.uint8), "has to hold floating-point numbers, but .* has uint8"),
            (np.full((8, 8, 8), -1, np.float32), "second half of .* has negative values"),
        ],
    )
    def test_files_that_hold_something_else(self, values, message, folder):
        np.save(folder / "00000" / "img-mean-std-00000000.npy", values)
        with pytest.raises(ValueError, match=message):
            OriginalMomentsDataset(folder)

    def test_a_file_of_another_shape(self, folder):
        np.save(folder / "00001" / "img-mean-std-00000010.npy", np.zeros((8, 4, 4), np.float32))
        with pytest.raises(
            ValueError,
            match=r"of one shape, but .*00000010.npy has shape \(8, 4, 4\), the first file has",
        ):
            OriginalMomentsDataset(folder).load([10])

    def test_pickled_objects_are_not_executed(self, folder):
        np.save(folder / "00000" / "img-mean-std-00000000.npy", np.array([{}], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match=r"\.npy files of numbers, but .*00000000\.npy cannot be read"):
            OriginalMomentsDataset(folder)

    def test_damaged_and_negative_files_beyond_the_first(self, folder):
        moments = OriginalMomentsDataset(folder)
        np.save(folder / "00001" / "img-mean-std-00000010.npy", np.full((8, 8, 8), -1, np.float32))
        with pytest.raises(ValueError, match="second half of .*00000010.npy has negative values"):
            moments.load([10])
        np.save(folder / "00001" / "img-mean-std-00000010.npy", np.ones((8, 8, 8), np.complex64))
        with pytest.raises(ValueError, match="00000010.npy has complex64"):
            moments.load([10])
        (folder / "00001" / "img-mean-std-00000010.npy").write_bytes(b"junk")
        with pytest.raises(ValueError, match=r"00000010\.npy cannot be read"):
            moments.load([10])
