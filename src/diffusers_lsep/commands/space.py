# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`diffusers-lsep space`: the demo of a pipeline, as a Space for the Hub."""

import argparse

from ..command_line import check_output_dir


def add_arguments(parser: argparse.ArgumentParser):
    """Adds the arguments of `diffusers-lsep space`."""
    parser.description = "Writes a Space for the Hugging Face Hub: a page on which a model draws."
    parser.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        metavar="ID_OR_DIR",
        help="Hub id of a saved LSEP pipeline, which the Space loads from there; a folder is copied into the Space.",
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="Where the Space is written.")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="Replace the Space that is in --output_dir."
    )
    parser.add_argument("--title", help="Title of the Space and its page; made of the model's name if not given.")
    parser.add_argument("--push_to_hub", metavar="ID", help="Also upload it to this Space on the Hub.")


def run(args: argparse.Namespace):
    """Does the work of `diffusers-lsep space`."""
    from huggingface_hub.utils import validate_repo_id

    from ..hub.space import is_space, push_space, write_space

    output_dir = check_output_dir(args.output_dir, args.overwrite_output_dir, is_space, "a Space")
    if args.push_to_hub:
        validate_repo_id(args.push_to_hub)

    write_space(args.pretrained_model_name_or_path, output_dir, args.title)
    print(f"{args.pretrained_model_name_or_path} -> {output_dir}: to look at it, python {output_dir / 'app.py'}")
    if args.push_to_hub:
        commit = push_space(output_dir, args.push_to_hub)
        print(f"Pushed: {commit.commit_url}")
