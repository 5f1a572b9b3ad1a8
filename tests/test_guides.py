# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs the commands of the guides in their order: ImageNet from the archive to the numbers, fine-tuning, few steps."""

import io
import json
import os
import shutil
import sys
import tarfile

import numpy as np
import pytest
from code_blocks import ROOT, read_blocks, run_blocks
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from image_folders import save_class_folders
from PIL import Image
from tiny_models import make_dinov2, make_pipeline, make_vae

from diffusers_lsep.data.moments import MomentsDataset
from diffusers_lsep.files import hash_saved_weights, hash_weights


# For one process on CPU, and lengths. The model keeps its depth, so that the depths in the recipes fit.
LAUNCH = "accelerate launch --config_file examples/configs/accelerate/"
SHORT = (
    " --train_batch_size 2 --max_train_steps 2 --dataloader_num_workers 0 --num_cpu_threads 1 --report_to none"
    " --num_validation_images 1 --validation_inference_steps 1"
)
SMALL = f"{SHORT} --num_layers 8 --num_attention_heads 2 --attention_head_dim 8"

IMAGENET = {
    f"{LAUNCH}eight-gpus.yaml": "python",
    "--output_dir imagenet-256 ": "--output_dir imagenet-256 --keep_images ",  # which the text asks for with REPA
    "--allow_tf32": "--dataloader_num_workers 0",
    "@examples/configs/sit-xl-2-256": f"@examples/configs/sit-xl-2-256{SMALL}",
    "losses/layersync": "losses/layersync --layersync_depth 2 --layersync_target_depth 4",
    "@examples/configs/sit-xl-2-512-from-256": f"@examples/configs/sit-xl-2-512-from-256{SMALL}",
    "--validation_labels 207 360 387 974 88 979 417 279": "--validation_labels 0 1",
    "--num_images 50000": "--num_images 6 --num_inference_steps 2",
    " --compile": "",
    "VIRTUAL_imagenet256_labeled.npz": (
        "reference.npz --metrics kid --inception_weights inception.pth --cache_dir cache"
    ),
    "--method ridge": "--method ridge --layers 8 --timesteps 0.2",
}
FINE_TUNING = {
    f"{LAUNCH}one-gpu.yaml": "python",
    "lsep-xl-256.pt": "lsep_tiny.pt --num_attention_heads 4",
    "@examples/configs/fine-tune-256": (
        f"@examples/configs/fine-tune-256{SHORT} --resolution 64 --probe_depth 1 --crop_size_min 2"
    ),
    "--num_inference_steps 100": "--num_inference_steps 2 --num_images_per_class 1",
    "num_inference_steps=50": "num_inference_steps=2",
}
FEW_STEPS = {
    "accelerate launch": "python",
    "@examples/configs/digits": "",
    "@examples/configs/few-steps/flow-map": f"@examples/configs/few-steps/flow-map{SHORT}",
}


