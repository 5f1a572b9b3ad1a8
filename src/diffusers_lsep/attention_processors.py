# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Other ways to compute the attention of a SiT, by `transformer.set_attn_processor(...)`."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .registration import register_with_hooks
from .transformer_sit import SiTAttention, SiTAttnProcessor, SiTTransformerBlock


class SiTConcatenatedAttnProcessor(SiTAttnProcessor):
    """
    One product for queries, keys and values: their three weights are concatenated where they are used, so that they
    stay three in checkpoints, for optimisers and for LoRA. 15 products in place of 21 for a block's forward and
    backward pass, of larger matrices.

    Where a projection is more than its weight and bias (LoRA, quantised or sharded weights, hooks that cast or offload
    it) the three are computed one by one, as by [`SiTAttnProcessor`].
    """

    def project(self, attn: SiTAttention, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        projections = (attn.to_q, attn.to_k, attn.to_v)
        if attn.fused_projections or not all(is_plain(projection) for projection in projections):
            return super().project(attn, hidden_states)
        weight, bias = (torch.cat([getattr(x, name) for x in projections]) for name in ("weight", "bias"))
        return F.linear(hidden_states, weight, bias).chunk(3, dim=-1)


register_with_hooks(SiTTransformerBlock, SiTConcatenatedAttnProcessor)


def is_plain(projection: Any) -> bool:
    """Whether calling it is the product with its weight, and nothing else."""
    if type(projection) is not nn.Linear:
        return False
    weight: Any = projection.weight
    forward_hooks = projection._forward_pre_hooks or projection._forward_hooks
    backward_hooks = projection._backward_pre_hooks or projection._backward_hooks
    # Hooks of accelerate and of diffusers replace `forward`.
    has_hooks = forward_hooks or backward_hooks or "forward" in vars(projection)
    return not has_hooks and not is_traceable_wrapper_subclass(weight)
