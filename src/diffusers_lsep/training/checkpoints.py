# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of training: complete or absent, free of pickles, and enough to continue bit for bit.

checkpoint-1000/
    model.safetensors        the weights in training, transformer and probe
    optimizer.safetensors    AdamW's moments, by parameter
    training_state.json      step, learning rates, loss scale, settings
    pipeline/                the averaged weights, for `DiffusionPipeline.from_pretrained`, with `probe/`
    average.safetensors      those of them that no pipeline has, if there are any: heads of regularizers, LoRA layers
    post_hoc_ema.safetensors the averages of `--post_hoc_ema_sigmas`, as `{sigma_rel}.{name}`, if there are any
    manifest.json            size and SHA-256 of every other file
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from ..files import hash_file, whole_folder
from ..objective import LinearProbe, LSEPObjective
from ..transformer_sit import SiTTransformer2DModel


MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
AVERAGE_FILE = "average.safetensors"
POST_HOC_EMA_FILE = "post_hoc_ema.safetensors"
STATE_FILE = "training_state.json"
PIPELINE_FOLDER = "pipeline"
MANIFEST_FILE = "manifest.json"


def remove_leftovers(folder: Path):
    """Deletes what a killed run left half-written in its output folder."""
    for pattern in (".checkpoint-*", ".pipeline*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def checkpoint_tensors(
    objective: LSEPObjective,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None = None,
    post_hoc_ema: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """
    The tensors that a checkpoint keeps, by file and name: those in training themselves, in parts where sharded.

    Args:
        objective ([`LSEPObjective`]): Transformer and probe.
        optimizer (`torch.optim.Optimizer`): AdamW on the objective's parameters.
        ema (`EMAModel`, *optional*): The average of the objective's trained parameters, in their order.
        post_hoc_ema (`Mapping`, *optional*): The averages of `--post_hoc_ema_sigmas`, by name.
    """
    return {
        MODEL_FILE: objective.state_dict(),
        OPTIMIZER_FILE: _optimizer_tensors(objective, optimizer),
        AVERAGE_FILE: named_averages(objective, ema) if ema is not None else {},
        POST_HOC_EMA_FILE: dict(post_hoc_ema or {}),
    }


def save_checkpoint(
    folder: Path,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: str,
    save_pipeline: Callable[[Path, dict[str, torch.Tensor]], None],
):
    """
    Writes a checkpoint.

    Args:
        folder (`Path`): Where; replaced if it exists.
        tensors (`dict[str, dict[str, torch.Tensor]]`): Of [`checkpoint_tensors`], whole.
        state (`str`): Whatever else there is to remember, as JSON.
        save_pipeline (`Callable`):
            Is given a folder, and the averaged weights of the objective by name, with those that are not averaged, to
            save as a pipeline with a `probe/`.
    """
    average = tensors[AVERAGE_FILE]
    files = {**tensors, AVERAGE_FILE: {k: v for k, v in average.items() if not _is_in_pipeline(k)}}
    with whole_folder(folder) as partial:
        for name, values in files.items():
            if values or name not in (AVERAGE_FILE, POST_HOC_EMA_FILE):
                save_file({k: v.detach().contiguous() for k, v in values.items()}, partial / name)
        (partial / STATE_FILE).write_text(state, encoding="utf-8")
        save_pipeline(partial / PIPELINE_FOLDER, {**tensors[MODEL_FILE], **average})
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {path.relative_to(partial).as_posix(): [path.stat().st_size, hash_file(path)] for path in paths}
        (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(
    folder: Path,
    objective: LSEPObjective,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    post_hoc_ema: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """
    Restores a checkpoint into the objects that training uses.

    Args:
        folder (`Path`): The checkpoint, which [`find_damage`] found whole.
        objective ([`LSEPObjective`]): Transformer and probe.
        optimizer (`torch.optim.Optimizer`): AdamW on the objective's parameters.
        ema (`EMAModel`, *optional*): The average of the objective's trained parameters, in their order.
        post_hoc_ema (`Mapping`, *optional*): The averages of `--post_hoc_ema_sigmas`, by name, to be filled.

    Returns:
        `dict`: the `state` that was given to [`save_checkpoint`].
    """
    current = objective.state_dict()
    weights = load_file(folder / MODEL_FILE)
    objective.load_state_dict({k: _shard_like(v, current[k]) if k in current else v for k, v in weights.items()})

    states: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / OPTIMIZER_FILE).items():
        name, _, slot = key.rpartition(".")
        states.setdefault(name, {})[slot] = tensor
    by_index = {}
    for index, name in enumerate(_names(objective, optimizer)):
        if name in states:
            by_index[index] = {slot: _shard_like(value, current[name]) for slot, value in states[name].items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": by_index})

    if ema is not None:
        average = dict(
            SiTTransformer2DModel.from_pretrained(folder / PIPELINE_FOLDER / "transformer").named_parameters(
                "transformer"
            )
        )
        if objective.probe is not None:
            average |= LinearProbe.from_pretrained(folder / PIPELINE_FOLDER / "probe").named_parameters("probe")
        if (folder / AVERAGE_FILE).exists():
            average |= load_file(folder / AVERAGE_FILE)
        for name, shadow in named_averages(objective, ema).items():
            shadow.copy_(_shard_like(average[name].detach(), shadow))
    if post_hoc_ema:
        averages = load_file(folder / POST_HOC_EMA_FILE)
        for name, tensor in post_hoc_ema.items():
            tensor.copy_(_shard_like(averages[name], tensor))
    return read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` that was given to [`save_checkpoint`]."""
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def find_damage(folder: Path) -> str | None:
    """Compares a checkpoint with its manifest. Returns what is wrong with it, or None."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{MANIFEST_FILE} cannot be read: {error}"
    for name, (size, digest) in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes in place of {size}"
        if hash_file(path) != digest:
            return f"{name} has changed since it was written"
    return None


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """The steps and folders of all checkpoints, damaged ones included, oldest first."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def choose_checkpoint(output_dir: Path, resume_from_checkpoint: str, report: Callable[[str], None]) -> Path | None:
    """
    Finds the checkpoint to continue from.

    Args:
        output_dir (`Path`): Folder of the run.
        resume_from_checkpoint (`str`):
            A checkpoint's folder or its name inside `output_dir`, or `"latest"`: the newest one that is not damaged.
        report (`Callable`): Is told which checkpoints are damaged.

    Returns:
        `Path` or None: the checkpoint; None if the latest of none is asked for.

    Raises:
        `ValueError`: if there is no such checkpoint, it is damaged, or all are.
    """
    if resume_from_checkpoint != "latest":
        folder = Path(resume_from_checkpoint)
        folder = folder if folder.is_dir() else output_dir / resume_from_checkpoint
        damage = find_damage(folder) if folder.is_dir() else "there is no such folder"
        if damage:
            raise ValueError(f"`resume_from_checkpoint` {resume_from_checkpoint!r} cannot be used: {damage}.")
        return folder

    checkpoints = list_checkpoints(output_dir)
    for _, folder in reversed(checkpoints):
        damage = find_damage(folder)
        if damage is None:
            return folder
        report(f"Skipping {folder}, which is damaged: {damage}.")
    if checkpoints:
        raise ValueError(f"`resume_from_checkpoint`: all checkpoints in {str(output_dir)!r} are damaged.")
    return None


def remove_old_checkpoints(output_dir: Path, total_limit: int | None, milestone_steps: int | None):
    """Keeps the newest `total_limit` checkpoints, and besides them those at multiples of `milestone_steps`."""
    ordinary = [
        path for step, path in list_checkpoints(output_dir) if not (milestone_steps and step % milestone_steps == 0)
    ]
    for path in ordinary[: -total_limit if total_limit is not None else 0]:
        # Out of sight first: a half-removed checkpoint would look like a damaged one.
        path = path.rename(path.with_name(f".{path.name}.old"))
        shutil.rmtree(path, ignore_errors=True)


# By hand, though it gives the same files: `torch.distributed.checkpoint.state_dict` accepts a whole file that lacks a
# weight, has an optimizer without state make a step (also to load one, which needs three times the parameters' memory
# for a while, and which a loss scaler refuses), and does not know the average, which needs the functions below anyway.
def _names(objective: LSEPObjective, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters in the order in which the optimizer numbers them."""
    name_of = {parameter: name for name, parameter in objective.named_parameters()}
    return [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def named_averages(objective: LSEPObjective, ema: EMAModel) -> dict[str, torch.Tensor]:
    """The average of the trained parameters, by their names."""
    names = [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
    return dict(zip(names, ema.shadow_params, strict=True))


def _shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, if `like` is such a part (and the tensor no scalar beside it)."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def _is_in_pipeline(name: str) -> bool:
    return name.startswith(("transformer.", "probe.")) and ".lora_" not in name


def _optimizer_tensors(objective: LSEPObjective, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    states = optimizer.state_dict()["state"]
    return {
        f"{name}.{slot}": value
        for index, name in enumerate(_names(objective, optimizer))
        for slot, value in states.get(index, {}).items()
    }
