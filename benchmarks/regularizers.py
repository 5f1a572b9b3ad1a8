# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Encoder-free training side by side on 28x28 digits: the same seeds, order, noise and initial weights for all.

    python benchmarks/regularizers.py                                  # all; can be killed and started again
    python benchmarks/regularizers.py --study choice --jobs 2          # only what chooses LSEP's settings
    python benchmarks/regularizers.py --study methods --methods SiT LSEP --seeds 0     # one pair of runs

Every run is `examples/train_lsep.py @examples/configs/mnist` but for what its name says, on one thread. The averaged
weights are judged after 1,000, 1,500, 2,000 and 3,000 steps, in the other studies at the end: the Frechet distance of
1,000 samples without guidance (32 steps of `FlowMatchSDEMultistepScheduler`) to the 8,000 training images, in the
features of the classifier of `mnist_classifier.py` and on pixels, precision and recall in these features, and the
share of samples that the classifier takes for the class that was asked for; after 1,500 and 3,000 steps linear probes
of every block too.

`choice` tries LSEP's settings on a seed that nothing else uses. `methods` is the comparison, of 1,500 steps: chosen
when plain SiT and LSEP had been run to 3,000, as where these differ most. Those two have two more seeds, of 1,500
steps. `labels` takes a fifth of wrong labels and two coarse classes; `lengths` judges averages of the weights of other
lengths (post-hoc EMA), of one run of plain SiT and one of LSEP; `cost` takes the seconds of a step over plain SiT's,
from short runs in turns.
LSEP's depth is that of the digits, 3 of 6 blocks; the depths and widths of the others are those of the papers in
proportion. Self-Transcendence has a run before it, its teacher, whose 1,000 steps count as its time. The runs lie in
`--output_dir`. What was found of each is a file in `--results_dir`, and a run that has its file is not trained again:
with `--results_dir benchmarks/regularizers` the command goes on with the results that the repository has. Beside them:
the tables of `docs/methods.md`, `curves.png`, `accuracy.png`, `samples.png`, `lengths.png`.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
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
from diffusers_lsep.figures import COLOURS, MARKERS, figure_style, save_figure
from diffusers_lsep.files import whole_folder, write_text
from diffusers_lsep.training.log import read_metrics
from diffusers_lsep.training.post_hoc_ema import reconstruct_average


STEPS, SHORT_STEPS = 3000, 1500
JUDGED_STEPS, PROBED_STEPS = (1000, 1500, 2000, 3000), (1500, 3000)
NUM_SAMPLES = 1000
SAMPLING_STEPS = 32
PROBED_TIMES = (0.1, 0.3, 0.5, 0.7)

