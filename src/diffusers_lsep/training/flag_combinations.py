# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Flags of `examples/train_lsep.py` that need, exclude or imply one another."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ..command_line import ArgumentParser
from ..regularizers import REGULARIZERS, regularizer_key
from .flow_map import check_flow_map_flags
from .post_hoc_ema import check_post_hoc_ema


def check_combinations(parser: ArgumentParser, args: argparse.Namespace, sources: Sequence[str]):
    """
    Ends with a usage error where flags do not go together, and sets those that follow from others.

    Args:
        parser (`ArgumentParser`): For the error.
        args (`argparse.Namespace`): The flags.
        sources (`Sequence[str]`): Those of them that say what is trained on, and are given.
    """
    if len(sources) > 1:
        parser.error(f"only one source of data can be given, but there are --{' and --'.join(sources)}")
    if args.num_train_images is not None and not args.streaming:
        parser.error("--num_train_images needs --streaming: otherwise all images are taken")
    if args.dataset_config_name is not None and args.dataset_name is None:
        parser.error("--dataset_config_name needs --dataset_name")
    if args.validation_split == "none":
        args.validation_split = None
    if args.streaming:
        if args.latents_dir is not None:
            parser.error("--streaming is for images, --latents_dir is on this machine")
        if args.validation_split is not None and sources:
            parser.error(
                "--streaming has no held-out images: leave out --validation_split, or give `none` after a recipe"
            )
        args.dataloader_num_workers = 0  # `datasets` would deal the shards out to them, in another order
        args.validation_split = None
    data_dir, output_dir = args.train_data_dir, Path(args.output_dir).resolve()
    if data_dir is not None and output_dir.is_relative_to(Path(data_dir).resolve()):
        parser.error(f"--output_dir {args.output_dir} has to lie outside of the data, --train_data_dir {data_dir}")
    if args.resume_from_checkpoint and args.overwrite_output_dir:
        parser.error(
            "--resume_from_checkpoint continues a run and --overwrite_output_dir deletes it: give one of them"
        )
    if args.push_to_hub and args.license is None:
        parser.error("--push_to_hub needs --license: nobody but you can say under which one the weights may be used")
    if args.hub_lora_model_id and (args.lora_rank is None or args.license is None):
        parser.error("--hub_lora_model_id needs --lora_rank, whose layers it uploads, and --license")
    if args.probe_fraction == 0:
        parser.error("argument --probe_fraction: has to be above 0, but is 0.0; --no_lsep trains without a probe")
    if args.pretrained_model_name_or_path and args.model_config_name_or_path:
        parser.error("--pretrained_model_name_or_path says what --model_config_name_or_path says: give one of them")
    for flag in ("new_classes", "lora_rank"):
        if getattr(args, flag) and not args.pretrained_model_name_or_path:
            parser.error(f"--{flag} needs a model to start from: --pretrained_model_name_or_path")
    if args.lora_rank is not None and importlib.util.find_spec("peft") is None:
        parser.error("--lora_rank needs peft: pip install peft")
    if args.unconditional:
        for flag in ("num_classes", "new_classes", "validation_labels"):
            if getattr(args, flag):
                parser.error(f"--unconditional trains without classes: leave out --{flag}")
        args.no_lsep = True
        args.validation_guidance_scale = 1.0  # nothing to be guided to
    check_flow_map_flags(args, parser)
    if args.repa_encoder is None:
        parser.refuse_without("--repa_encoder", args, "repa_")
    for name in REGULARIZERS:
        if name not in args.regularizers:
            parser.refuse_without(f"--regularizers {name}", args, f"{regularizer_key(name)}_")
    averaging = [name for name in args.regularizers if REGULARIZERS[name].teacher == "average"]
    if averaging and not args.use_ema:
        parser.error(f"--regularizers {averaging[0]} needs the average of the weights: leave out --no-use_ema")
    check_post_hoc_ema(parser, args)
    if args.probe_decay_start_epoch is None:
        parser.refuse_without("--probe_decay_start_epoch", args, "probe_decay_epochs")
    if args.self_transcendence_teacher is None:
        of_second_stage = ("self_transcendence_teacher_depth", "self_transcendence_guidance_scale")
        parser.refuse_without("--self_transcendence_teacher", args, of_second_stage)
    if args.sra_decay_start_epoch is None:
        parser.refuse_without("--sra_decay_start_epoch", args, "sra_decay_epochs")
    if args.checkpoints_total_limit is None:
        parser.refuse_without("--checkpoints_total_limit", args, "milestone_steps")
    if args.ema_warmup is False and args.ema_decay is None:
        parser.error("--no-ema_warmup needs --ema_decay: the average of a length that is not given begins with it")
    if args.probe_decay_epochs == 0:
        parser.error("argument --probe_decay_epochs: has to be above 0, but is 0.0")
