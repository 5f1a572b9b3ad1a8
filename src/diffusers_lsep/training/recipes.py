# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Which argument list of `examples/configs` a run starts from if its flags leave the model open."""

import argparse
import json
from pathlib import Path
from typing import Any

from .checkpoints import read_state
from .processes import has_gpu


# What is trained on own images if no flag says so: argument lists in `examples/configs`, and why this one.
RECIPES = {
    "digits": "no data are given",
    "own-images-32": "no model is given, and no GPU was found",
    "own-images-64": "no model is given, and there is a GPU",
    "own-images-256-vae": "no model is given, but a VAE is",
}

MODEL_FLAGS = (
    *("preset", "model_config_name_or_path", "pretrained_model_name_or_path", "patch_size", "num_layers"),
    *("num_attention_heads", "attention_head_dim"),
)


def choose_recipe(args: argparse.Namespace, sources: list[str]) -> str | None:
    """The argument list in `examples/configs` that the flags are read after, if they leave the model open."""
    if not sources:
        return "digits"
    if sources == ["latents_dir"] or any(getattr(args, flag) is not None for flag in MODEL_FLAGS):
        return None
    begun = settings_of_the_run(args)
    if begun is not None:  # also on another machine, or by a version that had no recipes
        return begun.get("recipe")
    if args.pretrained_vae_model_name_or_path is not None:
        return "own-images-256-vae"
    return "own-images-64" if has_gpu() else "own-images-32"


def settings_of_the_run(args: argparse.Namespace) -> dict[str, Any] | None:
    """The settings of the run that `--resume_from_checkpoint` names. [`find_run_to_continue`] finds what is wrong."""
    if not args.resume_from_checkpoint:
        return None
    given = Path(args.resume_from_checkpoint)
    folder = given if given.is_dir() else Path(args.output_dir, args.resume_from_checkpoint)
    try:
        if args.resume_from_checkpoint == "latest":
            return json.loads(Path(args.output_dir, "training_args.json").read_text(encoding="utf-8"))
        return read_state(folder)["settings"]
    except (OSError, ValueError, KeyError):
        return None
