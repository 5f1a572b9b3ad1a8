# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`examples/train_lsep.py`: what it writes, what it refuses, what it does when things go wrong.

Most runs are a call of its `main` in this process; `test_train_resume.py` kills real ones.
"""

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline
from hub_server import HubServer
from huggingface_hub import ModelCard
from image_folders import save_class_folders
from safetensors.torch import load_file
from tiny_models import make_batch, make_pipeline, make_transformer
from tiny_run import TINY_MODEL, TINY_RUN

from diffusers_lsep import LinearProbe, LSEPObjective, SiTTransformer2DModel
from diffusers_lsep.data.fingerprint import Fingerprint
from diffusers_lsep.files import locked_folder
from diffusers_lsep.hub.model_card import SavedPipeline, update_evaluation
from diffusers_lsep.objective import LSEPObjectiveOutput
from diffusers_lsep.training import output_folder, summary, trainer
from diffusers_lsep.training.arguments import parse_args
from diffusers_lsep.training.average import WeightAverage
from diffusers_lsep.training.checkpoints import find_damage, list_checkpoints
from diffusers_lsep.training.log import MetricsFile, StepMetrics, peak_memory, read_metrics
from diffusers_lsep.training.processes import usable_cores


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "train_lsep.py"


@pytest.fixture(scope="module")
def script(load_example):
    return load_example("train_lsep")


@pytest.fixture(scope="module")
def own_images(tmp_path_factory):
    """Six colour images of two classes, neither square nor of one size."""
    return save_class_folders(tmp_path_factory.mktemp("images"), ["ant", "bee"], [(20 + i, 30) for i in range(6)])


# The digits as one's own images: without the flags of their recipe.
OWN_DIGITS = ["--train_data_dir", str(ROOT / "examples" / "digits"), "--resolution", "8", "--image_channels", "1"]


def settings_of(run: Path) -> dict:
    return json.loads((run / "training_args.json").read_text())


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor
        for name in ("transformer", "probe")
        if (run / name).exists()
        for key, tensor in load_file(run / name / "diffusion_pytorch_model.safetensors").items()
    }


def assert_same_weights(one: Path, other: Path):
    one, other = final_weights(one), final_weights(other)
    assert one.keys() == other.keys() and len(one) > 10
    for name in one:
        assert torch.equal(one[name], other[name]), name


# --- What a run writes


@pytest.mark.slow
def test_the_default_command(tmp_path):
    """No data flag and no launcher flags: the digits, with `examples/configs/digits`, only shorter and silent."""
    accelerate = Path(sys.executable).parent / "accelerate"
    shorter = ["--max_train_steps", "3", "--validation_inference_steps", "2", "--checkpointing_steps", "2"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [accelerate, "launch", SCRIPT, *shorter], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    run = tmp_path / "lsep-digits"
    assert {path.name for path in run.iterdir()} == {
        *("checkpoint-2", "checkpoint-3", "curves.png", "logs", "metrics.jsonl", "model_index.json", "probe"),
        *("README.md", "fingerprint.npy", "samples", "scheduler", "training_args.json", "transformer"),
    }
    # the cores of this machine are used although the launcher says one
    settings = settings_of(run)
    assert settings["train_batch_size"] == 128 and settings["validation_split"] == "test"
    assert settings["threads"] == usable_cores()
    assert "probe=" in result.stderr and "accuracy=" in result.stderr

    pipeline = DiffusionPipeline.from_pretrained(run)
    assert type(pipeline).__name__ == "LSEPPipeline" and pipeline.labels["7"] == 7
    assert json.loads((run / "model_index.json").read_text())["transformer"] == [
        "diffusers_lsep",
        "SiTTransformer2DModel",
    ]
    probe = LinearProbe.from_pretrained(run / "probe").config
    assert (probe.num_classes, probe.depth) == (10, settings_of(run)["probe_depth"])
    grid = PIL.Image.open(run / "samples" / "step-3.png")
    assert grid.width > 640 and grid.height > 256  # ten classes and four images of each, 64 pixels wide
    assert any((run / "logs").rglob("events.out.tfevents.*"))


def test_what_is_logged(train, tmp_path):
    flags = ["--validation_steps", 2, "--learning_rate", "1e-2", "--lr_warmup_steps", 2, "--resolution", 8]
    assert train(*flags, curves=True) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert line["loss"] == pytest.approx(line["denoising_loss"] + line["probe_loss"], rel=1e-5)
        assert 0 <= line["probe_accuracy"] <= 1 and 0 <= line["data_wait"] < 1
        assert (
            len(line["probe_loss_by_time"]) == 10 and 1 <= sum(v is not None for v in line["probe_loss_by_time"]) <= 4
        )
        assert line["grad_norm"] > 0 and line["images_per_second"] > 0 and line["memory_gb"] > 0.1
        assert line["epoch"] == pytest.approx(line["step"] * 4 / 1437)
    assert [line["learning_rate"] for line in steps] == pytest.approx([0, 5e-3, 1e-2, 1e-2])
    held_out = [line for line in lines if "validation_denoising_loss" in line]
    assert [line["step"] for line in held_out] == [2, 4]
    assert all(0 <= line["validation_probe_accuracy"] <= 1 for line in held_out)
    assert {path.name for path in (tmp_path / "run" / "samples").iterdir()} == {"step-2.png", "step-4.png"}
    with PIL.Image.open(tmp_path / "run" / "curves.png") as curves:
        assert curves.width > 1000
    assert not list((tmp_path / "run").glob(".*"))


def test_metrics_after_the_checkpoint_are_written_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = '{"step": 1, "validation_loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    validation = '{"step": 2, "validation_loss": 1.0}\n'
    for validates in (True, False):
        # The third line is damaged, the last one unfinished: neither takes others with it.
        path.write_text(f'{first}{{"step": 2, "\n{validation}{{"step": 3}}\n{{"step": 4, "lo')
        metrics = MetricsFile(path, last_step=2, validates=validates)
        metrics.append({"step": 3, "loss": float("nan")})
        assert path.read_text() == f'{first}{"" if validates else validation}{{"step": 3, "loss": null}}\n'


@pytest.mark.slow
def test_own_images_without_a_class_label_column(train, own_images, tmp_path):
    assert train("--train_data_dir", own_images, "--resolution", 16, "--validation_split", 0.2) == 0
    settings = settings_of(tmp_path / "run")
    # With images and a model, what is not given comes from the paper; the average follows from the length.
    assert settings["learning_rate"] == 1e-4 and settings["probe_decay_start_epoch"] is None
    assert settings["ema_decay"] == pytest.approx(5 / 14) and settings["ema_warmup"] and settings["recipe"] is None
    assert (settings["training_images"], settings["crop_size_min"], settings["image_channels"]) == (5, 6, 3)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.labels == {"ant": 0, "bee": 1}
    assert pipeline.transformer.config.sample_size == 16 and pipeline.transformer.config.in_channels == 3


@pytest.mark.slow
def test_folders_named_by_numbers(train, own_images, tmp_path, capsys):
    """They are sorted as text, 1, 10, 2: the class "1" is the one with the id 0, in training as in the pipeline."""
    for i, name in enumerate(["1", "10", "2, two"]):
        shutil.copytree(own_images / ("ant", "bee")[i % 2], tmp_path / "images" / name)
    labels = ("--validation_labels", "1", "two", "2, two")
    assert train("--train_data_dir", tmp_path / "images", "--resolution", 8, *labels) == 0
    printed = "At every validation, images to draw: 3\n  class 0, '1': 1\n  class 2, '2, two': 2\n"
    assert printed in capsys.readouterr().out
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.get_label_ids(["1", "10", "2, two", "2"]) == [0, 1, 2, 2]


@pytest.mark.slow
def test_streaming(train, own_images, tmp_path):
    # `datasets` takes seconds to drop a file that was not read to its end: few runs.
    flags = ("--streaming", "--max_train_steps", 3)
    assert train(*flags) == 0
    assert settings_of(tmp_path / "run")["training_images"] == 1437
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    train(*flags, "--resume_from_checkpoint", "latest")
    assert [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line] == losses

    shutil.copytree(own_images, tmp_path / "images")  # a folder that `datasets` has not counted yet
    with pytest.raises(ValueError, match="`num_train_images` has to be given"):
        train("--streaming", "--train_data_dir", tmp_path / "images", output_dir=tmp_path / "own")


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, expected",
    [
        ("SiT-XL/2", (8, 0.0225, 0.03, 10, 1e-4)),
        ("SiT-L/4", (8, 0.03, 0.03, 1, 1e-4)),
        ("SiT-B/8", (4, 0.03, 0.03, 1, 3e-2)),
        ("SiT-S/2", (4, 0.0225, 0.03, 10, 1e-4)),
    ],
)
def test_dry_run_shows_the_papers_settings_and_writes_nothing(train, own_images, tmp_path, capsys, preset, expected):
    arguments = ("--dry_run", "--train_data_dir", own_images, "--preset", preset, "--train_batch_size", 2)
    assert train(*arguments, tiny=()) == 0
    output = capsys.readouterr().out
    settings = json.JSONDecoder().raw_decode(output)[0]
    names = ["probe_depth", "probe_weight_start", "probe_weight_end", "num_probe_weights", "probe_learning_rate"]
    assert tuple(settings[name] for name in names) == expected
    assert settings["resolution"] == 256 and settings["max_train_steps"] == 800 * 3
    for text in ("parameters", "tokens: ", "images: 6 to train on", "3.0 per epoch", "GB of state"):
        assert text in output
    # 16,384 tokens, for want of a VAE
    assert ("A run would be refused: training does not fit" in output) == (preset in ("SiT-XL/2", "SiT-L/4"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_does_not_fit_into_memory_is_refused_before_any_work(train, own_images, tmp_path, monkeypatch):
    flags = ("--train_data_dir", own_images, "--preset", "SiT-XL/2")
    needed = r"at least 13.47 GB of state and [\d.]+ GB of activations, and 10.78 GB of copies for checkpoints, of "
    with pytest.raises(ValueError, match=f"{needed}.* a VAE"):
        train(*flags, tiny=())
    monkeypatch.setattr(summary, "memory_limit", lambda device: 100_000)
    with pytest.raises(ValueError, match=r"does not fit .* of 0.00 GB in all. What helps: a `--train_"):
        train()
    assert list(tmp_path.iterdir()) == []


def test_settings_that_are_not_the_defaults_are_those_that_were_given(train, own_images, capsys):
    said = "settings that are not the defaults: "
    flags = [
        "--train_data_dir",
        own_images,
        "--num_layers",
        2,
        "--validation_labels",
        "ant",
        "bee",
        "--report_to",
        "none",
    ]
    assert train(*flags, "--resolution", 32, "--dry_run", tiny=()) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith(said)]
    given = {entry.partition(" ")[::2] for entry in line.removeprefix(said).split(", ")}
    assert given - {("output_dir", str(Path("run")))} >= {
        ("train_data_dir", str(own_images)),
        ("num_layers", "2"),
        ("validation_labels", "ant bee"),
        ("resolution", "32"),
        ("report_to", "none"),
    }
    assert {name for name, _ in given} == {
        *(flag[2:] for flag in flags if str(flag)[:2] == "--"),
        "resolution",
        "output_dir",
    }


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        (
            ["--train_data_dir", "my images", "--validation_split", "0.1", "--label_column", "kind"],
            "probe run --data 'my images' --validation_split 0.1 --label_column kind --method ridge"
            " --output_dir run-probing",
        ),
        (["--train_data_dir", "images"], "space --pretrained_model_name_or_path run --output_dir run-space"),
        (
            ["--dataset_name", "images", "--dataset_config_name", "small", "--validation_split", "test"],
            "space --pretrained_model_name_or_path run --output_dir run-space",
        ),
    ],
)
def test_how_to_go_on_is_for_the_same_data(flags, command):
    args = parse_args(["--output_dir", "run/", "--num_layers", "2", *flags], "", SCRIPT.parent)
    lines = summary.describe_result(args).splitlines()
    assert lines[-1] == f"  diffusers-lsep {command}"
    assert lines[-2].endswith(" --output_dir run-samples")


@pytest.mark.slow
def test_a_dry_run_may_name_a_folder_that_holds_a_run(train, tmp_path, capsys):
    train("--max_train_steps", 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert train("--dry_run") == 0
    output = capsys.readouterr().out
    assert "A run would be refused: `--output_dir`" in output and "tokens: 16 per image" in output
    assert train("--dry_run", "--overwrite_output_dir") == 0
    assert "would be refused" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# --- Own images, and no model given


@pytest.fixture(scope="module")
def coloured_images(tmp_path_factory):
    """Photographs of three colours, in JPEG."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(20):
            pixels = np.array(colour) + rng.normal(0, 12, 3) + rng.normal(0, 12, (48, 64, 3))
            PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.jpg")
    return folder


