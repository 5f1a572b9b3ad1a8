# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The argument lists and accelerate's settings in `examples/configs`."""

import argparse
import importlib
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from PIL import Image
from tiny_models import make_vae

from diffusers_lsep import FlowMatchSDEScheduler, LSEPPipeline, SiTTransformer2DModel
from diffusers_lsep.cli import COMMANDS, SCRIPTS
from diffusers_lsep.presets import SIT_PRESETS
from diffusers_lsep.training.arguments import build_parser


CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"
RECIPES = sorted(path.name for path in CONFIGS.iterdir() if path.is_file())
IMAGENET_IMAGES = 1_281_167

# The table of the method's values by model: depth, smallest window over the grid, weights, probe's learning rate.
METHOD = {
    "SiT-XL/2": (8, 0.75, 0.0225, 0.03, 10, 1e-4),
    "SiT-L/2": (8, 0.75, 0.03, 0.03, 1, 1e-4),
    "SiT-B/2": (4, 0.75, 0.03, 0.03, 1, 3e-2),
}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A small VAE that makes images eight times smaller, as Stable Diffusion's."""
    folder = tmp_path_factory.mktemp("vae")
    make_vae(blocks=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Moments of four images in the original layout, by resolution; 1,000 classes."""
    folders = {}
    for resolution in (256, 512):
        folder = folders[resolution] = tmp_path_factory.mktemp(f"latents-{resolution}")
        labels = []
        for i, label in enumerate((0, 5, 207, 999)):
            moments = np.ones((8, resolution // 8, resolution // 8), np.float32)
            np.save(folder / f"img-mean-std-{i:08d}.npy", moments)
            labels.append([f"img-mean-std-{i:08d}.npy", label])
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folders


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """What the configs of a pipeline of SiT-XL/2 at 256 px say; a dry run reads no weights."""
    folder = tmp_path_factory.mktemp("pipelines") / "sit-xl-2-256"
    with torch.device("meta"):
        transformer = SiTTransformer2DModel(**SIT_PRESETS["SiT-XL/2"])
    transformer.save_config(folder / "transformer")
    LSEPPipeline(None, FlowMatchSDEScheduler()).save_config(folder)
    return folder


@pytest.fixture
def dry_run(train, vae, latents, pretrained, capsys, monkeypatch, tmp_path):
    """Resolved settings of a recipe, and what a dry run prints besides."""

    monkeypatch.chdir(tmp_path)  # where the recipes' own folders are not

    def dry_run(name, *flags):
        text = (CONFIGS / name).read_text()
        resolution = 512 if "--resolution 512" in text else 256
        data = ["--latents_dir", latents[resolution], "--pretrained_vae_model_name_or_path", vae]
        if "--pretrained_model_name_or_path" in text:
            flags = (*flags, "--pretrained_model_name_or_path", pretrained)
        assert train(f"@{CONFIGS / name}", *data, "--dry_run", *flags, tiny=()) == 0
        output = capsys.readouterr().out
        assert list(tmp_path.iterdir()) == []
        settings, end = json.JSONDecoder().raw_decode(output)
        return settings, output[end:]

    return dry_run


def test_recipes_are_those_of_the_documentation():
    assert set(RECIPES) == {
        *("digits", "mnist", "fine-tune-256", "fine-tune-256-lora", "sit-b-2-256", "sit-l-2-256", "sit-xl-2-256"),
        *("sit-xl-2-512", "sit-xl-2-512-from-256", "own-images-32", "own-images-64", "own-images-256-vae"),
    }


def test_recipe_of_mnist(train, capsys, monkeypatch):
    """From the root of the repository it finds its data."""
    monkeypatch.chdir(CONFIGS.parents[1])
    assert train(f"@{CONFIGS / 'mnist'}", "--dry_run", tiny=()) == 0
    output = capsys.readouterr().out
    settings, end = json.JSONDecoder().raw_decode(output)
    assert (settings["num_classes"], settings["transformer"]["sample_size"]) == (10, 28)
    assert "tokens: 49 per image" in output[end:]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("sit")])
def test_papers_recipes(dry_run, name):
    """They pass all checks of the script, and come to the paper's model, method and optimiser."""
    settings, output = dry_run(name)
    _, size, _, resolution = name.split("-")[:4]
    assert settings["preset"] == f"SiT-{size.upper()}/2"
    assert settings["transformer"]["sample_size"] == int(resolution) // 8 and settings["num_classes"] == 1000
    grid_size = int(resolution) // 16
    depth, window, start, end, bins, probe_rate = METHOD[settings["preset"]]
    assert settings["probe_depth"] == depth and settings["crop_size_min"] == window * grid_size
    assert (settings["probe_weight_start"], settings["probe_weight_end"]) == (start, end)
    assert (settings["num_probe_weights"], settings["probe_learning_rate"]) == (bins, probe_rate)
    assert (settings["probe_dropout_prob"], settings["class_dropout_prob"]) == (0.9, 0.1)
    assert settings["probe_decay_start_epoch"] is None  # the paper has none, and the public code never gets there
    assert (settings["path_type"], settings["timestep_sampling"]) == ("linear", "uniform")
    assert (settings["learning_rate"], settings["lr_scheduler"], settings["ema_decay"]) == (1e-4, "constant", 0.9999)
    assert [settings[f"adam_{key}"] for key in ("beta1", "beta2", "epsilon", "weight_decay")] == [0.9, 0.999, 1e-8, 0]
    assert settings["max_grad_norm"] == 1 and not settings["ema_warmup"] and not settings["random_flip"]
    assert settings["train_batch_size"] * settings["gradient_accumulation_steps"] * 8 == 256
    assert settings["mixed_precision"] == "bf16" and settings["output_dir"] == name
    parameters = {"SiT-XL/2": "674,816,272", "SiT-L/2": "457,824,272", "SiT-B/2": "130,303,504"}
    assert f"transformer: {parameters[settings['preset']]} parameters" in output
    assert f"tokens: {grid_size**2} per image" in output
    assert ("the position table is made anew for 32 x 32 tokens" in output) == name.endswith("from-256")


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("sit")])
def test_papers_recipes_say_everything_themselves(name):
    """No value of the method or the optimiser is left to the script's defaults, and each block names its source."""
    text = (CONFIGS / name).read_text()
    flags = {token for token in shlex.split(text, comments=True) if token.startswith("--")}
    assert flags >= {
        *("--resolution", "--path_type", "--timestep_sampling", "--class_dropout_prob", "--probe_depth"),
        *("--probe_dropout_prob", "--crop_size_min", "--probe_weight_start", "--probe_weight_end"),
        *("--num_probe_weights", "--probe_learning_rate"),
        *("--train_batch_size", "--learning_rate", "--lr_scheduler", "--adam_beta1", "--adam_beta2"),
        *("--adam_epsilon", "--adam_weight_decay", "--max_grad_norm", "--ema_decay", "--mixed_precision"),
    }
    assert len(flags & {"--num_train_epochs", "--max_train_steps"}) == 1
    assert len(flags & {"--preset", "--pretrained_model_name_or_path"}) == 1
    assert "not public" in text or "not published" in text
    assert f"@examples/configs/{name} " in text and "2509.21565" in text
    # the steps that a comment gives are those of the epochs
    for epochs, steps in re.findall(r"--num_train_epochs (\d+)  # ([\d,]+) steps", text):
        assert int(steps.replace(",", "")) == math.ceil(int(epochs) * IMAGENET_IMAGES / 256)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("fine-tune")])
