# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning into a flow map: the identity of mean flows, guidance, the loss, and runs of `train_lsep.py`."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from gaussian_flow import GaussianFlow
from safetensors.torch import load_file
from tiny_models import make_batch, make_pipeline, make_transformer
from tiny_run import TINY_RUN

from diffusers_lsep import FlowMapScheduler, LinearProbe, LSEPObjective
from diffusers_lsep.flow_map import derivative_along, guided_velocity, mean_velocity_target
from diffusers_lsep.regularizers import SRARegularizer
from diffusers_lsep.training.arguments import parse_args
from diffusers_lsep.training.inputs import make_teachers, objective_inputs
from diffusers_lsep.training.log import read_metrics
from diffusers_lsep.training.setup import choose_validation_flags


DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
TIMES = torch.tensor([0.05, 0.3, 0.6, 0.8, 1.0], dtype=torch.float64)
R_TIMES = torch.tensor([0.0, 0.3, 0.1, 0.75, 0.0], dtype=torch.float64)


# --- the identity, with exact flow maps ---------------------------------------------------------------------------


class Mixture:
    """Two Gaussians on a line, on the linear path. The flow keeps quantiles, which makes its map known."""

    weights, means, stds = torch.tensor([0.3, 0.7]), torch.tensor([-0.8, 0.5]), torch.tensor([0.2, 0.3])

    def parts(self, x, t):
        mean, std = (1 - t) * self.means.double(), ((1 - t) ** 2 * self.stds.double() ** 2 + t**2).sqrt()
        return (x - mean) / std, std, mean

    def distribution(self, x, t):
        return (self.weights.double() * torch.special.ndtr(self.parts(x, t)[0])).sum(-1, keepdim=True)

    def velocity(self, x, t):
        z, std, mean = self.parts(x, t)
        density = self.weights.double() * torch.exp(-0.5 * z**2) / std
        # Of one Gaussian: a quantile moves with its mean and its spread
        slope = (t - (1 - t) * self.stds.double() ** 2) / std
        return (density * (slope * z - self.means.double())).sum(-1, keepdim=True) / density.sum(-1, keepdim=True)

    def move(self, x, t, r):
        level, low, high = self.distribution(x, t), torch.full_like(x, -8.0), torch.full_like(x, 8.0)
        for _ in range(60):
            middle = (low + high) / 2
            is_below = self.distribution(middle, r) < level
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return (low + high) / 2


def of_gaussians(path_type):
    """Mean velocity, velocity and a state of the Gaussian flow."""
    flow = GaussianFlow(path_type=path_type)

    def velocity(x, t):
        with torch.no_grad():
            return flow(x, t, None)[0]

    def mean_velocity(x, t, r, labels=None):
        t, r = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
        gap = torch.where(r == t, 1.0, t - r)
        return torch.where(r == t, velocity(x, t.flatten()), (x - flow.move(x, t, r)) / gap)

    return mean_velocity, velocity


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize(("derivative", "tolerance"), [("jvp", 1e-12), ("difference", 1e-2)])
def test_the_exact_mean_velocity_of_gaussians_is_its_own_target(path_type, derivative, tolerance):
    """float64. The difference has an error of second order, and at the ends of [0, 1], one-sided, of first."""
    mean_velocity, velocity = of_gaussians(path_type)
    x = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = (x, TIMES, R_TIMES, torch.zeros(5), velocity(x, TIMES))
    if derivative == "jvp":  # `torch.where` above would differentiate 0 / 0 where the times are equal
        keep = TIMES > R_TIMES
        inputs = tuple(value[keep] for value in inputs)
    target = mean_velocity_target(mean_velocity, *inputs, derivative)
    expected = mean_velocity(*inputs[:3])
    torch.testing.assert_close(target, expected, atol=tolerance, rtol=0)
    wrong = mean_velocity_target(lambda *values: 1.1 * mean_velocity(*values), *inputs, derivative)
    assert (wrong - 1.1 * expected).abs().max() > 10 * tolerance


