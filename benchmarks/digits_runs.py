# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Training runs on the bundled digits, and how their samples are judged."""

import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import torch

from diffusers_lsep import LSEPPipeline
from diffusers_lsep.evaluation.metrics import feature_statistics, frechet_distance


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS = EXAMPLES / "digits"
BATCH_SIZE = 250  # of samples


def train(folder: Path, data: Path, *flags: object, recipe: str = "digits"):
    """Runs `train_lsep.py` with the settings of a file of `examples/configs`, on one thread."""
    command = [sys.executable, EXAMPLES / "train_lsep.py", f"@{EXAMPLES / 'configs' / recipe}"]
    command += ["--train_data_dir", data, "--output_dir", folder, "--report_to", "none", "--num_cpu_threads", 1]
    command += ["--validation_inference_steps", 2, "--num_validation_images", 1, *flags]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def read_digits(folder: Path = DIGITS) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pixels `[N, height * width]` in [0, 1] and labels `[N]` of both splits, `"train"` and `"test"`."""
    return {
        split: (
            np.stack([np.asarray(image, dtype=np.float64).ravel() / 255 for image in rows["image"]]),
            np.array(rows["label"]),
        )
        for split, rows in datasets.load_dataset(str(folder)).items()
    }


def draw(pipe: LSEPPipeline, labels: list[int | str], seed: int, **arguments: object) -> np.ndarray:
    """Pixels `[N, height * width]` in [0, 1] of samples, one for each label."""
    pipe.set_progress_bar_config(disable=True)
    generator, parts = torch.Generator().manual_seed(seed), []
    for start in range(0, len(labels), BATCH_SIZE):
        batch = labels[start : start + BATCH_SIZE]
        images = pipe(batch, generator=generator, output_type="np", **arguments).images
        parts.append(images.reshape(len(batch), -1).astype(np.float64))
    return np.concatenate(parts)


def pixel_distance(samples: np.ndarray, real: np.ndarray) -> float:
    """The Frechet distance between two sets of images on their pixels in [0, 1]."""
    return frechet_distance(*feature_statistics(samples), *feature_statistics(real))
