# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The flags of `examples/train_lsep.py`, and what else there is to know of each: whether a run that is continued may
change it, and whether it says something about the model, so that it belongs on the card."""

import argparse
import functools
from pathlib import Path
from typing import Any

from diffusers.optimization import SchedulerType

from ..command_line import ArgumentParser, number
from ..objective_checks import TIMESTEP_SAMPLINGS
from ..presets import SIT_PRESETS
from ..regularizers import REGULARIZERS, regularizer_key
from ..regularizers.repa import PROJECTORS
from .flag_combinations import check_combinations
from .flags import Epochs, Flags
from .flow_map import add_flow_map_flags
from .post_hoc_ema import add_post_hoc_ema_flags
from .recipes import choose_recipe


# arXiv 2509.21565, as far as it is public. The depth for SiT-B is REPA's (arXiv 2410.06940); the paper has no SiT-S.
PAPER_SETTINGS: dict[str, dict[str, Any]] = {
    "SiT-XL": {"probe_depth": 8, "probe_weight_start": 0.0225, "num_probe_weights": 10, "probe_learning_rate": 1e-4},
    "SiT-L": {"probe_depth": 8, "probe_weight_start": 0.03, "num_probe_weights": 1, "probe_learning_rate": 1e-4},
    "SiT-B": {"probe_depth": 4, "probe_weight_start": 0.03, "num_probe_weights": 1, "probe_learning_rate": 3e-2},
}

LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]

count, size, probability, positive = number(int, 0), number(int, 1), number(float, 0, 1), number(float, 0)


@functools.cache
def flags_that_are(what: str) -> frozenset[str]:
    """The names of the flags that were added with this argument of [`Flags.add`] set, such as `"changeable"`."""
    return frozenset(action.dest for action in build_parser("")._actions if getattr(action, "says", {}).get(what))


def build_parser(description: str) -> ArgumentParser:
    """The command line of `examples/train_lsep.py`."""
    parser = ArgumentParser(usage="%(prog)s [@RECIPE] [--FLAG VALUE ...]", description=description)
    add_data_flags(Flags(parser, "data"))
    add_model_flags(Flags(parser, "model"))
    add_method_flags(Flags(parser, "method"))
    add_regularizer_flags(Flags(parser, "other losses"))
    add_flow_map_flags(Flags(parser, "flow maps"))
    add_optimisation_flags(Flags(parser, "optimisation"))
    add_post_hoc_ema_flags(Flags(parser, "averages of other lengths"))
    add_output_flags(Flags(parser, "output"))
    return parser


def add_data_flags(flags: Flags):
    """What is trained on."""
    add = flags.add
    add("--dataset_name", changeable=True, help="Data set on the Hub, or a folder that `datasets` reads.")
    add("--dataset_config_name", changeable=True, help="Its configuration.")
    add(
        "--train_data_dir",
        changeable=True,
        help="Folder of images, one subfolder per class or with a metadata.jsonl or .csv (default: the digits).",
    )
    add(
        "--latents_dir",
        changeable=True,
        help="Images that a VAE has encoded: the output of encode_latents.py, or a `vae-sd` folder of EDM2 and REPA.",
    )
    add("--streaming", action="store_true", help="Read the data while training, without downloading them first.")
    add("--num_train_images", type=size, help="With --streaming: how many there are, if the data set does not say it.")
    add("--cache_dir", changeable=True, on_card=False, help="Where `datasets` keeps its files.")
    add("--image_column", default="image", help="Column of the images.")
    add("--label_column", default="label", help="Column of the classes, as numbers or names.")
    add("--num_classes", type=size, changeable=True, help="Number of classes, if there are more than the labels show.")
    add(
        "--unconditional",
        action="store_true",
        help="Train on images without labels, or without reading these: all are the null class, and LSEP, which needs"
        " classes, is off.",
    )
    add(
        "--resolution",
        type=size,
        changeable=True,
        help="Side length in pixels that images are scaled and cropped to (default: the recipe's or the latents', else"
        " 256).",
    )
    add(
        "--image_channels",
        type=int,
        choices=(1, 3),
        changeable=True,
        help="Without a VAE: 1 for grey images, 3 for colour (default: 3).",
    )
    add("--random_flip", action="store_true", help="Mirror half of the images, chosen at random.")
    add(
        "--validation_split",
        help="Images to hold out and measure on: the name of a split, a fraction to cut off, such as 0.05, or `none`"
        " (default: none).",
    )
    add(
        "--dataloader_num_workers",
        type=count,
        default=0,
        changeable=True,
        on_card=False,
        help="Processes that read data, for each process of training; 0, as always with --streaming, reads in the"
        " training process.",
    )
    add(
        "--max_errors",
        type=count,
        default=0,
        changeable=True,
        on_card=False,
        help="How many unreadable images to replace by others of their class before the run stops; all are listed in a"
        " file.",
    )


def add_model_flags(flags: Flags):
    """The transformer and the VAE."""
    add = flags.add
    add(
        "--preset",
        choices=list(SIT_PRESETS),
        metavar="SiT-{S,B,L,XL}/{2,4,8}",
        changeable=True,
        help="Size of the transformer and of its patches, with the paper's values for what is not given (default: a"
        " recipe that suits data and machine; SiT-XL/2 with latents or if other flags of this group are given).",
    )
    of_preset = "(default: the preset's)."
    add("--patch_size", type=size, changeable=True, help=f"Side length of a patch, which is one token {of_preset}")
    add("--num_layers", type=size, changeable=True, help=f"Number of transformer blocks {of_preset}")
    add("--num_attention_heads", type=size, changeable=True, help=f"Attention heads of a block {of_preset}")
    add("--attention_head_dim", type=size, changeable=True, help=f"Width of a head {of_preset}")
    add("--qk_norm", action="store_true", changeable=True, help="Normalise queries and keys: steadier in long runs.")
    add(
        "--model_config_name_or_path",
        changeable=True,
        help="The config of a SiTTransformer2DModel, in place of a preset; its weights are not loaded.",
    )
    add(
        "--pretrained_model_name_or_path",
        changeable=True,
        help="A pipeline of this package, folder or Hub id, to start from its weights.",
    )
    add(
        "--new_classes",
        action="store_true",
        help="With --pretrained_model_name_or_path: its classes are others than those of the data, though as many.",
    )
    add(
        "--lora_rank",
        type=size,
        help="With --pretrained_model_name_or_path: train LoRA layers of this rank and the label table, and freeze all"
        " else.",
    )
    add(
        "--pretrained_vae_model_name_or_path",
        changeable=True,
        help="An AutoencoderKL or another autoencoder of diffusers: the transformer then works on its latents. Without"
        " one it works on pixels.",
    )


def add_method_flags(flags: Flags):
    """LSEP and what is beside it."""
    add, of_paper = flags.add, "of the paper for the size of the model"
    add("--no_lsep", action="store_true", help="Train a plain SiT, without the probe.")
    add(
        "--path_type",
        default="linear",
        choices=("linear", "cosine"),
        help="How data become noise: (1 - t) x + t noise, or cos(pi t / 2) x + sin(pi t / 2) noise.",
    )
    add(
        "--timestep_sampling",
        default="uniform",
        choices=TIMESTEP_SAMPLINGS,
        help="Distribution of the times t that training looks at.",
    )
    add(
        "--class_dropout_prob",
        type=probability,
        default=0.1,
        help="How often the label is hidden from the model, so that guidance is possible.",
    )
    add(
        "--probe_depth",
        type=size,
        help=f"After how many blocks the probe reads (default: that {of_paper}, 8 for XL and L, 4 for B; else a third"
        " of all).",
    )
    add(
        "--probe_dropout_prob",
        type=probability,
        default=0.9,
        help="How often the label is hidden in the stream that the probe reads.",
    )
    add(
        "--coupled_dropout",
        action="store_true",
        help="Hide the labels of both streams together, as often as their probabilities allow: faster.",
    )
    add(
        "--probe_fraction",
        type=probability,
        default=1.0,
        help="Train the probe on this part of the samples of every step: faster.",
    )
    add(
        "--crop_size_min",
        type=size,
        help="Smallest side, in tokens, of the window that the probe averages (default: three quarters of all).",
    )
    add(
        "--probe_weight_start",
        type=positive,
        help=f"Weight of the probe's loss at t = 0 (default: that {of_paper}, 0.03 for L and B, else 0.0225).",
    )
    add("--probe_weight_end", type=positive, default=0.03, help="Weight of the probe's loss at t = 1.")
    add(
        "--num_probe_weights",
        type=size,
        help=f"In how many steps it goes from one to the other (default: that {of_paper}, 1 for L and B, else 10).",
    )
    add(
        "--probe_learning_rate",
        type=positive,
        help=f"Learning rate of the probe (default: that {of_paper}, 3e-2 for B, else 1e-4).",
    )
    add(
        "--probe_decay_start_epoch",
        is_kept=True,
        type=positive,
        help="Let the weight of the probe's loss fall from this epoch on (default: never, as in the paper).",
    )
    add("--probe_decay_epochs", type=positive, default=800.0, help="In how many epochs it then falls to a tenth.")


def add_regularizer_flags(flags: Flags):
    """Losses beside LSEP's, or with --no_lsep in its place."""
    add = flags.add
    add(
        "--repa_encoder",
        changeable=True,
        help="Add the loss of REPA with this frozen encoder, such as facebook/dinov2-base.",
    )
    add("--repa_weight", type=positive, default=0.5, help="Weight of REPA's loss; iREPA has 1.")
    add("--repa_depth", type=size, help="After how many blocks REPA reads (default: LSEP's default depth).")
    add(
        "--repa_projector",
        choices=PROJECTORS,
        default="mlp",
        help="What is between REPA's tokens and the encoder's: three linear layers, or iREPA's convolution.",
    )
    add(
        "--repa_target_alpha",
        type=probability,
        help="Normalise the encoder's tokens over the patches, less this part of their mean (default: do not; iREPA"
        " has 0.6).",
    )
    add("--regularizers", nargs="+", action="extend", default=[], choices=list(REGULARIZERS), help="Add these losses.")
    kinds = {int: size, float: positive}
    for name, regularizer in REGULARIZERS.items():
        for flag in regularizer.flags:
            add(
                f"--{regularizer_key(name)}_{flag.name}",
                type=kinds.get(flag.type, flag.type),
                default=flag.default,
                choices=flag.choices,
                nargs=flag.nargs,
                changeable=flag.changeable,
                help=f"{name}: {flag.help}",
            )


