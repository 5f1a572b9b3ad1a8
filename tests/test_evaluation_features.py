# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Feature extractors, sets of images, and features kept on disk."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from image_folders import save_images
from tiny_models import make_dinov2

from diffusers_lsep.evaluation.dinov2 import DINOv2Features
from diffusers_lsep.evaluation.features import PixelFeatures, extract_features
from diffusers_lsep.evaluation.images import open_images
from diffusers_lsep.evaluation.inception import InceptionFeatures
from diffusers_lsep.files import held_folder
from diffusers_lsep.sampling import float32_products


def make_images(count, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def inception(inception_weights):
    return InceptionFeatures(inception_weights)


@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_networks_run_without_tf32_and_with_cudnn(request, tmp_path, name):
    if name == "dinov2":
        make_dinov2().save_pretrained(tmp_path)
        extractor = DINOv2Features(str(tmp_path))
        network = extractor.model
    else:
        extractor = request.getfixturevalue(name)
        network = extractor.network

    def flags():
        products = torch.backends.cuda.matmul.allow_tf32
        return torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32, products

    seen, before = [], flags()
    handle = network.register_forward_pre_hook(lambda *args: seen.append(flags()))
    with float32_products(allow_tf32=True):  # as a model that is measured may have it
        extractor(make_images(1))
        assert flags() == (True, True, True)
    handle.remove()
    assert seen == [(True, False, False)] and flags() == before


def save_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


class TestInceptionFeatures:
    @pytest.mark.slow
    def test_equals_torch_fidelity(self, inception_weights, inception):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        original = FeatureExtractorInceptionV3("original", ["2048", "logits_unbiased"], str(inception_weights))
        images = make_images(3, size=40)
        with torch.no_grad():
            pool, logits = original(torch.from_numpy(images).permute(0, 3, 1, 2))
        features = inception(images)
        assert {name: value.shape for name, value in features.items()} == {
            name: (3, width) for name, width in inception.widths.items()
        }
        np.testing.assert_array_equal(features["pool"], pool.numpy())
        np.testing.assert_array_equal(features["logits"], logits.numpy())
        assert features["pool"].std() > 0.1

    def test_spatial_features_are_seven_rectified_channels_in_nhwc_order(self, inception):
        network, images = inception.network, make_images(2)
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            x = (resize(pixels, size=(299, 299), align_corners=False) - 128) / 128
            for name in (
                *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
                *("MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"),
            ):
                x = getattr(network, name)(x)
            branch = network.Mixed_6d.branch1x1
            x = branch.bn(branch.conv(x)).clamp(min=0)  # [B, 192, 17, 17]
        expected = np.stack(
            [[[x[b, c, i, j] for c in range(7)] for i in range(17) for j in range(17)] for b in range(2)]
        ).reshape(2, -1)
        np.testing.assert_array_equal(inception(images)["spatial"], expected)
        assert 0.2 < (expected == 0).mean() < 0.8

    def test_identity(self, inception, inception_weights):
        import hashlib

        assert inception.name == f"inception-{hashlib.sha256(inception_weights.read_bytes()).hexdigest()[:8]}"
        assert not inception.is_official

    def test_pickled_code_is_refused_and_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        (tmp_path / "evil.pth").write_bytes(pickle.dumps({"fc.weight": Evil()}))
        torch.save({"fc.weight": Evil()}, tmp_path / "evil_zip.pth")
        for name in ("evil.pth", "evil_zip.pth"):
            with pytest.raises(ValueError, match=f"`inception_weights` .*{name}' cannot be read as plain weights"):
                InceptionFeatures(tmp_path / name)
        assert not (tmp_path / "ran").exists()

    def test_other_files_are_refused(self, tmp_path, inception_weights):
        with pytest.raises(FileNotFoundError, match="`inception_weights` has to be a file, but there is none at"):
            InceptionFeatures(tmp_path / "absent.pth")
        (tmp_path / "truncated.pth").write_bytes(inception_weights.read_bytes()[:100_000])
        with pytest.raises(ValueError, match=r"truncated.pth' cannot be read as plain weights"):
            InceptionFeatures(tmp_path / "truncated.pth")
        torch.save([torch.zeros(2)], tmp_path / "list.pth")
        with pytest.raises(ValueError, match="has to hold a state dict"):
            InceptionFeatures(tmp_path / "list.pth")
        torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"(?s)is no state dict of Inception: .*Missing key.*fc\.weight"):
            InceptionFeatures(tmp_path / "other.pth")
        torch.save({"fc.bias": torch.tensor([0.0, np.nan])}, tmp_path / "nan.pth")
        with pytest.raises(ValueError, match=r"has to be finite, but \['fc.bias'\] hold NaN"):
            InceptionFeatures(tmp_path / "nan.pth")

    @pytest.mark.slow
    def test_download(self, tmp_path, inception_weights, monkeypatch):
        import hashlib
        import http.server
        import threading

        import huggingface_hub.constants
        from torch_fidelity import feature_extractor_inceptionv3

        from diffusers_lsep.evaluation import inception as module

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=inception_weights.parent)

            def log_message(self, *args):
                pass

        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        with pytest.raises(OSError, match="HF_HUB_OFFLINE is set. Download it elsewhere"):
            InceptionFeatures()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}/{inception_weights.name}"
            monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", url)
            # These are not the weights of 2015
            with pytest.raises(OSError, match="could not be downloaded: invalid hash value"):
                InceptionFeatures()
            assert list((tmp_path / "checkpoints").iterdir()) == []
            digest = hashlib.sha256(inception_weights.read_bytes()).hexdigest()
            monkeypatch.setattr(module, "OFFICIAL_HASH", digest[:8])
            assert InceptionFeatures().is_official
            server.shutdown()
        # The second time there is no server
        assert InceptionFeatures().name == f"inception-{digest[:8]}"
        (tmp_path / "checkpoints" / inception_weights.name).unlink()
        with pytest.raises(OSError, match=r"could not be downloaded: .*refused.* name it by `inception_weights`"):
            InceptionFeatures()


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    config = {"hidden_size": 24, "num_hidden_layers": 2, "patch_size": 14, "image_size": 224}
    make_dinov2(**config, initializer_range=0.2).save_pretrained(folder)
    return folder


