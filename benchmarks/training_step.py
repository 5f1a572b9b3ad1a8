# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""A training step, forward and backward, against LSEP done the straightforward way and against a plain SiT."""

import copy
import tempfile
from pathlib import Path

import torch
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
    objective = LSEPObjective(converted.transformer, converted.probe, probe_depth=probe_depth)
    return baseline, objective.train()


def make_draws(batch_size: int, size: int = 32, channels: int = 4, grid: int = 16, low: int = 12) -> dict:
    generator = torch.Generator().manual_seed(0)
    window = torch.randint(low, grid + 1, (1, 1), generator=generator).expand(batch_size, 1)
    start = (torch.rand(batch_size, 2, generator=generator) * (grid - window + 1)).long()
    return {
        "latents": torch.randn(batch_size, channels, size, size, generator=generator),
        "class_labels": torch.randint(0, 1000, (batch_size,), generator=generator),
        "noise": torch.randn(batch_size, channels, size, size, generator=generator),
        "timesteps": torch.rand(batch_size, generator=generator),
        # As often as they occur on average: 10 % and 90 %.
        "class_dropout_mask": torch.rand(batch_size, generator=generator).argsort() < round(0.1 * batch_size),
        "probe_dropout_mask": torch.rand(batch_size, generator=generator).argsort() < round(0.9 * batch_size),
        "crop_window": torch.cat([start, window], dim=1),
    }


def check_equal(baseline, objective, draws):
    with torch.no_grad():
        expected = straightforward_loss(baseline, draws, objective.probe_weights)
        found = objective(**draws).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def run(pairs: int = 7, batch_size: int = 16) -> list[dict]:
    torch.set_num_threads(2)
    baseline, objective = make_pair(probe_depth=4)
    plain = LSEPObjective(copy.deepcopy(objective.transformer), None).train()
    draws = make_draws(batch_size)
    check_equal(baseline, objective, draws)
    weights = objective.probe_weights

    def baseline_step():
        baseline.zero_grad()
        straightforward_loss(baseline, draws, weights).backward()

    def baseline_plain_step():
        baseline.zero_grad()
        straightforward_loss(baseline, draws, None).backward()

    def step(model):
        def run_step():
            model.zero_grad()
            model(**draws).loss.backward()

        return run_step

    def bfloat16_step():
        objective.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(**draws).loss
        loss.backward()

    return [
        {"name": "step: ours / straightforward, float32", "target": 0.90}
        | paired_ratio(step(objective), baseline_step, pairs),
        {"name": "step: ours bf16 autocast / straightforward float32", "target": 0.45}
        | paired_ratio(bfloat16_step, baseline_step, pairs),
        {"name": "cost of the probe, ours: LSEP / plain SiT", "target": None}
        | paired_ratio(step(objective), step(plain), pairs),
        {"name": "cost of the probe, straightforward: LSEP / plain SiT", "target": None}
        | paired_ratio(baseline_step, baseline_plain_step, pairs),
    ]