# The flags in which the methods differ from LSEP with the settings of `examples/configs/mnist`.
METHODS: dict[str, list[object]] = {
    "SiT": ["--no_lsep"],
    "LSEP": [],
    "dispersive": ["--no_lsep", "--regularizers", "dispersive"],
    "layersync": ["--no_lsep", "--regularizers", "layersync"],
    "sra": ["--no_lsep", "--regularizers", "sra"],
    "self-transcendence": [
        *("--no_lsep", "--regularizers", "self-transcendence", "--self_transcendence_projector_dim", 256)
    ],
    "internal-guidance": ["--no_lsep", "--regularizers", "internal-guidance"],
    "LSEP and internal-guidance": ["--regularizers", "internal-guidance"],
    "LSEP, depth 4": ["--probe_depth", 4],  # the best of `CHOICES`
    "LSEP, labels hidden": ["--probe_dropout_prob", 1],  # the probe's stream never sees the label
    "dispersive, JAX": [
        *("--no_lsep", "--regularizers", "dispersive", "--dispersive_depth", 2),
        *("--dispersive_weight", 0.5, "--dispersive_temperature", 0.5),
    ],
}
TEACHER, TEACHER_STEPS = "self-transcendence, first stage", 1000
INTERNAL_GUIDANCE_SCALE = 1.4  # at which models with the head are judged once more
COST_PAIRS, COST_STEPS = 5, 60
# Lengths of averages, in parts of the run: those that are kept while training, and those that are judged.
STORED_LENGTHS, LENGTHS, LENGTH_SEEDS = (0.05, 0.1), (0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25), (0,)
# What was tried to choose LSEP's settings.
CHOICES: dict[str, list[object]] = {
    "LSEP": [],
    "LSEP, weight 0.1": ["--probe_weight_start", 0.1, "--probe_weight_end", 0.1, "--num_probe_weights", 1],
    "LSEP, depth 2": ["--probe_depth", 2],
    "LSEP, depth 4": ["--probe_depth", 4],
    "LSEP, dropout 0.5": ["--probe_dropout_prob", 0.5],
    "LSEP, dropout 0": ["--probe_dropout_prob", 0],
}
PAIR = ("SiT", "LSEP")  # the two that have more seeds, and more steps with the seeds of all
SEEDS, PAIR_SEEDS, CHOICE_SEEDS = (0, 1, 2), (0, 1, 2, 3, 4), (100,)
WRONG, COARSE = "wrong labels", "coarse labels"
METHOD_COLOURS = (*COLOURS, "0.55", "tab:olive", "tab:cyan", "tab:brown")
# 97.5 % quantiles of Student's distribution by its degrees of freedom.
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
# The numbers of a judged step.
MEASURES: dict[str, Callable[[dict], float]] = {
    "distance": lambda point: point["frechet_distance"],
    "distance of pixels": lambda point: point["pixel_frechet_distance"],
    "precision": lambda point: point["precision"],
    "recall": lambda point: point["recall"],
    "drawn as asked for": lambda point: point["as_asked_for"],
    "probes": lambda point: float(np.mean(point["probing"]["accuracy"])),
}
SHARES = ("precision", "recall", "drawn as asked for", "probes")
# The columns of the tables: the main ones, and those beside them.
COLUMNS = [("distance", 1000), *((name, SHORT_STEPS) for name in ("distance", "drawn as asked for", "probes"))]
MORE_COLUMNS = [
    *(("distance of pixels", step) for step in (1000, SHORT_STEPS)),
    *((name, SHORT_STEPS) for name in ("precision", "recall")),
]
TITLES = {
    "SiT": "plain SiT",
    "dispersive": "Dispersive Loss",
    "layersync": "LayerSync",
    "sra": "SRA",
    "self-transcendence": "Self-Transcendence (and 1,000 steps for its teacher)",
    "internal-guidance": "Internal Guidance",
    "LSEP and internal-guidance": "LSEP and Internal Guidance",
    "LSEP, depth 4": "LSEP that reads after 4 blocks",
    "LSEP, labels hidden": "LSEP whose probe never sees a label",
    "dispersive, JAX": "Dispersive Loss, settings of the JAX code",
    TEACHER: "Self-Transcendence's teacher",
}


@dataclass
class Run:
    method: str
    seed: int
    study: str
    data: str = "labels"
    steps: int = STEPS
    flags: list[object] = field(default_factory=list)

    @property
    def name(self) -> str:
        parts = (self.method, self.data, self.steps, "steps", "seed", self.seed)
        return "-".join(str(part).replace(", ", "-").replace(" ", "-") for part in parts)


def list_runs(study: str, methods: list[str], seeds: list[int] | None) -> Iterator[Run]:
    if study in ("all", "choice"):
        for seed in CHOICE_SEEDS if seeds is None else seeds:
            for name, flags in CHOICES.items():
                yield Run(name, seed, "choice", steps=SHORT_STEPS, flags=flags)
    if study in ("all", "methods"):
        for seed in PAIR_SEEDS if seeds is None else seeds:
            for name in methods:
                if name in PAIR or seeds is not None or seed in SEEDS:
                    steps = STEPS if name in PAIR and seed in SEEDS else SHORT_STEPS
                    yield Run(name, seed, "methods", steps=steps, flags=METHODS[name])
    if study in ("all", "labels"):
        for data in (WRONG, COARSE):
            for seed in SEEDS if seeds is None else seeds:
                for name in PAIR:
                    yield Run(name, seed, "labels", data, SHORT_STEPS, METHODS[name])


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


def train_run(folder: Path, data: Path, flags: list[object], steps: int, seed: int):
    length = ["--max_train_steps", steps, "--checkpointing_steps", 500, "--validation_steps", steps]
    train(folder, data, *flags, *length, "--seed", seed, "--resume_from_checkpoint", "latest", recipe="mnist")


