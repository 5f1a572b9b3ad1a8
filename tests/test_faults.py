# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""A part of `faults/run.py`: kills and full disks at a few points of every command."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


DRIVER = Path(__file__).parent / "faults" / "run.py"
COMMANDS = [
    *("sample", "sample-grid", "sample-overwrite", "encode", "convert", "convert-overwrite", "evaluate"),
    *("evaluate-card", "evaluate-checkpoints", "probe", "space", "space-overwrite"),
]
TRAINING = ["train", "train-overwrite", "train-lora", "train-repa", "train-streaming", "train-two-processes"]


def run_driver(*arguments: object) -> tuple[str, int]:
    """What it says at its end, and of how many points."""
    command = [sys.executable, DRIVER, *arguments]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    summary = result.stdout.splitlines()[-1]
    assert summary.endswith("0 lost, 0 refused, 0 left over")
    return summary, int(summary.split()[0])


@pytest.mark.slow
def test_killed_commands_finish_when_they_run_again():
    _, count = run_driver(*COMMANDS, "--points", 2)
    assert count >= 2 * len(COMMANDS)


@pytest.mark.slow
def test_killed_training_finishes_when_it_runs_again():
    _, count = run_driver(*TRAINING, "--points", 1)
    assert count >= len(TRAINING)


@pytest.mark.slow
def test_full_disks_end_in_one_line_and_nothing_half_written():
    summary, count = run_driver("sample", "encode", "convert-overwrite", "evaluate", "probe", "train", "--disks", 3)
    too_small = re.search(r"disks, (\d+) too small", summary)
    assert count == 18 and int(too_small[1]) > 6
