# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What an [`LSEPObjective`] is made of, and what it is called with, before anything is computed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from .argument_checks import (
    MAX_COUNT,
    can_be_seen,
    check_choice,
    check_count,
    check_not_negative,
    check_number,
    check_probability,
    check_tensor,
    check_type,
    check_values,
    describe,
)
from .regularizers.regularizer import Regularizer, RegularizerContext
from .transformer_checks import check_channels


TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")


def make_regularizers(regularizers: Any) -> nn.ModuleDict:
    """The regularizers as a module. Raises a `ValueError` if they are no regularizers by name."""
    check_type("regularizers", regularizers, Mapping, "a dict of regularizers by name")
    for name, regularizer in (regularizers or {}).items():
        if not isinstance(name, str) or not isinstance(regularizer, Regularizer):
            raise ValueError(
                f"`regularizers` has to be a dict of regularizers by name, but holds {describe(name)} of type"
                f" {type(regularizer).__name__}."
            )
    try:
        return nn.ModuleDict(regularizers or {})
    except KeyError as error:  # some names stand for something else in a module
        raise ValueError(f"`regularizers` has a name that it cannot have: {error}") from None


def check_objective(objective: Any, probe_weight_start: float, probe_weight_end: float, num_probe_weights: int):
    """
    Raises a `ValueError` if the arguments of an objective are out of their ranges or do not fit the transformer. Its
    numbers are Python's own afterwards.
    """
    if not hasattr(objective.transformer, "apply_blocks"):
        raise ValueError(
            f"`transformer` has to be a SiTTransformer2DModel, but is of type {type(objective.transformer).__name__}."
        )
    config = objective.transformer.config
    check_channels(config)
    for name in ("probe_dropout_prob", "class_dropout_prob"):
        setattr(objective, name, check_probability(name, getattr(objective, name)))
    check_choice("timestep_sampling", objective.timestep_sampling, TIMESTEP_SAMPLINGS)
    check_not_negative("probe_weight_start", probe_weight_start)
    check_not_negative("probe_weight_end", probe_weight_end)
    fraction = check_number("probe_fraction", objective.probe_fraction, "lie in (0, 1]", lambda x: 0 < x <= 1)
    objective.probe_fraction = fraction
    check_count("num_probe_weights", num_probe_weights)
    if num_probe_weights == 1 and probe_weight_start != probe_weight_end:
        raise ValueError(
            "`num_probe_weights=1` is a constant weight and needs `probe_weight_start` and `probe_weight_end` to"
            f" be equal, but they are {probe_weight_start} and {probe_weight_end}."
        )
    depths = [("probe_depth", "`probe_depth`", objective.probe_depth)] if objective.probe is not None else []
    for name, regularizer in objective.regularizers.items():
        depths += [("depth", f"`depth` of the regularizer `{name}`", depth) for depth in regularizer.depths]
        fields = {field.name for field in dataclasses.fields(RegularizerContext)} - {"tokens", "draws"}
        if not fields.issuperset(regularizer.reads):
            raise ValueError(
                f"`reads` of the regularizer `{name}` has to name some of {', '.join(sorted(fields))}, but is"
                f" {regularizer.reads}."
            )
        if "probe_tokens" in regularizer.reads and objective.probe is None:
            raise ValueError(f"`probe` is needed by the regularizer `{name}`, but is None.")
        if "internal_prediction" in regularizer.reads and config.get("internal_guidance_depth") is None:
            raise ValueError(f"`internal_guidance_depth` of `transformer` is needed by `{name}`, but is None.")
    for name, what, depth in depths:
        if not 1 <= check_count(name, depth, low=0, high=float("inf")) <= config.num_layers:
            raise ValueError(
                f"{what} has to lie in 1..{config.num_layers}, the number of blocks of `transformer`, but is {depth}."
            )
    flow_map_depth = config.get("flow_map_depth")
    if objective.probe is not None and flow_map_depth is not None and objective.probe_depth > flow_map_depth:
        raise ValueError(
            f"`probe_depth` has to be at most {flow_map_depth}, the `flow_map_depth` of `transformer`, as there is"
            f" another time behind it, but is {objective.probe_depth}."
        )
    if objective.probe is not None:
        _check_probe(objective.probe, objective.crop_size, config)


