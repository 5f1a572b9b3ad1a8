# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`diffusers-lsep convert`: a checkpoint of an original project becomes a pipeline."""

import argparse
import json
from os import PathLike
from pathlib import Path

import torch

from ..command_line import check_output_dir, number
from ..conversion import DTYPES, SOURCES, WEIGHTS, convert_original_checkpoint, imagenet_id2label
from ..files import whole_folder


# What `diffusers-lsep convert` may find in a folder that it is asked to replace.
_WRITTEN = {"README.md", "model_index.json", "pipeline.py", "probe", "scheduler", "transformer", "vae"}


def add_arguments(parser: argparse.ArgumentParser):
    """Adds the arguments of `diffusers-lsep convert`."""
    parser.description = "Turns a checkpoint of the original LSEP, REPA or SiT code into an LSEPPipeline folder."
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="The original .pt or .safetensors file.")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="Where the pipeline is written.")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="Replace the pipeline that is in --output_dir."
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="ema", help="Which of the file's weights to take.")
    parser.add_argument(
        "--source", choices=SOURCES, help="The project that the file is from, if its content does not tell."
    )
    parser.add_argument(
        "--num_attention_heads",
        type=number(int, 1),
        metavar="N",
        help="Attention heads of a model that is none of the paper's presets.",
    )
    parser.add_argument(
        "--path_type",
        choices=("linear", "cosine"),
        help="The path between data and noise that the model was trained on, if its file does not say it.",
    )
    parser.add_argument(
        "--vae",
        metavar="ID_OR_DIR",
        help="An AutoencoderKL or another autoencoder of diffusers, saved with the pipeline, e.g."
        " stabilityai/sd-vae-ft-ema. Without it the pipeline has to be given one when it is loaded.",
    )
    parser.add_argument(
        "--id2label",
        metavar="FILE",
        help="JSON with the names of the classes, a list or {id: name}; several names of a class are separated by"
        " commas. ImageNet's names if not given and there are 1000 classes.",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="The dtype of the saved weights; that of the file if not given."
    )
    parser.add_argument("--max_shard_size", default="10GB", metavar="SIZE", help="Largest size of one weight file.")
    parser.add_argument(
        "--with_code",
        action="store_true",
        help="Add the source files, so that diffusers loads the pipeline with trust_remote_code=True where this"
        " package is not installed.",
    )
    parser.add_argument(
        "--license", metavar="ID", help="Licence of the weights, as the Hub spells it; needed with --push_to_hub."
    )
    parser.add_argument("--push_to_hub", metavar="ID", help="Also upload the folder to this repository on the Hub.")


def run(args: argparse.Namespace):
    """Does the work of `diffusers-lsep convert`."""
    from huggingface_hub.utils import validate_repo_id

    from ..autoencoders import check_autoencoder, load_autoencoder
    from ..hub.model_card import write_model_card
    from ..hub.push import push_folder
    from ..hub.remote_code import add_code
    from ..pipeline_lsep import LSEPPipeline

    # 1. Refuse what is wrong before any work
    output_dir = check_output_dir(
        args.output_dir,
        args.overwrite_output_dir,
        lambda names: "model_index.json" in names and names <= _WRITTEN,
        "a converted pipeline",
    )
    if args.push_to_hub and not args.license:
        raise ValueError(
            "`--push_to_hub` needs `--license`: no licence is guessed, the original weights may have none."
        )
    if args.push_to_hub:
        validate_repo_id(args.push_to_hub)
    id2label = read_id2label(args.id2label) if args.id2label else None
    vae = load_autoencoder(args.vae, "--vae") if args.vae else None

    # 2. Convert
    overrides = {
        name: value for name in ("num_attention_heads", "path_type") if (value := getattr(args, name)) is not None
    }
    converted = convert_original_checkpoint(args.checkpoint, args.weights, args.source, **overrides)
    transformer, probe = converted.transformer, converted.probe
    num_classes = transformer.config.num_classes
    if id2label is None and num_classes == 1000:
        id2label = imagenet_id2label()
    if id2label is not None and sorted(id2label) != list(range(num_classes)):
        raise ValueError(
            f"`--id2label` {args.id2label} has to name the classes 0..{num_classes - 1} of the model, but has"
            f" {len(id2label)} names for the ids {min(id2label, default=None)}..{max(id2label, default=None)}."
        )
    if args.dtype is not None:
        for model in (transformer, probe):
            if model is not None:
                model.to(getattr(torch, args.dtype))
    if vae is not None:
        check_autoencoder(vae, "--vae", transformer.config.in_channels)
    pipeline = LSEPPipeline(transformer, converted.scheduler, vae, id2label)

    # 3. Write
    with whole_folder(output_dir) as folder:
        pipeline.save_pretrained(folder, max_shard_size=args.max_shard_size)
        if probe is not None:
            probe.save_pretrained(folder / "probe")
        if args.with_code:
            add_code(folder)
        name = args.push_to_hub or output_dir.name
        write_model_card(folder, repo_id=name, license=args.license, source=converted.source)

    print(
        f"{args.checkpoint}: {converted.source} checkpoint, weights {args.weights!r},"
        f" {transformer.num_parameters():,} parameters, {transformer.dtype} -> {output_dir}"
    )
    if vae is None:
        print(
            "The pipeline has no VAE. For a model of latents convert with `--vae`, or give it one when it is loaded:"
            f" DiffusionPipeline.from_pretrained({str(output_dir)!r}, vae=vae)"
        )

    # 4. Upload
    if args.push_to_hub:
        commit = push_folder(output_dir, args.push_to_hub, license=args.license)
        print(f"Pushed: {commit.commit_url}")


def read_id2label(path: str | PathLike) -> dict[int, str]:
    """
    Reads the names of classes from a JSON file.

    Args:
        path (`str` or `os.PathLike`): A list of names, in the order of the ids, or an object `{id: name}`.

    Raises:
        `ValueError`: if the file is neither.
    """
    try:
        labels = json.loads(Path(path).read_text(encoding="utf-8"))
        labels = dict(enumerate(labels)) if isinstance(labels, list) else {int(i): name for i, name in labels.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`id2label` {path} has to be a JSON list of names or an object {{id: name}}: {error}"
        ) from error
    wrong = [name for name in labels.values() if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"`id2label` {path} has to have names as text, but has {wrong[0]!r}.")
    return labels
