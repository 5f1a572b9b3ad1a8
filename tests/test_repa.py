# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
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
from diffusers_lsep.repa import REPAEncoder, REPARegularizer


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A small random DINOv2 with its image processor's file, which normalises otherwise than ImageNet's usual."""
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SIZES)).save_pretrained(folder)
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


@pytest.mark.parametrize(
    "config_class, model_class", [(Dinov2WithRegistersConfig, Dinov2WithRegistersModel), (ViTConfig, ViTModel)]
)
def test_other_vision_transformers(tmp_path, config_class, model_class):
    """Registers are left out, and a position table for 4 x 4 patches is adapted to 6 x 6."""
    model = model_class(config_class(**SIZES)).eval()
    model.save_pretrained(tmp_path)
    encoder = REPAEncoder(tmp_path, grid_size=6)
    assert (encoder.resolution, encoder.size) == (42, 16)
    images = torch.rand(2, 3, 42, 42) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    options = {"interpolate_pos_encoding": True} if model_class is ViTModel else {}
    with torch.no_grad():
        every = model(((images + 1) / 2 - mean) / std, **options).last_hidden_state
    assert every.shape[1] == 36 + (1 if model_class is ViTModel else 5)
    torch.testing.assert_close(encoder(images), every[:, -36:])


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
    torch.testing.assert_close(regularizer(tokens, target), expected)
    with torch.no_grad():
        same = projected.detach() * torch.rand(3, 4, 1)
    torch.testing.assert_close(regularizer(tokens, same), -torch.ones(3))
    torch.testing.assert_close(regularizer(tokens, -same), torch.ones(3))
    with pytest.raises(ValueError, match="`weight` has to be a number not below 0, but is -0.5"):
        REPARegularizer(8, 6, weight=-0.5)


# --- Beside LSEP: any module with `depth`, `weight` and a loss per sample


class TokenSize(nn.Module):
    """A third regularizer, which exists nowhere but here: the mean square of the tokens, scaled by the target."""

    def __init__(self, depth, weight):
        super().__init__()
        self.depth, self.weight = depth, weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens, target):
        return self.scale * target * tokens.square().flatten(1).mean(dim=1)


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


def make_batch(seed=0, batch_size=5):
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "class_labels": torch.randint(0, 10, (batch_size,), generator=generator),
        "noise": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "timesteps": torch.rand(batch_size, generator=generator),
        "class_dropout_mask": torch.rand(batch_size, generator=generator) < 0.5,
        "probe_dropout_mask": torch.rand(batch_size, generator=generator) < 0.5,
        "targets": {
            "repa": torch.randn(batch_size, 16, 6, generator=generator),
            "size": torch.rand(batch_size, generator=generator),
        },
    }


@pytest.mark.parametrize("with_probe", [True, False])
@pytest.mark.parametrize("depths", [(1, 2, 2), (2, 2, 2), (4, 1, 3), (3, 4, 4)])
def test_regularizers_read_the_main_stream_in_the_one_pass(tiny_transformer, with_probe, depths):
    objective = make_objective(tiny_transformer, with_probe, *depths)
    batch = make_batch()
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
        losses[name] = regularizer.weight * regularizer(tokens, batch["targets"][name]).mean()
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


def test_objective_with_regularizers_compiles_to_one_graph(tiny_transformer):
    objective, batch = make_objective(tiny_transformer), make_batch()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    output = compiled(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.loss, objective(**batch).loss, rtol=1e-5, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(**make_batch(seed=1))


def test_only_the_projector_is_saved_with_the_objective(tiny_transformer):
    names = make_objective(tiny_transformer).state_dict().keys()
    assert {name.split(".")[0] for name in names} == {"transformer", "probe", "regularizers"}
    repa = [name for name in names if name.startswith("regularizers.repa.")]
    assert len(repa) == 6 and all(".projector." in name for name in repa)


def test_losses_of_regularizers_stay_in_float32_under_autocast(tiny_transformer):
    objective, batch = make_objective(tiny_transformer), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = objective(**batch)
    assert output.loss.dtype == output.regularizer_losses["repa"].dtype == torch.float32
    torch.testing.assert_close(output.loss, objective(**batch).loss, rtol=0.02, atol=0.02)


def test_regularizers_and_targets_have_to_fit(tiny_transformer):
    with pytest.raises(ValueError, match=r"`depth` of the regularizer `repa` has to lie in 1\.\.4, .* but is 5"):
        make_objective(tiny_transformer, repa_depth=5)
    with pytest.raises(ValueError, match=r"`depth` of the regularizer `size` has to lie in 1\.\.4, .* but is 0"):
        make_objective(tiny_transformer, with_probe=False, size_depth=0)
    batch = make_batch()
    objective = make_objective(tiny_transformer)
    with pytest.raises(ValueError, match=r"`targets` has to be given for \['repa', 'size'\], but is for \['repa'\]"):
        objective(**{**batch, "targets": {"repa": batch["targets"]["repa"]}})
    with pytest.raises(ValueError, match=r"`targets` has to be given for \[\], but is for \['repa', 'size'\]"):
        LSEPObjective(tiny_transformer(), None)(**batch)