COLOURS = {"grass": (60, 170, 50), "sky": (80, 140, 230), "tomato": (220, 60, 40)}


@pytest.mark.slow
def test_from_a_folder_of_images_to_a_grid_that_shows_them(train, coloured_images, tmp_path, capsys):
    """The command of the README, with fewer steps: the samples have the colours of their classes."""
    shorter = ["--max_train_steps", 60, "--lr_warmup_steps", 5, "--validation_steps", 60]
    data = ["--train_data_dir", coloured_images, "--num_cpu_threads", 1, "--report_to", "none"]
    assert train(*data, *shorter, "--validation_inference_steps", 20, tiny=()) == 0
    output = capsys.readouterr().out
    assert "recipe: examples/configs/own-images-32, since no model is given, and no GPU was found" in output
    assert "pixels: 64 x 48 pixels in colour (16 images looked at); used is the central square, scaled down" in output

    with PIL.Image.open(tmp_path / "run" / "samples" / "step-60.png") as grid:
        pixels = np.asarray(grid.convert("RGB")).astype(float)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.transformer.config.sample_size == 32 and pipeline.labels == {"grass": 0, "sky": 1, "tomato": 2}
    for column, colour in enumerate(COLOURS.values()):
        drawn = pixels[:64, 66 * column + 1 : 66 * column + 63].mean(axis=(0, 1))
        assert np.abs(drawn - colour).max() < 40, (column, drawn, colour)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, gpu, recipe, model",
    [
        ([], False, "own-images-32", (32, 4, 3)),
        ([], True, "own-images-64", (64, 4, 3)),
        (["--pretrained_vae_model_name_or_path", "tiny-vae"], True, "own-images-256-vae", (128, 2, 4)),
        (["--resolution", "16", "--train_batch_size", "3", "--qk_norm"], False, "own-images-32", (16, 4, 3)),
        (["--preset", "SiT-S/8", "--resolution", "16"], True, None, (16, 8, 3)),
        (["--num_layers", "2", "--resolution", "16"], False, None, (16, 2, 3)),
    ],
)
def test_which_recipe_is_taken(train, own_images, tiny_vae_folder, monkeypatch, capsys, flags, gpu, recipe, model):
    monkeypatch.setattr("diffusers_lsep.training.recipes.has_gpu", lambda: gpu)
    flags = [tiny_vae_folder if flag == "tiny-vae" else flag for flag in flags]
    assert train("--train_data_dir", own_images, *flags, "--dry_run", "--mixed_precision", "no", tiny=()) == 0
    output = capsys.readouterr().out
    settings = json.JSONDecoder().raw_decode(output)[0]
    assert settings["recipe"] == recipe and (f"recipe: examples/configs/{recipe}, since" in output) == bool(recipe)
    config = settings["transformer"]
    assert (config["sample_size"], config["patch_size"], config["in_channels"]) == model
    assert recipe is None or settings["max_train_steps"] >= settings["validation_steps"] >= settings["logging_steps"]
    assert recipe is None or settings["max_train_steps"] >= settings["checkpointing_steps"]
    if "--train_batch_size" in flags:
        assert settings["train_batch_size"] == 3 and config["qk_norm"]


@pytest.mark.slow
def test_a_run_goes_on_with_the_recipe_that_it_began_with(train, own_images, tmp_path, monkeypatch, capsys):
    """Also on another machine, and a run of a version without recipes with the paper's values."""
    shorter = ["--train_data_dir", own_images, "--resolution", 16, "--train_batch_size", 2, "--max_train_steps", 1]
    shorter += ["--validation_inference_steps", 1, "--num_validation_images", 1, "--report_to", "none"]
    assert train(*shorter, tiny=()) == 0
    monkeypatch.setattr("diffusers_lsep.training.recipes.has_gpu", lambda: True)
    resume = ("--resume_from_checkpoint", "latest", "--dry_run")
    capsys.readouterr()
    assert train(*shorter, *resume, tiny=()) == 0
    assert json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]["recipe"] == "own-images-32"

    settings_file = tmp_path / "run" / "training_args.json"
    settings = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps({name: value for name, value in settings.items() if name != "recipe"}))
    with pytest.raises(ValueError, match="another method or other data.*'num_layers': 6.* -> .*'num_layers': 28"):
        train(*shorter, *resume, tiny=())


