# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""How time and memory of a training step grow with batch, tokens and layers, with the exponents that fit best.

    python benchmarks/growth.py

Around width 384, 12 layers, probe depth 4, batch 2, 256 tokens (256 px with a VAE of factor 8 and patches of 2; 512 px
are 1,024 tokens, 1024 px are 4,096). Every point is a process of its own, so that its peak of memory is its own: what
a step needs beyond model and gradients. Linux only. Prints a table and writes it as JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


BASE = {"batch": 2, "tokens": 256, "layers": 12}
SWEEPS = {"batch": [2, 4, 8, 16], "tokens": [256, 1024, 4096], "layers": [6, 12, 24, 48]}


def measure(batch: int, tokens: int, layers: int, threads: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step and GB at its peak, in this process."""
    import torch
    from training_step import make_draws, make_pair, separate_rows

    torch.set_num_threads(threads)
    grid = round(tokens**0.5)
    _, objective = make_pair(probe_depth=layers // 3, layers=layers, size=2 * grid)
    draws = make_draws(batch, num_shared=0, size=2 * grid, grid=grid, low=3 * grid // 4)
    draws["separate_rows"] = separate_rows(draws)
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of building the models
    before = resident("VmRSS:")
    seconds = []
    for _ in range(repeats + 1):
        objective.zero_grad(set_to_none=False)
        start = time.perf_counter()
        objective(**draws).loss.backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "gigabytes": resident("VmHWM:") - before}


def resident(kind: str) -> float:
    """GB of this process's memory, now (`VmRSS:`) or at its peak (`VmHWM:`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) / 1e9 for line in lines if line.startswith(kind))


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # what the processes are started with
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/growth.json"))
    args = parser.parse_args()
    if args.point is not None:
        print(json.dumps(measure(**args.point, threads=args.threads, repeats=args.repeats)))
        return

    rows, exponents = [], {}
    for name, sizes in SWEEPS.items():
        for size in sizes:
            point = {**BASE, name: size}
            command = [sys.executable, __file__, "--point", json.dumps(point), "--threads", str(args.threads)]
            command += ["--repeats", str(args.repeats)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append({"sweep": name, **point, **json.loads(output.splitlines()[-1])})
            print(f"{name:7} {size:5}  {rows[-1]['seconds']:7.3f} s  {rows[-1]['gigabytes']:6.2f} GB", flush=True)
        found = [row for row in rows if row["sweep"] == name]
        exponents[name] = {kind: exponent(sizes, [row[kind] for row in found]) for kind in ("seconds", "gigabytes")}
        print(f"{name:7} exponents: time {exponents[name]['seconds']:.2f}, memory {exponents[name]['gigabytes']:.2f}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"rows": rows, "exponents": exponents}, indent=2) + "\n")


if __name__ == "__main__":
    main()