def test_fine_tuning_recipes(dry_run, name):
    settings, output = dry_run(name)
    assert settings["preset"] == "SiT-XL/2" and (settings["lora_rank"] is not None) == name.endswith("lora")
    assert "Starting from" in output
    memory = float(re.search(r"([\d.]+) GB of state", output)[1]) + float(re.search(r"([\d.]+) GB of act", output)[1])
    assert memory < 20  # of the 24 GB that they are for


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_other_classes(name):
    """Labels to sample belong to a data set, not to a recipe."""
    assert "--validation_labels" not in shlex.split((CONFIGS / name).read_text(), comments=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("own-images")])
def test_recipes_for_own_images(train, vae, capsys, tmp_path, monkeypatch, name):
    """Some hundred images are seen often enough, reports and checkpoints come in time, and it fits its machine."""
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 260), (40 * i, 0, 0)).save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png")
    flags = ["--train_data_dir", "images", "--dry_run"]
    if name.endswith("vae"):
        flags += ["--pretrained_vae_model_name_or_path", vae]
    assert train(f"@{CONFIGS / name}", *flags, tiny=()) == 0
    output = capsys.readouterr().out
    settings = json.JSONDecoder().raw_decode(output)[0]
    assert settings["resolution"] == int(name.split("-")[2])
    steps = settings["max_train_steps"]
    assert 50 <= steps * settings["samples_per_step"] / 500 <= 5000  # passes over 500 images
    assert steps % settings["checkpointing_steps"] == steps % settings["validation_steps"] == 0
    assert 2 <= steps / settings["validation_steps"] <= 20 and steps / settings["logging_steps"] >= 50
    assert settings["ema_warmup"] and settings["ema_decay"] == (1 + steps) / (10 + steps)
    memory = float(re.search(r"([\d.]+) GB of state", output)[1]) + float(re.search(r"([\d.]+) GB of act", output)[1])
    assert memory < {"own-images-32": 1, "own-images-64": 8, "own-images-256-vae": 12}[name]
    assert not settings["random_flip"] and list(tmp_path.iterdir()) == [tmp_path / "images"]


