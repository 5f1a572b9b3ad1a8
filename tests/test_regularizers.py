# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The losses beside LSEP's: against closed forms, against numbers of the original code, and in training."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from code_blocks import read_blocks
from diffusers import DiffusionPipeline
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.hooks import FirstBlockCacheConfig
from safetensors.torch import load_file
from tiny_models import make_batch, make_pipeline, make_transformer
from tiny_run import TINY_RUN

from diffusers_lsep import (
    FlowMatchSDEScheduler,
    LinearProbe,
    LSEPObjective,
    LSEPPipeline,
    SiTTransformer2DModel,
    convert_original_checkpoint,
)
from diffusers_lsep.data.images import load_image_dataset, open_images
from diffusers_lsep.data.stream import SampleStream
from diffusers_lsep.regularizers import (
    REGULARIZERS,
    DispersiveRegularizer,
    Flag,
    InternalGuidanceRegularizer,
    LayerSyncRegularizer,
    Regularizer,
    RegularizerContext,
    REPARegularizer,
    SelfTranscendenceRegularizer,
    SRARegularizer,
)
from diffusers_lsep.regularizers.teachers import Teacher, ask_teachers
from diffusers_lsep.training.log import read_metrics


NAMES = list(REGULARIZERS)
KEYS = [name.replace("-", "_") for name in NAMES]
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS, LOSSES = EXAMPLES / "digits", EXAMPLES / "configs" / "losses"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apply_mlp(layers, tokens):
    """Linear layers with SiLU between them, written down plainly in float64."""
    linears = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    for i, layer in enumerate(linears):
        tokens = tokens @ layer.weight.detach().double().T + layer.bias.detach().double()
        tokens = tokens / (1 + torch.exp(-tokens)) if i < len(linears) - 1 else tokens
    return tokens


# --- Closed forms


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_dispersive_loss(temperature):
    """All pairs, each sample with itself included; also where samples hardly differ, and for one sample."""
    regularizer = DispersiveRegularizer(depth=3, temperature=temperature)
    assert regularizer.depths == (3,) and regularizer.weight == 0.25 and not list(regularizer.parameters())
    for tokens in (random(5, 4, 6), 100 + random(5, 4, 6) / 100):
        total, samples = 0.0, tokens.double().flatten(1)
        for one in samples:
            for other in samples:
                total += math.exp(-((one - other) ** 2).sum().item() / 24 / temperature)
        loss = regularizer(RegularizerContext({3: tokens}))
        assert loss.item() == pytest.approx(math.log(total / 25), rel=1e-4, abs=1e-6)
    assert regularizer(RegularizerContext({3: tokens[:1]})) == 0
    same = torch.ones(3, 4, 6, requires_grad=True)
    regularizer(RegularizerContext({3: same})).backward()
    assert not same.grad.any()


def test_layersync():
    regularizer = LayerSyncRegularizer()
    assert regularizer.depths == (8, 16) and regularizer.weight == 0.2
    tokens, targets = random(2, 3, 5).requires_grad_(), random(2, 3, 5, seed=1).requires_grad_()
    losses = regularizer(RegularizerContext({8: tokens, 16: targets}))
    for i in range(2):
        cosines = [a @ b / (a.norm() * b.norm()) for a, b in zip(tokens[i].double(), targets[i].double())]
        assert losses[i].item() == pytest.approx(-(sum(cosines) / 3).item(), abs=1e-6)
    losses.sum().backward()
    assert tokens.grad.any() and targets.grad is None


@pytest.mark.parametrize("loss", ["smooth_l1", "cosine", "cosine_over_tokens"])
def test_sra(loss):
    regularizer = SRARegularizer(5, depth=2, loss=loss)
    assert [layer.weight.shape for layer in regularizer.head if hasattr(layer, "weight")] == [(10, 5), (5, 10)]
    tokens, target = random(2, 3, 5), random(2, 3, 5, seed=1)
    losses = regularizer(RegularizerContext({2: tokens}, target=target))
    projected, target = apply_mlp(regularizer.head, tokens.double()), target.double()
    for i in range(2):
        if loss == "smooth_l1":
            differences = (projected[i] - target[i]).abs().flatten().tolist()
            expected = [d * d / 0.1 if d < 0.05 else d - 0.025 for d in differences]
        else:
            pairs = zip(projected[i], target[i]) if loss == "cosine" else zip(projected[i].T, target[i].T)
            expected = [1 - (a @ b / (a.norm() * b.norm())).item() for a, b in pairs]
        assert losses[i].item() == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_sra_asks_the_teacher_about_less_noise():
    """At `t - d`, never below 0, for the same image, noise and labels as the main stream's."""
    objective = LSEPObjective(make_transformer(), None, regularizers={"sra": SRARegularizer(32, 1, 2)})
    batch, asked = make_batch(), []
    batch.pop("probe_dropout_mask")
    draws = torch.linspace(0, 0.999, 6)[:, None]

    def teacher(*inputs):
        asked.append(inputs)
        return random(6, 16, 32)

    targets = ask_teachers(objective, {"sra": teacher}, **batch, draws=draws)
    torch.testing.assert_close(targets["sra"], random(6, 16, 32))
    ((noisy, timesteps, labels, depth),) = asked
    for i in range(6):
        t = max(0.0, batch["timesteps"][i].item() - 0.2 * draws[i].item())
        assert timesteps[i].item() == pytest.approx(t, abs=1e-6)
        torch.testing.assert_close(noisy[i], (1 - t) * batch["latents"][i] + t * batch["noise"][i])
        assert labels[i] == (10 if batch["class_dropout_mask"][i] else batch["class_labels"][i])
    assert depth == 2


