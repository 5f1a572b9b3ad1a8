# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Every class of autoencoder that diffusers has for images: encoding, training, sampling, decoding."""

import json
import logging

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, DiffusionPipeline
from image_folders import save_class_folders
from tiny_models import AUTOENCODERS, make_autoencoder, make_pipeline
from tiny_run import TINY_RUN

from diffusers_lsep import LSEPPipeline
from diffusers_lsep.autoencoders import (
    denormalize_latents,
    encode_moments,
    get_image_channels,
    get_latent_channels,
    get_normalization,
    get_scale_factor,
    normalize_latents,
)
from diffusers_lsep.data.moments import MomentsDataset, sample_posterior
from diffusers_lsep.evaluation.linear_probing import HiddenStates
from diffusers_lsep.hub.model_card import write_model_card
from diffusers_lsep.training.log import read_metrics


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory):
    return save_class_folders(tmp_path_factory.mktemp("images"), ["ant", "bee"], [(20 + i, 30) for i in range(6)])


@pytest.fixture
def save(tmp_path):
    def save(name, folder="vae", **config):
        make_autoencoder(name, **config).save_pretrained(tmp_path / folder)
        return str(tmp_path / folder)

    return save


def pipeline_with(vae, **config):
    channels, factor = get_latent_channels(vae), get_scale_factor(vae)
    return make_pipeline(vae=vae, in_channels=channels, sample_size=16 // factor, **config)


def column(values):
    return torch.tensor(values).view(1, -1, 1, 1)


def to_model(name, vae, latents):
    """Latents as the pipelines of diffusers hand them to their models, each in its own way."""
    config = vae.config
    if name == "Flux2":
        batch, channels, height, width = latents.shape
        latents = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        latents = latents.reshape(batch, 4 * channels, height // 2, width // 2)
        mean, variance = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
        return (latents - mean) / torch.sqrt(variance + config.batch_norm_eps)
    if name in ("QwenImage", "Wan"):
        return (latents - column(config.latents_mean)) / column(config.latents_std)
    if name == "KL-statistics":  # as Stable Diffusion XL
        return (latents - column(config.latents_mean)) * config.scaling_factor / column(config.latents_std)
    if name == "KL-shift":
        return (latents - config.shift_factor) * config.scaling_factor
    return latents * config.get("scaling_factor", 1.0)


def encode(vae, images):
    """Means and deviations, by the autoencoder itself."""
    video = "Qwen" in type(vae).__name__ or "Wan" in type(vae).__name__
    with torch.no_grad():
        encoded = vae.encode(images[:, :, None] if video else images)
    if hasattr(encoded, "latent_dist"):
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    else:
        mean = encoded["latent"] if "latent" in encoded else encoded["latents"]
        std = torch.zeros_like(mean)
    return (mean[:, :, 0], std[:, :, 0]) if video else (mean, std)


def decode(vae, latents):
    video = "Qwen" in type(vae).__name__ or "Wan" in type(vae).__name__
    with torch.no_grad():
        images = vae.decode(latents[:, :, None] if video else latents).sample
    return images[:, :, 0] if video else images


def draw_images(seed=0, count=2):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", AUTOENCODERS)
class TestEveryClass:
    def test_latents_are_those_of_its_own_pipeline(self, name):
        vae, images = make_autoencoder(name), draw_images()
        mean, std = encode(vae, images)
        moments = encode_moments(vae, images)
        channels, factor = get_latent_channels(vae), get_scale_factor(vae)
        assert (channels, factor) == ((8, 4) if name == "Flux2" else (4, 2)) and get_image_channels(vae) == 3
        assert moments.shape == (2, 2 * channels, 16 // factor, 16 // factor)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        noise_of_patches = torch.nn.functional.pixel_unshuffle(noise, 2) if name == "Flux2" else noise
        latents = sample_posterior(moments, noise_of_patches, **get_normalization(vae))
        torch.testing.assert_close(latents, to_model(name, vae, mean + std * noise), rtol=1e-5, atol=1e-6)
        assert (std.max() == 0) == (name in ("Tiny", "DC"))

    def test_it_may_be_compiled(self, name):
        vae = make_autoencoder(name)
        pipe = pipeline_with(vae)
        pipe.vae = torch.compile(vae, backend="eager")
        images = [
            LSEPPipeline(**part)(3, num_inference_steps=2, output_type="pt", generator=torch.manual_seed(0)).images
            for part in (pipe.components, {**pipe.components, "vae": vae})
        ]
        torch.testing.assert_close(*images)

    def test_the_way_back(self, name):
        vae, normalization = make_autoencoder(name), get_normalization(make_autoencoder(name))
        latents = torch.randn(2, get_latent_channels(vae), 4, 4, generator=torch.Generator().manual_seed(0))
        there_and_back = denormalize_latents(normalize_latents(latents, **normalization), **normalization)
        torch.testing.assert_close(there_and_back, latents, rtol=1e-5, atol=1e-6)
        assert json.loads(json.dumps(normalization)) == normalization, "stored with the moments as they are"

    def test_the_pipeline_decodes_what_it_encodes(self, name):
        vae = make_autoencoder(name)
        pipe = pipeline_with(vae)
        assert pipe.vae_scale_factor == get_scale_factor(vae)
        mean, _ = encode(vae, draw_images())
        with torch.no_grad():
            images = pipe.decode_latents(to_model(name, vae, mean))
        assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32
        torch.testing.assert_close(images, decode(vae, mean), rtol=1e-4, atol=1e-5)
        sample = pipe([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
        assert [image.size for image in sample] == [(16, 16)] * 2

    def test_a_saved_pipeline_brings_it_along(self, name, tmp_path, caplog):
        vae = make_autoencoder(name)
        pipe = pipeline_with(vae)
        pipe.save_pretrained(tmp_path / "pipeline")
        write_model_card(tmp_path / "pipeline")
        with caplog.at_level(logging.WARNING):
            for pipeline_class in (LSEPPipeline, DiffusionPipeline):
                assert pipeline_class.from_pretrained(tmp_path / "pipeline", vae=vae).vae is vae
                assert pipeline_class.from_pretrained(tmp_path / "pipeline", vae=None).vae is None
            again = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
        assert "Expected types" not in caplog.text
        assert type(again) is LSEPPipeline and type(again.vae) is type(vae)
        images = [
            part(3, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
            for part in (pipe, again)
        ]
        torch.testing.assert_close(*images, rtol=1e-4, atol=1e-5)
        (row,) = [
            line
            for line in (tmp_path / "pipeline" / "README.md").read_text().splitlines()
            if line.startswith("| Autoencoder |")
        ]
        formula = {
            "KL": "`x * 0.5`",
            "KL-shift": "`(x - 0.06) * 1.5`",
            "KL-statistics": "`(x - mean) * 0.5 / std`, per channel",
            "Tiny": "`x`",
            "DC": "`x * 0.41`",
            "Flux2": "`(x - mean) / std`, with the running statistics of its batch norm over patches of 2 × 2 latents",
            "HunyuanImage": "`x * 0.76`",
            "KVAE": "`x`",
            "QwenImage": "`(x - mean) / std`, per channel",
            "Wan": "`(x - mean) / std`, per channel",
            "Asymmetric": "`x * 0.18215`",
        }[name]
        size = "8 channels, 4 times smaller" if name == "Flux2" else "4 channels, 2 times smaller"
        assert f"`{AUTOENCODERS[name][0]}`, {size}" in row and row.endswith(f"normalised as {formula} |")
        assert "| Images | 16 × 16 pixels" in (tmp_path / "pipeline" / "README.md").read_text()

    def test_probing_sees_the_same_latents(self, name, tmp_path):
        vae, images = make_autoencoder(name), draw_images()

        class Source:
            kind, labels = "images", np.zeros(2, dtype=np.int64)

            def load(self, rows, flips):
                return images[rows]

        latents = HiddenStates(pipeline_with(vae), [1], tmp_path).encode("training", Source())
        np.testing.assert_allclose(latents, to_model(name, vae, encode(vae, images)[0]), rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_from_images_to_images(self, name, train, load_example, images_dir, save, tmp_path):
        """Encoded, trained on, and drawn from: latents in files are the same run as images."""
        vae_dir = save(name)
        flags = ["--num_layers", 1, "--num_attention_heads", 2, "--attention_head_dim", 4, "--patch_size", 1]
        flags += ["--probe_depth", 1, "--pretrained_vae_model_name_or_path", vae_dir, "--validation_split", 0.2]
        flags += ["--validation_steps", 4]
        script = load_example("encode_latents")
        arguments = ["--train_data_dir", images_dir, "--output_dir", tmp_path / "moments", "--resolution", 16]
        arguments += ["--pretrained_vae_model_name_or_path", vae_dir, "--dtype", "fp32", "--batch_size", 3]
        script.main([str(word) for word in [*arguments, "--dataloader_num_workers", 0]])
        moments, vae = MomentsDataset(tmp_path / "moments"), make_autoencoder(name)
        names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
        assert {key: getattr(moments, key) for key in names} == get_normalization(vae)
        assert moments.moments_shape == ((16, 4, 4) if name == "Flux2" else (8, 8, 8))

        images = ("--train_data_dir", images_dir, "--resolution", 16)
        assert train(*images, *flags, tiny=TINY_RUN, output_dir=tmp_path / "images") == 0
        latents = ("--latents_dir", tmp_path / "moments")
        assert train(*latents, *flags, tiny=TINY_RUN, output_dir=tmp_path / "latents") == 0
        losses = [
            [line.get("loss") or line["validation_denoising_loss"] for line in read_metrics(run / "metrics.jsonl")]
            for run in (tmp_path / "images", tmp_path / "latents")
        ]
        assert len(losses[0]) == 5 and losses[1] == pytest.approx(losses[0], rel=1e-3)
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "latents")
        assert type(pipe.vae) is type(vae) and get_normalization(pipe.vae) == get_normalization(vae)
        assert pipe("bee", num_inference_steps=2).images[0].size == (16, 16)


# --- What the statistics do


def test_other_statistics_are_other_images():
    def draw(**config):
        pipe = pipeline_with(make_autoencoder("KL", **config))
        return pipe(1, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images

    ones, zeros = [1.0] * 4, [0.0] * 4
    plain = draw()
    assert torch.equal(draw(latents_mean=zeros, latents_std=ones), plain)
    mean, std = draw(latents_mean=[0.5] * 4), draw(latents_std=[2.0] * 4)
    assert (mean - plain).abs().max() > 1e-3 and (std - plain).abs().max() > 1e-3
    # A number for every channel is what the one number for all of them is.
    torch.testing.assert_close(mean, draw(shift_factor=0.5))
    torch.testing.assert_close(std, draw(scaling_factor=0.25))
    # As in the pipelines of diffusers, the mean takes the place of the shift.
    assert torch.equal(draw(latents_mean=[0.5] * 4, shift_factor=7.0), mean)


@pytest.mark.slow
def test_training_sees_the_statistics(train, images_dir, save, tmp_path):
    flags = ["--train_data_dir", images_dir, "--resolution", 16, "--max_train_steps", 1]

    def losses(folder, **config):
        vae = ("--pretrained_vae_model_name_or_path", save("KL", folder, **config))
        train(*flags, *vae, output_dir=tmp_path / f"run-{folder}")
        return [line["loss"] for line in read_metrics(tmp_path / f"run-{folder}" / "metrics.jsonl") if "loss" in line]

    plain = losses("plain")
    assert losses("ones", latents_mean=[0.0] * 4, latents_std=[1.0] * 4) == plain
    assert losses("shift", shift_factor=0.5) == losses("mean", latents_mean=[0.5] * 4) != plain
    assert losses("std", latents_std=[0.25] * 4) == losses("scale", scaling_factor=2.0) != plain

    # A run goes on with what it began with.
    other = save("KL", "other", latents_mean=[0.25] * 4)
    with pytest.raises(ValueError, match="another method or other data: vae_normalization: "):
        resume = ("--resume_from_checkpoint", "latest", "--pretrained_vae_model_name_or_path", other)
        train(*flags, *resume, output_dir=tmp_path / "run-mean")


@pytest.mark.slow
def test_latents_of_other_statistics_are_refused(train, load_example, images_dir, save, tmp_path):
    flag = "--pretrained_vae_model_name_or_path"
    arguments = ["--train_data_dir", images_dir, "--output_dir", tmp_path / "moments", "--resolution", 16]
    arguments += ["--dataloader_num_workers", 0, flag, save("KL-statistics")]
    script = load_example("encode_latents")
    script.main([str(word) for word in arguments])
    latents = ("--latents_dir", tmp_path / "moments", "--dry_run")
    assert train(*latents) == 0
    other = save("KL-statistics", "other", latents_std=[1.0] * 4)
    message = r"encoded by the VAE .* \(deviation of the latents \[.*\), but .* is another one \(\[1.0, 1.0"
    with pytest.raises(ValueError, match=message):
        train(*latents, flag, other)

    # A folder of a version that did not know them has the same moments, opens, and is completed.
    before = MomentsDataset(tmp_path / "moments").load(range(6))
    metadata = json.loads((tmp_path / "moments" / "metadata.json").read_text())
    older = {key: value for key, value in metadata.items() if not key.startswith("latents_")}
    (tmp_path / "moments" / "metadata.json").write_text(json.dumps(older))
    assert torch.equal(MomentsDataset(tmp_path / "moments").load(range(6)), before)
    assert MomentsDataset(tmp_path / "moments").latents_mean is None
    assert train(*latents) == 0
    script.main([str(word) for word in arguments])
    assert json.loads((tmp_path / "moments" / "metadata.json").read_text()) == metadata


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_another_encoder_is_told_from_another_decoder(name, tmp_path):
    from diffusers_lsep.data.moments import describe_vae

    def describe(part):
        vae = make_autoencoder(name)
        with torch.no_grad():
            next(getattr(vae, part).parameters()).add_(0.1)
        return describe_vae(vae)["vae_encoder_sha256"]

    same = describe_vae(make_autoencoder(name))["vae_encoder_sha256"]
    assert describe("decoder") == same != describe("encoder")


# --- What is refused


def test_channels_that_do_not_fit_are_refused_when_the_pipeline_is_made(train, images_dir, save, tmp_path):
    pipe = pipeline_with(make_autoencoder("KL"))
    message = r"`vae` has 8 latent channels \(AutoencoderKL\), but `transformer` has `in_channels=4`"
    vae = make_autoencoder("KL", latent_channels=8)
    with pytest.raises(ValueError, match=message):
        LSEPPipeline(pipe.transformer, pipe.scheduler, vae=vae)
    with pytest.raises(ValueError, match="`vae` has to be an autoencoder of diffusers, but is of the class str"):
        LSEPPipeline(pipe.transformer, pipe.scheduler, vae="stabilityai/sd-vae-ft-mse")
    pipe.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=message):
        LSEPPipeline.from_pretrained(tmp_path / "pipeline", vae=vae)
    # One that is put in later: before the loop
    pipe.vae, pipe.transformer.forward = vae, None
    with pytest.raises(ValueError, match=message):
        pipe(1, num_inference_steps=1)
    flags = ("--train_data_dir", images_dir, "--resolution", 16)
    flags += ("--pretrained_vae_model_name_or_path", save("KL", latent_channels=8))
    with pytest.raises(ValueError, match="`in_channels` is 4, but the VAE needs 8"):
        train(*flags, "--pretrained_model_name_or_path", tmp_path / "pipeline", tiny=TINY_RUN)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"latents_mean": [0.0] * 3},
            "`vae` has to have one value of `latents_mean` for each of its 4 channels, .* 3",
        ),
        ({"latents_std": [1.0] * 5}, "`vae` has to have one value of `latents_std` for each of its 4 channels, .* 5"),
        ({"in_channels": 5}, "`vae` has to be for grey or RGB images, but AutoencoderKL is for 5 channels"),
        (
            {"latent_channels": None},
            "`vae` has to have one of `latent_channels`, .* but AutoencoderKL has",
        ),
        (
            {"block_out_channels": None},
            "`vae` has to have one of `encoder_block_out_ch.*, but AutoencoderKL has",
        ),
    ],
)
def test_configs_that_say_something_else(change, message):
    vae, pipe = make_autoencoder("KL"), pipeline_with(make_autoencoder("KL"))
    vae.register_to_config(**change)
    with pytest.raises(ValueError, match=message):
        LSEPPipeline(pipe.transformer, pipe.scheduler, vae=vae)


def test_classes_that_cannot_be_used():
    pipe = pipeline_with(make_autoencoder("KL"))
    vae = AutoencoderKLTemporalDecoder(block_out_channels=(32,))
    with pytest.raises(ValueError, match="`vae` cannot be of the class AutoencoderKLTemporalDecoder: .* for videos"):
        LSEPPipeline(pipe.transformer, pipe.scheduler, vae=vae)


@pytest.mark.slow
def test_latents_of_other_channels_than_the_vae(train, save, tmp_path):
    folder = tmp_path / "vae-sd"
    folder.mkdir()
    for row in range(4):
        np.save(folder / f"img-mean-std-{row:08d}.npy", np.ones((16, 8, 8), np.float32))
    labels = [[f"img-mean-std-{row:08d}.npy", row % 2] for row in range(4)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(ValueError, match="`--latents_dir` has 8 latent channels, but `--pretrained_vae_.*` has 4"):
        train("--latents_dir", folder, "--pretrained_vae_model_name_or_path", save("KL"))
    assert train("--latents_dir", folder, "--pretrained_vae_model_name_or_path", save("KL", latent_channels=8)) == 0
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "run").vae, AutoencoderKL)