def measure_costs(methods: list[str], output_dir: Path, results_dir: Path) -> dict[str, dict[str, float]]:
    """Seconds of a step over those of plain SiT, of runs that take turns: median and quartiles of their pairs."""
    path = results_dir / "costs.json"
    costs = json.loads(path.read_text()) if path.is_file() else {}
    stages = [TEACHER] if "self-transcendence" in methods else []
    for method in [*stages, *methods]:
        if method == "SiT" or method in costs:
            continue
        flags = list(METHODS.get(method, METHODS["self-transcendence"]))
        if method == "self-transcendence":
            teacher = output_dir / Run(TEACHER, 0, "cost", steps=TEACHER_STEPS).name
            train_run(teacher, MNIST, flags, TEACHER_STEPS, 0)
            flags += ["--self_transcendence_teacher", teacher / f"checkpoint-{TEACHER_STEPS}"]

        def seconds(flags: list[object]) -> float:
            with tempfile.TemporaryDirectory() as folder:
                length = ["--max_train_steps", COST_STEPS, "--logging_steps", 5, "--overwrite_output_dir"]
                train(Path(folder, "run"), MNIST, *flags, *length, recipe="mnist")
                lines = read_metrics(Path(folder, "run", "metrics.jsonl"))
            return statistics.median(line["seconds_per_step"] for line in lines[2:] if "seconds_per_step" in line)

        pairs = [(seconds(flags), seconds(METHODS["SiT"])) for _ in range(COST_PAIRS)]
        low, median, high = statistics.quantiles([ours / plain for ours, plain in pairs], n=4)
        plain = statistics.median(plain for _, plain in pairs)
        costs[method] = {"ratio": median, "ratio_25": low, "ratio_75": high, "seconds_of_sit": plain}
        write_text(path, json.dumps(costs, indent=1) + "\n")
    return costs


def judge_lengths(run: Run, judge: Judge, output_dir: Path, results_dir: Path) -> dict:
    """Trains a run and judges averages of its weights, the ordinary one first, or reads what an earlier call found."""
    result = results_dir / f"{run.name}-lengths.json"
    if not result.is_file():
        folder, asked_for, points = output_dir / f"{run.name}-lengths", np.arange(NUM_SAMPLES) % 10, []
        train_run(folder, MNIST, [*run.flags, "--post_hoc_ema_sigmas", *STORED_LENGTHS], run.steps, run.seed)
        pipe = load_for_sampling(folder / f"checkpoint-{run.steps}" / "pipeline")
        for sigma_rel in (None, *LENGTHS):
            facts = {"sigma_rel": sigma_rel}
            if sigma_rel is not None:
                weights, facts = reconstruct_average(folder, sigma_rel)
                prefix = "transformer."
                of_pipe = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
                pipe.transformer.load_state_dict(of_pipe)
            samples = draw(pipe, asked_for.tolist(), run.seed, num_inference_steps=SAMPLING_STEPS)
            points.append({**facts, **judge(samples, asked_for, 10)})
        write_text(result, json.dumps({**vars(run), "lengths": points}, indent=1) + "\n")
    return json.loads(result.read_text())