@pytest.mark.parametrize("mask", ["samples", "batch"])
def test_first_stage_of_self_transcendence(mask):
    """Each token's part of the velocity, of the samples in the range of times; or of all by how many are."""
    regularizer = SelfTranscendenceRegularizer(8, velocity_size=2 * 2 * 3, depth=2, mask=mask)
    tokens, velocity, timesteps = random(3, 4, 8), random(3, 3, 4, 4, seed=1), torch.tensor([0.4, 0.7001, 0.55])
    losses = regularizer(RegularizerContext({2: tokens}, velocity=velocity, timesteps=timesteps))
    hidden = apply_mlp(regularizer.projector, tokens.double())
    hidden = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    predicted = apply_mlp(regularizer.output, hidden)
    expected = []
    for i in range(3):
        squares = []
        for row in range(4):
            for column in range(4):
                for channel in range(3):
                    token, place = (row // 2) * 2 + column // 2, ((row % 2) * 2 + column % 2) * 3 + channel
                    squares.append((predicted[i, token, place] - velocity[i, channel, row, column]).item() ** 2)
        expected.append(sum(squares) / len(squares))
    inside = [1, 0, 1] if mask == "samples" else [2 / 3] * 3
    assert losses.tolist() == pytest.approx([a * b for a, b in zip(expected, inside)], rel=1e-5)


def test_second_stage_of_self_transcendence():
    """Guided tokens of the teacher: with the samples' own labels, whatever the main stream sees."""
    regularizer = SelfTranscendenceRegularizer(32, depth=1, teacher_depth=2, time_range=(0, 1))
    batch, teacher = make_batch(), make_transformer(seed=1)
    batch.pop("probe_dropout_mask")
    objective = LSEPObjective(make_transformer(), None, regularizers={"st": regularizer})
    targets = ask_teachers(objective, {"st": Teacher(teacher)}, **batch)
    loss = objective(**batch, targets=targets).regularizer_losses["st"]

    t = batch["timesteps"].view(-1, 1, 1, 1)
    noisy = (1 - t) * batch["latents"] + t * batch["noise"]
    with torch.no_grad():
        labels = batch["class_labels"]
        given = teacher.hidden_states_at(noisy, batch["timesteps"], labels, 2).double()
        hidden = teacher.hidden_states_at(noisy, batch["timesteps"], torch.full_like(labels, 10), 2).double()
        dropped = labels.masked_fill(batch["class_dropout_mask"], 10)
        tokens = objective.transformer.hidden_states_at(noisy, batch["timesteps"], dropped, 1).double()
    expected = (apply_mlp(regularizer.projector, tokens) - (hidden + 30 * (given - hidden))).square().mean()
    assert loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-4)


def test_irepa():
    """A convolution on the grid, and the encoder's tokens normalised over the patches."""
    regularizer = REPARegularizer(3, 2, depth=1, projector="conv", target_alpha=0.6)
    tokens, target = random(2, 9, 3), random(2, 9, 2, seed=1) + 1
    losses = regularizer(RegularizerContext({1: tokens}, target=target))
    weight, bias = regularizer.projector.weight.detach().double(), regularizer.projector.bias.detach().double()
    for i in range(2):
        normal = torch.zeros(9, 2, dtype=torch.float64)
        for channel in range(2):
            values = target[i, :, channel].double()
            deviation = ((values - values.mean()) ** 2).sum().div(8).sqrt()
            normal[:, channel] = (values - 0.6 * values.mean()) / (deviation + 1e-6)
        cosines = []
        for row in range(3):
            for column in range(3):
                projected = bias.clone()
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        if 0 <= row + dy < 3 and 0 <= column + dx < 3:
                            neighbour = tokens[i, (row + dy) * 3 + column + dx].double()
                            projected += weight[:, :, dy + 1, dx + 1] @ neighbour
                other = normal[row * 3 + column]
                cosines.append((projected @ other / (projected.norm() * other.norm())).item())
        assert losses[i].item() == pytest.approx(-sum(cosines) / 9, abs=1e-5)


def test_weights_run_over_the_steps():
    sra = SRARegularizer(8, weight=0.2, decay_start_epoch=149, decay_epochs=1000)
    assert [sra.weight_at(0, epoch) for epoch in (0, 149, 649, 1149)] == pytest.approx(
        [0.2, 0.2, 0.2 * 0.1**0.5, 0.02]
    )
    second = SelfTranscendenceRegularizer(8, stop_step=3, projector_dim=16)
    assert [layer.out_features for layer in second.projector if hasattr(layer, "weight")] == [16, 16, 8]
    assert [second.weight_at(step, 0) for step in (0, 2, 3, 4)] == [0.5, 0.5, 0, 0]
    assert LayerSyncRegularizer().weight_at(10**6, 800) == 0.2


# --- Numbers of the original code (see tests/reference/README.md)


@pytest.fixture(scope="module")
def reference():
    return load_file(Path(__file__).parent / "reference" / "regularizers.safetensors")


