# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""From the flags of `examples/train_lsep.py` to data and model, with every check that can be made before training."""

import argparse
import importlib.util
import json
import math
import os
import shlex
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from diffusers.optimization import SchedulerType

from .checkpointing import choose_checkpoint, read_state
from .data import (
    ImageSource,
    SampleSource,
    SourceSubset,
    cut_off,
    hash_labels,
    load_image_dataset,
    open_images,
)
from .fine_tuning import Start, add_lora, read_pretrained
from .latents import UNREADABLE_FILE, MomentsDataset, OriginalMomentsDataset
from .objective import TIMESTEP_SAMPLINGS, LinearProbe, LSEPObjective
from .repa import REPAEncoder, REPARegularizer
from .streaming import open_stream
from .training_processes import has_gpu
from .transformer_sit import SIT_PRESETS, SiTTransformer2DModel


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

# Of the weights of the start in the average: more than this shows in the samples.
MAX_INITIAL_SHARE = 0.02

LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]

# What a run writes into its output folder, and `--overwrite_output_dir` therefore removes.
OUTPUTS = (
    *("training_args.json", "metrics.jsonl", "curves.png", "samples", "logs", "checkpoint-*", ".checkpoint-*"),
    *(UNREADABLE_FILE, "model_index.json", "transformer", "scheduler", "vae", "probe", ".pipeline*"),
)

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


@dataclass
class Setup:
    """What the flags come to."""

    source: SampleSource
    held_out: SampleSource | None
    names: list[str]  # of the classes
    config: dict[str, Any]  # of the transformer
    start: Start | None  # from a saved pipeline
    vae: AutoencoderKL | None
    encoder: REPAEncoder | None
    images: SampleSource | None  # the pixels of the rows of `source`, where the encoder needs them beside moments
    held_out_images: SampleSource | None
    samples_per_step: int
    facts: dict[str, Any]  # what a resumed run has to have in common with its checkpoint, beside flags
    treatment: str | None  # what is done to the images, for the user

    @property
    def steps_per_epoch(self) -> float:
        return len(self.source.labels) / self.samples_per_step


