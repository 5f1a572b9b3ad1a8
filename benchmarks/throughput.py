# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Images per second on a GPU: training, its memory, sampling, and attention, against the original code's settings.

    python benchmarks/throughput.py                                              # SiT-XL/2 at 256 px
    python benchmarks/throughput.py --ways original regional --batch_sizes 32    # some of it
    python benchmarks/throughput.py --simulate --preset SiT-S/8 --batch_sizes 4  # without a GPU, to try the script

A training step is all of it: forward, backward, clipping, AdamW and the average. The baseline (`straightforward.py`)
is trained in float16 autocast with a scaler, AdamW without fusion, not compiled, and sampled in float32 with TF32 and
attention that is not fused; ours in bfloat16. Steps are timed by events on the device, for `--seconds` and without a
synchronisation in between. The utilisation counts the operations that the method needs (the probe's stream on the 82
per cent of the samples whose labels differ), without what is computed again, over the peak of the device. Latents and
labels are random: what the numbers are does not change the time. Last comes a run of `examples/train_lsep.py` on every
GPU, with its loader and its processes.

The results are written after every row, so what has been measured is there whatever comes after it.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.training_utils import EMAModel
from roofline import SHARED, Shape, formula_flops
from simulated_cuda import simulated_cuda
from straightforward import StraightforwardSiT, straightforward_loss
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_step import make_draws, separate_rows

from diffusers_lsep import (
    SIT_PRESETS,
    FlowMatchSDEScheduler,
    LinearProbe,
    LSEPObjective,
    LSEPPipeline,
    SiTTransformer2DModel,
)
from diffusers_lsep.attention_processors import SiTConcatenatedAttnProcessor
from diffusers_lsep.training.memory import FusedAttention


CLASSES = 1000
WARMUP = 3
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# Dense bfloat16 in TFLOP/s, by the data sheets; the first name that is a part of the device's.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "H800": 989, "B200": 2250, "A100": 312}
PEAKS |= {"A800": 312, "A10G": 70, "A10": 125, "L40S": 362, "L4": 121, "RTX 4090": 165}

# cuDNN's attention where it can, in place of FlashAttention 2. diffusers' `_native_cudnn` copies q, k and v for it.
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Way:
    """How to train."""

    compiles: str | None = None  # "whole", or "regional": block by block, which is compiled much sooner
    checkpoints: bool = False
    budget: float = 1.0  # of the activations that the compiler would keep
    concatenates: bool = False  # one product for queries, keys and values
    cudnn: bool = False


WAYS = {
    "original": None,
    "eager": Way(),
    "regional": Way("regional"),
    "regional-cudnn": Way("regional", cudnn=True),
    "regional-cudnn-qkv": Way("regional", cudnn=True, concatenates=True),
    "regional-budget": Way("regional", budget=0.9),
    "regional-checkpointing": Way("regional", checkpoints=True),
    "compiled": Way("whole"),
}


class Report:
    """The results, in a file that is whole after every row."""

    def __init__(self, path: Path, head: dict[str, Any]):
        self.path, self.results = path, head
        path.parent.mkdir(parents=True, exist_ok=True)

    def measure(self, part: str, row: dict[str, Any], function: Callable[[], dict[str, Any]]):
        """Adds what a function finds to a row; that it ran out of memory, or another error, is what it finds too."""
        try:
            row |= function()
        except Exception as error:  # backends of attention that are not installed fail in many ways
            row["error"] = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"[:300]
        self.results.setdefault(part, []).append(row)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=2) + "\n")
        os.replace(partial, self.path)
        print(json.dumps({"part": part, **row}), flush=True)


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch's own error, or those of libraries that find no room for their workspace."""
    words = ("out of memory", "ALLOC_FAILED", "NOT_ENOUGH_WORKSPACE")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(word in str(error) for word in words)