def load_original(reference, prefix, folder, **config):
    """A transformer of the original code as ours, and the weights that ours does not have."""
    weights = {k.removeprefix(f"{prefix}."): v for k, v in reference.items() if k.startswith(f"{prefix}.")}
    inside = ("x_embedder.", "t_embedder.", "y_embedder.", "blocks.", "final_layer.", "pos_embed")
    torch.save({k: v for k, v in weights.items() if k.startswith(inside)}, folder / f"{prefix}.pt")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8}
    transformer = convert_original_checkpoint(folder / f"{prefix}.pt", source="repa", **sizes).transformer
    if config:
        other = SiTTransformer2DModel.from_config(transformer.config, **config)
        other.load_state_dict(transformer.state_dict(), strict=False)
        transformer = other
    return transformer, {k: v for k, v in weights.items() if not k.startswith(inside)}


def assert_gradient(modules, expected):
    gradient = torch.cat([module.weight.grad for module in modules])
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-4


def test_original_sra(reference, tmp_path):
    student, rest = load_original(reference, "student", tmp_path)
    teacher, _ = load_original(reference, "teacher", tmp_path)
    batch = {name: reference[name] for name in ("latents", "class_labels", "noise", "timesteps")}
    batch["class_dropout_mask"] = reference["dropped_labels"] == 10
    assert batch["class_dropout_mask"].any() and not batch["class_dropout_mask"].all()
    for ours, original in {"smooth_l1": "sml1", "cosine_over_tokens": "cos"}.items():
        regularizer = SRARegularizer(16, 1, 2, weight=1, loss=ours)
        with torch.no_grad():
            for layer, name in ((regularizer.head[0], "linear1"), (regularizer.head[2], "linear2")):
                layer.weight.copy_(rest[f"ap_head.{name}.weight"])
                layer.bias.copy_(rest[f"ap_head.{name}.bias"])
        objective = LSEPObjective(student, None, regularizers={"sra": regularizer})
        targets = ask_teachers(objective, {"sra": Teacher(teacher)}, **batch, draws=reference["sra.draws"])
        output = objective(**batch, targets=targets)
        torch.testing.assert_close(output.denoising_losses, reference["sra.denoising"], rtol=1e-4, atol=1e-6)
        expected = reference[f"sra.{original}"]
        torch.testing.assert_close(output.regularizer_losses["sra"], expected, rtol=1e-4, atol=1e-6)
        # the gradient of this loss alone
        objective.zero_grad()
        (output.loss - LSEPObjective(student, None)(**batch).loss).backward()
        block = student.transformer_blocks[0].attn
        grads = {k.removeprefix(f"sra.{original}.grad."): v for k, v in reference.items() if f"{original}.grad" in k}
        assert_gradient([block.to_q, block.to_k, block.to_v], grads["blocks.0.attn.qkv.weight"])
        assert_gradient([regularizer.head[0]], grads["ap_head.linear1.weight"])


@pytest.fixture
def original_internal_guidance(reference, tmp_path):
    transformer, rest = load_original(reference, "ig", tmp_path, internal_guidance_depth=2)
    with torch.no_grad():
        transformer.internal_proj_out.weight.copy_(rest["final_layer_xr.linear.weight"])
        transformer.internal_proj_out.bias.copy_(rest["final_layer_xr.linear.bias"])
        for kind in ("weight", "bias"):  # diffusers has the scale before the shift
            shift, scale = rest[f"final_layer_xr.adaLN_modulation.1.{kind}"].chunk(2)
            getattr(transformer.internal_norm_out.linear, kind).copy_(torch.cat([scale, shift]))
    return transformer


def test_original_internal_guidance(reference, original_internal_guidance):
    transformer = original_internal_guidance
    objective = LSEPObjective(transformer, None, regularizers={"ig": InternalGuidanceRegularizer()})
    output = objective(
        reference["latents"],
        reference["class_labels"],
        noise=reference["ig.noise"],
        timesteps=reference["ig.timesteps"],
        class_dropout_mask=reference["ig.dropped_labels"] == 10,
    )
    torch.testing.assert_close(output.denoising_losses, reference["ig.denoising"], rtol=1e-4, atol=1e-6)
    expected = 0.5 * reference["ig.internal"].mean()
    torch.testing.assert_close(output.regularizer_losses["ig"], expected, rtol=1e-4, atol=1e-6)
    output.loss.backward()
    block = transformer.transformer_blocks[0].attn
    assert_gradient([block.to_q, block.to_k, block.to_v], reference["ig.grad.blocks.0.attn.qkv.weight"])
    assert_gradient([transformer.internal_proj_out], reference["ig.grad.final_layer_xr.linear.weight"])


@pytest.mark.parametrize(("name", "guidance_scale"), [("nocfg", 1.0), ("cfg", 1.35)])
def test_original_sampling_with_internal_guidance(reference, original_internal_guidance, name, guidance_scale):
    noise = reference[f"ig.sample.{name}.noise"]

    class StoredNoise(FlowMatchSDEScheduler):
        def step(self, *args, generator=None, **kwargs):
            index = self.step_index or 0
            return super().step(*args, variance_noise=noise[index] if index < len(noise) else None, **kwargs)

    pipe = LSEPPipeline(original_internal_guidance.eval(), StoredNoise())
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        reference["class_labels"][:3],
        num_inference_steps=6,
        guidance_scale=guidance_scale,
        guidance_interval=(0.0, 0.7),
        internal_guidance_scale=1.4,
        latents=reference["latents"][:3],
        output_type="latent",
    ).images
    torch.testing.assert_close(latents.double(), reference[f"ig.sample.{name}"], rtol=1e-4, atol=1e-4)


