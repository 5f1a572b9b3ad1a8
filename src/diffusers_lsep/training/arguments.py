# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The flags of `examples/train_lsep.py`."""

import argparse
import importlib.util
import json
import math
import shlex
from pathlib import Path
from typing import Any

from diffusers.optimization import SchedulerType

from ..objective import TIMESTEP_SAMPLINGS
from ..transformer_sit import SIT_PRESETS
from .checkpoints import read_state
from .processes import has_gpu


# arXiv 2509.21565, as far as it is public. The depth for SiT-B is REPA's (arXiv 2410.06940); the paper has no SiT-S.
PAPER_SETTINGS = {
    "SiT-XL": {"probe_depth": 8, "probe_weight_start": 0.0225, "num_probe_weights": 10, "probe_learning_rate": 1e-4},
    "SiT-L": {"probe_depth": 8, "probe_weight_start": 0.03, "num_probe_weights": 1, "probe_learning_rate": 1e-4},
    "SiT-B": {"probe_depth": 4, "probe_weight_start": 0.03, "num_probe_weights": 1, "probe_learning_rate": 3e-2},
}

# What is trained on own images if no flag says so: argument lists in `examples/configs`, and why this one.
RECIPES = {
    "digits": "no data are given",
    "own-images-32": "no model is given, and no GPU was found",
    "own-images-64": "no model is given, and there is a GPU",
    "own-images-256-vae": "no model is given, but a VAE is",
}

MODEL_FLAGS = (
    *("preset", "model_config_name_or_path", "pretrained_model_name_or_path", "patch_size", "num_layers"),
    *("num_attention_heads", "attention_head_dim"),
)

LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]

# Flags that a resumed run may change. What decides the method is compared through `Setup.facts` or refused.
CHANGEABLE = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "logging_dir", "report_to"),
    *("dataset_name", "dataset_config_name", "train_data_dir", "latents_dir", "cache_dir", "dataloader_num_workers"),
    *("pretrained_vae_model_name_or_path", "preset", "model_config_name_or_path", "patch_size", "num_layers"),
    *("num_attention_heads", "attention_head_dim", "qk_norm", "resolution", "image_channels", "num_classes"),
    *("train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision", "allow_tf32"),
    *("num_cpu_threads", "checkpointing_steps", "checkpoints_total_limit", "milestone_steps", "logging_steps"),
    *("validation_steps", "validation_labels", "validation_guidance_scale", "validation_inference_steps"),
    *("num_validation_images", "push_to_hub", "hub_model_id", "license", "max_errors", "recipe"),
}

# Those that follow from others unless given: a run that goes on keeps what it began with.
DERIVED = ("ema_decay", "ema_warmup", "probe_decay_start_epoch")