class Bench:
    """Device, model and time of all measurements."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.name, self.size, self.seconds, self.device = args.preset, args.sample_size, args.seconds, device
        self.preset = SIT_PRESETS[args.preset]
        self.simulated, self.peak = args.simulate, args.peak_tflops
        self.grid = self.size // self.preset["patch_size"]
        self.depth = min(8, self.preset["num_layers"] // 3)

    def transformer(self) -> SiTTransformer2DModel:
        with self.device:
            return SiTTransformer2DModel(**self.preset, sample_size=self.size, num_classes=CLASSES)

    def objective(self) -> LSEPObjective:
        transformer = self.transformer().train()
        with self.device:
            probe = LinearProbe(transformer.inner_dim, CLASSES)
            return LSEPObjective(transformer, probe, probe_depth=self.depth)

    def straightforward(self) -> StraightforwardSiT:
        heads = self.preset["num_attention_heads"]
        width = heads * self.preset["attention_head_dim"]
        shape = (self.size, 4, self.preset["patch_size"], self.preset["num_layers"], width, heads, CLASSES)
        return StraightforwardSiT(*shape, probe_depth=self.depth).to(self.device)

    def draws(self, batch_size: int) -> dict[str, torch.Tensor]:
        low = max(1, 3 * self.grid // 4)
        draws = make_draws(batch_size, round(SHARED * batch_size), self.size, grid=self.grid, low=low)
        draws["separate_rows"] = separate_rows(draws)
        return {name: tensor.to(self.device) for name, tensor in draws.items()}

    def time(self, step: Callable[[], Any]) -> float | None:
        """Seconds of a step, the mean over at least `seconds`; None where nothing is computed."""
        if self.simulated:
            step()
            return None
        for _ in range(WARMUP):
            step()
        count = 1
        while True:
            elapsed = self.time_many(step, count)
            if elapsed >= self.seconds:
                return elapsed / count
            count = max(count + 1, int(1.1 * count * self.seconds / max(elapsed, 1e-9)))

    def time_many(self, step: Callable[[], Any], count: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(count):
                step()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(count):
            step()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3


def free():
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_our_step(bench: Bench, batch_size: int, way: Way) -> Callable[[], None]:
    """A whole step of training with the settings of `examples/train_lsep.py --mixed_precision bf16`."""
    objective = model = bench.objective()
    if way.checkpoints:
        objective.transformer.enable_gradient_checkpointing()
    if way.concatenates:
        objective.transformer.set_attn_processor(SiTConcatenatedAttnProcessor())
    functorch_config.activation_memory_budget = way.budget
    draws = bench.draws(batch_size)
    if way.compiles is not None and not bench.simulated:
        torch._dynamo.maybe_mark_dynamic(draws["separate_rows"], 0)
        if way.compiles == "whole":
            model = torch.compile(objective, fullgraph=True)
        else:
            objective.transformer.compile_repeated_blocks(fullgraph=True)
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0, fused=True)
    average = EMAModel(parameters, decay=0.9999, foreach=True)
    average.optimization_step = 1

    def step():
        kernels = sdpa_kernel(CUDNN_FIRST, set_priority=True) if way.cudnn else contextlib.nullcontext()
        with torch.autocast(bench.device.type, torch.bfloat16), kernels:
            loss = model(**draws).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)

    return step


def make_original_step(bench: Bench, batch_size: int) -> Callable[[], None]:
    """A whole step with the original's settings; on a CPU in bfloat16, as float16 is slow there."""
    model, draws = bench.straightforward(), bench.draws(batch_size)
    # Its loop over the crops reads them on the host, in every step.
    draws["crop_window"] = draws["crop_window"].cpu()
    draws.pop("separate_rows")
    weights = torch.linspace(0.0225, 0.03, 10).to(bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, foreach=True)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    dtype = torch.float16 if bench.device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(bench.device.type, enabled=dtype == torch.float16)

    def step():
        with torch.autocast(bench.device.type, dtype):
            loss = straightforward_loss(model, draws, weights)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, parameter in zip(average, model.parameters()):
                mean.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)

    return step


