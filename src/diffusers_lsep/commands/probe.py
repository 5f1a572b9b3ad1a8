# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`diffusers-lsep probe`: how well a linear classifier reads the class from each layer, at several times."""

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..command_line import check_writable, number
from ..data.archives import list_some
from ..data.images import open_images
from ..data.sources import SampleSource, cut_off, hash_labels, parse_split
from ..evaluation.features import process_state
from ..evaluation.labelled_data import (
    VALIDATION_SPLITS,
    holds_latents,
    image_size,
    load_splits,
    open_latents,
    open_validation_data,
)
from ..evaluation.linear_probing import DEFAULT_TIMESTEPS, MAE_EPOCHS, METHODS, draw_heat_map, probe_layers
from ..figures import require_matplotlib
from ..files import write_text
from ..labels import find_class_ids
from ..objective import LinearProbe
from ..pipeline_lsep import LSEPPipeline
from ..sampling import DTYPES, add_precision_arguments, open_pipeline
from ..training.checkpoints import STATE_FILE


logger = logging.getLogger(__name__)

VALIDATION_FRACTION = 0.1
RESULTS_FILE = "probe_results.json"
HEAT_MAP_FILE = "probe_heatmap.png"


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
        help="Name of the split to measure on, of --validation_data or else of --data. Without it one of "
        f"{', '.join(VALIDATION_SPLITS)} if there is any, else what the training run held out of --data by its own "
        "--validation_split. With --unseen_data also a fraction to cut off --data.",
    )
    parser.add_argument(
        "--unseen_data",
        action="store_true",
        help="The model was not trained on any of --data: without a split to measure on, cut a fraction off "
        f"(--validation_split, {VALIDATION_FRACTION} if not given).",
    )
    parser.add_argument("--image_column", default="image", help="Column of images in a data set.")
    parser.add_argument("--label_column", default="label", help="Column of labels in a data set.")
    parser.add_argument(
        "--max_train_images",
        type=number(int, 2),
        help="Fit to so many images at most, drawn at random; to all if not given.",
    )
    parser.add_argument(
        "--layers",
        type=number(int, 0),
        nargs="+",
        metavar="LAYER",
        help="After how many blocks to probe, 0 is the input; after each block if not given.",
    )
    parser.add_argument(
        "--timesteps",
        type=number(float, 0, 1),
        nargs="+",
        default=list(DEFAULT_TIMESTEPS),
        metavar="T",
        help="Times in [0, 1] at which to probe: 0 is data, 1 is noise.",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="mae",
        help="How to fit: mae, BatchNorm and a linear layer trained by MAE's protocol, or ridge, in closed form and "
        "fast. mae keeps features in the temporary folder, 4 bytes x images x layers x width: 165 GB for ImageNet and "
        "all of SiT-XL/2 (fewer --layers or --max_train_images are less). ridge keeps none.",
    )
    parser.add_argument("--epochs", type=number(int, 1), default=MAE_EPOCHS, help="Length of MAE's training.")
    parser.add_argument(
        "--probe_depth",
        type=number(int, 1),
        help="After how many blocks the training's own probe stands, if neither it nor the pipeline's"
        " training_args.json says so.",
    )
    parser.add_argument("--batch_size", type=number(int, 1), default=64, help="Images at a time.")
    add_precision_arguments(parser)
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="Of the noise, the order, and what is fitted to and held out."
    )
    parser.add_argument("--output_dir", required=True, help=f"Folder that {RESULTS_FILE} and {HEAT_MAP_FILE} go to.")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Replace the results that are there.")


