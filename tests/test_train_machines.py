# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Several machines: here two launchers on one, each in a folder of its own."""

import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from tiny_run import TINY_MODEL, TINY_RUN

from diffusers_lsep.training.arguments import build_parser


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "train_lsep.py"
CLUSTERS = ROOT / "examples" / "clusters"


def train(python: Path, folders: list[Path], processes: int, steps: int, *flags: object) -> list[tuple[int, str]]:
    """Runs the script with a launcher in each of these folders; their exit codes, and what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launchers = []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        command = [python, "-m", "torch.distributed.run", "--nnodes", len(folders), "--node_rank", rank]
        command += ["--nproc_per_node", processes, "--master_addr", "127.0.0.1", "--master_port", port, SCRIPT]
        command += [*TINY_MODEL, *TINY_RUN, "--output_dir", "run", "--max_train_steps", steps, *flags]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        log = open(folder / "log", "w")  # noqa: SIM115, the process writes into it
        launchers.append(
            subprocess.Popen([str(part) for part in command], cwd=folder, env=environment, stdout=log, stderr=log)
        )
    codes = [launcher.wait(timeout=900) for launcher in launchers]
    return [(code, (folder / "log").read_text(errors="replace")) for code, folder in zip(codes, folders)]


@pytest.mark.slow
def test_two_launchers_are_one_with_two_processes(tmp_path, warm_python):
    """The same bits, where the launchers share the folder of the run and where each has its own."""
    one, first, second = tmp_path / "one", tmp_path / "first", tmp_path / "second"
    [(code, said)] = train(warm_python, [one], 2, 4)
    assert code == 0, said[-3000:]
    assert [code for code, _ in train(warm_python, [first, first], 1, 2)] == [0, 0]

    # The second machine has no checkpoint, and is told so; a copy is enough.
    resume = ["--resume_from_checkpoint", "latest"]
    refused = train(warm_python, [first, second], 1, 4, *resume)
    assert all(code != 0 for code, _ in refused)
    said = refused[1][1]
    assert f"checkpoint-2 is not there on {socket.gethostname()}. All machines have to read it" in said
    shutil.copytree(first / "run" / "checkpoint-2", second / "run" / "checkpoint-2")
    for code, said in train(warm_python, [first, second], 1, 4, *resume):
        assert code == 0, said[-3000:]
    assert [path.name for path in (second / "run").iterdir()] == ["checkpoint-2"]  # the first one writes

    settings = json.loads((first / "run" / "training_args.json").read_text())
    assert settings["processes"] == 2 and settings["samples_per_step"] == 8
    files = sorted(path.relative_to(one) for path in (one / "run" / "checkpoint-4").rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        assert (one / file).read_bytes() == (first / file).read_bytes(), file


def flags_of(command: str) -> list[str]:
    return [word for word in command.replace("\\\n", " ").split() if word.startswith("--")]


def test_the_files_for_clusters():
    """What they run exists; Slurm's own parser and SkyPilot's have read them, but are not installed here."""
    known = {option for action in build_parser("")._actions for option in action.option_strings}
    slurm = (CLUSTERS / "slurm.sbatch").read_text()
    assert subprocess.run(["bash", "-n", CLUSTERS / "slurm.sbatch"]).returncode == 0
    sky = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    assert set(sky) == {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert isinstance(sky["num_nodes"], int) and sky["resources"]["accelerators"] == "H100:8"
    for text in (slurm, sky["run"]):
        command = text[text.index("examples/train_lsep.py") :]
        flags = flags_of(command)
        assert "--resume_from_checkpoint" in flags and set(flags) <= known
        recipe = next(word for word in command.split() if word.startswith("@examples"))
        assert (ROOT / recipe[1:]).is_file()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", slurm, flags=re.MULTILINE))
    processes = int(options["nodes"]) * int(options["ntasks-per-node"])
    assert options["signal"] == "USR1@300" and options["ntasks-per-node"] == options["gpus-per-node"]
    assert processes * int(slurm.split("--train_batch_size ")[1].split()[0]) == 256
    assert "train_batch_size 16" in sky["run"] and sky["num_nodes"] * 8 * 16 == 256
    assert "SKYPILOT_NODE_RANK" in sky["run"] and "SKYPILOT_NODE_IPS" in sky["run"]