# Those that a resumed run may change where the learning rate does not depend on the length of the run.
LENGTH = {"max_train_steps", "num_train_epochs"}


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a number from `low` to `high`, both included."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"in {low}..{high}"
            raise argparse.ArgumentTypeError(f"has to be {limits}, but is {text}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it if it is no number at all
    return parse


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
        allow_abbrev=False,
    )
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    count, size, probability = number(int, 0), number(int, 1), number(float, 0, 1)
    positive = number(float, 0)

    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="data set on the Hub, or a folder that `datasets` reads")
    group.add_argument("--dataset_config_name", help="its configuration")
    group.add_argument("--train_data_dir", help="folder of images, one subfolder per class or with a metadata.jsonl")
    group.add_argument("--latents_dir", help="output of encode_latents.py, or a `vae-sd` folder of EDM2 and REPA")
    group.add_argument("--streaming", action="store_true", help="read the data while training, without a download")
    group.add_argument("--num_train_images", type=size, help="with --streaming, if the data set does not say it")
    group.add_argument("--cache_dir", help="where `datasets` keeps its files")
    group.add_argument("--image_column", default="image")
    group.add_argument("--label_column", default="label")
    group.add_argument("--num_classes", type=size, help="if the labels do not show all classes")
    group.add_argument("--resolution", type=size, help="side of the images; 256 if the model does not say")
    group.add_argument("--image_channels", type=int, choices=(1, 3), help="without a VAE: 1 is grey; 3")
    group.add_argument("--random_flip", action="store_true", help="mirror half of the images")
    group.add_argument("--validation_split", help="held-out split: its name, or a fraction such as 0.05 to cut off")
    group.add_argument("--dataloader_num_workers", type=count, default=0)
    group.add_argument(
        "--max_errors", type=count, default=0, help="unreadable images to replace by others of their class, and list"
    )

    group = parser.add_argument_group("model")
    group.add_argument(
        "--preset",
        choices=list(SIT_PRESETS),
        metavar="SiT-{S,B,L,XL}/{2,4,8}",
        help="with the paper's values for what is not given; SiT-XL/2 if other flags of this group are given",
    )
    group.add_argument("--patch_size", type=size, help="in place of the preset's")
    group.add_argument("--num_layers", type=size, help="in place of the preset's")
    group.add_argument("--num_attention_heads", type=size, help="in place of the preset's")
    group.add_argument("--attention_head_dim", type=size, help="in place of the preset's")
    group.add_argument("--qk_norm", action="store_true", help="LayerNorm on queries and keys")
    group.add_argument("--model_config_name_or_path", help="config of a SiTTransformer2DModel, in place of a preset")
    group.add_argument("--pretrained_model_name_or_path", help="a pipeline of this package, to start from its weights")
    group.add_argument("--new_classes", action="store_true", help="its classes are others, though as many")
    group.add_argument("--lora_rank", type=size, help="train LoRA layers and the label table, and freeze all else")
    group.add_argument("--pretrained_vae_model_name_or_path", help="AutoencoderKL; without it the model sees pixels")

    group = parser.add_argument_group("method")
    group.add_argument("--no_lsep", action="store_true", help="train a plain SiT, without the probe")
    group.add_argument("--path_type", default="linear", choices=("linear", "cosine"))
    group.add_argument("--timestep_sampling", default="uniform", choices=TIMESTEP_SAMPLINGS)
    group.add_argument("--class_dropout_prob", type=probability, default=0.1)
    group.add_argument("--probe_depth", type=size, help="blocks before the probe; the paper's, or a third of all")
    group.add_argument("--probe_dropout_prob", type=probability, default=0.9)
    group.add_argument(
        "--coupled_dropout",
        action="store_true",
        help="drop the labels of both streams together as often as their probabilities allow: faster",
    )
    group.add_argument(
        "--probe_fraction", type=probability, default=1.0, help="train the probe on a part of the samples: faster"
    )
    group.add_argument("--crop_size_min", type=size, help="smallest window of the probe in tokens; 3/4 of the grid")
    group.add_argument("--probe_weight_start", type=positive, help="weight of the probe's loss at t = 0; the paper's")
    group.add_argument("--probe_weight_end", type=positive, default=0.03, help="at t = 1")
    group.add_argument("--num_probe_weights", type=size, help="steps between the two; the paper's")
    group.add_argument("--probe_learning_rate", type=positive, help="the paper's for the size of the model")
    group.add_argument("--probe_decay_start_epoch", type=positive, help="the probe's weight falls from here; never")
    group.add_argument("--probe_decay_epochs", type=positive, default=800, help="epochs in which it falls tenfold")
    group.add_argument("--repa_encoder", help="add REPA with this frozen encoder, such as facebook/dinov2-base")
    group.add_argument("--repa_weight", type=positive, default=0.5, help="weight of REPA's loss")
    group.add_argument("--repa_depth", type=size, help="blocks before it; the paper's, or a third of all")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--train_batch_size", type=size, default=256, help="per process")
    group.add_argument("--gradient_accumulation_steps", type=size, default=1)
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--num_train_epochs", type=positive, default=800)
    group.add_argument("--max_train_steps", type=size, help="in place of --num_train_epochs")
    group.add_argument("--learning_rate", type=positive, default=1e-4)
    group.add_argument("--lr_scheduler", default="constant", choices=LR_SCHEDULERS)
    group.add_argument("--lr_warmup_steps", type=count, default=0)
    group.add_argument("--adam_beta1", type=probability, default=0.9)
    group.add_argument("--adam_beta2", type=probability, default=0.999)
    group.add_argument("--adam_weight_decay", type=positive, default=0.0)
    group.add_argument("--adam_epsilon", type=positive, default=1e-8)
    group.add_argument("--max_grad_norm", type=positive, default=1.0)
    group.add_argument("--use_ema", action="store_true", default=True, help="average the weights (the default)")
    group.add_argument("--no_ema", dest="use_ema", action="store_false", help="save the weights as they are")
    group.add_argument(
        "--ema_decay",
        type=probability,
        help="constant if given; else the average has a warm-up, and then looks back over a ninth of the run, at most"
        " over the paper's 10,000 steps (0.9999)",
    )
    group.add_argument(
        "--ema_warmup", action="store_true", default=None, help="decay (1 + step) / (10 + step) until --ema_decay"
    )
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="as accelerate is configured")
    group.add_argument("--allow_tf32", action="store_true")
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of everything that is random")
    group.add_argument("--num_cpu_threads", type=size, help="per process, on CPU; by default this machine's cores")

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="lsep-model")
    group.add_argument("--overwrite_output_dir", action="store_true", help="delete the run that is there")
    group.add_argument("--resume_from_checkpoint", help="a checkpoint, or `latest`")
    group.add_argument("--checkpointing_steps", type=size, default=5000)
    group.add_argument("--checkpoints_total_limit", type=size, help="how many to keep")
    group.add_argument("--milestone_steps", type=size, help="keep those at multiples of it besides")
    group.add_argument("--logging_steps", type=size, default=50)
    group.add_argument("--logging_dir", default="logs", help="of the trackers, inside --output_dir")
    group.add_argument("--report_to", help="a tracker of accelerate, all, or none; tensorboard if it is installed")
    group.add_argument("--validation_steps", type=size, default=5000, help="sample and measure every so many steps")
    group.add_argument("--validation_labels", nargs="+", help="names or indices of classes to sample; up to 10 of all")
    group.add_argument("--num_validation_images", type=size, default=4, help="per label")
    group.add_argument("--validation_guidance_scale", type=positive, default=1.5)
    group.add_argument("--validation_inference_steps", type=size, default=250)
    group.add_argument("--push_to_hub", action="store_true", help="upload the pipeline, and nothing else, at the end")
    group.add_argument("--hub_model_id", help="where to; the name of --output_dir")
    group.add_argument("--license", help="of the weights, as the Hub spells it; needed with --push_to_hub")
    group.add_argument("--dry_run", action="store_true", help="check and print everything, and train nothing")
    return parser


