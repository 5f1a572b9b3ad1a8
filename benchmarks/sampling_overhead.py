# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What pipeline and scheduler add to the time of the network: SiT-B/2 at 256 px, batch 8."""

import time

import torch

from diffusers_lsep import SIT_PRESETS, FlowMatchSDEScheduler, LSEPPipeline, SiTTransformer2DModel


def run(pairs: int = 5, steps: int = 2) -> list[dict]:
    """
    The share of the time inside `pipe(...)` that is not spent inside `transformer(...)`: both of one call, so that
    noise of the machine between two calls is no part of it.
    """
    torch.manual_seed(0)
    transformer = SiTTransformer2DModel(**SIT_PRESETS["SiT-B/2"]).eval()
    spent = []

    def before(*_):
        spent.append(-time.perf_counter())

    def after(*_):
        spent[-1] += time.perf_counter()

    transformer.register_forward_pre_hook(before)
    transformer.register_forward_hook(after)
    pipe = LSEPPipeline(transformer, FlowMatchSDEScheduler())
    pipe.set_progress_bar_config(disable=True)
    ratios, totals, networks = [], [], []
    for _ in range(pairs + 1):
        spent.clear()
        generators = [torch.Generator().manual_seed(i) for i in range(8)]
        start = time.perf_counter()
        pipe(list(range(8)), num_inference_steps=steps, generator=generators, output_type="latent")
        totals.append(time.perf_counter() - start)
        networks.append(sum(spent))
        ratios.append(totals[-1] / networks[-1])
    ratios, totals, networks = (sorted(values[1:]) for values in (ratios, totals, networks))
    middle = pairs // 2
    return [
        {
            "name": "sampling: pipeline / network (B/2, batch 8)",
            "target": 1.03,
            "ratio": ratios[middle],
            "ratio_25": ratios[pairs // 4],
            "ratio_75": ratios[-1 - pairs // 4],
            "ours_seconds": totals[middle],
            "baseline_seconds": networks[middle],
            "pairs": pairs,
        }
    ]
