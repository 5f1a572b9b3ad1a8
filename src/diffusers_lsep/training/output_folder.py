# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The output folder of a run: what is there, and whether a run can go on from it."""

import argparse
import itertools
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..command_line import check_writable, with_values
from ..data.fingerprint import Fingerprint
from ..data.moments_writer import UNREADABLE_FILE
from ..files import locked_folder, remove, write_text
from .arguments import build_parser, flags_that_are
from .checkpoints import (
    MANIFEST_FILE,
    choose_checkpoint,
    list_checkpoints,
    read_state,
    remove_leftovers,
    remove_old_checkpoints,
)
from .post_hoc_ema import SNAPSHOTS_FOLDER, remove_snapshots_after
from .setup import follows_length


SETTINGS_FILE = "training_args.json"
FINGERPRINT_FILE = "fingerprint.npy"

AS_MANY_SAMPLES = (
    " The samples of a step are `--train_batch_size` times `--gradient_accumulation_steps` times the processes: with"
    " more or fewer of these, change the others."
)

# What a run writes into its output folder, and `--overwrite_output_dir` therefore removes.
OUTPUTS = (
    *(SETTINGS_FILE, FINGERPRINT_FILE, "metrics.jsonl", "curves.png", "samples", "logs"),
    *("checkpoint-*", ".checkpoint-*", SNAPSHOTS_FOLDER),
    *(UNREADABLE_FILE, "model_index.json", "transformer", "scheduler", "vae", "probe", "lora", ".pipeline*"),
)


