# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The processes of a training run: the cores they get, and how they stop together."""

import math
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env


def usable_cores() -> int:
    """The cores that this process may use: a container may have a part of the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))  # `max` is no number: no limit
    return cores


def has_gpu() -> bool:
    """Whether accelerate will train on something else than a CPU."""
    return torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def memory_limit(device: torch.device) -> int:
    """The memory in bytes that there is at all: of a CUDA device, else of this machine or of its container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups, version 2 and 1
        with suppress(OSError, ValueError):
            limit = min(limit, int(Path("/sys/fs/cgroup", file).read_text()))  # `max` is no number: no limit
    return limit


class StopSignal:
    """Notices SIGTERM and SIGUSR1, and lets all processes agree to stop after the same step."""

    def __init__(self, accelerator: Accelerator):
        self.name: str | None = None
        # On the host: a question to the device would stop it at every step.
        self.group: Any = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame):
        self.name = signal.Signals(number).name

    def arrived(self) -> bool:
        if self.group is None:
            return self.name is not None
        flag = torch.tensor([self.name is not None], dtype=torch.int32)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flag.item())