def run(args: argparse.Namespace) -> None:
    """Runs `diffusers-lsep probe` with the arguments of [`add_arguments`]."""

    logging.basicConfig(format="%(levelname)s: %(message)s")
    # 1. What can be refused at once
    if args.method != "mae":
        args.parser.refuse_without("--method mae", args, "epochs")
    output_dir = Path(args.output_dir)
    check_writable("--output_dir", output_dir)
    results_file = output_dir / RESULTS_FILE  # written last: without it the heat map is of a run that was killed
    if results_file.exists() and not args.overwrite_output_dir:
        raise ValueError(f"`--output_dir` already holds {results_file}; `--overwrite_output_dir` replaces it.")
    require_matplotlib("the heat map")
    state = process_state()
    if state.num_processes > 1:
        raise ValueError(f"`diffusers-lsep probe` has to run in one process, but there are {state.num_processes}.")

    # 2. Model and data
    pipe = open_pipeline(args.pipeline, "PIPELINE", DTYPES[args.dtype]).to(state.device)
    record = _read_record(args.pipeline)
    train, held_out, names, origin = _open_data(args, pipe, record)
    of_classes = (names, pipe.config.id2label)
    training_probe, probe_depth = _load_training_probe(args.pipeline, args.probe_depth, *of_classes, record)
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
        allow_tf32=args.allow_tf32,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    results = {"pipeline": args.pipeline, "data": args.data, "held_out": origin, **results}
    draw_heat_map(output_dir / HEAT_MAP_FILE, results, title=f"{Path(args.pipeline).name}: linear probing")
    write_text(results_file, json.dumps(results, indent=2) + "\n")
    best, of_training = results["best"], results["training_probe"]
    print(
        f"best: {best['accuracy']:.4f} after {best['layer']} blocks at t = {best['timestep']:g} (chance "
        f"{results['chance']:.4f}): chosen on {best['num_images_chosen_on']} of the {results['num_held_out_images']} "
        f"held-out images, measured on the other {best['num_images_measured_on']}; held out: {origin}"
    )
    if of_training is not None:
        values = ", ".join(f"{value:.4f} at {t:g}" for t, value in zip(results["timesteps"], of_training["accuracy"]))
        print(f"the training's own probe, after {of_training['layer']} blocks: {values}")
    print(f"written: {results_file}, {output_dir / HEAT_MAP_FILE}")


def _open_data(
    args: argparse.Namespace, pipe: LSEPPipeline, record: dict[str, Any]
) -> tuple[SampleSource, SampleSource, list[str], str]:
    """What to fit to, what to measure on, the classes, and in words where the second comes from."""
    fraction, split = parse_split(args.validation_split)
    if fraction is not None and args.validation_data is not None:
        raise ValueError(
            f"`--validation_split` has to be the name of a split of `--validation_data`, but is {fraction}."
        )
    own_split = split if args.validation_data is None else None
    source: SampleSource
    held_out: SampleSource | None = None
    if holds_latents(args.data):
        if own_split is not None:
            raise ValueError(
                f"`--validation_split` of latents has to be a fraction such as 0.1, but is {split!r}; other latents"
                " can be given as `--validation_data`."
            )
        source, names = open_latents("--data", args.data, args.pipeline, pipe)
    else:
        splits = load_splits("--data", args.data)
        if args.validation_split is None and args.validation_data is None:
            own_split = next((name for name in VALIDATION_SPLITS if name in splits), None)
        if own_split == "train":
            raise ValueError("`--validation_split` has to be another split than 'train', which is fitted to.")
        columns = (args.image_column, args.label_column)
        source, held_out, names = open_images(splits, *image_size(pipe), *columns, validation_split=own_split)

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


def _open_validation_data(args: argparse.Namespace, pipe: LSEPPipeline, names: list[str]) -> SampleSource:
    """What to measure on, with the numbers that its classes have in the data that is fitted to."""
    data, split = args.validation_data, args.validation_split
    if os.path.exists(data) and os.path.exists(args.data) and os.path.samefile(data, args.data):
        raise ValueError(f"`--validation_data` has to be other data than `--data`, but both are {data!r}.")
    flags = ("--validation_data", data, "--validation_split", split)
    source, own_names, _ = open_validation_data(*flags, args.pipeline, pipe, args.image_column, args.label_column)
    if own_names != names:
        index_of = dict(zip(names, range(len(names))))
        without_names = [n for n in (own_names, names) if n == [str(index) for index in range(len(n))]]
        if len(index_of) == len(names) and index_of.keys() >= set(own_names):
            source.labels = np.array([index_of[name] for name in own_names])[source.labels]
        elif not without_names or len(own_names) != len(names):
            raise ValueError(
                f"`--validation_data` {data!r} has to have the classes of `--data` {args.data!r}, {list_some(names)},"
                f" but has {list_some(own_names)}."
            )
    return source


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
    own_fraction = parse_split(recorded)[0]
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
    pipeline: str,
    probe_depth: int | None,
    names: list[str],
    id2label: dict[int, str] | None,
    record: dict[str, Any],
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
    num_classes = len(names)
    if probe.config.num_classes != num_classes:
        logger.warning(
            "the training's own probe knows %d classes, the data has %d: it is not measured",
            probe.config.num_classes,
            num_classes,
        )
        return None, None
    if id2label:
        try:
            order = find_class_ids(names, id2label, num_classes, "--data")
        except ValueError as error:
            logger.warning("the training's own probe is not measured, as it knows other classes: %s", error)
            return None, None
        for parameter in (probe.linear.weight, probe.linear.bias):  # from the numbers there to those of the data
            parameter.data = parameter.data[order]
    return probe, probe_depth
