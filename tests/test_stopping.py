# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Signals to what has started a run (a launcher, Slurm, a shell): a checkpoint, and no process left over."""

import importlib.util
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_run import TINY_MODEL, TINY_RUN
from torch.distributed.run import get_args_parser

from diffusers_lsep.training.checkpoints import find_damage, list_checkpoints
from diffusers_lsep.training.stopping import outlive_signals


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_lsep.py"
LAUNCHERS_MODULE = importlib.util.find_spec("diffusers_lsep").submodule_search_locations[0] + "/launchers.py"

TIME_TO_END = 300  # seconds, on a machine that may be busy

ONE = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
STARTED_BY = {
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *ONE],
    "accelerate on two": [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}
STARTED_BY["accelerate on two"] += ONE[2:]
PASSES_SIGUSR1_ON = hasattr(
    get_args_parser().parse_args(["script.py"]), "signals_to_handle"
)  # newer versions of torch


def wait_until(condition, seconds=600):  # a machine may be busy
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_of(run: Path) -> list[psutil.Process]:
    """Whatever has the folder on its command line: launchers, and what they have launched."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if any(str(run) in word for word in process.info["cmdline"] or [])]


@pytest.mark.slow
@pytest.mark.parametrize(
    "started_by, number, to_group, workers, codes, stopped_by",
    [
        ("accelerate", signal.SIGUSR1, False, 0, (-signal.SIGUSR1,), "SIGTERM"),
        ("accelerate", signal.SIGINT, True, 1, (-signal.SIGINT, 1), "SIGINT"),
        (
            *("accelerate on two", signal.SIGUSR1, False, 0),
            *(((1,), "SIGUSR1") if PASSES_SIGUSR1_ON else ((-signal.SIGUSR1,), "SIGTERM")),
        ),
        ("torchrun", signal.SIGTERM, False, 1, (1,), "SIGTERM"),
        ("torchrun", signal.SIGKILL, False, 0, (-signal.SIGKILL,), "SIGTERM"),
    ],
)
def test_a_signal_to_the_launcher(tmp_path, started_by, number, to_group, workers, codes, stopped_by):
    """A checkpoint of what was trained, the exit code that docs/reliability.md has, and no process left over."""
    run = tmp_path / "run"
    command = [*STARTED_BY[started_by], SCRIPT, *TINY_MODEL, *TINY_RUN, "--max_train_steps", 100_000]
    command += ["--checkpointing_steps", 100_000, "--dataloader_num_workers", workers, "--output_dir", run]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    settings["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGUSR1"
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env={**os.environ, **settings}, start_new_session=True
        )
    try:
        wait_until(lambda: (run / "metrics.jsonl").exists() or launcher.poll() is not None)
        (os.killpg if to_group else os.kill)(launcher.pid, number)
        assert launcher.wait(timeout=600) in codes
        wait_until(lambda: not processes_of(run))
    finally:
        for process in processes_of(run):
            process.kill()
    said = (tmp_path / "log").read_text()
    # The process that tells it may hear of the signal from another one first.
    assert re.search(f"Stopped by ({stopped_by}|a signal) after step", said), said[-3000:]
    [(step, checkpoint)] = list_checkpoints(run)
    assert step > 0 and find_damage(checkpoint) is None
    assert sorted(path.name for path in run.glob(".*")) == []


@pytest.mark.slow
def test_ctrl_c_also_ends_the_tee_behind_a_run(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, SCRIPT, *TINY_MODEL, *TINY_RUN, "--max_train_steps", 100_000, "--output_dir", run]
    shell = subprocess.Popen(
        ["bash", "-c", f"{' '.join(map(str, command))} 2>&1 | tee {tmp_path / 'log'}"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        start_new_session=True,
    )
    try:
        wait_until(lambda: (run / "metrics.jsonl").exists() or shell.poll() is not None)
        os.killpg(shell.pid, signal.SIGINT)
        wait_until(lambda: not processes_of(run))
    finally:
        for process in processes_of(run):
            process.kill()
    assert list_checkpoints(run)[-1][0] > 0 and not list(run.glob(".*"))


@pytest.mark.slow
def test_an_error_ends_a_run_with_workers(tmp_path):
    command = [sys.executable, SCRIPT, *TINY_MODEL, *TINY_RUN, "--max_train_steps", 100_000, "--learning_rate", 1e30]
    command += ["--dataloader_num_workers", 1, "--output_dir", tmp_path / "run"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    try:
        result = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=TIME_TO_END
        )
    finally:
        left = processes_of(tmp_path / "run")
        for process in left:
            process.kill()
    assert result.returncode == 1 and not left
    assert re.search(r"error: the .* of step \d+ is (inf|nan); the last good checkpoint", result.stderr)


def sleep_in_a_worker(ready):
    outlive_signals(0)
    ready.set()
    time.sleep(TIME_TO_END)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="who has sent a signal is not known there")
def test_a_worker_heeds_its_own_run_alone():
    context = multiprocessing.get_context("fork")  # as loaders of data do
    ready = context.Event()
    worker = context.Process(target=sleep_in_a_worker, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(TIME_TO_END)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        subprocess.run(["/bin/sh", "-c", f"kill -{number} {worker.pid}"], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(TIME_TO_END)
    assert worker.exitcode == 0


STARTED = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("launchers", sys.argv[1])
launchers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launchers)
launchers.end_with_launcher(interval=0.02)
pathlib.Path(sys.argv[2]).touch()
time.sleep(60)
"""
STARTS = """
import subprocess, sys
subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()
"""


def test_no_thread_is_left_when_a_process_ends(tmp_path):
    program = "import atexit, threading\natexit.register(lambda: print('threads:', threading.active_count()))\n"
    (tmp_path / "started.py").write_text(program + STARTED.replace("time.sleep(60)", ""))
    (tmp_path / "accelerate").write_text(STARTS)
    command = [sys.executable, tmp_path / "accelerate", tmp_path / "started.py", LAUNCHERS_MODULE, tmp_path / "begun"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "threads: 1\n"


@pytest.mark.slow
@pytest.mark.parametrize("name, ends", [("accelerate", True), ("torchrun", True), ("notebook.py", False)])
def test_processes_end_with_their_launcher_alone(tmp_path, monkeypatch, name, ends):
    """Also sample.py and encode_latents.py. Whoever starts a run otherwise may leave, whatever is exported there."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    (tmp_path / name).write_text(STARTS)
    (tmp_path / "started.py").write_text(STARTED)
    begun = tmp_path / "begun"
    launcher = psutil.Popen([sys.executable, tmp_path / name, tmp_path / "started.py", LAUNCHERS_MODULE, begun])
    wait_until(begun.exists)
    [started] = launcher.children()
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs([started], timeout=60 if ends else 0.5)
    assert bool(alive) != ends
    for process in alive:
        process.kill()
