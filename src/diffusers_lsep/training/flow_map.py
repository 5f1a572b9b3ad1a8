# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning into a flow map: its flags, and what they come to in every batch."""

import argparse
from typing import Any

import torch

from ..command_line import ArgumentParser, number
from ..flow_map import DERIVATIVES, guided_velocity, mean_velocity_target
from ..interpolants import get_interpolant, timesteps_from_uniform
from ..regularizers.teachers import Teacher, load_teacher
from .fine_tuning import Start
from .flags import Flags


VELOCITIES = ("teacher", "data")
NUM_DRAWS = 2  # of the second time, and of whether it is the first


def add_flow_map_flags(flags: Flags):
    """Flow maps, for sampling in few steps."""
    add = flags.add
    add("--flow_map", action="store_true", help="Train a flow map, which samples in a few steps.")
    add(
        "--flow_map_depth",
        type=number(int, 1),
        help="After how many blocks the time to go to takes the place of the time (default: the model's, else two"
        " thirds of all).",
    )
    add(
        "--flow_map_velocity",
        choices=VELOCITIES,
        help="Which flow it maps: that of --pretrained_model_name_or_path, which stays as it is and has to have the"
        " classes and the size of the data, or that of the data, as published (default: teacher, if there is one).",
    )
    add(
        "--flow_map_guidance_scale",
        type=number(float, 1),
        default=1.0,
        help="Scale of the guidance that is built in.",
    )
    add(
        "--flow_map_guidance_interval",
        type=number(float, 0, 1),
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=[0.0, 1.0],
        help="Times t at which it acts: 0 is data, 1 is noise.",
    )
    add(
        "--flow_map_equal_fraction",
        type=number(float, 0, 1),
        help="On what part of the samples both times are equal (default: 0.25 with a teacher, else 0.75).",
    )
    add(
        "--flow_map_derivative",
        choices=DERIVATIVES,
        default="jvp",
        changeable=True,
        help="How the model is differentiated: exactly, with plain attention, or by a difference, with any.",
    )


def check_flow_map_flags(args: argparse.Namespace, parser: ArgumentParser):
    """Flags that do not go together are a usage error."""
    if not args.flow_map:
        parser.refuse_without("--flow_map", args, "flow_map_")
        return
    for flag, why in (
        ("lora_rank", "trains every weight"),
        ("self_transcendence_teacher", "has no place for another teacher"),
    ):
        if getattr(args, flag) is not None:
            parser.error(f"--flow_map {why}: leave out --{flag}")
    if args.flow_map_velocity == "teacher" and args.pretrained_model_name_or_path is None:
        parser.error("--flow_map_velocity teacher needs --pretrained_model_name_or_path, which is the teacher")
    low, high = args.flow_map_guidance_interval
    if low > high:
        parser.error(f"--flow_map_guidance_interval has to be LOW HIGH with LOW <= HIGH, but is {low} {high}")


def choose_flow_map_flags(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """
    The flags of a flow map that were not given, with their values.

    Args:
        args (`argparse.Namespace`): All flags.
        config (`dict`): Of the transformer.

    Raises:
        `ValueError`: if a flow map is to be trained as something else, or with a probe behind its second time.
    """
    depth = config.get("flow_map_depth")
    if not args.flow_map:
        if depth is not None:
            raise ValueError(f"`--flow_map` has to be given for a model with `flow_map_depth={depth}`, but is not.")
        return {}
    with_teacher = (
        args.flow_map_velocity or "teacher"
    ) == "teacher" and args.pretrained_model_name_or_path is not None
    fraction = args.flow_map_equal_fraction
    return {
        "flow_map_depth": args.flow_map_depth or depth or max(1, config["num_layers"] * 2 // 3),
        "flow_map_velocity": "teacher" if with_teacher else "data",
        "flow_map_equal_fraction": (0.25 if with_teacher else 0.75) if fraction is None else fraction,
    }


def check_flow_map_teacher(start: Start):
    """
    Refuses a teacher that says nothing about what is trained on.

    Args:
        start ([`Start`]): From which model the run starts, which is the teacher.

    Raises:
        `ValueError`: if it knows other classes, or images of another size.
    """
    size, now = start.pretrained.config["sample_size"], start.config["sample_size"]
    problem = None
    if start.new_classes:
        problem = "its classes are others than those of the data"
    elif size != now:
        problem = f"its `sample_size` is {size}, and that of the data {now}"
    if problem is not None:
        raise ValueError(
            "`--flow_map_velocity` has to be data, but is teacher: `--pretrained_model_name_or_path`"
            f" {start.pretrained.name_or_path!r} cannot teach what is trained on, since {problem}. (Or fine-tune it to"
            " them first, and make a flow map of the result.)"
        )


def open_flow_map_teacher(args: argparse.Namespace) -> Teacher | None:
    """The flow that a flow map is made of, if it follows that."""
    if not args.flow_map or args.flow_map_velocity != "teacher":
        return None
    return load_teacher(args.pretrained_model_name_or_path, "--pretrained_model_name_or_path")


def add_flow_map_target(
    batch: dict[str, Any],
    args: argparse.Namespace,
    student: Teacher,
    teacher: Teacher | None,
    draws: torch.Tensor,
):
    """
    Puts the two times of each sample into a batch, and the mean velocity that the model is to have between them.

    Args:
        batch (`dict`): The arguments of [`LSEPObjective`].
        args (`argparse.Namespace`): All flags.
        student ([`~regularizers.teachers.Teacher`]): The model in training.
        teacher ([`~regularizers.teachers.Teacher`], *optional*): The flow to map, in place of that of the data.
        draws (`torch.Tensor` of shape `[B, 2]`): Uniform numbers in [0, 1).
    """
    student = student.with_whole_weights()
    path, null_class = get_interpolant(args.path_type), student.transformer.config.num_classes
    first, second = batch["timesteps"], timesteps_from_uniform(draws[:, 0], path, args.timestep_sampling)
    is_equal = draws[:, 1] < args.flow_map_equal_fraction
    t = torch.where(is_equal, first, torch.maximum(first, second))
    r = torch.where(is_equal, first, torch.minimum(first, second))

    latents, noise, time = batch["latents"].float(), batch["noise"].float(), t.view(-1, 1, 1, 1)
    noisy_latents = path.interpolate(latents, noise, time)
    labels = torch.where(batch["class_dropout_mask"], null_class, batch["class_labels"])
    followed = teacher or student
    velocity = guided_velocity(
        followed.velocity,
        noisy_latents,
        t,
        labels,
        null_class,
        path.velocity(latents, noise, time) if teacher is None else None,
        args.flow_map_guidance_scale,
        args.flow_map_guidance_interval,
    ).float()

    def flow_map(sample, time, r_time, class_labels):
        return student.velocity(sample, time, class_labels, r_time)

    target = mean_velocity_target(flow_map, noisy_latents, t, r, labels, velocity, args.flow_map_derivative)
    batch |= {"timesteps": t, "r_timesteps": r, "target_velocity": target}