def test_original_dispersive_loss(reference):
    tokens = reference["layersync.tokens"].clone().requires_grad_()
    loss = 0.25 * DispersiveRegularizer(1)(RegularizerContext({1: tokens}))
    loss.backward()
    torch.testing.assert_close(loss.detach(), reference["dispersive.loss"])
    torch.testing.assert_close(tokens.grad, reference["dispersive.grad"])


def test_original_layersync_and_irepa(reference):
    tokens = reference["layersync.tokens"].clone().requires_grad_()
    context = RegularizerContext({1: tokens, 2: reference["layersync.targets"]})
    loss = LayerSyncRegularizer(1, 2)(context).mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), reference["layersync.loss"])
    torch.testing.assert_close(tokens.grad, reference["layersync.grad"])

    irepa = REPARegularizer(16, 6, depth=1, projector="conv", target_alpha=0.6)
    irepa.projector.load_state_dict({kind: reference[f"irepa.{kind}"] for kind in ("weight", "bias")})
    loss = irepa(RegularizerContext({1: tokens}, target=reference["irepa.features"])).mean()
    torch.testing.assert_close(loss.detach(), reference["irepa.loss"])


# --- In the objective


def make_objective(with_probe=True, **config):
    torch.manual_seed(0)
    transformer = make_transformer(num_layers=4, internal_guidance_depth=2, **config)
    values = {
        "dispersive": {"depth": 4, "weight": 0.25, "temperature": 1.0},
        "layersync": {"depth": 1, "target_depth": 3, "weight": 0.2},
        "sra": {"depth": 1, "teacher_depth": 3},
        "self-transcendence": {"depth": 1, "teacher_depth": 2, "teacher": "some"},
        "internal-guidance": {"depth": 2, "weight": 0.5},
    }
    regularizers = {
        key: REGULARIZERS[name].for_transformer(transformer, **values[name]) for key, name in zip(KEYS, NAMES)
    }
    return LSEPObjective(
        transformer, LinearProbe(32, 10) if with_probe else None, probe_depth=2, regularizers=regularizers
    )


def make_targets(batch_size=6, seed=0):
    return {"sra": random(batch_size, 16, 32, seed=seed), "self_transcendence": random(batch_size, 16, 32, seed=seed)}


@pytest.mark.parametrize("with_probe", [True, False])
def test_all_of_them_in_one_pass(with_probe):
    objective, batch, calls = make_objective(with_probe), make_batch(), []
    objective.share_streams = False
    for block in objective.transformer.transformer_blocks:
        block.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    output = objective(**batch, targets=make_targets())
    assert calls == ([12, 12, 6, 6] if with_probe else [6] * 4)
    assert list(output.regularizer_losses) == KEYS
    plain = LSEPObjective(objective.transformer, objective.probe, probe_depth=2)(**batch)
    total = plain.loss + sum(output.regularizer_losses.values())
    torch.testing.assert_close(output.loss, total)
    doubled = {key: torch.tensor(2 * module.weight) for key, module in objective.regularizers.items()}
    other = objective(**batch, targets=make_targets(), regularizer_weights=doubled)
    for key, loss in output.regularizer_losses.items():
        torch.testing.assert_close(other.regularizer_losses[key], 2 * loss)


def test_a_regularizer_is_handed_what_it_reads_and_nothing_else():
    seen = {}

    class Curious(Regularizer):
        def __init__(self, depths=(), reads=()):
            super().__init__(1.0)
            self.depths, self.reads = depths, reads

        def forward(self, context):
            seen[self] = context
            return torch.zeros(6)

    everything = ("probe_tokens", "condition", "latents", "noise", "noisy_latents", "timesteps", "class_labels")
    everything += ("dropped_labels", "null_class", "velocity", "prediction", "internal_prediction", "path")
    one, other = Curious((1, 3), everything), Curious((), ("velocity",))
    transformer, probe, batch = (
        make_transformer(num_layers=4, internal_guidance_depth=2),
        LinearProbe(32, 10),
        make_batch(),
    )
    LSEPObjective(transformer, probe, probe_depth=2, regularizers={"one": one, "other": other})(**batch)
    fields = {name: value for name, value in vars(seen[other]).items() if value is not None}
    assert fields.keys() == {"tokens", "velocity"} and fields["tokens"] == {}
    torch.testing.assert_close(fields["velocity"], batch["noise"] - batch["latents"])
    for wrong in ("veloctiy", "draws"):
        with pytest.raises(
            ValueError, match=f"`reads` of the regularizer `one` has to name some of .* but is .*{wrong}"
        ):
            LSEPObjective(transformer, None, regularizers={"one": Curious((), (wrong,))})

    context, t = seen[one], batch["timesteps"]
    noisy = (1 - t.view(-1, 1, 1, 1)) * batch["latents"] + t.view(-1, 1, 1, 1) * batch["noise"]
    labels = batch["class_labels"].masked_fill(batch["class_dropout_mask"], 10)
    hidden = batch["class_labels"].masked_fill(batch["probe_dropout_mask"], 10)
    torch.testing.assert_close(context.noisy_latents, noisy)
    assert torch.equal(context.dropped_labels, labels) and context.null_class == 10
    assert torch.equal(context.class_labels, batch["class_labels"]) and torch.equal(context.timesteps, t)
    predictions = transformer(noisy, t, labels)
    torch.testing.assert_close(context.prediction, predictions.sample)
    torch.testing.assert_close(context.internal_prediction, predictions.internal_sample)
    torch.testing.assert_close(context.condition, transformer.embed_condition(t, labels, torch.float32))
    for depth in (1, 3):
        torch.testing.assert_close(context.tokens[depth], transformer.hidden_states_at(noisy, t, labels, depth))
    torch.testing.assert_close(context.probe_tokens, transformer.hidden_states_at(noisy, t, hidden, 2))


