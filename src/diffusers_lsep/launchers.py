# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What happens to our processes when the launcher that has started them ends."""

import atexit
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import psutil


LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun", "accelerate.commands.launch", "torch.distributed.run"}


def is_launcher(process: psutil.Process) -> bool:
    """Whether a process is one of accelerate's or torch's launchers, by its command line."""
    try:
        words = process.cmdline()[:4]  # python [-m] accelerate launch
    except psutil.Error:
        return False
    return any(Path(word).name in LAUNCHERS for word in words)


def end_with_launcher(interval: float = 0.5):
    """
    Sends this process SIGTERM once the launcher that has started it is gone, if one has. A signal that ends a launcher
    may not reach what it has launched, which would run on unseen. (Where a shell has started it, the shell may leave.)

    Args:
        interval (`float`, defaults to `0.5`): How often to look, in seconds.
    """
    launcher = os.getppid()
    if not is_launcher(psutil.Process(launcher)):
        return

    ends = threading.Event()

    def watch():
        while os.getppid() == launcher:
            if ends.wait(interval):
                return
        with suppress(OSError):  # its terminal may be gone too
            os.write(2, b"\nThe launcher of this process has ended: so does the process.\n")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def end():
        ends.set()
        thread.join()

    atexit.register(end)  # no thread is to wake up in an interpreter that is being taken apart
