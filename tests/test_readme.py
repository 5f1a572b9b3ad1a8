# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs what the README says, in its order and in one folder, as a reader would."""

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


# What is replaced in the README's blocks before they run: things that are not here, and sizes. All else runs as it is.
SUBSTITUTIONS = {
    'pip install -c constraints.txt -e ".[train]" && ': "",  # .ci/run installs
    "accelerate launch examples/train_lsep.py\n": (
        "accelerate launch examples/train_lsep.py --max_train_steps 4 --validation_steps 4 --checkpointing_steps 4"
        " --validation_inference_steps 2 --num_validation_images 1\n"
    ),
    '"lsep/sit-xl-256"': '"tiny-imagenet-pipeline"',
    '.to("cuda")': "",
    "guidance_scale=1.5, generator=generator)": "3, guidance_scale=1.5, generator=generator)",
    "guidance_interval=(0.0, 0.7))": "guidance_interval=(0.0, 0.7), num_inference_steps=3)",
    "--class_labels 3 7 ": "--class_labels 3 7 --num_inference_steps 2 ",
    "--num_images 50000 ": "--num_images 50 --num_inference_steps 2 ",
    "--num_images 500 --num_inference_steps 100": (
        "--num_images 70 --num_inference_steps 2 --guidance_scales 1 2 --cache_dir features"
    ),
    "path/to/images --output_dir my-model\n": (
        "images --output_dir my-model --max_train_steps 2 --train_batch_size 2 --validation_inference_steps 1\n"
    ),
    "path/to/images --output_dir my-large-model": "images --output_dir my-large-model",
    "--preset SiT-B/2 --resolution 256": (
        "--preset SiT-S/8 --num_layers 3 --resolution 128 --train_batch_size 2 --max_train_steps 1"
        " --validation_inference_steps 1 --num_validation_images 1 --validation_labels cat"
    ),
    "stabilityai/sd-vae-ft-ema": "tiny-vae",
    "lsep-xl-256.pt": "lsep_tiny.pt --num_attention_heads 4",
    "VIRTUAL_imagenet256_labeled.npz": (
        "fid/samples.npz --metrics fid --inception_weights inception.pth --cache_dir features"
    ),
    "--method ridge": "--method ridge --layers 3 --timesteps 0.2 --max_train_images 400",
    'pip install -c constraints.txt -e ".[test]" && pytest -n 2\n': "",  # .ci/run does
}


@pytest.fixture
def folder(tmp_path):
    """A folder with what the substitutions name."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    save_class_folders(tmp_path / "images", ["cat", "dog"], [(140, 160)] * 6)
    make_vae(blocks=4).save_pretrained(tmp_path / "tiny-vae")
    id2label = {i: f"class {i}" for i in range(100)} | {3: "golden retriever", 5: "macaw, Ara"}
    pipe = make_pipeline(vae=make_vae(blocks=4), id2label=id2label, num_classes=100)
    pipe.save_pretrained(tmp_path / "tiny-imagenet-pipeline")
    (tmp_path / "lsep_tiny.pt").write_bytes((ROOT / "tests" / "reference" / "lsep_tiny.pt").read_bytes())
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_readme_runs(folder, inception_weights):
    (folder / "inception.pth").symlink_to(inception_weights)
    blocks = [*read_blocks("README.md"), *read_blocks("docs/hub.md")]
    assert sum(language == "bash" for language, _ in blocks) >= 4
    assert sum(language == "python" for language, _ in blocks) >= 3
    search_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    with HubServer(folder / "hub", tokens={"hf_owner": "your-name"}) as hub:
        environment = hub.environment(folder / "hf-home", PATH=search_path, HF_TOKEN="hf_owner")
        run_blocks(blocks, folder, environment, SUBSTITUTIONS)
        assert "model_index.json" in hub.files("your-name/lsep-digits")
    assert Image.open(folder / "seven.png").size == (128, 128)
    for name in ("lsep-digits", "my-model", "my-large-model", "sit-xl-256"):
        assert (folder / name / "model_index.json").is_file()
    assert (folder / "samples" / "grid.png").is_file() and (folder / "fid" / "eval_results.json").is_file()
    assert (folder / "probing" / "probe_heatmap.png").is_file()
    assert "your-name/lsep-digits" in (folder / "lsep-space" / "app.py").read_text()
    assert "your-name/lsep-digits" in (folder / "my-space" / "app.py").read_text()
    for name in ("guidance-sweep", "denoising-strip"):
        assert Image.open(folder / "figures" / f"{name}.png").width > 400


def test_figures_of_the_readme_are_true():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
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
