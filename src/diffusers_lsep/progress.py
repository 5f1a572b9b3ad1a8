# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Progress for terminals, notebooks and log files."""

import sys

from tqdm.auto import tqdm


SECONDS_PER_LINE = 60.0


class _Lines(tqdm):
    """A bar of which every state is a line of its own."""

    def display(self, msg: str | None = None, pos: int | None = None):
        self.fp.write(f"{self if msg is None else msg}\n")
        self.fp.flush()

    def close(self):
        if self.disable:
            return
        self.disable = True
        if self.leave:
            self.display()
        self._decr_instances(self)


def shows_bars() -> bool:
    """Whether a bar can be drawn over itself: on a terminal and in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def make_progress_bar(**options) -> tqdm:
    """
    A bar of tqdm; where it goes to no terminal and no notebook, a line a minute: a log file keeps all of its states.

    Args:
        options: Of `tqdm`.
    """
    if shows_bars():
        return tqdm(**options)
    interval = {"mininterval": SECONDS_PER_LINE, "maxinterval": SECONDS_PER_LINE}
    delay = 0.0 if options.get("leave", True) else SECONDS_PER_LINE  # one of many short ones says nothing
    return _Lines(**options, **interval, delay=delay)
