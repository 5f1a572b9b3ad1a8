# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What coupled dropout and a probe on a part of the batch do to the gradient: its mean stays, its variance grows.

    python benchmarks/gradient_variance.py    # after `python examples/train_lsep.py`, which writes lsep-digits

The same images, noise and times for all variants; the variance is the trace of the gradient's covariance over batches.
The probe's part is the gradient of its loss alone.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_lsep import LinearProbe, LSEPObjective
from diffusers_lsep.data.images import load_image_dataset, open_images
from diffusers_lsep.data.stream import SampleStream


DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
VARIANTS = {
    "independent dropout, all samples": {},
    "coupled dropout": {"coupled_dropout": True},
    "probe on 1/4 of the batch": {"probe_fraction": 0.25},
    "both": {"coupled_dropout": True, "probe_fraction": 0.25},
}


def gradients(objective: LSEPObjective, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The transformer's gradients `[2, P]`: of the loss, and of the probe's loss alone."""
    parameters = list(objective.transformer.parameters())
    latents = batch.pop("images")
    parts = []
    for scale in (1.0, 0.0):
        loss = objective(latents, **batch, probe_weight_scale=scale).loss
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        parts.append(
            torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found)])
        )
    whole, denoising = parts
    return torch.stack([whole, whole - denoising]).double()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("lsep-digits"), help="the folder of a run on the digits")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gradient_variance.json"))
    args = parser.parse_args()

    source, _, _ = open_images(load_image_dataset(train_data_dir=str(DIGITS)), 8, 1, validation_split="test")
    transformer = DiffusionPipeline.from_pretrained(args.run).transformer
    probe = LinearProbe.from_pretrained(args.run / "probe")
    results, reference = [], None
    for name, options in VARIANTS.items():
        fraction = options.get("probe_fraction", 1.0)
        objective = LSEPObjective(transformer, probe, probe_depth=3, probe_fraction=fraction)
        stream = SampleStream(source, (1, 8, 8), 0, args.batch_size, grid_size=4, crop_size_min=3, **options)
        total = squares = 0.0
        for step in range(args.batches):
            indices = range(step * args.batch_size, (step + 1) * args.batch_size)
            found = gradients(objective, stream.__getitems__(list(indices)))
            total, squares = total + found, squares + found.square().sum(dim=1)
        mean = total / args.batches
        variance = (squares - args.batches * mean.square().sum(dim=1)) / (args.batches - 1)
        reference = (mean, variance) if reference is None else reference
        # How far the means are apart, in standard errors of such a distance: about 1 where there is no bias.
        apart = (mean - reference[0])[1].norm() / ((variance + reference[1])[1] / args.batches).sqrt()
        row = {"variant": name, "total": (variance / reference[1])[0].item()}
        row |= {"probe": (variance / reference[1])[1].item(), "means_apart": apart.item()}
        row["probe_share"] = (variance[1] / variance[0]).item()
        results.append(row)
        print(
            f"{name:34} variance of the gradient x {row['total']:.3f}, of the probe's part x {row['probe']:.3f};"
            f" its mean is {row['means_apart']:.2f} standard errors away",
            flush=True,
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
