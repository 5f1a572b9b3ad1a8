# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Self-Representation Alignment (SRA, arXiv 2505.02831) as a regularizer of [`LSEPObjective`]."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..argument_checks import (
    check_choice,
    check_count,
    check_number,
    check_positive,
    check_probability,
    check_tensor,
)
from ..transformer_sit import SiTTransformer2DModel
from .regularizer import Flag, Regularizer, RegularizerContext, make_mlp


LOSSES = ("smooth_l1", "cosine", "cosine_over_tokens")


class SRARegularizer(Regularizer):
    r"""
    The loss of SRA (arXiv 2505.02831): the tokens of an early block at `x_t`, through a head, are to be those that
    the averaged weights give after a later block for the same image, noise and label at the less noisy time

        max(t - d, 0),   d ~ U(0, max_time_shift).

    Args:
        hidden_size (`int`): Width `D` of the tokens.
        depth (`int`, defaults to `8`): After how many blocks the tokens are read.
        teacher_depth (`int`, defaults to `20`): After how many blocks of the average those are read to compare with.
        weight (`float`, defaults to `0.2`): Factor of the loss, up to `decay_start_epoch`.
        loss (`str`, defaults to `"smooth_l1"`):
            `"smooth_l1"` (beta 0.05), the paper's; `"cosine"`, one minus the cosine of the two tokens; or
            `"cosine_over_tokens"`, what the authors' code does where it says cosine: one minus the cosine of each
            channel's values over the tokens, for want of a `dim`.
        max_time_shift (`float`, defaults to `0.2`): Largest `d`.
        decay_start_epoch (`float`, *optional*): From when on the weight falls; never, if not given.
        decay_epochs (`float`, defaults to `1000.0`): In how many epochs it then falls to a tenth.

    Raises:
        `ValueError`: if an argument is none of these.
    """

    title, paper = "SRA", "2505.02831"
    # The authors' code at 256 px: 2 x 0.1 up to epoch 149, then falling to a tenth in 1,000 epochs; at 512 px from
    # epoch 99 on, in 800. With cosines 0.5 throughout. Depths 8 and 20 for XL, 4 and 8 for B.
    flags = (
        Flag(
            "depth",
            "After how many blocks SRA reads (default: LSEP's default depth, 8 for XL).",
            int,
        ),
        Flag("teacher_depth", "After how many of the average (default: 20 of 28, else twice that).", int),
        Flag("weight", "Weight of SRA's loss; 0.5 is the published one with a cosine.", default=0.2),
        Flag("loss", "How SRA compares tokens.", str, "smooth_l1", LOSSES),
        Flag("max_time_shift", "How much less noisy the average's input is at most.", default=0.2),
        Flag("decay_start_epoch", "Let the weight of SRA's loss fall from this epoch on (default: never)."),
        Flag("decay_epochs", "In how many epochs it then falls to a tenth.", default=1000.0),
    )

    reads = ("target",)
    teacher = "average"
    num_draws = 1

    def __init__(
        self,
        hidden_size: int,
        depth: int = 8,
        teacher_depth: int = 20,
        weight: float = 0.2,
        loss: str = "smooth_l1",
        max_time_shift: float = 0.2,
        decay_start_epoch: float | None = None,
        decay_epochs: float = 1000.0,
    ):
        super().__init__(weight)
        check_choice("loss", loss, LOSSES)
        hidden_size = check_count("hidden_size", hidden_size)
        self.depth = check_count("depth", depth)
        self.depths = (self.depth,)
        self.teacher_depth = check_count("teacher_depth", teacher_depth)
        self.loss = loss
        self.max_time_shift = check_probability("max_time_shift", max_time_shift)
        if decay_start_epoch is not None:
            decay_start_epoch = check_number("decay_start_epoch", decay_start_epoch)
        self.decay_start_epoch = decay_start_epoch
        self.decay_epochs = check_positive("decay_epochs", decay_epochs)
        self.head = make_mlp(hidden_size, 2 * hidden_size, hidden_size)

    @classmethod
    def for_transformer(cls, transformer: SiTTransformer2DModel, **values) -> "SRARegularizer":
        blocks = transformer.config.num_layers
        if values.get("teacher_depth", 1) > blocks:
            raise ValueError(
                f"`teacher_depth` has to lie in 1..{blocks}, the number of blocks, but is {values['teacher_depth']}."
            )
        return cls(transformer.inner_dim, **values)

    @classmethod
    def defaults_for(cls, num_layers: int, depth: int, given: dict[str, Any]) -> dict[str, Any]:
        twice = min(2 * (given["depth"] or depth), num_layers)
        is_published = num_layers == 28 and given["depth"] in (None, depth)
        return {"depth": depth, "teacher_depth": 20 if is_published else twice}

    def weight_at(self, step: int, epoch: float) -> float:
        if self.decay_start_epoch is None:
            return self.weight
        return self.weight * 0.1 ** (max(0.0, epoch - self.decay_start_epoch) / self.decay_epochs)

    def make_target(self, teacher: Callable[..., torch.Tensor], context: RegularizerContext) -> torch.Tensor:
        timesteps = (context.timesteps - self.max_time_shift * context.draws[:, 0]).clamp(min=0)
        noisy_latents = context.path.interpolate(context.latents, context.noise, timesteps.view(-1, 1, 1, 1))
        return teacher(noisy_latents, timesteps, context.dropped_labels, self.teacher_depth)

    def forward(self, context: RegularizerContext) -> torch.Tensor:
        """
        Computes the loss of each sample.

        Args:
            context ([`RegularizerContext`]): With `tokens` and `target`, `[B, N, D]`.

        Returns:
            `torch.Tensor` of shape `[B]`, float32.
        """
        tokens = self.head(context.tokens[self.depth]).float()
        check_tensor("target", context.target, tokens.shape)
        target = context.target.float()
        if self.loss == "smooth_l1":
            return F.smooth_l1_loss(tokens, target, beta=0.05, reduction="none").mean(dim=(1, 2))
        dim = 2 if self.loss == "cosine" else 1
        return 1 - F.cosine_similarity(tokens, target, dim=dim).mean(dim=1)
