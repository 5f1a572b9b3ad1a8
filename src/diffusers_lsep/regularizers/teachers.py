# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Where regularizers get tokens from that they are to agree with: models that are not being trained.

They are no part of [`LSEPObjective`], and are asked before it is called. So nothing wraps, shards or compiles them,
and their weights are in no checkpoint and in no average.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from ..transformer_sit import SiTTransformer2DModel


class Teacher:
    """
    The tokens of a transformer, without gradient.

    Args:
        transformer ([`SiTTransformer2DModel`]): The model.
    """

    def __init__(self, transformer: SiTTransformer2DModel):
        self.transformer = transformer

    def to(self, device: torch.device | str) -> "Teacher":
        """Moves the model to a device, and returns this."""
        self.transformer.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, depth: int
    ) -> torch.Tensor:
        """The tokens `[B, N, D]` after `depth` blocks."""
        tokens = self.transformer.hidden_states_at(noisy_latents, timesteps, class_labels, depth)
        assert isinstance(tokens, torch.Tensor)  # a list for several depths
        return tokens


class AverageTeacher(Teacher):
    """
    The tokens that a transformer in training has with the average of its weights. It keeps no copy of these. Where
    they are sharded, those that are needed are put together for each call, by all processes in step.

    Args:
        transformer ([`SiTTransformer2DModel`]): The model, before anything wraps or shards it.
        weights (`Callable`): Gives the weights in use, by their names.
    """

    def __init__(self, transformer: SiTTransformer2DModel, weights: Callable[[], dict[str, torch.Tensor]]):
        # Its modules without its weights: a copy in which each has become a tensor without memory.
        without_memory = {
            id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            for parameter in transformer.parameters()
        }
        super().__init__(copy.deepcopy(transformer, without_memory).eval())
        self.weights = weights

    @torch.no_grad()
    def __call__(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, depth: int
    ) -> torch.Tensor:
        unused = tuple(f"transformer_blocks.{i}." for i in range(depth, self.transformer.config.num_layers))
        weights = {
            f"transformer.{name}": weight.full_tensor() if isinstance(weight, DTensor) else weight
            for name, weight in self.weights().items()
            if not name.startswith((*unused, "norm_out.", "proj_out."))
        }
        inputs = (noisy_latents, timesteps, class_labels, depth)
        return torch.func.functional_call(_TokensOf(self.transformer), weights, inputs)


class _TokensOf(nn.Module):
    def __init__(self, transformer: SiTTransformer2DModel):
        super().__init__()
        self.transformer = transformer

    def forward(self, *inputs):
        return self.transformer.hidden_states_at(*inputs)


def load_teacher(name_or_path: str, flag: str) -> Teacher:
    """
    Loads a frozen teacher.

    Args:
        name_or_path (`str`):
            Folder or Hub id of a pipeline, with the averaged weights; or a checkpoint of a run of `train_lsep.py`,
            with the weights that were in training, which the authors of Self-Transcendence use.
        flag (`str`): The flag that names it, for messages.

    Raises:
        `ValueError`: if there is none.
    """
    checkpoint = Path(name_or_path, "model.safetensors")
    try:
        if checkpoint.is_file():
            transformer = SiTTransformer2DModel.from_pretrained(Path(name_or_path, "pipeline", "transformer"))
            prefix = "transformer."
            weights = {k.removeprefix(prefix): v for k, v in load_file(checkpoint).items() if k.startswith(prefix)}
            transformer.load_state_dict(weights)
        else:
            transformer = SiTTransformer2DModel.from_pretrained(
                name_or_path, subfolder="transformer", use_safetensors=True
            )
    except Exception as error:  # A damaged file shows in many ways.
        raise ValueError(f"`{flag}` {name_or_path!r} cannot be loaded: {error}") from error
    return Teacher(transformer.float().eval().requires_grad_(False))
