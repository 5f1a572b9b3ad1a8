# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks, prints a table and writes JSON.

    python benchmarks/run.py                            # all of steps, sampling, import, checkpoints: minutes
    python benchmarks/run.py --all                      # and the long ones, which have a --help of their own: hours
    python benchmarks/run.py training_step --pairs 15   # one, with more pairs
    python benchmarks/run.py original_repo --original_repo path/to/LSEP   # against the authors' code

Ratios are times, ours over the baseline that is named, medians over pairs of runs that follow each other; below 1 is
faster.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent))

# Pairs of runs, one row each
PAIRED = ["training_step", "probe_cost", "sampling_overhead", "import_time", "checkpoint_stall"]
# Scripts with reports of their own
SCRIPTS = [
    *("throughput", "roofline", "growth", "read_latents", "processes", "convert_full_size", "soak", "solver_order"),
    *("digits_ablation", "digits_fine_tuning", "gradient_variance", "label_dropout", "few_steps"),
]
# By themselves only: one takes a day, one needs a model, and one writes over weights that are kept beside it
ALONE = ["regularizers", "precision", "mnist_classifier"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "benchmarks",
        nargs="*",
        metavar="NAME",
        help=f"Some of {', '.join(PAIRED + SCRIPTS)}. Default: the first {len(PAIRED)}.",
    )
    parser.add_argument("--all", action="store_true", help="All of them.")
    parser.add_argument("--pairs", type=int, help="Pairs of runs, in place of each benchmark's own number.")
    parser.add_argument("--original_repo", type=Path, help="A clone of the authors' code, to compare with it as well.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/results.json"))
    args = parser.parse_args()
    paired = PAIRED + ["original_repo"] * (args.original_repo is not None)
    known = paired + SCRIPTS
    unknown = [name for name in args.benchmarks if name not in known]
    if unknown:
        alone = f"; python benchmarks/{unknown[0]}.py is run by itself" if unknown[0] in ALONE else ""
        parser.error(f"there is no benchmark {unknown[0]!r} here{alone}; there are {', '.join(known)}")
    if args.pairs is not None and args.pairs < 1:
        parser.error(f"--pairs has to be at least 1, but is {args.pairs}")

    names = known if args.all else args.benchmarks or paired
    rows = []
    print(f"{'ours / baseline':58} {'ratio':>6} {'quartiles':>13} {'target':>7} {'seconds':>17} {'pairs':>6}")
    for name in [name for name in names if name in paired]:
        options = {"pairs": args.pairs} if args.pairs is not None else {}
        if name == "original_repo":
            options["original_repo"] = args.original_repo
        for row in importlib.import_module(name).run(**options):
            rows.append({"benchmark": name, **row})
            target = f"{row['target']:.2f}" if row["target"] is not None else ""
            print(
                f"{row['name']:58} {row['ratio']:6.3f} {row['ratio_25']:6.3f} {row['ratio_75']:6.3f} {target:>7}"
                f" {row['ours_seconds']:8.3f} {row['baseline_seconds']:8.3f} {row['pairs']:6}",
                flush=True,
            )
    machine = {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "load": os.getloadavg(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"machine": machine, "results": rows}, indent=2) + "\n")
    for name in [name for name in names if name in SCRIPTS]:
        if args.all and name == "throughput" and not torch.cuda.is_available():
            print("\nthroughput is left out: there is no GPU")
            continue
        print(f"\n{name}", flush=True)
        subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py")], check=True)


if __name__ == "__main__":
    main()