def test_the_exact_mean_velocity_of_a_mixture_is_its_own_target():
    mixture = Mixture()
    x = torch.linspace(-1.2, 1.2, 5, dtype=torch.float64).view(5, 1, 1, 1)
    t, r = torch.tensor([0.4, 0.5, 0.7, 0.9, 0.99]).double(), torch.tensor([0.2, 0.0, 0.5, 0.0, 0.6]).double()

    def mean_velocity(x, t, r, labels=None):
        t, r = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
        return (x - mixture.move(x, t, r)) / (t - r)

    velocity = mixture.velocity(x, t.view(-1, 1, 1, 1))
    target = mean_velocity_target(mean_velocity, x, t, r, torch.zeros(5), velocity, "difference")
    torch.testing.assert_close(target, mean_velocity(x, t, r), atol=5e-4, rtol=0)


def test_forward_mode_and_difference_agree_on_the_transformer():
    """And both with autograd in reverse, direction by direction, in float64 but for the sinusoids of the times."""
    model = make_transformer(num_layers=3, flow_map_depth=2).double()
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    t, r, labels = torch.tensor([0.3, 0.6, 0.9]), torch.tensor([0.1, 0.5, 0.0]), torch.tensor([1, 2, 10])

    def function(x, t):
        return model(x, t, labels, r_timestep=r, return_dict=False)[0]

    exact, difference = (derivative_along(function, x, t, v, kind) for kind in ("jvp", "difference"))
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(exact, difference, atol=1e-3, rtol=1e-3)
    weights = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((weights * function(x.requires_grad_(), t.requires_grad_())).sum(), (x, t))
    along = (gradients[0] * v).sum() + gradients[1].sum()
    assert (weights * exact).sum().item() == pytest.approx(along.item(), rel=1e-5)


# --- guidance -----------------------------------------------------------------------------------------------------


def flow_of_labels(x, t, labels):
    return x * 0 + labels.view(-1, 1, 1, 1).float() ** 2


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_teacher_is_guided_as_in_sampling(scale):
    x, labels, t = torch.zeros(4, 1, 2, 2), torch.tensor([1, 1, 1, 3]), torch.tensor([0.1, 0.5, 0.9, 0.5])
    found = guided_velocity(flow_of_labels, x, t, labels, 3, None, scale, (0.0, 0.7))[:, 0, 0, 0]
    assert found.tolist() == pytest.approx([9 + scale * (1 - 9), 9 + scale * (1 - 9), 1, 9])


def test_a_model_that_is_guided_by_the_scale_stays_so():
    """The fixed point of the model's own guidance, for the expected velocity of data and noise."""
    scale, null_class = 2.5, 3
    x, labels, t = torch.zeros(2, 1, 2, 2), torch.tensor([1, 3]), torch.tensor([0.2, 0.5])

    def guided(x, t, labels):
        return torch.where(labels.view(-1, 1, 1, 1) == null_class, 9 + x, 9 + scale * (1 - 9) + x)

    velocity = flow_of_labels(x, t, labels)
    found = guided_velocity(guided, x, t, labels, null_class, velocity, scale)
    torch.testing.assert_close(found, guided(x, t, labels))
    assert torch.equal(guided_velocity(guided, x, t, labels, null_class, velocity, 1.0), velocity)


# --- the loss -----------------------------------------------------------------------------------------------------


def make_flow_map_batch():
    batch = make_batch()
    batch.pop("probe_dropout_mask")
    r = batch["timesteps"] * 0.4
    return batch, r, torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(3))


def test_the_loss_is_the_logarithm_of_the_squared_error():
    batch, r, target = make_flow_map_batch()
    model = make_transformer(num_layers=3, flow_map_depth=2)
    output = LSEPObjective(model, None)(**batch, r_timesteps=r, target_velocity=target)
    labels = torch.where(batch["class_dropout_mask"], 10, batch["class_labels"])
    time = batch["timesteps"].view(-1, 1, 1, 1)
    noisy = (1 - time) * batch["latents"] + time * batch["noise"]
    prediction = model(noisy, batch["timesteps"], labels, r_timestep=r).sample
    squares = (prediction - target).square().flatten(1)
    assert output.loss.item() == pytest.approx((squares.sum(1) + 1e-3).log().mean().item(), rel=1e-5)
    assert output.denoising_loss.item() == pytest.approx(squares.mean().item(), rel=1e-5)
    # The weight of MeanFlow has the same gradient.
    output.loss.backward()
    found = model.proj_out.weight.grad.clone()
    model.zero_grad()
    errors = squares.sum(1)
    (errors / (errors.detach() + 1e-3)).mean().backward()
    torch.testing.assert_close(model.proj_out.weight.grad, found, atol=1e-5, rtol=1e-4)