def add_optimisation_flags(flags: Flags):
    """Steps, their size, and how they are computed."""
    add = flags.add
    add("--train_batch_size", type=size, default=256, changeable=True, help="Samples at a time in each process.")
    add(
        "--gradient_accumulation_steps",
        type=size,
        default=1,
        changeable=True,
        help="Batches per optimiser step: the samples of a step are batch size x this x processes.",
    )
    add(
        "--gradient_checkpointing",
        action="store_true",
        changeable=True,
        help="Compute activations twice in place of keeping them: less memory, a third more time.",
    )
    add(
        "--activation_memory_budget",
        type=probability,
        changeable=True,
        help="Let the compiler keep this part of the activations that it would keep, 0 to 1, and compute the others"
        " twice: less memory. Where the step is compiled (accelerate launch --dynamo_backend inductor).",
    )
    add(
        "--fsdp_param_dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        changeable=True,
        help="How FSDP2 gathers weights. bf16, with --mixed_precision bf16, halves what is sent: products round them"
        " to it anyway; the embeddings of classes are rounded too. Gradients are summed in fp32.",
    )
    add(
        "--num_train_epochs",
        type=positive,
        default=800.0,
        action=Epochs,
        on_card=False,  # --max_train_steps tells the length
        is_length=True,
        help="Length of the run in passes over the data, also after a recipe that gives it in steps.",
    )
    add("--max_train_steps", type=size, is_length=True, help="Length of the run in steps, in place of epochs.")
    add("--learning_rate", type=positive, default=1e-4, help="Learning rate of the transformer.")
    add("--lr_scheduler", default="constant", choices=LR_SCHEDULERS, help="How the learning rates change.")
    add("--lr_warmup_steps", type=count, default=0, help="Steps in which they rise from 0; not for `constant`.")
    add("--adam_beta1", type=probability, default=0.9, help="AdamW's decay of the gradients' mean.")
    add("--adam_beta2", type=probability, default=0.999, help="AdamW's decay of the gradients' mean square.")
    add("--adam_weight_decay", type=positive, default=0.0, help="AdamW's weight decay.")
    add("--adam_epsilon", type=positive, default=1e-8, help="AdamW's epsilon.")
    add("--max_grad_norm", type=positive, default=1.0, help="A longer gradient is scaled down to this norm; 0: never.")
    add(
        "--max_skipped_steps",
        type=count,
        default=0,
        changeable=True,
        help="How many steps whose gradient is not finite to skip before the run stops.",
    )
    add(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Average the weights, and save and draw from the average; with --no-use_ema they are saved as they are.",
    )
    add(
        "--ema_decay",
        is_kept=True,
        type=probability,
        help="Decay of the average, constant if given (default: with --ema_warmup, and at most 0.9999: it looks back"
        " over a ninth of the run, and no more than the paper's 10,000 steps).",
    )
    add(
        "--ema_warmup",
        is_kept=True,
        action=argparse.BooleanOptionalAction,
        help="Begin with a decay of (1 + step) / (10 + step), until that is the other (default: if --ema_decay is not"
        " given).",
    )
    add(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        changeable=True,
        help="Number format of the products; weights stay in float32 (default: as accelerate is configured).",
    )
    add("--allow_tf32", action="store_true", changeable=True, help="Round the inputs of float32 products: faster.")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="Of everything that is random.")
    add(
        "--num_cpu_threads",
        type=size,
        changeable=True,
        on_card=False,
        help="Threads of each process, on a CPU (default: this machine's cores, shared out).",
    )


