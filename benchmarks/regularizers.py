# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Encoder-free training side by side on 28x28 digits: the same seeds, order, noise and initial weights for all.

    python benchmarks/regularizers.py                                  # all; can be killed and started again
    python benchmarks/regularizers.py --study choice --jobs 2          # only what chooses LSEP's settings
    python benchmarks/regularizers.py --methods SiT LSEP --seeds 0     # one pair of runs

Every run is `examples/train_lsep.py @examples/configs/mnist` but for what its name says, on one thread. The averaged
weights are judged after 500, 1,000, 1,500, 2,000 and 3,000 steps: the Frechet distance of 1,000 samples without
guidance (32 steps of `FlowMatchSDEMultistepScheduler`) to the 8,000 training images, in the features of the classifier
of `mnist_classifier.py` and on pixels, precision and recall in these features, and the share of samples that the
classifier takes for the class that was asked for; at the end linear probes of every block.

`choice` tries LSEP's settings on seeds that nothing else uses, `labels` takes a fifth of wrong labels and two coarse
classes. Writes `results.json` and, in a folder of its own for each run, the run and its `result.json`.
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import DiffusionPipeline
from digits_runs import draw, pixel_distance, train
from mnist_classifier import MNIST, Classifier, classify, load_classifier, read_mnist

from diffusers_lsep import FlowMatchSDEMultistepScheduler
from diffusers_lsep.data.images import load_image_dataset, open_images
from diffusers_lsep.evaluation.linear_probing import probe_layers
from diffusers_lsep.evaluation.metrics import feature_statistics, frechet_distance, precision_recall
from diffusers_lsep.files import whole_folder, write_text


STEPS = 3000
JUDGED_STEPS = (500, 1000, 1500, 2000, 3000)
NUM_SAMPLES = 1000
SAMPLING_STEPS = 32
PROBED_TIMES = (0.1, 0.3, 0.5, 0.7)

# The flags in which the methods differ from LSEP with the settings of `examples/configs/mnist`.
METHODS: dict[str, list[object]] = {"SiT": ["--no_lsep"], "LSEP": []}
# What was tried to choose LSEP's settings, half as long.
CHOICE_STEPS = 1500
CHOICES: dict[str, list[object]] = {
    "SiT": ["--no_lsep"],
    "LSEP": [],
    "LSEP, weight 0.1": ["--probe_weight_start", 0.1, "--probe_weight_end", 0.1, "--num_probe_weights", 1],
    "LSEP, depth 2": ["--probe_depth", 2],
    "LSEP, depth 4": ["--probe_depth", 4],
    "LSEP, dropout 0.5": ["--probe_dropout_prob", 0.5],
    "LSEP, dropout 0": ["--probe_dropout_prob", 0],
}
SEEDS, PAIR_SEEDS, CHOICE_SEEDS = (0, 1, 2), (0, 1, 2, 3, 4), (100, 101)
WRONG, COARSE = "wrong labels", "coarse labels"


@dataclass
class Run:
    method: str
    seed: int
    data: str = "labels"
    steps: int = STEPS
    flags: list[object] = field(default_factory=list)

    @property
    def name(self) -> str:
        parts = (self.method, self.data, self.steps, "steps", "seed", self.seed)
        return "-".join(str(part).replace(", ", "-").replace(" ", "-") for part in parts)


def list_runs(study: str, methods: list[str], seeds: list[int] | None) -> Iterator[Run]:
    if study in ("all", "choice"):
        for seed in CHOICE_SEEDS:
            for name, flags in CHOICES.items():
                yield Run(name, seed, steps=CHOICE_STEPS, flags=flags)
    if study in ("all", "methods"):
        for seed in PAIR_SEEDS if seeds is None else seeds:
            for name in methods:
                if seeds is not None or seed in SEEDS or name in ("SiT", "LSEP"):
                    yield Run(name, seed, flags=METHODS[name])
    if study in ("all", "labels"):
        for data in (WRONG, COARSE):
            for seed in SEEDS if seeds is None else seeds:
                for name in ("SiT", "LSEP"):
                    yield Run(name, seed, data, flags=METHODS[name])