class TestDINOv2Features:
    def test_equals_a_plain_rewriting(self, dinov2_folder):
        from transformers import Dinov2Model

        images = make_images(2, size=448)
        extractor = DINOv2Features(str(dinov2_folder))
        model = Dinov2Model.from_pretrained(dinov2_folder).eval()
        # Pillow's bicubic filter is the reference of the antialiased one; it rounds to whole grey levels
        resized = np.stack([PIL.Image.fromarray(image).resize((224, 224), PIL.Image.BICUBIC) for image in images])
        pixels = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            expected = model(torch.from_numpy(pixels).float().permute(0, 3, 1, 2)).pooler_output.numpy()
        result = extractor(images)["class_token"]
        assert result.shape == (2, 24) == (2, extractor.widths["class_token"])
        np.testing.assert_allclose(result, expected, atol=0.02)
        assert np.abs(result[0] - result[1]).max() > 0.1

    def test_name_follows_the_weights(self, dinov2_folder, tmp_path):
        from transformers import Dinov2Model

        model = Dinov2Model.from_pretrained(dinov2_folder)
        model.layernorm.bias.data[0] += 1
        model.save_pretrained(tmp_path)
        names = [DINOv2Features(str(folder)).name for folder in (dinov2_folder, dinov2_folder, tmp_path)]
        assert names[0] == names[1] != names[2]

    def test_errors(self, tmp_path):
        from transformers import BertConfig, BertModel

        with pytest.raises(ValueError, match="`dinov2_model` .*absent' cannot be loaded"):
            DINOv2Features(str(tmp_path / "absent"))
        BertModel(
            BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=10)
        ).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"has to be a vision transformer .* \(bert, patch size None\)"):
            DINOv2Features(str(tmp_path))


class TestPixelFeatures:
    def test_values(self):
        images = make_images(3, size=4)
        extractor = PixelFeatures((4, 4), 3)
        assert extractor.widths == {"pixels": 48}
        features = extractor(images)["pixels"]
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, images.reshape(3, 48).astype(np.float32) / 255)

    def test_grey_counts_once(self):
        images = make_images(3, size=4)[..., :1].repeat(3, axis=3)
        extractor = PixelFeatures((4, 4), 1)
        assert extractor.widths == {"pixels": 16} and extractor.name != PixelFeatures((4, 4), 3).name
        expected = images[..., 0].reshape(3, 16).astype(np.float32) / 255
        np.testing.assert_array_equal(extractor(images)["pixels"], expected)

    def test_what_is_refused(self):
        with pytest.raises(ValueError, match="`features` 'pixels' of grey samples need a grey reference"):
            PixelFeatures((4, 4), 1)(make_images(3, size=4))
        with pytest.raises(ValueError, match="up to 4,096 values, but those of 64 x 64 have 12,288: use 'inception'"):
            PixelFeatures((64, 64), 3)