@figure_style()
def draw_lengths(results: list[dict], path: Path):
    """The distance against the length of the average; the ordinary one as a line across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    for index, result in enumerate(results):
        ordinary, *points = result["lengths"]
        values = [[point[name] for point in points] for name in ("sigma_rel", "frechet_distance")]
        colour, label = METHOD_COLOURS[index % len(METHOD_COLOURS)], f"{result['method']}, seed {result['seed']}"
        axis.plot(*values, label=label, color=colour, marker=MARKERS[index % len(MARKERS)])
        axis.axhline(ordinary["frechet_distance"], color=colour, linestyle=":", linewidth=1)
    axis.set(
        xlabel="length of the average, sigma_rel (dotted: the ordinary average)",
        ylabel="Fréchet distance to the training images",
        xscale="log",
        yscale="log",
    )
    axis.legend()
    save_figure(path, figure)


def make_length_table(results: list[dict]) -> str:
    """Markdown: the distance by the length of the average."""
    lengths = [point["sigma_rel"] for point in results[0]["lengths"]]
    lines = [f"| length of the average | {' | '.join('ordinary' if s is None else f'{s:g}' for s in lengths)} |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for result in results:
        cells = [f"{point['frechet_distance']:.3g}" for point in result["lengths"]]
        lines.append(f"| {result['method']}, seed {result['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def point_at(result: dict, step: int) -> dict | None:
    """What was found of a run after so many steps."""
    return next((point for point in result["curve"] if point["step"] == step), None)


def values_at(results: list[dict], method: str, measure: str, step: int) -> dict[int, float]:
    """A measure of the runs of a method that have it after so many steps, by their seeds."""
    points = {r["seed"]: point_at(r, step) for r in results if r["method"] == method}
    return {
        seed: MEASURES[measure](point)
        for seed, point in points.items()
        if point is not None and (measure != "probes" or "probing" in point)
    }


def paired_differences(ours: dict[int, float], plain: dict[int, float]) -> tuple[float, float, int]:
    """Mean over the common seeds of our values less the others, half its 95 % interval (Student's), their number."""
    differences = [ours[seed] - plain[seed] for seed in ours if seed in plain]
    count = len(differences)
    if count < 2:
        return (statistics.mean(differences) if differences else math.nan), math.nan, count
    spread = statistics.stdev(differences) / math.sqrt(count)
    return statistics.mean(differences), STUDENT[count - 1] * spread, count


def format_value(measure: str, value: float) -> str:
    return f"{value:.0%}".replace("%", " %") if measure in SHARES else f"{value:.{0 if value >= 20 else 1}f}"


def format_difference(measure: str, ours: dict[int, float], plain: dict[int, float]) -> str:
    """The paired difference with its interval, bold if 0 is outside; nothing of less than two pairs."""
    mean, half, count = paired_differences(ours, plain)
    if count < 2:
        return ""
    if measure in SHARES:
        mean, half = 100 * mean, 100 * half
    digits = 0 if measure in SHARES or half >= 10 else 1
    text = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    return f"**{text}**" if abs(mean) > half else text


def make_table(results: list[dict], columns: list[tuple[str, int]], baseline: str = "SiT") -> str:
    """
    Markdown: of each method the means of measures after so many steps, and the paired differences from one, where
    there are pairs.
    """
    methods = dict.fromkeys(result["method"] for result in results)
    counts = [str(sum(result["method"] == method for result in results)) for method in methods]
    table = [("", [TITLES.get(method, method) for method in methods]), ("seeds", counts)]
    for measure, step in columns:
        values = {method: values_at(results, method, measure, step) for method in methods}
        means = [format_value(measure, statistics.mean(of.values())) if of else "" for of in values.values()]
        others = {method: {} if method == baseline else of for method, of in values.items()}
        differences = [format_difference(measure, of, values.get(baseline, {})) for of in others.values()]
        table.append((f"{measure} at {step:,}", means))
        if any(differences):
            table.append((f"less {baseline}'s", differences))
    rows = [[title for title, _ in table], *zip(*(cells for _, cells in table))]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(table) + "|", *lines[1:]])


def values_between(results: list[dict], method: str, measure: str, step: float) -> dict[int, float]:
    """As [`values_at`], between the judged steps too: on a straight line, of the logarithm where it is a distance."""
    steps = [point["step"] for point in results[0]["curve"]]
    curves = [values_at(results, method, measure, judged) for judged in steps]
    if not steps[0] <= step <= steps[-1]:
        return {}
    there, back = (lambda x: x, lambda x: x) if measure in SHARES else (np.log, np.exp)
    return {seed: float(back(np.interp(step, steps, there([curve[seed] for curve in curves])))) for seed in curves[0]}


def make_pair_table(results: list[dict], cost: float | None = None) -> str:
    """
    Markdown: plain SiT, LSEP and their paired differences at every step that was judged; with the cost of a step of
    LSEP over one of plain SiT also the differences after as much work.
    """
    steps = [point["step"] for point in results[0]["curve"]]
    lines = [f"| steps | {' | '.join(f'{step:,}' for step in steps)} |", "|---" * (1 + len(steps)) + "|"]
    for measure in ("distance", "drawn as asked for"):
        plain, ours = ([values_at(results, name, measure, step) for step in steps] for name in PAIR)
        for title, values in ((f"{measure}: SiT", plain), ("LSEP", ours)):
            means = [format_value(measure, statistics.mean(of_step.values())) for of_step in values]
            lines.append(f"| {title} | {' | '.join(means)} |")
        differences = [format_difference(measure, *both) for both in zip(ours, plain)]
        lines.append(f"| difference after as many steps | {' | '.join(differences)} |")
        if cost is not None:
            as_long = [values_between(results, PAIR[0], measure, step * cost) for step in steps]
            differences = [format_difference(measure, *both) for both in zip(ours, as_long)]
            lines.append(f"| difference after as much work | {' | '.join(differences)} |")
    return "\n".join(lines)


def make_cost_table(costs: dict[str, dict[str, float]]) -> str:
    """Markdown: what a step of each method costs over one of plain SiT."""
    lines = ["|  | a step | quartiles |", "|---|---|---|"]
    for method, cost in costs.items():
        title = TITLES.get(method, method).partition(" (")[0]
        lines.append(f"| {title} | {cost['ratio']:.2f} | {cost['ratio_25']:.2f} to {cost['ratio_75']:.2f} |")
    return "\n".join(lines)


