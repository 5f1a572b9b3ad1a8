# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Internal Guidance (arXiv 2512.24176) as a regularizer of [`LSEPObjective`]: a second output inside."""

from typing import Any

import torch

from ..transformer_sit import SiTTransformer2DModel
from .regularizer import Flag, Regularizer, RegularizerContext


class InternalGuidanceRegularizer(Regularizer):
    r"""
    The loss of Internal Guidance (arXiv 2512.24176),

        |v_k(x_t, t, y) - v|^2

    for the velocity `v_k` that the head of a transformer with `internal_guidance_depth=k` predicts. In sampling,
    `v + (s - 1) (v - v_k)` guides the model with its own weaker prediction (`internal_guidance_scale` of
    [`LSEPPipeline`]).

    Args:
        weight (`float`, defaults to `0.5`): Factor of the loss.
    """

    title, paper = "Internal Guidance", "2512.24176"
    # The authors' code: depth 8 for XL; scale 1.4 in sampling.
    flags = (
        Flag(
            "depth",
            "After how many blocks the head of internal guidance stands (default: LSEP's default depth).",
            int,
        ),
        Flag("weight", "Weight of the loss of its prediction.", default=0.5),
    )

    reads = ("internal_prediction", "velocity")

    def __init__(self, weight: float = 0.5):
        super().__init__(weight)

    @classmethod
    def for_transformer(cls, transformer: SiTTransformer2DModel, **values) -> "InternalGuidanceRegularizer":
        return cls(values["weight"])  # The depth is in the transformer's config.

    @classmethod
    def defaults_for(cls, num_layers: int, depth: int, given: dict[str, Any]) -> dict[str, Any]:
        return {"depth": depth}

    def forward(self, context: RegularizerContext) -> torch.Tensor:
        """
        Computes the loss of each sample.

        Args:
            context ([`RegularizerContext`]): With `internal_prediction` and `velocity`.

        Returns:
            `torch.Tensor` of shape `[B]`, float32.
        """
        return (context.internal_prediction.float() - context.velocity).square().flatten(1).mean(dim=1)