def test_epochs_take_the_place_of_steps_that_a_recipe_gives(train, capsys):
    assert train("--dry_run", "--num_train_epochs", 2, "--train_batch_size", 4, tiny=()) == 0  # of 1,437 digits
    assert json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]["max_train_steps"] == 719
    for flags in ("--max_train_steps 7 --num_train_epochs 2", "--num_train_epochs 2 --max_train_steps=7"):
        assert train("--dry_run", *flags.split()) == 0  # given both, steps count, as in diffusers' scripts
        assert json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]["max_train_steps"] == 7


def test_recipes_are_found_beside_a_folder_of_their_name(train, tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert train("--dry_run") == 0


def test_config_files_are_argument_lists(train, tmp_path):
    config = tmp_path / "my config"
    config.write_text("# a comment\n--learning_rate 0.25  # another\n\n--validation_labels 3 '4'\n")
    assert train(f"@{config}", "--dry_run", "--learning_rate", 0.5) == 0
    assert train(f"@{config}") == 0
    settings = settings_of(tmp_path / "run")
    assert settings["learning_rate"] == 0.25 and settings["validation_labels"] == ["3", "4"]
    assert settings["lr_warmup_steps"] == 20  # from the config of the digits


def test_plain_sit(train, tmp_path):
    assert train("--no_lsep", "--validation_steps", 4) == 0
    assert not (tmp_path / "run" / "probe").exists()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert "probe_loss" not in lines[0] and lines[0]["loss"] == lines[0]["denoising_loss"]
    assert set(lines[-1]) == {"step", "epoch", "validation_denoising_loss"}


@pytest.mark.slow
def test_cheaper_probes(train, tmp_path):
    train("--coupled_dropout", "--probe_fraction", 0.25, "--logging_steps", 1)
    settings = settings_of(tmp_path / "run")
    assert settings["coupled_dropout"] and settings["probe_fraction"] == 0.25
    for line in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        if "probe_loss" in line:
            assert 0.01 < line["probe_loss"] < 0.2, "ln 10 times a weight of 0.02 to 0.03: a mean, not a sum"


def test_model_config_and_cosine_path(train, tmp_path):
    model = SiTTransformer2DModel(8, 4, 1, None, 1, 2, 8, num_classes=12, mlp_ratio=2.0, qk_norm=True)
    model.save_config(tmp_path / "model")
    assert (
        train(
            *("--model_config_name_or_path", tmp_path / "model", "--probe_depth", 1, "--crop_size_min", 1),
            *(
                "--path_type",
                "cosine",
                "--timestep_sampling",
                "logit_normal",
                "--train_data_dir",
                ROOT / "examples/digits",
            ),
            tiny=TINY_RUN,
        )
        == 0
    )
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.scheduler.config.path_type == pipeline.config.path_type == "cosine"
    assert {name: pipeline.transformer.config[name] for name in model.config if not name.startswith("_")} == {
        name: value for name, value in model.config.items() if not name.startswith("_")
    }


@pytest.mark.slow
def test_averages(train, tmp_path):
    """The saved weights are the average that the flags ask for."""
    recorded = []
    step = WeightAverage.step

    def record(ema, parameters):
        parameters = list(parameters)
        if not recorded:
            recorded.append([p.clone() for p in ema.shadow_params])
        step(ema, parameters)
        recorded.append([p.detach().clone() for p in parameters])

    def average(decays):
        shadow = recorded[0]
        for decay, weights in zip(decays, recorded[1:], strict=True):
            shadow = [decay * s + (1 - decay) * w for s, w in zip(shadow, weights)]
        return shadow

    cases = {
        "constant": (["--ema_decay", 0.9], [0.9] * 4),
        "warm-up": (["--ema_decay", 0.2, "--ema_warmup"], [0.0, 2 / 11, 0.2, 0.2]),
        "by the length": ([], [0.0, 2 / 11, 3 / 12, 4 / 13]),
    }
    WeightAverage.step = record
    try:
        for name, (flags, decays) in cases.items():
            recorded.clear()
            run = tmp_path / name
            train(*OWN_DIGITS, *flags, output_dir=run)
            model = SiTTransformer2DModel.from_pretrained(run / "transformer")
            for saved, expected in zip(model.parameters(), average(decays)):
                torch.testing.assert_close(saved, expected, rtol=1e-5, atol=1e-7)
        recorded.clear()
        train("--no-use_ema", output_dir=tmp_path / "none")
        assert not recorded
    finally:
        WeightAverage.step = step
    raw = load_file(tmp_path / "none" / "checkpoint-4" / "model.safetensors")
    saved = final_weights(tmp_path / "none")
    assert all(torch.equal(raw[name], saved[name]) for name in saved)


@pytest.mark.slow
def test_an_average_that_holds_the_start_is_said(train, capsys, tmp_path):
    sentence = "After 4 steps with `--ema_decay 0.9` the average of the weights still holds 65.6% of the initial"
    train("--ema_decay", 0.9, tiny=[*OWN_DIGITS, *TINY_MODEL, *TINY_RUN])
    assert capsys.readouterr().out.count(sentence) == 2, "before training, and at the end"
    for flags in (
        ["--ema_decay", 0.9, "--ema_warmup"],
        ["--ema_decay", 0.9, "--no-use_ema"],
        ["--ema_decay", 0.2],
        [],
    ):
        train(*flags, "--dry_run", tiny=[*OWN_DIGITS, *TINY_MODEL, *TINY_RUN], output_dir=tmp_path / "dry")
        assert "initial weights" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_average_follows_from_the_length(train, capsys):
    def average(*flags):
        train("--dry_run", *flags, tiny=[*OWN_DIGITS, *TINY_MODEL, *TINY_RUN])
        settings = json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]
        return settings["ema_decay"], settings["ema_warmup"]

    assert average("--max_train_steps", 300) == (301 / 310, True)  # looks back over 34 steps
    assert average("--max_train_steps", 400_000) == (0.9999, True)
    assert average("--ema_decay", 0.99) == (0.99, False)
    assert average("--ema_decay", 0.99, "--ema_warmup") == (0.99, True)


@pytest.mark.slow
def test_a_gradient_norm_of_zero_leaves_gradients_alone(train, tmp_path):
    kept = {}
    for limit in (0, 1e9, 1e-3):
        train("--max_train_steps", 1, "--max_grad_norm", limit, output_dir=tmp_path / str(limit))
        kept[limit] = load_file(tmp_path / str(limit) / "checkpoint-1" / "optimizer.safetensors")
    assert all(torch.equal(value, kept[1e9][name]) for name, value in kept[0].items())
    assert not all(torch.equal(value, kept[1e9][name]) for name, value in kept[1e-3].items())


@pytest.mark.slow
@pytest.mark.parametrize("probe", [[], ["--coupled_dropout", "--probe_fraction", 0.25, "--seed", 5]])
def test_accumulation_and_checkpointing_give_the_same_gradients(train, tmp_path, probe):
    variants = {
        "whole": ["--train_batch_size", 8],
        "accumulated": ["--train_batch_size", 2, "--gradient_accumulation_steps", 4],
        "checkpointed": ["--train_batch_size", 8, "--gradient_checkpointing"],
    }
    moments, lines = {}, {}
    for name, flags in variants.items():
        train(*flags, *probe, "--max_train_steps", 1, "--max_grad_norm", 1e9, output_dir=tmp_path / name)
        moments[name] = load_file(tmp_path / name / "checkpoint-1" / "optimizer.safetensors")
        lines[name] = read_metrics(tmp_path / name / "metrics.jsonl")[0]
    for name in ("accumulated", "checkpointed"):
        for key in ("loss", "denoising_loss", "probe_loss", "probe_accuracy"):
            assert lines[name][key] == pytest.approx(lines["whole"][key], rel=1e-4), key
        of_bins = [[loss or 0.0 for loss in lines[run]["probe_loss_by_time"]] for run in (name, "whole")]
        assert of_bins[0] == pytest.approx(of_bins[1], rel=1e-4)
        for key, value in moments["whole"].items():
            scale = value.abs().max().item()
            torch.testing.assert_close(moments[name][key], value, rtol=0, atol=1e-5 * scale, msg=key)


