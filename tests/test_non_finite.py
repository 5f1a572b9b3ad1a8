# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`--max_skipped_steps`: steps that are not finite are left out, alike in all processes and where a run goes on."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusers_lsep.training.log import mean_of_finite, read_metrics


SKIPS = ["--max_train_steps", 8, "--checkpointing_steps", 1, "--logging_steps", 2, "--num_layers", 2]


@pytest.fixture
def latents(tmp_path, tiny_vae_folder):
    """Flags for latents of eight images, of which one is too large for the loss."""
    folder = tmp_path / "vae-sd"
    folder.mkdir()
    names = [f"img-mean-std-{index:08d}.npy" for index in range(8)]
    for index, name in enumerate(names):
        moments = np.random.default_rng(index).random((8, 4, 4), np.float32)
        np.save(folder / name, moments * (3e38 if index == 5 else 1))
    (folder / "dataset.json").write_text(json.dumps({"labels": [[name, i % 2] for i, name in enumerate(names)]}))
    return ["--latents_dir", folder, "--pretrained_vae_model_name_or_path", tiny_vae_folder]


@pytest.mark.slow
def test_some_steps_are_skipped(train, latents, tmp_path, capsys):
    whole, parts = tmp_path / "run", tmp_path / "parts"
    assert train(*latents, *SKIPS, "--max_skipped_steps", 4) == 0
    lines = capsys.readouterr().out.splitlines()
    skipped = [line for line in lines if line.startswith("Skipped: ")]
    assert len(skipped) == 4 and skipped[3].endswith("(4 of at most 4 such steps).")
    steps = [int(line.split("of step ")[1].split()[0]) for line in skipped]
    assert [(step - 1) // 2 for step in steps] == [0, 1, 2, 3]  # once in every epoch of two steps
    for step in range(2, 9):
        before, after = (load_file(whole / f"checkpoint-{s}" / "model.safetensors") for s in (step - 1, step))
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (step in steps)
        assert all(value.isfinite().all() for value in after.values())
    moments = load_file(whole / "checkpoint-8" / "optimizer.safetensors")
    assert {value.item() for name, value in moments.items() if name.endswith(".step")} == {4}
    metrics = [line for line in read_metrics(whole / "metrics.jsonl") if "loss" in line]
    assert metrics[-1]["skipped_steps"] == 4
    # A logged interval has the means of its good steps.
    both = [line for line in metrics if line["step"] % 2 == 0 and line["step"] not in steps]
    assert both and all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in both)

    assert train(*latents, *SKIPS, "--max_skipped_steps", 4, "--max_train_steps", 3, output_dir=parts) == 0
    assert json.loads((parts / "checkpoint-3" / "training_state.json").read_text())["skipped_steps"] in (1, 2)
    resume = ["--resume_from_checkpoint", "latest"]
    assert train(*latents, *SKIPS, "--max_skipped_steps", 4, *resume, output_dir=parts) == 0
    for name in (
        "model.safetensors",
        "optimizer.safetensors",
        "pipeline/transformer/diffusion_pytorch_model.safetensors",
    ):
        assert (whole / "checkpoint-8" / name).read_bytes() == (parts / "checkpoint-8" / name).read_bytes()
    assert read_metrics(parts / "metrics.jsonl")[-1]["skipped_steps"] == 4


@pytest.mark.slow
def test_too_many_end_the_run(train, latents, tmp_path):
    with pytest.raises(FloatingPointError, match=r"of step \d is (inf|nan); the last good checkpoint"):
        train(*latents, *SKIPS)
    flags = [*latents, *SKIPS, "--max_skipped_steps", 2, "--overwrite_output_dir"]
    with pytest.raises(FloatingPointError, match=r"step [56] is .*, after 2 steps that were skipped; the last good"):
        train(*flags)


def test_means_of_finite_steps():
    rows = torch.tensor([[1.0, 2.0], [math.nan, 4.0], [3.0, 6.0]])
    assert mean_of_finite(rows).tolist() == [2, 4]
    assert mean_of_finite(torch.tensor([1.0, math.inf, 2.0])).item() == 1.5
    assert not mean_of_finite(rows[1:2]).isfinite().all()
