# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What measuring a model in half precision does to what is measured, on a model of the bundled digits or of MNIST.

    python benchmarks/precision.py --pretrained_model_name_or_path lsep-digits

The Fréchet distance on pixels between samples and the training images (the same classes and the same noise in every
precision), and the accuracies of `diffusers-lsep probe --method ridge`. What a precision changes is compared with what
another seed changes, where there are several.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits_runs import DIGITS, draw, pixel_distance, read_digits

from diffusers_lsep import LSEPPipeline
from diffusers_lsep.data.images import load_image_dataset, open_images
from diffusers_lsep.evaluation.linear_probing import probe_layers
from diffusers_lsep.sampling import DTYPES, load_pipeline


def measure(pipe: LSEPPipeline, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Samples, their distances by seed, and the table of accuracies by seed, of a pipeline as it is."""
    config = pipe.transformer.config
    real = read_digits(data)["train"][0]
    labels = [index % config.num_classes for index in range(args.num_images)]
    samples = [draw(pipe, labels, seed, num_inference_steps=args.steps) for seed in range(args.seeds)]
    size = (config.sample_size, config.in_channels)
    source, held_out, names = open_images(load_image_dataset(train_data_dir=str(data)), *size, validation_split="test")
    tables = []
    for seed in range(args.seeds):
        found = probe_layers(pipe, source, held_out, len(names), method="ridge", seed=seed)
        tables.append(np.array(found["accuracy"]))
    return {"samples": samples, "distances": [pixel_distance(each, real) for each in samples], "tables": tables}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--data", type=Path, default=DIGITS, help="What it was trained on, with a split `test`.")
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds has to be at least 1, but is {args.seeds}")
    torch.set_num_threads(1)
    exact: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        found = measure(load_pipeline(args.pretrained_model_name_or_path, "cpu", dtype), args.data, args)
        exact = exact or found
        changes = [100 * (a - b) for a, b in zip(found["tables"], exact["tables"])]
        row = {
            "distances": [round(value, 4) for value in found["distances"]],
            "mean change of a pixel": np.mean([np.abs(a - b) for a, b in zip(found["samples"], exact["samples"])]),
            "mean accuracies": [round(100 * table.mean(), 2) for table in found["tables"]],
            "points of accuracy: mean change": np.mean(changes),
            "root mean square": np.sqrt(np.mean(np.square(changes))),
            "largest": np.abs(changes).max(),
        }
        if args.seeds > 1:
            between = exact["tables"][0] - exact["tables"][1]
            row["between seeds, root mean square"] = 100 * np.sqrt(np.mean(np.square(between)))
        rounded = {key: value if isinstance(value, list) else round(float(value), 5) for key, value in row.items()}
        print(json.dumps({"dtype": name, **rounded}), flush=True)


if __name__ == "__main__":
    main()
