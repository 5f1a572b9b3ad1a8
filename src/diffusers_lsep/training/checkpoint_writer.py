# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are written and hashed while training goes on."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor

from .checkpoints import remove_old_checkpoints, save_checkpoint


class CheckpointWriter:
    """
    Copies what a checkpoint keeps to the host, for which training waits, and writes it in a thread, for which it does
    not. One checkpoint at a time: the next one waits for it, and so does the end of the block, unless that is Ctrl-C.

    Args:
        accelerator (`Accelerator`): This process among the others. The main one writes.
        output_dir (`Path`): The folder of the run.
        save_pipeline (`Callable`): Writes weights as a pipeline into a folder, see [`save_checkpoint`].
        last (`Path`, *optional*): The checkpoint that the run continues from.
        total_limit, milestone_steps (`int`, *optional*): Which ones stay, see [`remove_old_checkpoints`].

    Attributes:
        last (`Path`, *optional*): The newest checkpoint that is complete.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        save_pipeline: Callable[[Path, dict[str, torch.Tensor]], None],
        last: Path | None = None,
        total_limit: int | None = None,
        milestone_steps: int | None = None,
    ):
        self.accelerator, self.output_dir, self.last = accelerator, output_dir, last
        self._save_pipeline, self._limits = save_pipeline, (total_limit, milestone_steps)
        self._copies: dict[tuple[str, str], torch.Tensor] = {}  # memory that every checkpoint takes anew
        self._begun: Path | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error):
        if kind is None:
            self.finish()
        elif self._thread is not None and not issubclass(kind, KeyboardInterrupt):
            self._thread.join()

    def save(self, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]):
        """
        Begins to write `checkpoint-{step}`. A call for all processes.

        Args:
            step (`int`): The step.
            tensors (`dict[str, dict[str, torch.Tensor]]`): What it keeps, as [`checkpoint_tensors`] lists it.
            state (`dict`): Whatever else there is to remember, as JSON.

        Raises:
            `OSError`: if the checkpoint before could not be written.
        """
        self.finish()
        self._begun = self.output_dir / f"checkpoint-{step}"
        copies = {file: self._copy(file, values) for file, values in tensors.items()}
        if not self.accelerator.is_main_process:
            return
        copied = None
        if self.accelerator.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        arguments = (self._begun, copies, json.dumps(state, indent=2) + "\n", copied)
        # A daemon, so that a second Ctrl-C ends the process at once. What it leaves behind the next run removes.
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def _copy(self, file: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies on the host; none where another process writes, but sharded tensors need all to be put together."""
        copies = {}
        for name, tensor in tensors.items():
            tensor = tensor.detach()
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            if not self.accelerator.is_main_process:
                continue
            if (file, name) not in self._copies:
                pinned = tensor.device.type == "cuda"
                self._copies[file, name] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned
                )
            copies[name] = self._copies[file, name]
            # Queued behind what is computed so far, and before the step that changes the tensor.
            copies[name].copy_(tensor, non_blocking=copies[name].is_pinned())
        return copies

    def _write(
        self,
        folder: Path,
        tensors: dict[str, dict[str, torch.Tensor]],
        state: str,
        copied: torch.cuda.Event | None,
    ):
        try:
            if copied is not None:
                copied.synchronize()
            save_checkpoint(folder, tensors, state, self._save_pipeline)
        except Exception as error:  # A full disk, for one, shows in many ways.
            self._error = OSError(f"{folder} could not be written ({error}); the last good checkpoint {self.good}.")
            self._error.__cause__ = error
            return
        try:
            remove_old_checkpoints(self.output_dir, *self._limits)
        except Exception as error:
            self._error = error

    @property
    def good(self) -> str:
        """Where the last good checkpoint is, as the end of a sentence."""
        return f"is {self.last}" if self.last is not None else "does not exist"

    @property
    def has_failed(self) -> bool:
        """Whether something has gone wrong in the background, as far as this process knows: [`finish`] raises it."""
        return self._error is not None

    def finish(self):
        """
        Waits until the checkpoint that was begun is complete. A call for all processes.

        Raises:
            `OSError`: if it could not be written, in all processes.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._begun is None:
            return
        begun, self._begun, error, self._error = self._begun, None, self._error, None
        [problem] = broadcast_object_list([str(error) if error is not None else None])
        if problem is not None:
            raise error or OSError(problem)
        self.last = begun
