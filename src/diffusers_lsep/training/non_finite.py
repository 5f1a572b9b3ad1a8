# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Training steps whose loss or gradient is not finite: the first one ends the run, or some are skipped."""

import math
from collections.abc import Callable

import torch
from accelerate.optimizer import AcceleratedOptimizer

from .checkpoint_writer import CheckpointWriter


class NonFiniteSteps:
    """
    Skips steps whose gradient is not finite, and ends the run once there are too many of them. A step that is skipped
    changes neither the weights nor AdamW's moments; its samples are used up, and its number is counted on.

    Args:
        max_skipped (`int`): How many may be skipped. With 0 none is, and the first one ends the run.
        scaled (`bool`): Whether a loss scaler skips steps by itself: whose gradient overflows, which is normal.

    Attributes:
        num_skipped (`int`): How many were skipped; to be set where a run is continued.
    """

    def __init__(self, max_skipped: int, scaled: bool):
        self.max_skipped, self.scaled, self.num_skipped = max_skipped, scaled, 0

    def guard(self, optimizer: AcceleratedOptimizer, grad_norm: torch.Tensor):
        """
        Makes the next step of the optimiser none, if the gradient's norm is not finite. That is decided on the device,
        as with a loss scaler, and alike in all processes, which have the same norm.

        Args:
            optimizer (`AcceleratedOptimizer`): A fused one of torch, as accelerate wraps it.
            grad_norm (`torch.Tensor`): A scalar, over all processes.
        """
        if self.max_skipped > 0 and not self.scaled:
            optimizer.optimizer.found_inf = (~grad_norm.isfinite()).float()

    def count(
        self,
        first_step: int,
        losses: list[float],
        grad_norms: list[float],
        checkpoints: CheckpointWriter,
        report: Callable[[str], None],
    ) -> dict[str, int]:
        """
        Takes in the steps of an interval.

        Args:
            first_step (`int`): Number of the first of them.
            losses (`list[float]`): Their losses, means over all processes.
            grad_norms (`list[float]`): Norms of their gradients.
            checkpoints ([`CheckpointWriter`]): Has what to go back to.
            report (`Callable`): Is told what was skipped.

        Returns:
            `dict[str, int]`: for the metrics, if steps may be skipped: how many were.

        Raises:
            `FloatingPointError`: if there are too many, or one could not be skipped as only its loss is not finite.
        """
        for step, (loss, grad_norm) in enumerate(zip(losses, grad_norms), start=first_step):
            if math.isfinite(loss) and (math.isfinite(grad_norm) or self.scaled):
                continue
            what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient's norm", grad_norm)
            problem = f"the {what} of step {step} is {value}"
            if self.num_skipped == self.max_skipped or math.isfinite(grad_norm):
                before = f", after {self.num_skipped} steps that were skipped" if self.num_skipped else ""
                checkpoints.finish()
                raise FloatingPointError(f"{problem}{before}; the last good checkpoint {checkpoints.good}.")
            self.num_skipped += 1
            report(f"Skipped: {problem} ({self.num_skipped} of at most {self.max_skipped} such steps).")
        return {"skipped_steps": self.num_skipped} if self.max_skipped > 0 else {}
