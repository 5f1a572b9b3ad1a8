# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run comes to, in words and in memory, for the user."""

import argparse
import math
import shlex
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend

from ..objective import LSEPObjective
from .arguments import build_parser
from .memory import activations_needed, copies_needed, state_needed
from .post_hoc_ema import SNAPSHOT_DTYPES
from .processes import memory_limit, processes_here
from .recipes import RECIPES
from .setup import Setup, build_objective


# Of the weights of the start in the average: more than this shows in the samples.
MAX_INITIAL_SHARE = 0.02


def describe_initial_weights(args: argparse.Namespace) -> str | None:
    """A warning, if at the end of the run the average still holds more than a few per cent of the initial weights."""
    # The product of the decays; the first one of a warm-up is 0.
    share = 0.0 if args.ema_warmup or not args.use_ema else args.ema_decay**args.max_train_steps
    if share <= MAX_INITIAL_SHARE:
        return None
    return (
        f"After {args.max_train_steps:,} steps with `--ema_decay {args.ema_decay}` the average of the weights still"
        f" holds {share:.1%} of the initial weights, and it is the average that is saved and drawn from: leave out"
        " `--ema_decay`, or add `--ema_warmup`, or train longer."
    )


def describe_result(args: argparse.Namespace) -> str:
    """What a run has made, and two commands to go on with."""
    folder = str(Path(args.output_dir))
    samples, settings = (Path(folder, name) for name in ("samples", "training_args.json"))
    lines = [f"Saved the pipeline in {folder}, samples in {samples}, the settings in {settings}."]
    model = f"--pretrained_model_name_or_path {shlex.quote(folder)}"
    draw = "--num_images 16 --label_sampling none --save_images" if args.unconditional else "--class_labels 0"
    if args.flow_map:
        draw += f" --num_inference_steps {args.validation_inference_steps}"
    commands = [f"diffusers-lsep sample {model} {draw} --output_dir {shlex.quote(f'{folder}-samples')}"]
    has_classes = not args.unconditional and not args.streaming and args.dataset_config_name is None
    if args.validation_split is not None and has_classes:
        data = args.train_data_dir or args.dataset_name or args.latents_dir
        words = ["diffusers-lsep", "probe", folder, "--data", data, "--validation_split", str(args.validation_split)]
        for flag, column in (("--image_column", args.image_column), ("--label_column", args.label_column)):
            if column != build_parser("").get_default(flag.removeprefix("--")):
                words += [flag, column]
        commands.append(shlex.join([*words, "--method", "ridge", "--output_dir", f"{folder}-probing"]))
    else:
        commands.append(f"diffusers-lsep space {model} --output_dir {shlex.quote(f'{folder}-space')}")
    return "\n".join([*lines, "To go on:", *(f"  {command}" for command in commands)])


def describe_settings(given: argparse.Namespace) -> str:
    """The flags, as they are given, that are not their defaults."""
    defaults = {action.dest: action.default for action in build_parser("")._actions}
    changed = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in vars(given).items()
        if name in defaults and value != defaults[name] and name not in ("dry_run", "resume_from_checkpoint")
    }
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "none"


def report_summary(setup: Setup, accelerator: Accelerator, given: argparse.Namespace) -> str | None:
    """
    Prints what a run comes to.

    Args:
        setup ([`Setup`]): What its flags come to.
        accelerator (`Accelerator`): This process among the others.
        given (`argparse.Namespace`): Its flags as they are given, of [`read_flags`].

    Returns:
        `str` or None: why it does not fit into memory, if it does not.
    """
    with torch.device("meta"):
        objective = build_objective(setup, load=False)
    compiles = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    needed = [
        state_needed(setup, objective, accelerator.num_processes if accelerator.is_fsdp2 else 1),
        activations_needed(setup, compiles),
    ]
    shares_memory = accelerator.device.type != "cuda"  # with the host
    copies = copies_needed(setup, objective) if shares_memory else 0
    accelerator.print(describe(setup, objective, given, needed, copies, compiles))
    sharing = processes_here(accelerator) if shares_memory else 1
    return describe_shortage(setup.args, needed, copies, memory_limit(accelerator.device), sharing)