def add_output_flags(flags: Flags):
    """What is written, when and where."""
    add, elsewhere = flags.add, {"changeable": True, "on_card": False}
    add("--output_dir", default="lsep-model", **elsewhere, help="Where everything is written.")
    add("--overwrite_output_dir", action="store_true", **elsewhere, help="Delete the run that is there first.")
    add(
        "--resume_from_checkpoint",
        **elsewhere,
        help="Continue a run: `latest`, or one of its checkpoints. If there is none yet, `latest` begins.",
    )
    add("--checkpointing_steps", type=size, default=5000, **elsewhere, help="Save a checkpoint every so many steps.")
    add("--checkpoints_total_limit", type=size, **elsewhere, help="How many checkpoints to keep (default: all).")
    add("--milestone_steps", type=size, **elsewhere, help="Keep those at multiples of it besides.")
    add("--logging_steps", type=size, default=50, **elsewhere, help="Write metrics every so many steps.")
    add("--logging_dir", default="logs", **elsewhere, help="Folder of the tracker, inside --output_dir.")
    add(
        "--report_to",
        **elsewhere,
        help="A tracker of accelerate, `all` or `none` (default: tensorboard if it is installed).",
    )
    add(
        "--validation_steps",
        type=size,
        default=5000,
        changeable=True,
        help="Draw samples, and measure on held-out images, every so many steps.",
    )
    add(
        "--validation_labels",
        nargs="+",
        changeable=True,
        help="Classes to draw, by name or index (default: up to ten of all).",
    )
    add("--num_validation_images", type=size, default=4, changeable=True, help="Images to draw of each.")
    add(
        "--validation_guidance_scale",
        type=positive,
        changeable=True,
        is_kept=True,
        help="Scale of their guidance (default: 1.5; 1 for flow maps and without classes).",
    )
    add(
        "--validation_inference_steps",
        type=size,
        changeable=True,
        is_kept=True,
        help="Steps of the sampler for them (default: 250; 4 for flow maps).",
    )
    add("--push_to_hub", action="store_true", **elsewhere, help="Upload the pipeline, and nothing else, at the end.")
    add("--hub_model_id", **elsewhere, help="Where to (default: the name of --output_dir).")
    add(
        "--hub_lora_model_id",
        **elsewhere,
        help="Upload the LoRA layers of --lora_rank, and nothing else, to this repository at the end.",
    )
    add("--license", **elsewhere, help="Licence of the weights, as the Hub spells it; needed for uploading.")
    add("--dry_run", action="store_true", **elsewhere, help="Check and print everything, and train nothing.")