@pytest.mark.slow
def test_recipes_can_be_overridden(dry_run):
    settings, _ = dry_run("sit-b-2-256", "--train_batch_size", 4, "--probe_depth", 2, "--mixed_precision", "no")
    assert (settings["train_batch_size"], settings["probe_depth"], settings["mixed_precision"]) == (4, 2, "no")


# --- accelerate


def test_every_accelerate_config_loads():
    names = {path.name for path in (CONFIGS / "accelerate").iterdir()}
    assert names == {"one-gpu.yaml", "eight-gpus.yaml", "two-nodes.yaml", "fsdp2.yaml", "fsdp2-gather-once.yaml"}
    for name in names:
        config = load_config_from_file(str(CONFIGS / "accelerate" / name))
        assert config.mixed_precision == "bf16" and not config.use_cpu
        assert f"--config_file examples/configs/accelerate/{name}" in (CONFIGS / "accelerate" / name).read_text()


def test_what_accelerate_makes_of_them(launch_environment):
    args, _ = launch_environment("one-gpu.yaml")
    assert not args.multi_gpu and not args.use_fsdp and args.num_processes == 1
    args, _ = launch_environment("eight-gpus.yaml")
    assert args.multi_gpu and args.nproc_per_node == "8" and args.num_machines == 1
    args, _ = launch_environment("two-nodes.yaml", "--machine_rank", "1", "--main_process_ip", "10.1.2.3")
    assert args.multi_gpu and (args.nproc_per_node, args.nnodes, args.node_rank) == ("8", "2", 1)
    assert args.main_process_ip == "10.1.2.3" or args.master_addr == "10.1.2.3"


@pytest.mark.parametrize(("name", "reshards"), [("fsdp2.yaml", True), ("fsdp2-gather-once.yaml", False)])
def test_fsdp2_config(launch_environment, monkeypatch, name, reshards):
    args, environment = launch_environment(name)
    assert args.use_fsdp and args.nproc_per_node == "8"
    for key, value in environment.items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is reshards
    assert plugin.transformer_cls_names_to_wrap == ["SiTTransformerBlock"]
    assert not plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading


# --- The guides


