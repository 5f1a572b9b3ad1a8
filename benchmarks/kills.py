# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Kills a training run at random moments, resumes it each time, and compares the end with an uninterrupted run.

    python benchmarks/kills.py                  # 20 kills of one process
    python benchmarks/kills.py --processes 2    # of two

The runs are short ones on the bundled digits. The kill is SIGKILL to all processes of the run, at a time drawn
uniformly from the time that a run is left to itself: also while it starts, writes a checkpoint or draws samples.
"""

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_lsep.py"


def start(folder: Path, steps: int, processes: int) -> subprocess.Popen:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = ["--output_dir", folder, "--max_train_steps", steps, "--checkpointing_steps", 10]
    flags += ["--train_batch_size", 32 // processes, "--num_layers", 2, "--probe_depth", 1, "--report_to", "none"]
    flags += ["--validation_steps", 20, "--validation_inference_steps", 2, "--num_validation_images", 1]
    flags += ["--resume_from_checkpoint", "latest"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [str(part) for part in [*launcher, SCRIPT, *flags, "--num_cpu_threads", 1]]
    with open(f"{folder}.log", "w") as log:  # of the last start, for when it fails
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def kill(process: subprocess.Popen):
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def check(returncode: int, folder: Path):
    """Refuses a run that failed, with what it said."""
    if returncode != 0:
        log = Path(f"{folder}.log").read_text(errors="replace")
        raise RuntimeError(f"the run in {folder.name} ended with {returncode}:\n{log[-4000:]}")


def weights(folder: Path, steps: int) -> dict[str, bytes]:
    last = folder / f"checkpoint-{steps}"
    paths = [*last.rglob("*.safetensors"), folder / "transformer" / "diffusion_pytorch_model.safetensors"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = random.Random(args.seed)

    root = Path(tempfile.mkdtemp())
    try:
        begin = time.perf_counter()
        check(start(root / "whole", args.steps, args.processes).wait(), root / "whole")
        duration = time.perf_counter() - begin
        expected = weights(root / "whole", args.steps)

        kills = runs = 0
        folder = root / "killed"
        while kills < args.kills:
            process = start(folder, args.steps, args.processes)
            try:
                process.wait(timeout=moments.uniform(0, duration))
            except subprocess.TimeoutExpired:
                kill(process)
                kills += 1
                print(f"kill {kills}: {sorted(path.name for path in folder.glob('*'))}", flush=True)
                continue
            check(process.returncode, folder)
            assert weights(folder, args.steps) == expected, "a resumed run ended with other weights"
            runs += 1
            shutil.rmtree(folder)
        if folder.exists():
            check(start(folder, args.steps, args.processes).wait(), folder)
            assert weights(folder, args.steps) == expected, "a resumed run ended with other weights"
            runs += 1
        print(f"{kills} kills in {runs} runs of {args.processes} process(es): all ended with the same bits")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
