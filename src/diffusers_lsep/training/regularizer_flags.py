# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""From flags to the losses beside LSEP's."""

import argparse
import re
from pathlib import Path
from typing import Any

from ..pipeline_lsep import LSEPPipeline
from ..regularizers import REGULARIZERS, Regularizer, REPAEncoder, REPARegularizer, regularizer_key
from ..regularizers.teachers import Teacher, load_teacher
from ..transformer_sit import SiTTransformer2DModel


def regularizer_values(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The values of a regularizer's flags, by their names without the regularizer's."""
    return {flag.name: getattr(args, f"{regularizer_key(name)}_{flag.name}") for flag in REGULARIZERS[name].flags}


def choose_regularizer_flags(args: argparse.Namespace, num_layers: int, depth: int) -> dict[str, Any]:
    """
    The flags of `--regularizers` that were not given and depend on the transformer, with their values.

    Args:
        args (`argparse.Namespace`): All flags.
        num_layers (`int`): The transformer's number of blocks.
        depth (`int`): Where LSEP and REPA read in a model of its size.
    """
    chosen: dict[str, Any] = {}
    for name in args.regularizers:
        values = regularizer_values(args, name)
        defaults = REGULARIZERS[name].defaults_for(num_layers, depth, values)
        chosen |= {f"{regularizer_key(name)}_{k}": v for k, v in defaults.items() if values[k] is None}
    return chosen


def open_teacher(args: argparse.Namespace, config: dict[str, Any]) -> Teacher | None:
    """The frozen teacher of the regularizer that has one, such as Self-Transcendence in its second stage."""
    values = {name: regularizer_values(args, name) for name in args.regularizers}
    teachers = {name: str(given["teacher"]) for name, given in values.items() if given.get("teacher") is not None}
    if not teachers:
        return None
    if len(teachers) > 1:
        raise ValueError(f"one of `--regularizers` can have a frozen teacher, but {' and '.join(teachers)} have one.")
    ((name, folder),) = teachers.items()
    key = regularizer_key(name)
    flag = f"--{key}_teacher"
    teacher = load_teacher(folder, flag)
    pipeline = Path(folder, "pipeline") if Path(folder, "model.safetensors").is_file() else folder
    path_type = LSEPPipeline.load_config(pipeline).get("path_type", "linear")
    if path_type != args.path_type:
        raise ValueError(f"`{flag}` has to be a model with `--path_type {args.path_type}`, but has {path_type}.")
    sizes = ("sample_size", "patch_size", "in_channels", "num_classes", "num_attention_heads", "attention_head_dim")
    for size in sizes:
        if teacher.transformer.config[size] != config[size]:
            raise ValueError(
                f"`{flag}` has to be a model with `{size}={config[size]}`, like the one in training, but has"
                f" {teacher.transformer.config[size]}."
            )
    depth = values[name].get("teacher_depth") or 1
    if depth > teacher.transformer.config.num_layers:
        raise ValueError(
            f"`{flag}_depth` has to lie in 1..{teacher.transformer.config.num_layers}, the"
            f" number of blocks of `{flag}`, but is {depth}."
        )
    return teacher


def build_regularizers(
    args: argparse.Namespace, transformer: SiTTransformer2DModel, encoder: REPAEncoder | None
) -> dict[str, Regularizer]:
    """The losses beside LSEP's that the flags ask for, by name."""
    regularizers: dict[str, Regularizer] = {}
    if encoder is not None:
        regularizers["repa"] = REPARegularizer(
            transformer.inner_dim,
            encoder.size,
            args.repa_depth,
            args.repa_weight,
            projector=args.repa_projector,
            target_alpha=args.repa_target_alpha,
        )
    for name in args.regularizers:
        key, values = regularizer_key(name), regularizer_values(args, name)
        try:
            regularizers[key] = REGULARIZERS[name].for_transformer(transformer, **values)
        except ValueError as error:  # which names arguments, not flags
            message = re.sub(rf"`({'|'.join(values)})`", rf"`--{key}_\1`", str(error))
            raise ValueError(message) from None
        if regularizers[key].teacher == "frozen" and values.get("teacher") is None:
            raise ValueError(f"`--{key}_teacher` has to be given for `--regularizers {name}`, but is None.")
    return regularizers