@pytest.mark.slow
def test_the_step_compiles_to_one_graph_with_all_of_them():
    objective, batch = make_objective(), make_batch()
    weights = {key: torch.tensor(module.weight) for key, module in objective.regularizers.items()}
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    output = compiled(**batch, targets=make_targets(), regularizer_weights=weights)
    output.loss.backward()
    torch.testing.assert_close(output.loss, objective(**batch, targets=make_targets()).loss, rtol=1e-5, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        weights["self_transcendence"].zero_()
        compiled(**make_batch(seed=1), targets=make_targets(seed=1), regularizer_weights=weights)


def test_losses_stay_in_float32_under_autocast():
    objective, batch = make_objective(), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = objective(**batch, targets=make_targets())
    for key, loss in objective(**batch, targets=make_targets()).regularizer_losses.items():
        assert output.regularizer_losses[key].dtype == torch.float32
        torch.testing.assert_close(output.regularizer_losses[key], loss, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DispersiveRegularizer(1, temperature=0), "`temperature` has to be above 0, but is 0"),
        (lambda: LayerSyncRegularizer(4, 4), "`target_depth` has to be above `depth`, 4, but is 4"),
        (lambda: LayerSyncRegularizer(weight=-1), "`weight` has to be a number not below 0, but is -1"),
        (lambda: SRARegularizer(8, loss="l2"), "`loss` has to be one of .*, but is 'l2'"),
        (lambda: SRARegularizer(8, max_time_shift=2), r"`max_time_shift` has to lie in \[0, 1\], but is 2"),
        (lambda: SRARegularizer(8, decay_epochs=0), "`decay_epochs` has to be above 0, but is 0"),
        (lambda: SelfTranscendenceRegularizer(8, time_range=(0.7, 0.4)), "`time_range` has to be .* but is"),
        (lambda: SelfTranscendenceRegularizer(8, mask="all"), "`mask` has to be one of .*, but is 'all'"),
        (lambda: REPARegularizer(8, 8, projector="cnn"), "`projector` has to be one of .*, but is 'cnn'"),
        (
            lambda: make_transformer(internal_guidance_depth="1"),
            "`internal_guidance_depth` has to be None or lie in 1..2, but is '1'",
        ),
        (
            lambda: make_transformer(internal_guidance_depth=3),
            "`internal_guidance_depth` has to be None or lie in 1..2",
        ),
        (
            lambda: LSEPObjective(make_transformer(), None, regularizers={"ig": InternalGuidanceRegularizer()}),
            "`internal_guidance_depth` of `transformer` is needed by `ig`, but is None",
        ),
        (
            lambda: LSEPObjective(make_transformer(), None, regularizers={"ls": LayerSyncRegularizer(1, 3)}),
            r"`depth` of the regularizer `ls` has to lie in 1\.\.2, .* but is 3",
        ),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- Internal guidance in transformer and pipeline


def test_a_transformer_without_the_head_is_as_before():
    with_head = make_transformer(internal_guidance_depth=1).state_dict()
    without = make_transformer().state_dict()
    assert with_head.keys() - without.keys() == {
        f"internal_{name}.{kind}" for name in ("norm_out.linear", "proj_out") for kind in ("weight", "bias")
    }
    torch.manual_seed(0)
    fresh = SiTTransformer2DModel(sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8)
    torch.manual_seed(0)
    fresh_with = SiTTransformer2DModel.from_config(fresh.config, internal_guidance_depth=1).state_dict()
    assert all(torch.equal(value, fresh_with[name]) for name, value in fresh.state_dict().items())
    heads = [value for name, value in fresh_with.items() if name.startswith("internal")]
    assert len(heads) == 4 and not any(value.any() for value in heads)
    assert len(fresh(torch.zeros(1, 4, 8, 8), 0.5, torch.tensor([0]), return_dict=False)) == 1


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_internal_guidance_needs_no_second_evaluation(guidance_scale):
    pipe, calls = make_pipeline(internal_guidance_depth=1), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    latents, ids = random(2, 4, 8, 8), torch.tensor([3, 7])
    velocity = pipe.predict_velocity(latents, 0.6, ids, guidance_scale, internal_guidance_scale=1.4)
    assert len(calls) == 1
    outputs = [pipe.transformer(latents, 0.6, labels) for labels in (ids, torch.full_like(ids, 10))]
    given, hidden = (o.sample + 0.4 * (o.sample - o.internal_sample) for o in outputs)
    expected = hidden + guidance_scale * (given - hidden)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)


def test_internal_guidance_is_saved_and_refused_where_there_is_no_head(tmp_path):
    pipe = make_pipeline(internal_guidance_depth=1)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.transformer.config.internal_guidance_depth == 1

    def draw(pipe, **options):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe([1, 2], num_inference_steps=3, generator=generator, output_type="latent", **options).images

    images = draw(pipe, internal_guidance_scale=1.4)
    assert torch.equal(images, draw(loaded, internal_guidance_scale=1.4))
    assert not torch.allclose(images, draw(pipe))
    with pytest.raises(
        ValueError, match="`internal_guidance_scale` has to be 1 with a transformer without .*, but is 1.4"
    ):
        draw(make_pipeline(), internal_guidance_scale=1.4)