def describe_shortage(
    args: argparse.Namespace, needed: list[int], copies: int, memory: int, num_processes: int
) -> str | None:
    """What to say if processes that share a memory need more than there is; one of them has copies for checkpoints."""
    if num_processes * sum(needed) + copies <= memory:
        return None
    state, activations = (value / 1e9 for value in needed)
    for_checkpoints = f", and {copies / 1e9:.2f} GB of copies for checkpoints" if copies else ""
    processes = f"{num_processes} processes with " if num_processes > 1 else ""
    smaller = ["a smaller model (`--preset`, or none at all for one that suits own images)"]
    if activations > state:
        steps = "with more `--gradient_accumulation_steps`"
        smaller.insert(0, f"a `--train_batch_size` below {args.train_batch_size} {steps}, `--gradient_checkpointing`")
        if args.pretrained_vae_model_name_or_path is None:
            smaller.append("a smaller `--resolution` or larger `--patch_size`, or a VAE")
    return (
        f"training does not fit into this machine's memory: {processes}at least {state:.2f} GB of state and"
        f" {activations:.2f} GB of activations{for_checkpoints}, of {memory / 1e9:.2f} GB in all."
        f" What helps: {'; '.join(smaller)}."
    )


def describe_snapshots(args: argparse.Namespace, num_parameters: int) -> str:
    """How many snapshots of post-hoc EMA there will be, and how much room they take."""
    count = math.ceil(args.max_train_steps / args.post_hoc_ema_steps)
    size = num_parameters * len(args.post_hoc_ema_sigmas) * SNAPSHOT_DTYPES[args.post_hoc_ema_dtype].itemsize
    return (
        f"post-hoc EMA: averages of the lengths {', '.join(map(str, args.post_hoc_ema_sigmas))}, in"
        f" {args.post_hoc_ema_dtype} every {args.post_hoc_ema_steps:,} steps: {count} snapshots of"
        f" {size / 1e9:.3g} GB, {count * size / 1e9:.3g} GB in all"
    )


def describe(
    setup: Setup,
    objective: LSEPObjective,
    given: argparse.Namespace,
    needed: list[int],
    copies: int,
    compiles: bool,
) -> str:
    """
    What a run comes to, for the user.

    Args:
        setup ([`Setup`]): What its flags come to.
        objective ([`LSEPObjective`]): The objective, whose weights may be on the meta device.
        given (`argparse.Namespace`): Its flags as they are given.
        needed (`list[int]`): Its memory, for state and for activations.
        copies (`int`): Of that again, what the process that writes checkpoints needs for them.
        compiles (`bool`): Whether the step is compiled.
    """
    args, data, transformer = setup.args, setup.data, objective.transformer
    config = transformer.config
    parameters = sum(p.numel() for p in transformer.parameters())
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    held_out = len(data.held_out.labels) if data.held_out is not None else 0
    state, activations = (value / 1e9 for value in needed)
    how = "compiled" if compiles else "not compiled"
    how += ", with gradient checkpointing" if args.gradient_checkpointing else ""
    classes = f"{len(data.names)} classes"
    if args.unconditional:
        classes = "without labels: all are the null class, and LSEP, which needs classes, is off"
    average = f"decay {args.ema_decay:.6g}{', after a warm-up' if args.ema_warmup else ''}" if args.use_ema else "none"
    lines = [
        f"transformer: {parameters:,} parameters, {config.num_layers} blocks of width {transformer.inner_dim}",
        f"trained: {trained:,} parameters, those of the probe and of other losses' heads among them",
        f"tokens: {(config.sample_size // config.patch_size) ** 2} per image",
        f"images: {len(data.source.labels):,} to train on, {held_out:,} held out, {classes}",
        f"steps: {args.max_train_steps:,} of {setup.samples_per_step} images, {setup.steps_per_epoch:,.1f} per epoch",
        f"average of the weights: {average}",
        f"memory per process, at least: {state:.2f} GB of state, {activations:.2f} GB of activations ({how})"
        + (f", and {copies / 1e9:.2f} GB in the one that writes checkpoints" if copies else ""),
        f"settings that are not the defaults: {describe_settings(given)}",
    ]
    if args.post_hoc_ema_sigmas is not None:
        lines.append(describe_snapshots(args, trained))
    if data.treatment is not None:
        lines.insert(4, f"pixels: {data.treatment}")
    if args.recipe is not None:
        why = f"since {RECIPES[args.recipe]}; flags that are given win"
        lines.insert(0, f"recipe: examples/configs/{args.recipe}, {why}")
    warning = describe_initial_weights(args)
    if warning is not None:
        lines.append(warning)
    return "\n".join(lines)
