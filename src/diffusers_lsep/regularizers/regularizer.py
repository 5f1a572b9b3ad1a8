# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What all regularizers of [`LSEPObjective`] have in common: what they read, how they are weighted, their flags."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ..argument_checks import check_not_negative
from ..interpolants import Interpolant
from ..transformer_sit import SiTTransformer2DModel


UNREAD: Any = None  # of what a regularizer does not read


class Flag(NamedTuple):
    """
    An argument of a regularizer on the command line: `--<regularizer>_<name>`.

    Args:
        name (`str`): Name of the constructor's argument.
        help (`str`): For `--help`.
        type (`type`, defaults to `float`): `int` from 1 on, `float` from 0 on, or `str`.
        default (*optional*): What it is if not given. None may become something else in `defaults_for`.
        choices (`tuple`, *optional*): What it may be.
        nargs (`int`, *optional*): How many values it has, if it is a list.
        changeable (`bool`, defaults to `False`): Whether a run that is continued may change it.
    """

    name: str
    help: str
    type: type = float
    default: Any = None
    choices: tuple | None = None
    nargs: int | None = None
    changeable: bool = False


@dataclass
class RegularizerContext:
    """
    What a regularizer is handed of a batch: the tokens after its `depths`, what is named in its `reads`, and nothing
    else; all other fields are None.

    Args:
        tokens (`dict[int, torch.Tensor]`): The main stream's tokens `[B, N, D]`, by the number of blocks before them.
        probe_tokens (`torch.Tensor` of shape `[B, N, D]`): The probe's stream where it ends.
        condition (`torch.Tensor` of shape `[B, D]`): The main stream's embedding of time and label.
        latents (`torch.Tensor` of shape `[B, C, S, S]`): The clean ones, float32.
        noise (`torch.Tensor` of shape `[B, C, S, S]`): Theirs, float32.
        noisy_latents (`torch.Tensor` of shape `[B, C, S, S]`): `x_t`, float32.
        timesteps (`torch.Tensor` of shape `[B]`): `t` in [0, 1].
        class_labels (`torch.Tensor` of shape `[B]`): The samples' classes, in `0..num_classes - 1`.
        dropped_labels (`torch.Tensor` of shape `[B]`): What the main stream sees: some are the null class.
        null_class (`int`): Its index.
        velocity (`torch.Tensor` of shape `[B, C, S, S]`): The true velocity, float32.
        prediction (`torch.Tensor` of shape `[B, C, S, S]`): The predicted one.
        internal_prediction (`torch.Tensor` of shape `[B, C, S, S]`):
            That of the head inside of a transformer with `internal_guidance_depth`.
        target (`torch.Tensor`): What it compares with: from a frozen encoder, or from its own `make_target`.
        path ([`Interpolant`]): The path between data and noise.
        draws (`torch.Tensor` of shape `[B, num_draws]`): Uniform numbers in [0, 1), from the stream of samples.
    """

    tokens: dict[int, torch.Tensor]
    probe_tokens: torch.Tensor = UNREAD
    condition: torch.Tensor = UNREAD
    latents: torch.Tensor = UNREAD
    noise: torch.Tensor = UNREAD
    noisy_latents: torch.Tensor = UNREAD
    timesteps: torch.Tensor = UNREAD
    class_labels: torch.Tensor = UNREAD
    dropped_labels: torch.Tensor = UNREAD
    null_class: int = UNREAD
    velocity: torch.Tensor = UNREAD
    prediction: torch.Tensor = UNREAD
    internal_prediction: torch.Tensor = UNREAD
    target: torch.Tensor = UNREAD
    path: Interpolant = UNREAD
    draws: torch.Tensor = UNREAD


class Regularizer(nn.Module):
    """
    A loss beside that of the velocity, on what the one pass of [`LSEPObjective`] computes. Its parameters, if it has
    any, are trained, averaged and kept in checkpoints with those of the transformer.

    Args:
        weight (`float`): Factor of the loss.

    Attributes:
        depths (`tuple[int, ...]`): After how many blocks, `1..num_layers`, it reads the main stream's tokens.
        reads (`tuple[str, ...]`): What else of [`RegularizerContext`] its `forward` is handed.
        teacher (`str`, *optional*):
            Whose tokens its `make_target` asks for: `"average"`, the transformer with the averaged weights, or
            `"frozen"`, that of a saved pipeline. None needs no teacher.
        num_draws (`int`): How many random numbers per sample its `make_target` is handed.
        flags (`tuple[Flag, ...]`): Its arguments on the command line.
        title, paper (`str`): Its name and its arXiv number, for model cards.

    Raises:
        `ValueError`: if `weight` is no number from 0 on.
    """

    depths: tuple[int, ...] = ()
    reads: tuple[str, ...] = ()
    teacher: str | None = None
    num_draws: int = 0
    flags: tuple[Flag, ...] = ()
    title: str = ""
    paper: str = ""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = check_not_negative("weight", weight)

    @classmethod
    def for_transformer(cls, transformer: SiTTransformer2DModel, **values) -> "Regularizer":
        """Makes it for a transformer, with the values of its `flags`."""
        return cls(**values)

    @classmethod
    def defaults_for(cls, num_layers: int, depth: int, given: dict[str, Any]) -> dict[str, Any]:
        """
        What flags come to that are not given and depend on the transformer.

        Args:
            num_layers (`int`): Its number of blocks.
            depth (`int`): Where LSEP and REPA read: 8 for XL and L, 4 for B, else a third of the blocks.
            given (`dict`): The values of all `flags`.
        """
        return {}

    def weight_at(self, step: int, epoch: float) -> float:
        """Factor of the loss after so many steps, or passes over the data."""
        return self.weight

    def make_target(self, teacher: Callable[..., torch.Tensor], context: RegularizerContext) -> torch.Tensor:
        """
        What the loss compares with, without gradient. Called where there is a `teacher`.

        Args:
            teacher (`Callable`): `teacher(noisy_latents, timesteps, class_labels, depth)` gives tokens `[B, N, D]`.
            context ([`RegularizerContext`]): All that is known of the batch before the network has seen it.
        """
        raise NotImplementedError

    def forward(self, context: RegularizerContext) -> torch.Tensor:
        """
        Computes the loss in float32: one of each sample, `[B]`, or a scalar.

        Args:
            context ([`RegularizerContext`]): What it reads.
        """
        raise NotImplementedError


def make_mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these widths with SiLU between them; Xavier-uniform, without bias at the start."""
    layers: list[nn.Module] = []
    for size, next_size in zip(sizes, sizes[1:]):
        layers += [nn.SiLU()] if layers else []
        layers.append(nn.Linear(size, next_size))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)
