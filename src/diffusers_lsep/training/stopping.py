# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""How a training run is stopped from outside: with a checkpoint, after the same step in all processes."""

import os
import signal
import sys
import threading
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

import torch
from accelerate import Accelerator


EXIT_STOPPED = 75  # EX_TEMPFAIL: to be continued


def stopping_signals() -> list[signal.Signals]:
    """The signals that stop a run. Under `nohup` the end of the terminal is none."""
    hang_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    return [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, *hang_up]


def leave_on_signals():
    """Until training begins and once it is over there is nothing to save: a signal ends the process at once."""

    def leave(number: int, frame):
        raise SystemExit(EXIT_STOPPED)

    for number in stopping_signals():
        if number != signal.SIGINT:
            signal.signal(number, leave)


class StopSignal:
    """
    Notices SIGTERM, SIGUSR1, SIGHUP and SIGINT (Ctrl-C; a second one stops at once) while it is entered, and lets all
    processes agree to stop after the same step.
    """

    def __init__(self, accelerator: Accelerator):
        self.name: str | None = None
        # On the host: a question to the device would stop it at every step.
        self.group: Any = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def _remember(self, number: int, frame):
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            # Not by `print`, which may be what was interrupted.
            with suppress(OSError):
                os.write(2, b"\nStopping after this step, with a checkpoint. Ctrl-C again stops without one.\n")
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> "StopSignal":
        self.handlers_before = {number: signal.signal(number, self._remember) for number in stopping_signals()}
        self.outputs = ExitStack()
        self.outputs.enter_context(redirect_stdout(LastingOutput(sys.stdout)))
        self.outputs.enter_context(redirect_stderr(LastingOutput(sys.stderr)))
        return self

    def __exit__(self, *error):
        self.outputs.close()
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def arrived(self, has_failed: bool = False) -> bool:
        """Whether a signal has reached any process, or `has_failed` is true in any. A call for all processes."""
        stops = self.name is not None or has_failed
        if self.group is None:
            return stops
        flag = torch.tensor([stops], dtype=torch.int32)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flag.item())


class LastingOutput:
    """
    A stream that outlives its reader: Ctrl-C ends the `tee` behind a run, and a hang-up its terminal, before the run
    has said and saved everything.

    Args:
        stream (`TextIO`): The stream of a file.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        return len(text)

    def flush(self):
        self.write("")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def outlive_signals(worker: int):
    """
    For workers that load data: what is to stop the run may reach them too (Ctrl-C and torchrun signal whole groups of
    processes, Slurm all of a job), and their death would end the run before its checkpoint. A SIGTERM from the run
    itself, as it ends, does end them.
    """
    for number in stopping_signals():
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # as on macOS: who has sent a signal is not to be learnt
        return
    run = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