def parse_args(argv: list[str], description: str, examples: Path) -> argparse.Namespace:
    """
    Reads the command line.

    Args:
        argv (`list[str]`): The arguments.
        description (`str`): For `--help`.
        examples (`Path`): The folder with the bundled data `digits` and its `configs/digits`.
    """
    parser = build_parser(description)
    args = parser.parse_args(argv)
    sources = [flag for flag in ("dataset_name", "train_data_dir", "latents_dir") if getattr(args, flag) is not None]
    recipe = choose_recipe(args, sources)
    if recipe is not None:
        args = parser.parse_args([f"@{examples / 'configs' / recipe}", *argv])
    args.recipe = recipe
    if not sources:
        args.train_data_dir = str(examples / "digits")
    if len(sources) > 1:
        parser.error(f"only one source of data can be given, but there are --{' and --'.join(sources)}")
    if args.streaming:
        if args.latents_dir is not None:
            parser.error("--streaming is for images, --latents_dir is on this machine")
        if args.validation_split is not None and sources:
            parser.error("--streaming has no held-out images: leave out --validation_split")
        if args.dataloader_num_workers > 0:  # `datasets` would deal the shards out to them, in another order
            parser.error(f"--dataloader_num_workers has to be 0 with --streaming, is {args.dataloader_num_workers}")
        args.validation_split = None
    if args.resume_from_checkpoint and args.overwrite_output_dir:
        parser.error(
            "--resume_from_checkpoint continues a run and --overwrite_output_dir deletes it: give one of them"
        )
    if args.push_to_hub and args.license is None:
        parser.error("--push_to_hub needs --license: nobody but you can say under which one the weights may be used")
    if args.probe_fraction == 0:
        parser.error("argument --probe_fraction: has to be above 0, but is 0.0; --no_lsep trains without a probe")
    if args.pretrained_model_name_or_path and args.model_config_name_or_path:
        parser.error("--pretrained_model_name_or_path says what --model_config_name_or_path says: give one of them")
    for flag in ("new_classes", "lora_rank"):
        if getattr(args, flag) and not args.pretrained_model_name_or_path:
            parser.error(f"--{flag} needs a model to start from: --pretrained_model_name_or_path")
    if args.lora_rank is not None and importlib.util.find_spec("peft") is None:
        parser.error("--lora_rank needs peft: pip install peft")
    if args.probe_decay_epochs == 0:
        parser.error("argument --probe_decay_epochs: has to be above 0, but is 0.0")
    return args


def choose_recipe(args: argparse.Namespace, sources: list[str]) -> str | None:
    """The argument list in `examples/configs` that the flags are read after, if they leave the model open."""
    if not sources:
        return "digits"
    if sources == ["latents_dir"] or any(getattr(args, flag) is not None for flag in MODEL_FLAGS):
        return None
    begun = settings_of_the_run(args)
    if begun is not None:  # also on another machine, or by a version that had no recipes
        return begun.get("recipe")
    if args.pretrained_vae_model_name_or_path is not None:
        return "own-images-256-vae"
    return "own-images-64" if has_gpu() else "own-images-32"


def settings_of_the_run(args: argparse.Namespace) -> dict[str, Any] | None:
    """The settings of the run that `--resume_from_checkpoint` names. [`find_run_to_continue`] finds what is wrong."""
    if not args.resume_from_checkpoint:
        return None
    given = Path(args.resume_from_checkpoint)
    folder = given if given.is_dir() else Path(args.output_dir, args.resume_from_checkpoint)
    try:
        if args.resume_from_checkpoint == "latest":
            return json.loads(Path(args.output_dir, "training_args.json").read_text(encoding="utf-8"))
        return read_state(folder)["settings"]
    except (OSError, ValueError, KeyError):
        return None
