# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What is killed: every command that writes files, on tiny models and a few images."""

import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from image_folders import save_class_folders
from tiny_models import make_dinov2, make_pipeline, make_vae

from diffusers_lsep import cli
from diffusers_lsep.training import processes


ROOT = Path(__file__).resolve().parents[2]
OUTPUT = "out"

# What differs from run to run: times and memory.
MEASURED = {"seconds_per_step", "images_per_second", "data_wait", "memory_gb"}


@dataclass
class Command:
    """
    A command line, and what is there before it runs.

    Args:
        main (`Callable`): Takes the arguments, in a process of its own.
        arguments (`Sequence`): These; the command runs in a folder of its own, with `OUTPUT` in it.
        prepare (`Callable`): Fills this folder first.
        processes (`int`, defaults to 1): How many run it together.
        always (`Callable`): What has to be so at any moment; takes the folder, and gives what is not.
        environment (`dict`): More of it.
    """

    main: Callable[[list[str]], Any]
    arguments: Sequence[Any]
    prepare: Callable[[Path], None] = lambda folder: None
    processes: int = 1
    always: Callable[[Path], str | None] = lambda folder: None
    environment: dict[str, str] = field(default_factory=dict)


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    script = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.__name__ = "__main__"  # whose errors are the user's
    return script


def make_inputs(folder: Path):
    """Models, images and data that the commands read."""
    names = {index: f"digit {index}" for index in range(10)}
    for name, seed in (("pipeline", 0), ("other-pipeline", 1)):
        make_pipeline(id2label=names, seed=seed, num_layers=1, in_channels=3).save_pretrained(folder / name)
    make_vae(scaling_factor=0.5).save_pretrained(folder / "vae")
    make_dinov2(mlp_ratio=1).save_pretrained(folder / "dinov2")
    save_class_folders(folder / "images", ["a", "b", "c"], [(9, 8)] * 15)
    save_class_folders(folder / "held-out", ["a", "b", "c"], [(9, 8)] * 6)
    rng = np.random.default_rng(0)
    for name in ("samples", "reference"):
        np.savez(folder / f"{name}.npz", arr_0=rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8))
    for step in (1, 2):
        (folder / "run" / f"checkpoint-{step}" / "samples").mkdir(parents=True)
        shutil.copy(folder / "samples.npz", folder / "run" / f"checkpoint-{step}" / "samples")
    make_pipeline(
        id2label={0: "a", 1: "b", 2: "c"}, seed=2, num_layers=2, in_channels=3, num_classes=3
    ).save_pretrained(folder / "base")
    datasets.load_dataset("imagefolder", data_dir=str(folder / "images"))  # `datasets` keeps it in a cache of its own
    datasets.load_dataset("imagefolder", data_dir=str(folder / "held-out"))