@figure_style()
def draw_curves(results: list[dict], costs: dict[str, dict[str, float]], path: Path):
    """The distance against steps and, where the costs are known, against work."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9 if costs else 6, 5))
    axes = np.atleast_1d(figure.subplots(1, 2 if costs else 1, sharey=True))
    for index, method in enumerate(dict.fromkeys(result["method"] for result in results)):
        curve = {step: list(values_at(results, method, "distance", step).values()) for step in JUDGED_STEPS}
        curve = {step: values for step, values in curve.items() if values}
        steps, mean = np.array(list(curve)), [statistics.mean(values) for values in curve.values()]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in curve.values()]
        style = {
            "label": TITLES.get(method, method).partition(" (")[0],
            "color": METHOD_COLOURS[index],
            "marker": MARKERS[index],
        }
        axes[0].errorbar(steps, mean, yerr=spread, capsize=2, **style)
        if costs:
            ratio = 1.0 if method == "SiT" else costs.get(method, {}).get("ratio", math.nan)
            before = TEACHER_STEPS * costs.get(TEACHER, {}).get("ratio", math.nan)
            cost = steps * ratio + (before if method == "self-transcendence" else 0)
            axes[1].errorbar(cost, mean, yerr=spread, capsize=2, **style)
            axes[1].set(xlabel="work, in steps of plain SiT")
    axes[0].set(xlabel="steps of 64 images", ylabel="Fréchet distance to the training images", yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4 if costs else 3)
    save_figure(path, figure)


@figure_style()
def draw_accuracy(results: list[dict], path: Path):
    """What linear probes know of the layers against the distance, a point for each run, after `SHORT_STEPS`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5))
    axis = figure.subplots()
    for index, method in enumerate(dict.fromkeys(result["method"] for result in results)):
        names = ("distance", "probes")
        distances, accuracies = (values_at(results, method, name, SHORT_STEPS) for name in names)
        points = [[distances[seed] for seed in accuracies], list(accuracies.values())]
        axis.scatter(*points, label=method, color=METHOD_COLOURS[index], marker=MARKERS[index])
    axis.set(
        xlabel="Fréchet distance to the training images", ylabel="accuracy of linear probes, mean of blocks and times"
    )
    axis.legend()
    save_figure(path, figure)