def test_metrics_weigh_each_sample_of_the_probe_the_same(train):
    """Two steps of two batches, of which the probe is trained on 3, 0, 1 and 2 samples."""
    metrics = StepMetrics(Accelerator(cpu=True), gradient_accumulation_steps=2)
    hits = [[1.0, 0.0, 0.0], [], [1.0], [1.0, 1.0]]
    times = [[0.05, 0.05, 0.55], [], [0.05], [0.55, 0.95]]
    for step in range(2):
        for batch in (2 * step, 2 * step + 1):
            losses, accuracy = torch.tensor(hits[batch]) + 1, torch.tensor(hits[batch]).mean().nan_to_num()
            output = LSEPObjectiveOutput(
                loss=losses.sum() / 2,
                denoising_loss=torch.zeros(()),
                probe_loss=losses.sum() / 2,  # 4 samples per batch, of which half are expected
                probe_accuracy=accuracy,
                denoising_losses=torch.zeros(4),
                probe_losses=losses,
            )
            metrics.add_batch(output, torch.tensor(times[batch]), data_wait=0.0)
        metrics.add_step(torch.ones(()))
    found, losses, _ = metrics.collect()
    assert losses == [4 / 4, 6 / 4] and found["loss"] == found["probe_loss"] == 10 / 8
    assert found["probe_accuracy"] == pytest.approx(4 / 6)
    expected = [5 / 3] + [None] * 4 + [3 / 2] + [None] * 3 + [2.0]
    assert found["probe_loss_by_time"] == [value and pytest.approx(value) for value in expected]


def test_accuracy_is_that_of_the_samples_whose_loss_is_finite(train):
    objective = LSEPObjective(make_transformer(), LinearProbe(32, 10), probe_depth=1)
    batch = make_batch()
    batch["class_labels"][:2] = 0  # the first class, which a row of NaN would be given
    broken = {**batch, "latents": batch["latents"].clone()}
    broken["latents"][:2] = torch.nan
    with torch.no_grad():
        output = objective(**broken)
        expected = objective(**{name: value[2:] for name, value in batch.items()}).probe_accuracy
    metrics = StepMetrics(Accelerator(cpu=True))
    metrics.add_batch(output, batch["timesteps"], data_wait=0.0)
    metrics.add_step(torch.ones(()))
    assert metrics.collect()[0]["probe_accuracy"] == pytest.approx(expected.item())


@pytest.mark.slow
def test_mixed_precision_keeps_weights_in_float32(train, tmp_path):
    assert train("--mixed_precision", "bf16", "--validation_steps", 2) == 0
    assert {tensor.dtype for tensor in final_weights(tmp_path / "run").values()} == {torch.float32}
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    train(output_dir=tmp_path / "exact")
    exact = read_metrics(tmp_path / "exact" / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(exact[0]["loss"], rel=2e-2)
    assert lines[0]["loss"] != exact[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True])