def test_internal_guidance_with_a_guider_and_a_cache():
    pipe = make_pipeline(internal_guidance_depth=1)
    pipe.set_progress_bar_config(disable=True)

    def draw(**options):
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 3, "internal_guidance_scale": 1.4, **options}
        return pipe([1, 2], generator=generator, output_type="latent", **options).images

    guided = draw(guider=ClassifierFreeGuidance(guidance_scale=2.0))
    torch.testing.assert_close(guided, draw(guidance_scale=2.0), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(guided, draw(guidance_scale=2.0, internal_guidance_scale=1.0), atol=1e-3)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="`internal_guidance_scale` has to be 1 with a cache.*`disable_cache"):
        draw()
    assert draw(internal_guidance_scale=1.0).isfinite().all()


# --- In training


def test_the_stream_is_the_same_with_and_without_draws_for_regularizers():
    class Source:
        kind, labels = "images", np.arange(20) % 3

        def load(self, rows, flips):
            return torch.from_numpy(rows).float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)

    plain, more = (SampleStream(Source(), (1, 4, 4), seed=3, num_regularizer_draws=n) for n in (0, 2))
    for read in ("__getitems__", "held_out_batch"):
        one, other = (getattr(stream, read)([3, 7, 12]) for stream in (plain, more))
        draws = other.pop("regularizer_draws")
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert draws.shape == (3, 2) and draws.min() >= 0 and draws.max() < 1 and len(draws.unique()) == 6
        assert torch.equal(draws[2], getattr(more, read)([12])["regularizer_draws"][0])
    assert "regularizer_draws" not in one


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """A pipeline for the digits as the tiny runs have them, to be the teacher of another."""
    folder = tmp_path_factory.mktemp("first")
    config = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 1}
    make_pipeline(seed=5, **config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("lsep", [[], ["--no_lsep"]])
def test_training_with_all_of_them(train, first_stage, tmp_path, lsep):
    """All is reported and drawn; a run in two parts ends with the same bits; a finished run is not changed."""
    flags = ["--regularizers", *NAMES, *lsep, "--self_transcendence_teacher", first_stage, "--ema_decay", 0.9]
    flags += ["--self_transcendence_time_range", 0, 1, "--self_transcendence_stop_step", 3, "--validation_steps", 4]
    flags += ["--learning_rate", 1e-2, "--lr_warmup_steps", 0]
    train(*flags, output_dir=tmp_path / "whole", curves=True)
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    for step, line in enumerate(lines[:4]):
        parts = ["denoising_loss", *([] if lsep else ["probe_loss"]), *(f"{key}_loss" for key in KEYS)]
        assert line["loss"] == pytest.approx(sum(line[part] for part in parts), rel=1e-5)
        assert (line["self_transcendence_loss"] == 0) == (step == 3)
    assert all(f"validation_{key}_loss" in lines[-1] for key in KEYS)
    assert (tmp_path / "whole" / "curves.png").is_file()
    weights = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    heads = {".".join(name.split(".")[1:3]) for name in weights if name.startswith("regularizers.")}
    assert heads == {"sra.head", "self_transcendence.projector"}
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "Losses besides: Dispersive Loss ([arXiv:2506.09027]" in card and "arxiv:2601.07773" in card

    train(*flags, "--max_train_steps", 2, output_dir=tmp_path / "parts")
    train(*flags, "--resume_from_checkpoint", "latest", output_dir=tmp_path / "parts")
    for name in ("model", "optimizer", "average"):
        whole, parts = (
            load_file(tmp_path / run / "checkpoint-4" / f"{name}.safetensors") for run in ("whole", "parts")
        )
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert pipe.transformer.config.internal_guidance_depth == 1
    with pytest.raises(ValueError, match=r"cannot continue a run with another method.*regularizers"):
        flags = ["--regularizers", "sra", *lsep, "--ema_decay", 0.9, "--learning_rate", 1e-2, "--lr_warmup_steps", 0]
        train(*flags, "--validation_steps", 4, "--resume_from_checkpoint", "latest", output_dir=tmp_path / "parts")


@pytest.mark.slow
def test_sra_learns_from_the_average(train, tmp_path):
    """The loss of the third step, from the files of the second: the average's tokens at the stream's own times."""
    flags = ["--regularizers", "sra", "--no_lsep", "--ema_decay", 0.5, "--no-ema_warmup", "--learning_rate", 1e-2]
    flags += ["--sra_depth", 1, "--sra_teacher_depth", 2, "--checkpointing_steps", 1, "--lr_warmup_steps", 0]
    train(*flags, "--max_train_steps", 3)
    folder = tmp_path / "run" / "checkpoint-2"
    student = SiTTransformer2DModel.from_pretrained(folder / "pipeline" / "transformer")
    average = SiTTransformer2DModel.from_pretrained(folder / "pipeline" / "transformer")
    weights = load_file(folder / "model.safetensors")
    student.load_state_dict({k.removeprefix("transformer."): v for k, v in weights.items() if k[0] == "t"})
    regularizer = SRARegularizer(student.inner_dim, 1, 2)
    prefix = "regularizers.sra."
    regularizer.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    objective = LSEPObjective(student, None, regularizers={"sra": regularizer})

    splits = load_image_dataset(None, None, str(DIGITS), None)
    source = open_images(splits, 8, 1, "image", "label", None, "test")[0]
    stream = SampleStream(source, (1, 8, 8), seed=0, samples_per_step=4, num_regularizer_draws=1)
    batch = stream.__getitems__([8, 9, 10, 11])
    names = ("class_labels", "noise", "timesteps", "class_dropout_mask")
    inputs = {"latents": batch["images"], **{name: batch[name] for name in names}}

    def loss_with(teacher):
        targets = ask_teachers(objective, {"sra": Teacher(teacher)}, **inputs, draws=batch["regularizer_draws"])
        return objective(**inputs, targets=targets).regularizer_losses["sra"].item()

    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[2]
    assert line["sra_loss"] == pytest.approx(loss_with(average), rel=1e-4)
    assert line["sra_loss"] != pytest.approx(loss_with(student), rel=1e-4)


@pytest.mark.slow
def test_a_checkpoint_as_teacher_has_the_weights_in_training(train, first_stage, tmp_path):
    train("--regularizers", "self-transcendence", "--ema_decay", 0.9, output_dir=tmp_path / "one")
    second = ["--regularizers", "self-transcendence", "--max_train_steps", 1, "--self_transcendence_time_range", 0, 1]
    losses = {}
    for teacher in ("checkpoint-4", "checkpoint-4/pipeline"):
        name = teacher.replace("/", "-")
        train(*second, "--self_transcendence_teacher", tmp_path / "one" / teacher, output_dir=tmp_path / name)
        losses[name] = read_metrics(tmp_path / name / "metrics.jsonl")[0]["self_transcendence_loss"]
    assert len(set(losses.values())) == 2
    moved = (tmp_path / "one").rename(tmp_path / "elsewhere") / "checkpoint-4"
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", 2]
    name = tmp_path / "checkpoint-4"
    train(*second, *resume, "--self_transcendence_teacher", moved, output_dir=name)
    with pytest.raises(ValueError, match="cannot continue a run with another method.*teacher_weights"):
        train(*second, *resume, "--self_transcendence_teacher", first_stage, output_dir=name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--regularizers", "self-transcendence", "--self_transcendence_teacher", "no/such"], "cannot be loaded"),
        (
            ["--regularizers", "layersync", "--layersync_depth", 2],
            "`--layersync_target_depth` has to be above `--layersync_depth`, 2, but is 2",
        ),
        (
            ["--regularizers", "sra", "--sra_teacher_depth", 3],
            r"`--sra_teacher_depth` has to lie in 1\.\.2, the number of blocks, but is 3",
        ),
        (
            ["--regularizers", "dispersive", "--dispersive_temperature", 0],
            "`--dispersive_temperature` has to be",
        ),
        (["--regularizers", "internal-guidance", "--internal_guidance_depth", 3], "has to be None or lie in 1..2"),
    ],
)
def test_wrong_values_stop_the_run_before_it_writes(train, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        train(*flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["teacher_depth", "guidance_scale"])
def test_what_is_of_the_second_stage_needs_a_teacher(train, capsys, flag):
    with pytest.raises(SystemExit):
        train("--regularizers", "self-transcendence", f"--self_transcendence_{flag}", 2)
    assert f"--self_transcendence_{flag} needs --self_transcendence_teacher" in capsys.readouterr().err


def test_losses_of_several_recipes_add_up(train, capsys):
    flags = [f"@{LOSSES / name}" for name in ("dispersive", "internal-guidance", "dispersive")]
    flags += ["--internal_guidance_depth", 1, "--dispersive_depth", 1]
    assert train(*flags, "--dry_run") == 0
    settings = json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]
    assert settings["regularizers"] == ["dispersive", "internal-guidance"]