def measure_training(bench: Bench, report: Report, batch_sizes: list[int], names: list[str]):
    """Images per second, utilisation and memory of every way to train."""
    for batch_size, name in itertools.product(batch_sizes, names):
        flops = formula_flops(Shape(bench.preset, bench.size, batch_size, bench.depth)) / batch_size

        def measure(batch_size=batch_size, way=WAYS[name], flops=flops) -> dict[str, Any]:
            step = make_original_step(bench, batch_size) if way is None else make_our_step(bench, batch_size, way)
            seconds = bench.time(step)
            found: dict[str, Any] = {"gflop_per_image": flops / 1e9}
            if seconds is not None:
                found["images_per_second"] = batch_size / seconds
                if bench.peak is not None:
                    found["utilisation"] = found["images_per_second"] * flops / (1e12 * bench.peak)
            if bench.device.type == "cuda":
                found["gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
            return found

        free()
        report.measure("training", {"way": name, "batch_size": batch_size}, measure)
    functorch_config.activation_memory_budget = 1.0


def measure_sampling(bench: Bench, report: Report, batch_size: int, steps: int):
    """Euler-Maruyama with guidance everywhere, the pipeline against a loop around the straightforward network."""
    labels = torch.arange(batch_size, device=bench.device) % CLASSES
    sizes = (batch_size, 4, bench.size, bench.size)

    def original() -> Callable[[], Any]:
        baseline = bench.straightforward().eval()

        @torch.no_grad()
        def draw():
            x = torch.randn(sizes, device=bench.device, dtype=torch.float64)
            times = [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
            both_labels = torch.cat([labels, torch.full_like(labels, CLASSES)])
            with sdpa_kernel(SDPBackend.MATH):
                for t, following in zip(times, times[1:]):
                    time_both = torch.full((2 * batch_size,), t, device=bench.device)
                    v, v_null = baseline(torch.cat([x, x]).float(), time_both, both_labels).chunk(2)
                    v = (v_null + 1.8 * (v - v_null)).double()
                    x = x + ((2 - t) * v + x) * (following - t)
                    if following > 0:
                        x = x + (2 * t * (t - following)) ** 0.5 * torch.randn_like(x)

        return draw

    def ours(compiles: bool = False) -> Callable[[], Any]:
        pipe = LSEPPipeline(bench.transformer().to(torch.bfloat16).eval(), FlowMatchSDEScheduler())
        if compiles and not bench.simulated:
            pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        pipe.set_progress_bar_config(disable=True)
        ids = [index % CLASSES for index in range(batch_size)]
        return lambda: pipe(ids, num_inference_steps=steps, guidance_scale=1.8, output_type="latent")

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for name, make in {"original": original, "eager": ours, "compiled": lambda: ours(True)}.items():
            free()

            def measure(make=make) -> dict[str, Any]:
                seconds = bench.time(make())
                return (
                    {} if seconds is None else {"images_per_second_at_250_steps": batch_size / seconds * steps / 250}
                )

            report.measure("sampling", {"way": name, "batch_size": batch_size, "steps": steps}, measure)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def measure_attention(bench: Bench, report: Report, batch_size: int):
    """Forward and backward of an attention in bfloat16 by every backend, in the layout of the model; and padded."""
    heads, head = bench.preset["num_attention_heads"], bench.preset["attention_head_dim"]
    shape = (batch_size, bench.grid**2, heads * head)

    def row(function: Callable) -> Callable[[], dict[str, Any]]:
        def measure() -> dict[str, Any]:
            inputs = [torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for _ in range(3)]
            inputs = [x.requires_grad_() for x in inputs]
            q_k_v = [x.unflatten(-1, (heads, head)) for x in inputs]
            seconds = bench.time(lambda: function(*q_k_v).sum().backward())
            return {} if seconds is None else {"milliseconds": 1e3 * seconds}

        return measure

    def cudnn_first(*q_k_v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):
            return dispatch_attention_fn(*q_k_v)

    def padded(width: int) -> Callable:
        def attend(*q_k_v: torch.Tensor) -> torch.Tensor:
            q, k, v = (F.pad(x, (0, width - head)).transpose(1, 2) for x in q_k_v)
            return F.scaled_dot_product_attention(q, k, v, scale=head**-0.5)[..., :head].transpose(1, 2)

        return attend

    ways: dict[str, Callable] = {"native, cuDNN first": cudnn_first}
    for backend in AttentionBackendName:
        ways[backend.value] = lambda *q_k_v, backend=backend.value: dispatch_attention_fn(*q_k_v, backend=backend)
    for width in sorted({-(-head // step) * step for step in (16, 32, 64)} - {head}):
        ways[f"native, heads padded to {width}"] = padded(width)
    for name, function in ways.items():
        report.measure("attention", {"backend": name, "head": head, "batch_size": batch_size}, row(function))


def measure_run(bench: Bench, report: Report, batch_size: int, steps: int):
    """`examples/train_lsep.py` on every GPU, or on the CPU where there is none: with its loader and processes."""
    num_gpus = 0 if bench.simulated or bench.device.type != "cuda" else torch.cuda.device_count()

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_latents(folder / "latents", 4 * batch_size, bench.size)
            blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
            AutoencoderKL(3, 3, *blocks, (8, 8, 8, 8), latent_channels=4, norm_num_groups=8).save_pretrained(
                folder / "vae"
            )
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", max(1, num_gpus)]
            command = [sys.executable, *launcher, EXAMPLES / "train_lsep.py", "--preset", bench.name]
            command += ["--latents_dir", folder / "latents", "--pretrained_vae_model_name_or_path", folder / "vae"]
            command += ["--output_dir", folder / "run", "--train_batch_size", batch_size, "--max_train_steps", steps]
            command += ["--mixed_precision", "bf16", "--logging_steps", max(1, steps // 4), "--report_to", "none"]
            command += ["--num_validation_images", 1, "--validation_inference_steps", 1, "--validation_labels", 0]
            command += ["--dataloader_num_workers", 4 if num_gpus else 0]
            environment = {**os.environ, "ACCELERATE_USE_CPU": "false" if num_gpus else "true"}
            done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"train_lsep.py ended with {done.returncode}: {done.stderr[-200:]}")
            lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        last = next(line for line in reversed(lines) if "images_per_second" in line)
        return {name: last[name] for name in ("images_per_second", "data_wait", "memory_gb")}

    free()
    report.measure("run", {"processes": max(1, num_gpus), "batch_size": batch_size, "steps": steps}, measure)


def write_latents(folder: Path, count: int, size: int):
    """Random moments in the layout of EDM2 and REPA, one file for each image."""
    (folder / "00000").mkdir(parents=True)
    rng, labels = np.random.default_rng(0), []
    for index in range(count):
        name = f"00000/img-mean-std-{index:08d}.npy"
        np.save(folder / name, np.abs(rng.standard_normal((8, size, size), dtype=np.float32)))
        labels.append([name, index % CLASSES])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def profile_step(bench: Bench, batch_size: int, path: Path):
    """Where the time of a step goes: a table, and a trace for chrome://tracing or perfetto.dev."""
    free()
    step = make_our_step(bench, batch_size, WAYS["regional"])
    for _ in range(WARMUP):
        step()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda" and not bench.simulated:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        step()
    order = "self_cuda_time_total" if len(kinds) > 1 else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=70)
    path.with_suffix(".profile.txt").write_text(table + "\n")
    profile.export_chrome_trace(str(path.with_suffix(".trace.json")))
    print(f"{path.with_suffix('.profile.txt')} and {path.with_suffix('.trace.json')} have the profile of a step")


PARTS = ("training", "sampling", "attention", "run", "profile")


def find_peak(name: str) -> float | None:
    """Of a device by its name, dense bfloat16 in TFLOP/s."""
    return next((peak for part, peak in PEAKS.items() if part.lower() in name.lower()), None)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(SIT_PRESETS), default="SiT-XL/2")
    parser.add_argument("--sample_size", type=int, default=32, help="Side of the latents: 64 for 512 px.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="Ways to train.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--seconds", type=float, default=5.0, help="How long to time each row, at least. Default: 5.")
    parser.add_argument("--sampling_batch_size", type=int, default=64)
    parser.add_argument("--sampling_steps", type=int, default=25, help="Their time is that of 250, for a tenth of it.")
    parser.add_argument("--run_steps", type=int, default=100, help="Of the run of train_lsep.py. Default: 100.")
    parser.add_argument("--peak_tflops", type=float, help="Of the device, dense bfloat16, if its name is not known.")
    parser.add_argument("--simulate", action="store_true", help="Pretend that there is a GPU, and compute nothing.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/throughput.json"))
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        if args.simulate:
            stack.enter_context(simulated_cuda(readable=True))
            stack.enter_context(FusedAttention())  # PyTorch asks the driver which of its kernels fit
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
        args.peak_tflops = args.peak_tflops or find_peak(name)
        name = f"simulated: {name}" if args.simulate else name
        print(f"{args.preset}, latents 4 x {args.sample_size} x {args.sample_size}, torch {torch.__version__}, {name}")
        head = {"preset": args.preset, "sample_size": args.sample_size, "device": name, "torch": torch.__version__}
        bench, report = Bench(args, device), Report(args.output, {**head, "peak_tflops": args.peak_tflops})
        if "training" in args.parts:
            measure_training(bench, report, args.batch_sizes, args.ways)
        if "sampling" in args.parts:
            measure_sampling(bench, report, args.sampling_batch_size, args.sampling_steps)
        if "attention" in args.parts:
            measure_attention(bench, report, args.batch_sizes[-1])
        if "run" in args.parts:
            measure_run(bench, report, args.batch_sizes[0], args.run_steps)
        if "profile" in args.parts:
            profile_step(bench, args.batch_sizes[0], args.output)


if __name__ == "__main__":
    main()