@figure_style()
def draw_samples(runs: list[Run], output_dir: Path, path: Path):
    """Two digits of every class by each method, of the same noise, from the runs that are still there."""
    from matplotlib.figure import Figure

    folders = {run.method: output_dir / run.name / f"checkpoint-{SHORT_STEPS}" / "pipeline" for run in runs}
    folders = {method: folder for method, folder in folders.items() if folder.is_dir()}
    if not folders:  # all results are from elsewhere
        return
    figure = Figure(figsize=(8, 0.85 * len(folders) + 0.1))
    axes = np.atleast_1d(figure.subplots(len(folders), 1))
    for axis, (method, folder) in zip(axes, folders.items()):
        pipe = load_for_sampling(folder)
        samples = draw(pipe, [i // 2 for i in range(20)], 0, num_inference_steps=SAMPLING_STEPS)
        row = np.concatenate(list(1 - samples.reshape(20, 28, 28)), axis=1)
        axis.imshow(row, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_ylabel(method, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[], frame_on=False)
    save_figure(path, figure)


def load_for_sampling(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = FlowMatchSDEMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def probe(pipe: DiffusionPipeline) -> dict:
    """How well linear probes on all blocks tell the digits apart: `accuracy[layer][time]` on the held-out images."""
    splits = load_image_dataset(train_data_dir=str(MNIST))
    source, held_out, names = open_images(splits, 28, 1, validation_split="test")
    probing = probe_layers(pipe, source, held_out, len(names), None, PROBED_TIMES, "ridge", batch_size=500)
    return {key: probing[key] for key in ("accuracy", "layers", "timesteps")}


def finish(run: Run, judge: Judge, output_dir: Path, results_dir: Path) -> dict:
    """Trains and judges, or reads what an earlier call found."""
    result = results_dir / f"{run.name}.json"
    if not result.is_file():
        folder, data = output_dir / run.name, prepare_data(run.data, output_dir)
        flags = list(run.flags)
        if run.method == "self-transcendence":
            teacher = output_dir / Run(TEACHER, run.seed, run.study, run.data, TEACHER_STEPS).name
            train_run(teacher, data, flags, TEACHER_STEPS, run.seed)
            flags += ["--self_transcendence_teacher", teacher / f"checkpoint-{TEACHER_STEPS}"]
        train_run(folder, data, flags, run.steps, run.seed)
        num_classes = 2 if run.data == COARSE else 10
        asked_for, curve = np.arange(NUM_SAMPLES) % num_classes, []
        judged = JUDGED_STEPS if run.study == "methods" else (run.steps,)
        for step in [step for step in judged if step <= run.steps]:
            pipe = load_for_sampling(folder / f"checkpoint-{step}" / "pipeline")
            samples = draw(pipe, asked_for.tolist(), run.seed, num_inference_steps=SAMPLING_STEPS)
            curve.append({"step": step, **judge(samples, asked_for, num_classes)})
            if step in PROBED_STEPS:
                curve[-1]["probing"] = probe(pipe)
        guided = None
        if pipe.transformer.config.internal_guidance_depth is not None:
            call = {"num_inference_steps": SAMPLING_STEPS, "internal_guidance_scale": INTERNAL_GUIDANCE_SCALE}
            samples = draw(pipe, asked_for.tolist(), run.seed, **call)
            guided = judge(samples, asked_for, num_classes)
        found = {**vars(run), "curve": curve, "guided": guided}
        write_text(result, json.dumps(found, indent=1) + "\n")
    return json.loads(result.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="all", choices=["all", "choice", "methods", "labels", "lengths", "cost"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results/regularizers"))
    parser.add_argument("--results_dir", type=Path, help="default: OUTPUT_DIR/results")
    args = parser.parse_args()
    if args.seeds is not None and len(args.seeds) > len(STUDENT) + 1:
        parser.error(f"--seeds: at most {len(STUDENT) + 1}, for want of further quantiles")
    results_dir = args.results_dir or args.output_dir / "results"

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    for folder in (args.output_dir, results_dir):
        folder.mkdir(parents=True, exist_ok=True)
    costs = measure_costs(args.methods if args.study in ("all", "cost") else [], args.output_dir, results_dir)
    judge, runs = Judge(), list(list_runs(args.study, args.methods, args.seeds))
    for kind in {run.data for run in runs}:
        prepare_data(kind, args.output_dir)
    results: list[dict] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for run, result in zip(runs, pool.map(lambda run: finish(run, judge, args.output_dir, results_dir), runs)):
            results.append({**result, "study": run.study})
            last = {name: round(value, 3) for name, value in result["curve"][-1].items() if name != "probing"}
            print(f"{len(results)} of {len(runs)}: {result['method']}, seed {result['seed']}: {last}")
    with ThreadPoolExecutor(args.jobs) as pool:
        seeds = LENGTH_SEEDS if args.seeds is None else args.seeds
        names = [name for name in PAIR if name in args.methods and args.study in ("all", "lengths")]
        of_lengths = [Run(name, seed, "lengths", flags=METHODS[name]) for name in names for seed in seeds]
        lengths = list(pool.map(lambda run: judge_lengths(run, judge, args.output_dir, results_dir), of_lengths))
    choice, compared = ([result for result in results if result["study"] == name] for name in ("choice", "methods"))
    parts = [make_table(choice, COLUMNS[1:], "LSEP")] if choice else []
    if compared:
        parts += [make_table(compared, COLUMNS), make_table(compared, MORE_COLUMNS)]
    pair = [result for result in compared if result["steps"] == STEPS]
    if {result["method"] for result in pair} == set(PAIR):
        parts.append(make_pair_table(pair, costs.get("LSEP", {}).get("ratio")))
    for kind in (WRONG, COARSE):
        of_kind = [result for result in results if result["data"] == kind]
        parts += [f"{kind}:\n\n{make_table(of_kind, COLUMNS[1:])}"] if of_kind else []
    parts += [make_cost_table(costs)] if costs else []
    if lengths:
        parts.append(make_length_table(lengths))
        draw_lengths(lengths, results_dir / "lengths.png")
    write_text(results_dir / f"{args.study}.md", "\n\n".join(parts) + "\n")
    if compared:
        draw_curves(compared, costs, results_dir / "curves.png")
        draw_accuracy(compared, results_dir / "accuracy.png")
        first = [run for run in runs if (run.study, run.seed) == ("methods", compared[0]["seed"])]
        draw_samples(first, args.output_dir, results_dir / "samples.png")


if __name__ == "__main__":
    main()
