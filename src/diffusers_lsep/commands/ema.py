# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`diffusers-lsep ema`: the pipeline of a training run with an average of another length (post-hoc EMA)."""

import argparse
import json
import logging
from pathlib import Path

from ..command_line import check_output_dir, number
from ..files import whole_folder, write_text
from ..objective import LinearProbe
from ..pipeline_lsep import LSEPPipeline
from ..training.checkpoints import PIPELINE_FOLDER, list_checkpoints
from ..training.fine_tuning import fill_classes
from ..training.output_folder import SETTINGS_FILE
from ..training.post_hoc_ema import reconstruct_average


logger = logging.getLogger(__name__)

FACTS_FILE = "post_hoc_ema.json"
# Of a profile that is missed by more, the average is another one than was asked for.
MAX_PROFILE_ERROR = 0.05
_WRITTEN = {"README.md", "model_index.json", "transformer", "scheduler", "vae", "probe", SETTINGS_FILE, FACTS_FILE}


def add_arguments(parser: argparse.ArgumentParser):
    """Adds the arguments of `diffusers-lsep ema`."""
    parser.description = (
        "Makes the pipeline of a training run once more, with an average of the weights of another length: from the "
        "snapshots of a run with --post_hoc_ema_sigmas (post-hoc EMA, arXiv 2312.02696)."
    )
    parser.add_argument("folder", metavar="RUN", help="The --output_dir of the run, which may still be going on.")
    parser.add_argument(
        "--sigma_rel",
        type=float,
        required=True,
        help="Length of the average in parts of the run, the standard deviation of its profile: above 0, at most"
        " 0.2886. At 0.05 the averaged weights are as old as 5 percent of the run, in the mean.",
    )
    parser.add_argument(
        "--step", type=number(int, 1), help="The step after which, one with a snapshot; the last one if not given."
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="Where the pipeline is written.")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="Replace the pipeline that is in --output_dir."
    )


def run(args: argparse.Namespace):
    """Does the work of `diffusers-lsep ema`."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # 1. What can be refused at once
    run = Path(args.folder)
    is_own = _WRITTEN.issuperset
    output_dir = check_output_dir(args.output_dir, args.overwrite_output_dir, is_own, "a pipeline of this command")
    source = _find_pipeline(run)
    averages, facts = reconstruct_average(run, args.sigma_rel, args.step)

    # 2. The models with these weights
    pipe = LSEPPipeline.from_pretrained(source)
    models = {"transformer": pipe.transformer}
    if (source / "probe").is_dir():
        models["probe"] = LinearProbe.from_pretrained(source, subfolder="probe")
    for name, model in models.items():
        weights = {k.removeprefix(f"{name}."): v for k, v in averages.items() if k.startswith(f"{name}.")}
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"`RUN` {args.folder!r} has snapshots of another model than {source}: {error}") from error
    settings = run / SETTINGS_FILE
    if json.loads(settings.read_text(encoding="utf-8"))["unconditional"]:
        fill_classes(pipe.transformer)

    # 3. Results; with the settings `diffusers-lsep probe` finds what the run held out
    with whole_folder(output_dir) as partial:
        pipe.save_pretrained(partial)
        if "probe" in models:
            models["probe"].save_pretrained(partial / "probe")
        write_text(partial / SETTINGS_FILE, settings.read_text(encoding="utf-8"))
        write_text(partial / FACTS_FILE, json.dumps({"run": args.folder, **facts}, indent=2) + "\n")
    print(
        f"{output_dir}: the average of sigma_rel {facts['sigma_rel']:g} after step {facts['step']:,}, from"
        f" {facts['num_snapshots']} snapshots; its profile is missed by {facts['profile_error']:.2%}"
    )
    if facts["profile_error"] > MAX_PROFILE_ERROR:
        logger.warning(
            "this is not the average that was asked for, but the nearest one that the snapshots allow: more of them"
            " (`--post_hoc_ema_steps`), or lengths nearer to this one (`--post_hoc_ema_sigmas`), come closer"
        )


def _find_pipeline(run: Path) -> Path:
    """A pipeline of the run, for all that is no average: its own, or that of its last checkpoint."""
    candidates = [run, *(folder / PIPELINE_FOLDER for _, folder in reversed(list_checkpoints(run)))]
    for folder in candidates:
        if (folder / "model_index.json").is_file() and (run / SETTINGS_FILE).is_file():
            return folder
    raise ValueError(
        f"`RUN` {str(run)!r} has to be the --output_dir of a training run that has a checkpoint, but there is none."
    )
