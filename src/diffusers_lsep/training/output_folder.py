# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The output folder of a run: what is there, and whether a run can go on from it."""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.moments_writer import UNREADABLE_FILE
from .arguments import CHANGEABLE, DERIVED, LENGTH, build_parser
from .checkpoints import choose_checkpoint, read_state
from .setup import follows_length


# What a run writes into its output folder, and `--overwrite_output_dir` therefore removes.
OUTPUTS = (
    *("training_args.json", "metrics.jsonl", "curves.png", "samples", "logs", "checkpoint-*", ".checkpoint-*"),
    *(UNREADABLE_FILE, "model_index.json", "transformer", "scheduler", "vae", "probe", ".pipeline*"),
)


def find_run_to_continue(
    args: argparse.Namespace, report: Callable[[str], None]
) -> tuple[Path | None, dict[str, Any] | None]:
    """Checks the output folder. Returns the checkpoint to continue from, and the settings of the run to continue."""
    output_dir = Path(args.output_dir)
    parent = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"`--output_dir` {args.output_dir!r} cannot be written: {str(parent)!r} is no such folder.")
    found = sorted(path.name for pattern in OUTPUTS for path in output_dir.glob(pattern))
    settings_file = output_dir / "training_args.json"
    problem = None
    if found and not settings_file.is_file():
        problem = (
            f"`--output_dir` {args.output_dir!r} holds {', '.join(found[:4])}, but no run of this script: choose"
            " another folder."
        )
    elif found and not args.resume_from_checkpoint and not args.overwrite_output_dir:
        problem = (
            f"`--output_dir` {args.output_dir!r} already holds a run ({', '.join(found[:4])}). Continue it with"
            " `--resume_from_checkpoint latest`, delete it with `--overwrite_output_dir`, or choose another folder."
        )
    if problem is not None and args.dry_run:  # which writes nothing
        report(f"A run would be refused: {problem}")
        return None, None
    if problem is not None:
        raise ValueError(problem)
    if args.resume_from_checkpoint:
        checkpoint = choose_checkpoint(output_dir, args.resume_from_checkpoint, report)
        if checkpoint is not None:
            return checkpoint, read_state(checkpoint)["settings"]
        return None, json.loads(settings_file.read_text(encoding="utf-8")) if found else None
    return None, None


def remove_outputs(output_dir: Path):
    """Deletes what a run has written into its output folder, and nothing else."""
    for pattern in OUTPUTS:
        for path in output_dir.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def keep_settings(args: argparse.Namespace, before: dict[str, Any]):
    """Fills in what follows from other flags, and is not given, as it was in the run that is continued."""
    for name in DERIVED:
        if getattr(args, name) is None and not (name.startswith("ema") and follows_length(before)):
            setattr(args, name, before.get(name))


def compare_settings(settings: dict[str, Any], before: dict[str, Any], report: Callable[[str], None]):
    """Lists what differs from the run that is continued, and refuses what would change the method."""
    may_change = CHANGEABLE | (LENGTH if settings["lr_scheduler"] in ("constant", "constant_with_warmup") else set())
    if follows_length(settings) and follows_length(before):
        may_change.add("ema_decay")  # no decay was reached yet that another length would not have
    # An older version has left out what it did not know: its runs went by what is now the default.
    before = {**vars(build_parser("").parse_args([])), **{name: settings[name] for name in DERIVED}, **before}
    changed = {name for name, value in settings.items() if before.get(name) != value} - {"threads", "processes"}
    lines = {name: f"{name}: {before.get(name)} -> {settings[name]}" for name in settings if name in changed}
    refused = [line for name, line in lines.items() if name not in may_change]
    if refused:
        raise ValueError(
            "`--resume_from_checkpoint` cannot continue a run with another method or other data: "
            + "; ".join(refused)
            + ". Start a new run in another `--output_dir`, or give the flags of the checkpoint."
        )
    for line in lines.values():
        report(f"Changed since the checkpoint: {line}")
    for name in ("threads", "processes"):
        if before.get(name) != settings[name]:
            report(f"The checkpoint was made with {before.get(name)} {name}, now there are {settings[name]}: the last")
            report("bits of the results may differ from those of an uninterrupted run.")
