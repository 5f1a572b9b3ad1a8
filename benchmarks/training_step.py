# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""A training step, forward and backward, against LSEP done the straightforward way and against a plain SiT.

Ours is the plain call, `objective(latents, class_labels)`, and the step of `examples/train_lsep.py`, which gives all
draws: on the samples of which both streams see the same label the probe reads the main stream's tokens. The loss is
the same, which is checked before anything is timed.
"""

import copy
import tempfile
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from pairs import paired_ratio
from straightforward import StraightforwardSiT, straightforward_loss

from diffusers_lsep import LSEPObjective, convert_original_checkpoint


# Width 384, 12 layers, probe depth 4, windows of 12 to 16 of 16 tokens, batch 16, latents 4 x 32 x 32.
SHAPE = {"size": 32, "channels": 4, "patch": 2, "layers": 12, "width": 384, "heads": 6, "classes": 1000}


def make_pair(probe_depth: int, **shape) -> tuple[StraightforwardSiT, LSEPObjective]:
    """Two models with the same weights; the second one by conversion of the first."""
    torch.manual_seed(0)
    shape = {**SHAPE, **shape}
    baseline = StraightforwardSiT(**shape, probe_depth=probe_depth)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pt")
        torch.save({"ema": baseline.state_dict()}, path)
        converted = convert_original_checkpoint(
            path,
            num_attention_heads=shape["heads"],
            attention_head_dim=shape["width"] // shape["heads"],
        )
    grid = shape["size"] // shape["patch"]
    crop_size = (min(12, grid), grid)
    objective = LSEPObjective(converted.transformer, converted.probe, probe_depth=probe_depth, crop_size=crop_size)
    return baseline, objective.train()


def make_draws(
    batch_size: int, num_shared: int, size: int = 32, channels: int = 4, grid: int = 16, low: int = 12
) -> dict[str, torch.Tensor]:
    """
    The arguments of `LSEPObjective.forward`, with labels that both streams drop or keep on `num_shared` samples, and
    otherwise drop in the probe's stream, except for one that only the main stream drops.
    """
    generator = torch.Generator().manual_seed(0)
    window = torch.randint(low, grid + 1, (1, 1), generator=generator).expand(batch_size, 1)
    start = (torch.rand(batch_size, 2, generator=generator) * (grid - window + 1)).long()
    row = torch.arange(batch_size)
    return {
        "latents": torch.randn(batch_size, channels, size, size, generator=generator),
        "class_labels": torch.randint(0, 1000, (batch_size,), generator=generator),
        "noise": torch.randn(batch_size, channels, size, size, generator=generator),
        "timesteps": torch.rand(batch_size, generator=generator),
        "class_dropout_mask": row < num_shared // 2 + 1,
        "probe_dropout_mask": (row != num_shared // 2) & (row < batch_size - (num_shared + 1) // 2),
        "crop_window": torch.cat([start, window], dim=1),
    }


def separate_rows(draws: dict[str, torch.Tensor]) -> torch.Tensor:
    return (draws["class_dropout_mask"] != draws["probe_dropout_mask"]).nonzero()[:, 0]


def check_equal(baseline, model, draws, weights):
    """The same loss, and the same gradient for the embeddings of the labels, which lies behind all blocks."""
    table = next(parameter for name, parameter in baseline.named_parameters() if "embedding_table" in name)
    expected = straightforward_loss(baseline, draws, weights)
    (expected_gradient,) = torch.autograd.grad(expected, table)
    model.zero_grad()
    found = model(**draws).loss
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradient = model.transformer.class_embedding.weight.grad
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4 * scale)


def step(model, arguments):
    """What makes a training step without its optimizer."""

    def run_step():
        model.zero_grad()
        model(**arguments).loss.backward()

    return run_step


def run(pairs: int = 7, batch_size: int = 16) -> list[dict]:
    torch.set_num_threads(2)
    baseline, objective = make_pair(probe_depth=4)
    # 18 % of the samples on average
    draws = make_draws(batch_size, num_shared=round(0.18 * batch_size))
    shared = {**draws, "separate_rows": separate_rows(draws)}
    plain = {name: draws[name] for name in ("latents", "class_labels")}
    weights = objective.probe_weights
    twice = copy.copy(objective)
    twice.share_streams = False
    for model, arguments in ((objective, draws), (objective, shared), (twice, draws)):
        check_equal(baseline, model, arguments, weights)

    def baseline_step():
        baseline.zero_grad()
        straightforward_loss(baseline, draws, weights).backward()

    def bfloat16_step():
        objective.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(**shared).loss
        loss.backward()

    compiled = torch.compile(objective, fullgraph=True)
    # tanh by way of exp is off in the compiler for CPUs, because it is off by 1e-8 near 0: nothing for
    # a GELU, which is where most is computed besides products. TORCHINDUCTOR_CPP_USE_DECOMPOSE_TANH=1 switches it on.
    tuned = torch.compile(objective, fullgraph=True, options={"cpp.use_decompose_tanh": True})
    for model in (compiled, tuned):
        check_equal(baseline, model, shared, weights)
    optimizer = torch.optim.AdamW(objective.parameters(), fused=True)
    loop_optimizer = torch.optim.AdamW(baseline.parameters(), foreach=False)
    average = EMAModel(objective.parameters(), decay=0.9999, foreach=True)
    loop_average = [parameter.detach().clone() for parameter in baseline.parameters()]

    def update():
        optimizer.step()
        average.step(objective.parameters())

    @torch.no_grad()
    def loop_update():
        loop_optimizer.step()
        for mean, parameter in zip(loop_average, baseline.parameters()):
            mean.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)

    return [
        {"name": "plain call: ours / straightforward, float32", "target": 0.88}
        | paired_ratio(step(objective, plain), baseline_step, pairs),
        {"name": "the same without shared activations", "target": None}
        | paired_ratio(step(twice, plain), baseline_step, pairs),
        {"name": "the script's step: ours / straightforward, float32", "target": 0.88}
        | paired_ratio(step(objective, shared), baseline_step, pairs),
        {"name": "plain call: ours compiled / straightforward, float32", "target": None}
        | paired_ratio(step(compiled, plain), baseline_step, pairs),
        {"name": "the same with tanh by way of exp", "target": 0.85}
        | paired_ratio(step(tuned, plain), baseline_step, pairs),
        {"name": "the script's step, the same", "target": 0.85}
        | paired_ratio(step(tuned, shared), baseline_step, pairs),
        {"name": "step: ours bf16 autocast / straightforward float32", "target": 0.45}
        | paired_ratio(bfloat16_step, baseline_step, pairs),
        {"name": "AdamW and average: fused / loops", "target": None} | paired_ratio(update, loop_update, pairs),
    ]
