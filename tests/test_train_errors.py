# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Errors in one of two processes that no launcher watches: the other neither waits for ever nor goes on alone."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
from tiny_run import TINY_MODEL, TINY_RUN

from diffusers_lsep.training.log import read_metrics


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_lsep.py"

STARTED = """
import importlib.util, os, sys

from diffusers_lsep.command_line import run_script
from diffusers_lsep.data.images import ImageSource
from diffusers_lsep.data.stream import SampleStream
from diffusers_lsep.training.trainer import Trainer

spec = importlib.util.spec_from_file_location("train_lsep", sys.argv[1])
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

def fail(*arguments):
    raise RuntimeError("as planned")

if sys.argv[2] == "checkpoints":  # which the first process writes
    Trainer.save_average = fail
elif os.environ["RANK"] == "1":
    SampleStream.held_out_batch = fail
    ImageSource.fingerprint = fail  # which the first process alone takes
run_script(lambda: script.main(sys.argv[3:]))
"""


def train(python: Path, tmp_path: Path, what: str, *flags: object) -> list[tuple[int, str]]:
    """Runs the script in two processes, in one of which `what` fails; their exit codes, and what they said."""
    (tmp_path / "started.py").write_text(STARTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, tmp_path / "started.py", SCRIPT, what, *TINY_MODEL, *TINY_RUN, *flags]
    command += ["--output_dir", tmp_path / "run"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, said)]


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_both(tmp_path, warm_python):
    for code, said in train(warm_python, tmp_path, "checkpoints", "--max_train_steps", 100_000):
        assert code == 2 and "checkpoint-2 could not be written (as planned); the last good checkpoint" in said, said


@pytest.mark.slow
def test_held_out_images_that_cannot_be_measured_on_end_neither(tmp_path, warm_python):
    ended = train(warm_python, tmp_path, "held-out images", "--validation_split", 0.05, "--validation_steps", 2)
    assert [code for code, _ in ended] == [0, 0], ended
    assert "No held-out losses of step 2: as planned" in ended[0][1]
    assert "RuntimeError" in (tmp_path / "run" / "samples" / "step-4-error.txt").read_text()
    assert (tmp_path / "run" / "samples" / "step-4.png").is_file()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert not any(name.startswith("validation_") for line in lines for name in line)