def prepare_data(kind: str, folder: Path) -> Path:
    """The folder of the images with their own labels, a fifth of the training labels wrong, or odd and even."""
    if kind == "labels":
        return MNIST
    folder = folder / "data" / kind.replace(" ", "-")
    if folder.is_dir():
        return folder
    splits = datasets.load_dataset(str(MNIST))
    features = splits["train"].features
    if kind == COARSE:
        labels = {split: [label % 2 for label in rows["label"]] for split, rows in splits.items()}
        features = datasets.Features({**features, "label": datasets.ClassLabel(names=["even", "odd"])})
    else:
        generator = np.random.default_rng(0)
        labels = {split: np.array(rows["label"]) for split, rows in splits.items()}
        wrong = generator.permutation(len(labels["train"]))[: len(labels["train"]) // 5]
        labels["train"][wrong] = (labels["train"][wrong] + generator.integers(1, 10, len(wrong))) % 10
    with whole_folder(folder) as partial:
        for split, rows in splits.items():
            images = rows.cast_column("image", datasets.Image(decode=False))["image"]
            changed = datasets.Dataset.from_dict({"image": images, "label": labels[split]}, features=features)
            changed.to_parquet(partial / f"{split}.parquet")
    return folder


class Judge:
    """Distances of samples to the training images."""

    def __init__(self):
        self.classifier: Classifier = load_classifier()
        self.pixels = read_mnist()["train"][0]
        self.features = classify(self.classifier, self.pixels)[0]
        self.statistics = feature_statistics(self.features)

    def __call__(self, pixels: np.ndarray, asked_for: np.ndarray, num_classes: int) -> dict[str, float]:
        images = torch.from_numpy(pixels).view(-1, 1, 28, 28)
        features, classes = classify(self.classifier, images)
        precision, recall = precision_recall(features, self.features)
        return {
            "frechet_distance": frechet_distance(*feature_statistics(features), *self.statistics),
            "pixel_frechet_distance": pixel_distance(pixels, self.pixels.flatten(1).double().numpy()),
            "precision": precision,
            "recall": recall,
            "as_asked_for": float((classes % num_classes == asked_for).mean()),
        }


def finish(run: Run, judge: Judge, output_dir: Path) -> dict:
    """Trains and judges, or reads what an earlier call found."""
    folder, data = output_dir / run.name, prepare_data(run.data, output_dir)
    result = folder / "result.json"
    if not result.is_file():
        length = ["--max_train_steps", run.steps, "--checkpointing_steps", 500, "--validation_steps", run.steps]
        options = ["--seed", run.seed, "--resume_from_checkpoint", "latest"]
        train(folder, data, *run.flags, *length, *options, recipe="mnist")
        num_classes = 2 if run.data == COARSE else 10
        asked_for, curve = np.arange(NUM_SAMPLES) % num_classes, []
        for step in [step for step in JUDGED_STEPS if step <= run.steps]:
            pipe = DiffusionPipeline.from_pretrained(folder / f"checkpoint-{step}" / "pipeline")
            pipe.scheduler = FlowMatchSDEMultistepScheduler.from_config(pipe.scheduler.config)
            samples = draw(pipe, asked_for.tolist(), run.seed, num_inference_steps=SAMPLING_STEPS)
            curve.append({"step": step, **judge(samples, asked_for, num_classes)})
        splits = load_image_dataset(train_data_dir=str(MNIST))
        source, held_out, names = open_images(splits, 28, 1, validation_split="test")
        probing = probe_layers(pipe, source, held_out, len(names), None, PROBED_TIMES, "ridge", batch_size=500)
        found = {key: probing[key] for key in ("accuracy", "layers", "timesteps")}
        write_text(result, json.dumps({**vars(run), "curve": curve, "probing": found}, indent=1) + "\n")
    return json.loads(result.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="all", choices=["all", "choice", "methods", "labels"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results/regularizers"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    judge, runs = Judge(), list(list_runs(args.study, args.methods, args.seeds))
    for kind in {run.data for run in runs}:
        prepare_data(kind, args.output_dir)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = []
        for result in pool.map(lambda run: finish(run, judge, args.output_dir), runs):
            results.append(result)
            print(f"{len(results)} of {len(runs)}: {result['method']}, seed {result['seed']}: {result['curve'][-1]}")
            write_text(args.output_dir / "results.json", json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
