# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`diffusers-lsep evaluate`: the metrics of ADM's evaluator, KID and FD-DINOv2, without TensorFlow.

Any number of processes share the network's work: `accelerate launch -m diffusers_lsep.cli evaluate ...`.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from ..command_line import check_writable, number
from ..evaluation.checkpoints import milestone_samples, plot_metrics
from ..evaluation.features import default_cache_dir, process_state
from ..evaluation.images import open_images
from ..evaluation.protocol import METRICS, PROTOCOL_DINOV2, PROTOCOL_IMAGES, ImageSet, evaluate_images
from ..figures import require_matplotlib
from ..files import write_text
from ..hub.local_paths import without_folders
from ..hub.model_card import CARD_NAME, load_card, update_evaluation
from ..hub.saved_pipeline import SavedPipeline
from ..sampling import DTYPES, add_precision_arguments


logger = logging.getLogger(__name__)


HIGHER_IS_BETTER = ("inception_score", "precision", "recall")

RESULTS_FILE = "eval_results.json"
CURVES_FILE = "eval_curves.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `diffusers-lsep evaluate`."""
    parser.description = (
        "FID, sFID, Inception Score, precision and recall as ADM's evaluator computes them, KID and FD-DINOv2. "
        "SAMPLES and REF are each an .npz (ADM's VIRTUAL_* files included, whose statistics are used), a folder of "
        "images, or a data set. With several processes: accelerate launch -m diffusers_lsep.cli evaluate ..."
    )
    parser.add_argument("samples", nargs="?", metavar="SAMPLES", help="The samples; 50,000 in papers.")
    parser.add_argument("--reference", required=True, metavar="REF", help="What they are compared with.")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        metavar="METRIC",
        help=f"Some of {', '.join(METRICS)}; all that REF allows but fd_dinov2 if not given.",
    )
    parser.add_argument(
        "--resolution",
        type=number(int, 1),
        help="Cut the images of REF to this side, as ADM prepares ImageNet; never SAMPLES.",
    )
    parser.add_argument(
        "--samples_split", metavar="SPLIT", help="Split of SAMPLES, if a data set; train if not given."
    )
    parser.add_argument("--reference_split", metavar="SPLIT", help="Split of REF, if a data set; train if not given.")
    parser.add_argument("--image_column", default="image", help="Column of images in a data set.")
    parser.add_argument(
        "--inception_weights",
        metavar="FILE",
        help="Weights of Inception as torch-fidelity publishes them; without it that file is downloaded once.",
    )
    parser.add_argument("--dinov2_model", default=PROTOCOL_DINOV2, metavar="ID_OR_DIR", help="Model for fd_dinov2.")
    parser.add_argument("--batch_size", type=number(int, 1), default=64, help="Images at a time in one process.")
    parser.add_argument(
        "--cache_dir", default=str(default_cache_dir()), help="Where features are kept, 20 kB per image."
    )
    parser.add_argument("--output_dir", required=True, help=f"Folder that {RESULTS_FILE} goes to.")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Replace the results that are there.")
    parser.add_argument(
        "--update_card",
        metavar="DIR",
        help=f"Folder of the pipeline that drew SAMPLES: writes the results into its model card and {RESULTS_FILE}.",
    )
    group = parser.add_argument_group("a whole training run")
    group.add_argument(
        "--checkpoints",
        metavar="DIR",
        help="In place of SAMPLES, the --output_dir of a training run: evaluates every checkpoint-N in it and plots "
        f"the metrics against the step ({CURVES_FILE}). Samples are those of checkpoint-N/samples/samples.npz where "
        "there are any, else those that examples/sample.py would draw from checkpoint-N/pipeline: not stored.",
    )
    group.add_argument(
        "--num_images", type=number(int, 1), default=PROTOCOL_IMAGES, help="Images to draw from each checkpoint."
    )
    group.add_argument("--num_inference_steps", type=number(int, 1), default=250, help="Steps for drawing them.")
    add_precision_arguments(group)


