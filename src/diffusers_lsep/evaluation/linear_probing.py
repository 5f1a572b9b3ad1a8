# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`diffusers-lsep probe`: how well a linear classifier reads the class from each layer, at several times."""

import argparse
import json
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from ..checkpointing import STATE_FILE, write_text
from ..data import (
    ImageSource,
    SampleSource,
    cut_off,
    hash_labels,
    keyed_generator,
    load_image_dataset,
    open_images,
    read_labels,
    sample_posterior,
)
from ..figures import require_matplotlib, save_figure
from ..latents import METADATA_FILE, MomentsDataset, OriginalMomentsDataset
from ..objective import LinearProbe
from ..paths import get_path
from ..pipeline_lsep import LSEPPipeline
from .features import process_state


logger = logging.getLogger(__name__)

METHODS = ("mae", "ridge")
DEFAULT_TIMESTEPS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
VALIDATION_SPLITS = ("validation", "valid", "val", "test")
VALIDATION_FRACTION = 0.1
RESULTS_FILE = "probe_results.json"
HEAT_MAP_FILE = "probe_heatmap.png"

# MAE's linear probing on ImageNet (arXiv 2111.06377, table 10): LARS with learning rate 0.1 * 16384 / 256.
MAE_EPOCHS = 90
MAE_WARMUP_EPOCHS = 10
MAE_BATCH_SIZE = 16384
MAE_STEPS_PER_EPOCH = 78
MAE_LEARNING_RATE = 6.4
LARS_MOMENTUM = 0.9
LARS_TRUST_COEFFICIENT = 0.001

# What noise is for, as a part of its key: training and held-out images share none.
NOISE_PURPOSES = {"training": 100, "held-out": 101}
HALVES_PURPOSE = 102


def fit_mae(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, epochs: int = MAE_EPOCHS, seed: int = 0
) -> nn.Module:
    """
    Trains a linear classifier by the protocol of MAE (He et al. 2021, arXiv 2111.06377, table 10): BatchNorm without
    affine parameters and a linear layer, LARS with momentum 0.9 and learning rate 6.4, 10 of 90 epochs of warm-up,
    then a cosine, no weight decay, batches of 16,384.

    Two things differ. Features are fixed, so images are not augmented. And a data set smaller than ImageNet is divided
    into smaller batches, of at least 32, so that an epoch keeps up to 78 steps; the learning rate stays, as LARS takes
    steps relative to the norm of the weights.

    Args:
        features (`torch.Tensor`):
            Features `[N, D]`, `N >= 2`.
        labels (`torch.Tensor`):
            Classes `[N]` in `0..num_classes - 1`.
        num_classes (`int`):
            Number of classes.
        epochs (`int`, defaults to `90`):
            Length of the training; the warm-up takes a ninth of it.
        seed (`int`, defaults to `0`):
            Of the initial weights and the order.

    Returns:
        `nn.Module`: takes features to logits.
    """
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6)
    linear = nn.Linear(features.shape[1], num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    probe = nn.Sequential(norm, linear).to(features.device)
    momenta = [torch.zeros_like(parameter) for parameter in linear.parameters()]

    count = len(features)
    batch_size = min(count, MAE_BATCH_SIZE, max(32, count // MAE_STEPS_PER_EPOCH))
    num_steps = count // batch_size
    warmup = epochs * MAE_WARMUP_EPOCHS / MAE_EPOCHS
    for epoch in range(epochs):
        order = torch.randperm(count, generator=generator).to(features.device)
        for step in range(num_steps):
            progress = epoch + step / num_steps
            scale = progress / warmup
            if progress >= warmup:
                scale = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (epochs - warmup)))
            rows = order[step * batch_size : (step + 1) * batch_size]
            loss = F.cross_entropy(probe(features[rows]), labels[rows])
            gradients = torch.autograd.grad(loss, list(linear.parameters()))
            with torch.no_grad():
                for parameter, gradient, momentum in zip(linear.parameters(), gradients, momenta):
                    if parameter.ndim > 1:  # LARS leaves biases alone
                        trust = LARS_TRUST_COEFFICIENT * parameter.norm() / gradient.norm()
                        gradient = gradient * torch.where(torch.isfinite(trust) & (trust > 0), trust, 1.0)
                    momentum.mul_(LARS_MOMENTUM).add_(gradient)
                    parameter.sub_(MAE_LEARNING_RATE * scale * momentum)
    return probe.eval().requires_grad_(False)


def fit_ridge(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, regularization: float = 0.01
) -> nn.Module:
    """
    Fits a linear classifier in closed form: least squares from standardised features to one-hot classes, with
    `regularization` times the identity added to the features' correlation matrix.

    Args:
        features (`torch.Tensor`):
            Features `[N, D]`.
        labels (`torch.Tensor`):
            Classes `[N]` in `0..num_classes - 1`.
        num_classes (`int`):
            Number of classes.
        regularization (`float`, defaults to `0.01`):
            Strength, above 0.

    Returns:
        `nn.Module`: takes features to scores, of which the largest marks the class.
    """
    x = features.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    inverse_std = torch.where(std > 0, 1 / std, 0.0)
    x = (x - mean) * inverse_std
    targets = F.one_hot(labels, num_classes).double()
    share = targets.mean(dim=0)
    gram = x.T @ x / len(x) + regularization * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram, x.T @ (targets - share) / len(x)) * inverse_std[:, None]
    linear = nn.Linear(x.shape[1], num_classes, device=x.device)
    linear.weight.data.copy_(weight.T)
    linear.bias.data.copy_(share - mean @ weight)
    return linear.requires_grad_(False)


