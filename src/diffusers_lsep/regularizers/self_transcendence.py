# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Self-Transcendence (arXiv 2601.07773), both stages, as a regularizer of [`LSEPObjective`]."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn

from ..argument_checks import check_choice, check_count, check_interval, check_number, check_tensor
from ..transformer_sit import SiTTransformer2DModel
from .regularizer import Flag, Regularizer, RegularizerContext, make_mlp


MASKS = ("samples", "batch")


class SelfTranscendenceRegularizer(Regularizer):
    r"""
    The loss of one of the two stages of Self-Transcendence (arXiv 2601.07773). A first model is trained with

        |head(h_k) - v|^2

    where a head (three linear layers, LayerNorm and a linear layer to the pixels of a patch) has to find the velocity
    in the tokens of a shallow block. Frozen, it then teaches a second model that starts anew,

        |head(h_k) - (u + s (c - u))|^2

    where `c` and `u` are the first model's tokens after a deeper block for the same noisy image, with its label and
    with the null class, and the head has three linear layers.

    Args:
        hidden_size (`int`): Width `D` of the tokens.
        velocity_size (`int`, *optional*):
            Numbers of the velocity for each token, `patch_size^2 out_channels`: the first stage. Else the second.
        depth (`int`, defaults to `6`): After how many blocks the tokens are read.
        teacher_depth (`int`, defaults to `8`): After how many blocks of the teacher those are read to compare with.
        guidance_scale (`float`, defaults to `30.0`): `s`.
        weight (`float`, defaults to `0.5`): Factor of the loss.
        time_range (`tuple[float, float]`, defaults to `(0.4, 0.7)`): The times that count, both ends included.
        mask (`str`, defaults to `"samples"`):
            `"samples"`: those whose time lies outside count as zero, as the paper says. `"batch"`: what the authors'
            code does, which multiplies a `[B, 1, 1, 1]` mask with a `[B]` loss: every sample counts, times the part
            of the batch whose time lies inside.
        stop_step (`int`, *optional*): From which step on the loss has no weight.
        projector_dim (`int`, defaults to `2048`): Width of the head's layers.

    Raises:
        `ValueError`: if an argument is none of these.
    """

    title, paper = "Self-Transcendence", "2601.07773"
    # The authors' scripts, for SiT-B: the first stage at depth 2 for 200,000 steps; the second at depth 6 against 8,
    # scale 30, up to step 100,000; 0.5 and times 0.4 to 0.7 in both. It has none for larger models.
    flags = (
        Flag(
            "teacher",
            "The pipeline, or the checkpoint, of a run with Self-Transcendence: its second stage. Without: its first.",
            str,
            changeable=True,
        ),
        Flag(
            "depth",
            "After how many blocks it reads (default: 2 and, in its second stage, 6 for B; in proportion to the"
            " probe's else).",
            int,
        ),
        Flag("teacher_depth", "After how many blocks of the teacher (default: 8 for B, twice the probe's else).", int),
        Flag("guidance_scale", "Scale of the guidance of the teacher's tokens.", default=30.0),
        Flag("weight", "Weight of Self-Transcendence's loss.", default=0.5),
        Flag("time_range", "Smallest and largest time t that counts.", default=[0.4, 0.7], nargs=2),
        Flag(
            "mask",
            "What the times decide: which samples count, or how much the batch does, as in the published code.",
            str,
            "samples",
            MASKS,
        ),
        Flag("projector_dim", "Width of the layers behind its tokens.", int, 2048),
        Flag("stop_step", "From which step on the loss has no weight (default: never; published: 100000).", int),
    )

    def __init__(
        self,
        hidden_size: int,
        velocity_size: int | None = None,
        depth: int = 6,
        teacher_depth: int = 8,
        guidance_scale: float = 30.0,
        weight: float = 0.5,
        time_range: Sequence[float] = (0.4, 0.7),
        mask: str = "samples",
        stop_step: int | None = None,
        projector_dim: int = 2048,
    ):
        super().__init__(weight)
        check_choice("mask", mask, MASKS)
        hidden_size = check_count("hidden_size", hidden_size)
        if velocity_size is not None:
            velocity_size = check_count("velocity_size", velocity_size)
        self.depth = check_count("depth", depth)
        self.depths = (self.depth,)
        self.teacher_depth = check_count("teacher_depth", teacher_depth)
        self.guidance_scale = check_number("guidance_scale", guidance_scale)
        self.time_range = check_interval("time_range", time_range)
        self.mask = mask
        self.stop_step = None if stop_step is None else check_count("stop_step", stop_step, low=0, high=2**63)
        projector_dim = check_count("projector_dim", projector_dim)
        self.projector = make_mlp(hidden_size, projector_dim, projector_dim, hidden_size)
        self.output: nn.Module = nn.Identity()
        if velocity_size is not None:
            norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
            self.output = nn.Sequential(norm, *make_mlp(hidden_size, velocity_size))
        self.reads = ("timesteps", "target" if velocity_size is None else "velocity")
        self.teacher = "frozen" if velocity_size is None else None

    @classmethod
    def for_transformer(
        cls, transformer: SiTTransformer2DModel, teacher: str | None = None, **values
    ) -> "SelfTranscendenceRegularizer":
        velocity_size = transformer.config.patch_size**2 * transformer.out_channels
        return cls(transformer.inner_dim, velocity_size if teacher is None else None, **values)

    @classmethod
    def defaults_for(cls, num_layers: int, depth: int, given: dict[str, Any]) -> dict[str, Any]:
        first = given["teacher"] is None
        return {"depth": max(1, depth // 2 if first else depth * 3 // 2), "teacher_depth": min(2 * depth, num_layers)}

    def weight_at(self, step: int, epoch: float) -> float:
        return self.weight if self.stop_step is None or step < self.stop_step else 0.0

    def make_target(self, teacher: Callable[..., torch.Tensor], context: RegularizerContext) -> torch.Tensor:
        labels = torch.cat([context.class_labels, torch.full_like(context.class_labels, context.null_class)])
        inputs = (context.noisy_latents, context.timesteps)
        tokens = teacher(*(torch.cat([value, value]) for value in inputs), labels, self.teacher_depth)
        conditional, unconditional = tokens.float().chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def forward(self, context: RegularizerContext) -> torch.Tensor:
        """
        Computes the loss of each sample.

        Args:
            context ([`RegularizerContext`]): With `tokens`, `timesteps`, and the `velocity` or the `target`.

        Returns:
            `torch.Tensor` of shape `[B]`, float32.
        """
        tokens = self.output(self.projector(context.tokens[self.depth])).float()
        target = context.target if self.teacher is not None else as_patches(context.velocity, tokens.shape[1])
        check_tensor("target", target, tokens.shape)
        losses = (tokens - target.float()).square().mean(dim=(1, 2))
        low, high = self.time_range
        inside = ((context.timesteps >= low) & (context.timesteps <= high)).float()
        return losses * (inside if self.mask == "samples" else inside.mean())


def as_patches(images: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Cuts `[B, C, S, S]` into what each token stands for, `[B, N, P P C]`: row by row, channels innermost."""
    grid_size = round(num_tokens**0.5)
    patches = images.unflatten(3, (grid_size, -1)).unflatten(2, (grid_size, -1))  # [B, C, grid, P, grid, P]
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