def run(args: argparse.Namespace) -> None:
    """Runs `diffusers-lsep evaluate` with the arguments of [`add_arguments`]."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # 1. What can be refused at once
    if (args.samples is None) == (args.checkpoints is None):
        raise ValueError(
            f"exactly one of `SAMPLES` and `--checkpoints` has to be given, but they are {args.samples!r} and"
            f" {args.checkpoints!r}."
        )
    if args.checkpoints is None:
        drawing = ("num_images", "num_inference_steps", "dtype", "allow_tf32")
        args.parser.refuse_without("--checkpoints, whose samples may have to be drawn", args, drawing)
    else:
        args.parser.refuse_without("SAMPLES", args, "samples_split")
    if "fd_dinov2" not in (args.metrics or ()):
        args.parser.refuse_without("--metrics fd_dinov2", args, "dinov2_model")
    if args.update_card is not None and args.checkpoints is not None:
        raise ValueError("`--update_card` needs `SAMPLES`: a card is about one model, not about `--checkpoints`.")
    if args.update_card is not None and not (Path(args.update_card) / "model_index.json").is_file():
        raise ValueError(f"`--update_card` has to be the folder of a saved pipeline, but is {args.update_card!r}.")
    if args.update_card is not None and (Path(args.update_card) / CARD_NAME).is_file():
        load_card(Path(args.update_card) / CARD_NAME)
    output_dir = Path(args.output_dir)
    output_files = [output_dir / name for name in (RESULTS_FILE, CURVES_FILE)[: 2 if args.checkpoints else 1]]
    for name in ("output_dir", "cache_dir", "update_card"):
        if getattr(args, name) is not None:
            check_writable(f"--{name}", getattr(args, name))
    on_card = args.update_card is not None and output_dir.resolve() == Path(args.update_card).resolve()
    # They are written last: without them the curves are of a run that was killed.
    if output_files[0].exists() and not args.overwrite_output_dir and not on_card:
        raise ValueError(f"`--output_dir` already holds {output_files[0]}; `--overwrite_output_dir` replaces it.")
    if args.checkpoints is not None:
        require_matplotlib(CURVES_FILE)

    # 2. The work
    reference = open_images(args.reference, "reference", args.resolution, args.reference_split, args.image_column)
    options = {
        "metrics": args.metrics,
        "inception_weights": args.inception_weights,
        "dinov2_model": args.dinov2_model,
        "batch_size": args.batch_size,
        "cache_dir": args.cache_dir,
    }
    is_main = process_state().is_main_process
    if args.checkpoints is not None:
        entries = []
        drawn = (args.num_images, args.num_inference_steps, DTYPES[args.dtype], args.allow_tf32)
        for step, samples in milestone_samples(args.checkpoints, *drawn):
            entries.append({"step": step, **evaluate_images(samples, reference, **options)})
        results: dict[str, Any] = {"checkpoints": entries}
        rows = {f"step {entry['step']}": entry["metrics"] for entry in entries}
    else:
        given = open_images(args.samples, "samples", None, args.samples_split, args.image_column)
        weights = _weights_of(args.update_card, given) if args.update_card is not None else {}
        results = {**evaluate_images(given, reference, **options), **weights}
        rows = {results["samples"]: results["metrics"]}
    if not is_main:
        return

    # 3. Results
    output_dir.mkdir(parents=True, exist_ok=True)
    if args.checkpoints is not None:
        steps = [entry["step"] for entry in results["checkpoints"]]
        values = list(rows.values())
        plot_metrics(
            output_dir / CURVES_FILE, steps, values, {name: _title(name) for name in METRICS if name in values[0]}
        )
    if args.update_card is not None:
        # This one goes to the Hub.
        write_text(Path(args.update_card) / RESULTS_FILE, json.dumps(without_folders(results), indent=2) + "\n")
        update_evaluation(args.update_card)
    if not on_card:
        write_text(output_files[0], json.dumps(results, indent=2) + "\n")
    print(format_table(rows))
    print(f"\nwritten: {', '.join(str(path) for path in output_files)}")


def _weights_of(pipeline: str, samples: ImageSet) -> dict[str, Any]:
    """Hashes of the weights of a saved pipeline, for the results; refuses samples that others drew."""
    saved = SavedPipeline(Path(pipeline))
    drawn_by = samples.settings.get("weights")
    if isinstance(drawn_by, dict) and (saved.index.get("guidance_transformer") or [None])[0] is None:
        # A weaker model from elsewhere is a setting of the drawing.
        drawn_by = {name: digest for name, digest in drawn_by.items() if name != "guidance_transformer"}
    if not isinstance(drawn_by, dict):
        if process_state().is_main_process:
            logger.warning(f"`samples` {samples.name!r} do not say which weights drew them, {pipeline!r} is believed")
        return {"weights": saved.hashes}
    others = saved.find_differences(drawn_by)
    if others:
        raise ValueError(
            f"`--update_card` has to be the pipeline that drew `SAMPLES`, but {samples.name!r} was drawn by other "
            f"weights ({', '.join(others)}) than those in {pipeline!r}."
        )
    return {"weights": saved.hashes}


def _title(name: str) -> str:
    return f"{METRICS[name]} {'↑' if name in HIGHER_IS_BETTER else '↓'}"


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Metrics as a Markdown table, one line for each set of samples; arrows point to the better side."""
    names = [name for name in METRICS if any(name in values for values in rows.values())]
    table = [["samples", *(_title(name) for name in names)]]
    for row, values in rows.items():
        cells = [f"{values[name]:.{2 if name == 'inception_score' else 4}f}" for name in names]
        if "kid" in names:
            cells[names.index("kid")] = f"{values['kid']:.6f} ± {values['kid_std']:.6f}"
        table.append([row, *cells])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