def test_the_probe_reads_before_the_second_time():
    batch, r, target = make_flow_map_batch()
    model = make_transformer(num_layers=3, flow_map_depth=2)
    batch["probe_dropout_mask"] = torch.ones(6, dtype=torch.bool)
    objective = LSEPObjective(model, LinearProbe(32, 10), probe_depth=2)
    output = objective(**batch, r_timesteps=r, target_velocity=target)
    alone = objective(**batch)
    assert output.probe_loss.item() == pytest.approx(alone.probe_loss.item(), rel=1e-5)
    with pytest.raises(ValueError, match="`probe_depth` has to be at most 2, the `flow_map_depth`.*, but is 3"):
        LSEPObjective(model, LinearProbe(32, 10), probe_depth=3)
    with pytest.raises(ValueError, match="`r_timesteps` has to be None for a `transformer` without `flow_map_depth`"):
        LSEPObjective(make_transformer(), None)(**batch, r_timesteps=r, target_velocity=target)


# --- runs ---------------------------------------------------------------------------------------------------------

# The digits, from a pipeline that says what the model is.
FROM_PIPELINE = [*TINY_RUN, "--lr_warmup_steps", "0", "--crop_size_min", "1", "--no_lsep", "--learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    make_pipeline(in_channels=1, num_layers=3).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("velocity", ["teacher", "data"])
def test_any_pipeline_becomes_a_flow_map(train, teacher, tmp_path, capsys, velocity):
    """A run in two parts ends with the same bits; the pipeline brings the sampler along; the card says it all."""
    flags = ["--pretrained_model_name_or_path", teacher, "--train_data_dir", DIGITS]
    flags += ["--flow_map", "--flow_map_velocity", velocity]
    flags += ["--flow_map_guidance_scale", 1.5, "--validation_steps", 4, "--validation_split", "test"]
    train(*flags, tiny=FROM_PIPELINE, output_dir=tmp_path / "whole")
    printed = capsys.readouterr().out
    assert "from block 3 on it sees the time to go to" in printed
    assert "--class_labels 0 --num_inference_steps 2 " in printed  # drawn as it is drawn at validations
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert all(math.isfinite(line["loss"]) for line in lines[:4]) and "validation_denoising_loss" in lines[-1]

    train(*flags, "--max_train_steps", 2, tiny=FROM_PIPELINE, output_dir=tmp_path / "parts")
    train(*flags, "--resume_from_checkpoint", "latest", tiny=FROM_PIPELINE, output_dir=tmp_path / "parts")
    for name in ("model", "optimizer"):
        whole, parts = (
            load_file(tmp_path / run / "checkpoint-4" / f"{name}.safetensors") for run in ("whole", "parts")
        )
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert type(pipe.scheduler) is FlowMapScheduler and pipe.transformer.config.flow_map_depth == 2
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "arxiv:2510.24474" in card and "flow_map_guidance_scale" in card and "num_inference_steps=2" in card
    assert "mean velocity between two times" in card and "plain SiT" not in card
    with pytest.raises(ValueError, match="`--flow_map` has to be given for a model with `flow_map_depth=2`"):
        train(*flags[2:4], "--pretrained_model_name_or_path", tmp_path / "whole", tiny=FROM_PIPELINE)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--flow_map_depth", 1], "--flow_map_depth needs --flow_map"),
        (["--flow_map_velocity", "data"], "--flow_map_velocity needs --flow_map"),
        (["--flow_map_guidance_scale", 2], "--flow_map_guidance_scale needs --flow_map"),
        (
            ["--flow_map", "--flow_map_velocity", "teacher"],
            "needs --pretrained_model_name_or_path, which is",
        ),
        (
            ["--flow_map", "--flow_map_guidance_interval", 0.7, 0.2],
            "has to be LOW HIGH with LOW <= HIGH, but is",
        ),
        (["--flow_map", "--flow_map_guidance_scale", 0.5], "--flow_map_guidance_scale"),
        (
            ["--flow_map", "--lora_rank", 2, "--pretrained_model_name_or_path", "x"],
            "--flow_map trains every weight: leave out --lora_rank",
        ),
        (
            ["--flow_map", "--self_transcendence_teacher", "x"],
            "--flow_map has no place for another teacher: leave out --self_transcendence_teacher",
        ),
    ],
)
def test_flags_that_do_not_go_together(train, capsys, flags, message):
    with pytest.raises(SystemExit):
        train(*flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--new_classes"], "its classes are others than those of the data"),
        (["--num_classes", 12], "its classes are others"),
        (["--unconditional"], "its classes are others"),
        (["--resolution", 16], "its `sample_size` is 8, and that of the data 16"),
    ],
)
def test_a_teacher_of_something_else_is_refused(train, teacher, flags, problem):
    flags = ["--flow_map", "--pretrained_model_name_or_path", teacher, "--train_data_dir", DIGITS, "--dry_run", *flags]
    with pytest.raises(ValueError, match=f"`--flow_map_velocity` has to be data, but is teacher: .*{problem}"):
        train(*flags, tiny=FROM_PIPELINE)
    assert train(*flags, "--flow_map_velocity", "data", tiny=FROM_PIPELINE) == 0


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_targets_in_bfloat16_as_the_trainer_makes_them(derivative):
    """Close to float32's, of the times that the batch then has, and no hindrance to any gradient."""
    torch.manual_seed(0)
    sra = SRARegularizer(32, depth=1, teacher_depth=2)
    objective = LSEPObjective(make_transformer(num_layers=3, flow_map_depth=2), None, regularizers={"sra": sra})
    flags = ["--flow_map", "--flow_map_derivative", derivative, "--flow_map_equal_fraction", "0.2"]
    setup = SimpleNamespace(args=parse_args(flags, "", DIGITS.parent), vae=None, encoder=None, teacher=None)
    teachers, asked = make_teachers(objective, True, lambda: None), []

    class Average:
        def __call__(self, noisy_latents, timesteps, class_labels, depth):
            asked.append(timesteps)
            return teachers["average"](noisy_latents, timesteps, class_labels, depth)

    def make_inputs(autocast):
        batch = {name: value for name, value in make_batch(batch_size=64).items() if name != "probe_dropout_mask"}
        batch["images"], draws = batch.pop("latents"), torch.rand(64, 3, generator=torch.Generator().manual_seed(1))
        known = {**teachers, "average": Average()}
        return objective_inputs({**batch, "regularizer_draws": draws}, objective, setup, {}, known, (), autocast)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    expected = make_inputs(nullcontext)["target_velocity"]
    with autocast():
        inputs = make_inputs(autocast)
        objective(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    shift = inputs["timesteps"] - asked[-1]
    assert shift.min() >= -1e-6 and shift.max() <= 0.2 + 1e-6 and shift.std() > 0.03
    error = (inputs["target_velocity"] - expected).std() / expected.std()
    assert error < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"flow_map_velocity": "data", "flow_map_equal_fraction": 0.75, "flow_map_depth": 1}),
        (
            ["--pretrained_model_name_or_path"],
            {"flow_map_velocity": "teacher", "flow_map_equal_fraction": 0.25, "flow_map_depth": 2},
        ),
    ],
)
def test_what_is_not_given(train, teacher, capsys, flags, expected):
    flags = [*flags, *([teacher, "--train_data_dir", DIGITS] if flags else ["--num_layers", 2])]
    assert train("--flow_map", *flags, "--dry_run", tiny=FROM_PIPELINE) == 0
    settings = json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]
    assert {name: settings[name] for name in expected} == expected
    assert settings["transformer"]["flow_map_depth"] == expected["flow_map_depth"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (1.5, 250)),
        (["--flow_map"], (1.0, 4)),
        (["--flow_map", "--validation_guidance_scale", "2", "--validation_inference_steps", "8"], (2.0, 8)),
        (["--unconditional"], (1.0, 250)),
    ],
)
def test_samples_of_a_validation_are_those_of_the_model(flags, expected):
    """Where no recipe says how to draw: a flow map in few steps, as its guidance is built in."""
    args = parse_args(["--train_data_dir", str(DIGITS), "--num_layers", "2", *flags], "", DIGITS.parent)
    chosen = choose_validation_flags(args)
    assert (chosen["validation_guidance_scale"], chosen["validation_inference_steps"]) == expected