@pytest.fixture
def folder(tmp_path, inception_weights):
    """A folder with what the guides start from: on the Hub, downloaded, or one's own."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "inception.pth").symlink_to(inception_weights)
    shutil.copy(ROOT / "tests" / "reference" / "lsep_tiny.pt", tmp_path)
    # One encoder and two decoders. A folder of this name goes before the Hub's repository.
    vae = make_vae(blocks=4)
    vae.save_pretrained(tmp_path / "stabilityai" / "sd-vae-ft-mse")
    for parameter in (*vae.decoder.parameters(), *vae.post_quant_conv.parameters()):
        parameter.data.mul_(0.9)
    vae.save_pretrained(tmp_path / "stabilityai" / "sd-vae-ft-ema")
    make_dinov2(patch_size=14).save_pretrained(tmp_path / "facebook" / "dinov2-base")

    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as archive:
        for synset in ("n01440764", "n01443537"):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as of_class:
                for i in range(4):
                    jpeg = io.BytesIO()
                    pixels = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
                    Image.fromarray(pixels).resize((300, 260)).save(jpeg, "JPEG")
                    add(of_class, f"{synset}_{i}.JPEG", jpeg.getvalue())
            add(archive, f"{synset}.tar", inner.getvalue())
    save_class_folders(tmp_path / "imagenet-val", ["n01440764", "n01443537"], [(260, 300)] * 4)
    np.savez(tmp_path / "reference.npz", arr_0=rng.integers(0, 256, (6, 256, 256, 3), dtype=np.uint8))
    save_class_folders(tmp_path / "my-images", ["ant", "bee", "cat"], [(70, 80)] * 21)  # a twentieth is held out
    return tmp_path


def add(archive: tarfile.TarFile, name: str, content: bytes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def environment():
    search_path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": search_path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.mark.slow
def test_imagenet(folder, environment):
    run_blocks(read_blocks("docs/imagenet.md"), folder, environment, IMAGENET)
    for name, side in (("imagenet-256", 32), ("imagenet-512", 64)):
        latents = MomentsDataset(folder / name)
        assert latents.moments_shape == (8, side, side) and latents.id2label == {0: "n01440764", 1: "n01443537"}
        assert latents.metadata["vae"].endswith("sd-vae-ft-mse")
    ft_ema = folder / "stabilityai" / "sd-vae-ft-ema" / "diffusion_pytorch_model.safetensors"
    for name, side in (("sit-xl-2-256", 32), ("sit-xl-2-512-from-256", 64)):
        pipe = DiffusionPipeline.from_pretrained(folder / name)
        assert pipe.transformer.config.sample_size == side and hash_weights(pipe.vae) == hash_saved_weights([ft_ema])

    cards = {
        name: ModelCard.load(folder / name / "README.md")
        for name in ("sit-xl-2-256", "sit-xl-2-256-repa", "sit-xl-2-512-from-256")
    }
    measured = cards["sit-xl-2-256"]
    assert [result.metric_type for result in measured.data.eval_results] == ["kid", "kid_std"]
    assert "Trained with LSEP" in measured.text and "were drawn at random" in measured.text
    assert "of an external encoder, `dinov2-base`" in cards["sit-xl-2-256-repa"].text
    assert "Fine-tuned from `sit-xl-2-256`" in cards["sit-xl-2-512-from-256"].text
    assert not any(str(folder) in card.content for card in cards.values())
    probed = json.loads((folder / "sit-xl-2-256" / "probing" / "probe_results.json").read_text())
    assert probed["layers"] == [8] and probed["training_probe"]["layer"] == 8


@pytest.mark.slow
def test_fine_tuning(folder, environment):
    blocks = [*read_blocks("docs/finetuning.md"), *read_blocks("docs/adapters.md")]
    run_blocks(blocks, folder, environment, FINE_TUNING)
    pipe = DiffusionPipeline.from_pretrained(folder / "my-model")
    assert pipe.labels == {"ant": 0, "bee": 1, "cat": 2}
    settings = json.loads((folder / "my-samples" / "samples.json").read_text())
    assert settings["class_ids"] == [0, 1, 2] and settings["guidance_interval"] == [0.0, 0.7]
    assert Image.open(folder / "my-samples" / "images" / "2-class-2.png").size == (64, 64)


AFTER_TRAINING = {
    "checkpoint-200": "checkpoint-4",
    "autoguided": "autoguided --num_inference_steps 1",
    "--num_images 500 --num_inference_steps 100": (
        "--num_images 70 --num_inference_steps 1 --guidance_scales 1 2 --guidance_interval 0 1 --cache_dir features"
    ),
    "[3, 7], num_inference_steps=100": "[3, 7], num_inference_steps=1",
    "--output_dir likelihood": "--output_dir likelihood --num_images 2 --num_steps 2",
    "--num_images 100 --num_steps 10": "--num_images 2 --num_steps 2",
    "accelerate launch": "python",
    "0.05 0.1\n": "0.05 0.1 --max_train_steps 4 --validation_inference_steps 1\n",
}


@pytest.mark.slow
def test_after_training(folder, environment):
    run_blocks(read_blocks("docs/after_training.md"), folder, environment, AFTER_TRAINING)
    facts = json.loads((folder / "lsep-averages-0.15" / "post_hoc_ema.json").read_text())
    assert facts["sigma_rel"] == 0.15 and facts["step"] == facts["num_snapshots"] == 4
    assert DiffusionPipeline.from_pretrained(folder / "lsep-averages-0.15").labels["7"] == 7
    assert json.loads((folder / "autoguided" / "samples.json").read_text())["autoguidance_scale"] == 1.5
    sweep = json.loads((folder / "figures" / "guidance-sweep.json").read_text())["results"]
    assert {result["guidance"] for result in sweep} == {"classifier-free", "autoguidance"}
    assert json.loads((folder / "likelihood" / "likelihood_results.json").read_text())["dimensions"] == 64
    assert "accuracy" in json.loads((folder / "zero-shot" / "likelihood_results.json").read_text())["classifier"]


@pytest.mark.slow
def test_few_steps(tmp_path, environment):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    make_pipeline(in_channels=1, num_layers=3).save_pretrained(tmp_path / "lsep-digits")
    run_blocks(read_blocks("docs/few-steps.md"), tmp_path, environment, FEW_STEPS)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "lsep-digits-map")
    assert pipe.transformer.config.flow_map_depth == 2
