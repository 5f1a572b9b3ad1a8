# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains for a given time, and reports memory and open files along the way: both have to stay where they are.

    python benchmarks/soak.py                   # an hour, one process that reads data in two more
    python benchmarks/soak.py --minutes 30 --processes 2

The run is a small one on the bundled digits that writes a checkpoint every 50 steps and keeps two, validates, draws
samples and logs to tensorboard: whatever a long run does, often. Measured every ten seconds, over all processes of the
run: resident memory (what several share counts once), file descriptors, threads. The beginning, in which buffers grow
to their size and the first validation loads what draws, is left out: 200 steps, and a tenth of the time. Linux only.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_lsep.py"
INTERVAL = 10.0
VALIDATION_STEPS = 200


def start(folder: Path, processes: int, workers: int) -> subprocess.Popen:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = ["--output_dir", folder / "run", "--max_train_steps", 10_000_000, "--lr_scheduler", "constant"]
    flags += ["--num_layers", 2, "--probe_depth", 1, "--train_batch_size", 32 // processes, "--logging_steps", 10]
    flags += ["--checkpointing_steps", 50, "--checkpoints_total_limit", 2, "--dataloader_num_workers", workers]
    flags += ["--validation_steps", VALIDATION_STEPS, "--validation_inference_steps", 5, "--num_validation_images", 1]
    flags += ["--num_cpu_threads", 1, "--report_to", "tensorboard"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w") as log:
        command = [str(part) for part in [*launcher, SCRIPT, *flags]]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def measure(root: psutil.Process, folder: Path) -> dict[str, float]:
    """What all processes of a run use now."""
    memory = descriptors = threads = count = 0
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            memory += process.memory_full_info().pss
            descriptors += process.num_fds()
            threads += process.num_threads()
            count += 1
    metrics = folder / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    step = json.loads(lines[-1])["step"] if lines else 0
    return {"step": step, "mib": memory / 2**20, "descriptors": descriptors, "threads": threads, "processes": count}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--dataloader_num_workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/soak.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = start(folder, args.processes, args.dataloader_num_workers)
        try:
            root, rows = psutil.Process(run.pid), []
            while run.poll() is None and measure(root, folder)["step"] == 0:
                time.sleep(1)
            begin = time.monotonic()
            while run.poll() is None and time.monotonic() - begin < 60 * args.minutes:
                rows.append({"seconds": time.monotonic() - begin, **measure(root, folder)})
                time.sleep(INTERVAL)
            if run.poll() is not None:
                raise RuntimeError(f"the run ended with {run.returncode}:\n{(folder / 'log').read_text()[-3000:]}")
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait()
    settled = [row for row in rows if row["seconds"] >= 6 * args.minutes and row["step"] > VALIDATION_STEPS]
    if not settled:
        raise RuntimeError(
            f"{args.minutes:g} minutes are too few: the first validation, at {VALIDATION_STEPS}, is not over"
        )
    part = max(1, len(settled) // 10)
    report = {"minutes": args.minutes, "steps": rows[-1]["step"], "processes": rows[-1]["processes"]}
    for what in ("mib", "descriptors", "threads"):
        first, last = ([row[what] for row in some] for some in (settled[:part], settled[-part:]))
        values = [row[what] for row in settled]
        report[what] = {
            "first": statistics.median(first),
            "last": statistics.median(last),
            "least": min(values),
            "most": max(values),
        }
        print(f"{what:12} " + "  ".join(f"{name} {value:,.0f}" for name, value in report[what].items()))
    print(f"{report['steps']:,} steps in {args.minutes:g} minutes, {report['processes']} processes")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