def prepare(args: argparse.Namespace, num_processes: int) -> Setup:
    """Loads data and model, and fills in the flags that depend on them."""
    # 1. VAE
    latents = open_latents(args.latents_dir) if args.latents_dir is not None else None
    pretrained = None
    if args.pretrained_model_name_or_path is not None:
        pretrained = read_pretrained(args.pretrained_model_name_or_path)
    vae, vae_options = None, {}
    if pretrained is not None and pretrained.has_vae and args.pretrained_vae_model_name_or_path is None:
        args.pretrained_vae_model_name_or_path = pretrained.name_or_path
        vae_options = {"subfolder": "vae"}
    elif latents is not None and args.pretrained_vae_model_name_or_path is None and hasattr(latents, "metadata"):
        args.pretrained_vae_model_name_or_path = latents.metadata["vae"]
        vae_options = {key: latents.metadata.get(f"vae_{key}") for key in ("subfolder", "revision")}
    if args.pretrained_vae_model_name_or_path is not None:
        try:
            vae = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, **vae_options)
        except OSError as error:
            path = args.pretrained_vae_model_name_or_path
            raise ValueError(f"`--pretrained_vae_model_name_or_path` {path!r} cannot be loaded: {error}") from error
        vae.requires_grad_(False).eval()
        if isinstance(latents, MomentsDataset):
            latents.check_vae(vae, f"`--pretrained_vae_model_name_or_path` {args.pretrained_vae_model_name_or_path!r}")
    elif latents is not None:
        raise ValueError("`--latents_dir` of this kind needs `--pretrained_vae_model_name_or_path` to make images.")
    vae_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1

    # 2. Architecture and size
    preset = SIT_PRESETS[args.preset or "SiT-XL/2"]
    config: dict[str, Any] = dict(preset)
    if args.model_config_name_or_path is not None:
        try:
            loaded = SiTTransformer2DModel.load_config(args.model_config_name_or_path)
        except (OSError, ValueError) as error:
            path = args.model_config_name_or_path
            raise ValueError(f"`--model_config_name_or_path` {path!r} cannot be loaded: {error}") from error
        config |= {name: value for name, value in loaded.items() if not name.startswith("_") and value is not None}
    if pretrained is not None:
        # Data and flags decide about these two.
        config |= {k: v for k, v in pretrained.config.items() if k not in ("sample_size", "num_classes")}
        if latents is None and args.resolution is None:
            config["sample_size"] = pretrained.config["sample_size"]
    config |= {name: getattr(args, name) for name in preset if getattr(args, name) is not None}
    config["qk_norm"] = args.qk_norm or config.get("qk_norm", False)
    model = "--pretrained_model_name_or_path" if pretrained is not None else "--model_config_name_or_path"
    size_by = model if args.resolution is None and "sample_size" in config else "--resolution"
    channels_by = "--image_channels" if args.image_channels is not None else model if vae is None else "the VAE"
    if latents is not None:
        config["sample_size"] = given(config, "sample_size", latents.moments_shape[-1], "`--latents_dir`")
        args.resolution = given(vars(args), "resolution", config["sample_size"] * vae_factor, "`--latents_dir`")
    args.resolution = args.resolution or config.get("sample_size", 256 // vae_factor) * vae_factor
    if args.resolution % (vae_factor * config["patch_size"]):
        raise ValueError(
            f"`--resolution` has to be divisible by {vae_factor * config['patch_size']} (the VAE's factor {vae_factor}"
            f" times the patch size {config['patch_size']}), but is {args.resolution}."
        )
    config["sample_size"] = given(config, "sample_size", args.resolution // vae_factor, "`--resolution`")
    if vae is not None:
        args.image_channels = given(vars(args), "image_channels", vae.config.in_channels, "the VAE")
        config["in_channels"] = given(config, "in_channels", vae.config.latent_channels, "the VAE")
    else:
        if config.get("in_channels", 3) not in (1, 3):
            raise ValueError(
                f"`--pretrained_vae_model_name_or_path` is needed: the model has {config['in_channels']} channels,"
                " which are latents and neither grey nor RGB."
            )
        args.image_channels = args.image_channels or config.get("in_channels", 3)
        config["in_channels"] = given(config, "in_channels", args.image_channels, "`--image_channels`")

    # 3. Data
    try:
        fraction, split = float(args.validation_split), None
    except (TypeError, ValueError):
        fraction, split = None, args.validation_split
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"`--validation_split` has to be a split or a fraction between 0 and 1, but is {fraction}.")
    if args.num_classes is not None:
        given(config, "num_classes", args.num_classes, "`--num_classes`")
    num_classes = args.num_classes or config.get("num_classes")
    treatment = None
    if latents is not None:
        if split is not None:
            raise ValueError(f"`--validation_split` of latents has to be a fraction such as 0.05, but is {split!r}.")
        if args.random_flip and not latents.has_flips:
            raise ValueError("`--random_flip` needs latents with mirror images, but `--latents_dir` has none.")
        source, held_out, names = latents, None, [latents.id2label[i] for i in range(len(latents.id2label))]
        if num_classes is not None and not len(names) <= num_classes:
            raise ValueError(f"`--num_classes` has to be at least {len(names)} for `--latents_dir`, is {num_classes}.")
        names += [str(index) for index in range(len(names), num_classes or 0)]
    elif args.streaming:
        location = (args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
        splits = load_image_dataset(*location, streaming=True)
        size, columns = (args.resolution, args.image_channels), (args.image_column, args.label_column)
        source = open_stream(splits, args.seed, args.num_train_images, *size, *columns, num_classes)
        held_out, names = None, source.names
    else:
        splits = load_image_dataset(args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
        columns = (args.image_column, args.label_column)
        source, held_out, names = open_images(
            splits, args.resolution, args.image_channels, *columns, num_classes, split
        )
        treatment = check_images(source, size_by, channels_by)
    if fraction is not None:
        source, held_out = cut_off(source, fraction, args.seed)
    config["num_classes"] = args.num_classes = len(names)
    start = None
    if pretrained is not None:
        check_fit(args, config, pretrained.config, pretrained.path_type)
        new_classes = args.new_classes or len(names) != pretrained.config["num_classes"]
        start = Start(pretrained, config, names, new_classes)

    # 4. Method: what is not given is the paper's for this size
    shape = {name: config[name] for name in SIT_PRESETS["SiT-XL/2"]}
    args.preset = next((name for name, preset in SIT_PRESETS.items() if preset == shape), None)
    paper = {**PAPER_SETTINGS["SiT-XL"], "probe_depth": None}
    paper = PAPER_SETTINGS.get(args.preset.partition("/")[0], paper) if args.preset is not None else paper
    for name, value in paper.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.probe_depth = args.probe_depth or max(1, config["num_layers"] // 3)
    args.repa_depth = args.repa_depth or paper["probe_depth"] or max(1, config["num_layers"] // 3)  # REPA has the same
    grid_size = config["sample_size"] // config["patch_size"]
    args.crop_size_min = args.crop_size_min or max(1, grid_size * 3 // 4)
    if args.crop_size_min > grid_size:
        raise ValueError(
            f"`--crop_size_min` has to lie in 1..{grid_size}, the side of the grid of tokens, but is"
            f" {args.crop_size_min}."
        )

    # 5. REPA
    encoder, images, held_out_images = None, None, None
    if args.repa_encoder is not None:
        if latents is not None:
            try:
                images = latents.open_images(args.resolution)
            except ValueError as error:
                raise ValueError(f"`--repa_encoder` needs pixels beside the latents, but {error}") from error
            if fraction is not None:
                held_out_images = SourceSubset(images, held_out.source_rows)
                images = SourceSubset(images, source.source_rows)
        encoder = REPAEncoder(args.repa_encoder, grid_size)

    # 6. Length
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    epochs = args.num_train_epochs
    args.max_train_steps = args.max_train_steps or math.ceil(epochs * len(source.labels) / samples_per_step)
    if args.ema_decay is None:
        args.ema_decay, args.ema_warmup = default_average(args.max_train_steps)
    args.ema_warmup = bool(args.ema_warmup)
    facts = {
        "transformer": config,
        "samples_per_step": samples_per_step,
        "training_images": len(source.labels),
        "training_labels": None if args.streaming else hash_labels(source.labels),
        "class_names": zlib.crc32("\n".join(names).encode()),
        "vae": zlib.crc32(vae.encoder.conv_in.weight.numpy().tobytes()) if vae is not None else None,
    }
    return Setup(
        source=source,
        held_out=held_out,
        names=names,
        config=config,
        start=start,
        vae=vae,
        encoder=encoder,
        images=images,
        held_out_images=held_out_images,
        samples_per_step=samples_per_step,
        facts=facts,
        treatment=treatment,
    )


def check_images(source: ImageSource, size_by: str, channels_by: str) -> str:
    """
    What is done to the images. That colours are lost because a model is grey has to be asked for.

    Args:
        source ([`~data.ImageSource`]): The images.
        size_by (`str`): What decides about their size: a flag.
        channels_by (`str`): And about their channels.
    """
    side, grey = source.resolution, source.num_channels == 1
    sizes, has_colours = source.look()
    if has_colours and grey and channels_by != "--image_channels":
        raise ValueError(
            f"`--image_channels` has to be 1 to train on grey copies of these images, which have colours:"
            f" {channels_by} is for grey images of {side} x {side} pixels. For colours take another model."
        )
    if not sizes:  # none that can be read, which is found where it is used
        return "none of those looked at can be read"
    found = [f"{width} x {height}" for width, height in (min(sizes, key=math.prod), max(sizes, key=math.prod))]
    found = found[0] if found[0] == found[1] else " to ".join(found)
    shorter = [min(size) for size in sizes]
    scaled = "scaled down to " if min(shorter) > side else "scaled up to " if max(shorter) < side else "scaled to "
    scaled = "" if set(shorter) == {side} else scaled
    return (
        f"{found} pixels in {'colour' if has_colours else 'grey'} ({len(sizes)} images looked at); used is the central"
        f" square, {scaled}{side} x {side}, in {'grey' if grey else 'colour'}"
        f"{f', as `{size_by}` says' if size_by != '--resolution' else ''}"
    )


def default_average(max_train_steps: int) -> tuple[float, bool]:
    """
    Decay and warm-up of the average for a run of this length. With diffusers' warm-up, a decay of (1 + s) / (10 + s)
    after s steps, the average looks back over a ninth of the steps so far, whatever the length: it forgets the start,
    and a run can be made longer. The decay is what the warm-up comes to at the end, at most the paper's.
    """
    return min(0.9999, (1 + max_train_steps) / (10 + max_train_steps)), True


def follows_length(settings: dict[str, Any]) -> bool:
    """Whether the average of a run is that of its length."""
    steps = settings.get("max_train_steps")
    return steps is not None and (settings.get("ema_decay"), settings.get("ema_warmup")) == default_average(steps)


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


def check_fit(args: argparse.Namespace, config: dict[str, Any], pretrained: dict[str, Any], path_type: str):
    """Whether the weights of another transformer fit the one that the flags and the data ask for."""
    for name, value in pretrained.items():
        if name not in ("sample_size", "num_classes") and config.get(name) != value:
            raise ValueError(
                f"`--pretrained_model_name_or_path` is a model with `{name}={value}`, but flags or data ask for"
                f" {config.get(name)}."
            )
    if args.path_type != path_type:
        raise ValueError(
            f"`--path_type` has to be {path_type!r}, the path of `--pretrained_model_name_or_path`, but is"
            f" {args.path_type!r}."
        )


def build_objective(args: argparse.Namespace, setup: Setup, load: bool) -> LSEPObjective:
    """
    Makes transformer, probe and regularizers, ready to be trained.

    Args:
        args (`argparse.Namespace`): The flags, after [`prepare`].
        setup ([`Setup`]): What they come to.
        load (`bool`): Whether to load the weights that the run starts from, if there are any.
    """
    if setup.start is not None and load:
        transformer, probe = setup.start.load()
    else:
        transformer, probe = SiTTransformer2DModel(**setup.config), None
    if args.no_lsep:
        probe = None
    elif probe is None:
        probe = LinearProbe(transformer.inner_dim, transformer.config.num_classes)
    if probe is not None:
        probe.register_to_config(depth=args.probe_depth)
    regularizers = {}
    if setup.encoder is not None:
        size = setup.encoder.size
        regularizers["repa"] = REPARegularizer(transformer.inner_dim, size, args.repa_depth, args.repa_weight)
    if args.lora_rank is not None:
        add_lora(transformer, args.lora_rank)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    grid_size = transformer.config.sample_size // transformer.config.patch_size
    return LSEPObjective(
        transformer,
        probe,
        path_type=args.path_type,
        probe_depth=args.probe_depth,
        probe_dropout_prob=args.probe_dropout_prob,
        class_dropout_prob=args.class_dropout_prob,
        crop_size=(args.crop_size_min, grid_size),
        probe_weight_start=args.probe_weight_start,
        probe_weight_end=args.probe_weight_end,
        num_probe_weights=args.num_probe_weights,
        timestep_sampling=args.timestep_sampling,
        probe_fraction=args.probe_fraction,
        regularizers=regularizers,
    ).train()


def memory_needed(args: argparse.Namespace, setup: Setup, objective: LSEPObjective, num_shards: int = 1) -> list[int]:
    """
    Bytes of memory that a process needs at least: for weights and all that belongs to them, and for activations.

    Args:
        args (`argparse.Namespace`): The flags, after [`prepare`].
        setup ([`Setup`]): What they come to.
        objective ([`LSEPObjective`]): The objective, whose weights may be on the meta device.
        num_shards (`int`, defaults to `1`): Among how many processes the weights are shared out.
    """
    transformer = objective.transformer
    config, width = transformer.config, transformer.inner_dim
    tokens = (config.sample_size // config.patch_size) ** 2
    parameters = sum(p.numel() for p in transformer.parameters())
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    frozen = [model for model in (setup.vae, setup.encoder and setup.encoder.model) if model is not None]
    frozen_parameters = sum(p.numel() for model in frozen for p in model.parameters())
    # Weights in float32, and of what is trained gradients, AdamW's two moments and the average. A block keeps about 34
    # values per token and channel for its backward pass (arXiv 2205.05198, without dropout and with fused attention),
    # in the dtype of the computation; with gradient checkpointing one block keeps them, and the others their input.
    # Measured on a CPU, a step takes a third more.
    state = 4 * ((parameters + trained * (4 if args.use_ema else 3)) // num_shards + frozen_parameters)
    blocks = config.num_layers + (0 if args.no_lsep else args.probe_depth)
    values = args.train_batch_size * tokens * width * (34 + blocks if args.gradient_checkpointing else 34 * blocks)
    return [state, values * (4 if args.mixed_precision == "no" else 2) // 2]


def describe_shortage(args: argparse.Namespace, needed: list[int], memory: int, num_processes: int) -> str | None:
    """What to say if processes that share a memory need more than there is."""
    if num_processes * sum(needed) <= memory:
        return None
    state, activations = (value / 1e9 for value in needed)
    processes = f"{num_processes} processes with " if num_processes > 1 else ""
    smaller = ["a smaller model (`--preset`, or none at all for one that suits own images)"]
    if activations > state:
        steps = "with more `--gradient_accumulation_steps`"
        smaller.insert(0, f"a `--train_batch_size` below {args.train_batch_size} {steps}, `--gradient_checkpointing`")
        if args.pretrained_vae_model_name_or_path is None:
            smaller.append("a smaller `--resolution` or larger `--patch_size`, or a VAE")
    return (
        f"training does not fit into this machine's memory: {processes}at least {state:.2f} GB of state and"
        f" {activations:.2f} GB of activations, of {memory / 1e9:.2f} GB in all. What helps: {'; '.join(smaller)}."
    )


def describe(args: argparse.Namespace, setup: Setup, objective: LSEPObjective, needed: list[int]) -> str:
    """
    What a run comes to, for the user.

    Args:
        args (`argparse.Namespace`): The flags, after [`prepare`].
        setup ([`Setup`]): What they come to.
        objective ([`LSEPObjective`]): The objective, whose weights may be on the meta device.
        needed (`list[int]`): Its memory, by [`memory_needed`].
    """
    transformer = objective.transformer
    config = transformer.config
    parameters = sum(p.numel() for p in transformer.parameters())
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    held_out = len(setup.held_out.labels) if setup.held_out is not None else 0
    state, activations = (value / 1e9 for value in needed)
    average = f"decay {args.ema_decay:.6g}{', after a warm-up' if args.ema_warmup else ''}" if args.use_ema else "none"
    lines = [
        f"transformer: {parameters:,} parameters, {config.num_layers} blocks of width {transformer.inner_dim}",
        f"trained: {trained:,} parameters, those of the probe and of REPA's projector among them",
        f"tokens: {(config.sample_size // config.patch_size) ** 2} per image",
        f"images: {len(setup.source.labels):,} to train on, {held_out:,} held out, {len(setup.names)} classes",
        f"steps: {args.max_train_steps:,} of {setup.samples_per_step} images, {setup.steps_per_epoch:,.1f} per epoch",
        f"average of the weights: {average}",
        f"memory per process, roughly: {state:.2f} GB of state, {activations:.2f} GB of activations",
    ]
    if setup.treatment is not None:
        lines.insert(4, f"pixels: {setup.treatment}")
    if args.recipe is not None:
        why = f"since {RECIPES[args.recipe]}; flags that are given win"
        lines.insert(0, f"recipe: examples/configs/{args.recipe}, {why}")
    if describe_initial_weights(args) is not None:
        lines.append(describe_initial_weights(args))
    return "\n".join(lines)


def given(values: dict[str, Any], name: str, needed: int, by: str) -> int:
    """The value that is needed, unless another one was asked for."""
    if values.get(name) not in (None, needed):
        raise ValueError(f"`{name}` is {values[name]}, but {by} needs {needed}.")
    return needed


def open_latents(folder: str) -> MomentsDataset | OriginalMomentsDataset:
    if (Path(folder) / "dataset.json").is_file():
        return OriginalMomentsDataset(folder)
    return MomentsDataset(folder)


def find_run_to_continue(
    args: argparse.Namespace, report: Callable[[str], None]
) -> tuple[Path | None, dict[str, Any] | None]:
    """Checks the output folder. Returns the checkpoint to continue from, and the settings of the run to continue."""
    output_dir = Path(args.output_dir)
    parent = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"`--output_dir` {args.output_dir!r} cannot be written: {str(parent)!r} is no such folder.")
    found = sorted(path.name for pattern in OUTPUTS for path in output_dir.glob(pattern))
    settings_file = output_dir / "training_args.json"
    problem = None
    if found and not settings_file.is_file():
        problem = (
            f"`--output_dir` {args.output_dir!r} holds {', '.join(found[:4])}, but no run of this script: choose"
            " another folder."
        )
    elif found and not args.resume_from_checkpoint and not args.overwrite_output_dir:
        problem = (
            f"`--output_dir` {args.output_dir!r} already holds a run ({', '.join(found[:4])}). Continue it with"
            " `--resume_from_checkpoint latest`, delete it with `--overwrite_output_dir`, or choose another folder."
        )
    if problem is not None and args.dry_run:  # which writes nothing
        report(f"A run would be refused: {problem}")
        return None, None
    if problem is not None:
        raise ValueError(problem)
    if args.resume_from_checkpoint:
        checkpoint = choose_checkpoint(output_dir, args.resume_from_checkpoint, report)
        if checkpoint is not None:
            return checkpoint, read_state(checkpoint)["settings"]
        return None, json.loads(settings_file.read_text(encoding="utf-8")) if found else None
    return None, None


def remove_outputs(output_dir: Path):
    """Deletes what a run has written into its output folder, and nothing else."""
    for pattern in OUTPUTS:
        for path in output_dir.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def keep_settings(args: argparse.Namespace, before: dict[str, Any]):
    """Fills in what follows from other flags, and is not given, as it was in the run that is continued."""
    for name in DERIVED:
        if getattr(args, name) is None and not (name.startswith("ema") and follows_length(before)):
            setattr(args, name, before.get(name))


def compare_settings(settings: dict[str, Any], before: dict[str, Any], report: Callable[[str], None]):
    """Lists what differs from the run that is continued, and refuses what would change the method."""
    may_change = CHANGEABLE | (LENGTH if settings["lr_scheduler"] in ("constant", "constant_with_warmup") else set())
    if follows_length(settings) and follows_length(before):
        may_change.add("ema_decay")  # no decay was reached yet that another length would not have
    # An older version has left out what it did not know: its runs went by what is now the default.
    before = {**vars(build_parser("").parse_args([])), **{name: settings[name] for name in DERIVED}, **before}
    changed = {name for name, value in settings.items() if before.get(name) != value} - {"threads", "processes"}
    lines = {name: f"{name}: {before.get(name)} -> {settings[name]}" for name in settings if name in changed}
    refused = [line for name, line in lines.items() if name not in may_change]
    if refused:
        raise ValueError(
            "`--resume_from_checkpoint` cannot continue a run with another method or other data: "
            + "; ".join(refused)
            + ". Start a new run in another `--output_dir`, or give the flags of the checkpoint."
        )
    for line in lines.values():
        report(f"Changed since the checkpoint: {line}")
    for name in ("threads", "processes"):
        if before.get(name) != settings[name]:
            report(f"The checkpoint was made with {before.get(name)} {name}, now there are {settings[name]}: the last")
            report("bits of the results may differ from those of an uninterrupted run.")
