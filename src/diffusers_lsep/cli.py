# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `diffusers-lsep`."""

import importlib
import sys
from collections.abc import Sequence

from . import __version__
from .command_line import ArgumentParser, run_script


# Command -> the module with its `add_arguments(parser)` and `run(args)`, and what it does.
COMMANDS = {
    "convert": ("commands.convert", "turn an original LSEP, REPA or SiT checkpoint into a pipeline"),
    "ema": ("commands.ema", "make an average of the weights of another length after training"),
    "evaluate": ("commands.evaluate", "measure FID, sFID, inception score, precision and recall"),
    "likelihood": ("commands.likelihood", "measure how likely a model finds images, and classify them so"),
    "probe": ("commands.probe", "fit linear probes to the hidden states of a model"),
    "space": ("commands.space", "make a Space for the Hub, on whose page a model draws"),
}

# Scripts of examples/ that are commands too: the installed package holds them, with the recipes and the digits.
SCRIPTS = {
    "train": ("examples.train_lsep", "train a model: the bundled digits, or images and latents of your own"),
    "sample": ("examples.sample", "draw images from a pipeline: a few to look at, or many to measure"),
    "encode": ("examples.encode_latents", "turn images into latents for training, once and for all"),
    "figures": ("examples.figures", "draw figures about a pipeline"),
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """
    Runs `diffusers-lsep`.

    Args:
        argv (`Sequence[str]`, *optional*): The arguments; those of the process if not given.

    Returns:
        `int`, *optional*: The exit code, if it is not 0.

    Raises:
        `ValueError`, `OSError`, `ImportError`: if a command refuses its arguments or input.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] and argv[0] in SCRIPTS:
        return importlib.import_module(f".{SCRIPTS[argv[0]][0]}", __package__).main(argv[1:])
    parser = ArgumentParser(prog="diffusers-lsep", description="LSEP for diffusers.", fromfile_prefix_chars=None)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, purpose) in SCRIPTS.items():
        commands.add_parser(name, help=purpose)
    for name, (module_name, purpose) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        # Only the module that runs is imported: each needs libraries that the others do not.
        if argv[:1] == [name]:
            module = importlib.import_module(f".{module_name}", __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run, parser=command)
    args = parser.parse_args(argv)
    return args.run(args)


def console_main():
    """The console command: [`main`], with one line for what a user can set right."""
    name = " ".join(["diffusers-lsep", *sys.argv[1:2]])
    if sys.argv[1:2] and sys.argv[1] in SCRIPTS:
        sys.argv[0] = name  # by which argparse calls a script
    run_script(main, name)


if __name__ == "__main__":
    console_main()
