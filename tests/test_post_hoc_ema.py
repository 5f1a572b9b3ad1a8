# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Averages of the weights whose length is chosen after training."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_run import TINY_MODEL, TINY_RUN

from diffusers_lsep import LinearProbe, LSEPPipeline
from diffusers_lsep.cli import main
from diffusers_lsep.training.post_hoc_ema import (
    MAX_SIGMA_REL,
    PowerFunctionEMA,
    list_snapshots,
    profile_products,
    reconstruct_average,
    sigma_rel_to_gamma,
    solve_weights,
)


def test_length_and_exponent():
    """`sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))`, with the pairs that EDM2 names."""
    for sigma_rel in (0.001, 0.01, 0.05, 0.1, 0.25, 0.288):
        gamma = sigma_rel_to_gamma(sigma_rel)
        assert gamma > 0
        assert math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) == pytest.approx(sigma_rel, rel=1e-10)
    assert sigma_rel_to_gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert sigma_rel_to_gamma(0.10) == pytest.approx(6.94, abs=0.005)
    assert sigma_rel_to_gamma(MAX_SIGMA_REL) == pytest.approx(0, abs=1e-6)  # the plain mean


def test_products_of_profiles():
    """Against the integral of the profiles, by the midpoint rule."""
    tau = (np.arange(400_000) + 0.5) / 40_000  # up to t = 10
    profiles, gammas, steps = [], np.array([0.5, 3.0, 7.0]), np.array([10.0, 4.0, 6.0])
    for gamma, step in zip(gammas, steps):
        profiles.append(np.where(tau < step, (gamma + 1) * (tau / step) ** gamma / step, 0))
    expected = np.stack(profiles) @ np.stack(profiles).T / 40_000
    np.testing.assert_allclose(profile_products(gammas[:, None], steps[:, None], gammas, steps), expected, rtol=1e-4)


class Weights(torch.nn.Module):
    """What has a transformer with a trajectory that is known."""

    def __init__(self):
        super().__init__()
        self.transformer = torch.nn.Linear(3, 2, dtype=torch.float64)
        self.head = torch.nn.Linear(2, 2)  # no part of a pipeline

    def go_to(self, values: torch.Tensor):
        self.transformer.weight.data.copy_(values)
        self.transformer.bias.data.copy_(values[:, 0])


