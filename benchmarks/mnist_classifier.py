# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The classifier of 28x28 digits whose features the distances of `regularizers.py` are computed in.

    python benchmarks/mnist_classifier.py    # trains it anew, about ten minutes of one core, and prints its accuracy

It was trained once, on the training part of `examples/mnist`, and is stored beside this file.
"""

from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file


MNIST = Path(__file__).resolve().parents[1] / "examples" / "mnist"
WEIGHTS = Path(__file__).with_suffix(".safetensors")
NUM_FEATURES = 64


class Classifier(nn.Module):
    """Four convolutions and two linear layers; the activations between the two are the features."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential()
        for in_channels, out_channels in ((1, 24), (24, 24), (24, 48), (48, 48)):
            self.convolutions.append(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False))
            self.convolutions.append(nn.BatchNorm2d(out_channels))
            self.convolutions.append(nn.ReLU())
            if in_channels == out_channels:
                self.convolutions.append(nn.MaxPool2d(2))
        self.features = nn.Linear(48 * 7 * 7, NUM_FEATURES)
        self.output = nn.Linear(NUM_FEATURES, 10)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `[N, 64]` and logits `[N, 10]` of pixels `[N, 1, 28, 28]` in [0, 1]."""
        features = F.relu(self.features(self.convolutions(pixels).flatten(1)))
        return features, self.output(F.dropout(features, 0.3, self.training))


def read_mnist() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pixels `[N, 1, 28, 28]` in [0, 1] and labels `[N]` of both splits, `"train"` and `"test"`."""
    return {
        split: (
            torch.from_numpy(np.stack([np.asarray(image) for image in rows["image"]])).unsqueeze(1) / 255,
            torch.tensor(rows["label"]),
        )
        for split, rows in datasets.load_dataset(str(MNIST)).items()
    }


def load_classifier() -> Classifier:
    classifier = Classifier()
    classifier.load_state_dict(load_file(WEIGHTS))
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def classify(classifier: Classifier, pixels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Features `[N, 64]` and the classes `[N]` that are most likely."""
    parts = [classifier(batch) for batch in pixels.float().split(500)]
    return (
        torch.cat([features for features, _ in parts]).double().numpy(),
        torch.cat([logits.argmax(dim=1) for _, logits in parts]).numpy(),
    )


def distort(pixels: torch.Tensor) -> torch.Tensor:
    """Turns, scales, shears and moves each image a little."""
    count = len(pixels)
    angle, shear = (torch.empty(2, count).uniform_(-1, 1) * torch.tensor([[0.26], [0.2]])).unbind()
    scale, shift = torch.empty(2, count).uniform_(0.85, 1.15), torch.empty(2, count).uniform_(-0.15, 0.15)
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([cos * scale[0], (shear * cos - sin) * scale[1], shift[0]], dim=1)
    second = torch.stack([sin * scale[0], (shear * sin + cos) * scale[1], shift[1]], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


def train(num_epochs: int = 40, batch_size: int = 100) -> Classifier:
    torch.manual_seed(0)
    pixels, labels = read_mnist()["train"]
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    num_batches = len(pixels) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=num_epochs * num_batches)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(pixels)).split(batch_size):
            _, logits = classifier(distort(pixels[rows]))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def main():
    torch.set_num_threads(1)
    classifier = train()
    save_file(classifier.state_dict(), WEIGHTS)
    for split, (pixels, labels) in read_mnist().items():
        right = classify(classifier, pixels)[1] == labels.numpy()
        print(f"{split}: {right.mean():.2%} of {len(right)} right, {len(right) - right.sum()} wrong")


if __name__ == "__main__":
    main()
