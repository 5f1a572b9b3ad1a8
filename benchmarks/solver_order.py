# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Error of the samples against evaluations of the model, for every scheduler that the pipeline takes.

    python benchmarks/solver_order.py
    python benchmarks/solver_order.py --schedulers "SDE order 1" "SDE order 2" --evaluations 64 250 \\
        --num_samples 1048576 --output_dir precise
    python benchmarks/solver_order.py --pretrained_model_name_or_path lsep-digits
    python benchmarks/solver_order.py --pretrained_model_name_or_path lsep-digits-map --evaluations 1 2 4 8 64

Without a model: mixtures of Gaussians in the plane, of which the velocity is known exactly, so that all of the error
is the scheduler's. With one that was trained on the bundled digits: the Frechet distance, on pixels, to the training
images.

Writes `solver_order.json` and `solver_order.png` (`solver_order_digits.*`) into `--output_dir`. Results that are there
already, of other schedulers and numbers of evaluations in the same setting, are kept.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ModelMixin,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from digits_runs import pixel_distance, read_digits

from diffusers_lsep import (
    FlowMapScheduler,
    FlowMatchHeunODEScheduler,
    FlowMatchSDEMultistepScheduler,
    FlowMatchSDEScheduler,
    LSEPPipeline,
)
from diffusers_lsep.evaluation.metrics import feature_statistics, frechet_distance
from diffusers_lsep.figures import COLOURS, MARKERS, figure_style, save_figure
from diffusers_lsep.interpolants import get_interpolant


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "SDE order 1": lambda: FlowMatchSDEScheduler(),  # Euler-Maruyama
    "SDE order 1, tweedie": lambda: FlowMatchSDEScheduler(last_step="tweedie"),
    "SDE order 2": lambda: FlowMatchSDEMultistepScheduler(),
    "SDE order 2, tweedie": lambda: FlowMatchSDEMultistepScheduler(last_step="tweedie"),
    "SDE order 2, last step 0.005": lambda: FlowMatchSDEMultistepScheduler(last_step_size=0.005),
    "ODE Euler": lambda: FlowMatchSDEScheduler(diffusion_form="none"),
    "ODE Heun": lambda: FlowMatchHeunODEScheduler(),
    "flow map": lambda: FlowMapScheduler(),
    "flow map, renoising 1": lambda: FlowMapScheduler(renoising=1.0),
    "diffusers FlowMatchEuler": lambda: FlowMatchEulerDiscreteScheduler(),
    "diffusers FlowMatchHeun": lambda: FlowMatchHeunDiscreteScheduler(),
    "diffusers DPM++ 2M": lambda: DPMSolverMultistepScheduler(**FLOW),
    "diffusers DPM++ 2M SDE": lambda: DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    "diffusers UniPC": lambda: UniPCMultistepScheduler(**FLOW),
}
OF_FLOW_MAPS = ("flow map", "flow map, renoising 1")  # and of no model that gives velocities
EVALUATIONS = [8, 16, 32, 64, 128, 250]
# What the figure shows, best seen apart: two schedulers of a kind are no more than two labels on one curve.
SHOWN = {
    "SDE order 1": "SDE, order 1 (Euler-Maruyama)",
    "SDE order 2": "SDE, order 2",
    "SDE order 2, last step 0.005": "SDE, order 2, last step from t = 0.005",
    "ODE Heun": "ODE, Heun",
    "diffusers UniPC": "ODE, UniPC of diffusers",
    "diffusers DPM++ 2M SDE": "SDE, DPM++ 2M of diffusers",
}

# Weight, mean and standard deviation of each part. The last step of the SDE begins at 0.04.
MIXTURES = {
    "wide": [(0.5, (-0.8, -0.4), 0.5), (0.3, (0.6, 0.9), 0.3), (0.2, (1.0, -0.6), 0.8)],
    "mixed": [(0.35, (-1.0, -0.5), 0.3), (0.3, (0.2, 0.9), 0.1), (0.25, (1.1, -0.3), 0.05), (0.1, (-0.4, 0.4), 0.2)],
    "narrow": [(0.4, (-0.9, 0.0), 0.1), (0.3, (0.7, 0.7), 0.05), (0.2, (0.6, -0.8), 0.03), (0.1, (0.0, 0.3), 0.02)],
}
ALL_MIXTURES = "mean over the mixtures"

EXACT = "as many exact samples"
PLACES = ("before the last step", "final samples")