def find_recipe(word: str, examples: Path) -> str:
    """`@NAME` and `@examples/configs/NAME` are bundled recipes wherever there is no such file."""
    recipe = examples / "configs" / word[1:].removeprefix("examples/configs/")
    return f"@{recipe}" if word[:1] == "@" and not Path(word[1:]).is_file() and recipe.is_file() else word


def find_data(folder: str | None, examples: Path) -> str | None:
    """`examples/NAME` is a folder of bundled data wherever there is no such folder."""
    if folder is None or Path(folder).exists() or Path(folder).parts[:1] != ("examples",):
        return folder
    bundled = examples.joinpath(*Path(folder).parts[1:])
    return str(bundled) if bundled.is_dir() else folder


def read_flags(argv: list[str], description: str, examples: Path) -> argparse.Namespace:
    """The flags as they are given, without the recipe that [`parse_args`] chooses, and without its checks."""
    return build_parser(description).parse_args([find_recipe(word, examples) for word in argv])


def parse_args(argv: list[str], description: str, examples: Path) -> argparse.Namespace:
    """
    Reads the command line.

    Args:
        argv (`list[str]`): The arguments.
        description (`str`): For `--help`.
        examples (`Path`): The folder with the bundled data `digits` and the recipes in `configs`.
    """
    parser = build_parser(description)
    args = read_flags(argv, description, examples)
    sources = [flag for flag in ("dataset_name", "train_data_dir", "latents_dir") if getattr(args, flag) is not None]
    recipe = choose_recipe(args, sources)
    if recipe is not None:
        args = read_flags([f"@{examples / 'configs' / recipe}", *argv], description, examples)
    # As in diffusers' scripts, steps go before epochs; but epochs go before the steps of a recipe.
    steps = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    steps.add_argument("--max_train_steps", type=size)
    args.max_train_steps = steps.parse_known_args(argv)[0].max_train_steps or args.max_train_steps
    args.regularizers = list(dict.fromkeys(args.regularizers))
    args.recipe = recipe
    args.train_data_dir = find_data(args.train_data_dir, examples) if sources else str(examples / "digits")
    check_combinations(parser, args, sources)
    return args
