# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""LayerSync (arXiv 2510.12581) as a regularizer of [`LSEPObjective`]: an early block that agrees with a late one."""

from typing import Any

import torch
import torch.nn.functional as F

from ..argument_checks import check_count
from .regularizer import Flag, Regularizer, RegularizerContext


class LayerSyncRegularizer(Regularizer):
    r"""
    The loss of LayerSync (arXiv 2510.12581),

        - 1/N sum_n cos(h_n, h'_n)

    between the tokens of an early block and those of a later one, through which no gradient goes.

    Args:
        depth (`int`, defaults to `8`): After how many blocks the tokens are read that are to agree.
        target_depth (`int`, defaults to `16`): After how many blocks those are read that they are to agree with.
        weight (`float`, defaults to `0.2`): Factor of the loss.

    Raises:
        `ValueError`: if `target_depth` is not above `depth`.
    """

    title, paper = "LayerSync", "2510.12581"
    flags = (
        Flag(
            "depth",
            "After how many blocks LayerSync reads (default: LSEP's default depth, 8 for XL).",
            int,
        ),
        Flag("target_depth", "The later block that it is to agree with (default: twice that, 16 for XL).", int),
        Flag("weight", "Weight of LayerSync's loss.", default=0.2),
    )

    def __init__(self, depth: int = 8, target_depth: int = 16, weight: float = 0.2):
        super().__init__(weight)
        depth, target_depth = check_count("depth", depth), check_count("target_depth", target_depth)
        if not depth < target_depth:
            raise ValueError(f"`target_depth` has to be above `depth`, {depth}, but is {target_depth}.")
        self.depth = depth
        self.target_depth = target_depth
        self.depths = (depth, target_depth)

    @classmethod
    def defaults_for(cls, num_layers: int, depth: int, given: dict[str, Any]) -> dict[str, Any]:
        return {"depth": depth, "target_depth": min(2 * (given["depth"] or depth), num_layers)}

    def forward(self, context: RegularizerContext) -> torch.Tensor:
        """
        Computes the loss of each sample, in [-1, 1].

        Args:
            context ([`RegularizerContext`]): With `tokens`.

        Returns:
            `torch.Tensor` of shape `[B]`, float32.
        """
        tokens, targets = context.tokens[self.depth], context.tokens[self.target_depth].detach()
        return -F.cosine_similarity(tokens.float(), targets.float(), dim=-1).mean(dim=1)
