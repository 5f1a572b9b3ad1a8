# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""How encoding latents and evaluating samples scale with processes, and whether their memory grows with the images.

    python benchmarks/processes.py                # 1 and 2 processes of one thread each, on the CPU

Both commands run on random images of 256 x 256, with a small random VAE and with Inception of random weights, for two
numbers of images: the images per second are those of the difference, so that starting is no part of it, and memory is
that of the largest process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image


ENCODE = Path(__file__).resolve().parents[1] / "examples" / "encode_latents.py"


def write_images(folder: Path, count: int):
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "images" / ("ant", "bee")[i % 2] / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        small.resize((256, 256), Image.Resampling.BICUBIC).save(path)
    images = rng.integers(0, 256, (count, 256, 256, 3), dtype=np.uint8)
    np.savez(folder / "samples.npz", arr_0=images)


def write_models(folder: Path):
    """A small VAE, weights of Inception, and the statistics of a reference."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    channels = (32, 64, 128, 128)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(block_out_channels=channels, latent_channels=4, **blocks).save_pretrained(folder / "vae")

    class WithoutWeights(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    torch.save({}, folder / "nothing.pth")
    inception = WithoutWeights("random", ["2048"], str(folder / "nothing.pth"))
    weights = {
        name: torch.ones_like(tensor) if "var" in name else 0.05 * torch.randn(tensor.shape)
        for name, tensor in inception.state_dict().items()
    }
    torch.save(weights, folder / "inception.pth")
    np.savez(folder / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))


def measure(command: list[object], num_processes: int) -> tuple[float, float]:
    """Seconds, and the GB of the largest process."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_processes]
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in [*launch, *command]], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status != 0:
            log.seek(0)
            raise RuntimeError(log.read().decode(errors="replace")[-3000:])
    return seconds, usage.ru_maxrss / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, nargs=2, default=[128, 512], metavar=("FEW", "MANY"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/processes.json"))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_models(root)
        for count in args.num_images:
            write_images(root / str(count), count)
        for what in ("encode", "evaluate"):
            for num_processes in args.processes:
                found = []
                for count in args.num_images:
                    data, out = root / str(count), root / f"{what}-{num_processes}-{count}"
                    if what == "encode":
                        command = [ENCODE, "--train_data_dir", data / "images", "--output_dir", out]
                        command += ["--pretrained_vae_model_name_or_path", root / "vae", "--batch_size", 16]
                        command += ["--shard_size", 64, "--dataloader_num_workers", 0]
                    else:
                        command = ["-m", "diffusers_lsep.cli", "evaluate", data / "samples.npz", "--metrics", "fid"]
                        command += ["--reference", root / "reference.npz", "--batch_size", 16, "--output_dir", out]
                        command += ["--inception_weights", root / "inception.pth", "--cache_dir", out]
                    found.append(measure(command, num_processes))
                (few_seconds, few_memory), (many_seconds, many_memory) = found
                rate = (args.num_images[1] - args.num_images[0]) / (many_seconds - few_seconds)
                memory = {"few_gigabytes": few_memory, "many_gigabytes": many_memory}
                rows.append({"what": what, "processes": num_processes, "images_per_second": rate, **memory})
                print(
                    f"{what:9} {num_processes} processes  {rate:6.1f} images/s  {few_memory:.2f} GB for"
                    f" {args.num_images[0]}, {many_memory:.2f} GB for {args.num_images[1]} images",
                    flush=True,
                )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