def walk(num_steps: int, seed: int = 0) -> torch.Tensor:
    """Weights `[T, 2, 3]` on their way, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_steps, 2, 3, generator=generator, dtype=torch.float64).cumsum(dim=0) * 0.03


def power_average(trajectory: torch.Tensor, sigma_rel: float) -> torch.Tensor:
    """The closed form: step s weighs the integral of the profile from s - 1 to s."""
    ends = (torch.arange(len(trajectory) + 1, dtype=torch.float64) / len(trajectory)) ** (
        sigma_rel_to_gamma(sigma_rel) + 1
    )
    return torch.einsum("t,tij->ij", ends.diff(), trajectory)


def record(run, trajectory, sigma_rels, every, dtype="float32") -> PowerFunctionEMA:
    run.mkdir(exist_ok=True)
    weights = Weights()
    ema = PowerFunctionEMA(weights, sigma_rels)
    for step, values in enumerate(trajectory, start=1):
        weights.go_to(values)
        ema.step(step)
        if step % every == 0:
            ema.save_snapshot(run, step, dtype, is_main_process=True)
    return ema


def test_averages_in_training_have_a_closed_form(tmp_path):
    trajectory = walk(300)
    ema = record(tmp_path, trajectory, [0.05, 0.2], every=1000)
    assert ema.averages.keys() == {f"{s}.transformer.{name}" for s in (0.05, 0.2) for name in ("weight", "bias")}
    for sigma_rel in (0.05, 0.2):
        expected = power_average(trajectory, sigma_rel)
        torch.testing.assert_close(ema.averages[f"{sigma_rel}.transformer.weight"], expected, rtol=1e-10, atol=1e-12)
    # A straight line, whose average is known for continuous time: the centre of the profile
    line = torch.arange(1, 2001, dtype=torch.float64)[:, None, None].expand(-1, 2, 3) / 2000
    gamma = sigma_rel_to_gamma(0.1)
    centre = record(tmp_path, line, [0.1], every=5000).averages["0.1.transformer.bias"]
    torch.testing.assert_close(centre, torch.full((2,), (gamma + 1) / (gamma + 2)).double(), rtol=0, atol=1 / 2000)


def test_a_length_that_was_stored_is_found_again(tmp_path):
    """To 1e-6 at every snapshot, whatever the others are."""
    record(tmp_path, walk(400), [0.05, 0.1], every=8)
    assert list(list_snapshots(tmp_path)) == list(range(8, 401, 8))
    for step in (8, 200, 400):
        stored = load_file(list_snapshots(tmp_path)[step])
        for sigma_rel in (0.05, 0.1):
            average, facts = reconstruct_average(tmp_path, sigma_rel, step)
            assert facts["num_snapshots"] == step // 8 and facts["profile_error"] < 1e-6
            for name in ("transformer.weight", "transformer.bias"):
                torch.testing.assert_close(average[name], stored[f"{sigma_rel}.{name}"], rtol=1e-6, atol=1e-6)


def test_other_lengths_are_those_of_the_closed_form(tmp_path):
    """As near as the profile is met, which more snapshots do better."""
    trajectory, errors = walk(400), []
    for every in (40, 8):
        run = tmp_path / str(every)
        record(run, trajectory, [0.05, 0.1], every)
        for sigma_rel in (0.03, 0.08, 0.15, 0.2):
            average, facts = reconstruct_average(run, sigma_rel)
            difference = (average["transformer.weight"] - power_average(trajectory, sigma_rel)).abs().max()
            # By Cauchy and Schwarz: the distance of the profiles times the norm of the trajectory
            gamma = sigma_rel_to_gamma(sigma_rel)
            norm = (gamma + 1) / math.sqrt((2 * gamma + 1) * 400)
            assert difference < 1.1 * facts["profile_error"] * norm * trajectory.flatten(1).norm(dim=0).max()
            errors.append(facts["profile_error"])
    assert all(fewer > 5 * more for fewer, more in zip(errors[:4], errors[4:])) and max(errors[4:]) < 0.005


def test_weights_of_a_long_run():
    """400,000 steps, where powers of the steps themselves would overflow."""
    steps = range(8000, 400_001, 8000)
    stored = [(sigma_rel, step) for sigma_rel in (0.01, 0.1) for step in steps]
    weights, error = solve_weights(stored, 0.01, 400_000)
    expected = [float(pair == (0.01, 400_000)) for pair in stored]
    np.testing.assert_allclose(weights, expected, atol=1e-9)
    assert error < 1e-6
    assert solve_weights(stored, 0.07, 400_000)[0].sum() == pytest.approx(1, abs=1e-3)


def test_float16_rounds(tmp_path):
    exact, half = tmp_path / "exact", tmp_path / "half"
    record(exact, walk(100), [0.05, 0.1], 10)
    record(half, walk(100), [0.05, 0.1], 10, "float16")
    assert load_file(list_snapshots(half)[100])["0.05.transformer.weight"].dtype == torch.float16
    one, other = (reconstruct_average(run, 0.08)[0]["transformer.weight"] for run in (exact, half))
    assert 0 < (one - other).abs().max() < 2**-10 * one.abs().max()


def test_snapshots_that_cannot_be_used(tmp_path):
    def refused(message, **arguments):
        with pytest.raises(ValueError, match=message):
            reconstruct_average(tmp_path, **{"sigma_rel": 0.08, **arguments})

    refused("has to hold snapshots in ema_snapshots, but has none: train with `--post_hoc_ema_sigmas")
    record(tmp_path, walk(20), [0.05, 0.1], 10)
    refused(r"`step` has to be that of a snapshot, one of \[10, 20\], but is 15", step=15)
    refused("`sigma_rel` has to be above 0 and at most 0.288675, but is 0.3", sigma_rel=0.3)
    refused("`sigma_rel` has to be above 0 and at most 0.288675, but is 0", sigma_rel=0)
    refused("`use_sigma_rels` has to name averages of the run, but is", use_sigma_rels=[0.07])
    path = list_snapshots(tmp_path)[20]
    tensors = load_file(path)
    save_file({**tensors, "0.05.transformer.bias": torch.zeros(7)}, path, {"sigma_rels": "[0.05, 0.1]"})
    refused("snapshots of different models: .*step-20")
    save_file(tensors, path)
    refused("damaged snapshot, .*step-20.*'sigma_rels'. Delete it to do without")
    path.write_bytes(path.read_bytes()[:-5])
    refused("damaged snapshot, .*step-20")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--post_hoc_ema_sigmas", "0.05"], "has to be two different lengths or more, but is [0.05]"),
        (["--post_hoc_ema_sigmas", "0.1", "0.1"], "has to be two different lengths or more, but is [0.1, 0.1]"),
        (["--post_hoc_ema_sigmas", "0.1", "0.4"], "`sigma_rel` has to be above 0 and at most 0.288675, but is 0.4"),
        (
            ["--post_hoc_ema_sigmas", "0.05", "0.1", "--lora_rank", "2", "--pretrained_model_name_or_path", "x"],
            "--post_hoc_ema_sigmas averages all weights, and --lora_rank freezes them",
        ),
    ],
)
def test_flags_that_cannot_be_followed(train, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        train(*flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_room_that_snapshots_take_is_said(train, capsys):
    train("--dry_run")
    settings = json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]
    assert settings["post_hoc_ema_steps"] is None, "there are none"
    train("--post_hoc_ema_sigmas", 0.05, 0.1, 0.2, "--max_train_steps", 500, "--dry_run")
    printed = capsys.readouterr().out
    trained = int(printed.split("trained: ")[1].split(" ")[0].replace(",", ""))
    size = trained * 3 * 4 / 1e9
    expected = f"in float32 every 10 steps: 50 snapshots of {size:.3g} GB, {50 * size:.3g} GB in all"
    assert f"post-hoc EMA: averages of the lengths 0.05, 0.1, 0.2, {expected}" in printed


# Steps that are no multiples of each other: snapshots, checkpoints and the end
RUN = [*TINY_MODEL, *TINY_RUN, "--max_train_steps", "16", "--checkpointing_steps", "5", "--learning_rate", "1e-2"]
RUN += ["--post_hoc_ema_sigmas", "0.05", "0.08", "0.1", "--post_hoc_ema_steps", "3", "--ema_decay", "0.9"]


@pytest.mark.slow
def test_a_run_that_is_continued_has_the_same_averages(train, tmp_path):
    train(tiny=RUN, output_dir=tmp_path / "whole")
    train("--max_train_steps", 13, tiny=RUN, output_dir=tmp_path / "stopped")
    last = list_snapshots(tmp_path / "stopped")
    assert list(last) == [3, 6, 9, 12, 13]
    # As one that was killed after its snapshot of step 13 goes on from the checkpoint before
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-13")
    train("--resume_from_checkpoint", "latest", tiny=RUN, output_dir=tmp_path / "stopped")

    runs = [tmp_path / name for name in ("whole", "stopped")]
    assert [list(list_snapshots(run)) for run in runs] == [[3, 6, 9, 12, 15, 16]] * 2
    files = [f"ema_snapshots/step-{step}.safetensors" for step in list_snapshots(runs[0])]
    for name in [*files, "checkpoint-16/post_hoc_ema.safetensors"]:
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name
    # All that a pipeline and its probe have, and the same as in the checkpoint
    averages = load_file(runs[0] / "checkpoint-16" / "post_hoc_ema.safetensors")
    pipe = DiffusionPipeline.from_pretrained(runs[0])
    probe = LinearProbe.from_pretrained(runs[0] / "probe")
    names = [*(f"transformer.{k}" for k in pipe.transformer.state_dict()), *(f"probe.{k}" for k in probe.state_dict())]
    assert averages.keys() == {f"{sigma_rel}.{name}" for sigma_rel in (0.05, 0.08, 0.1) for name in names}
    for name, value in load_file(list_snapshots(runs[0])[16]).items():
        assert torch.equal(value, averages[name])

    with pytest.raises(ValueError, match="post_hoc_ema_sigmas: .* -> "):
        train(
            *("--post_hoc_ema_sigmas", 0.05, 0.2, "--max_train_steps", 17, "--resume_from_checkpoint", "latest"),
            tiny=RUN,
            output_dir=runs[0],
        )


@pytest.mark.slow
def test_command(train, tmp_path, capsys, caplog):
    """A length that was stored, from the others: as near as the profile; and as a pipeline and its probe."""
    run, out = tmp_path / "run", tmp_path / "out"
    train("--post_hoc_ema_steps", 1, tiny=RUN)
    capsys.readouterr()
    main(["ema", str(run), "--sigma_rel", "0.08", "--output_dir", str(out)])
    assert "the average of sigma_rel 0.08 after step 16, from 16 snapshots" in capsys.readouterr().out
    pipe, stored = DiffusionPipeline.from_pretrained(out), load_file(list_snapshots(run)[16])
    assert isinstance(pipe, LSEPPipeline) and pipe.config.id2label == {i: str(i) for i in range(10)}
    models = {"transformer": pipe.transformer, "probe": LinearProbe.from_pretrained(out / "probe")}
    for name, model in models.items():
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, stored[f"0.08.{name}.{key}"], rtol=1e-6, atol=1e-6)
    facts = json.loads((out / "post_hoc_ema.json").read_text())
    assert facts["step"] == 16 and facts["sigma_rel"] == 0.08 and facts["profile_error"] < 1e-6
    assert (out / "training_args.json").read_bytes() == (run / "training_args.json").read_bytes()
    assert not caplog.records

    # The same from the two others alone
    average, facts = reconstruct_average(run, 0.08, use_sigma_rels=[0.05, 0.1])
    assert 1e-6 < facts["profile_error"] < 0.01
    for name, value in average.items():
        assert (value - stored[f"0.08.{name}"]).norm() < 0.01 * stored[f"0.08.{name}"].norm() + 1e-6, name

    # Another step, and a run that has only a checkpoint yet
    (run / "model_index.json").unlink()
    main(["ema", str(run), "--sigma_rel", "0.1", "--step", "7", "--output_dir", str(out), "--overwrite_output_dir"])
    found = DiffusionPipeline.from_pretrained(out).transformer.state_dict()["proj_out.weight"]
    expected = load_file(list_snapshots(run)[7])["0.1.transformer.proj_out.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    main(["ema", str(run), "--sigma_rel", "0.01", "--output_dir", str(tmp_path / "short")])
    assert "this is not the average that was asked for" in caplog.text

    with pytest.raises(ValueError, match="`--output_dir` .* is not empty. `--overwrite_output_dir` replaces it"):
        main(["ema", str(run), "--sigma_rel", "0.1", "--output_dir", str(out)])
    with pytest.raises(ValueError, match="replaces a pipeline of this command only, but .* holds"):
        main(["ema", str(run), "--sigma_rel", "0.1", "--output_dir", str(tmp_path), "--overwrite_output_dir"])
    path = list_snapshots(run)[16]
    others = {name: value for name, value in stored.items() if "proj_out" not in name}
    save_file(others, path, {"sigma_rels": "[0.1]"})
    for other in [other for step, other in list_snapshots(run).items() if step < 16]:
        other.unlink()
    with pytest.raises(ValueError, match="(?s)has snapshots of another model than .*proj_out"):
        main(["ema", str(run), "--sigma_rel", "0.1", "--output_dir", str(tmp_path / "other")])
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="--output_dir of a training run that has a checkpoint, but there is none"):
        main(["ema", str(run), "--sigma_rel", "0.1", "--output_dir", str(tmp_path / "other")])


@pytest.mark.slow
def test_a_run_without_labels(train, tmp_path):
    """Its one class stands for the null class, which alone is trained."""
    train("--unconditional", tiny=RUN)
    main(["ema", str(tmp_path / "run"), "--sigma_rel", "0.08", "--output_dir", str(tmp_path / "out")])
    table = DiffusionPipeline.from_pretrained(tmp_path / "out").transformer.class_embedding.weight
    assert torch.equal(table[0], table[-1])
    stored = load_file(list_snapshots(tmp_path / "run")[16])["0.08.transformer.class_embedding.weight"]
    torch.testing.assert_close(table[-1], stored[-1], rtol=1e-6, atol=1e-6)
