# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains a SiT with LSEP ("No Alignment Needed for Generation", arXiv 2509.21565).

    accelerate launch examples/train_lsep.py                            # the bundled digits, some minutes on two cores
    accelerate launch examples/train_lsep.py --train_data_dir images/   # your own: one subfolder per class

Flags that are not given come from an argument list: `examples/configs/digits` where there is no data flag; with images
and no model (`--preset`, `--num_layers`, ...) the one of `own-images-*` beside it that suits this machine. Else they
have the paper's values. Argument lists are read as `@file`: flags as on the command line, `#` starts a comment.

SIGTERM, SIGUSR1 and Ctrl-C make the script save a checkpoint and exit with code 75; run it again with the same flags
and `--resume_from_checkpoint latest`. A launcher has an exit code of its own then (docs/reliability.md).
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path


if (
    __name__ in ("__main__", "diffusers_lsep.examples.train_lsep")  # the latter: `diffusers-lsep train`
    and os.environ.get("RANK", "0") == "0"
    and not {"-h", "--help"} & {*sys.argv}
):
    print("Loading PyTorch, diffusers and the data ...", flush=True)

# Before torch is loaded. By default a thread that waits for others spins; where the machine has something else to do
# as well, that made a step of the digits on two threads ten times slower (5 s in place of 0.5 s).
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import torch

from diffusers_lsep.command_line import run_script
from diffusers_lsep.hub.push import push_folder, push_lora
from diffusers_lsep.labels import describe_classes
from diffusers_lsep.training.arguments import parse_args, read_flags
from diffusers_lsep.training.fine_tuning import LORA_FOLDER
from diffusers_lsep.training.output_folder import (
    check_length,
    compare_data,
    compare_settings,
    find_run_to_continue,
    keep_settings,
    own_output_folder,
)
from diffusers_lsep.training.processes import start_accelerator
from diffusers_lsep.training.setup import prepare, take_fingerprint
from diffusers_lsep.training.stopping import EXIT_STOPPED, leave_on_signals
from diffusers_lsep.training.summary import describe_initial_weights, describe_result, report_summary
from diffusers_lsep.training.trainer import Trainer


EXAMPLES = Path(__file__).resolve().parent  # with the digits and the recipes


def main(argv: list[str] | None = None) -> int:
    # 1. Flags and processes, and what there is to continue
    command_line = (sys.argv[1:] if argv is None else argv, __doc__, EXAMPLES)
    args = parse_args(*command_line)
    leave_on_signals()
    accelerator, args = start_accelerator(args)
    checkpoint, settings_before = find_run_to_continue(args, accelerator)
    if settings_before is not None:
        args = keep_settings(args, settings_before)

    # 2. Data and models. Everything that can be wrong is found before anything is written
    with accelerator.local_main_process_first():  # it may have to download them
        setup = prepare(args, accelerator.num_processes)
    args, names = setup.args, setup.data.names
    fingerprint, training_data = take_fingerprint(setup.data, accelerator)
    settings = {
        **vars(args),
        **setup.facts,
        "training_data": training_data,
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
    }
    if args.dry_run:  # a run keeps them in training_args.json
        accelerator.print(json.dumps(settings, indent=2))
    if settings_before is not None:
        compare_settings(settings, settings_before, accelerator.print)
        run_before = Path(args.output_dir) if checkpoint is None else checkpoint.parent
        compare_data(settings, settings_before, fingerprint, run_before)
    if checkpoint is not None:
        check_length(checkpoint, args.max_train_steps)
    if args.resume_from_checkpoint:
        accelerator.print(f"Continuing from {checkpoint or 'the beginning: there is no checkpoint yet'}.")
    if setup.start is not None and checkpoint is None:
        accelerator.print(setup.start.describe())
    shortage = report_summary(setup, accelerator, read_flags(*command_line))
    if shortage is not None and not args.dry_run:
        raise ValueError(shortage)
    with torch.device("meta" if args.dry_run else "cpu"):
        trainer = Trainer(setup, accelerator, settings, load=checkpoint is None and not args.dry_run)
    class_ids = trainer.validation_labels * args.num_validation_images
    accelerator.print(f"At every validation, {describe_classes(class_ids, dict(enumerate(names)))}")
    if args.dry_run:
        if shortage is not None:
            accelerator.print(f"A run would be refused: {shortage}")
        return 0

    # 3. Training
    accelerator.wait_for_everyone()
    folder = own_output_folder(args, settings, fingerprint, checkpoint, print)
    with folder if accelerator.is_main_process else nullcontext():
        trainer.prepare_training(checkpoint)
        accelerator.init_trackers("train_lsep", config={name: str(value) for name, value in settings.items()})
        finished = trainer.train()
        if finished:
            trainer.save_result()

    # 4. The result
    if finished and accelerator.is_main_process:
        output_dir = Path(args.output_dir)
        print(describe_result(args))
        if describe_initial_weights(args) is not None:
            print(describe_initial_weights(args))
        if args.push_to_hub:
            repo_id = args.hub_model_id or output_dir.resolve().name
            print(f"Pushed it: {push_folder(output_dir, repo_id, args.license).repo_url}")
        if args.hub_lora_model_id:
            lora = push_lora(output_dir / LORA_FOLDER, args.hub_lora_model_id, args.license)
            print(f"Pushed its LoRA layers: {lora.repo_url}")
    accelerator.end_training()
    return 0 if finished else EXIT_STOPPED


if __name__ == "__main__":
    run_script(main)