def find_run_to_continue(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[Path | None, dict[str, Any] | None]:
    """
    Looks into the output folder, for all processes.

    Args:
        args (`argparse.Namespace`): The flags.
        accelerator (`Accelerator`): This process among the others.

    Returns:
        `tuple[Path | None, dict | None]`: the checkpoint to continue from, and the settings of the run to continue.

    Raises:
        `ValueError`: if the folder cannot be written, holds something else, or a run and no flag that says what to do
        with it; or if there is no such checkpoint, or not on every machine.
    """
    found = [look_for_run(args, accelerator.print) if accelerator.is_main_process else None]
    checkpoint, settings = broadcast_object_list(found)[0]
    if checkpoint is not None:
        sees = gather_object([(socket.gethostname(), (checkpoint / MANIFEST_FILE).is_file())])
        without = sorted({host for host, is_there in sees if not is_there})
        if without:
            raise ValueError(
                f"`--resume_from_checkpoint`: {checkpoint} is not there on {', '.join(without)}. All machines have to"
                " read it: have `--output_dir` on a disk that they share, or copy it to the same place on each."
            )
    return checkpoint, settings


def look_for_run(args: argparse.Namespace, report: Callable[[str], None]) -> tuple[Path | None, dict[str, Any] | None]:
    """[`find_run_to_continue`] for one process."""
    output_dir = Path(args.output_dir)
    check_writable("--output_dir", args.output_dir)
    found = sorted(path.name for pattern in OUTPUTS for path in output_dir.glob(pattern))
    settings_file = output_dir / SETTINGS_FILE
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
        if checkpoint is not None and found and not _is_of_the_run(checkpoint, output_dir):
            raise ValueError(
                f"`--output_dir` {args.output_dir!r} already holds a run ({', '.join(found[:4])}), and `--resume_from"
                f"_checkpoint` {args.resume_from_checkpoint!r} is of another one. Choose another folder."
            )
        if checkpoint is not None:
            return checkpoint, read_state(checkpoint)["settings"]
        return None, json.loads(settings_file.read_text(encoding="utf-8")) if found else None
    return None, None


def _is_of_the_run(checkpoint: Path, output_dir: Path) -> bool:
    """Whether a checkpoint, wherever it was kept, is of the run in a folder: the method and the data are the same."""
    if checkpoint.parent.resolve() == output_dir.resolve():
        return True
    one, other = read_state(checkpoint)["settings"], json.loads((output_dir / SETTINGS_FILE).read_text("utf-8"))
    may_differ = flags_that_are("changeable") | flags_that_are("is_length") | flags_that_are("is_kept")
    may_differ |= {"recipe", "threads", "processes"}
    return all(one[name] == other[name] for name in (one.keys() & other.keys()) - may_differ)


@contextmanager
def own_output_folder(
    args: argparse.Namespace,
    settings: dict[str, Any],
    fingerprint: Fingerprint | None,
    checkpoint: Path | None,
    report: Callable[[str], None],
) -> Iterator[None]:
    """
    Makes the output folder, or clears it of what a killed or an unwanted run has left, writes the settings, and keeps
    other runs out of the folder until the block ends.

    Args:
        args (`argparse.Namespace`): The flags.
        settings (`dict`): What is to be written.
        fingerprint ([`Fingerprint`], *optional*): Of the data, to be written too.
        checkpoint (`Path`, *optional*): What the run continues from.
        report (`Callable`): Is told which checkpoints are put aside.

    Raises:
        `ValueError`: if another run has the folder.
    """
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with locked_folder(output_dir):
        if args.overwrite_output_dir:
            remove_outputs(output_dir)
        remove_leftovers(output_dir)
        if checkpoint is not None:
            put_aside(output_dir, read_state(checkpoint)["step"], report)
            remove_old_checkpoints(output_dir, args.checkpoints_total_limit, args.milestone_steps)
        # What a run takes once more, it writes once more.
        remove_snapshots_after(output_dir, 0 if checkpoint is None else read_state(checkpoint)["step"])
        # The settings first, as they say that the folder is a run's.
        write_text(output_dir / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
        if fingerprint is not None:
            fingerprint.save(output_dir / FINGERPRINT_FILE)
        yield


def put_aside(output_dir: Path, step: int, report: Callable[[str], None]):
    """Renames the checkpoints after a step: the run that goes on from there is another one than theirs."""
    for later, folder in list_checkpoints(output_dir):
        if later > step:
            targets = (folder.with_name(f"{folder.name}.aside-{count}") for count in itertools.count(1))
            target = next(target for target in targets if not target.exists())
            folder.rename(target)
            report(f"{folder.name} is ahead of step {step}, from where this run continues: put aside as {target}.")


def remove_outputs(output_dir: Path):
    """Deletes what a run has written into its output folder, and nothing else."""
    # The settings last, as they say that all this is a run: whatever stops the deletion, it can be asked for again.
    for pattern in sorted(OUTPUTS, key=lambda pattern: pattern == SETTINGS_FILE):
        for path in output_dir.glob(pattern):
            remove(path)


def keep_settings(args: argparse.Namespace, before: dict[str, Any]) -> argparse.Namespace:
    """The flags, with what is not given and follows from others as it was in the run that is continued."""
    names = [name for name in flags_that_are("is_kept") if getattr(args, name) is None]
    if follows_length(before):
        names = [name for name in names if not name.startswith("ema")]
    return with_values(args, **{name: before.get(name) for name in names})


def check_length(checkpoint: Path, max_train_steps: int):
    """Raises a `ValueError` if a run is to end before the checkpoint from which it goes on."""
    step = read_state(checkpoint)["step"]
    if step > max_train_steps:
        raise ValueError(
            f"`--max_train_steps` {max_train_steps} lies before {checkpoint}. Resume from an earlier checkpoint for a"
            " shorter run."
        )


def compare_settings(settings: dict[str, Any], before: dict[str, Any], report: Callable[[str], None]):
    """Lists what differs from the run that is continued, and refuses what would change the method."""
    may_change = flags_that_are("changeable") | {"recipe"}
    if settings["lr_scheduler"] in ("constant", "constant_with_warmup"):
        may_change |= flags_that_are("is_length")
    if follows_length(settings) and follows_length(before):
        may_change |= {"ema_decay"}  # no decay was reached yet that another length would not have
    # An older version has left out what it did not know: its runs went by what is now the default, where there is one.
    defaults = vars(build_parser("").parse_args([]))
    before = {**settings, **{k: v for k, v in defaults.items() if k not in flags_that_are("is_kept")}, **before}
    changed = [
        name
        for name, value in settings.items()
        if before[name] != value and name not in ("threads", "processes", "training_data")
    ]
    lines = {name: f"{name}: {before[name]} -> {settings[name]}" for name in changed}
    refused = [line for name, line in lines.items() if name not in may_change]
    if refused:
        raise ValueError(
            "`--resume_from_checkpoint` cannot continue a run with another method or other data: "
            + "; ".join(refused)
            + ". Start a new run in another `--output_dir`, or give the flags of the checkpoint."
            + (AS_MANY_SAMPLES if "samples_per_step" in changed else "")
        )
    for line in lines.values():
        report(f"Changed since the checkpoint: {line}")
    for name in ("threads", "processes"):
        if before[name] != settings[name]:
            report(f"The checkpoint was made with {before[name]} {name}, now there are {settings[name]}: the last")
            report("bits of the results may differ from those of an uninterrupted run.")


def compare_data(settings: dict[str, Any], before: dict[str, Any], fingerprint: Fingerprint | None, folder: Path):
    """
    Refuses data that have changed since the run that is continued. A call for all processes.

    Args:
        settings (`dict`): Those of this run.
        before (`dict`): Those of the other. An older version has not looked at the data.
        fingerprint ([`Fingerprint`], *optional*): Of the data, in the main process.
        folder (`Path`): The other run's, which knows more.
    """
    if before.get("training_data", settings["training_data"]) == settings["training_data"]:
        return
    changed = None
    if fingerprint is not None:
        changed = fingerprint.describe(fingerprint.find_changes(folder / FINGERPRINT_FILE), "an image")
    [changed] = broadcast_object_list([changed])
    raise ValueError(
        f"`--resume_from_checkpoint` cannot continue a run with other data: {changed} has changed since it began."
        " Restore it, or start a new run in another `--output_dir`. (Compared are the size of every image or file and"
        " a sample of the bytes, not places or times.)"
    )
