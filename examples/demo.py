#!/usr/bin/env python
# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Opens a page in the browser on which a saved LSEP pipeline draws, and shows how images come out of noise.

    pip install -c constraints.txt -e ".[demo]"
    python examples/demo.py --pretrained_model_name_or_path lsep-digits

The flags are what the page starts with. In the environment, `GRADIO_SERVER_NAME=0.0.0.0` lets other machines in and
`GRADIO_SERVER_PORT` chooses the port. `diffusers-lsep space` makes a Space for the Hugging Face Hub of the same page.
"""

import argparse
from pathlib import Path

from accelerate import PartialState

from diffusers_lsep.command_line import ArgumentParser, run_script
from diffusers_lsep.demo import MAX_GUIDANCE, MAX_STEPS, launch_demo
from diffusers_lsep.sampling import DTYPES, add_guidance_arguments, add_pipeline_arguments, load_pipeline


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add_pipeline_arguments(parser)
    add_guidance_arguments(parser)
    parser.set_defaults(scheduler="sde2", num_inference_steps=50, guidance_scale=1.5)
    parser.add_argument("--share", action="store_true", help="Also make a public link, through gradio's servers.")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    for name, largest in (("num_inference_steps", MAX_STEPS), ("guidance_scale", MAX_GUIDANCE)):
        if not 1 <= getattr(args, name) <= largest:
            parser.error(f"--{name} has to be in 1..{largest}, but is {getattr(args, name)}")
    return args


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    place = {name: getattr(args, name) for name in ("pretrained_model_name_or_path", "revision", "variant")}
    pipe = load_pipeline(**place, device=PartialState().device, dtype=DTYPES[args.dtype])
    names = ("scheduler", "num_inference_steps", "guidance_scale", "guidance_interval")
    defaults = {name: getattr(args, name) for name in names}
    launch_demo(pipe, Path(args.pretrained_model_name_or_path).name, defaults, share=args.share)


if __name__ == "__main__":
    run_script(main)
