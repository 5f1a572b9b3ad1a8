# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""LSEP against plain SiT on the bundled digits: what the layers know, how good the samples are, what a step costs.

    python benchmarks/digits_ablation.py                    # all; can be killed and started again
    python benchmarks/digits_ablation.py --groups method    # the first table and the heat maps

Every run is 400 steps of `examples/train_lsep.py` with the settings of `examples/configs/digits` but for what its name
says; beyond the first group batches have 32 images in place of 128, which makes runs four times cheaper. The averaged
weights are judged: by linear probes of every layer at ten times (no label given, ridge regression on the training
digits, accuracy on the held-out ones), and by the Frechet distance on pixels of 1,000 samples without guidance (ten
steps of Heun's method) to the training digits.

Writes `results.json`, `tables.md`, `figures.json`, `probe-heatmaps.png` and `digits-sweeps.png` into `--output_dir`.
The figures are drawn from `figures.json` alone, so that they can be drawn again without the runs:

    python benchmarks/digits_ablation.py --redraw docs/images/digits.json --output_dir docs/images
"""

import argparse
import copy
import json
import os
import statistics
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from digits_runs import DIGITS, draw, pixel_distance, read_digits, train
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pairs import paired_ratio
from training_step import make_draws, separate_rows

from diffusers_lsep import FlowMatchHeunODEScheduler, LinearProbe, LSEPObjective
from diffusers_lsep.data.images import load_image_dataset, open_images
from diffusers_lsep.evaluation.linear_probing import probe_layers
from diffusers_lsep.figures import COLOURS, add_accuracy_scale, draw_accuracies, figure_style, save_figure


def constant_weight(value: float) -> list[object]:
    return ["--probe_weight_start", value, "--probe_weight_end", value, "--num_probe_weights", 1]


# Per group: what the variants are called, and the flags in which they differ from LSEP with the digits' settings.
LSEP, PLAIN = "LSEP", "plain SiT"
GROUPS: dict[str, dict[str, list[object]]] = {
    "method": {PLAIN: ["--no_lsep"], LSEP: []},
    "speed": {
        LSEP: [],
        "coupled dropout": ["--coupled_dropout"],
        "probe on 1/4 of the batch": ["--probe_fraction", 0.25],
        "both": ["--coupled_dropout", "--probe_fraction", 0.25],
    },
    "weight": {
        PLAIN: ["--no_lsep"],
        "weight 0.01": constant_weight(0.01),
        LSEP: [],
        "weight 0.1": constant_weight(0.1),
        "weight 0.3": constant_weight(0.3),
        "weight 1": constant_weight(1),
    },
    "depth": {
        "depth 1": ["--probe_depth", 1],
        "depth 2": ["--probe_depth", 2],
        LSEP: [],
        "depth 4": ["--probe_depth", 4],
        "depth 6": ["--probe_depth", 6],
    },
    "dropout": {
        "dropout 0": ["--probe_dropout_prob", 0],
        "dropout 0.5": ["--probe_dropout_prob", 0.5],
        LSEP: [],
        "dropout 1": ["--probe_dropout_prob", 1],
    },
    "crop": {
        "crop 1 to 4": ["--crop_size_min", 1],
        "crop 2 to 4": ["--crop_size_min", 2],
        LSEP: [],
        "no crop": ["--crop_size_min", 4],
    },
}
PROBE_DEPTH = 3
SWEEPS = {"weight", "depth", "dropout", "crop"}
# What the settings of the digits mean in the groups that vary them.
DEFAULTS = {
    "weight": "weight 0.0225 to 0.03",
    "depth": "depth 3",
    "dropout": "dropout 0.9",
    "crop": "crop 3 to 4",
    "speed": "LSEP as in the paper",
}


def judge(folder: Path, seed: int) -> dict:
    """Linear probes and Frechet distances of a run."""
    splits = load_image_dataset(train_data_dir=str(DIGITS))
    source, held_out, names = open_images(splits, 8, 1, validation_split="test")
    pipe = DiffusionPipeline.from_pretrained(folder)
    probing = probe_layers(pipe, source, held_out, len(names), method="ridge", batch_size=512)
    pipe.scheduler = FlowMatchHeunODEScheduler.from_config(pipe.scheduler.config)
    samples = draw(pipe, [i % 10 for i in range(1000)], seed, num_inference_steps=10)
    return {
        "accuracy": probing["accuracy"],
        "layers": probing["layers"],
        "timesteps": probing["timesteps"],
        "frechet_distance": pixel_distance(samples, read_digits()["train"][0]),
    }


def run_variant(name: str, flags: list[object], batch_size: int, steps: int, seed: int, folder: Path) -> dict:
    """Trains and judges, or reads what an earlier call found."""
    folder = folder / f"{name.replace(' ', '-').replace('/', '-')}-batch-{batch_size}-seed-{seed}"
    result = folder / "result.json"
    if not result.is_file():
        length = ["--max_train_steps", steps, "--checkpointing_steps", steps, "--validation_steps", steps]
        length += ["--train_batch_size", batch_size, "--seed", seed, "--resume_from_checkpoint", "latest"]
        train(folder, DIGITS, *flags, *length)
        found = {"variant": name, "seed": seed, "steps": steps, **judge(folder, seed)}
        partial = result.with_suffix(".partial")
        partial.write_text(json.dumps(found) + "\n")
        os.replace(partial, result)
    found = json.loads(result.read_text())
    if found["steps"] != steps:
        raise ValueError(
            f"{folder} holds a run of {found['steps']} steps, not of {steps}: choose another --output_dir"
        )
    return found


def compare_step_times(folder: Path, pairs: int = 15) -> dict[str, float]:
    """A step of LSEP over one of plain SiT at the shape of the digits, forward and backward, on one thread."""
    torch.set_num_threads(1)
    transformer = DiffusionPipeline.from_pretrained(folder).transformer.train()
    probe = LinearProbe(transformer.inner_dim, transformer.config.num_classes)
    lsep = LSEPObjective(transformer, probe, probe_depth=PROBE_DEPTH)
    plain = LSEPObjective(copy.deepcopy(transformer), None)
    draws = make_draws(128, num_shared=23, size=8, channels=1, grid=4, low=3)
    draws["separate_rows"] = separate_rows(draws)
    draws["class_labels"] %= 10

    def steps(objective):
        def run():
            for _ in range(5):
                objective.zero_grad()
                objective(**draws).loss.backward()

        return run

    return paired_ratio(steps(lsep), steps(plain), pairs)


MEASURES = ("accuracy, mean of layers and times", "best layer, t = 0.5", "Fréchet distance")


def measures(result: dict) -> dict[str, float]:
    """The numbers of a run that the tables have."""
    accuracy, times = np.array(result["accuracy"]), result["timesteps"]
    return dict(
        zip(MEASURES, (accuracy.mean(), accuracy[:, times.index(0.5)].max(), result["frechet_distance"]), strict=True)
    )


def make_table(group: str, results: dict[str, list[dict]]) -> str:
    """Markdown: means over the seeds and, where there is more than one, standard deviations."""
    names = list(measures(next(iter(results.values()))[0]))
    lines = [f"| {group} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for variant, runs in results.items():
        cells = []
        for name in names:
            values = [measures(run)[name] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        shown = DEFAULTS.get(group, variant) if variant == LSEP else variant
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_figures(results: dict[str, dict[str, list[dict]]]) -> dict:
    """What the figures show: means of the heat maps, means and standard deviations of the sweeps."""
    shown: dict = {"heatmaps": {}, "sweeps": {}}
    for name, runs in results.get("method", {}).items():
        table = np.mean([run["accuracy"] for run in runs], axis=0)
        shown["heatmaps"][name] = table.round(3).tolist()
        shown |= {key: runs[0][key] for key in ("layers", "timesteps")}
    for group in [group for group in results if group in SWEEPS]:
        shown["sweeps"][group] = {
            DEFAULTS[group] if variant == LSEP else variant: {
                name: [round(statistics.mean(values), 3), round(statistics.stdev(values), 3) if len(values) > 1 else 0]
                for name, values in {name: [measures(run)[name] for run in runs] for name in MEASURES}.items()
            }
            for variant, runs in results[group].items()
        }
    return shown


@figure_style()
def draw_heat_maps(shown: dict, path: Path):
    """The probes' accuracies of plain SiT and of LSEP side by side, means over the seeds."""
    figure = Figure(figsize=(9.6, 3.9))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (name, table) in zip(axes, shown["heatmaps"].items()):
        trained = PROBE_DEPTH if name == LSEP else None
        image = draw_accuracies(axis, table, shown["layers"], shown["timesteps"], trained)
        axis.set_title(name)
    axes[0].set_ylabel("read after this many blocks")
    add_accuracy_scale(figure, axes, image, chance=0.1, has_frame=True)
    save_figure(path, figure)


@figure_style()
def draw_sweeps(shown: dict, path: Path):
    """A row for each variant, grouped by what they vary, and a column for each measure; bars are deviations."""
    names = {
        "accuracy, mean of layers and times": "accuracy of linear probes,\nmean of layers and times (more is better)",
        "Fréchet distance": "Fréchet distance of the samples\n(less is better)",
    }
    figure = Figure(figsize=(8, 6))
    axes = figure.subplots(1, 2, sharey=True)
    y, ticks, lines = 0.0, [], []
    for group, colour in zip(shown["sweeps"], COLOURS):
        for variant, values in shown["sweeps"][group].items():
            is_default = variant == DEFAULTS[group]
            for axis, name in zip(axes, names):
                mean, deviation = values[name]
                style = {"markersize": 12, "marker": "*"} if is_default else {"marker": "o"}
                axis.errorbar(mean, y, xerr=deviation, color=colour, capsize=3, **style)
            ticks.append((y, variant))
            y -= 1
        lines.append(y + 0.25)
        y -= 0.5
    for axis, (name, title) in zip(axes, names.items()):
        axis.axvline(shown["sweeps"]["weight"][DEFAULTS["weight"]][name][0], color="0.3", linestyle="--", linewidth=1)
        axis.set(xlabel=title, ylim=(y + 0.5, 0.75))
        axis.grid(axis="y")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        for line in lines[:-1]:
            axis.axhline(line, color="0.8", linewidth=0.8)
    axes[0].set_yticks(*zip(*ticks))
    figure.suptitle("The digits after 400 steps; star and dashed line: the default; bars: deviation of 3 seeds")
    save_figure(path, figure)


def draw_figures(shown: dict, folder: Path):
    if shown["heatmaps"].keys() >= {PLAIN, LSEP}:
        draw_heat_maps(shown, folder / "probe-heatmaps.png")
    if shown["sweeps"].keys() >= SWEEPS:
        draw_sweeps(shown, folder / "digits-sweeps.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3, help="runs of every variant of `method` and `speed`")
    parser.add_argument("--sweep_seeds", type=int, default=3, help="runs of every variant of the other groups")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results/digits_ablation"))
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="train nothing: draw what this figures.json says")
    args = parser.parse_args()
    if args.redraw:
        draw_figures(json.loads(args.redraw.read_text(encoding="utf-8")), args.output_dir)
        return
    # Seed after seed, so that what is there at any time compares like with like.
    results: dict[str, dict[str, list[dict]]] = {
        group: {variant: [] for variant in GROUPS[group]} for group in args.groups
    }
    for group in args.groups:
        for seed in range(args.sweep_seeds if group in SWEEPS else args.seeds):
            for variant, flags in GROUPS[group].items():
                found = run_variant(
                    variant, flags, 128 if group == "method" else 32, args.steps, seed, args.output_dir / "runs"
                )
                results[group][variant].append(found)
                text = ", ".join(f"{name} {value:.3f}" for name, value in measures(found).items())
                print(f"{group}: {variant}, seed {seed}: {text}", flush=True)

    digits = read_digits()
    floor = pixel_distance(digits["test"][0], digits["train"][0])
    tables = [make_table(group, found) for group, found in results.items()]
    tables.append(f"Fréchet distance of the held-out digits to the training digits: {floor:.3f}.")
    times = None
    if "method" in results:
        times = compare_step_times(args.output_dir / "runs" / f"{LSEP}-batch-128-seed-0")
        tables.append(
            f"A step: {times['ours_seconds'] / 5:.3f} s with LSEP, {times['baseline_seconds'] / 5:.3f} s without,"
            f" median ratio {times['ratio']:.2f} of {times['pairs']} pairs, one thread."
        )
    shown = describe_figures(results)
    (args.output_dir / "figures.json").write_text(json.dumps(shown, indent=1, ensure_ascii=False) + "\n", "utf-8")
    draw_figures(shown, args.output_dir)
    text = "\n\n".join(tables)
    print(f"\n{text}")
    (args.output_dir / "tables.md").write_text(text + "\n", encoding="utf-8")
    everything = {"floor": floor, "step_times": times, "results": results}
    (args.output_dir / "results.json").write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
