# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Images that cannot be read while training: which they are, and how many are too many."""

from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..data.moments_writer import UNREADABLE_FILE, write_unreadable
from .checkpoint_writer import CheckpointWriter
from .log import read_lines


class UnreadableImages:
    """
    The images that the stream has replaced by others, in all processes.

    Args:
        folder (`Path`): Where they are listed.
        limit (`int`): How many there may be. If 0, the stream itself stops at the first.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.known: dict[str, dict[str, str]] = {}  # to all processes
        self.new: dict[str, dict[str, str]] = {}  # to this one

    def read(self):
        """Reads those that an earlier part of the run has listed, which not every machine may see. A call for all."""
        if self.limit == 0:
            return
        if PartialState().is_main_process and (self.folder / UNREADABLE_FILE).exists():
            self.known = {entry["id"]: entry for entry in read_lines(self.folder / UNREADABLE_FILE)}
        self.known = broadcast_object_list([self.known])[0]

    def add(self, entries: Iterable[dict[str, str]]):
        """Takes note of those that this process has met, each with its `id` and its `error`."""
        self.new |= {entry["id"]: entry for entry in entries}

    def count(self, accelerator: Accelerator, checkpoints: CheckpointWriter):
        """
        Lists what any process has met. A call for all processes.

        Raises:
            `ValueError`: if they are too many.
        """
        if self.limit == 0:
            return
        before, path = len(self.known), self.folder / UNREADABLE_FILE
        for entries in gather_object([self.new]):
            self.known |= entries
        self.new = {}
        if len(self.known) == before:
            return
        if accelerator.is_main_process:
            write_unreadable(self.folder, self.known.values())
        last = list(self.known.values())[-1]
        found = f"{len(self.known)} unreadable images, listed in {path} (last: {last['id']}: {last['error']})"
        if len(self.known) > self.limit:
            checkpoints.finish()
            good = f"from {checkpoints.last}" if checkpoints.last is not None else "from the beginning"
            raise ValueError(
                f"{found} are more than `--max_errors {self.limit}`. Repair or remove them and start anew, or go on"
                f" {good} with a higher `--max_errors`."
            )
        accelerator.print(f"{found} are replaced by others.")
