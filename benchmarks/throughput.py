# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Images per second on a GPU: training, its memory, sampling, and attention, against the original code's settings.

    python benchmarks/throughput.py --peak_tflops 989                        # SiT-XL/2 at 256 px
    python benchmarks/throughput.py --preset SiT-S/8 --batch_sizes 4 --sampling_batch_size 2   # on a CPU, to try it

A training step is all of it: forward, backward, clipping, AdamW and the average. The baseline (`straightforward.py`)
is trained in float16 autocast with a scaler, AdamW without fusion, not compiled, and sampled in float32 with TF32 and
attention that is not fused; ours in bfloat16, compiled. The utilisation counts the operations that the method needs
(the probe's stream on the 82 % of the samples whose labels differ), without what gradient checkpointing computes
again, over `--peak_tflops`. Latents and labels are random: what the numbers are does not change the time.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from pairs import paired_ratio
from straightforward import StraightforwardSiT, straightforward_loss
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_step import make_draws, separate_rows

from diffusers_lsep import (
    SIT_PRESETS,
    FlowMatchSDEScheduler,
    LinearProbe,
    LSEPObjective,
    LSEPPipeline,
    SiTTransformer2DModel,
)


CLASSES = 1000
SHARED = 0.18  # of the samples have the same label in both streams


class Shapes:
    """The networks of both sides for a preset."""

    def __init__(self, preset: str, sample_size: int, device: torch.device):
        self.name, self.preset, self.size, self.device = preset, SIT_PRESETS[preset], sample_size, device
        self.grid = sample_size // self.preset["patch_size"]
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
        with self.device:
            return StraightforwardSiT(*shape, probe_depth=self.depth)

    def draws(self, batch_size: int) -> dict[str, torch.Tensor]:
        low = max(1, 3 * self.grid // 4)
        draws = make_draws(batch_size, round(SHARED * batch_size), self.size, grid=self.grid, low=low)
        return {name: tensor.to(self.device) for name, tensor in draws.items()}


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free():
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_our_step(shapes: Shapes, batch_size: int, compiles: bool, checkpoints: bool = False) -> Callable[[], None]:
    """A whole step of training with the settings of `examples/train_lsep.py --mixed_precision bf16`."""
    objective = shapes.objective()
    if checkpoints:
        objective.transformer.enable_gradient_checkpointing()
    model = torch.compile(objective, fullgraph=True) if compiles else objective
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0, fused=True)
    average = EMAModel(parameters, decay=0.9999, foreach=True)
    draws = shapes.draws(batch_size)
    draws["separate_rows"] = separate_rows(draws)
    torch._dynamo.maybe_mark_dynamic(draws["separate_rows"], 0)

    def step():
        with torch.autocast(shapes.device.type, torch.bfloat16):
            loss = model(**draws).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)
        synchronize()

    return step


def make_baseline_step(shapes: Shapes, batch_size: int) -> Callable[[], None]:
    """A whole step with the original's settings; on a CPU in bfloat16, as float16 is slow there."""
    model, draws = shapes.straightforward(), shapes.draws(batch_size)
    weights = torch.linspace(0.0225, 0.03, 10).to(shapes.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, foreach=True)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    dtype = torch.float16 if shapes.device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(shapes.device.type, enabled=dtype == torch.float16)

    def step():
        with torch.autocast(shapes.device.type, dtype):
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
        synchronize()

    return step


def count_flops(shapes: Shapes) -> float:
    """Operations per image, forward and backward: those of the products in a step of 50 samples on no device."""
    meta = Shapes(shapes.name, shapes.size, torch.device("meta"))
    objective, batch_size = meta.objective(), 50
    rows = torch.arange(round((1 - SHARED) * batch_size), device="meta")
    counter = FlopCounterMode(display=False)
    # The plain formula: every product and sum of attention is counted, whichever kernel computes it.
    with counter, sdpa_kernel(SDPBackend.MATH):
        objective(**meta.draws(batch_size), separate_rows=rows).loss.backward()
    return counter.get_total_flops() / batch_size


