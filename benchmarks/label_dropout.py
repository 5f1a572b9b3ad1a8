# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Why a probe that sees labels makes better samples in a short training: which weights have to learn from it?

    python benchmarks/label_dropout.py    # half an hour of one core; can be killed and started again

Runs of 400 steps on the bundled digits as in `digits_ablation.py` (batches of 32), with the same images, noise, times
and initial weights for all. The probe's gradient is computed apart from the other, and reaches only the weights that a
variant names: all of them, the table of labels alone, all but the table, or the table and the layers that bring the
condition into the blocks. Plain SiT with a higher learning rate for its table, and with no dropout of labels, are the
other ways to learn labels faster. The averaged weights are judged by the Frechet distance on pixels of 1,000 samples
without guidance to the training digits, and by the share of them whose 5 nearest digits are mostly of the class that
was asked for. Writes `results.json` and `table.md` into `--output_dir`.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from digits_runs import DIGITS, draw, pixel_distance, read_digits

from diffusers_lsep import FlowMatchHeunODEScheduler, LinearProbe, LSEPObjective, LSEPPipeline, SiTTransformer2DModel
from diffusers_lsep.data.images import load_image_dataset, open_images
from diffusers_lsep.data.stream import SampleStream
from diffusers_lsep.files import write_text


STEPS, BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 400, 32, 1e-3, 20


def is_table(name: str) -> bool:
    return name.startswith("class_embedding")


def is_condition(name: str) -> bool:
    """The table of labels, the embedding of the time, and the layers that make shifts, scales and gates of both."""
    return is_table(name) or name.startswith("time_embedding") or ".norm1.linear" in name


@dataclass
class Variant:
    probe_dropout_prob: float | None  # None: no probe
    learns: Callable[[str], bool] = lambda name: True  # which weights the probe's loss reaches
    class_dropout_prob: float = 0.1
    table_rate: float = 1.0  # factor of the learning rate of the table of labels


VARIANTS = {
    "plain SiT": Variant(None),
    "probe, dropout 0.9 (the paper's)": Variant(0.9),
    "probe, dropout 0": Variant(0.0),
    "dropout 0, all but the label table learn from it": Variant(0.0, lambda name: not is_table(name)),
    "dropout 0, only the label table learns from it": Variant(0.0, is_table),
    "dropout 0, table and conditioning layers learn from it": Variant(0.0, is_condition),
    "dropout 0, all but table and conditioning layers": Variant(0.0, lambda name: not is_condition(name)),
    "plain SiT, the table's learning rate x 10": Variant(None, table_rate=10.0),
    "plain SiT, no dropout of labels": Variant(None, class_dropout_prob=0.0),
    "dropout 0.9, the table's learning rate x 10": Variant(0.9, table_rate=10.0),
}


def train_variant(variant: Variant, seed: int, steps: int) -> SiTTransformer2DModel:
    torch.manual_seed(seed)
    shape = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32, "num_classes": 10}
    transformer = SiTTransformer2DModel(sample_size=8, patch_size=2, in_channels=1, **shape)
    probe = None if variant.probe_dropout_prob is None else LinearProbe(transformer.inner_dim, 10)
    objective = LSEPObjective(transformer, probe, probe_depth=3)
    source, _, _ = open_images(load_image_dataset(train_data_dir=str(DIGITS)), 8, 1, validation_split="test")
    dropout = {"class_dropout_prob": variant.class_dropout_prob, "probe_dropout_prob": variant.probe_dropout_prob or 0}
    stream = SampleStream(source, (1, 8, 8), seed, BATCH_SIZE, grid_size=4, crop_size_min=3, **dropout)

    named = dict(transformer.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if not is_table(name)]},
        {"params": [p for name, p in named.items() if is_table(name)], "factor": variant.table_rate},
        {"params": [] if probe is None else list(probe.parameters())},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=LEARNING_RATE, weight_decay=0)
    average = EMAModel(transformer.parameters(), decay=0.99)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / WARMUP_STEPS, 1) * group.get("factor", 1)
        batch = stream.__getitems__(list(range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)))
        latents = batch.pop("images")
        if probe is None:
            for name in ("probe_dropout_mask", "crop_window", "separate_rows"):
                batch.pop(name, None)
        optimizer.zero_grad()
        objective(latents, **batch).loss.backward()
        if probe is not None:
            held_back = [p for name, p in named.items() if not variant.learns(name)]
            if held_back:
                denoising = objective(latents, **batch, probe_weight_scale=0.0).loss
                for p, grad in zip(held_back, torch.autograd.grad(denoising, held_back, allow_unused=True)):
                    p.grad = grad
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        average.step(transformer.parameters())
    average.copy_to(transformer.parameters())
    return transformer.eval()


def judge(transformer: SiTTransformer2DModel, seed: int, digits: dict) -> dict[str, float]:
    pipe = LSEPPipeline(transformer, FlowMatchHeunODEScheduler())
    asked_for = np.arange(1000) % 10
    samples = draw(pipe, asked_for.tolist(), seed, num_inference_steps=10)
    pixels, labels = digits["train"]
    nearest = np.argpartition(((samples[:, None] - pixels[None]) ** 2).sum(-1), 5, axis=1)[:, :5]
    classes = np.array([np.bincount(votes, minlength=10).argmax() for votes in labels[nearest]])
    return {
        "frechet_distance": pixel_distance(samples, pixels),
        "as_asked_for": float((classes == asked_for).mean()),
    }


def make_table(results: dict[str, list[dict]]) -> str:
    lines = ["| | Fréchet distance | drawn as asked for |", "|---|---|---|"]
    for name, runs in results.items():
        cells = []
        for key in ("frechet_distance", "as_asked_for"):
            values = [run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results/label_dropout"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path, digits = args.output_dir / "results.json", read_digits()
    results: dict[str, list[dict]] = json.loads(path.read_text()) if path.is_file() else {}
    for seed in range(args.seeds):
        for name, variant in VARIANTS.items():
            runs = results.setdefault(name, [])
            if any((run["seed"], run["steps"]) == (seed, args.steps) for run in runs):
                continue
            found = judge(train_variant(variant, seed, args.steps), seed, digits)
            runs.append({"seed": seed, "steps": args.steps, **found})
            print(f"{name}, seed {seed}: {found}", flush=True)
            write_text(path, json.dumps(results, indent=1) + "\n")
    of_length = {name: [run for run in runs if run["steps"] == args.steps] for name, runs in results.items()}
    write_text(args.output_dir / "table.md", make_table(of_length))


if __name__ == "__main__":
    main()