def read_all(images, batch_size=3, start=0, stop=None):
    return np.concatenate(list(images.batches(start, images.count if stop is None else stop, batch_size)))


class TestNpzImages:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_images_are_read_in_any_batches(self, tmp_path, save):
        pixels = make_images(10)
        save(tmp_path / "x.npz", arr_0=pixels, arr_1=np.arange(10))
        images = open_images(tmp_path / "x.npz")
        assert (images.count, images.size, images.statistics, images.notes) == (10, (16, 16), {}, [])
        np.testing.assert_array_equal(read_all(images), pixels)
        np.testing.assert_array_equal(read_all(images, start=4, stop=9), pixels[4:9])
        assert [len(batch) for batch in images.batches(0, 10, 4)] == [4, 4, 2]

    def test_memory_is_bounded_by_the_batch(self, tmp_path):
        import tracemalloc

        save_npz(tmp_path / "x.npz", arr_0=np.zeros((400, 128, 128, 3), np.uint8))  # 20 MB
        tracemalloc.start()
        images = open_images(tmp_path / "x.npz")
        assert sum(len(batch) for batch in images.batches(0, 400, 10)) == 400
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4e6

    def test_stored_statistics(self, tmp_path):
        rng = np.random.default_rng(0)
        arrays = {"mu": rng.random(2048), "sigma": np.eye(2048, dtype=np.float32)}
        arrays |= {"mu_s": rng.random(2023), "sigma_s": np.eye(2023)}
        images = open_images(save_npz(tmp_path / "both.npz", arr_0=make_images(2), **arrays))
        assert set(images.statistics) == {"pool", "spatial"}
        np.testing.assert_array_equal(images.statistics["pool"][0], arrays["mu"])
        assert images.statistics["pool"][1].dtype == np.float64
        np.testing.assert_array_equal(images.statistics["spatial"][1], arrays["sigma_s"])
        alone = open_images(save_npz(tmp_path / "alone.npz", mu=arrays["mu"], sigma=arrays["sigma"]))
        assert (alone.count, alone.size, set(alone.statistics)) == (0, None, {"pool"})

    def test_settings_beside_the_samples(self, tmp_path):
        save_npz(tmp_path / "x.npz", arr_0=make_images(2))
        settings = {"seed": 3, "class_labels": "balanced over all classes"}
        (tmp_path / "x.json").write_text(json.dumps({**settings, "class_ids": [1, 2]}))
        images = open_images(tmp_path / "x.npz")
        assert images.settings == settings
        assert any("every class was drawn equally often" in note for note in images.notes)
        (tmp_path / "x.json").write_text('{"seed"')
        with pytest.raises(ValueError, match=r"has settings in .*x.json that cannot be read"):
            open_images(tmp_path / "x.npz")

    @pytest.mark.parametrize("shape", [(5, 8, 8), (5, 8, 8, 1)])
    def test_grey_images_are_repeated_and_noted(self, tmp_path, shape):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        images = open_images(save_npz(tmp_path / "x.npz", arr_0=pixels))
        assert images.notes == ["`samples`: grey images, repeated to three channels"]
        for channel in range(3):
            np.testing.assert_array_equal(read_all(images)[..., channel], pixels.reshape(5, 8, 8))

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            (
                {"arr_0": np.zeros((2, 8, 8, 3), np.float32)},
                r"has to hold uint8 images, but `arr_0` is float32; .*floor",
            ),
            ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"has to hold images \[N, H, W, 3\], but .* \[2, 3, 8, 8\]"),
            ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, r"holds no images: `arr_0` has shape \[0, 8, 8, 3\]"),
            ({"arr_0": np.asfortranarray(make_images(2))}, "has to hold `arr_0` in C order"),
            ({"images": make_images(2)}, r"has to hold the array `arr_0` of images, but has \['images'\]"),
            ({"mu": np.zeros(2048)}, "has only one of the statistics mu and sigma"),
            ({"mu": np.zeros(2048), "sigma": np.eye(3)}, r"has statistics sigma of float64 \(3, 3\)"),
            ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "has statistics mu with NaN or infinity"),
        ],
    )
    def test_errors(self, tmp_path, arrays, message):
        with pytest.raises(ValueError, match=f"`reference` .*x.npz' {message}"):
            open_images(save_npz(tmp_path / "x.npz", **arrays), "reference")

    def test_pickles_are_refused_and_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        evil = np.array([Evil()], dtype=object)
        with pytest.raises(ValueError, match="has to hold uint8 images, but `arr_0` is object"):
            open_images(save_npz(tmp_path / "x.npz", arr_0=evil))
        with pytest.raises(ValueError, match="has statistics mu of object"):
            open_images(save_npz(tmp_path / "x.npz", mu=evil, sigma=np.eye(2048)))
        assert not (tmp_path / "ran").exists()

    def test_damaged_files(self, tmp_path):
        whole = save_npz(tmp_path / "whole.npz", arr_0=make_images(50)).read_bytes()
        (tmp_path / "x.npz").write_bytes(whole[:-1000])
        with pytest.raises(ValueError, match=r"`samples` .*x.npz' cannot be read: File is not a zip file"):
            open_images(tmp_path / "x.npz")
        (tmp_path / "x.npz").write_bytes(whole[:9000] + b"?" * 100 + whole[9100:])
        with pytest.raises(ValueError, match=r"`samples` .*x.npz' is damaged: Bad CRC"):
            read_all(open_images(tmp_path / "x.npz"))
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (9, 8, 8, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(8 * 8 * 8 * 3))
        with pytest.raises(ValueError, match=r"does not hold the \[9, 8, 8, 3\] values it declares"):
            open_images(tmp_path / "x.npz")

    @pytest.mark.parametrize("shape", [(2**62, 4, 4, 3), (-1, 4, 4, 3), (2**31, 2**31, 4, 3)])
    def test_forged_shapes(self, tmp_path, shape):
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(48))
        with pytest.raises(ValueError, match=r"`samples` .*(does not hold the|holds no images)"):
            open_images(tmp_path / "x.npz")

    def test_absent_file_and_resolution(self, tmp_path):
        with pytest.raises(ValueError, match="`samples` has to exist, but there is no file"):
            open_images(tmp_path / "absent.npz")
        save_npz(tmp_path / "x.npz", arr_0=make_images(2))
        assert open_images(tmp_path / "x.npz", resolution=16).size == (16, 16)
        with pytest.raises(ValueError, match="`resolution` 8 cannot be used with .* 16 x 16 already"):
            open_images(tmp_path / "x.npz", resolution=8)
        with pytest.raises(ValueError, match="`resolution` has to be at least 1, but is 0"):
            open_images(tmp_path / "x.npz", resolution=0)


