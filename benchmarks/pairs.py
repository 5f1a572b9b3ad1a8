# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Comparing two ways in one run, on machines that are shared and noisy."""

import statistics
import time
from collections.abc import Callable


def paired_ratio(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    pairs: int,
    after: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """
    Runs both, one right after the other, `pairs` times (and once before, unmeasured), and takes the ratio of every
    pair: what slows the machine down for a while slows both. `after` is run after each of them, unmeasured.

    Returns:
        `dict[str, float]`: the median `ratio` ours / baseline, its quartiles, and the median seconds of both.
    """
    ratios, ours_seconds, baseline_seconds = [], [], []

    def measure(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        seconds = time.perf_counter() - start
        after()
        return seconds

    measure(ours), measure(baseline)
    for i in range(pairs):
        # Who goes first takes turns.
        first, second = (ours, baseline) if i % 2 else (baseline, ours)
        durations = (measure(first), measure(second))
        mine, other = durations if i % 2 else durations[::-1]
        ratios.append(mine / other)
        ours_seconds.append(mine)
        baseline_seconds.append(other)
    low, median, high = statistics.quantiles(ratios, n=4) if pairs > 1 else ratios * 3
    return {
        "ratio": median,
        "ratio_25": low,
        "ratio_75": high,
        "ours_seconds": statistics.median(ours_seconds),
        "baseline_seconds": statistics.median(baseline_seconds),
        "pairs": pairs,
    }
