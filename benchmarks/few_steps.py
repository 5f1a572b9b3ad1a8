# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Images in 1 to 8 steps: a flow map beside the model that it was made of.

    python benchmarks/few_steps.py --data digits                       # trains the teacher, too
    python benchmarks/few_steps.py --data mnist --teacher lsep-mnist   # can be killed and started again
    python benchmarks/few_steps.py --data mnist --teacher lsep-mnist --max_train_steps 2000 --seeds 0 1 2

A flow map is trained by `train_lsep.py @examples/configs/mnist @examples/configs/few-steps/flow-map` (or `digits`) in
batches of 64 on one thread, from the pipeline `--teacher`, or one that is trained by the recipe without LSEP first. Of
either 1,000 samples without guidance are judged by their Frechet distance to the training images: on pixels and, of
MNIST, in the features of the classifier of `mnist_classifier.py`. The teacher draws with Euler-Maruyama, the SDE
solver of second order and Heun's method.

`--results_dir` gets a file for each model, the table `few_steps.md` and `few_steps.png`, the same noise in all rows.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import DiffusionPipeline
from digits_runs import DIGITS, EXAMPLES, draw, pixel_distance, read_digits, train
from mnist_classifier import MNIST
from PIL import Image
from regularizers import Judge

from diffusers_lsep import (
    FlowMapScheduler,
    FlowMatchHeunODEScheduler,
    FlowMatchSDEMultistepScheduler,
    FlowMatchSDEScheduler,
    LSEPPipeline,
)
from diffusers_lsep.files import write_text


NUM_SAMPLES = 1000
FLOW_MAP = f"@{EXAMPLES / 'configs' / 'few-steps' / 'flow-map'}"
# Scheduler and steps by name and evaluations.
TEACHER = {
    **{("Euler-Maruyama", n): (FlowMatchSDEScheduler(), n) for n in (8, 64, 250)},
    **{("SDE order 2", n): (FlowMatchSDEMultistepScheduler(), n) for n in (8, 64)},
    **{("Heun", 2 * n - 1): (FlowMatchHeunODEScheduler(), n) for n in (1, 2, 4, 32)},
}
STUDENT = {
    **{("flow map", n): (FlowMapScheduler(), n) for n in (1, 2, 4, 8)},
    **{("flow map, renoising 1", n): (FlowMapScheduler(renoising=1.0), n) for n in (2, 4, 8)},
}


def make_judge(data: str) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    if data == "mnist":
        judge = Judge()
        return lambda pixels, classes: judge(pixels, classes, 10)
    real = read_digits()["train"][0]
    return lambda pixels, classes: {"frechet_distance": pixel_distance(pixels, real)}


def judge_pipeline(folder: Path, samplers: dict, judge: Callable, seed: int, path: Path) -> dict:
    """What was found, by name and evaluations; each is written before the next is drawn."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    pipe = DiffusionPipeline.from_pretrained(folder)
    classes = np.arange(NUM_SAMPLES) % 10
    for (name, evaluations), (scheduler, steps) in samplers.items():
        key = f"{name}, {evaluations}"
        if key not in found:
            pipe.scheduler = scheduler
            found[key] = judge(draw(pipe, classes.tolist(), seed, num_inference_steps=steps), classes)
            print(f"{path.stem}: {key}: {found[key]}", flush=True)
            write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def draw_picture(teacher: LSEPPipeline, student: LSEPPipeline, path: Path, seed: int):
    """A row of the ten digits for each number of steps, all from the same noise; the teacher's first."""
    rows = []
    for pipe, scheduler, steps in (
        (teacher, FlowMatchHeunODEScheduler(), 125),
        *((student, FlowMapScheduler(), steps) for steps in (8, 4, 2, 1)),
    ):
        pipe.scheduler = scheduler
        side = pipe.transformer.config.sample_size
        row = draw(pipe, list(range(10)), seed, num_inference_steps=steps).reshape(10, side, side)
        rows.append(np.concatenate(list(np.pad(row, ((0, 0), (1, 1), (1, 1)), constant_values=1)), axis=1))
    pixels = (255 * np.concatenate(rows)).round().astype(np.uint8)
    Image.fromarray(pixels).resize([4 * pixels.shape[1], 4 * pixels.shape[0]], Image.Resampling.NEAREST).save(path)


def make_table(results: list[tuple[str, dict]]) -> str:
    """Markdown: means over the seeds, and their standard deviations."""
    measures = list(next(iter(results[0][1].values())))
    lines = [f"| sampler, evaluations | {' | '.join(m.replace('_', ' ') for m in measures)} | seeds |"]
    lines.append("|---" * (len(measures) + 2) + "|")
    for key in dict.fromkeys(key for _, found in results for key in found):
        rows = [found[key] for _, found in results if key in found]
        cells = []
        for measure in measures:
            values = [row[measure] for row in rows]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3g}{spread}")
        lines.append(f"| {key} | {' | '.join(cells)} | {len(rows)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", choices=["digits", "mnist"])
    parser.add_argument("--teacher", type=Path, help="default: trained first")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--derivative", default="difference", choices=["jvp", "difference"])
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results/few_steps"))
    parser.add_argument("--results_dir", type=Path, help="default: OUTPUT_DIR/results")
    args = parser.parse_args()
    results_dir = args.results_dir or args.output_dir / "results"
    for folder in (args.output_dir, results_dir):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()

    images, judge, results = DIGITS if args.data == "digits" else MNIST, make_judge(args.data), []
    for seed in args.seeds:
        common = ("--seed", seed, "--resume_from_checkpoint", "latest", "--checkpointing_steps", 100)
        teacher = args.teacher
        if teacher is None:
            teacher = args.output_dir / f"{args.data}-teacher-{seed}"
            train(teacher, images, "--no_lsep", *common, recipe=args.data)
        student = args.output_dir / f"{args.data}-flow-map-{seed}"
        flags = ("--max_train_steps", args.max_train_steps, "--learning_rate", args.learning_rate)
        flags += ("--train_batch_size", 64, "--flow_map_derivative", args.derivative, "--validation_steps", 10**6)
        start = ("--pretrained_model_name_or_path", teacher.resolve())
        train(student, images, FLOW_MAP, *start, *flags, *common, recipe=args.data)
        for kind, folder, samplers in (("flow-map", student, STUDENT), ("teacher", teacher, TEACHER)):
            path = results_dir / f"{args.data}-{kind}-{seed}.json"
            results.append((kind, judge_pipeline(folder, samplers, judge, seed, path)))
            write_text(results_dir / f"few_steps_{args.data}.md", make_table(results) + "\n")
    pipes = [DiffusionPipeline.from_pretrained(folder) for folder in (teacher, student)]
    draw_picture(*pipes, results_dir / f"few_steps_{args.data}.png", args.seeds[0])


if __name__ == "__main__":
    main()
