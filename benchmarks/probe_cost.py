# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What the probe's stream adds to a step of plain SiT, for XL/2's 28 layers and probe depth 8, at width 384.

By count the straightforward way adds 8 / 28 = 28.6 %; shared activations leave 82 % of that with independent dropout
and 80 % with coupled dropout, and a probe on a quarter of the batch leaves a quarter. Batch sizes are those at which
these shares are whole numbers of samples.
"""

import copy

import torch
from pairs import paired_ratio
from straightforward import straightforward_loss
from training_step import make_draws, make_pair, separate_rows, step

from diffusers_lsep import LSEPObjective


def run(pairs: int = 5) -> list[dict]:
    torch.set_num_threads(2)
    baseline, objective = make_pair(probe_depth=8, layers=28)
    plain = LSEPObjective(copy.deepcopy(objective.transformer), None).train()

    def baseline_step(arguments, weights):
        def run_step():
            baseline.zero_grad()
            straightforward_loss(baseline, arguments, weights).backward()

        return run_step

    independent, coupled = make_draws(11, num_shared=2), make_draws(20, num_shared=4)
    rows = separate_rows(coupled)
    quarter = {"probe_rows": torch.cat([rows[:4], torch.tensor([0])]), "separate_rows": rows[:4]}
    return [
        {"name": "28 layers: straightforward LSEP / straightforward SiT", "target": None}
        | paired_ratio(
            baseline_step(independent, objective.probe_weights), baseline_step(independent, weights=None), pairs
        ),
        {"name": "28 layers: LSEP / SiT", "target": 1.25}
        | paired_ratio(
            step(objective, {**independent, "separate_rows": separate_rows(independent)}),
            step(plain, independent),
            pairs,
        ),
        {"name": "28 layers: LSEP, coupled dropout / SiT", "target": None}
        | paired_ratio(step(objective, {**coupled, "separate_rows": rows}), step(plain, coupled), pairs),
        {"name": "28 layers: LSEP, coupled, a quarter of the batch / SiT", "target": 1.08}
        | paired_ratio(step(objective, {**coupled, **quarter}), step(plain, coupled), pairs),
    ]
