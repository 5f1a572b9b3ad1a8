# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Teaches a model of eight digits the other two, and compares with training on these two alone.

    python benchmarks/digits_fine_tuning.py

A model is trained on the digits 0 to 7. Then 8 and 9 are learned in a few steps: by all its weights, through LoRA, and
from scratch. Samples are judged by a classifier of all ten digits, and by their Frechet distance to the real 8 and 9
in pixel space. Prints a table and writes it as JSON.
"""

import argparse
import json
import tempfile
from pathlib import Path

import datasets
import numpy as np
from diffusers import DiffusionPipeline
from digits_runs import DIGITS, draw, pixel_distance, read_digits, train

from diffusers_lsep.training.log import read_metrics


NEW = [8, 9]
VARIANTS = {
    "all weights, 3e-4": ["--learning_rate", 3e-4],
    "all weights, 1e-3": ["--learning_rate", 1e-3],
    "LoRA, rank 8, 3e-3": ["--learning_rate", 3e-3, "--lora_rank", 8],
    "LoRA, rank 8, 1e-2": ["--learning_rate", 1e-2, "--lora_rank", 8],
    "from scratch, 1e-3": ["--learning_rate", 1e-3],
}


def write_images(splits: datasets.DatasetDict, folder: Path, classes: list[int]) -> Path:
    """An image folder of some of the classes, with both splits."""
    for split, rows in splits.items():
        for index, (image, label) in enumerate(zip(rows["image"], rows["label"])):
            if label in classes:
                path = folder / split / str(label) / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    return folder


class Classifier:
    """Kernel ridge regression on pixels, fitted to the real training digits."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.scale = images, 0.5 / images.var(axis=0).sum()
        kernel = self._kernel(images)
        self.weights = np.linalg.solve(kernel + 1e-2 * np.eye(len(kernel)), np.eye(10)[labels])

    def _kernel(self, images: np.ndarray) -> np.ndarray:
        squares = (images**2).sum(1)[:, None] + (self.images**2).sum(1) - 2 * images @ self.images.T
        return np.exp(-2 * self.scale * squares)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return (self._kernel(images) @ self.weights).argmax(axis=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining_steps", type=int, default=600)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100, 200], help="when to look at the samples")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--per_class", type=int, default=100, help="samples per class")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/digits_fine_tuning.json"))
    args = parser.parse_args()

    splits = datasets.load_dataset(str(DIGITS))
    digits = read_digits()
    classifier = Classifier(*digits["train"])
    images, labels = digits["test"]
    accuracy = (classifier(images) == labels).mean()
    print(f"the classifier is right on {accuracy:.1%} of the held-out digits", flush=True)
    real = np.concatenate([images[np.isin(labels, NEW)] for images, labels in digits.values()])

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        eight = write_images(splits, folder / "eight", [label for label in range(10) if label not in NEW])
        two = write_images(splits, folder / "two", NEW)
        train(
            folder / "pretrained", eight, "--max_train_steps", args.pretraining_steps, "--checkpointing_steps", 10**6
        )
        for name, flags in VARIANTS.items():
            start = [] if "scratch" in name else ["--pretrained_model_name_or_path", folder / "pretrained"]
            results = []
            for seed in range(args.seeds):
                run = folder / f"{name} {seed}"
                often = np.gcd.reduce(args.steps)
                length = ["--max_train_steps", max(args.steps), "--checkpointing_steps", often]
                train(run, two, *start, *flags, *length, "--validation_steps", often, "--seed", seed)
                lines = read_metrics(run / "metrics.jsonl")
                held_out = {line["step"]: line.get("validation_denoising_loss") for line in lines}
                for step in args.steps:
                    pipe = DiffusionPipeline.from_pretrained(run / f"checkpoint-{step}" / "pipeline")
                    asked = np.repeat(NEW, args.per_class)
                    names = [str(label) for label in asked]
                    samples = draw(pipe, names, seed, num_inference_steps=50, guidance_scale=1.5)
                    as_asked = (classifier(samples) == asked).mean()
                    results.append((step, as_asked, pixel_distance(samples, real), held_out[step]))
            for step in args.steps:
                values = np.array([result[1:] for result in results if result[0] == step], dtype=float)
                row = {"variant": name, "steps": step}
                for key, column in zip(("as_asked", "frechet", "held_out_loss"), values.T):
                    row |= {key: column.mean(), f"{key}_spread": column.std(ddof=1) if args.seeds > 1 else None}
                rows.append(row)
                text = "  ".join(f"{key} {row[key]:.3f}" for key in ("as_asked", "frechet", "held_out_loss"))
                print(f"{name:20} {step:4} steps  {text}", flush=True)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps({"classifier_accuracy": accuracy, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
