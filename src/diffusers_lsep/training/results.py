# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run shows of its model: samples at every validation, and the model card at the end."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from ..figures import make_labeled_grid
from ..files import whole_file
from ..hub.gallery import Gallery
from ..hub.model_card import write_lora_card, write_model_card
from ..labels import find_class_ids
from ..pipeline_lsep import LSEPPipeline
from .arguments import flags_that_are
from .fine_tuning import LORA_FOLDER
from .log import read_metrics


def choose_validation_labels(args: argparse.Namespace, names: list[str]) -> list[int]:
    """The classes of which samples are drawn; if none are asked for, up to ten, evenly spaced."""
    if args.validation_labels is None:
        return np.linspace(0, len(names) - 1, min(10, len(names))).round().astype(int).tolist()
    return find_class_ids(args.validation_labels, dict(enumerate(names)), len(names), "--validation_labels")


def draw_samples(
    path: Path,
    pipeline: LSEPPipeline,
    args: argparse.Namespace,
    labels: list[int],
    accelerator: Accelerator,
    step: int,
):
    """
    Draws the same classes from the same noise at every validation, into a PNG and for the trackers.

    Args:
        path (`Path`): The PNG, in a folder that exists.
        pipeline ([`LSEPPipeline`]): Draws them.
        args (`argparse.Namespace`): The flags.
        labels (`list[int]`): The classes, each of which is a column.
        accelerator (`Accelerator`): Its precision and its trackers.
        step (`int`): The step of the training.
    """
    class_ids = labels * args.num_validation_images
    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(len(class_ids))]
    with accelerator.autocast():
        images = pipeline(
            class_ids,
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            generator=generators,
        ).images
    names = pipeline.config.id2label
    grid = make_labeled_grid(images, columns=len(labels), labels=[names[index] for index in class_ids])
    with whole_file(path) as partial:
        grid.save(partial, format="PNG")
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid.convert("RGB"))[None]}, step=step, **options)


def describe_hardware(accelerator: Accelerator) -> str:
    """What all processes run on."""
    number, device = accelerator.num_processes, accelerator.device
    if device.type == "cpu":
        return "a CPU" if number == 1 else f"CPUs, in {number} processes"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return name if number == 1 else f"{number} x {name}"


def describe_training(
    output_dir: Path, args: argparse.Namespace, samples_per_step: int, num_images: int, hardware: str
) -> list[str]:
    """
    Data, length, hardware and held-out results of a run, in sentences, from its flags and its `metrics.jsonl`.

    Args:
        output_dir (`Path`): The run.
        args (`argparse.Namespace`): The flags.
        samples_per_step (`int`): Of all processes.
        num_images (`int`): In the data.
        hardware (`str`): That of [`describe_hardware`].
    """
    facts = []
    card = Path(args.train_data_dir, "README.md") if args.train_data_dir else None
    if card is not None and card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        license = re.search(r"^license: (\S+)$", text, re.MULTILINE)
        if title is not None:
            facts.append(f"Data: {title[1]}" + (f" (licence: {license[1]})." if license is not None else "."))
    steps, seconds, before = args.max_train_steps, 0.0, 0
    metrics = read_metrics(output_dir / "metrics.jsonl") if (output_dir / "metrics.jsonl").is_file() else []
    for line in metrics:
        if "seconds_per_step" in line:
            seconds, before = seconds + (line["step"] - before) * line["seconds_per_step"], line["step"]
    length = f"{steps:,} steps of {samples_per_step} images ({steps * samples_per_step / num_images:,.1f} passes)"
    time = f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
    facts.append(f"Length: {length}" + (f" in {time} on {hardware}." if seconds else "."))
    held_out = next((line for line in reversed(metrics) if "validation_denoising_loss" in line), None)
    if held_out is not None:
        loss, accuracy = held_out["validation_denoising_loss"], held_out.get("validation_probe_accuracy")
        fact = f"On held-out images, after {held_out['step']:,} steps: denoising loss {loss:.4g}"
        if accuracy is not None:
            fact += f", accuracy of the probe {accuracy:.3g} (mean over all times, no label given)"
        facts.append(f"{fact}.")
    return facts


def write_cards(
    output_dir: Path, args: argparse.Namespace, samples_file: Path, names: list[str], facts: Sequence[str] = ()
):
    """
    Writes the model card of a run, and that of its LoRA layers if it has trained some.

    Args:
        output_dir (`Path`): The run, with its pipeline.
        args (`argparse.Namespace`): The flags.
        samples_file (`Path`): Its last samples, in that folder; left out where there are none.
        names (`list[str]`): The classes of these samples.
        facts (`Sequence[str]`, defaults to `()`): Of [`describe_training`].
    """
    flags = {name: value for name, value in vars(args).items() if name in flags_that_are("on_card")}
    seeds = [args.seed + index for index in range(len(names))]
    gallery = Gallery(image=str(samples_file), class_labels=names, seeds=seeds)
    write_model_card(
        output_dir,
        repo_id=args.hub_model_id,
        license=args.license,
        source="training",
        dataset=args.dataset_name,
        base_model=args.pretrained_model_name_or_path,
        training_args=flags,
        sampling={
            "num_inference_steps": args.validation_inference_steps,
            "guidance_scale": args.validation_guidance_scale,
        },
        gallery=gallery if (output_dir / samples_file).exists() else None,
        training_facts=facts,
    )
    if args.lora_rank is not None:
        base, folder = args.pretrained_model_name_or_path, output_dir / LORA_FOLDER
        write_lora_card(folder, base, flags, args.hub_lora_model_id, args.license)
