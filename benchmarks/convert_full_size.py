# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Converts a random LSEP training checkpoint of full size and measures the memory that this takes (Linux).

    python benchmarks/convert_full_size.py

The file is written first (for SiT-XL/2: `model` and `ema`, 5.4 GB, and as much memory), then `diffusers-lsep convert`
runs on it in a process of its own, whose anonymous memory (`RssAnon`: what it has allocated, without mapped files) is
read from outside every few milliseconds, the interpreter and its libraries included.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors import safe_open

from diffusers_lsep import SIT_PRESETS


ALLOWED_RATIO = 1.5


def random_weights(preset: str, num_classes: int = 1000, sample_size: int = 32, in_channels: int = 4) -> OrderedDict:
    """The weights of an LSEP checkpoint under their original names."""
    arguments = SIT_PRESETS[preset]
    width = arguments["num_attention_heads"] * arguments["attention_head_dim"]
    patch_size = arguments["patch_size"]
    linears = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch_size**2 * in_channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "classifier.1": (num_classes, width),
    }
    for i in range(arguments["num_layers"]):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    grid_size = sample_size // patch_size
    table = get_2d_sincos_pos_embed(width, grid_size, base_size=grid_size, output_type="pt")
    weights = OrderedDict(pos_embed=table.float().unsqueeze(0))
    weights["x_embedder.proj.weight"] = torch.randn(width, in_channels, patch_size, patch_size)
    weights["x_embedder.proj.bias"] = torch.randn(width)
    weights["y_embedder.embedding_table.weight"] = torch.randn(num_classes + 1, width)
    weights["classifier.0.weight"], weights["classifier.0.bias"] = torch.randn(width), torch.randn(width)
    for name, shape in linears.items():
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.randn(shape), torch.randn(shape[0])
    return weights


def convert_and_measure(checkpoint: Path, output_dir: Path) -> tuple[int, float]:
    """Returns the largest `RssAnon` in bytes and the seconds."""
    start, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", "diffusers_lsep.cli", "convert"]
    process = subprocess.Popen([*command, "--checkpoint", str(checkpoint), "--output_dir", str(output_dir)])
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.003)
    if process.returncode != 0:
        sys.exit(f"convert ended with {process.returncode}")
    return peak, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SIT_PRESETS, default="SiT-XL/2", metavar="NAME", help="default: SiT-XL/2")
    parser.add_argument("--work_dir", help="Where the files go for the time of the run, 3 times the weights.")
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        parser.error("memory is read from /proc, which this system does not have")

    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        checkpoint, output_dir = Path(folder) / "checkpoint.pt", Path(folder) / "pipeline"
        ema = random_weights(args.preset)
        selected = sum(tensor.numel() * tensor.element_size() for tensor in ema.values())
        expected = sum(
            tensor.numel() for name, tensor in ema.items() if name != "pos_embed" and "classifier" not in name
        )
        training_arguments = argparse.Namespace(
            model=args.preset, resolution=256, num_classes=1000, encoder_depth=8, path_type="linear", qk_norm=False
        )
        content = {"model": random_weights(args.preset), "ema": ema, "opt": {}, "args": training_arguments, "steps": 1}
        torch.save(content, checkpoint)
        file_size = checkpoint.stat().st_size
        del content, ema

        peak, seconds = convert_and_measure(checkpoint, output_dir)

        count = 0
        for path in (output_dir / "transformer").glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, no mapping
                    count += torch.Size(file.get_slice(name).get_shape()).numel()

    print(f"{'preset':28}{args.preset}")
    print(f"{'checkpoint':28}{file_size / 1e9:.3f} GB")
    print(f"{'selected weights':28}{selected / 1e9:.3f} GB")
    print(f"{'peak anonymous memory':28}{peak / 1e9:.3f} GB")
    print(f"{'ratio (allowed: 1.5)':28}{peak / selected:.3f}")
    print(f"{'time':28}{seconds:.1f} s")
    print(f"{'parameters, transformer':28}{count:,} (expected {expected:,})")
    if count != expected or peak >= ALLOWED_RATIO * selected:
        sys.exit(1)


if __name__ == "__main__":
    main()