GUIDES = sorted((CONFIGS.parents[1] / "docs").glob("*.md"))
# Of pip and a cluster's scheduler. (The flags of the original code are the business of test_pages.py.)
FOREIGN_FLAGS = {"--index", "--signal"}


def commands_of(guide: Path) -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", guide.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [words for words in (shlex.split(line, comments=True) for line in lines) if words]
    return [words for words in commands if words[0] != "pip"]


def options_of(words: list[str], load_example) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of the script that a command runs, and what the command gives to it."""
    if words[0] == "diffusers-lsep" and words[1] in SCRIPTS:
        words = ["python", f"{SCRIPTS[words[1]][0].replace('.', '/')}.py", *words[2:]]
    if words[0] == "diffusers-lsep":
        parser = argparse.ArgumentParser()
        importlib.import_module(f"diffusers_lsep.{COMMANDS[words[1]][0]}").add_arguments(parser)
        return parser, words[2:]
    position = next(i for i, word in enumerate(words) if word.startswith("examples/") and word.endswith(".py"))
    launcher = words[:position]
    assert launcher[0] in ("python", "accelerate"), words
    if "--config_file" in launcher:
        assert (CONFIGS.parents[1] / launcher[launcher.index("--config_file") + 1]).is_file(), words
    name = Path(words[position]).stem
    if name == "train_lsep":
        return build_parser(""), words[position + 1 :]
    parser, arguments = load_example(name).build_parser(), words[position + 1 :]
    for action in parser._actions:  # a script with commands of its own
        if isinstance(action, argparse._SubParsersAction):
            return action.choices[arguments[0]], arguments[1:]
    return parser, arguments


def test_the_guides_have_commands():
    assert sum(bool(commands_of(guide)) for guide in GUIDES) >= 10


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_commands_of_the_guides_exist(guide, load_example):
    """Scripts, recipes, accelerate's configs and flags. (The README's commands are run; these are too large.)"""
    for words in commands_of(guide):
        parser, arguments = options_of(words, load_example)
        known = {option for action in parser._actions for option in action.option_strings}
        flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert flags <= known, f"{sorted(flags - known)} in {words}"
        for word in arguments:
            if word.startswith("@"):
                assert (CONFIGS.parents[1] / word[1:]).is_file(), word


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_flags_and_links_of_the_guides_exist(guide, load_example):
    text = guide.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (guide.parent / target).exists(), target
    # of a cluster's scheduler, of accelerate, and of the scripts that the guide runs or names
    known = FOREIGN_FLAGS | {option for action in launch_command_parser()._actions for option in action.option_strings}
    named = [["python", f"examples/{name}.py"] for name in ("train_lsep", "encode_latents", "sample")]
    named += [["diffusers-lsep", name] for name in COMMANDS]
    for words in [*commands_of(guide), *named]:
        parser, _ = options_of(words, load_example)
        known |= {option for action in parser._actions for option in action.option_strings}
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    flags = set(re.findall(r"(?<![\w-])--\w+", prose))
    assert guide.name == "from_original.md" or flags <= known, sorted(flags - known)


@pytest.mark.slow
def test_figures_of_the_imagenet_guide(dry_run):
    """State and activations in the table are what dry runs print."""
    text = (CONFIGS.parents[1] / "docs" / "imagenet.md").read_text(encoding="utf-8")

    def row(start):
        return next(line for line in text.splitlines() if line.startswith(f"| {start}")).strip("|").split("|")[1:]

    recipes = [cell.strip(" `") for cell in row("recipe")]
    for name, state, activations in zip(recipes, row("state per GPU"), row("activations, 32 images")):
        _, output = dry_run(name)
        expected = re.search(r"([\d.]+) GB of state, ([\d.]+) GB of activations", output).groups()
        for cell, value in zip((state, activations), expected):
            digits = re.search(r"[\d.]+", cell)[0]
            decimals = len(digits.partition(".")[2])
            assert float(digits) == round(float(value), decimals), (name, cell, value)
