# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Where regularizers get tokens from that they are to agree with: models that are not being trained.

They are no part of [`LSEPObjective`], and are asked before it is called. So nothing wraps, shards or compiles them,
and their weights are in no checkpoint and in no average.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from ..transformer_sit import SiTTransformer2DModel
from .regularizer import RegularizerContext


class Teacher:
    """
    What a transformer says, without gradient.

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

    @torch.no_grad()
    def velocity(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor,
        r_timesteps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The velocity `[B, C, S, S]`; of a flow map, the mean one between two times if there is a second."""
        options = {} if r_timesteps is None else {"r_timestep": r_timesteps}
        return self.transformer(noisy_latents, timesteps, class_labels, **options).sample

    def with_whole_weights(self) -> "Teacher":
        """
        The same with weights that are on this device as a whole, as they are now: for several calls in a step, and for
        derivatives, which cannot go through the collectives that put sharded weights together.
        """
        return self


class WeightsTeacher(Teacher):
    """
    What a transformer in training says with given weights, such as their average. It keeps no copy of these. Where
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
        weights = {f"transformer.{k}": v for k, v in self._gather((*unused, "norm_out.", "proj_out.")).items()}
        inputs = (noisy_latents, timesteps, class_labels, depth)
        return torch.func.functional_call(_TokensOf(self.transformer), weights, inputs)

    @torch.no_grad()
    def velocity(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor,
        r_timesteps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        options = {} if r_timesteps is None else {"r_timestep": r_timesteps}
        inputs = (noisy_latents, timesteps, class_labels)
        return torch.func.functional_call(self.transformer, self._gather(), inputs, options).sample

    @torch.no_grad()
    def with_whole_weights(self) -> "WeightsTeacher":
        weights, whole = self._gather(), copy.copy(self)
        whole.weights = lambda: weights
        return whole

    def _gather(self, but_for: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
        """Whole weights, without those whose names begin like this."""
        # Detached: of a parameter autocast keeps the rounded copy, and in older versions of torch (2.6 is one) that
        # which is made here, without gradient, would serve the pass that has to have it.
        return {
            name: weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()
            for name, weight in self.weights().items()
            if not name.startswith(but_for)
        }


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


@torch.no_grad()
def ask_teachers(
    objective: Any,
    teachers: dict[str, Callable[..., torch.Tensor]],
    latents: torch.Tensor,
    class_labels: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    class_dropout_mask: torch.Tensor,
    draws: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    The `targets` of the regularizers that have a teacher, for the batch that the objective is given next.

    Args:
        objective ([`LSEPObjective`]): Whose regularizers they are.
        teachers (`dict[str, Callable]`): What each regularizer of these names asks; those of others are left out.
        latents, class_labels, noise, timesteps, class_dropout_mask (`torch.Tensor`): As in its `forward`.
        draws (`torch.Tensor` of shape `[B, R]`, *optional*):
            Uniform numbers in [0, 1), the `num_draws` columns of each regularizer in turn; drawn if not given.

    Returns:
        `dict[str, torch.Tensor]`: by name.
    """
    null_class = objective.transformer.config.num_classes
    latents, noise = latents.float(), noise.float()
    if draws is None:
        draws = torch.rand(
            len(latents), sum(r.num_draws for r in objective.regularizers.values()), device=latents.device
        )
    targets, first = {}, 0
    for name, regularizer in objective.regularizers.items():
        end = first + regularizer.num_draws
        if name in teachers:
            context = RegularizerContext(
                tokens={},
                latents=latents,
                noise=noise,
                noisy_latents=objective.path.interpolate(latents, noise, timesteps.view(-1, 1, 1, 1)),
                timesteps=timesteps,
                class_labels=class_labels,
                dropped_labels=torch.where(class_dropout_mask, null_class, class_labels),
                null_class=null_class,
                path=objective.path,
                draws=draws[:, first:end],
            )
            targets[name] = regularizer.make_target(teachers[name], context)
        first = end
    return targets