@torch.no_grad()
def find_hits(probe: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Whether the largest score of each of the features `[N, D]` is that of its class; bool, `[N]`."""
    return (probe(features).argmax(dim=1) == labels).cpu().numpy()


def accuracy(probe: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the features `[N, D]` whose largest score is that of their class."""
    return find_hits(probe, features, labels).mean().item()


class HiddenStates:
    """
    Token means of a model's layers on noised images, without a class label (the null class).

    Args:
        pipe ([`LSEPPipeline`]):
            The model.
        layers (`Sequence[int]`):
            Depths, in blocks.
        folder (`str` or `os.PathLike`):
            Where latents and features are put, out of memory's way.
        batch_size (`int`, defaults to `64`):
            Images at a time.
        seed (`int`, defaults to `0`):
            With an image's row it decides its noise, which is the same at every time.
    """

    def __init__(
        self,
        pipe: LSEPPipeline,
        layers: Sequence[int],
        folder: str | os.PathLike,
        batch_size: int = 64,
        seed: int = 0,
    ):
        self.pipe, self.layers, self.folder = pipe, list(layers), Path(folder)
        self.batch_size, self.seed = batch_size, seed

    @torch.no_grad()
    def encode(self, name: str, source: SampleSource) -> np.ndarray:
        """
        Latents `[N, C, S, S]` of a source, `"training"` or `"held-out"`: the means of the VAE's posterior, or pixels
        without a VAE.
        """
        pipe, config = self.pipe, self.pipe.transformer.config
        shape = (len(source.labels), config.in_channels, config.sample_size, config.sample_size)
        latents = np.lib.format.open_memmap(self.folder / f"{name}-latents.npy", "w+", np.float32, shape)
        for start, rows in self._batches(len(latents), f"{name} images"):
            batch = source.load(rows, np.zeros(len(rows), dtype=bool)).to(pipe.device)
            if source.kind == "images" and pipe.vae is not None:
                posterior = pipe.vae.encode(batch).latent_dist
                batch = torch.cat([posterior.mean, posterior.std], dim=1)
            if pipe.vae is not None:
                vae = pipe.vae.config
                batch = sample_posterior(batch, torch.zeros(()), vae.scaling_factor, vae.get("shift_factor"))
            latents[start : start + len(rows)] = batch.cpu().numpy()
        return latents

    @torch.no_grad()
    def at(self, t: float, name: str, latents: np.ndarray) -> np.ndarray:
        """Features `[layers, N, D]` of latents at a time."""
        pipe = self.pipe
        path, null_class = get_path(pipe.config.path_type), pipe.transformer.config.num_classes
        shape = (len(self.layers), len(latents), pipe.transformer.inner_dim)
        features = np.lib.format.open_memmap(self.folder / f"{name}-features.npy", "w+", np.float32, shape)
        for start, rows in self._batches(len(latents), f"{name} features at t = {t:g}"):
            noise = np.stack(
                [
                    keyed_generator(self.seed, int(row), NOISE_PURPOSES[name]).standard_normal(
                        latents.shape[1:], dtype=np.float32
                    )
                    for row in rows
                ]
            )
            x = path.interpolate(torch.from_numpy(latents[rows]), torch.from_numpy(noise), t).to(pipe.device)
            labels = torch.full((len(rows),), null_class, device=pipe.device)
            tokens = pipe.transformer.hidden_states_at(x.to(pipe.transformer.dtype), t, labels, self.layers)
            for layer, value in enumerate(tokens):
                features[layer, start : start + len(rows)] = value.mean(dim=1, dtype=torch.float32).cpu().numpy()
        return features

    def _batches(self, count: int, description: str):
        from tqdm.auto import tqdm

        for start in tqdm(range(0, count, self.batch_size), desc=description, unit="batch", leave=False):
            yield start, np.arange(start, min(start + self.batch_size, count))


def probe_layers(
    pipe: LSEPPipeline,
    train: SampleSource,
    held_out: SampleSource,
    num_classes: int,
    layers: Sequence[int] | None = None,
    timesteps: Sequence[float] = DEFAULT_TIMESTEPS,
    method: str = "mae",
    epochs: int = MAE_EPOCHS,
    training_probe: LinearProbe | None = None,
    probe_depth: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Held-out accuracy of linear classifiers on the mean of the tokens of every layer at every time, with no class label
    given (REPA's linear probing, arXiv 2410.06940).

    Args:
        pipe ([`LSEPPipeline`]):
            The model.
        train ([`SampleSource`]):
            What the classifiers are fitted to.
        held_out ([`SampleSource`]):
            What accuracy is measured on: images that neither `train` nor the training of the model has.
        num_classes (`int`):
            Number of classes of the data, which need not be the model's.
        layers (`Sequence[int]`, *optional*):
            Depths in blocks, 0 for the embedded patches; all blocks if not given.
        timesteps (`Sequence[float]`, defaults to `(0.0, 0.1, ..., 0.9)`):
            Times `t` in [0, 1].
        method (`str`, defaults to `"mae"`):
            `"mae"` ([`fit_mae`]) or `"ridge"` ([`fit_ridge`], fast).
        epochs (`int`, defaults to `90`):
            Length of MAE's training.
        training_probe ([`LinearProbe`], *optional*):
            LSEP's own probe, which is measured on the same features as it is.
        probe_depth (`int`, *optional*):
            The depth it was trained at.
        batch_size (`int`, defaults to `64`):
            Images in one pass of the model.
        seed (`int`, defaults to `0`):
            Of the noise, of MAE's training and of the two halves.

    Returns:
        `dict[str, Any]`: `layers`, `timesteps`, `accuracy` (a row for each layer, a column for each time, on all
        held-out images), `best` (the layer and time that are best on one half of the held-out images, and their
        accuracy on the other half, which took no part in the choice) and `training_probe` (its accuracy at each time),
        ready for JSON.

    Raises:
        ValueError: before any work, if an argument is out of range.
    """
    depth = pipe.transformer.config.num_layers
    layers = list(range(1, depth + 1)) if layers is None else sorted(set(layers))
    if not layers or not 0 <= layers[0] <= layers[-1] <= depth:
        raise ValueError(f"`layers` must lie in 0..{depth}, got {layers}.")
    timesteps = sorted(set(timesteps))
    if not timesteps or not 0 <= timesteps[0] <= timesteps[-1] <= 1:
        raise ValueError(f"`timesteps` must lie in [0, 1], got {timesteps}.")
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {list(METHODS)}, got {method!r}.")
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if training_probe is not None and (probe_depth is None or not 1 <= probe_depth <= depth):
        raise ValueError(f"`probe_depth` must lie in 1..{depth}, got {probe_depth}.")
    if len(train.labels) < 2 or len(held_out.labels) < 2:
        raise ValueError(
            f"the data must hold 2 images to fit and 2 to measure, got {len(train.labels)} and {len(held_out.labels)}."
        )

    device = pipe.device
    all_layers = sorted({*layers, probe_depth}) if training_probe is not None else layers
    sources = {"training": train, "held-out": held_out}
    labels = {name: torch.from_numpy(source.labels).to(device) for name, source in sources.items()}
    hits = np.zeros((len(layers), len(timesteps), len(held_out.labels)), dtype=bool)
    of_training_probe = []
    with tempfile.TemporaryDirectory() as folder:
        states = HiddenStates(pipe, all_layers, folder, batch_size, seed)
        latents = {name: states.encode(name, source) for name, source in sources.items()}
        for column, t in enumerate(timesteps):
            features = {name: states.at(t, name, value) for name, value in latents.items()}
            for index, layer in enumerate(all_layers):
                x = {name: torch.from_numpy(value[index].copy()).to(device) for name, value in features.items()}
                if layer in layers:
                    data = (x["training"], labels["training"], num_classes)
                    probe = fit_mae(*data, epochs=epochs, seed=seed) if method == "mae" else fit_ridge(*data)
                    hits[layers.index(layer), column] = find_hits(probe, x["held-out"], labels["held-out"])
                if training_probe is not None and layer == probe_depth:
                    probe = training_probe.to(device)
                    means = x["held-out"][:, None]  # of the tokens, which is all that the probe looks at
                    of_training_probe.append(accuracy(probe, means, labels["held-out"]))
    # The largest of many accuracies is too high by chance, unless it is measured anew.
    order = keyed_generator(seed, 0, HALVES_PURPOSE).permutation(len(held_out.labels))
    choosing, measuring = np.split(order, [len(order) // 2])
    chosen = hits[:, :, choosing].mean(axis=2)
    row, column = np.unravel_index(chosen.argmax(), chosen.shape)
    return {
        "accuracy": hits.mean(axis=2).tolist(),
        "layers": layers,
        "timesteps": timesteps,
        "best": {
            "layer": layers[row],
            "timestep": timesteps[column],
            "accuracy": hits[row, column, measuring].mean().item(),
            "num_images_chosen_on": len(choosing),
            "num_images_measured_on": len(measuring),
        },
        "training_probe": {"layer": probe_depth, "accuracy": of_training_probe} if of_training_probe else None,
        "chance": np.bincount(held_out.labels).max().item() / len(held_out.labels),
        "method": method,
        "epochs": epochs if method == "mae" else None,
        "num_training_images": len(train.labels),
        "num_held_out_images": len(held_out.labels),
        "num_classes": num_classes,
        "seed": seed,
    }


def draw_heat_map(path: str | os.PathLike, results: dict[str, Any], title: str = "") -> None:
    """
    Draws the accuracies of [`probe_layers`], layer against time, as a PNG that appears whole or not at all.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        results (`dict[str, Any]`):
            What [`probe_layers`] returned.
        title (`str`, defaults to `""`):
            Its title.
    """
    from matplotlib.figure import Figure

    table = np.array(results["accuracy"])
    rows, columns = table.shape
    figure = Figure(figsize=(2.5 + 0.6 * columns, 1.8 + 0.35 * rows), layout="constrained")
    axis: Any = figure.subplots()
    image = axis.imshow(table, origin="lower", aspect="auto", cmap="viridis")
    axis.set_xticks(range(columns), [f"{t:g}" for t in results["timesteps"]])
    axis.set_yticks(range(rows), results["layers"])
    axis.set(xlabel="t (0: data, 1: noise)", ylabel="blocks", title=title)
    bright = (table.min() + table.max()) / 2
    for row in range(rows):
        for column in range(columns):
            colour = "black" if table[row, column] > bright else "white"
            axis.text(column, row, f"{table[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="held-out accuracy")
    save_figure(path, figure)


# --- The command ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `diffusers-lsep probe`."""
    parser.description = (
        "Linear probing of every layer at several times: no class label is given, tokens are averaged, and a linear "
        "classifier is fitted to them. Accuracy is that on images that were held out from the model's training too: "
        "a split of their own, other data, or what the training run itself held out."
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="Folder or Hub id of a saved LSEP pipeline.")
    parser.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="Labelled images to fit to: a folder with one subfolder per class, a folder of Parquet files, or the id "
        "of a data set; or latents, the folder of encode_latents.py or a vae-sd folder of EDM2 and REPA.",
    )
    parser.add_argument(
        "--validation_data",
        metavar="DATA",
        help="Images or latents of the same classes to measure on, which the model was not trained on.",
    )
    parser.add_argument(
        "--validation_split",
        metavar="SPLIT",
        help="Name of the split to measure on, of --validation_data or else of --data (default: one of "
        f"{', '.join(VALIDATION_SPLITS)} if there is any, else what the training run held out of --data by its own "
        "--validation_split). With --unseen_data also a fraction to cut off --data.",
    )
    parser.add_argument(
        "--unseen_data",
        action="store_true",
        help="The model was not trained on any of --data: without a split to measure on, cut a fraction off "
        f"(--validation_split, default {VALIDATION_FRACTION}).",
    )
    parser.add_argument("--image_column", default="image", help="Column of images (default: %(default)s).")
    parser.add_argument("--label_column", default="label", help="Column of labels (default: %(default)s).")
    parser.add_argument(
        "--max_train_images", type=int, help="Fit to so many images at most, drawn at random (default: all)."
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", help="Depths in blocks; 0 is the input (default: all blocks)."
    )
    parser.add_argument(
        "--timesteps",
        type=float,
        nargs="+",
        default=list(DEFAULT_TIMESTEPS),
        metavar="T",
        help="Times in [0, 1], 0 is data (default: 0 0.1 ... 0.9).",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="mae",
        help="How to fit: mae, BatchNorm and a linear layer trained by MAE's protocol, or ridge, in closed form and "
        "fast (default: %(default)s).",
    )
    parser.add_argument(
        "--epochs", type=int, default=MAE_EPOCHS, help="Length of MAE's training (default: %(default)s)."
    )
    parser.add_argument(
        "--probe_depth",
        type=int,
        help="Depth of the training's own probe (default: as the probe or the pipeline's training_args.json says).",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="Images at a time (default: %(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Of noise, order, cut and halves (default: %(default)s).")
    parser.add_argument(
        "--output_dir", default=".", help=f"Where {RESULTS_FILE} and {HEAT_MAP_FILE} go (default: %(default)s)."
    )
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Replace the results that are there.")


def run(args: argparse.Namespace) -> None:
    """Runs `diffusers-lsep probe` with the arguments of [`add_arguments`]."""
    from diffusers import DiffusionPipeline

    logging.basicConfig(format="%(levelname)s: %(message)s")
    # 1. What can be refused at once
    if args.seed < 0:
        raise ValueError(f"`--seed` must be at least 0, got {args.seed}.")
    if args.max_train_images is not None and args.max_train_images < 2:
        raise ValueError(f"`--max_train_images` must be at least 2, got {args.max_train_images}.")
    output_dir = Path(args.output_dir)
    existing = [str(output_dir / name) for name in (RESULTS_FILE, HEAT_MAP_FILE) if (output_dir / name).exists()]
    if existing and not args.overwrite_output_dir:
        raise ValueError(f"`--output_dir` already holds {', '.join(existing)}; `--overwrite_output_dir` replaces it.")
    require_matplotlib("the heat map")
    state = process_state()
    if state.num_processes > 1:
        raise ValueError(f"`diffusers-lsep probe` runs in one process, got {state.num_processes}.")

    # 2. Model and data
    try:
        pipe = DiffusionPipeline.from_pretrained(args.pipeline)
    except (OSError, ValueError) as error:
        raise ValueError(f"`PIPELINE` {args.pipeline!r} cannot be loaded: {error}") from error
    if not isinstance(pipe, LSEPPipeline):
        raise ValueError(f"`PIPELINE` must be an LSEPPipeline, got a {type(pipe).__name__}.")
    pipe.to(state.device)
    record = _read_record(args.pipeline)
    train, held_out, names, origin = _open_data(args, pipe, record)
    training_probe, probe_depth = _load_training_probe(args.pipeline, args.probe_depth, len(names), record)
    if args.max_train_images is not None and args.max_train_images < len(train.labels):
        _, train = cut_off(train, args.max_train_images / len(train.labels), args.seed)

    # 3. The work
    results = probe_layers(
        pipe,
        train,
        held_out,
        num_classes=len(names),
        layers=args.layers,
        timesteps=args.timesteps,
        method=args.method,
        epochs=args.epochs,
        training_probe=training_probe,
        probe_depth=probe_depth,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    results = {"pipeline": args.pipeline, "data": args.data, "held_out": origin, **results}
    write_text(output_dir / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    draw_heat_map(output_dir / HEAT_MAP_FILE, results, title=f"{Path(args.pipeline).name}: linear probing")
    best, of_training = results["best"], results["training_probe"]
    print(
        f"best: {best['accuracy']:.4f} after {best['layer']} blocks at t = {best['timestep']:g} (chance "
        f"{results['chance']:.4f}): chosen on {best['num_images_chosen_on']} of the {results['num_held_out_images']} "
        f"held-out images, measured on the other {best['num_images_measured_on']}; held out: {origin}"
    )
    if of_training is not None:
        values = ", ".join(f"{value:.4f} at {t:g}" for t, value in zip(results["timesteps"], of_training["accuracy"]))
        print(f"the training's own probe, after {of_training['layer']} blocks: {values}")
    print(f"written: {output_dir / RESULTS_FILE}, {output_dir / HEAT_MAP_FILE}")


def _open_data(
    args: argparse.Namespace, pipe: LSEPPipeline, record: dict[str, Any]
) -> tuple[SampleSource, SampleSource, list[str], str]:
    """What to fit to, what to measure on, the classes, and in words where the second comes from."""
    fraction, split = _parse_split(args.validation_split)
    if fraction is not None and args.validation_data is not None:
        raise ValueError(
            f"`--validation_split` has to be the name of a split of `--validation_data`, but is {fraction}."
        )
    own_split = split if args.validation_data is None else None
    held_out = None
    if _holds_latents(args.data):
        if own_split is not None:
            raise ValueError(
                f"`--validation_split` of latents has to be a fraction such as 0.1, but is {split!r}; other latents"
                " can be given as `--validation_data`."
            )
        source, names = _open_latents("--data", args.data, args.pipeline, pipe)
    else:
        splits = _load_splits(args.data)
        if args.validation_split is None and args.validation_data is None:
            own_split = next((name for name in VALIDATION_SPLITS if name in splits), None)
        if own_split == "train":
            raise ValueError("`--validation_split` has to be another split than 'train', which is fitted to.")
        columns = (args.image_column, args.label_column)
        source, held_out, names = open_images(splits, *_image_size(pipe), *columns, validation_split=own_split)

    if args.validation_data is not None:
        held_out = _open_validation_data(args, pipe, names)
        _warn_if_trained_on("--validation_data", args.validation_data, held_out, record)
        return source, held_out, names, args.validation_data
    if held_out is not None:
        return source, held_out, names, f"the split {own_split!r}"
    if args.unseen_data:
        _warn_if_trained_on("--data", args.data, source, record)
        fraction = fraction or VALIDATION_FRACTION
        return *cut_off(source, fraction, args.seed), names, f"{fraction:g} of the data, none of which the model saw"
    return *_cut_as_the_run(args, source, fraction, record), names, "what the training run held out of the data"


def _parse_split(value: str | float | None) -> tuple[float | None, str | None]:
    """A fraction, or the name of a split."""
    try:
        fraction = float(value)
    except (TypeError, ValueError):
        return None, value
    if not 0 < fraction < 1:
        raise ValueError(f"`--validation_split` has to be a split or a fraction between 0 and 1, but is {fraction}.")
    return fraction, None


def _holds_latents(data: str) -> bool:
    return any((Path(data) / name).is_file() for name in (METADATA_FILE, "dataset.json"))


def _open_latents(
    flag: str, data: str, pipeline: str, pipe: LSEPPipeline
) -> tuple[MomentsDataset | OriginalMomentsDataset, list[str]]:
    """Latents that the pipeline understands, and the names of their classes."""
    if pipe.vae is None:
        raise ValueError(f"`{flag}` {data!r} holds latents, but `PIPELINE` {pipeline!r} has no VAE.")
    source = OriginalMomentsDataset(data) if (Path(data) / "dataset.json").is_file() else MomentsDataset(data)
    config = pipe.transformer.config
    expected = (2 * config.in_channels, config.sample_size, config.sample_size)
    if source.moments_shape != expected:
        raise ValueError(f"`{flag}` {data!r} holds moments {source.moments_shape}, `PIPELINE` needs {expected}.")
    if isinstance(source, MomentsDataset):
        source.check_vae(pipe.vae, f"that of `PIPELINE` {pipeline!r}")
    return source, [source.id2label[index] for index in range(len(source.id2label))]


def _load_splits(data: str):
    return load_image_dataset(**{"train_data_dir" if Path(data).is_dir() else "dataset_name": data})


def _image_size(pipe: LSEPPipeline) -> tuple[int, int]:
    """Side and channels of the images that the pipeline makes."""
    config = pipe.transformer.config
    channels = config.in_channels if pipe.vae is None else pipe.vae.config.in_channels
    return config.sample_size * pipe.vae_scale_factor, channels


def _open_validation_data(args: argparse.Namespace, pipe: LSEPPipeline, names: list[str]) -> SampleSource:
    """What to measure on, with the numbers that its classes have in the data that is fitted to."""
    data, split = args.validation_data, args.validation_split
    if os.path.exists(data) and os.path.exists(args.data) and os.path.samefile(data, args.data):
        raise ValueError(f"`--validation_data` has to be other data than `--data`, but both are {data!r}.")
    if _holds_latents(data):
        if split is not None:
            raise ValueError(f"`--validation_split` is {split!r}, but `--validation_data` {data!r} has no splits.")
        source, own_names = _open_latents("--validation_data", data, args.pipeline, pipe)
    else:
        splits = _load_splits(data)
        candidates = [split] if split is not None else [*VALIDATION_SPLITS, *(splits if len(splits) == 1 else ())]
        name = next((name for name in candidates if name in splits), None)
        if name is None:
            raise ValueError(
                f"`--validation_split` has to name a split of `--validation_data`, one of {list(splits)}, but is"
                f" {split!r}."
            )
        labels, own_names = read_labels(splits[name], args.label_column)
        source = ImageSource(splits[name], labels, *_image_size(pipe), args.image_column)

    if own_names != names:
        index_of = dict(zip(names, range(len(names))))
        without_names = [n for n in (own_names, names) if n == [str(index) for index in range(len(n))]]
        if len(index_of) == len(names) and index_of.keys() >= set(own_names):
            source.labels = np.array([index_of[name] for name in own_names])[source.labels]
        elif not without_names or len(own_names) != len(names):
            raise ValueError(
                f"`--validation_data` {data!r} has to have the classes of `--data` {args.data!r}, {_some(names)}, but"
                f" has {_some(own_names)}."
            )
    return source


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" ... ({len(names)})" if len(names) > 3 else "")


def _warn_if_trained_on(flag: str, data: str, source: SampleSource, record: dict[str, Any]):
    if (len(source.labels), hash_labels(source.labels)) == _training_part(record):
        logger.warning(
            "`%s` %r has as many images, with the same labels in the same order, as what the model was trained on: if"
            " it is the same data, the accuracy is not that of held-out images",
            flag,
            data,
        )


def _training_part(record: dict[str, Any]) -> tuple[int | None, int | None]:
    """Number of the images that a run was trained on, and the checksum of their labels."""
    return record.get("training_images"), record.get("training_labels")


def _cut_as_the_run(
    args: argparse.Namespace, source: SampleSource, fraction: float | None, record: dict[str, Any]
) -> tuple[SampleSource, SampleSource]:
    """The training part and the held-out part of the run that made the pipeline, if this is its data."""
    recorded = record.get("validation_split")
    own_fraction = _parse_split(recorded)[0]
    if not record:
        reason = f"`PIPELINE` {args.pipeline!r} has no record of its training (training_args.json)"
    elif own_fraction is None:
        reason = f"its training run held out no fraction of its data (`validation_split` is {recorded!r})"
    elif fraction not in (None, own_fraction):
        reason = f"its training run held out {own_fraction:g} of its data, not {fraction:g}"
    else:
        train, held_out = cut_off(source, own_fraction, record.get("seed", 0))
        if (len(train.labels), hash_labels(train.labels)) == _training_part(record):
            start = record.get("pretrained_model_name_or_path")
            if start is not None:
                logger.warning("the run started from %r: whether that has seen these images is not known", start)
            return train, held_out
        reason = "its training run was trained on other data"
    raise ValueError(
        f"`--data` {args.data!r} has no part that is known to be held out: {reason}. On images that it was trained on"
        " a model shows what it remembers. Give `--validation_data` (other images or latents, which the model was"
        " not trained on); or `--validation_split` with the name of a split of the data set; or as `--data` those of a"
        " run that had a `--validation_split` of its own; or `--unseen_data` if the model was not trained on any of"
        " these images."
    )


def _find_file(pipeline: str, name: str) -> Path | None:
    """A file of a pipeline, in its folder or from the Hub; None if there is none of that name."""
    if Path(pipeline).is_dir():
        path = Path(pipeline) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(pipeline, name))
    except EntryNotFoundError:
        return None


def _read_record(pipeline: str) -> dict[str, Any]:
    """The settings of the run that made a pipeline, as far as there is a record of them."""
    arguments = _find_file(pipeline, "training_args.json")  # of a whole run
    if arguments is not None:
        return json.loads(arguments.read_text(encoding="utf-8"))
    state = Path(pipeline).parent / STATE_FILE  # of a checkpoint, whose pipeline it is
    if Path(pipeline).is_dir() and state.is_file():
        return json.loads(state.read_text(encoding="utf-8"))["settings"]
    return {}


def _load_training_probe(
    pipeline: str, probe_depth: int | None, num_classes: int, record: dict[str, Any]
) -> tuple[LinearProbe | None, int | None]:
    """The probe that a training left beside the pipeline, and its depth; none if it cannot be measured."""
    if _find_file(pipeline, "probe/config.json") is None:
        if probe_depth is not None:
            raise ValueError(f"`--probe_depth` {probe_depth} was given, but {pipeline!r} has no folder probe/.")
        print(f"{pipeline} has no folder probe/: there is no probe of the training to measure")
        return None, None
    probe = LinearProbe.from_pretrained(pipeline, subfolder="probe").eval()
    if probe_depth is None:
        probe_depth = probe.config.depth or record.get("probe_depth")  # of older versions only the run says it
    if probe_depth is None:
        logger.warning("`--probe_depth` is not known, so the training's own probe is not measured")
        return None, None
    if probe.config.num_classes != num_classes:
        logger.warning(
            "the training's own probe knows %d classes, the data has %d: it is not measured",
            probe.config.num_classes,
            num_classes,
        )
        return None, None
    return probe, probe_depth
