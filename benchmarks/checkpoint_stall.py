# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""How long training waits for a checkpoint of SiT-B/2: one that is written in the background, and one that is not."""

import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers.training_utils import EMAModel
from pairs import paired_ratio
from safetensors.torch import save_file

from diffusers_lsep import SIT_PRESETS, LSEPObjective, SiTTransformer2DModel
from diffusers_lsep.training.checkpoint_writer import CheckpointWriter
from diffusers_lsep.training.checkpoints import checkpoint_tensors, save_checkpoint


def save_pipeline(folder: Path, weights: dict[str, torch.Tensor]):
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")


def run(pairs: int = 5, preset: str = "SiT-B/2") -> list[dict]:
    objective = LSEPObjective(SiTTransformer2DModel(**SIT_PRESETS[preset]), probe=None)
    optimizer = torch.optim.AdamW(objective.parameters(), fused=True)
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors = checkpoint_tensors(objective, optimizer, EMAModel(objective.parameters()))
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(PartialState(cpu=True), Path(folder), save_pipeline)
        result = paired_ratio(
            lambda: writer.save(1, tensors, {}),
            lambda: save_checkpoint(Path(folder, "checkpoint-1"), tensors, "{}", save_pipeline),
            pairs,
            after=writer.finish,
        )
    gigabytes = sum(value.nbytes for values in tensors.values() for value in values.values()) / 1e9
    return [{"name": f"checkpoint of {gigabytes:.1f} GB: in the background / waited for", "target": None, **result}]
