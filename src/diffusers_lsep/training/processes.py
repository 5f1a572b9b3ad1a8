# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The processes of a training run: how they start, the cores and the memory they get."""

import argparse
import math
import os
import warnings
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, DynamoBackend, InitProcessGroupKwargs, parse_flag_from_env
from torch._functorch import config as functorch_config
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..command_line import with_values


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


def start_accelerator(args: argparse.Namespace) -> tuple[Accelerator, argparse.Namespace]:
    """
    Starts accelerate as it is configured.

    Args:
        args (`argparse.Namespace`): The flags. They are not changed.

    Returns:
        `tuple[Accelerator, argparse.Namespace]`: this process among the others, and the flags with the values of those
        that were not given and depend on it.

    Raises:
        `ValueError`: if accelerate is configured for something that training does not support, or if there is no such
        tracker.
    """
    tracker = choose_tracker(args.report_to)
    # The new name, `forward_sync_buffers`, is one that accelerate cannot hand on.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if tracker == "none" else tracker,
        project_dir=str(Path(args.output_dir, args.logging_dir)),
        # Elsewhere batches are not pinned, and a copy that nobody waits for may read what is no longer theirs.
        dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),
        kwargs_handlers=[
            # The buffers are constants.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            # Others wait while one reads a large data set for the first time, for which ten minutes are too few.
            InitProcessGroupKwargs(timeout=timedelta(hours=12)),
        ],
    )
    kind = accelerator.distributed_type
    other = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.FSDP)
    if kind in other and not accelerator.is_fsdp2:
        raise ValueError(f"train_lsep.py runs on one device, data-parallel or with FSDP2, not with {kind}.")
    if accelerator.is_fsdp2:
        if accelerator.state.fsdp_plugin.activation_checkpointing:
            raise ValueError("give `--gradient_checkpointing` in place of `fsdp_activation_checkpointing`.")
        # Autocast from weights in float32, as without sharding, or from what it would round them to. accelerate's own
        # policy would round times and losses too.
        policy = MixedPrecisionPolicy()
        if args.fsdp_param_dtype == "bf16":
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    if args.fsdp_param_dtype == "bf16" and not (accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16"):
        raise ValueError(
            "`--fsdp_param_dtype` bf16 needs FSDP2 (examples/configs/accelerate/fsdp2.yaml) and `--mixed_precision"
            f" bf16`, but there is {kind} with {accelerator.mixed_precision}."
        )
    if not accelerator.state.dynamo_plugin.dynamic:
        # False, accelerate's default, is for sizes that never change. The number of samples in the probe's stream
        # does: the step would be compiled anew for the first eight of them, and not at all from then on.
        accelerator.state.dynamo_plugin.dynamic = None
    if args.activation_memory_budget is not None:
        if accelerator.state.dynamo_plugin.backend == DynamoBackend.NO:
            raise ValueError(
                f"`--activation_memory_budget` {args.activation_memory_budget} needs a compiled step: `accelerate"
                " launch --dynamo_backend inductor`."
            )
        functorch_config.activation_memory_budget = args.activation_memory_budget
    threads = args.num_cpu_threads
    if accelerator.device.type == "cpu":
        # `accelerate launch` and torchrun set OMP_NUM_THREADS to 1 where nobody has set it.
        if threads is None and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            threads = max(1, usable_cores() // processes_here(accelerator))
        if threads is not None:
            torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    values = {"mixed_precision": accelerator.mixed_precision, "num_cpu_threads": threads, "report_to": tracker}
    return accelerator, with_values(args, **values)


def processes_here(accelerator: Accelerator) -> int:
    """How many processes there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


def choose_tracker(report_to: str | None) -> str:
    """The tracker that is asked for, or tensorboard if it is installed, or `"none"`."""
    available = [str(tracker) for tracker in get_available_trackers()]
    if report_to is None:
        return "tensorboard" if "tensorboard" in available else "none"
    if report_to not in ("none", "all", *available):
        raise ValueError(
            f"`--report_to` has to be none, all or one of the trackers that are installed, {available}, but is"
            f" {report_to!r}. (tensorboard comes with `pip install 'diffusers_lsep[train]'`.)"
        )
    return report_to
