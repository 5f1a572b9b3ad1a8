# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Dispersive Loss (arXiv 2506.09027) as a regularizer of [`LSEPObjective`]: samples that differ from each other."""

import math
from typing import Any

import torch

from ..argument_checks import check_count, check_positive
from .regularizer import Flag, Regularizer, RegularizerContext


class DispersiveRegularizer(Regularizer):
    r"""
    The dispersive loss (arXiv 2506.09027, the InfoNCE variant with squared distances),

        log mean_ij exp(-|z_i - z_j|^2 / (tau M))

    over all pairs of samples of a batch, each with itself included, where `z_i` are the `M = N D` numbers of a
    sample's tokens. The batch is that of one process at one time: it does not reach over processes or accumulated
    gradients.

    Args:
        depth (`int`): After how many blocks the tokens are read.
        weight (`float`, defaults to `0.25`): Factor of the loss.
        temperature (`float`, defaults to `1.0`): `tau`.

    Raises:
        `ValueError`: if `depth` is no number of blocks, or `temperature` is not above 0.
    """

    title, paper = "Dispersive Loss", "2506.09027"
    # The authors' PyTorch code: last block, weight 0.25, no temperature. Their JAX code, with which the paper's
    # figures were made: a quarter of the depth, weight 0.5, temperature 0.5.
    flags = (
        Flag("depth", "After how many blocks the dispersive loss reads (default: all).", int),
        Flag("weight", "Weight of the dispersive loss.", default=0.25),
        Flag(
            "temperature",
            "Its temperature: the smaller, the nearer are the samples that it drives apart.",
            default=1.0,
        ),
    )

    def __init__(self, depth: int, weight: float = 0.25, temperature: float = 1.0):
        super().__init__(weight)
        self.depth = check_count("depth", depth)
        self.depths = (self.depth,)
        self.temperature = check_positive("temperature", temperature)

    @classmethod
    def defaults_for(cls, num_layers: int, depth: int, given: dict[str, Any]) -> dict[str, Any]:
        return {"depth": num_layers}

    def forward(self, context: RegularizerContext) -> torch.Tensor:
        """
        Computes the loss of the batch.

        Args:
            context ([`RegularizerContext`]): With `tokens`.

        Returns:
            `torch.Tensor`: scalar, in float32, not above 0.
        """
        samples = context.tokens[self.depth].flatten(1).float()
        with torch.autocast(samples.device.type, enabled=False):
            # By products, since the differences of all pairs would fill a GPU; less what all have in common, in which
            # small differences would be lost.
            samples = samples - samples.mean(dim=0)
            products = samples @ samples.T
            squares = products.diagonal()
            distances = (squares[:, None] + squares - 2 * products).clamp(min=0)
            exponents = -distances / (self.temperature * samples.shape[1])
            return exponents.flatten().logsumexp(dim=0) - 2 * math.log(len(samples))
