# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What a [`SiTTransformer2DModel`] is made of, and what it is called with, before anything is computed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin

from .argument_checks import (
    MAX_COUNT,
    can_be_seen,
    check_count,
    check_flag,
    check_number,
    check_tensor,
    check_values,
    describe,
    make_plain,
)


# No network is larger. What is, would end in a want of memory.
LARGEST = {
    "sample_size": 65_536,
    "patch_size": 65_536,
    "in_channels": 65_536,
    "num_layers": 1_024,
    "num_attention_heads": 1_024,
    "attention_head_dim": 1_024,
    "num_classes": 1_000_000,
}
LARGEST_GRID = 1_024  # tokens along a side

TIME_TOLERANCE = 1e-4  # by which rounding may leave [0, 1]


def check_config(model: ConfigMixin):
    """Raises a `ValueError` if a model cannot be made of its config, whose numbers are Python's own afterwards."""
    config: Any = model.config
    for name, largest in LARGEST.items():
        check_count(name, config[name], high=largest)
    if config.out_channels is not None:
        check_count("out_channels", config.out_channels, high=LARGEST["in_channels"])
    check_flag("qk_norm", config.qk_norm)
    check_number("mlp_ratio", config.mlp_ratio)
    for name, last in (("internal_guidance_depth", config.num_layers), ("flow_map_depth", config.num_layers - 1)):
        depth = config[name]
        if depth is not None and not (isinstance(depth, (int, np.integer)) and 1 <= depth <= last):
            raise ValueError(f"`{name}` has to be None or lie in 1..{last}, but is {describe(depth)}.")
    if config.internal_guidance_depth is not None and config.flow_map_depth is not None:
        raise ValueError(
            f"`flow_map_depth` has to be None with an `internal_guidance_depth`, but is {config.flow_map_depth}."
        )
    make_plain(model)
    config = model.config

    if config.sample_size % config.patch_size:
        raise ValueError(
            f"`sample_size` has to be divisible by `patch_size`, but {config.sample_size} is not divisible by"
            f" {config.patch_size}."
        )
    if config.sample_size // config.patch_size > LARGEST_GRID:
        raise ValueError(
            f"`sample_size` has to be at most {LARGEST_GRID:,} times `patch_size`, but they are {config.sample_size}"
            f" and {config.patch_size}."
        )
    width = config.num_attention_heads * config.attention_head_dim
    if width % 4:
        raise ValueError(
            "`num_attention_heads * attention_head_dim` has to be divisible by 4 (the position embedding has sine"
            f" and cosine of two axes), but {config.num_attention_heads} * {config.attention_head_dim} = {width}."
        )
    check_number(
        "mlp_ratio",
        config.mlp_ratio,
        f"lie between 1 / {width}, one unit, and 1,024",
        lambda ratio: ratio <= 1_024 and int(width * ratio) >= 1,
    )


def check_states(hidden_states: Any, config: Any, class_labels: Any = None):
    """Raises a `ValueError` if these are no latents of a batch, or if there is not one class for each of them."""
    check_tensor("hidden_states", hidden_states)
    expected = (config.in_channels, config.sample_size, config.sample_size)
    if hidden_states.ndim != 4 or tuple(hidden_states.shape[1:]) != expected:
        raise ValueError(
            f"`hidden_states` has to be of shape [batch, {', '.join(map(str, expected))}], but is of shape"
            f" {list(hidden_states.shape)}. For another size load the model with"
            " `from_pretrained(..., sample_size=...)`."
        )
    if class_labels is not None:
        check_tensor("class_labels", class_labels, (hidden_states.shape[0],), "integers")


def check_channels(config: Any):
    """Raises a `ValueError` if what a transformer predicts cannot be the velocity of its input."""
    in_channels, out_channels = config.get("in_channels"), config.get("out_channels")
    if out_channels not in (None, in_channels):
        raise ValueError(
            "`transformer` has to predict a velocity of its input's channels, but has"
            f" `in_channels={in_channels}` and `out_channels={out_channels}`."
        )


def check_depths(num_layers: Sequence[Any], depth: int) -> list[int]:
    """Raises a `ValueError` if these are no depths of a model, from 0 on."""
    depths = [check_count("num_layers", layer, low=-MAX_COUNT) for layer in num_layers]
    for layer in depths:
        if not 0 <= layer <= depth:
            raise ValueError(
                f"`num_layers` has to lie between 0 and the model's {depth} blocks, but is"
                f" {layer if len(depths) == 1 else depths}."
            )
    return depths


def check_condition(timestep: Any, class_labels: Any, num_classes: int, argument: str):
    """Raises a `ValueError` if these are no times and classes of a batch. Looks at numbers only where that is free."""
    check_tensor("class_labels", class_labels, ("batch",), "integers")
    check_values("class_labels", class_labels, 0, num_classes)
    if not torch.is_tensor(timestep):
        if not torch.compiler.is_compiling():
            check_number(argument, timestep, "lie in [0, 1]", _is_time)
        return
    batch_size = class_labels.shape[0]
    if timestep.ndim > 1 or timestep.numel() not in (1, batch_size) or not timestep.is_floating_point():
        raise ValueError(
            f"`{argument}` has to be one floating-point number, or one for each of the {batch_size} `class_labels`,"
            f" but is {describe(timestep)}."
        )
    if can_be_seen(timestep):
        outside = [t for t in timestep.detach().reshape(-1).tolist() if not _is_time(t)]
        if outside:
            raise ValueError(f"`{argument}` has to lie in [0, 1], but holds {describe(outside)}.")


def _is_time(t: float) -> bool:
    return -TIME_TOLERANCE <= t <= 1 + TIME_TOLERANCE
