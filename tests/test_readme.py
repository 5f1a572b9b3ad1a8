# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs what the README and the pages that go on from it say, in one folder and in their order, as a reader would."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from code_blocks import ROOT, read_blocks, run_blocks
from hub_server import HubServer
from image_folders import save_class_folders
from PIL import Image
from tiny_models import make_pipeline, make_vae

import diffusers_lsep


# After the README, the pages whose code starts from the model of its first command.
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("drawing", "own_images", "evaluation", "probing", "hub"))]

SHORT = "--train_batch_size 2 --validation_inference_steps 1"
# What is replaced in the blocks before they run: things that are not here, and sizes. All else runs as it is.
SUBSTITUTIONS = {
    'pip install -c constraints.txt -e ".[train]" && ': "",  # .ci/run installs
    "accelerate launch examples/train_lsep.py\n": (
        "accelerate launch examples/train_lsep.py --max_train_steps 4 --validation_steps 4 --checkpointing_steps 4"
        " --validation_inference_steps 2 --num_validation_images 1\n"
    ),
    '"sit-xl-2-256"': '"tiny-imagenet-pipeline"',
    '.to("cuda")': "",
    '["3", "7"], guidance_scale=1.5': '["3", "7"], 3, guidance_scale=1.5',
    "guidance_scale=1.5, generator=generator)": "3, guidance_scale=1.5, generator=generator)",
    "guidance_interval=(0.0, 0.7))": "guidance_interval=(0.0, 0.7), num_inference_steps=3)",
    "--class_labels 3 7 ": "--class_labels 3 7 --num_inference_steps 2 ",  # of sample.py and figures.py
    "--num_images 50000 ": "--num_images 50 --num_inference_steps 2 ",
    "--num_images 500 --batch_size 100 --scheduler sde2 --num_inference_steps 32": (
        "--num_images 70 --num_inference_steps 2 --guidance_scales 1 2 --cache_dir features"
    ),
    "flowers --output_dir my-model\n": f"flowers --output_dir my-model --max_train_steps 2 {SHORT}\n",
    "--max_train_steps 6000\n": f"--max_train_steps 3 {SHORT}\n",
    "--class_labels daisy rose ": "--class_labels daisy rose --num_inference_steps 2 ",
    "path/to/images --output_dir my-large-model": "images --output_dir my-large-model",
    "--preset SiT-B/2 \\\n    --resolution 256": (
        "--preset SiT-S/8 --num_layers 3 --resolution 128 --train_batch_size 2 --max_train_steps 1"
        " --validation_inference_steps 1 --num_validation_images 1 --validation_labels cat"
    ),
    "stabilityai/sd-vae-ft-ema": "tiny-vae",
    "--num_images 1000 --scheduler sde2 \\\n    --num_inference_steps 32": "--num_images 50 --num_inference_steps 2",
    "--reference flowers": (
        "--reference flowers --metrics fid --inception_weights inception.pth --cache_dir features"
    ),
    "--method ridge": "--method ridge --layers 3 --timesteps 0.2 --max_train_images 400",
    'pip install -c constraints.txt -e ".[test]" && pytest -n 2\n': "",  # .ci/run does
}


@pytest.fixture
def folder(tmp_path):
    """A folder with what the substitutions name."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    save_class_folders(tmp_path / "images", ["cat", "dog"], [(140, 160)] * 6)
    save_class_folders(tmp_path / "flowers", ["daisy", "rose"], [(40, 36)] * 6)
    make_vae(blocks=4).save_pretrained(tmp_path / "tiny-vae")
    id2label = {i: f"class {i}" for i in range(100)} | {3: "golden retriever", 5: "macaw, Ara"}
    pipe = make_pipeline(vae=make_vae(blocks=4), id2label=id2label, num_classes=100)
    pipe.save_pretrained(tmp_path / "tiny-imagenet-pipeline")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_readme_runs(folder, inception_weights):
    (folder / "inception.pth").symlink_to(inception_weights)
    blocks = [block for page in PAGES for block in read_blocks(page)]
    assert sum(language == "bash" for language, _ in blocks) >= 12
    assert sum(language == "python" for language, _ in blocks) >= 6
    search_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    with HubServer(folder / "hub", tokens={"hf_owner": "your-name"}) as hub:
        environment = hub.environment(folder / "hf-home", PATH=search_path, HF_TOKEN="hf_owner")
        run_blocks(blocks, folder, environment, SUBSTITUTIONS)
        assert "model_index.json" in hub.files("your-name/lsep-digits")
    assert Image.open(folder / "seven.png").size == (128, 128)
    for name in ("lsep-digits", "my-model", "my-large-model"):
        assert (folder / name / "model_index.json").is_file()
    assert (folder / "samples" / "grid.png").is_file() and (folder / "drawn" / "grid.png").is_file()
    assert (folder / "my-model" / "fid" / "eval_results.json").is_file()
    assert (folder / "probing" / "probe_heatmap.png").is_file()
    assert (folder / "lsep-space" / "app.py").is_file()
    assert "your-name/lsep-digits" in (folder / "my-space" / "app.py").read_text()
    for name in ("guidance-sweep", "denoising-strip"):
        assert Image.open(folder / "figures" / f"{name}.png").width > 400


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def test_the_page_of_the_api_has_all_of_it_and_true_sizes():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    from diffusers_lsep import SIT_PRESETS, SiTTransformer2DModel

    rows = re.findall(r"^\| `(SiT-\w+/2)`.*? \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|$", text, flags=re.MULTILINE)
    assert len(rows) == 4
    for preset, layers, width, heads, parameters in rows:
        with torch.device("meta"):
            model = SiTTransformer2DModel(**SIT_PRESETS[preset])
        config = model.config
        assert (int(layers), int(heads)) == (config.num_layers, config.num_attention_heads)
        assert int(width) == config.num_attention_heads * config.attention_head_dim
        assert int(parameters.replace(",", "")) == sum(parameter.numel() for parameter in model.parameters())
    names = re.findall(r"^::: diffusers_lsep\.\w+\.(\w+)$", text, flags=re.MULTILINE)
    of_diffusers = {"ModelMixin", "SchedulerMixin"}
    assert {*names, "SIT_PRESETS"} == {*diffusers_lsep.__all__} - of_diffusers | {"LSEPObjectiveOutput"}
    ((_, code),) = read_blocks("docs/api.md")
    exec(code, {})


def find_anchors(text):
    return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in find_anchors(text), target
        elif not target.startswith("http"):
            path, _, heading = target.partition("#")
            assert (ROOT / path).exists(), target
            assert not heading or heading in find_anchors((ROOT / path).read_text(encoding="utf-8")), target
