# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs of `examples/train_lsep.py` that are killed and continued, on one process and on two."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from image_folders import save_class_folders
from safetensors.torch import load_file

from diffusers_lsep.training.checkpoints import find_damage, list_checkpoints
from diffusers_lsep.training.log import read_metrics


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_lsep.py"

# Epochs of 2.5 steps, so that the end of an epoch, the middle of one and the checkpoints all fall on different steps.
NUM_IMAGES, SAMPLES_PER_STEP, STEPS = 20, 8, 36
UNREADABLE = {"a/6.png", "b/10.png"}  # replaced by the same ones, whoever comes upon them
FLAGS = [
    *("--resolution", "8", "--patch_size", "2", "--num_layers", "2", "--num_attention_heads", "2"),
    *("--attention_head_dim", "8", "--probe_depth", "1", "--crop_size_min", "2", "--random_flip"),
    *("--learning_rate", "1e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "5", "--ema_decay", "0.9"),
    *("--checkpointing_steps", "7", "--checkpoints_total_limit", "2", "--logging_steps", "1", "--report_to", "none"),
    *("--validation_steps", "15", "--validation_split", "0.2", "--validation_inference_steps", "2"),
    *("--num_validation_images", "1", "--num_cpu_threads", "1", "--max_errors", "2"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    sizes = [(9, 8)] * (NUM_IMAGES * 5 // 4)  # a fifth is held out
    folder = save_class_folders(tmp_path_factory.mktemp("images"), ["a", "b", "c"], sizes)
    for name in UNREADABLE:
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    return folder


def start(processes: int, images: Path, run: Path, *flags: object, python: Path | str) -> subprocess.Popen:
    launcher = [python]
    if processes > 1:
        # `accelerate launch --cpu --num_processes 2` starts a single process.
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    # What is given last wins.
    flags = ["--train_batch_size", SAMPLES_PER_STEP // processes, "--max_train_steps", STEPS, *flags]
    command = [*launcher, SCRIPT, *FLAGS, "--train_data_dir", images, "--output_dir", run, *flags]
    log = open(run.with_suffix(".log"), "a")  # noqa: SIM115, the process writes into it
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([str(part) for part in command], stdout=log, stderr=log, env=environment)


def kill(process: subprocess.Popen):
    """SIGKILL for a run: its process, and the launcher's children if there is one."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    process.wait(timeout=30)


def finish(process: subprocess.Popen, run: Path):
    try:
        process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        kill(process)
    assert process.returncode == 0, run.with_suffix(".log").read_text()[-3000:]


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return read_metrics(path)[-1]["step"] if path.exists() and path.stat().st_size else 0


def kill_after(process: subprocess.Popen, run: Path, step: int):
    """Kills a run once a step was logged."""
    while steps_logged(run) < step:
        assert process.poll() is None, run.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.01)
    kill(process)


@pytest.mark.slow
@pytest.mark.parametrize("processes, kill_at", [(1, 19), (2, 23)])
def test_a_killed_run_ends_with_the_same_bits(images, tmp_path, warm_python, processes, kill_at):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(processes, images, whole, python=warm_python), whole)

    kill_after(start(processes, images, killed, python=sys.executable), killed, kill_at)
    assert kill_at <= steps_logged(killed) < STEPS and not (killed / "model_index.json").exists()
    checkpoints = list_checkpoints(killed)
    assert checkpoints and all(find_damage(folder) is None for _, folder in checkpoints)
    resume = ("--resume_from_checkpoint", "latest")
    finish(start(processes, images, killed, *resume, python=warm_python), killed)

    for run in (whole, killed):
        settings = json.loads((run / "training_args.json").read_text())
        assert settings["processes"] == processes and settings["samples_per_step"] == SAMPLES_PER_STEP
        listed = [json.loads(line)["id"] for line in (run / "unreadable.jsonl").read_text().splitlines()]
        assert sorted(listed) == sorted(str(images / name) for name in UNREADABLE)
    last = f"checkpoint-{STEPS}"
    files = [path.relative_to(whole) for path in (whole / last).rglob("*.safetensors")]
    files += [Path("transformer", "diffusion_pytorch_model.safetensors"), Path("samples", f"step-{STEPS}.png")]
    files += [Path("probe", "diffusion_pytorch_model.safetensors"), Path("samples", "step-30.png")]
    assert len(files) == 8
    for file in files:
        assert (whole / file).read_bytes() == (killed / file).read_bytes(), file
    assert (
        json.loads((whole / last / "training_state.json").read_text())["lr_scheduler"]
        == (json.loads((killed / last / "training_state.json").read_text())["lr_scheduler"])
    )

    # The log of the continued run has each step once, and the same numbers but for times and memory.
    one, other = (read_metrics(run / "metrics.jsonl") for run in (whole, killed))
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for name in ("loss", "probe_accuracy", "grad_norm", "validation_probe_loss", "learning_rate"):
        assert [line.get(name) for line in one] == [line.get(name) for line in other]


@pytest.mark.slow
@pytest.mark.parametrize("probe", [[], ["--coupled_dropout", "--probe_fraction", "0.3"]])
def test_two_processes_see_the_samples_of_one(images, tmp_path, warm_python, probe):
    """A run continued on another number of processes, or with accumulation, has the same gradients."""
    start_run, step = tmp_path / "start", 4
    flags = [*probe, "--max_train_steps", step, "--lr_scheduler", "constant", "--learning_rate", "1e-2"]
    flags += ["--max_grad_norm", "1e9"]
    finish(start(1, images, start_run, *flags, python=warm_python), start_run)
    checkpoint = start_run / f"checkpoint-{step}"
    before = load_file(checkpoint / "optimizer.safetensors")

    flags += ["--resume_from_checkpoint", checkpoint, "--max_train_steps", step + 1]
    runs = {
        "one": (1, []),
        "two": (2, []),
        "accumulated": (1, ["--train_batch_size", SAMPLES_PER_STEP // 4, "--gradient_accumulation_steps", 4]),
    }
    gradients = {}
    for name, (processes, more) in runs.items():
        run = tmp_path / name
        finish(start(processes, images, run, *flags, *more, python=warm_python), run)
        assert json.loads((run / "training_args.json").read_text())["processes"] == processes
        after = load_file(run / f"checkpoint-{step + 1}" / "optimizer.safetensors")
        # AdamW's first moment is 0.9 times the old one and 0.1 times the gradient.
        gradients[name] = {key: (after[key] - 0.9 * before[key]) * 10 for key in after if key.endswith(".exp_avg")}
    # The bias of the keys has no gradient but rounding: the softmax does not see it.
    names = [name for name in gradients["one"] if "to_k.bias" not in name]
    assert len(names) > 20
    for variant in ("two", "accumulated"):
        for name in names:
            expected = gradients["one"][name]
            error = torch.linalg.vector_norm(gradients[variant][name] - expected)
            assert error < 1e-5 * torch.linalg.vector_norm(expected), (variant, name)