def test_any_regularizer_may_have_a_frozen_teacher(train, first_stage, tmp_path, monkeypatch):
    class Follower(Regularizer):
        flags = (Flag("teacher", "The model to follow.", str), Flag("weight", "Weight of it.", default=0.5))
        depths, reads, teacher = (1,), ("target",), "frozen"

        @classmethod
        def for_transformer(cls, transformer, teacher, **values):
            return cls(**values)

        def make_target(self, teacher, context):
            return teacher(context.noisy_latents, context.timesteps, context.class_labels, 2)

        def forward(self, context):
            return (context.tokens[1].float() - context.target.float()).square().mean()

    monkeypatch.setitem(REGULARIZERS, "follower", Follower)
    train("--regularizers", "follower", "--follower_teacher", first_stage, "--max_train_steps", 1)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["follower_loss"] > 0
    with pytest.raises(ValueError, match="`--follower_teacher` has to be given for `--regularizers follower`"):
        train("--regularizers", "follower", output_dir=tmp_path / "none")
    both = ["--regularizers", "follower", "self-transcendence", "--self_transcendence_teacher", first_stage]
    with pytest.raises(ValueError, match="one of `--regularizers` can have a frozen teacher, but follower and self"):
        train(*both, "--follower_teacher", first_stage, output_dir=tmp_path / "both")