class ShardingAccelerator(Accelerator):
    """accelerate leaves FSDP2 out on CPUs, though torch has it there."""

    def __init__(self, **options):
        super().__init__(**options)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # reads the environment
        self.state.fsdp_plugin.set_mixed_precision("fp32")
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def make_commands(inputs: Path) -> dict[str, Command]:
    """All commands by name, on what [`make_inputs`] wrote."""
    sample, encode, train = (load_script(name).main for name in ("sample", "encode_latents", "train_lsep"))
    output = ("--output_dir", OUTPUT)
    overwrite = "--overwrite_output_dir"

    drawn = ("--pretrained_model_name_or_path", inputs / "pipeline", *output, "--num_inference_steps", 2)
    drawn += ("--batch_size", 2)
    encoded = ("--train_data_dir", inputs / "images", *output, "--pretrained_vae_model_name_or_path", inputs / "vae")
    encoded += ("--resolution", 8, "--batch_size", 4, "--shard_size", 6, "--dataloader_num_workers", 0, "--flip")
    converted = ("convert", "--checkpoint", ROOT / "tests" / "reference" / "lsep_tiny.pt", "--num_attention_heads", 4)
    converted += (*output, "--vae", inputs / "vae")
    evaluated = ("--reference", inputs / "reference.npz", "--metrics", "fd_dinov2", *output, "--cache_dir", "cache")
    evaluated += ("--dinov2_model", inputs / "dinov2", "--batch_size", 4)
    probed = ("probe", inputs / "pipeline", "--data", inputs / "images", "--validation_data", inputs / "held-out")
    probed += ("--method", "ridge", "--timesteps", 0, 0.5, *output)
    space = ("space", "--pretrained_model_name_or_path", inputs / "pipeline", *output)

    trained = ("--train_data_dir", inputs / "images", *output, "--resolution", 8, "--max_train_steps", 5)
    trained += ("--checkpointing_steps", 2, "--logging_steps", 1, "--report_to", "none", "--num_cpu_threads", 1)
    trained += ("--validation_steps", 3, "--validation_inference_steps", 2, "--num_validation_images", 1)
    trained += ("--checkpoints_total_limit", 1, "--ema_decay", 0.9)
    resumed = ("--resume_from_checkpoint", "latest")
    model = ("--patch_size", 2, "--num_layers", 2, "--num_attention_heads", 2, "--attention_head_dim", 4)
    model += ("--probe_depth", 1, "--crop_size_min", 2)
    one, two = ("--train_batch_size", 4), ("--train_batch_size", 2)
    repa = ("--repa_encoder", inputs / "dinov2", "--repa_depth", 1)
    stream = ("--streaming", "--num_train_images", 15)
    snapshots = ("--post_hoc_ema_sigmas", 0.05, 0.1, "--post_hoc_ema_steps", 2)
    fsdp2 = {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    fsdp2 |= {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_TRANSFORMER_CLS_TO_WRAP": "SiTTransformerBlock"}

    def train_sharded(arguments: list[str]):
        processes.Accelerator = ShardingAccelerator
        return train(arguments)

    def with_samples(folder: Path):
        write(sample, folder, *drawn, "--num_images", 3, "--save_images", "--seed", 1)

    def with_pipeline(folder: Path):
        write(cli.main, folder, *converted, "--weights", "model")

    def with_card(folder: Path):
        shutil.copytree(inputs / "pipeline", folder / "pipeline")

    def with_results(folder: Path):
        write(cli.main, folder, "evaluate", inputs / "reference.npz", *evaluated)

    def with_space(folder: Path):
        write(cli.main, folder, *space)

    def with_run(folder: Path):
        write(train, folder, *trained, *model, *one, "--seed", 1)

    def with_snapshots(folder: Path):
        write(train, folder, *trained, *model, *one, *snapshots)
        (folder / OUTPUT).rename(folder / "run")

    def loses_pipeline(folder: Path) -> str | None:
        return find_missing(folder / OUTPUT, "model_index.json", "transformer/*.safetensors", "vae/*.safetensors")

    def loses_space(folder: Path) -> str | None:
        return find_missing(folder / OUTPUT, "app.py", "README.md", "model/transformer/*.safetensors")

    return {
        "sample": Command(sample, (*drawn, "--num_images", 5, "--save_images")),
        "sample-grid": Command(sample, (*drawn, "--class_labels", 3, "digit 7", "--num_images_per_class", 2)),
        "sample-overwrite": Command(
            sample, (*drawn, "--num_images", 4, "--save_images", overwrite), prepare=with_samples
        ),
        "encode": Command(encode, encoded),
        "encode-images": Command(encode, (*encoded, "--keep_images", "--dtype", "fp32", "--unconditional")),
        "convert": Command(cli.main, converted),
        "convert-overwrite": Command(cli.main, (*converted, overwrite), with_pipeline, always=loses_pipeline),
        "convert-with-code": Command(cli.main, (*converted, "--with_code", "--max_shard_size", "20KB")),
        "ema": Command(cli.main, ("ema", "run", "--sigma_rel", 0.1, *output), with_snapshots),
        "evaluate": Command(cli.main, ("evaluate", inputs / "samples.npz", *evaluated)),
        "evaluate-overwrite": Command(
            cli.main, ("evaluate", inputs / "samples.npz", *evaluated, overwrite), with_results
        ),
        "evaluate-card": Command(
            cli.main, ("evaluate", inputs / "samples.npz", *evaluated, "--update_card", "pipeline"), with_card
        ),
        "evaluate-checkpoints": Command(cli.main, ("evaluate", "--checkpoints", inputs / "run", *evaluated)),
        "probe": Command(cli.main, probed),
        "space": Command(cli.main, space),
        "space-overwrite": Command(
            cli.main,
            (*space[:2], inputs / "other-pipeline", *output, overwrite, "--title", "Other"),
            with_space,
            always=loses_space,
        ),
        "train": Command(train, (*trained, *model, *one, *resumed)),
        "train-overwrite": Command(train, (*trained, *model, *one, overwrite), with_run),
        "train-lora": Command(
            train,
            (*trained, *one, *resumed, "--pretrained_model_name_or_path", inputs / "base", "--lora_rank", 2)
            + ("--probe_depth", 1),
        ),
        "train-repa": Command(train, (*trained, *model, *one, *resumed, *repa)),
        "train-snapshots": Command(train, (*trained, *model, *one, *resumed, *snapshots)),
        "train-streaming": Command(train, (*trained, *model, *one, *resumed, *stream)),
        "train-two-processes": Command(train, (*trained, *model, *two, *resumed), processes=2),
        "train-fsdp2": Command(train_sharded, (*trained, *model, *two, *resumed), processes=2, environment=fsdp2),
    }


def write(main: Callable[[list[str]], Any], folder: Path, *arguments: Any):
    """Runs a command, to have something there for another one."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        main(list(map(str, arguments)))
    finally:
        os.chdir(before)


def find_missing(folder: Path, *patterns: str) -> str | None:
    missing = [pattern for pattern in patterns if not list(folder.glob(pattern))]
    return f"there is no {missing[0]} in {folder.name}" if missing else None


def read_files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and content of all files and folders, but for what was measured."""
    return dict(_read_files(folder))


def _read_files(folder: Path) -> Iterator[tuple[str, tuple[int, bytes]]]:
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in content.splitlines()]
            lines = [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]
            content = json.dumps(lines).encode()
        elif path.name == "README.md":  # a model card says how long it took
            content = re.sub(rb" in \d+ (minutes|hours) on [^\n]+", b"", content)
        elif path.suffix == ".safetensors":  # whose metadata have no fixed order
            size = 8 + int.from_bytes(content[:8], "little")
            content = json.dumps(json.loads(content[8:size]), sort_keys=True).encode() + content[size:]
        yield str(path.relative_to(folder)), (path.stat().st_mode & 0o777, content)
