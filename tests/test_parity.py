# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Against what the original code computed with small checkpoints of its own (`tests/reference`)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_lsep import (
    FlowMatchHeunODEScheduler,
    FlowMatchSDEScheduler,
    LSEPObjective,
    LSEPPipeline,
    convert_original_checkpoint,
)


REFERENCE = Path(__file__).parent / "reference"

# The weights whose gradients are stored, and how a gradient of ours becomes one of the original's fused matrix.
GRADIENTS = {
    "blocks.0.attn.qkv.weight": [f"transformer.transformer_blocks.0.attn.to_{name}.weight" for name in "qkv"],
    "classifier.1.weight": ["probe.linear.weight"],
    "final_layer.linear.weight": ["transformer.proj_out.weight"],
    "x_embedder.proj.weight": ["transformer.pos_embed.proj.weight"],
    "y_embedder.embedding_table.weight": ["transformer.class_embedding.weight"],
}
SAMPLERS = {
    "sde": (FlowMatchSDEScheduler, {}),
    "ode_euler": (FlowMatchSDEScheduler, {"diffusion_form": "none"}),
    "ode_heun": (FlowMatchHeunODEScheduler, {}),
}


@pytest.fixture(scope="module", params=["lsep_tiny", "lsep_tiny_cosine"])
def reference(request):
    settings = json.loads((REFERENCE / f"{request.param}.json").read_text())
    tensors = load_file(REFERENCE / f"{request.param}.expected.safetensors")
    return request.param, settings, tensors


def convert(name, settings, weights):
    heads = settings["model"]["num_heads"]
    return convert_original_checkpoint(
        REFERENCE / f"{name}.pt",
        weights=weights,
        num_attention_heads=heads,
        attention_head_dim=settings["model"]["hidden_size"] // heads,
    )


@pytest.fixture(scope="module")
def ema(reference):
    name, settings, _ = reference
    return convert(name, settings, "ema")


def test_network_and_hidden_tokens(reference, ema):
    _, settings, tensors = reference
    inputs = (tensors["forward.sample"], tensors["forward.timestep"], tensors["forward.class_labels"])
    with torch.no_grad():
        output = ema.transformer(*inputs).sample
        hidden = ema.transformer.hidden_states_at(*inputs, settings["model"]["encoder_depth"])
    torch.testing.assert_close(output, tensors["forward.output"], rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden, tensors["forward.hidden"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["constant", "steps"])
def test_losses_and_gradients(reference, mode):
    name, settings, tensors = reference
    converted = convert(name, settings, "model")
    constant = settings["constant_weight"]
    weights = {
        "constant": (constant, constant, 1),
        "steps": (settings["weight_start"], settings["weight_end"], settings["n_weights"]),
    }[mode]
    objective = LSEPObjective(
        converted.transformer,
        converted.probe,
        path_type=settings["model"]["path_type"],
        probe_depth=settings["model"]["encoder_depth"],
        probe_weight_start=weights[0],
        probe_weight_end=weights[1],
        num_probe_weights=weights[2],
    )
    count = len(tensors["train.latents"])
    output = objective(
        tensors["train.latents"],
        tensors["train.class_labels"],
        noise=tensors["train.noise"],
        timesteps=tensors["train.timestep"],
        class_dropout_mask=torch.zeros(count, dtype=torch.bool),
        probe_dropout_mask=torch.ones(count, dtype=torch.bool),
    )
    output.loss.backward()

    expected = {key.removeprefix(f"train.{mode}."): value for key, value in tensors.items() if mode in key}
    # Stored without its weight where that is constant.
    probe_loss = expected["probe_loss"] * (constant if mode == "constant" else 1)
    close = {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(output.denoising_losses, expected["denoising_loss"].float(), **close)
    torch.testing.assert_close(output.probe_loss, probe_loss.float(), **close)
    torch.testing.assert_close(output.loss.detach(), expected["total"].float().reshape(()), **close)

    parameters = dict(objective.named_parameters())
    for original_name, names in GRADIENTS.items():
        gradient = torch.cat([parameters[ours].grad for ours in names])
        difference = (gradient - expected[f"grad.{original_name}"]).norm() / expected[f"grad.{original_name}"].norm()
        assert difference < 1e-4, original_name


@pytest.mark.parametrize("guidance", ["nocfg", "cfg"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_trajectories(reference, ema, sampler, guidance):
    _, settings, tensors = reference
    scheduler_class, config = SAMPLERS[sampler]

    class StoredNoise(scheduler_class):
        """Steps with the stored noise in place of draws."""

        def step(self, *args, generator=None, **kwargs):
            index = self.step_index or 0
            noise = tensors["sample.noise"][index] if index < len(tensors["sample.noise"]) else None
            return super().step(*args, variance_noise=noise if sampler == "sde" else None, **kwargs)

    path_type = settings["model"]["path_type"]
    assert ema.scheduler.config.path_type == path_type
    pipe = LSEPPipeline(ema.transformer, StoredNoise(path_type=path_type, **config))
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        tensors["sample.class_labels"],
        num_inference_steps=settings["num_steps"],
        guidance_scale=settings["cfg_scale"] if guidance == "cfg" else 1.0,
        guidance_interval=(settings["guidance_low"], settings["guidance_high"]),
        latents=tensors["sample.latents"],
        output_type="latent",
    ).images
    torch.testing.assert_close(latents.double(), tensors[f"sample.{sampler}.{guidance}"], rtol=0, atol=1e-4)