def _check_probe(probe: Any, crop_size: Any, config: Any):
    width = config.num_attention_heads * config.attention_head_dim
    found = getattr(probe, "config", None) or {}
    if (found.get("hidden_size"), found.get("num_classes")) != (width, config.num_classes):
        raise ValueError(
            f"`probe` has to have `hidden_size={width}` and `num_classes={config.num_classes}` like `transformer`,"
            f" but has {found.get('hidden_size')} and {found.get('num_classes')}."
        )
    grid_size = config.sample_size // config.patch_size
    if crop_size is None:
        return
    is_pair = isinstance(crop_size, (list, tuple)) and len(crop_size) == 2
    low, high = [check_count("crop_size", x, low=-MAX_COUNT) for x in crop_size] if is_pair else (0, 0)
    if not 1 <= low <= high <= grid_size:
        raise ValueError(
            f"`crop_size` has to be (low, high) with 1 <= low <= high <= {grid_size}, the side of the grid of"
            f" tokens, but is {describe(tuple(crop_size) if is_pair else crop_size)}."
        )


def check_batch(objective: Any, latents: Any, class_labels: Any, draws: Mapping[str, Any], rows: Mapping[str, Any]):
    """
    Raises a `ValueError` if a batch is not what an objective takes. Numbers are looked at only where that is free.

    Args:
        objective ([`LSEPObjective`]): The objective.
        latents, class_labels: What it is called with.
        draws (`Mapping`): The random numbers that were given, by the names of the arguments; None where they were not.
        rows (`Mapping`): `separate_rows` and `probe_rows`.
    """
    config = objective.transformer.config
    check_tensor("latents", latents, ("batch", config.in_channels, config.sample_size, config.sample_size))
    batch_size = latents.shape[0]
    check_tensor("class_labels", class_labels, (batch_size,), "integers")
    # Training without classes gives the null class; a probe has none for it.
    check_values("class_labels", class_labels, 0, config.num_classes - (objective.probe is not None))
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        "noise": (tuple(latents.shape), "floating-point numbers"),
        "timesteps": ((batch_size,), "floating-point numbers"),
        "class_dropout_mask": ((batch_size,), "booleans"),
        "probe_dropout_mask": ((batch_size,), "booleans"),
        "crop_window": ((batch_size, 3), "integers"),
        "r_timesteps": ((batch_size,), "floating-point numbers"),
        "target_velocity": (tuple(latents.shape), "floating-point numbers"),
    }
    for name, value in draws.items():
        if value is not None:
            check_tensor(name, value, *expected[name])
    if draws["r_timesteps"] is not None and config.get("flow_map_depth") is None:
        raise ValueError("`r_timesteps` has to be None for a `transformer` without `flow_map_depth`, but is given.")
    if draws["timesteps"] is not None:
        check_values("timesteps", draws["timesteps"], 0, 1)
    if draws["r_timesteps"] is not None:
        check_values("r_timesteps", draws["r_timesteps"], 0, 1)
    if draws["crop_window"] is not None:
        check_window("crop_window", draws["crop_window"], config.sample_size // config.patch_size)
    for name, value in rows.items():
        if value is None:
            continue
        check_tensor(name, value, ("rows",), "integers")
        check_values(name, value, 0, batch_size - 1)
        if can_be_seen(value):
            samples, counts = value.unique(return_counts=True)
            if bool((counts > 1).any()):
                more = samples[counts > 1].tolist()
                raise ValueError(f"`{name}` has to hold each sample once, but holds {describe(more)} more than once.")


def check_factor(name: str, value: Any) -> float | torch.Tensor:
    """Raises a `ValueError` if a factor of a loss is neither a number from 0 on nor a tensor of one."""
    if not isinstance(value, torch.Tensor):
        return check_not_negative(name, value)
    if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"`{name}` has to be one number, but is {describe(value)}.")
    info = torch.finfo if value.is_floating_point() else torch.iinfo
    check_values(name, value, 0, info(value.dtype).max)
    return value


def check_window(name: str, window: torch.Tensor, grid_size: int):
    """Raises a `ValueError` if windows `(top, left, size)` reach out of a grid of tokens."""
    if not can_be_seen(window):
        return
    start, size = window[:, :2], window[:, 2:]
    fits = ((start >= 0) & (size >= 1) & (start + size <= grid_size)).all(dim=1)
    if not bool(fits.all()):
        raise ValueError(
            f"`{name}` has to be (top, left, size) of windows inside of the grid of {grid_size} x {grid_size} tokens,"
            f" but holds {describe(window[~fits].tolist())}."
        )


def check_regularizer_weights(regularizers: nn.ModuleDict, weights: Any) -> dict[str, Any] | None:
    """Raises a `ValueError` if the `regularizer_weights` are not one factor for each regularizer."""
    if weights is None:
        return None
    if not isinstance(weights, Mapping) or weights.keys() != set(regularizers.keys()):
        raise ValueError(
            f"`regularizer_weights` has to be a dict of one factor for each of {[*regularizers]}, but is"
            f" {describe(weights)}."
        )
    return {name: check_factor("regularizer_weights", weight) for name, weight in weights.items()}