def measure_training(shapes: Shapes, batch_sizes: list[int], steps: int, peak_tflops: float | None) -> list[dict]:
    """Images per second, utilisation and memory of every way to train."""
    flops = count_flops(shapes)
    print(f"{flops / 1e9:.1f} GFLOP per image, forward and backward")
    ways = {
        "original's settings": lambda n: make_baseline_step(shapes, n),
        "ours": lambda n: make_our_step(shapes, n, compiles=False),
        "ours, compiled": lambda n: make_our_step(shapes, n, compiles=True),
        "ours, compiled, gradient checkpointing": lambda n: make_our_step(shapes, n, compiles=True, checkpoints=True),
    }
    rows = []
    for batch_size in batch_sizes:
        for name, make in ways.items():
            free()
            row = {"way": name, "batch_size": batch_size}
            step = None
            try:
                step, seconds = make(batch_size), []
                for _ in range(3 + steps):
                    start = time.perf_counter()
                    step()
                    seconds.append(time.perf_counter() - start)
                rate = batch_size / statistics.median(seconds[3:])
                row |= {"images_per_second": rate, "gflop_per_image": flops / 1e9}
                if peak_tflops:
                    row["utilisation"] = rate * flops / (peak_tflops * 1e12)
                if torch.cuda.is_available():
                    row["gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
            except torch.cuda.OutOfMemoryError:
                row["gigabytes"] = "out of memory"
            del step
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def measure_sampling(shapes: Shapes, batch_size: int, steps: int, pairs: int) -> dict:
    """Euler-Maruyama with guidance everywhere, the pipeline against a loop around the straightforward network."""
    labels = torch.arange(batch_size, device=shapes.device) % CLASSES
    baseline = shapes.straightforward().eval()
    pipe = LSEPPipeline(shapes.transformer().to(torch.bfloat16).eval(), FlowMatchSDEScheduler())
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    pipe.set_progress_bar_config(disable=True)
    sizes = (batch_size, 4, shapes.size, shapes.size)

    @torch.no_grad()
    def draw_baseline():
        x = torch.randn(sizes, device=shapes.device, dtype=torch.float64)
        times = [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
        with sdpa_kernel(SDPBackend.MATH):
            for t, following in zip(times, times[1:]):
                both = torch.cat([x, x]).float()
                time_both = torch.full((2 * batch_size,), t, device=shapes.device)
                v, v_null = baseline(both, time_both, torch.cat([labels, torch.full_like(labels, CLASSES)])).chunk(2)
                v = (v_null + 1.8 * (v - v_null)).double()
                x = x + ((2 - t) * v + x) * (following - t)
                if following > 0:
                    x = x + (2 * t * (t - following)) ** 0.5 * torch.randn_like(x)
        synchronize()

    def draw_ours():
        pipe(labels.tolist(), num_inference_steps=steps, guidance_scale=1.8, output_type="latent")
        synchronize()

    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        found = paired_ratio(draw_ours, draw_baseline, pairs)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    row = {"batch_size": batch_size, "steps": steps, "target": 0.5, **found}
    print(json.dumps(row), flush=True)
    return row


def measure_attention(shapes: Shapes, batch_size: int, repeats: int) -> list[dict]:
    """Forward and backward of one attention in bfloat16, with heads as they are and padded with zeros."""
    head, rows = shapes.preset["attention_head_dim"], []
    for padded in sorted({head, *(-(-head // step) * step for step in (16, 32, 64))}):
        make = (batch_size, shapes.preset["num_attention_heads"], shapes.grid**2, head)
        q, k, v = (torch.randn(make, device=shapes.device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))

        seconds = []
        for _ in range(2 + repeats):
            start = time.perf_counter()
            pads = (F.pad(x, (0, padded - head)) for x in (q, k, v))
            F.scaled_dot_product_attention(*pads, scale=head**-0.5)[..., :head].sum().backward()
            synchronize()
            seconds.append(time.perf_counter() - start)
        rows.append({"head": head, "padded_to": padded, "milliseconds": 1e3 * statistics.median(seconds[2:])})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def profile_step(shapes: Shapes, batch_size: int, path: Path):
    """Where the time of a compiled step goes."""
    free()
    step = make_our_step(shapes, batch_size, compiles=True)
    for _ in range(3):
        step()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        step()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=70)
    path.write_text(table + "\n")
    print(f"the profile of a step is in {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(SIT_PRESETS), default="SiT-XL/2")
    parser.add_argument("--sample_size", type=int, default=32, help="Side of the latents: 64 for 512 px.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--steps", type=int, default=10, help="Of training that are timed. Default: 10.")
    parser.add_argument("--sampling_batch_size", type=int, default=64)
    parser.add_argument("--sampling_steps", type=int, default=25, help="Their time is that of 250, for a tenth of it.")
    parser.add_argument("--pairs", type=int, default=3, help="Of sampling runs. Default: 3.")
    parser.add_argument("--peak_tflops", type=float, help="Of the device, dense bfloat16: 989 for an H100 or H200.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/throughput.json"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = Shapes(args.preset, args.sample_size, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(f"{args.preset}, latents 4 x {args.sample_size} x {args.sample_size}, torch {torch.__version__}, {name}")

    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = {"preset": args.preset, "sample_size": args.sample_size, "device": name, "torch": torch.__version__}
    results["training"] = measure_training(shapes, args.batch_sizes, args.steps, args.peak_tflops)
    free()
    results["sampling"] = measure_sampling(shapes, args.sampling_batch_size, args.sampling_steps, args.pairs)
    free()
    results["attention"] = measure_attention(shapes, args.batch_sizes[-1], args.steps)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    profile_step(shapes, args.batch_sizes[0], args.output.with_suffix(".profile.txt"))


if __name__ == "__main__":
    main()