def test_a_compiled_step_is_compiled_once_and_the_same(train, tmp_path, monkeypatch, regional):
    """As with `accelerate launch --dynamo_backend`, which hands on its flags like this."""
    flags = ["--train_batch_size", 16, "--max_train_steps", 12, "--checkpointing_steps", 12]
    train(*flags, output_dir=tmp_path / "eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "false")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "true")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(regional).lower())
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    train(*flags)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and "recompile_limit" not in str(counters)
    graphs = counters["stats"]["unique_graphs"]
    assert 1 < graphs <= 16 if regional else graphs == 1

    eager, compiled = (
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("eager", "run")
    )
    assert len(compiled) == 12 and compiled == pytest.approx(eager, rel=1e-5)
    weights, expected = final_weights(tmp_path / "run"), final_weights(tmp_path / "eager")
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.slow
def test_late_in_training_the_probe_weighs_less(train, tmp_path):
    flags = ["--probe_decay_start_epoch", 0, "--probe_decay_epochs", 4 / 1437, "--learning_rate", 0]
    flags += ["--probe_learning_rate", 0, "--crop_size_min", 4]
    train(*flags, output_dir=tmp_path / "decay")
    train(*flags[4:], output_dir=tmp_path / "constant")  # as the paper: no decay unless it is asked for
    losses = {
        name: [line["probe_loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("decay", "constant")
    }
    factors = np.array(losses["decay"]) / np.array(losses["constant"])
    np.testing.assert_allclose(factors, [1, 0.1, 0.01, 0.001], rtol=1e-4)


@pytest.mark.slow
def test_held_out_losses_weigh_what_those_of_training_do(train, tmp_path):
    flags = ["--learning_rate", 0, "--probe_learning_rate", 0, "--validation_split", "test", "--validation_steps", 2]
    decay = ["--probe_decay_start_epoch", 0, "--probe_decay_epochs", 4 / 1437]
    train(*flags, *decay, output_dir=tmp_path / "decay")
    train(*flags, output_dir=tmp_path / "constant")
    losses = {}
    for name in ("decay", "constant"):
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        losses[name] = [line["validation_probe_loss"] for line in lines if "validation_probe_loss" in line]
    np.testing.assert_allclose(np.array(losses["decay"]) / losses["constant"], [1e-2, 1e-4], rtol=1e-4)


@pytest.mark.slow
def test_push_to_hub(tmp_path):
    """The pipeline, its probe and its card go to the Hub, and nothing else."""
    with HubServer(tmp_path / "hub", {"hf_owner": "lsep"}) as hub:
        environment = hub.environment(tmp_path / "home", HF_TOKEN="hf_owner")
        push = ("--push_to_hub", "--hub_model_id", "lsep/digits", "--license", "cc-by-4.0")
        command = [sys.executable, SCRIPT, *TINY_MODEL, *TINY_RUN, "--output_dir", tmp_path / "run", *push]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "Pushed it: " in result.stdout
        files = hub.files("lsep/digits")
    assert set(files) - {".gitattributes"} == {
        *("README.md", "model_index.json", "scheduler/scheduler_config.json", "samples/step-4.png"),
        *("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"),
        *("probe/config.json", "probe/diffusion_pytorch_model.safetensors"),
    }
    weights = (tmp_path / "run" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert files["transformer/diffusion_pytorch_model.safetensors"] == weights
    card = files["README.md"].decode()
    for text in ("license: cc-by-4.0", "- lsep", "`train_batch_size`", "samples/step-4.png", '"lsep/digits"'):
        assert text in card
    assert str(ROOT) not in card and str(tmp_path) not in card


@pytest.mark.slow
def test_the_card_of_a_new_run_says_nothing_of_the_old_one(tmp_path):
    """After `--overwrite_output_dir`; the second run starts from the first one's pipeline on the Hub."""
    run = tmp_path / "run"

    def train(*flags):
        command = [sys.executable, SCRIPT, *TINY_MODEL, *TINY_RUN, "--output_dir", run, *flags]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return ModelCard.load(run / "README.md")

    with HubServer(tmp_path / "hub", {"hf_owner": "lsep"}) as hub:
        environment = hub.environment(tmp_path / "home", HF_TOKEN="hf_owner")
        old = train("--push_to_hub", "--hub_model_id", "lsep/digits", "--license", "cc-by-4.0")
        results = {"metrics": {"fid": 5.7}, "weights": SavedPipeline(run).hashes}
        (run / "eval_results.json").write_text(json.dumps(results))
        update_evaluation(run)
        card = ModelCard.load(run / "README.md")
        assert card.data.eval_results[0].metric_value == 5.7 and old.data.license == "cc-by-4.0"
        text = card.content.replace("\nlibrary_name", "\nlanguage: en\nlibrary_name")
        (run / "README.md").write_text(text + "\nWritten by hand.\n")
        new = train("--overwrite_output_dir", "--no_lsep", "--pretrained_model_name_or_path", "lsep/digits")
    for text in ("license: cc-by-4.0", "5.7", "Trained with LSEP", "yun2025lsep"):
        assert text not in new.content
    assert new.data.eval_results is None and new.data.license is None and new.data.base_model == "lsep/digits"
    assert new.data.tags == ["class-conditional", "sit", "arxiv:2401.08740"] and new.data.language == "en"
    assert "Written by hand." in new.text and "Fine-tuned as a plain SiT" in new.text
    assert "Fine-tuned from [lsep/digits](https://huggingface.co/lsep/digits)." in new.text
    assert str(tmp_path) not in new.content


# --- Through a VAE


def test_through_a_vae(train, own_images, tiny_vae_folder, tmp_path):
    vae = ("--pretrained_vae_model_name_or_path", tiny_vae_folder)
    assert train("--train_data_dir", own_images, "--resolution", 16, *vae, "--random_flip") == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.transformer.config.sample_size == 8 and pipeline.transformer.config.in_channels == 4
    assert pipeline("bee", num_inference_steps=2).images[0].size == (16, 16)


@pytest.mark.slow
def test_the_vae_computes_in_float32(train, own_images, tiny_vae_folder, tmp_path, monkeypatch):
    """In training and in validation, whatever the rest does."""
    for name in ("_encode", "_decode"):
        compute = getattr(AutoencoderKL, name)

        def check(self, x, *args, compute=compute, **kwargs):
            computed.append(compute.__name__)
            assert x.dtype == self.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
            return compute(self, x, *args, **kwargs)

        monkeypatch.setattr(AutoencoderKL, name, check)
    computed = []
    flags = ("--resolution", 16, "--mixed_precision", "bf16", "--validation_steps", 4, "--validation_split", 0.2)
    flags += ("--pretrained_vae_model_name_or_path", tiny_vae_folder)
    assert train("--train_data_dir", own_images, *flags) == 0
    assert {"_encode", "_decode"} == set(computed)


@pytest.mark.slow
def test_latents_in_the_original_layout_train_like_the_images(train, own_images, tiny_vae_folder, tmp_path):
    """The same moments, from the VAE at every step or from files, are the same run."""
    from diffusers_lsep.data.images import load_image_dataset, open_images

    source, _, _ = open_images(load_image_dataset(train_data_dir=own_images), 16, 3)
    vae = AutoencoderKL.from_pretrained(tiny_vae_folder)
    with torch.no_grad():
        posterior = vae.encode(source.load(np.arange(6), np.zeros(6, dtype=bool))).latent_dist
    moments = torch.cat([posterior.mean, posterior.std], dim=1).numpy()
    folder = tmp_path / "vae-sd" / "00000"
    folder.mkdir(parents=True)
    labels = []
    for row, label in enumerate(source.labels.tolist()):
        np.save(folder / f"img-mean-std-{row:08d}.npy", moments[row])
        labels.append([f"00000/img-mean-std-{row:08d}.npy", label])
    (tmp_path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))

    flags = ["--pretrained_vae_model_name_or_path", tiny_vae_folder, "--logging_steps", 4]
    train("--train_data_dir", own_images, "--resolution", 16, *flags, output_dir=tmp_path / "images")
    train("--latents_dir", tmp_path / "vae-sd", *flags, output_dir=tmp_path / "latents")
    losses = [read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("images", "latents")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert DiffusionPipeline.from_pretrained(tmp_path / "latents").vae is not None


# --- Without labels


@pytest.fixture(scope="module")
def loose_images(tmp_path_factory, own_images):
    """The same images in one folder, with nothing that says what they are."""
    folder = tmp_path_factory.mktemp("loose")
    for path in sorted(own_images.glob("*/*.png")):
        shutil.copy(path, folder / f"{path.parent.name}-{path.name}")  # in the same order
    return folder


def draw_both(pipeline):
    """Images of the one class and of the null class, from the same noise."""
    noise = torch.randn(2, pipeline.transformer.config.in_channels, *[pipeline.transformer.config.sample_size] * 2)
    time, null = torch.full((2,), 0.5), pipeline.transformer.config.num_classes
    with torch.no_grad():
        return [pipeline.transformer(noise, time, torch.full((2,), i)).sample for i in (0, null)]


def test_unconditional(train, loose_images, tmp_path, capsys):
    flags = ("--train_data_dir", loose_images, "--resolution", 16, "--unconditional", "--validation_split", 0.2)
    assert train(*flags) == 0
    printed = capsys.readouterr().out
    assert (
        "5 to train on, 1 held out, without labels: all are the null class, and LSEP, which needs classes, is off"
        in printed
    )
    assert "At every validation, images to draw: 1\n  class 0, 'unconditional': 1\n" in printed
    run = tmp_path / "run"
    settings, first = settings_of(run), read_metrics(run / "metrics.jsonl")[0]
    assert settings["no_lsep"] and settings["validation_guidance_scale"] == 1.0 and not (run / "probe").exists()
    assert "probe_loss" not in first and first["loss"] == first["denoising_loss"]
    for folder in (run, run / "checkpoint-2" / "pipeline"):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        assert pipeline.transformer.config.num_classes == 1 and pipeline.labels == {"unconditional": 0}
        assert torch.equal(*draw_both(pipeline)), "its class is the null class"
    assert pipeline("unconditional", num_inference_steps=2).images[0].size == (16, 16)
    card = (run / "README.md").read_text()
    assert "An unconditional flow-matching model" in card and "| Classes | none: trained without labels |" in card
    assert "class-conditional" not in card and "plain SiT" in card and 'class_labels=["unconditional"]' in card


@pytest.mark.slow
def test_unconditional_training_reads_no_labels(train, own_images, loose_images, tmp_path):
    """Images in folders of classes, or in one: the same run, of the null class alone."""
    for name, images in (("folders", own_images), ("loose", loose_images)):
        train("--train_data_dir", images, "--resolution", 16, "--unconditional", output_dir=tmp_path / name)
    assert_same_weights(tmp_path / "loose", tmp_path / "folders")
    (other, null), (other_later, null_later) = (
        load_file(tmp_path / "loose" / f"checkpoint-{step}" / "model.safetensors")[
            "transformer.class_embedding.weight"
        ]
        for step in (2, 4)
    )
    assert torch.equal(other, other_later) and not torch.equal(null, null_later)


@pytest.mark.slow
def test_unconditional_fine_tuning(train, tmp_path, own_images, loose_images):
    """The labels of a model go, what it knows of images stays."""
    images = ("--train_data_dir", own_images, "--resolution", 16)
    train(*images, output_dir=tmp_path / "classes")
    before = DiffusionPipeline.from_pretrained(tmp_path / "classes")
    start = ("--pretrained_model_name_or_path", tmp_path / "classes")
    flags = ("--train_data_dir", loose_images, "--unconditional", "--learning_rate", 0)
    assert train(*flags, *start, tiny=TINY_RUN) == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    torch.manual_seed(0)
    null, _ = draw_both(pipeline)
    torch.manual_seed(0)
    torch.testing.assert_close(null, draw_both(before)[1])


@pytest.mark.slow
def test_unconditional_latents_and_streams(train, load_example, loose_images, tiny_vae_folder, tmp_path):
    encode, vae = load_example("encode_latents"), ("--pretrained_vae_model_name_or_path", str(tiny_vae_folder))
    arguments = ["--train_data_dir", str(loose_images), "--output_dir", str(tmp_path / "moments"), *vae]
    arguments += ["--resolution", "16", "--dataloader_num_workers", "0", "--dtype", "fp32"]
    with pytest.raises(ValueError, match="one folder of images per class"):
        encode.main(arguments)
    encode.main([*arguments, "--unconditional"])
    train("--latents_dir", tmp_path / "moments", "--unconditional", output_dir=tmp_path / "latents")
    train(
        "--train_data_dir", loose_images, "--resolution", 16, *vae, "--unconditional", output_dir=tmp_path / "images"
    )
    losses = [read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("images", "latents")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    with pytest.raises(ValueError, match="`--latents_dir` has to have labels without `--unconditional`"):
        train("--latents_dir", tmp_path / "moments", output_dir=tmp_path / "conditional")
    # Latents in the layout of EDM2, whose document says that there are no labels
    (tmp_path / "vae-sd").mkdir()
    for row in range(4):
        np.save(tmp_path / "vae-sd" / f"img-mean-std-{row:08d}.npy", np.ones((8, 8, 8), np.float32))
    (tmp_path / "vae-sd" / "dataset.json").write_text('{"labels": null}')
    assert train("--latents_dir", tmp_path / "vae-sd", *vae, "--unconditional") == 0
    stream = ("--train_data_dir", loose_images, "--streaming", "--num_train_images", 6, "--resolution", 16)
    assert train(*stream, "--unconditional", "--max_train_steps", 2, output_dir=tmp_path / "stream") == 0
    assert torch.equal(*draw_both(DiffusionPipeline.from_pretrained(tmp_path / "stream")))


@pytest.mark.parametrize("flags", [("--num_classes", 3), ("--validation_labels", 1), ("--new_classes",)])
def test_unconditional_runs_have_no_classes(train, tmp_path, flags, capsys):
    with pytest.raises(SystemExit):
        train("--unconditional", "--pretrained_model_name_or_path", "model", *flags)
    assert f"--unconditional trains without classes: leave out {flags[0]}" in capsys.readouterr().err


# --- What is refused


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preset", "SiT-XXL/2"], "--preset: invalid choice: 'SiT-XXL/2'.*SiT-B/2"),
        (["--train_batch_size", "0"], "--train_batch_size: has to be at least 1, but is 0"),
        (["--class_dropout_prob", "1.5"], "--class_dropout_prob: has to be in 0..1, but is 1.5"),
        (["--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
        (["--path_type", "VP"], "--path_type: invalid choice: 'VP'"),
        (["--seed", "-1"], "--seed: has to be in 0..4294967295, but is -1"),
        (
            ["--probe_decay_start_epoch", "1", "--probe_decay_epochs", "0"],
            "--probe_decay_epochs: has to be above 0",
        ),
        (["--probe_decay_epochs", "9"], "--probe_decay_epochs needs --probe_decay_start_epoch"),
        (["--regularizers", "sra", "--sra_decay_epochs", "9"], "--sra_decay_epochs needs --sra_decay_start_epoch"),
        (["--milestone_steps", "9"], "--milestone_steps needs --checkpoints_total_limit"),
        (["--post_hoc_ema_steps", "9"], "--post_hoc_ema_steps needs --post_hoc_ema_sigmas"),
        ([*OWN_DIGITS, "--no-ema_warmup"], "--no-ema_warmup needs --ema_decay"),
        (["--max_train_step", "3"], "unrecognized arguments: --max_train_step"),
        (
            ["--train_data_dir", "a", "--dataset_name", "b"],
            "only one source of data .* --dataset_name and --train",
        ),
        (["--resume_from_checkpoint", "latest", "--overwrite_output_dir"], "give one of them"),
        (["--push_to_hub"], "--push_to_hub needs --license"),
        (["--streaming", "--latents_dir", "a"], "--streaming is for images"),
        (["--streaming", "--train_data_dir", "a", "--validation_split", "b"], "--streaming has no held-out images"),
        (["--probe_fraction", "0"], "--probe_fraction: has to be above 0, but is 0.0"),
    ],
)
def test_usage_errors(train, capsys, flags, message, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        train(*flags)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--probe_depth", 3], r"`probe_depth` has to lie in 1..2, .* but is 3"),
        (["--crop_size_min", 5], "`--crop_size_min` has to lie in 1..4, .* but is 5"),
        (["--resolution", 9], "`--resolution` has to be divisible by 2 .* but is 9"),
        (["--num_classes", 4], "`num_classes` has to be at least 10, the number of classes of `label_column` 'label'"),
        (["--label_column", "digit"], r"`label_column` .* no 'digit'; the columns are \['image', 'label'\]"),
        (["--image_column", "png"], "`image_column` .* no 'png'"),
        (["--validation_split", "val"], "`validation_split` has no split 'val'"),
        (["--validation_split", 1.5], "`--validation_split` has to be a split or a fraction .* is 1.5"),
        (
            ["--validation_labels", 3, "ten"],
            r"`--validation_labels`: there is no class 'ten'\. The names are \['0', '1",
        ),
        (["--validation_labels", 10], r"`--validation_labels` has to lie in 0\.\.9, but holds 10\. "),
        (["--report_to", "pencil"], "`--report_to` has to be none, all or one .* but is 'pencil'"),
        (["--num_probe_weights", 1], "`num_probe_weights=1` is a constant weight"),
        (["--attention_head_dim", 3], "divisible by 4"),
        (["--model_config_name_or_path", "no/model"], "`--model_config_name_or_path` 'no/model' cannot be loaded"),
        (["--pretrained_vae_model_name_or_path", "no/vae"], "`--pretrained_vae_model.*` 'no/vae' cannot be loaded"),
        (["--train_data_dir", "no/data"], "`--train_data_dir` has to be a folder, but 'no/data' is none"),
        (["--resume_from_checkpoint", "checkpoint-7"], "'checkpoint-7' cannot be used: there is no such folder"),
    ],
)
def test_wrong_values_stop_the_run_before_it_writes(train, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        train(*flags)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_the_vae_does_not_fit(train, own_images, tiny_vae_folder, tmp_path):
    vae = ("--train_data_dir", own_images, "--pretrained_vae_model_name_or_path", tiny_vae_folder)
    with pytest.raises(ValueError, match="`--resolution` has to be divisible by 4 .the VAE's factor 2 .* but is 18"):
        train(*vae, "--resolution", 18)
    with pytest.raises(ValueError, match="`image_channels` is 1, but the VAE needs 3"):
        train(*vae, "--resolution", 16, "--image_channels", 1)
    SiTTransformer2DModel(8, 4, 3, None, 1, 2, 8, num_classes=2).save_config(tmp_path / "model")
    with pytest.raises(ValueError, match="`in_channels` is 3, but the VAE needs 4"):
        train(*vae, "--resolution", 16, "--model_config_name_or_path", tmp_path / "model", tiny=TINY_RUN)
    SiTTransformer2DModel(8, 2, 4, None, 1, 2, 8, num_classes=2).save_config(tmp_path / "latents")
    with pytest.raises(ValueError, match="`--pretrained_vae_model_name_or_path` is needed: the model has 4 channels"):
        train(*vae[:2], "--model_config_name_or_path", tmp_path / "latents", tiny=TINY_RUN)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_second_run_is_refused(train, tmp_path):
    run = tmp_path / "run"
    train()
    before = final_weights(run)
    with pytest.raises(ValueError, match="already holds a run .*--resume_from_checkpoint latest.*--overwrite_output"):
        train("--seed", 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in final_weights(run).items())

    (run / "notes.txt").write_text("mine")
    train("--seed", 1, "--overwrite_output_dir", "--max_train_steps", 2)
    assert (run / "notes.txt").read_text() == "mine"
    assert [step for step, _ in list_checkpoints(run)] == [2]
    assert not all(torch.equal(tensor, before[name]) for name, tensor in final_weights(run).items())


@pytest.mark.slow
def test_folders_that_are_links_are_unlinked(train, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    train("--max_train_steps", 1)
    for name in ("checkpoint-1", "samples"):
        (run / name).rename(elsewhere.with_name(f"elsewhere-{name}"))
        (run / name).symlink_to(elsewhere.with_name(f"elsewhere-{name}"))
    train("--seed", 1, "--max_train_steps", 2, "--overwrite_output_dir")
    assert [step for step, _ in list_checkpoints(run)] == [2]
    assert (tmp_path / "elsewhere-checkpoint-1" / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize("flag", ["--overwrite_output_dir", "--seed=0", "--resume_from_checkpoint=latest"])
def test_what_is_no_run_is_never_touched(train, tmp_path, flag):
    (tmp_path / "run" / "transformer").mkdir(parents=True)
    (tmp_path / "run" / "transformer" / "weights").write_text("somebody's")
    with pytest.raises(ValueError, match="holds transformer, but no run of this script"):
        train(flag)
    assert (tmp_path / "run" / "transformer" / "weights").read_text() == "somebody's"
    with pytest.raises(ValueError, match="`--output_dir` .* has to be a folder|cannot be written"):
        train(output_dir=tmp_path / "run" / "transformer" / "weights")


# --- Continuing


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(train, tmp_path, capsys):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    train("--max_train_steps", 3, output_dir=parts)
    capsys.readouterr()
    for leftover in (".checkpoint-2.partial", ".checkpoint-7.old", ".pipeline.partial"):  # of a killed run
        (parts / leftover).mkdir()
    longer = ["--resume_from_checkpoint", "latest", "--logging_steps", 2]
    train(*longer, output_dir=parts)
    output = capsys.readouterr().out
    for line in ("max_train_steps: 3 -> 4", "logging_steps: 1 -> 2"):
        assert f"Changed since the checkpoint: {line}" in output
    assert output.count("Changed since the checkpoint") == 3  # and --resume_from_checkpoint
    assert not list(parts.glob(".*"))
    train(output_dir=whole)
    assert_same_weights(parts, whole)

    # once more, with other batches of the same samples: nothing is left to do
    train(*longer, "--train_batch_size", 2, "--gradient_accumulation_steps", 2, output_dir=parts)
    assert "Changed since the checkpoint: train_batch_size: 4 -> 2" in capsys.readouterr().out
    assert_same_weights(parts, whole)


@pytest.mark.parametrize(
    "flags, change",
    [
        (["--seed", 1], "seed: 0 -> 1"),
        (["--learning_rate", 0.5], "learning_rate: 0.001 -> 0.5"),
        (["--train_batch_size", 2], "samples_per_step: 4 -> 2"),
        (["--probe_dropout_prob", 1], "probe_dropout_prob: 0.9 -> 1.0"),
        (["--num_layers", 3], "transformer: .*'num_layers': 2.* -> .*'num_layers': 3"),
        (["--validation_split", 0.1], "training_images: 1437 -> 1293"),
        (["--lr_scheduler", "cosine"], "lr_scheduler: constant_with_warmup -> cosine"),
    ],
)
def test_a_run_is_not_continued_with_another_method(train, tmp_path, capsys, flags, change):
    train("--dry_run")
    settings = json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]
    checkpoint = tmp_path / "run" / "checkpoint-2"  # with nothing but what the comparison reads
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "training_args.json").write_text("{}")
    (checkpoint / "training_state.json").write_text(json.dumps({"settings": settings}))
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=f"`--resume_from_checkpoint` cannot continue a run with another.*{change}"):
        train("--resume_from_checkpoint", "latest", *flags)


@pytest.mark.slow
def test_a_run_without_a_given_average_can_be_made_longer(train, tmp_path, capsys):
    """The average follows from the length, but is that of a run that was planned so long."""
    flags = [*OWN_DIGITS, *TINY_MODEL, *TINY_RUN]
    train("--max_train_steps", 3, tiny=flags, output_dir=tmp_path / "parts")
    train("--resume_from_checkpoint", "latest", tiny=flags, output_dir=tmp_path / "parts")
    assert "Changed since the checkpoint: ema_decay: 0.307" in capsys.readouterr().out
    train(tiny=flags, output_dir=tmp_path / "whole")
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    with pytest.raises(ValueError, match="another method.*ema_decay: 0.3.* -> 0.5"):
        train("--resume_from_checkpoint", "latest", "--ema_decay", 0.5, tiny=flags, output_dir=tmp_path / "parts")


@pytest.mark.slow
def test_a_run_of_an_older_version_goes_on_as_it_began(train, tmp_path, capsys):
    """One whose average and probe's weight had other defaults, and which did not know some flags."""
    flags = [*OWN_DIGITS, *TINY_MODEL, *TINY_RUN]
    before = ("--ema_decay", 0.9999, "--probe_decay_start_epoch", 100)
    for run in ("parts", "whole"):
        train(*before, "--max_train_steps", 2, tiny=flags, output_dir=tmp_path / run)
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    state = json.loads((checkpoint / "training_state.json").read_text())
    assert (state["settings"]["ema_warmup"], state["settings"]["probe_decay_start_epoch"]) == (False, 100.0)
    for name in ("recipe", "max_errors"):
        del state["settings"][name]
    (checkpoint / "training_state.json").write_text(json.dumps(state))
    # Its pipelines named the order of the solver, and its probes not their depth.
    for file, change in (("scheduler/scheduler_config.json", {"solver_order": 1}), ("probe/config.json", {})):
        config = json.loads((checkpoint / "pipeline" / file).read_text())
        config.pop("depth", None)
        (checkpoint / "pipeline" / file).write_text(json.dumps(config | change))
    (checkpoint / "manifest.json").write_text("{}")
    assert "solver_order" not in DiffusionPipeline.from_pretrained(checkpoint / "pipeline").scheduler.config

    train("--resume_from_checkpoint", "latest", tiny=flags, output_dir=tmp_path / "parts")
    settings = settings_of(tmp_path / "parts")
    assert (settings["ema_decay"], settings["ema_warmup"], settings["probe_decay_start_epoch"]) == (0.9999, False, 100)
    train(*before, "--resume_from_checkpoint", "latest", tiny=flags, output_dir=tmp_path / "whole")
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_resuming_before_the_first_checkpoint_starts_anew(train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train("--resume_from_checkpoint", "latest") == 0
    assert "Continuing from the beginning: there is no checkpoint yet" in capsys.readouterr().out
    for _, folder in list_checkpoints(run):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="another method.*seed: 0 -> 3"):
        train("--resume_from_checkpoint", "latest", "--seed", 3)


@pytest.mark.slow
@pytest.mark.parametrize("place", [(Fingerprint, "save"), (output_folder, "write_text")], ids=["data", "settings"])
def test_a_run_that_is_killed_as_it_begins_can_begin_again(train, tmp_path, monkeypatch, place):
    """Before either of the first two files that it writes, of which the other may be there."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*place, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train("--max_train_steps", 1)
    assert train("--max_train_steps", 1, "--resume_from_checkpoint", "latest") == 0
    assert (tmp_path / "run" / "fingerprint.npy").is_file()


@pytest.mark.slow
def test_checkpoints_are_limited_and_milestones_stay(train, tmp_path):
    flags = ["--checkpointing_steps", 1, "--checkpoints_total_limit", 1, "--milestone_steps", 2]
    train(*flags, "--max_train_steps", 5)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2, 4, 5]
    for _, folder in list_checkpoints(tmp_path / "run"):
        assert find_damage(folder) is None
        assert DiffusionPipeline.from_pretrained(folder / "pipeline").transformer is not None


# --- When things go wrong


def test_a_loss_that_is_not_finite_stops_the_run(train, tmp_path):
    flags = ["--learning_rate", 1e25, "--lr_scheduler", "constant", "--checkpointing_steps", 1, "--logging_steps", 3]
    with pytest.raises(
        FloatingPointError, match=r"of step 2 is (nan|inf); the last good checkpoint is .*checkpoint-1"
    ):
        train(*flags)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [1]


def test_a_loss_that_is_not_finite_before_any_checkpoint(train):
    with pytest.raises(FloatingPointError, match="the last good checkpoint does not exist"):
        train("--learning_rate", 1e25, "--lr_scheduler", "constant", "--checkpointing_steps", 100)


def test_memory_and_cores_on_macos(monkeypatch):
    """Linux counts memory in kilobytes, macOS in bytes, and macOS knows no affinity."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    for platform, unit in (("linux", 1024), ("darwin", 1)):
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_memory(torch.device("cpu")) == usage.ru_maxrss * unit
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert 1 <= usable_cores() <= os.cpu_count()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_signals_save_and_stop(train, tmp_path, capsys, monkeypatch, request, name):
    log = trainer.Trainer.log
    before = signal.getsignal(signal.SIGINT)
    with_hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, with_hangup))

    def log_and_signal(trainer):
        log(trainer)
        if trainer.step == 3 and trainer.output_dir.name == "run":
            os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(trainer.Trainer, "log", log_and_signal)
    flags = ["--max_train_steps", 6, "--checkpointing_steps", 10]
    assert train(*flags) == 75
    assert (
        f"Stopped by {name} after step 4; {tmp_path / 'run' / 'checkpoint-4'} is complete" in capsys.readouterr().out
    )
    assert not (tmp_path / "run" / "model_index.json").exists()
    assert signal.getsignal(signal.SIGINT) is before
    assert train(*flags, "--resume_from_checkpoint", "latest") == 0
    train(*flags, output_dir=tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_validation_that_was_cut_off_is_done_before_the_run_goes_on(train, tmp_path, monkeypatch):
    flags = ["--validation_steps", 2, "--validation_split", "test"]

    def interrupt(trainer):
        trainer.checkpoints.finish()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "validate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(*flags)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]
    assert train(*flags, "--resume_from_checkpoint", "latest") == 0
    train(*flags, output_dir=tmp_path / "whole")
    for name in ("step-2.png", "step-4.png"):
        files = [tmp_path / run / "samples" / name for run in ("run", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [line["step"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")] == [1, 2, 2, 3, 4, 4]


@pytest.mark.slow
def test_samples_that_cannot_be_drawn_cost_no_step(train, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        for name in ("draw_samples", "draw_curves"):
            patch.setattr(trainer, name, lambda *arguments: [].pop())
        assert train("--validation_steps", 2, curves=True) == 0
    printed = capsys.readouterr().err
    for what in ("samples", "curves"):
        assert f"No {what} of step 2: pop from empty list" in printed
    assert "IndexError" in (tmp_path / "run" / "samples" / "step-4-error.txt").read_text()
    assert "samples/" not in (tmp_path / "run" / "README.md").read_text()
    DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert train("--validation_steps", 2, "--resume_from_checkpoint", "latest") == 0
    assert "Samples" not in capsys.readouterr().err, "bars of the sampler are for terminals"
    assert "samples/step-4.png" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.slow
def test_checkpoints_ahead_of_the_one_that_is_continued_are_put_aside(train, tmp_path, capsys):
    run, whole = tmp_path / "run", tmp_path / "whole"
    train("--max_train_steps", 6)
    flags = ["--max_train_steps", 6, "--checkpoints_total_limit", 1]
    for aside in (["checkpoint-4.aside-1", "checkpoint-6.aside-1"], ["checkpoint-4.aside-2", "checkpoint-6.aside-2"]):
        shutil.copytree(run / "checkpoint-2", tmp_path / "kept", dirs_exist_ok=True)
        train(*flags[:2], "--resume_from_checkpoint", tmp_path / "kept")
        assert f"checkpoint-4 is ahead of step 2, from where this run continues: put aside as {run / aside[0]}" in (
            capsys.readouterr().out
        )
        assert all((run / name / "pipeline").is_dir() for name in aside)
    train(*flags, "--resume_from_checkpoint", tmp_path / "kept")
    assert [step for step, _ in list_checkpoints(run)] == [6]
    train("--max_train_steps", 6, output_dir=whole)
    assert_same_weights(run, whole)


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(train, tmp_path):
    (tmp_path / "run").mkdir()
    with locked_folder(tmp_path / "run"):
        with pytest.raises(ValueError, match=rf"/run' is in use by the process {os.getpid()} on \S+, since 2"):
            train()
    assert list((tmp_path / "run").iterdir()) == []
    assert train() == 0
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_lock_that_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    """Else a second and a third run, which asked before and after the first one ended, would both have the folder."""
    lock = fcntl.flock

    def end_first_run(file, operation):
        (tmp_path / ".lock").unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", end_first_run)
    with pytest.raises(ValueError, match="was in use by another process until now"), locked_folder(tmp_path):
        pass


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_intact(train, tmp_path, monkeypatch):
    """Files may not grow beyond a limit: the system refuses to write, as on a full disk."""
    log = trainer.Trainer.log
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def log_and_fill(trainer):
        log(trainer)
        if trainer.step == 3:
            while not (tmp_path / "run" / "checkpoint-2").exists():  # It is written meanwhile.
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))

    monkeypatch.setattr(trainer.Trainer, "log", log_and_fill)
    try:
        with pytest.raises(OSError, match="checkpoint-4 could not be written .*; the last good checkpoint is .*-2"):
            train("--max_train_steps", 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]
    assert not list((tmp_path / "run").glob(".*"))
    monkeypatch.undo()
    assert train("--max_train_steps", 6, "--resume_from_checkpoint", "latest") == 0
    train("--max_train_steps", 6, output_dir=tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_an_unreadable_image_stops_the_run_with_its_name(train, own_images, tmp_path):
    shutil.copytree(own_images, tmp_path / "images")
    (tmp_path / "images" / "bee" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"the image of row \d \(.*bee/3.png\) cannot be read"):
        train("--train_data_dir", tmp_path / "images", "--resolution", 16)


def cut(path: Path):
    """What a download that broke off leaves."""
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.slow
def test_unreadable_images_are_replaced_and_listed(train, coloured_images, tmp_path, capsys):
    images, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(coloured_images, images)
    shutil.rmtree(images / "tomato")
    for i in range(10, 20):  # 6 of 30 are held out, and more than one pass is made over the others
        (images / "sky" / f"{i}.jpg").unlink()
    for i in range(3):
        cut(images / "sky" / f"{i}.jpg")
    flags = ["--train_data_dir", images, "--resolution", 8, "--train_batch_size", 11, "--validation_split", 0.2]
    with pytest.raises(ValueError, match=r"the image of row \d+ \(.*sky/.*.jpg\) cannot be read"):
        train(*flags)
    with pytest.raises(ValueError, match=r"[23] unreadable images, listed in .* are more than `--max_errors 1`"):
        train(*flags, "--max_errors", 1, "--overwrite_output_dir")
    assert [step for step, _ in list_checkpoints(run)] == []

    train(*flags, "--max_errors", 3, "--overwrite_output_dir")
    assert "3 unreadable images, listed in" in capsys.readouterr().out
    listed = [json.loads(line) for line in (run / "unreadable.jsonl").read_text().splitlines()]
    assert {Path(entry["id"]).name for entry in listed} == {"0.jpg", "1.jpg", "2.jpg"}
    assert all("sky" in entry["id"] and "truncated" in entry["error"] for entry in listed)

    # the same weights after an interruption
    parts = tmp_path / "parts"
    train(*flags, "--max_errors", 3, "--max_train_steps", 2, output_dir=parts)
    with open(parts / "unreadable.jsonl", "a") as file:  # one that the rest of the run does not meet
        file.write('{"id": "another", "error": "truncated"}\n')
    train(*flags, "--max_errors", 4, "--resume_from_checkpoint", "latest", output_dir=parts)
    assert_same_weights(run, parts)
    listed = [json.loads(line)["id"] for line in (parts / "unreadable.jsonl").read_text().splitlines()]
    assert len(listed) == 4 and "another" in listed
    train(*flags, "--max_errors", 4, "--max_train_steps", 1, "--overwrite_output_dir")


@pytest.mark.slow
def test_one_subfolder_is_one_class(train, own_images, tmp_path):
    shutil.copytree(own_images / "bee", tmp_path / "images" / "bee")
    assert train("--train_data_dir", tmp_path / "images", "--resolution", 16) == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.labels == {"bee": 0} and pipeline("bee", num_inference_steps=1).images[0].size == (16, 16)


@pytest.mark.slow
def test_curves_need_matplotlib(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train(curves=True) == 0
    assert "curves.png needs matplotlib: pip install 'diffusers_lsep[train]'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "curves.png").exists() and (tmp_path / "run" / "model_index.json").exists()


def test_runs_that_cannot_be_continued_so(train, tmp_path):
    train()
    train("--seed", 1, output_dir=tmp_path / "other")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="`--max_train_steps` 2 lies before .*checkpoint-4"):
        train("--resume_from_checkpoint", "latest", "--max_train_steps", 2)
    with pytest.raises(ValueError, match="already holds a run .* is of another one. Choose another folder"):
        train("--resume_from_checkpoint", tmp_path / "other" / "checkpoint-4", "--seed", 1)
    with pytest.raises(ValueError, match="samples_per_step: 4 -> 8.*times the processes"):
        train("--resume_from_checkpoint", "latest", "--gradient_accumulation_steps", 2)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("flag", ["--pretrained_model_name_or_path", "--model_config_name_or_path"])
def test_a_preset_of_another_model_is_refused(train, tmp_path, flag):
    make_pipeline(in_channels=1, num_classes=10).save_pretrained(tmp_path / "model")
    source = tmp_path / "model" if "pretrained" in flag else tmp_path / "model" / "transformer"
    with pytest.raises(ValueError, match="`--preset` 'SiT-S/4' is another model than that of `--"):
        train(flag, source, "--preset", "SiT-S/4", tiny=[*OWN_DIGITS, *TINY_RUN])


def test_samples_do_not_become_data(train, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train("--train_data_dir", tmp_path)
    assert f"--output_dir {tmp_path}/run has to lie outside of the data, --train_data_dir" in capsys.readouterr().err


def test_too_few_images_to_hold_any_out(train, tmp_path):
    save_class_folders(tmp_path / "one", ["ant"], [(8, 8)])
    with pytest.raises(ValueError, match="`--validation_split` 0.5 leaves none of the 1 images to train on"):
        train("--train_data_dir", tmp_path / "one", "--resolution", 8, "--validation_split", 0.5)
