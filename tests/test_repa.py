# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from image_folders import save_class_folders
from safetensors.torch import load_file
from tiny_models import make_batch, make_dinov2
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from diffusers_lsep import LinearProbe, LSEPObjective
from diffusers_lsep.data.images import center_crop, load_image_dataset, open_images
from diffusers_lsep.data.moments import MomentsDataset, OriginalMomentsDataset
from diffusers_lsep.regularizers import Regularizer, RegularizerContext, REPAEncoder, REPARegularizer
from diffusers_lsep.training.log import read_metrics


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A small random DINOv2 with its image processor's file, which normalises otherwise than ImageNet's usual."""
    folder = tmp_path_factory.mktemp("dinov2")
    make_dinov2(**SIZES).save_pretrained(folder)
    processing = {
        "image_processor_type": "BitImageProcessor",
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processing))
    return folder


# --- The encoder


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resolution", [28, 32])
def test_encoder_gives_normalised_patch_tokens(dinov2, channels, resolution):
    images = torch.rand(2, channels, resolution, resolution, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = REPAEncoder(dinov2, grid_size=4)(images)
    # written down plainly: values in [0, 1], normalised channel by channel, at the size of 4 x 4 patches
    pixels = (images.expand(-1, 3, -1, -1) / 2 + 0.5).clone()
    for channel, (mean, std) in enumerate([(0.5, 0.2), (0.4, 0.3), (0.3, 0.4)]):
        pixels[:, channel] = (pixels[:, channel] - mean) / std
    if resolution != 28:
        pixels = F.interpolate(pixels, size=(28, 28), mode="bicubic")
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2)(pixels).last_hidden_state[:, 1:]
    assert tokens.shape == (2, 16, 16)
    torch.testing.assert_close(tokens, expected)


def test_tokens_follow_the_rows_of_the_image(dinov2):
    """Token `row * grid + column` is the one that changes most where that patch changes."""
    encoder = REPAEncoder(dinov2, grid_size=4)
    image = torch.zeros(1, 3, 28, 28)
    changed = image.clone()
    changed[..., 7:14, 21:28] = 1.0  # row 1, column 3
    distance = (encoder(changed) - encoder(image)).norm(dim=-1)
    assert distance.argmax().item() == 1 * 4 + 3


def resampled(table, grid_size):
    """A position table on another grid as Pillow resamples each channel: bicubic with antialiasing."""
    side, width = round((table.shape[1] - 1) ** 0.5), table.shape[2]
    channels = table[0, 1:].T.reshape(width, side, side).numpy()
    size, bicubic = (grid_size, grid_size), PIL.Image.Resampling.BICUBIC
    grid = np.stack([np.asarray(PIL.Image.fromarray(channel).resize(size, bicubic)) for channel in channels])
    return torch.cat([table[:, :1], torch.from_numpy(grid).reshape(width, -1).T[None]], dim=1)


@pytest.mark.parametrize("grid_size", [3, 6])
@pytest.mark.parametrize(
    "config_class, model_class",
    [(Dinov2Config, Dinov2Model), (Dinov2WithRegistersConfig, Dinov2WithRegistersModel), (ViTConfig, ViTModel)],
)
def test_position_tables_are_resampled_as_in_repa(tmp_path, config_class, model_class, grid_size):
    """From 4 x 4 patches to fewer and more; class token and registers are left out of the result."""
    model = model_class(config_class(**SIZES)).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(tmp_path)
    encoder, side = REPAEncoder(tmp_path, grid_size=grid_size), 7 * grid_size
    assert (encoder.resolution, encoder.size) == (side, 16)
    images = torch.rand(2, 3, side, side) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    options = {"interpolate_pos_encoding": True} if model_class is ViTModel else {}

    def every(model):
        with torch.no_grad():
            return model(((images + 1) / 2 - mean) / std, **options).last_hidden_state

    own = every(model)  # by the filter of `transformers`
    table = resampled(model.embeddings.position_embeddings.detach(), grid_size)
    model.embeddings.position_embeddings = nn.Parameter(table)
    expected = every(model)
    assert expected.shape[1] - grid_size**2 == (5 if "Registers" in model_class.__name__ else 1)
    torch.testing.assert_close(encoder(images), expected[:, -(grid_size**2) :], rtol=1e-4, atol=1e-4)
    if model_class is Dinov2Model:
        assert not torch.allclose(own, expected, rtol=1e-2, atol=1e-2)


def test_a_position_table_that_fits_is_left_as_it_is(dinov2):
    table = load_file(dinov2 / "model.safetensors")["embeddings.position_embeddings"]
    assert torch.equal(REPAEncoder(dinov2, grid_size=4).model.embeddings.position_embeddings, table)


def test_encoder_is_frozen_and_in_evaluation_mode(dinov2):
    encoder = REPAEncoder(dinov2, grid_size=4)
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder(torch.zeros(1, 3, 28, 28).requires_grad_()).requires_grad
    assert encoder.to("cpu") is encoder


def test_encoders_that_do_not_fit_are_refused(tmp_path):
    refused = {
        "bert": BertModel(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=20)),
        "resnet": ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])),
        "swin": SwinModel(SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2, image_size=16)),
    }
    for name, model in refused.items():
        model.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"`repa_encoder` .*/bert' \(bert\) has to be a vision transformer"):
        REPAEncoder(tmp_path / "bert", 4)
    with pytest.raises(ValueError, match=r"`repa_encoder` .*/resnet' \(resnet\) has to be a vision transformer"):
        REPAEncoder(tmp_path / "resnet", 4)
    with pytest.raises(ValueError, match=r"\(swin\) has to give 16 patch tokens for images of 16 x 16, but gives 4"):
        REPAEncoder(tmp_path / "swin", 4)
    with pytest.raises(ValueError, match="`repa_encoder` 'no/such' cannot be loaded"):
        REPAEncoder("no/such", 4)
    # Nobody is asked whether to run a model's own code.
    (tmp_path / "own").mkdir()
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "own.py").write_text("raise SystemExit('it was run')\n")
    with pytest.raises(ValueError, match="`repa_encoder` .*own' cannot be loaded: .*contains custom code"):
        REPAEncoder(tmp_path / "own", 4)


# --- The regularizer


def test_projector_and_loss():
    torch.manual_seed(0)
    regularizer = REPARegularizer(hidden_size=8, target_size=6)
    assert (regularizer.depth, regularizer.weight) == (8, 0.5)
    linears = [module for module in regularizer.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [(8, 2048), (2048, 2048), (2048, 6)]
    assert sum(isinstance(module, nn.SiLU) for module in regularizer.modules()) == 2
    for layer in linears:
        assert layer.weight.abs().max() <= (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert not layer.bias.any()

    tokens, target = torch.randn(3, 4, 8), torch.randn(3, 4, 6)
    hidden = tokens
    for layer in linears[:2]:
        hidden = hidden @ layer.weight.T + layer.bias
        hidden = hidden / (1 + torch.exp(-hidden))
    projected = hidden @ linears[2].weight.T + linears[2].bias
    expected = torch.zeros(3)
    for i in range(3):
        for n in range(4):
            a, b = projected[i, n], target[i, n]
            expected[i] -= (a @ b) / (a.norm() * b.norm()) / 4

    def loss(target):
        return regularizer(RegularizerContext({8: tokens}, target=target))

    torch.testing.assert_close(loss(target), expected)
    with torch.no_grad():
        same = projected.detach() * torch.rand(3, 4, 1)
    torch.testing.assert_close(loss(same), -torch.ones(3))
    torch.testing.assert_close(loss(-same), torch.ones(3))
    with pytest.raises(ValueError, match="`weight` has to be a number not below 0, but is -0.5"):
        REPARegularizer(8, 6, weight=-0.5)


# --- Beside LSEP: any regularizer


class TokenSize(Regularizer):
    """A third regularizer, which exists nowhere but here: the mean square of the tokens, scaled by the target."""

    reads = ("target",)

    def __init__(self, depth, weight):
        super().__init__(weight)
        self.depth = depth
        self.depths = (depth,)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, context):
        return self.scale * context.target * context.tokens[self.depth].square().flatten(1).mean(dim=1)


def make_objective(tiny_transformer, with_probe=True, repa_depth=2, size_depth=3, probe_depth=2):
    torch.manual_seed(0)
    return LSEPObjective(
        tiny_transformer(num_layers=4),
        LinearProbe(32, 10) if with_probe else None,
        probe_depth=probe_depth,
        regularizers={
            "repa": REPARegularizer(32, 6, depth=repa_depth, projector_size=16),
            "size": TokenSize(size_depth, 0.01),
        },
    )


def make_repa_batch(seed=0, batch_size=5):
    generator = torch.Generator().manual_seed(seed + 100)
    return {
        **make_batch(seed, batch_size),
        "targets": {
            "repa": torch.randn(batch_size, 16, 6, generator=generator),
            "size": torch.rand(batch_size, generator=generator),
        },
    }


@pytest.mark.parametrize("with_probe", [True, False])
@pytest.mark.parametrize("depths", [(1, 2, 2), (2, 2, 2), (4, 1, 3), (3, 4, 4)])
def test_regularizers_read_the_main_stream_in_the_one_pass(tiny_transformer, with_probe, depths):
    objective = make_objective(tiny_transformer, with_probe, *depths)
    objective.share_streams = False
    batch = make_repa_batch()
    calls = []
    for block in objective.transformer.transformer_blocks:
        block.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    output = objective(**batch)
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in objective.named_parameters()}
    assert calls == [10 if with_probe and index < depths[2] else 5 for index in range(4)]

    # written down plainly: everything in passes of its own
    objective.zero_grad()
    transformer, t = objective.transformer, batch["timesteps"]
    noisy = (1 - t.view(-1, 1, 1, 1)) * batch["latents"] + t.view(-1, 1, 1, 1) * batch["noise"]
    labels = batch["class_labels"].masked_fill(batch["class_dropout_mask"], 10)
    losses = {}
    for (name, regularizer), depth in zip(objective.regularizers.items(), depths):
        tokens = transformer.hidden_states_at(noisy, t, labels, depth)
        context = RegularizerContext({depth: tokens}, target=batch["targets"][name])
        losses[name] = regularizer.weight * regularizer(context).mean()
        torch.testing.assert_close(output.regularizer_losses[name], losses[name].detach())
    plain = LSEPObjective(transformer, objective.probe, probe_depth=depths[2])
    rest = plain(**{name: value for name, value in batch.items() if name != "targets"})
    loss = rest.loss + losses["repa"] + losses["size"]
    loss.backward()
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(output.denoising_loss, rest.denoising_loss)
    torch.testing.assert_close(output.probe_loss, rest.probe_loss)
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_objective_with_regularizers_compiles_to_one_graph(tiny_transformer):
    objective, batch = make_objective(tiny_transformer), make_repa_batch()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    output = compiled(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.loss, objective(**batch).loss, rtol=1e-5, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(**make_repa_batch(seed=1))


def test_only_the_projector_is_saved_with_the_objective(tiny_transformer):
    names = make_objective(tiny_transformer).state_dict().keys()
    assert {name.split(".")[0] for name in names} == {"transformer", "probe", "regularizers"}
    repa = [name for name in names if name.startswith("regularizers.repa.")]
    assert len(repa) == 6 and all(".projector." in name for name in repa)


def test_losses_of_regularizers_stay_in_float32_under_autocast(tiny_transformer):
    objective, batch = make_objective(tiny_transformer), make_repa_batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = objective(**batch)
    assert output.loss.dtype == output.regularizer_losses["repa"].dtype == torch.float32
    torch.testing.assert_close(output.loss, objective(**batch).loss, rtol=0.02, atol=0.02)


def test_regularizers_and_targets_have_to_fit(tiny_transformer):
    with pytest.raises(ValueError, match=r"`depth` of the regularizer `repa` has to lie in 1\.\.4, .* but is 5"):
        make_objective(tiny_transformer, repa_depth=5)
    with pytest.raises(ValueError, match=r"`depth` of the regularizer `size` has to lie in 1\.\.4, .* but is 0"):
        make_objective(tiny_transformer, with_probe=False, size_depth=0)
    batch = make_repa_batch()
    objective = make_objective(tiny_transformer)
    with pytest.raises(ValueError, match=r"`targets` has to be given for \['repa', 'size'\], but is for \['repa'\]"):
        objective(**{**batch, "targets": {"repa": batch["targets"]["repa"]}})
    with pytest.raises(ValueError, match=r"`targets` has to be given for \[\], but is for \['repa', 'size'\]"):
        LSEPObjective(tiny_transformer(), None)(**batch)


# --- In training


REPA = ["--repa_depth", "1", "--repa_weight", "0.25"]


@pytest.fixture(scope="module")
def own_images(tmp_path_factory):
    """Ten colour images of two classes, neither square nor of one size."""
    return save_class_folders(tmp_path_factory.mktemp("images"), ["ant", "bee"], [(20 + i, 30) for i in range(10)])


@pytest.fixture(scope="module")
def latents(load_example, own_images, tiny_vae_folder, tmp_path_factory):
    """The same images as moments, with and without the images."""
    folder = tmp_path_factory.mktemp("latents")
    for name, flags in {"with": ["--keep_images"], "without": []}.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        load_example("encode_latents").main(
            [
                *("--train_data_dir", str(own_images), "--output_dir", str(folder / name), "--resolution", "16"),
                *("--pretrained_vae_model_name_or_path", str(tiny_vae_folder), "--dtype", "fp32", "--flip"),
                *("--dataloader_num_workers", "0", *flags),
            ]
        )
    return folder


@pytest.fixture(scope="module")
def original_layout(own_images, latents, tmp_path_factory):
    """The layout of EDM2 and REPA: `images/` beside `vae-sd/`."""
    folder = tmp_path_factory.mktemp("original")
    moments = MomentsDataset(latents / "with")
    labels = []
    paths = sorted(own_images.rglob("*.png"), key=lambda path: (path.parent.name, path.stem))
    for row, path in enumerate(paths):
        (folder / "images" / "00000").mkdir(parents=True, exist_ok=True)
        (folder / "vae-sd" / "00000").mkdir(parents=True, exist_ok=True)
        with PIL.Image.open(path) as image:
            center_crop(image, 16).save(folder / "images" / "00000" / f"img{row:08d}.png")
        np.save(folder / "vae-sd" / "00000" / f"img-mean-std-{row:08d}.npy", moments.load([row])[0].numpy())
        labels.append([f"00000/img-mean-std-{row:08d}.npy", int(moments.labels[row])])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def test_images_of_latents_are_those_of_the_rows(own_images, latents, original_layout):
    splits = load_image_dataset(train_data_dir=own_images)
    images, _, _ = open_images(splits, 16, 3)
    rows, flips = np.array([7, 0, 3, 9]), np.array([True, False, False, True])
    kept = MomentsDataset(latents / "with")
    original = OriginalMomentsDataset(original_layout / "vae-sd")
    for source in (kept.open_images(16), original.open_images(16)):
        np.testing.assert_array_equal(source.labels, images.labels)
        torch.testing.assert_close(source.load(rows, flips), images.load(rows, flips), rtol=0, atol=0)


@pytest.mark.slow
def test_training_with_repa(train, dinov2, tmp_path):
    """Grey pixels: the digits. Everything is reported and saved but the encoder."""
    run = tmp_path / "run"
    assert train("--repa_encoder", dinov2, *REPA, "--validation_steps", 4) == 0
    lines = read_metrics(run / "metrics.jsonl")
    for line in lines[:4]:
        assert line["loss"] == pytest.approx(line["denoising_loss"] + line["probe_loss"] + line["repa_loss"], rel=1e-5)
        assert -0.25 <= line["repa_loss"] <= 0.25
    assert -0.25 <= lines[-1]["validation_repa_loss"] <= 0.25
    weights = load_file(run / "checkpoint-4" / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"transformer", "probe", "regularizers"}
    projector = {f"regularizers.repa.projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert {name for name in weights if name.startswith("regularizers")} == projector
    assert load_file(run / "checkpoint-4" / "average.safetensors").keys() == projector
    pipeline = DiffusionPipeline.from_pretrained(run)
    assert {name.split(".")[0] for name in pipeline.transformer.state_dict()} == {
        *("class_embedding", "norm_out", "pos_embed", "proj_out", "time_embedding", "transformer_blocks"),
    }
    assert {path.name for path in run.iterdir() if path.is_dir()} >= {"transformer", "scheduler", "probe"}
    card = (run / "README.md").read_text()
    assert "Trained with LSEP" in card and f"with those of an external encoder, `{dinov2.name}`" in card
    assert "no external encoder" not in card and str(dinov2) not in card


@pytest.mark.slow
def test_a_run_with_repa_continues_bit_for_bit(train, dinov2, tmp_path):
    flags = ["--repa_encoder", dinov2, *REPA, "--ema_decay", 0.9]
    train(*flags, output_dir=tmp_path / "whole")
    train(*flags, "--max_train_steps", 2, output_dir=tmp_path / "parts")
    train(*flags, "--resume_from_checkpoint", "latest", output_dir=tmp_path / "parts")
    for name in ("model", "optimizer", "average"):
        whole, parts = (
            load_file(tmp_path / run / "checkpoint-4" / f"{name}.safetensors") for run in ("whole", "parts")
        )
        assert whole.keys() == parts.keys() and len(whole) >= 6
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    with pytest.raises(ValueError, match="cannot continue a run with another method.*repa_weight: 0.25 -> 0.5"):
        train(*flags, "--repa_weight", 0.5, "--resume_from_checkpoint", "latest", output_dir=tmp_path / "parts")


@pytest.mark.slow
def test_repa_alone(train, dinov2, tmp_path):
    train("--repa_encoder", dinov2, *REPA, "--no_lsep")
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert line["loss"] == pytest.approx(line["denoising_loss"] + line["repa_loss"], rel=1e-5)
    assert "probe_loss" not in line
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Trained with REPA" in card and f"with those of an external encoder, `{dinov2.name}`" in card
    assert "checkpoint" not in card.partition("## Usage")[0] and "Trained with LSEP" not in card


@pytest.mark.slow
def test_every_source_of_pixels_gives_the_same_loss(train, dinov2, own_images, latents, original_layout, tmp_path):
    vae = MomentsDataset(latents / "with").metadata["vae"]
    sources = {
        "images": ["--train_data_dir", own_images, "--resolution", 16, "--random_flip"],
        "kept": ["--latents_dir", latents / "with", "--random_flip"],
        "original": ["--latents_dir", original_layout / "vae-sd"],
        "unmirrored": ["--train_data_dir", own_images, "--resolution", 16],
    }
    losses = {}
    for name, flags in sources.items():
        flags += ["--pretrained_vae_model_name_or_path", vae, "--repa_encoder", dinov2, *REPA]
        train(*flags, "--validation_split", 0.2, "--validation_steps", 4, output_dir=tmp_path / name)
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        losses[name] = [line["repa_loss"] for line in lines[:4]] + [lines[-1]["validation_repa_loss"]]
    assert losses["kept"] == pytest.approx(losses["images"], rel=1e-4)
    assert losses["original"] == pytest.approx(losses["unmirrored"], rel=1e-4)
    assert losses["images"] != pytest.approx(losses["unmirrored"], rel=1e-4)


def test_repa_needs_pixels(train, dinov2, latents, original_layout, tiny_vae_folder, tmp_path):
    def refused(folder, message):
        flags = ["--latents_dir", folder, "--pretrained_vae_model_name_or_path", tiny_vae_folder]
        with pytest.raises(ValueError, match=f"`--repa_encoder` needs pixels beside the latents, but {message}"):
            train(*flags, "--repa_encoder", dinov2, *REPA)
        assert not (tmp_path / "run").exists()

    refused(latents / "without", ".* holds no images: it was encoded without `--keep_images`")
    shutil.copytree(original_layout / "vae-sd", tmp_path / "data" / "vae-sd")
    refused(tmp_path / "data" / "vae-sd", ".* has no folder of images beside it")
    shutil.copytree(original_layout / "images", tmp_path / "data" / "images")
    shutil.copy(tmp_path / "data/images/00000/img00000001.png", tmp_path / "data/images/img00000001.png")
    refused(tmp_path / "data" / "vae-sd", ".* has several images of one number")
    (tmp_path / "data/images/img00000001.png").unlink()
    (tmp_path / "data/images/00000/img00000001.png").unlink()
    refused(tmp_path / "data" / "vae-sd", ".*/images lacks the images of 1")


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "depth"), [("SiT-XL/2", 8), ("SiT-L/4", 8), ("SiT-B/2", 4), ("SiT-S/2", 4)])
def test_depth_of_repa_follows_the_size(train, dinov2, own_images, capsys, preset, depth):
    flags = ["--dry_run", "--train_data_dir", own_images, "--preset", preset, "--repa_encoder", dinov2]
    assert train(*flags, "--resolution", 32, "--probe_depth", 2, tiny=()) == 0
    settings = json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]
    assert (settings["repa_depth"], settings["repa_weight"], settings["probe_depth"]) == (depth, 0.5, 2)


def test_wrong_encoders_and_depths_stop_the_run_before_it_writes(train, dinov2, tmp_path):
    with pytest.raises(ValueError, match="`repa_encoder` 'no/encoder' cannot be loaded"):
        train("--repa_encoder", "no/encoder")
    with pytest.raises(ValueError, match=r"`depth` of the regularizer `repa` has to lie in 1..2, .* but is 3"):
        train("--repa_encoder", dinov2, "--repa_depth", 3)
    assert list(tmp_path.iterdir()) == []