def test_a_teacher_has_to_fit(train, first_stage, tmp_path):
    flags = ["--regularizers", "self-transcendence", "--self_transcendence_teacher", first_stage]
    with pytest.raises(ValueError, match="teacher` has to be a model with `--path_type cosine`, but has linear"):
        train(*flags, "--path_type", "cosine")
    with pytest.raises(ValueError, match="`--self_transcendence_teacher` has to be a model with `patch_size=4`"):
        train(*flags, "--patch_size", 4, "--crop_size_min", 1)
    with pytest.raises(ValueError, match=r"`--self_transcendence_teacher_depth` has to lie in 1\.\.2, .* but is 3"):
        train(*flags, "--self_transcendence_teacher_depth", 3)
    with pytest.raises(ValueError, match="`--regularizers` has to name internal-guidance for a model with"):
        make_pipeline(internal_guidance_depth=1, in_channels=1).save_pretrained(tmp_path / "model")
        train("--pretrained_model_name_or_path", tmp_path / "model", tiny=())


@pytest.mark.slow
def test_a_model_with_the_head_is_trained_further(train, tmp_path):
    """The head stays where it is, and is trained as well."""
    pipe = make_pipeline(internal_guidance_depth=2, in_channels=1)
    pipe.save_pretrained(tmp_path / "model")
    flags = ["--pretrained_model_name_or_path", tmp_path / "model", "--regularizers", "internal-guidance"]
    tiny = [
        *TINY_RUN,
        "--max_train_steps",
        "1",
        "--lr_warmup_steps",
        "0",
        "--crop_size_min",
        "1",
        "--probe_depth",
        "1",
    ]
    train(*flags, "--train_data_dir", DIGITS, tiny=tiny)
    trained = DiffusionPipeline.from_pretrained(tmp_path / "run").transformer
    assert trained.config.internal_guidance_depth == 2
    assert not torch.equal(trained.internal_proj_out.weight, pipe.transformer.internal_proj_out.weight)


def test_the_average_is_needed(train, capsys):
    with pytest.raises(SystemExit):
        train("--regularizers", "sra", "--no-use_ema")
    assert "--regularizers sra needs the average of the weights: leave out --no-use_ema" in capsys.readouterr().err


# The published values, by preset; what the flags come to where they are not given.
PUBLISHED = {
    "dispersive": ("SiT-XL/2", {"depth": 28, "weight": 0.25, "temperature": 1.0}),
    "layersync": ("SiT-XL/2", {"depth": 8, "target_depth": 16, "weight": 0.2}),
    "sra": ("SiT-XL/2", {"depth": 8, "teacher_depth": 20, "weight": 0.2, "max_time_shift": 0.2}),
    "self-transcendence-1": ("SiT-B/2", {"depth": 2, "weight": 0.5, "time_range": [0.4, 0.7]}),
    "self-transcendence-2": ("SiT-B/2", {"depth": 6, "teacher_depth": 8, "weight": 0.5, "guidance_scale": 30.0}),
    "internal-guidance": ("SiT-XL/2", {"depth": 8, "weight": 0.5}),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(path.name for path in LOSSES.iterdir() if path.name != "irepa"))
@pytest.mark.parametrize("by", ["recipe", "default"])
def test_recipes_and_defaults_are_the_published_values(train, tmp_path, capsys, recipe, by):
    preset, expected = PUBLISHED[recipe]
    name = recipe.rstrip("-12")
    flags = [f"@{LOSSES / recipe}"] if by == "recipe" else ["--regularizers", name]
    if recipe.endswith("2"):
        teacher = make_transformer(
            num_layers=8, sample_size=32, num_attention_heads=12, attention_head_dim=64, in_channels=1, mlp_ratio=0.1
        )
        LSEPPipeline(teacher, FlowMatchSDEScheduler()).save_pretrained(tmp_path / "teacher")
        flags += ["--self_transcendence_teacher", tmp_path / "teacher"]
    digits = ["--resolution", 32, "--train_batch_size", 1, "--preset", preset, "--patch_size", 2, "--dry_run"]
    digits += ["--train_data_dir", DIGITS, "--image_channels", 1]
    assert train(*flags, *digits, tiny=()) == 0
    settings = json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]
    assert settings["regularizers"] == [name]
    key = name.replace("-", "_")
    assert {flag: settings[f"{key}_{flag}"] for flag in expected} == expected
    text = (LOSSES / recipe).read_text()
    assert REGULARIZERS[name].paper in text and f"@examples/configs/losses/{recipe} " in text


def test_a_depth_that_is_given_as_it_is_by_default_changes_nothing():
    for given, teacher in ((None, 20), (8, 20), (6, 12)):
        assert SRARegularizer.defaults_for(28, 8, {"depth": given})["teacher_depth"] == teacher


@pytest.mark.slow
def test_the_example_for_contributors(train, tmp_path, monkeypatch):
    """A class, a line in the table: it has flags, is trained and reported."""
    ((_, code),) = [block for block in read_blocks("CONTRIBUTING.md") if "(Regularizer)" in block[1]]
    names = {"Regularizer": Regularizer, "Flag": Flag}
    exec(code, names)
    monkeypatch.setitem(REGULARIZERS, "small-tokens", names["SmallTokensRegularizer"])
    train("--regularizers", "small-tokens", "--small_tokens_weight", 0.5, "--max_train_steps", 1)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["small_tokens_loss"] > 0


def test_recipe_of_irepa():
    flags = shlex.split((LOSSES / "irepa").read_text(), comments=True)
    assert flags[2:] == ["--repa_projector", "conv", "--repa_target_alpha", "0.6", "--repa_weight", "1"]