class MixtureFlow(ModelMixin, ConfigMixin):
    """
    The exact velocity, on the linear path, of a mixture of Gaussians in the plane. An "image" of 2 channels is as many
    independent samples as it has pixels.
    """

    @register_to_config
    def __init__(self, mixture: str, sample_size: int = 512, in_channels: int = 2, num_classes: int = 1):
        super().__init__()
        self.weights, self.means, self.stds = zip(*MIXTURES[mixture])
        self.unused = torch.nn.Parameter(torch.zeros(1))  # tells the pipeline device and dtype
        self.path = get_interpolant("linear")
        self.evaluations = 0

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        self.evaluations += 1
        t = timestep[0].item()
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        logits, originals = [], []
        for weight, mean, std in zip(self.weights, self.means, self.stds):
            variance = (alpha * std) ** 2 + sigma**2
            mean = torch.tensor(mean).reshape(1, 2, 1, 1)
            centred = hidden_states - alpha * mean
            logits.append(math.log(weight) - math.log(variance) - 0.5 * centred.square().sum(1) / variance)
            originals.append(mean + alpha * std**2 / variance * centred)
        parts = torch.stack(logits).softmax(0)
        original = sum(part[:, None] * value for part, value in zip(parts, originals))
        return (self.path.velocity(original, (hidden_states - alpha * original) / sigma, t),)

    def at(self, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights `[K]`, means `[K, 2]` and standard deviations `[K]` of the mixture at time `t`."""
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return np.array(self.weights), alpha * np.array(self.means), np.hypot(alpha * np.array(self.stds), sigma)


def moment_error(samples: np.ndarray, flow: MixtureFlow, t: float) -> float:
    """The Frechet distance (not squared): what is wrong with mean and covariance, in the unit of the samples."""
    weights, means, stds = flow.at(t)
    mean = weights @ means
    covariance = (weights @ stds**2) * np.eye(2) + (weights[:, None] * means).T @ means - np.outer(mean, mean)
    return math.sqrt(frechet_distance(*feature_statistics(samples), mean, covariance))


def sliced_wasserstein(samples: np.ndarray, flow: MixtureFlow, t: float, num_directions: int = 16) -> float:
    """The 1-Wasserstein distance to the exact quantiles, mean over directions."""
    weights, means, stds = flow.at(t)
    levels = (np.arange(len(samples)) + 0.5) / len(samples)
    distances = []
    for angle in np.arange(num_directions) * math.pi / num_directions:
        direction = np.array([math.cos(angle), math.sin(angle)])
        centres = means @ direction
        grid = np.linspace((centres - 6 * stds).min(), (centres + 6 * stds).max(), 20_000)
        standardised = torch.from_numpy((grid[:, None] - centres) / stds)
        distribution = torch.special.ndtr(standardised).numpy() @ weights
        quantiles = np.interp(levels, distribution, grid)
        distances.append(np.abs(np.sort(samples @ direction) - quantiles).mean())
    return float(np.mean(distances))


def draw(pipe: LSEPPipeline, name: str, evaluations: int, labels: list[int], seed: int) -> list[torch.Tensor]:
    """Samples `[B, C, S, S]`, before the last step (as a callback sees them) and after it."""
    pipe.scheduler = SCHEDULERS[name]()
    states = []

    def keep(pipe, i, timestep, callback_kwargs):
        states[:] = [*states[-1:], callback_kwargs["latents"]]
        return {}

    # Heun's method takes two evaluations for a step, but for the last one.
    steps = (evaluations + 1) // 2 if pipe.scheduler.order == 2 else evaluations
    generator = torch.Generator().manual_seed(seed)
    pipe(labels, steps, generator=generator, output_type="latent", callback_on_step_end=keep)
    return states


def report(row: dict):
    """Prints a result."""
    places = [
        f"{place}: " + ", ".join(f"{name} {value:.2e}" for name, value in row[place].items())
        for place in PLACES
        if place in row
    ]
    print(f"{row['data']:24}{row['scheduler']:30}{row.get('evaluations', ''):>4}  {'; '.join(places)}", flush=True)


def run_mixture(args: argparse.Namespace, mixture: str) -> list[dict]:
    flow = MixtureFlow(mixture, sample_size=math.isqrt(args.num_samples))
    pipe = LSEPPipeline(flow, FlowMatchSDEScheduler())
    pipe.set_progress_bar_config(disable=True)

    def measure(points: np.ndarray, t: float) -> dict[str, float]:
        return {"moments": moment_error(points, flow, t), "sliced Wasserstein": sliced_wasserstein(points, flow, t)}

    # What the number of samples leaves.
    rng = np.random.default_rng(args.seed)
    floor = {}
    last_step_size = pipe.scheduler.config.last_step_size
    for place, t in zip(PLACES, (last_step_size, 0.0)):
        weights, means, stds = flow.at(t)
        parts = rng.choice(len(weights), flow.config.sample_size**2, p=weights)
        floor[place] = measure(means[parts] + stds[parts, None] * rng.standard_normal((len(parts), 2)), t)
    rows = [{"data": mixture, "scheduler": EXACT, **floor}]
    report(rows[0])

    for name in [name for name in args.schedulers if name not in OF_FLOW_MAPS]:
        for evaluations in args.evaluations:
            flow.evaluations = 0
            states = draw(pipe, name, evaluations, [0], args.seed)
            before, final = (state[0].flatten(1).T.double().numpy() for state in states)
            row = {"data": mixture, "scheduler": name, "evaluations": flow.evaluations}
            config = pipe.scheduler.config
            if config.get("diffusion_form", "none") != "none" and config.last_step_size == last_step_size:
                row[PLACES[0]] = measure(before, last_step_size)
            row[PLACES[1]] = measure(final, 0.0)
            rows.append(row)
            report(row)
    return rows


def average(rows: list[dict]) -> list[dict]:
    """Rows of `ALL_MIXTURES`, where all are there."""
    groups = {}
    for row in rows:
        groups.setdefault((row["scheduler"], row.get("evaluations")), []).append(row)
    means = []
    for (scheduler, evaluations), group in groups.items():
        if len(group) == len(MIXTURES):
            errors = {
                place: {name: float(np.mean([row[place][name] for row in group])) for name in group[0][place]}
                for place in PLACES
                if place in group[0]
            }
            label = {"evaluations": evaluations} if evaluations is not None else {}
            means.append({"data": ALL_MIXTURES, "scheduler": scheduler, **label, **errors})
            report(means[-1])
    return means


def run_digits(args: argparse.Namespace) -> list[dict]:
    real, classes = read_digits()["train"]
    pipe = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
    pipe.set_progress_bar_config(disable=True)
    # As often as in the data.
    labels = np.resize(classes, args.num_images)
    rows = []
    is_flow_map = pipe.transformer.config.flow_map_depth is not None
    for name in [name for name in args.schedulers if is_flow_map or name not in OF_FLOW_MAPS]:
        for evaluations in args.evaluations:
            distances = []
            for seed in range(args.seed, args.seed + args.num_seeds):
                samples = draw(pipe, name, evaluations, labels, seed)[-1]
                distances.append(pixel_distance((samples.clamp(-1, 1).flatten(1).double().numpy() + 1) / 2, real))
            errors = {"Frechet distance": float(np.mean(distances)), "deviation of a seed": float(np.std(distances))}
            rows.append({"data": "digits", "scheduler": name, "evaluations": evaluations, PLACES[1]: errors})
            report(rows[-1])
    return rows


@figure_style()
def plot(path: Path, rows: list[dict], panels: dict[tuple[str, str], str]):
    """A panel for each place and measure, with the name of its axis; a curve for each scheduler of `SHOWN`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(max(5, 4 * len(panels)), 4.4))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((place, measure), name) in zip(axes, panels.items()):
        for (scheduler, label), marker, colour in zip(SHOWN.items(), MARKERS, COLOURS):
            points = [
                (row["evaluations"], row[place][measure])
                for row in rows
                if row["scheduler"] == scheduler and place in row
            ]
            if points:
                style = "-" if label.startswith("SDE") else "--"
                axis.plot(*zip(*sorted(points)), style, marker=marker, color=colour, label=label)
        for row in rows:
            if row["scheduler"] == EXACT:
                axis.axhline(row[place][measure], color="black", linewidth=1, linestyle=":", label=EXACT)
        axis.set(xscale="log", yscale="log", xlabel="evaluations of the model", ylabel=name)
        axis.set_xticks(EVALUATIONS, EVALUATIONS)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_figure(path, figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", help="A model of the digits, in place of the mixtures.")
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=list(SCHEDULERS), metavar="NAME")
    parser.add_argument("--evaluations", nargs="+", type=int, default=EVALUATIONS, metavar="N")
    parser.add_argument("--num_samples", type=int, default=2**17, help="Of each mixture. Default: 131,072.")
    parser.add_argument("--num_images", type=int, default=500, help="Digits for each distance. Default: 500.")
    parser.add_argument("--num_seeds", type=int, default=2, help="Distances to average. Default: 2.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    model = args.pretrained_model_name_or_path
    path = args.output_dir / ("solver_order.json" if model is None else "solver_order_digits.json")
    counts = ("num_samples",) if model is None else ("num_images", "num_seeds")
    settings = {"model": model, "seed": args.seed, **{name: getattr(args, name) for name in counts}}
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept = kept["rows"] if kept.get("settings") == settings else []

    if model is None:
        rows = [row for mixture in MIXTURES for row in run_mixture(args, mixture)]
    else:
        rows = run_digits(args)
    done = {(row["data"], row["scheduler"], row.get("evaluations")) for row in rows}
    rows += [row for row in kept if (row["data"], row["scheduler"], row.get("evaluations")) not in done]
    path.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    if model is None:
        panels = {
            (PLACES[1], "sliced Wasserstein"): "error of the samples (1-Wasserstein)",
            (PLACES[1], "moments"): "error of mean and covariance",
        }
        plot(path.with_suffix(".png"), average(rows), panels)
    else:
        plot(path.with_suffix(".png"), rows, {(PLACES[1], "Frechet distance"): "Fréchet distance on pixels"})


if __name__ == "__main__":
    main()