class TestEncodedImages:
    def test_folder_in_the_order_of_its_paths(self, tmp_path):
        pixels = make_images(7)
        save_images(tmp_path / "a", pixels[:3])
        save_images(tmp_path / "b", pixels[3:])
        (tmp_path / "notes.txt").write_text("not an image")
        (tmp_path / "b" / "._000.png").write_bytes(b"of a Mac")
        images = open_images(tmp_path)
        assert (images.count, images.size, images.notes) == (7, (16, 16), [])
        np.testing.assert_array_equal(read_all(images), pixels)
        np.testing.assert_array_equal(read_all(images, start=2, stop=6), pixels[2:6])

    def test_folder_with_splits(self, tmp_path):
        save_images(tmp_path / "train" / "bee", make_images(3))
        save_images(tmp_path / "test" / "bee", make_images(2))
        save_images(tmp_path / "flat", make_images(2))
        save_npz(tmp_path / "x.npz", arr_0=make_images(2))
        assert open_images(tmp_path).count == open_images(tmp_path, split="train").count == 3
        assert open_images(tmp_path, split="test").count == 2
        with pytest.raises(ValueError, match="`split` has to be one of"):
            open_images(tmp_path, split="nonsense")
        for source in (tmp_path / "flat", tmp_path / "x.npz", [tmp_path / "flat" / "000.png"]):
            with pytest.raises(ValueError, match="`split` is 'test', but `samples` .* has no splits"):
                open_images(source, split="test")

    def test_list_of_files(self, tmp_path):
        pixels = make_images(3)
        save_images(tmp_path, pixels)
        images = open_images([tmp_path / "002.png", tmp_path / "000.png"])
        np.testing.assert_array_equal(read_all(images), pixels[[2, 0]])

    @pytest.mark.parametrize("kind", ["parquet file", "folder of parquet", "save_to_disk", "save_to_disk with splits"])
    def test_data_set(self, tmp_path, kind):
        import datasets

        pixels = make_images(5)
        rows = {"picture": [PIL.Image.fromarray(image) for image in pixels], "label": [0] * 5}
        dataset = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
        path = tmp_path / "data"
        if kind == "parquet file":
            path = path.with_suffix(".parquet")
            dataset.to_parquet(path)
        elif kind == "folder of parquet":
            path.mkdir()
            dataset.to_parquet(path / "test-00000-of-00001.parquet")
        elif kind == "save_to_disk":
            dataset.save_to_disk(path)
        else:
            datasets.DatasetDict(test=dataset, train=dataset.select([0])).save_to_disk(path)
        split = "test" if "splits" in kind else None
        images = open_images(path, split=split, image_column="picture")
        np.testing.assert_array_equal(read_all(images), pixels)
        with pytest.raises(ValueError, match="`image_column` has to be a column of images of .*, but is 'label'"):
            open_images(path, split=split, image_column="label")
        with pytest.raises(ValueError, match=r"`split` has to be one of \['.*'\] for .*, but is 'validation'"):
            open_images(path, split="validation")

    def test_same_content_has_the_same_hash_wherever_it_lies(self, tmp_path):
        pixels = make_images(4)
        hashes = [open_images(save_images(tmp_path / name, pixels)).content_hash for name in ("a", "b")]
        assert hashes[0] == hashes[1]
        reordered = open_images(save_images(tmp_path / "c", pixels[::-1])).content_hash
        cropped = open_images(tmp_path / "a", resolution=8).content_hash
        assert len({hashes[0], reordered, cropped}) == 3

    def test_resolution_cuts_as_training_does(self, tmp_path):
        from diffusers_lsep.data.images import center_crop

        pixels = [make_images(1, size)[0, : size - 5] for size in (40, 70)]
        save_images(tmp_path, pixels)
        images = open_images(tmp_path, resolution=16)
        assert images.size == (16, 16)
        expected = [np.asarray(center_crop(PIL.Image.fromarray(image), 16)) for image in pixels]
        np.testing.assert_array_equal(read_all(images), expected)

    def test_modes_are_converted_and_noted(self, tmp_path):
        rgb = PIL.Image.fromarray(make_images(1)[0])
        rgb.save(tmp_path / "0.png")
        rgb.convert("L").save(tmp_path / "1.png")
        rgb.save(tmp_path / "2.jpg")
        PIL.Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "3.png")
        rgb.convert("CMYK").save(tmp_path / "4.tif")
        rgb.convert("P").save(tmp_path / "5.png")
        images = open_images(tmp_path)
        assert images.notes == [
            "`samples`: 1 of 6 images are grey, repeated to three channels",
            "`samples`: 1 of 6 images are JPEG files, whose compression changes the distances",
            "`samples`: 1 of 6 images are transparent, put on white",
        ]
        pixels = read_all(images)
        assert pixels.shape == (6, 16, 16, 3)
        np.testing.assert_array_equal(pixels[1], np.asarray(rgb.convert("L"))[..., None].repeat(3, -1))
        assert (pixels[3] == 255).all()
        # A reference may well be of photographs
        assert not any("JPEG" in note for note in open_images(tmp_path, "reference").notes)

    def test_images_are_turned_as_exif_says(self, tmp_path):
        image = PIL.Image.fromarray(make_images(1, 16)[0, :8])  # 16 wide, 8 high
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        for index, name in enumerate(("0.png", "1.jpg")):
            image.save(tmp_path / name, exif=exif)
            images = open_images([tmp_path / name])
            assert images.size == (16, 8)
            assert read_all(images).shape == (1, 16, 8, 3)
            if index == 0:
                np.testing.assert_array_equal(read_all(images)[0], np.rot90(np.asarray(image), -1))

    def test_errors(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="`samples` .*empty' holds no images"):
            open_images(tmp_path / "empty")
        sizes = save_images(tmp_path / "sizes", [*make_images(2), make_images(1, 8)[0, :4]])
        with pytest.raises(
            ValueError, match=r"has to hold images of one size, but has 2 sizes: 16 x 16 .* 8 x 4 .*002"
        ):
            open_images(sizes)
        broken = save_images(tmp_path / "broken", make_images(3, 64))
        whole = (broken / "001.png").read_bytes()
        (broken / "001.png").write_bytes(whole[:2000])
        with pytest.raises(ValueError, match=r"`samples`: the image .*001.png cannot be read: .*truncated"):
            read_all(open_images(broken))
        (broken / "001.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"`samples`: the image .*001.png cannot be read: cannot identify"):
            open_images(broken)
        floats = tmp_path / "floats"
        floats.mkdir()
        PIL.Image.fromarray(np.zeros((8, 8), np.float32)).save(floats / "x.tif")
        with pytest.raises(ValueError, match=r"x.tif cannot be read: floating-point pixels have no known range"):
            open_images(floats)
        (tmp_path / "x.txt").write_text("")
        with pytest.raises(
            ValueError, match="has to be an .npz, a folder of images or a data set .*, but is the file"
        ):
            open_images(tmp_path / "x.txt")
        (tmp_path / "x.parquet").write_bytes(b"no table")
        with pytest.raises(ValueError, match=r"`reference` .*x.parquet' cannot be read as a data set"):
            open_images(tmp_path / "x.parquet", "reference")
        with pytest.raises(ValueError, match=r"'absent/folder' is neither a file nor a folder and cannot be read"):
            open_images("absent/folder")


class Recorder:
    """An extractor whose features are the first pixels; remembers the batches that it was given."""

    name, widths = "recorder", {"pixels": 4, "sum": 1}

    def __init__(self):
        self.batches = []

    def __call__(self, images):
        self.batches.append(len(images))
        flat = images.reshape(len(images), -1).astype(np.float32)
        return {"pixels": flat[:, :4], "sum": flat.sum(axis=1, keepdims=True)}


class TestExtractFeatures:
    def test_extracts_once(self, tmp_path):
        pixels = make_images(10)
        images = open_images(save_npz(tmp_path / "x.npz", arr_0=pixels))
        extractor = Recorder()
        features = extract_features(images, extractor, tmp_path / "cache", batch_size=4)
        assert extractor.batches == [4, 4, 2]
        np.testing.assert_array_equal(features["pixels"], pixels.reshape(10, -1)[:, :4])
        np.testing.assert_array_equal(features["sum"][:, 0], pixels.reshape(10, -1).sum(axis=1))
        # The same content under another name
        (tmp_path / "x.npz").rename(tmp_path / "y.npz")
        again = extract_features(open_images(tmp_path / "y.npz"), extractor, tmp_path / "cache", batch_size=4)
        assert len(extractor.batches) == 3
        np.testing.assert_array_equal(again["pixels"], features["pixels"])
        # Other content
        extract_features(open_images(save_npz(tmp_path / "x.npz", arr_0=pixels[:4])), extractor, tmp_path / "cache")
        assert extractor.batches[3:] == [4]

    def test_nothing_is_kept_of_an_extraction_that_fails(self, tmp_path):
        images = open_images(save_npz(tmp_path / "x.npz", arr_0=make_images(10)))
        extractor = Recorder()
        extractor.__class__ = type("Failing", (Recorder,), {"__call__": lambda self, images: 1 / 0})
        with pytest.raises(ZeroDivisionError):
            extract_features(images, extractor, tmp_path / "cache")
        assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
        assert len(extract_features(images, Recorder(), tmp_path / "cache")["sum"]) == 10

    def test_what_a_killed_run_left_is_removed_and_what_another_run_writes_is_not(self, tmp_path):
        images = open_images(save_npz(tmp_path / "x.npz", arr_0=make_images(10)))
        folder = tmp_path / "cache" / Recorder().name / images.content_hash[:32]
        left, written = (Path(f"{folder}.{name}.partial") for name in ("0123", "4567"))
        for path in (left, written):
            path.mkdir(parents=True)
        with held_folder(written):
            extract_features(images, Recorder(), tmp_path / "cache")
        assert sorted(folder.parent.iterdir()) == [folder, written]
