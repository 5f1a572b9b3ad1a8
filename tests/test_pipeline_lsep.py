# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import contextlib
import copy
import functools
import json
import re
import subprocess
import sys
from unittest import mock

import accelerate
import diffusers
import numpy as np
import pytest
import tiny_models
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, SD3CFGCutoffCallback, SDCFGCutoffCallback
from diffusers.configuration_utils import ConfigMixin
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    FrequencyDecoupledGuidance,
    LTX2Guidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.hooks import FirstBlockCacheConfig, LayerSkipConfig
from gaussian_flow import GaussianFlow
from peft import LoraConfig
from PIL import Image

from diffusers_lsep import (
    FlowMatchHeunODEScheduler,
    FlowMatchSDEMultistepScheduler,
    FlowMatchSDEScheduler,
    LSEPPipeline,
    transformer_sit,
)
from diffusers_lsep.sampling import SAMPLERS, set_scheduler


NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "crane", "crane"]
ID2LABEL = {i: f"digit {i}, {name}" for i, name in enumerate(NAMES)}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.fixture
def make_pipeline(tiny_transformer):
    def make(vae=False, scheduler=None, path_type=None, id2label=ID2LABEL, vae_config=None, **config):
        vae = tiny_models.make_vae(**{"scaling_factor": 0.5, **(vae_config or {})}) if vae else None
        pipe = tiny_models.make_pipeline(scheduler, vae, id2label, path_type, **config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def two_blocks():
    return {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
    }


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- what comes out -------------------------------------------------------------------------------------------------


def test_outputs_in_pixel_space(make_pipeline):
    pipe = make_pipeline(in_channels=3)
    arguments = {"class_labels": [1, 2], "num_inference_steps": 3}
    pil, array, tensor, latent = (
        pipe(**arguments, generator=generators(0, 1), output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    )
    assert [image.size for image in pil] == [(8, 8)] * 2 and pil[0].mode == "RGB"
    assert array.shape == (2, 8, 8, 3) and tensor.shape == latent.shape == (2, 3, 8, 8)
    torch.testing.assert_close(tensor, (latent / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype("uint8"))
    assert pipe(**arguments, generator=generators(0, 1), return_dict=False)[0][1].tobytes() == pil[1].tobytes()


def test_grey_images_in_pixel_space(make_pipeline):
    (image,) = make_pipeline(in_channels=1)("zero", num_inference_steps=2).images
    assert isinstance(image, Image.Image) and image.mode == "L" and image.size == (8, 8)


def test_outputs_through_a_vae(make_pipeline):
    pipe = make_pipeline(vae=True)
    latents = pipe([3, 4], num_inference_steps=2, generator=generators(0, 1), output_type="latent").images
    images = pipe([3, 4], num_inference_steps=2, generator=generators(0, 1), output_type="pt").images
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / 0.5).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))
    assert images.shape == (2, 3, 16, 16)


def test_bfloat16_model_keeps_its_latents_in_float32(make_pipeline):
    pipe = make_pipeline(vae=True).to(torch.bfloat16)
    seen = []
    pipe.transformer.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((args[0].dtype, kwargs["timestep"].dtype)), with_kwargs=True
    )
    latents = pipe(1, num_inference_steps=3, output_type="latent").images
    assert latents.dtype == torch.float32
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    assert pipe(1, num_inference_steps=2).images[0].size == (16, 16)


# --- decoding -------------------------------------------------------------------------------------------------------


@pytest.fixture
def decode(make_pipeline):
    """Draws 16 images with a VAE: these, the float32 decode of the same latents, and what the VAE saw and was."""

    def decode(dtype, prepare=lambda vae: None, **vae_config):
        pipe = make_pipeline(vae=True, vae_config=vae_config).to(dtype)
        vae, decode_latents, seen = copy.deepcopy(pipe.vae).float(), pipe.vae.decode, {}

        def spy(latents, **kwargs):
            weights = pipe.vae.decoder.conv_in.weight.dtype
            seen.update(latents=latents, weights=weights, autocast=torch.is_autocast_enabled("cpu"))
            return decode_latents(latents, **kwargs)

        pipe.vae.decode = spy
        prepare(pipe.vae)
        arguments = {"class_labels": [i % 10 for i in range(16)], "num_inference_steps": 2}
        latents = pipe(**arguments, generator=generators(*range(16)), output_type="latent").images
        images = pipe(**arguments, generator=generators(*range(16)), output_type="pt").images
        assert {parameter.dtype for parameter in pipe.vae.parameters()} == {dtype}, "as it was before"
        for flag in ("use_slicing", "use_tiling", "tile_latent_min_size"):
            setattr(vae, flag, getattr(pipe.vae, flag))
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            expected = vae.decode(latents / 0.5 + vae_config.get("shift_factor", 0)).sample
        return images, (expected / 2 + 0.5).clamp(0, 1), seen

    return decode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("config", [{}, {"shift_factor": 0.3}], ids=["", "shift"])
def test_a_vae_that_asks_for_it_decodes_in_float32(decode, dtype, config):
    images, expected, seen = decode(dtype, force_upcast=True, **config)
    assert seen["latents"].dtype == seen["weights"] == images.dtype == torch.float32
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def forget_force_upcast(vae):
    config = {name: value for name, value in vae.config.items() if name != "force_upcast"}
    vae._internal_dict = type(vae.config)(config)


@pytest.mark.parametrize("prepare", [lambda vae: None, forget_force_upcast], ids=["false", "absent"])
def test_a_vae_that_does_not_ask_for_it_decodes_in_its_dtype(decode, prepare):
    images, expected, seen = decode(torch.bfloat16, prepare, force_upcast=False)
    assert seen["latents"].dtype == seen["weights"] == torch.bfloat16 and images.dtype == torch.float32
    assert 0.05 < 255 * (images - expected).std() < 3
    # Images are not rounded once more on their way from [-1, 1] to [0, 1]: dark ones have values between bfloat16's.
    assert not torch.equal(images, images.bfloat16().float())


@pytest.mark.parametrize(
    "prepare",
    [
        lambda vae: vae.enable_slicing(),
        lambda vae: (vae.enable_tiling(), setattr(vae, "tile_latent_min_size", 4)),
        lambda vae: accelerate.cpu_offload_with_hook(vae, "cpu"),
        lambda vae: accelerate.cpu_offload(vae, torch.device("cpu")),
    ],
    ids=["slicing", "tiling", "model offload", "sequential offload"],
)
def test_float32_decoding_goes_with(decode, prepare):
    images, expected, seen = decode(torch.bfloat16, prepare)
    assert seen["weights"] == torch.float32
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def test_weights_that_something_else_casts_are_left_alone(decode, make_pipeline):
    pipe = make_pipeline(vae=True).to(torch.bfloat16)
    expected = pipe(1, num_inference_steps=2, generator=generators(0), output_type="pt").images
    pipe.vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    images = pipe(1, num_inference_steps=2, generator=generators(0), output_type="pt").images
    assert (images - expected).abs().max() < 0.2
    assert pipe.vae.decoder.conv_in.weight.dtype == torch.float8_e4m3fn

    pipe = make_pipeline(vae=True).to(torch.bfloat16)
    pipe.vae.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")
    images = pipe(1, num_inference_steps=2, generator=generators(0), output_type="pt").images
    assert (images - expected).abs().max() < 0.02 and pipe.vae.dtype == torch.bfloat16


def test_the_vae_is_in_half_precision_again_after_an_error(make_pipeline):
    pipe = make_pipeline(vae=True).to(torch.bfloat16)
    pipe.vae.decoder.forward = None
    with pytest.raises(TypeError):
        pipe(1, num_inference_steps=1)
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.bfloat16}


def test_images_are_not_decoded_under_autocast(decode):
    with torch.autocast("cpu", torch.bfloat16):
        images, expected, seen = decode(torch.float32)
    assert not seen["autocast"] and images.dtype == torch.float32
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_latents_are_no_images(make_pipeline, output_type):
    pipe = make_pipeline(in_channels=4)
    assert pipe(1, num_inference_steps=1, output_type="latent").images.shape == (1, 4, 8, 8)
    pipe.transformer.forward = None  # any work would fail
    with pytest.raises(ValueError, match='`vae` is needed for images, .* 4 channels .* or use `output_type="latent"`'):
        pipe(1, num_inference_steps=1, output_type=output_type)


# --- generators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler_class", [FlowMatchSDEScheduler, FlowMatchSDEMultistepScheduler])
def test_an_image_depends_on_its_own_generator_alone(make_pipeline, scheduler_class):
    pipe = make_pipeline(scheduler=scheduler_class())
    arguments = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 1.5}
    arguments["guidance_interval"] = (0.0, 0.5)  # of the four times, the last two or three
    a = pipe([1, 2, 3], generator=generators(10, 11, 12), **arguments).images
    b = pipe([7, 2, 9], generator=generators(99, 11, 98), **arguments).images
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], b[0])
    alone = pipe([2], generator=generators(11), **arguments).images
    torch.testing.assert_close(alone[0], a[1], rtol=1e-4, atol=1e-4)


def test_one_generator_and_given_latents(make_pipeline):
    pipe = make_pipeline(scheduler=FlowMatchSDEScheduler(diffusion_form="none"))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    drawn = pipe([1, 2], num_inference_steps=3, generator=generators(3)[0], output_type="latent").images
    given = pipe([1, 2], num_inference_steps=3, latents=latents, output_type="latent").images
    assert torch.equal(drawn, given)


# --- guidance -------------------------------------------------------------------------------------------------------


def batch_sizes(pipe, **arguments):
    sizes = []
    hook = pipe.transformer.register_forward_hook(lambda _, args, output: sizes.append(len(args[0])))
    pipe([1], output_type="latent", **arguments)
    hook.remove()
    return sizes


def test_guidance_costs_a_second_evaluation_inside_its_interval_only(make_pipeline):
    pipe = make_pipeline(scheduler=FlowMatchSDEScheduler(diffusion_form="none"))
    steps = {"num_inference_steps": 5}  # t = 1, 0.8, 0.6, 0.4, 0.2
    assert batch_sizes(pipe, **steps) == [1] * 5
    assert batch_sizes(pipe, guidance_scale=1.0, **steps) == [1] * 5
    assert batch_sizes(pipe, guidance_scale=2.0, **steps) == [2] * 5
    # Both ends belong to the interval.
    assert batch_sizes(pipe, guidance_scale=2.0, guidance_interval=(0.4, 0.8), **steps) == [1, 2, 2, 2, 1]
    assert batch_sizes(pipe, guidance_scale=2.0, guidance_interval=(0.0, 0.39), **steps) == [1, 1, 1, 1, 2]


def test_second_evaluation_of_a_step_keeps_the_decision_of_the_first(make_pipeline):
    heun = make_pipeline(scheduler=FlowMatchHeunODEScheduler())
    # Evaluations at t = 1; 0.8, 0.8; 0.6, 0.6; 0.4, 0.4; 0.2, 0.2. The steps from 0.8 and 0.6 are guided.
    arguments = {"num_inference_steps": 5, "guidance_scale": 2.0, "guidance_interval": (0.6, 0.8)}
    expected = [1, 1, 2, 2, 2, 2, 1, 1, 1]
    assert batch_sizes(heun, **arguments) == expected
    # diffusers' own has another grid, 1 ... 0.001, and the same layout.
    theirs = make_pipeline(scheduler=FlowMatchHeunDiscreteScheduler())
    assert batch_sizes(theirs, **{**arguments, "guidance_interval": (0.5, 0.8)}) == [1, 1, 2, 2, 2, 2, 1, 1, 1]


def test_guidance_moves_the_velocity_away_from_the_null_class(make_pipeline):
    pipe = make_pipeline(scheduler=FlowMatchSDEScheduler(diffusion_form="none"))
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        conditional, null = (pipe.transformer(latents, 1.0, torch.tensor([k])).sample for k in (3, 10))
    expected = latents - (null + 2.5 * (conditional - null))
    found = pipe(3, num_inference_steps=1, guidance_scale=2.5, latents=latents, output_type="latent").images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- labels ---------------------------------------------------------------------------------------------------------


def test_classes_by_id_name_and_list(make_pipeline):
    pipe = make_pipeline()
    assert pipe.get_label_ids("three") == [3] and pipe.get_label_ids(["digit 1", "five"]) == [1, 5]
    assert pipe.labels["seven"] == 7 and "crane" not in pipe.labels and pipe.labels["digit 9"] == 9
    arguments = {"num_inference_steps": 2, "output_type": "latent"}
    expected = pipe([3, 5], generator=generators(0, 1), **arguments).images
    for labels in (["three", 5], [np.int64(3), "digit 5"], torch.tensor([3, 5]), (3, 5), np.array([3, 5])):
        assert torch.equal(pipe(labels, generator=generators(0, 1), **arguments).images, expected)
    assert pipe("three", **arguments).images.shape[0] == pipe(3, **arguments).images.shape[0] == 1


def test_what_could_be_a_name_or_an_id_is_the_name(make_pipeline):
    """Folders are sorted as text: 1, 10, 2."""
    pipe = make_pipeline(id2label=dict(enumerate(["1", "10", "2"])), num_classes=3, in_channels=3)
    assert pipe.get_label_ids(["1", "10", "2", "0", 1, np.int64(2)]) == [0, 1, 2, 0, 1, 2]
    found, expected, other = (
        pipe(label, num_inference_steps=1, generator=generators(0), output_type="latent").images
        for label in ("1", 0, 1)
    )
    assert torch.equal(found, expected) and not torch.equal(found, other)
    with pytest.raises(ValueError, match=r"has to lie in 0\.\.2, but holds 3\. The names are \['1', '10', '2'\]"):
        pipe("3")


def test_names_with_commas(make_pipeline):
    """Folders may have them, and `id2label` separates several names of a class by them."""
    pipe = make_pipeline(id2label={0: "cat, grey", 1: "dog,", 2: "cat, red", 11: "none"})
    assert pipe.get_label_ids(["cat, grey", "grey", "dog", "dog,", "cat, red"]) == [0, 0, 1, 1, 2]
    assert pipe.labels == {"dog": 1, "grey": 0, "none": 11, "red": 2}
    with pytest.raises(ValueError, match=r"'cat' is the name of several classes: 0 \(cat, grey\), 2 \(cat, red\)"):
        pipe("cat")
    for label, message in (("none", r"has to lie in 0\.\.9, but holds 11\.$"), ("", "there is no class ''")):
        with pytest.raises(ValueError, match=message):
            pipe(label)


# --- callbacks ------------------------------------------------------------------------------------------------------


def test_callback_sees_and_replaces_latents_and_interrupts(make_pipeline):
    pipe = make_pipeline()
    steps = []

    def callback(pipe, i, timestep, callback_kwargs):
        steps.append((i, float(timestep), pipe.num_timesteps, pipe.guidance_scale))
        if i == 2:
            pipe._interrupt = True
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}
        return {}

    images = pipe(1, num_inference_steps=5, guidance_scale=1.5, callback_on_step_end=callback, output_type="latent")
    assert [step[0] for step in steps] == [0, 1, 2] and not images.images.any()
    assert steps[0] == (0, 1000.0, 5, 1.5)


STEPS = {"num_inference_steps": 5, "output_type": "latent"}  # t = 1, 0.8, 0.6, 0.4, 0.2


def run(pipe, *labels, **arguments):
    """Latents of a deterministic sampler, and how many rows the transformer saw in each call."""
    sizes = []
    hook = pipe.transformer.register_forward_hook(lambda _, args, output: sizes.append(len(args[0])))
    arguments = {"generator": generators(*range(len(labels))), **STEPS, **arguments}
    images = pipe(list(labels), **arguments).images
    hook.remove()
    return images, sizes


@pytest.fixture
def ode_pipeline(make_pipeline):
    return make_pipeline(scheduler=FlowMatchSDEScheduler(diffusion_form="none"))


def test_a_callback_that_turns_the_guidance_off_ends_it_with_the_next_step(ode_pipeline):
    def turn_off(pipe, i, timestep, tensors):
        assert pipe.do_classifier_free_guidance == (i <= 1) and pipe.current_timestep == timestep
        if i == 1:
            pipe._guidance_scale = 0.0

    found, sizes = run(ode_pipeline, 1, 2, guidance_scale=3.0, callback_on_step_end=turn_off)
    expected, _ = run(ode_pipeline, 1, 2, guidance_scale=3.0, guidance_interval=(0.7, 1.0))
    assert sizes == [4, 4, 2, 2, 2] and torch.equal(found, expected)
    assert not torch.equal(found, run(ode_pipeline, 1, 2, guidance_scale=3.0)[0])
    assert ode_pipeline.current_timestep is None


@pytest.mark.parametrize("scheduler", [FlowMatchSDEScheduler(diffusion_form="none"), FlowMatchHeunODEScheduler()])
def test_a_callback_sees_the_data_that_the_model_sees(make_pipeline, scheduler):
    """As the model is guided, at no further evaluation, and with a cache as without one."""
    seen = []

    def keep(pipe, i, timestep, tensors):
        seen.append((pipe.scheduler.sigmas[i].item(), tensors["pred_original_sample"]))

    pipe = make_pipeline(scheduler=scheduler)
    noise = torch.randn(1, *pipe._latents_shape(1)[1:], generator=torch.Generator().manual_seed(0))
    arguments = {"guidance_scale": 3.0, "negative_class_labels": 2, "guidance_interval": (0.5, 1.0), "latents": noise}
    plain, sizes = run(pipe, 1, **arguments)
    names = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["pred_original_sample"]}
    found, sizes_with = run(pipe, 1, **arguments, **names)
    assert torch.equal(found, plain) and sizes_with == sizes and len(seen) == len(sizes)
    guided = pipe.predict_velocity(noise, seen[0][0], torch.tensor([1]), 3.0, torch.tensor([2])).detach()
    assert torch.equal(seen[0][1], noise - seen[0][0] * guided)
    torch.testing.assert_close(seen[-1][1], found)  # the last step ends there

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    cached, _ = run(pipe, 1, **arguments)
    assert torch.equal(run(pipe, 1, **arguments, **names)[0], cached)


def test_a_callback_sets_scale_and_interval(ode_pipeline):
    def change(pipe, i, timestep, tensors):
        pipe._guidance_scale, pipe._guidance_interval = (4.0, (0.5, 0.7)) if i == 1 else (1.0, (0.0, 1.0))
        return {}

    found, sizes = run(ode_pipeline, 1, guidance_scale=1.0, callback_on_step_end=change)
    assert ode_pipeline.guidance_interval == (0.0, 1.0) and ode_pipeline.guidance_scale == 1.0
    expected, _ = run(ode_pipeline, 1, guidance_scale=4.0, guidance_interval=(0.5, 0.7))
    assert sizes == [1, 1, 2, 1, 1] and torch.equal(found, expected)


def test_a_callback_that_returns_nothing_and_asks_for_nothing(ode_pipeline):
    seen = []
    arguments = {"callback_on_step_end": lambda *given: seen.append(given[3]), "guidance_scale": 3.0}
    found, _ = run(ode_pipeline, 1, callback_on_step_end_tensor_inputs=None, **arguments)
    assert seen == [{}] * 5 and torch.equal(found, run(ode_pipeline, 1, guidance_scale=3.0)[0])


@pytest.mark.parametrize("wrap", [lambda callback: callback, lambda callback: MultiPipelineCallbacks([callback])])
@pytest.mark.parametrize("cutoff", [{"cutoff_step_index": 1, "cutoff_step_ratio": None}, {"cutoff_step_ratio": 0.2}])
def test_the_cutoff_callback_of_diffusers(ode_pipeline, cutoff, wrap):
    arguments = {"guidance_scale": 3.0, "callback_on_step_end": wrap(SDCFGCutoffCallback(**cutoff))}
    found, sizes = run(ode_pipeline, 1, 2, **arguments)
    expected, _ = run(ode_pipeline, 1, 2, guidance_scale=3.0, guidance_interval=(0.7, 1.0))
    assert sizes == [4, 4, 2, 2, 2] and torch.equal(found, expected)


def test_callbacks_of_diffusers_that_need_a_text_encoder_are_refused(ode_pipeline):
    with pytest.raises(
        ValueError, match="`callback_on_step_end_tensor_inputs` has to be .* has .'pooled_prompt_embeds'"
    ):
        run(ode_pipeline, 1, callback_on_step_end=SD3CFGCutoffCallback())


def test_a_second_evaluation_keeps_the_scale_of_the_first(make_pipeline):
    pipe = make_pipeline(scheduler=FlowMatchHeunODEScheduler())

    def turn_off(pipe, i, timestep, tensors):
        pipe._guidance_scale = 0.0

    # The first step has evaluations at t = 1 and at t = 0.8, and the callback is called after both.
    assert run(pipe, 1, guidance_scale=3.0, callback_on_step_end=turn_off)[1] == [2, 2] + [1] * 7


def test_a_callback_sees_and_replaces_classes(ode_pipeline):
    seen = []

    def change(pipe, i, timestep, tensors):
        seen.append({name: tensor.tolist() for name, tensor in tensors.items()})
        return {"class_labels": torch.tensor([4]), "negative_class_labels": torch.tensor([5])} if i == 1 else None

    names = ["class_labels", "negative_class_labels"]
    arguments = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    found, _ = run(ode_pipeline, 1, guidance_scale=2.0, negative_class_labels=3, **arguments)
    first, second = ({"class_labels": [k], "negative_class_labels": [n]} for k, n in ((1, 3), (4, 5)))
    assert seen == [first] * 2 + [second] * 3

    states = []
    run(ode_pipeline, 1, guidance_scale=2.0, negative_class_labels=3, callback_on_step_end=keep_latents(states))
    halfway = {"latents": states[1], "sigmas": [0.6, 0.4, 0.2], "generator": None}
    expected, _ = run(ode_pipeline, 4, guidance_scale=2.0, negative_class_labels=5, **halfway)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def keep_latents(states):
    return lambda pipe, i, timestep, tensors: states.append(tensors["latents"].clone())


def test_attention_kwargs_reach_the_transformer(ode_pipeline):
    ode_pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    expected = {scale: run(ode_pipeline, 1, attention_kwargs={"scale": scale})[0] for scale in (0.0, 0.5, 1.0)}
    assert torch.equal(run(ode_pipeline, 1)[0], expected[1.0])
    assert not torch.equal(expected[0.5], expected[1.0])
    ode_pipeline.transformer.disable_adapters()
    torch.testing.assert_close(run(ode_pipeline, 1)[0], expected[0.0])

    ode_pipeline.transformer.enable_adapters()

    def turn_off(pipe, i, timestep, tensors):
        assert pipe.attention_kwargs == {"scale": 1.0 if i == 0 else 0.0}
        pipe._attention_kwargs = {"scale": 0.0}

    found, _ = run(ode_pipeline, 1, attention_kwargs={"scale": 1.0}, callback_on_step_end=turn_off)
    assert not torch.equal(found, expected[0.0]) and not torch.equal(found, expected[1.0])


# --- numbers of images, no class, and classes to lead away from -----------------------------------------------------


def test_images_of_one_label_stand_next_to_each_other(ode_pipeline):
    found, sizes = run(ode_pipeline, 3, "five", num_images_per_label=3, generator=generators(*range(6)))
    expected, _ = run(ode_pipeline, 3, 3, 3, 5, 5, 5)
    assert sizes == [6] * 5 and torch.equal(found, expected)
    one = ode_pipeline(3, num_images_per_label=2, generator=generators(0)[0], **STEPS).images
    assert one.shape[0] == 2 and not torch.equal(one[0], one[1])


def test_no_class(ode_pipeline):
    """The null class of 10 has the id 10."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = ode_pipeline(num_images_per_label=2, num_inference_steps=1, latents=latents, output_type="latent").images
    with torch.no_grad():
        velocity = ode_pipeline.transformer(latents, 1.0, torch.tensor([10, 10])).sample
    torch.testing.assert_close(found, latents - velocity, rtol=1e-4, atol=1e-4)

    for labels in (None, 10, [10], torch.tensor([10])):
        images = ode_pipeline(labels, num_images_per_label=2, generator=generators(0, 1), **STEPS).images
        assert torch.equal(images, run(ode_pipeline, 10, 10)[0])
    assert not torch.equal(run(ode_pipeline, 10, 1)[0], run(ode_pipeline, 10, 10)[0])
    images = ode_pipeline(None, guidance_scale=4.0, generator=generators(0), **STEPS).images
    torch.testing.assert_close(images, run(ode_pipeline, 10)[0], rtol=1e-4, atol=1e-4)


def test_guidance_leads_away_from_negative_classes(ode_pipeline):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, unwanted = (ode_pipeline.transformer(latents, 1.0, torch.tensor(k)).sample for k in ([3, 4], [7, 1]))
    arguments = {"num_inference_steps": 1, "guidance_scale": 2.5, "latents": latents, "output_type": "latent"}
    found = ode_pipeline([3, 4], negative_class_labels=["seven", 1], **arguments).images
    torch.testing.assert_close(found, latents - (unwanted + 2.5 * (wanted - unwanted)), rtol=1e-4, atol=1e-4)

    expected = ode_pipeline([3, 3], negative_class_labels=[7, 7], **arguments).images
    assert torch.equal(ode_pipeline(3, negative_class_labels=7, num_images_per_label=2, **arguments).images, expected)
    no_class = ode_pipeline([3, 4], negative_class_labels=10, **arguments).images
    assert torch.equal(no_class, ode_pipeline([3, 4], **arguments).images)


# --- guiders of diffusers -------------------------------------------------------------------------------------------


def test_the_guider_of_classifier_free_guidance_gives_the_same_images(ode_pipeline):
    guider = ClassifierFreeGuidance(guidance_scale=2.5)
    for arguments in ({}, {"guidance_interval": (0.4, 0.8)}, {"negative_class_labels": 7}):
        expected, _ = run(ode_pipeline, 1, 2, guidance_scale=2.5, **arguments)
        found, sizes = run(ode_pipeline, 1, 2, guider=guider, **arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert sizes == [2] * 10 and guider._enabled
    assert run(ode_pipeline, 1, guider=guider, guidance_interval=(0.4, 0.8))[1] == [1] * 8
    expected, _ = run(ode_pipeline, 1)
    assert torch.equal(run(ode_pipeline, 1, guider=ClassifierFreeGuidance(guidance_scale=1.0))[0], expected)
    assert torch.equal(run(ode_pipeline, 1, guider=ClassifierFreeGuidance(3.0, enabled=False))[0], expected)


def test_start_and_stop_of_a_guider_are_fractions_of_the_steps(ode_pipeline):
    """The last two of five steps are those at t = 0.4 and 0.2."""
    guider = ClassifierFreeGuidance(guidance_scale=2.5, start=0.6)
    active = []

    def watch(pipe, i, timestep, tensors):
        active.append(pipe.do_classifier_free_guidance)

    found, _ = run(ode_pipeline, 1, guider=guider, callback_on_step_end=watch)
    expected, _ = run(ode_pipeline, 1, guidance_scale=2.5, guidance_interval=(0.0, 0.4))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert active == [False] * 3 + [True] * 2


def test_a_callback_replaces_the_guider(ode_pipeline):
    def drop(pipe, i, timestep, tensors):
        if i == 1:
            pipe._guider = None

    found, sizes = run(ode_pipeline, 1, guider=ClassifierFreeGuidance(2.5), callback_on_step_end=drop)
    expected, _ = run(ode_pipeline, 1, guidance_scale=2.5, guidance_interval=(0.7, 1.0))
    assert len(sizes) == 7
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_frequency_decoupled_guidance(ode_pipeline):
    """Equal scales for all frequencies are classifier-free guidance."""
    expected, _ = run(ode_pipeline, 1, guidance_scale=2.5)
    found, _ = run(ode_pipeline, 1, guider=FrequencyDecoupledGuidance(guidance_scales=[2.5, 2.5]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    other, _ = run(ode_pipeline, 1, guider=FrequencyDecoupledGuidance(guidance_scales=[4.0, 1.5]))
    assert not torch.allclose(other, expected, atol=1e-2)


def two_velocities(pipe, latents, label):
    with torch.no_grad():
        return (pipe.transformer(latents, 1.0, torch.tensor([k] * len(latents))).sample for k in (label, 10))


def test_guiders_of_other_formulas(ode_pipeline):
    """One step from t = 1 to t = 0: the images are the noise less the velocity."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditional, null = two_velocities(ode_pipeline, latents, 3)
    difference, dims = (conditional - null).double(), (1, 2, 3)

    # APG (arXiv 2410.02416) at eta = 0: only the part of the difference that is orthogonal to the conditional velocity
    unit = torch.nn.functional.normalize(conditional.double(), dim=dims)
    orthogonal = difference - (difference * unit).sum(dims, keepdim=True) * unit
    apg = null + 2.5 * orthogonal
    # CFG-Zero* (arXiv 2503.18886): the null velocity is scaled by its projection
    scale = (conditional * null).sum(dims, keepdim=True) / null.square().sum(dims, keepdim=True)
    zero_star = scale * null + 2.5 * (conditional - scale * null)

    arguments = {"generator": None, "latents": latents, "num_inference_steps": 1}
    for guider, expected in (
        (AdaptiveProjectedGuidance(2.5, eta=0.0, adaptive_projected_guidance_rescale=0.0), apg),
        (ClassifierFreeZeroStarGuidance(2.5, zero_init_steps=0), zero_star),
    ):
        found, _ = run(ode_pipeline, 3, 3, guider=guider, **arguments)
        torch.testing.assert_close(found, latents - expected.float(), rtol=1e-4, atol=1e-4)

    found, _ = run(ode_pipeline, 3, 3, guider=ClassifierFreeZeroStarGuidance(2.5, zero_init_steps=1), **arguments)
    torch.testing.assert_close(found, latents)


@pytest.mark.parametrize(
    "make_guider",
    [
        lambda: AdaptiveProjectedGuidance(2.5, adaptive_projected_guidance_momentum=-0.5),
        lambda: AdaptiveProjectedMixGuidance(2.5, adaptive_projected_guidance_start_step=1),
        lambda: ClassifierFreeZeroStarGuidance(2.5),
        lambda: TangentialClassifierFreeGuidance(2.5),
    ],
)
def test_guiders_keep_images_and_calls_apart(ode_pipeline, make_guider):
    """An image depends on its own generator alone, and a call on none before it, also with a momentum."""
    guider = make_guider()
    interval = {"guidance_interval": (0.0, 0.7)}
    first, sizes = run(ode_pipeline, 1, 2, guider=guider, **interval)
    other, _ = run(ode_pipeline, 7, 2, guider=guider, **interval)
    assert sizes == [2] * 8 and torch.equal(first[1], other[1]) and not torch.equal(first[0], other[0])
    assert torch.equal(run(ode_pipeline, 1, 2, guider=make_guider(), **interval)[0], first)
    assert not torch.equal(run(ode_pipeline, 1, 2, **interval)[0], first)


@pytest.fixture
def deep_pipeline(make_pipeline):
    return make_pipeline(scheduler=FlowMatchSDEScheduler(diffusion_form="none"), num_layers=4)


@contextlib.contextmanager
def blocks_changed(transformer, *indices, change):
    """Changes some blocks of a transformer by hand."""
    forwards = {index: transformer.transformer_blocks[index].forward for index in indices}
    for index, forward in forwards.items():
        transformer.transformer_blocks[index].forward = functools.partial(change, forward)
    yield
    for index, forward in forwards.items():
        transformer.transformer_blocks[index].forward = forward


def attend_to_itself(forward, hidden_states, temb):
    """Perturbed attention (arXiv 2403.17377): the attention is the identity, so a token's value comes out."""
    with mock.patch.object(transformer_sit, "dispatch_attention_fn", lambda query, key, value, **_: value):
        return forward(hidden_states, temb)


def leave_out(forward, hidden_states, temb):
    return hidden_states


SKIP = {"fqn": "transformer_blocks", "indices": [1, 2]}


@pytest.mark.parametrize(
    ("guider_class", "prefix", "layers", "change"),
    [
        (SkipLayerGuidance, "skip_layer_guidance", {"skip_layer_config": LayerSkipConfig(**SKIP)}, leave_out),
        (PerturbedAttentionGuidance, "perturbed_guidance", {"perturbed_guidance_layers": [1, 2]}, attend_to_itself),
    ],
)
def test_guiders_that_weaken_the_model_for_a_third_prediction(deep_pipeline, guider_class, prefix, layers, change):
    pipe, before = deep_pipeline, run(deep_pipeline, 3, 3)[0]
    window = {f"{prefix}_scale": 1.5, f"{prefix}_start": 0.0, f"{prefix}_stop": 1.0}
    guider = guider_class(2.0, **window, **layers)
    states = []
    _, sizes = run(pipe, 3, 3, guider=guider, callback_on_step_end=keep_latents(states))
    # It acts after the step of its start.
    assert sizes == [2] * (2 + 4 * 3)
    for i, t in enumerate((0.8, 0.6, 0.4, 0.2)):
        conditional, null, weak = predict_three(pipe, states[i], t, change)
        expected = null + 2.0 * (conditional - null) + 1.5 * (conditional - weak)
        torch.testing.assert_close(states[i + 1], states[i] - 0.2 * expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(pipe, 3, 3)[0], before)


def predict_three(pipe, latents, t, change):
    """The velocity of class 3, of no class, and that of class 3 with the blocks 1 and 2 changed."""
    labels, no_labels = (torch.full((len(latents),), k) for k in (3, 10))
    with torch.no_grad():
        conditional, null = (pipe.transformer(latents, t, k).sample for k in (labels, no_labels))
        with blocks_changed(pipe.transformer, 1, 2, change=change):
            weak = pipe.transformer(latents, t, labels).sample
    assert not torch.allclose(conditional, weak, atol=0.01)
    return conditional, null, weak


def test_autoguidance_leads_away_from_the_weakened_model(deep_pipeline):
    """With the same class on both sides, as in its paper (arXiv 2406.02507)."""
    guider, states = AutoGuidance(1.5, auto_guidance_config=LayerSkipConfig(**SKIP)), []
    arguments = {"negative_class_labels": 3, "callback_on_step_end": keep_latents(states)}
    run(deep_pipeline, 3, 3, guider=guider, **arguments)
    for i, t in enumerate((0.8, 0.6, 0.4, 0.2)):
        conditional, _, weak = predict_three(deep_pipeline, states[i], t, leave_out)
        expected = weak + 1.5 * (conditional - weak)
        torch.testing.assert_close(states[i + 1], states[i] - 0.2 * expected, rtol=1e-4, atol=1e-4)


def test_hooks_of_a_guider_are_gone_after_an_error(deep_pipeline):
    pipe, expected = deep_pipeline, run(deep_pipeline, 3)[0]
    guider = AutoGuidance(1.5, auto_guidance_config=LayerSkipConfig(**SKIP))

    def fail(*_):
        if fail.calls == 1:
            raise RuntimeError("in the second call")
        fail.calls += 1

    fail.calls = 0
    hook = pipe.transformer.proj_out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the second call"):
        run(pipe, 3, guider=guider)
    hook.remove()
    assert torch.equal(run(pipe, 3)[0], expected)


# --- schedulers -----------------------------------------------------------------------------------------------------


def gaussian_std(scheduler, path_type="linear", steps=50, **arguments):
    pipe = LSEPPipeline(GaussianFlow(path_type=path_type), scheduler, path_type=path_type)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(0, steps, generator=generators(0)[0], output_type="latent", **arguments).images
    return images.mean().item(), images.std().item(), pipe.transformer.times


@pytest.mark.parametrize(
    ("scheduler", "std"),
    [
        (FlowMatchSDEScheduler(), 0.189),
        (FlowMatchSDEScheduler(last_step="tweedie"), 0.197),
        (FlowMatchSDEMultistepScheduler(), 0.200),
        (FlowMatchSDEScheduler(diffusion_form="none"), 0.190),
        (FlowMatchHeunODEScheduler(), 0.199),
        (FlowMatchEulerDiscreteScheduler(), 0.190),
        (FlowMatchHeunDiscreteScheduler(), 0.200),
        (DPMSolverMultistepScheduler(**FLOW), 0.200),
        (UniPCMultistepScheduler(**FLOW), 0.200),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ConfigMixin) else None,
)
def test_schedulers_bring_noise_to_the_data(scheduler, std):
    """32,768 values: the standard error of their standard deviation is 0.0008."""
    mean, found, times = gaussian_std(scheduler)
    assert found == pytest.approx(std, abs=0.003) and mean == pytest.approx(0.3, abs=0.005)
    assert times[0] == pytest.approx(1, abs=2e-3), "the network takes t in [0, 1]"
    # The times that the network sees are those of the grid, also where a scheduler rounds its timesteps.
    assert times == pytest.approx(scheduler.sigmas[: len(times)].tolist(), abs=1e-7) and len(set(times)) == 50


@pytest.mark.parametrize(
    ("scheduler", "expected_std"),
    [
        # The expected data at t = 0.04 have a smaller spread than the data: 0.2^2 / sqrt(0.2^2 + tan(0.02 pi)^2).
        (FlowMatchSDEScheduler(path_type="cosine", last_step="tweedie"), 0.1908),
        (FlowMatchSDEScheduler(path_type="cosine", diffusion_form="none"), 0.2),
        (FlowMatchSDEMultistepScheduler(path_type="cosine"), 0.2),
        (FlowMatchHeunODEScheduler(path_type="cosine"), 0.2),
        (FlowMatchEulerDiscreteScheduler(), 0.2),
        (FlowMatchHeunDiscreteScheduler(), 0.2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ConfigMixin) else None,
)
def test_schedulers_that_are_let_on_the_cosine_path_are_right_there(scheduler, expected_std):
    mean, std, _ = gaussian_std(scheduler, "cosine", steps=200)
    assert std == pytest.approx(expected_std, abs=0.005) and mean == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
        UniPCMultistepScheduler(**FLOW),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_schedulers_are_refused_on_the_cosine_path(scheduler):
    with pytest.raises(ValueError, match="`scheduler` .* is for the linear path, but .* the path 'cosine'"):
        gaussian_std(scheduler, "cosine")


def test_euler_of_diffusers_gets_the_grid_of_the_papers(make_pipeline):
    """By its own choice it would end at 0.001."""
    ours, theirs = FlowMatchSDEScheduler(diffusion_form="none"), FlowMatchEulerDiscreteScheduler()
    arguments = {"class_labels": [1, 2], "num_inference_steps": 7, "output_type": "latent"}
    expected = make_pipeline(scheduler=ours)(**arguments, generator=generators(0, 1)).images
    found = make_pipeline(scheduler=theirs)(**arguments, generator=generators(0, 1)).images
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.sigmas, torch.linspace(1, 0, 8))


@pytest.fixture(params=["saved now", "saved before"])
def saved_pipeline(make_pipeline, tmp_path, request):
    """A pipeline that was saved and loaded, with the exact velocity of Gaussian data in place of its network."""
    make_pipeline().save_pretrained(tmp_path)
    if request.param == "saved before":  # when FlowMatchSDEScheduler had a `solver_order`
        path = tmp_path / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "solver_order": 1}))
    pipe = DiffusionPipeline.from_pretrained(tmp_path, transformer=GaussianFlow())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_gaussian(pipe):
    """Samples of 30 steps, and the error of their standard deviation: that of their noise is exactly 1."""
    noise = torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std(correction=0)
    images = pipe(0, 30, latents=noise, generator=generators(1)[0], output_type="latent").images
    return images, abs(images.double().std(correction=0).item() - 0.2)


SECOND_ORDER = 0.0025  # at 30 steps; the solvers of first order have errors from 0.008 on


@pytest.mark.parametrize(
    ("scheduler_class", "arguments", "is_second_order"),
    [
        (DPMSolverMultistepScheduler, FLOW, True),
        (UniPCMultistepScheduler, FLOW, True),
        (FlowMatchHeunDiscreteScheduler, {}, True),
        (FlowMatchEulerDiscreteScheduler, {}, False),
        (FlowMatchHeunODEScheduler, {}, True),
        (FlowMatchSDEMultistepScheduler, {}, True),
        (FlowMatchSDEScheduler, {}, False),
        (FlowMatchSDEScheduler, {"diffusion_form": "none"}, False),
    ],
)
def test_schedulers_are_swapped_as_users_do(saved_pipeline, scheduler_class, arguments, is_second_order):
    pipe = saved_pipeline
    original = pipe.scheduler
    pipe.scheduler = scheduler_class(**arguments)
    expected, error = draw_gaussian(pipe)
    assert error < SECOND_ORDER if is_second_order else error > 3 * SECOND_ORDER

    in_between = (None, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunODEScheduler)
    for other_class in in_between:
        pipe.scheduler = original
        if other_class is not None:
            flow = FLOW if other_class is DPMSolverMultistepScheduler else {}
            pipe.scheduler = other_class.from_config(pipe.scheduler.config, **flow)
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **arguments)
        assert torch.equal(draw_gaussian(pipe)[0], expected)


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DDIMScheduler])
def test_advice_of_the_error_makes_a_scheduler_that_fits(saved_pipeline, scheduler_class):
    pipe = saved_pipeline
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="has to be a flow-matching scheduler") as error:
        pipe(0)
    (advice,) = re.findall("Try `(.+)`", str(error.value))
    pipe.scheduler = eval(advice, {**vars(diffusers), "pipe": pipe})
    is_second_order = scheduler_class is not DDIMScheduler
    assert (draw_gaussian(pipe)[1] < SECOND_ORDER) == is_second_order
    assert isinstance(pipe.scheduler, scheduler_class if is_second_order else FlowMatchSDEScheduler)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_of_the_scripts_have_their_order(saved_pipeline, name):
    set_scheduler(saved_pipeline, name)
    error = draw_gaussian(saved_pipeline)[1]
    assert error < SECOND_ORDER if name in ("sde2", "heun", "dpmpp", "unipc") else error > 3 * SECOND_ORDER


def test_settings_that_a_scheduler_keeps_for_others_are_not_taken_for_its_own(make_pipeline):
    pipe = make_pipeline(scheduler=DPMSolverMultistepScheduler(**FLOW), in_channels=3)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.config.use_flow_sigmas
    with pytest.raises(ValueError, match="`scheduler` has to be a flow-matching scheduler, but DDIMScheduler"):
        pipe(1)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe(1, num_inference_steps=7)
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.linspace(1, 0, 8))


def test_own_sigmas(make_pipeline):
    for scheduler in (FlowMatchSDEScheduler(), FlowMatchEulerDiscreteScheduler(), UniPCMultistepScheduler(**FLOW)):
        pipe = make_pipeline(scheduler=scheduler)
        assert batch_sizes(pipe, sigmas=[1.0, 0.7, 0.2]) == [1, 1, 1]
        torch.testing.assert_close(scheduler.sigmas.float(), torch.tensor([1.0, 0.7, 0.2, 0.0]), rtol=1e-3, atol=1e-3)


# --- saving and loading ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("vae", [False, True])
def test_a_new_process_generates_the_same_images(make_pipeline, tmp_path, vae):
    pipe = make_pipeline(vae=vae, in_channels=4 if vae else 3)
    pipe.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "LSEPPipeline" and index["path_type"] == "linear"
    assert index["transformer"] == ["diffusers_lsep", "SiTTransformer2DModel"]
    assert index["scheduler"] == ["diffusers_lsep", "FlowMatchSDEScheduler"]
    assert index["vae"] == (["diffusers", "AutoencoderKL"] if vae else [None, None])

    script = """
import sys, torch
import diffusers_lsep
from diffusers import DiffusionPipeline
torch.set_num_threads(int(sys.argv[3]))
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
images = pipe(["three", 4], num_inference_steps=3, guidance_scale=1.5, generator=generator, output_type="pt").images
torch.save(images, sys.argv[2])
"""
    threads = str(torch.get_num_threads())  # the last bits of a sum depend on them
    subprocess.run([sys.executable, "-c", script, tmp_path / "pipeline", tmp_path / "images.pt", threads], check=True)
    found = torch.load(tmp_path / "images.pt", weights_only=True)
    expected = pipe(["three", 4], 3, guidance_scale=1.5, generator=generators(0, 1), output_type="pt").images
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scheduler_class", [FlowMatchSDEMultistepScheduler, FlowMatchHeunODEScheduler])
def test_every_scheduler_of_the_package_is_saved_and_loaded(make_pipeline, tmp_path, scheduler_class):
    pipe = make_pipeline(scheduler=scheduler_class(path_type="cosine"))
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "diffusers_lsep",
        scheduler_class.__name__,
    ]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is scheduler_class and loaded.config.path_type == "cosine"
    found, expected = (p(1, 3, generator=generators(0), output_type="latent").images for p in (loaded, pipe))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("diffusion_form", "successor"),
    [("linear", FlowMatchSDEMultistepScheduler), ("none", FlowMatchHeunODEScheduler)],
)
def test_old_pipelines_of_second_order_name_their_scheduler(make_pipeline, tmp_path, diffusion_form, successor):
    make_pipeline(scheduler=FlowMatchSDEScheduler(diffusion_form=diffusion_form), in_channels=3).save_pretrained(
        tmp_path
    )
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "solver_order": 2}))
    with pytest.raises(ValueError, match=f"`solver_order` .* is {successor.__name__} now") as error:
        DiffusionPipeline.from_pretrained(tmp_path)
    (advice,) = re.findall(r"`scheduler=(.+)`", str(error.value))
    scheduler = eval(advice, {successor.__name__: successor, "pipeline": tmp_path})
    pipe = DiffusionPipeline.from_pretrained(tmp_path, scheduler=scheduler)
    assert type(pipe.scheduler) is successor and len(pipe(1, num_inference_steps=2).images) == 1
    pipe.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path).scheduler) is successor


def test_loaded_pipeline_keeps_names_path_and_settings(make_pipeline, tmp_path):
    make_pipeline(scheduler=FlowMatchSDEScheduler(path_type="cosine", last_step="tweedie")).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe) is LSEPPipeline
    assert pipe.config.path_type == "cosine" and pipe.scheduler.config.last_step == "tweedie"
    assert pipe.get_label_ids("three") == [3] and pipe.config.id2label[3] == "digit 3, three"
    swapped = DiffusionPipeline.from_pretrained(tmp_path, scheduler=FlowMatchSDEScheduler())
    with pytest.raises(ValueError, match="`path_type='linear'`, but .* path 'cosine'"):
        swapped(1)


def test_model_offload_and_from_pipe(make_pipeline):
    pipe = make_pipeline(vae=True)
    expected = pipe(1, num_inference_steps=2, generator=generators(0), output_type="pt").images
    again = LSEPPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(1, num_inference_steps=2, generator=generators(0), output_type="pt").images, expected)


# --- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 11}, r"`class_labels` has to lie in 0\.\.9, but holds 11"),
        ({"class_labels": "10"}, r"`class_labels` has to lie in 0\.\.9, but holds 10\. The names are \['digit 0'"),
        ({"class_labels": "-1"}, r"`class_labels` has to lie in 0\.\.9, but holds -1"),
        ({"class_labels": "\u00b2"}, "`class_labels`: there is no class '\u00b2'"),
        ({"class_labels": [3, -1]}, r"`class_labels` has to lie in 0\.\.9, but holds -1"),
        ({"class_labels": []}, "`class_labels` has to hold at least one class, but is empty"),
        ({"class_labels": [1.5]}, "`class_labels` has to be a class id, .* but holds 1.5 of type float"),
        ({"class_labels": True}, "`class_labels` has to be a class id, .* but holds True of type bool"),
        ({"class_labels": "thre"}, r"there is no class 'thre'\. Close names are \['three'"),
        ({"class_labels": "xyzzyx"}, r"there is no class 'xyzzyx'\. The names are \['digit 0'"),
        (
            {"class_labels": "crane"},
            r"'crane' is the name of several classes: 8 \(digit 8, crane\), 9 \(digit 9, crane",
        ),
        ({"num_inference_steps": 0}, "`num_inference_steps` has to be at least 1, but is 0"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` has to be a finite number, but is nan"),
        ({"guidance_interval": (0.7, 0.2)}, r"`guidance_interval` has to be .* but is \(0.7, 0.2\)"),
        ({"guidance_interval": (-0.1, 0.2)}, r"`guidance_interval` has to be .* but is \(-0.1, 0.2\)"),
        ({"guidance_interval": (0.1, 1.2)}, r"`guidance_interval` has to be .* but is \(0.1, 1.2\)"),
        ({"guidance_interval": (0.1,)}, r"`guidance_interval` has to be .* but is \(0.1,\)"),
        ({"latents": torch.zeros(1, 4, 9, 9)}, r"`latents` has to be of shape \[1, 4, 8, 8\], but .* \[1, 4, 9, 9\]"),
        ({"generator": generators(0, 1)}, "`generator` .* one for each of the 1 images, but is a list of 2"),
        ({"output_type": "jpg"}, "`output_type` has to be one of .*, but is 'jpg'"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise"]},
            r"has to be a part of \['latents', .*\], but has \['noise'\]",
        ),
        ({"sigmas": [0.2, 0.9], "output_type": "latent"}, "`sigmas` have to decrease"),
        ({"num_images_per_label": 0}, "`num_images_per_label` has to be at least 1, but is 0"),
        ({"num_images_per_label": 2, "generator": generators(0)}, "one for each of the 2 images, but is a list of 1"),
        ({"negative_class_labels": 10**5000}, r"`negative_class_labels` has to lie in 0\.\.9, but holds of type int"),
        ({"negative_class_labels": 11}, r"`negative_class_labels` has to lie in 0\.\.9, but holds 11"),
        (
            {"negative_class_labels": [1, 2]},
            "`negative_class_labels` has to be one class, or .* the 1 .*, but holds 2",
        ),
        ({"negative_class_labels": "thre"}, r"`negative_class_labels`: there is no class 'thre'"),
        ({"guider": "cfg"}, "`guider` has to be a guider of diffusers, but is 'cfg'"),
        (
            {"guider": ClassifierFreeGuidance(2.0), "guidance_scale": 3.0},
            "`guidance_scale` has to be left at 1.0 with",
        ),
        ({"guider": LTX2Guidance()}, "`guider` has to combine .* LTX2Guidance needs .*'pred_cond_modality'"),
        ({"guider": SmoothedEnergyGuidance(seg_guidance_layers=[0])}, "`guider` .* SmoothedEnergyGuidance needs"),
        # Of the wrong type
        ({"num_images_per_label": 1.5}, "`num_images_per_label` has to be an integer, but is 1.5"),
        ({"num_images_per_label": "2"}, "`num_images_per_label` has to be an integer, but is '2'"),
        ({"num_inference_steps": "2"}, "`num_inference_steps` has to be an integer, but is '2'"),
        ({"guidance_scale": None}, "`guidance_scale` has to be a finite number, but is None"),
        ({"guidance_interval": 0.5}, r"`guidance_interval` has to be \(low, high\) .* but is 0.5"),
        ({"guidance_interval": ("a", "b")}, r"`guidance_interval` has to be \(low, high\) .* but is \('a', 'b'\)"),
        ({"internal_guidance_scale": "2"}, "`internal_guidance_scale` has to be a finite number, but is '2'"),
        ({"attention_kwargs": 0.5}, "`attention_kwargs` has to be a dictionary, but is of type float"),
        ({"callback_on_step_end": "print"}, "`callback_on_step_end` has to be a function, but is of type str"),
        (
            {"callback_on_step_end_tensor_inputs": "latents"},
            "`callback_on_step_end_tensor_inputs` .* list, .* type str",
        ),
        ({"generator": 0}, "`generator` has to be a `torch.Generator`, or a list of them, but is of type int"),
        ({"generator": [0]}, "`generator` has to be a `torch.Generator`, or a list of them, but is of type int"),
        ({"latents": np.zeros((1, 4, 8, 8))}, "`latents` has to be a tensor, but is of type ndarray"),
        ({"sigmas": "all", "output_type": "latent"}, "`sigmas` has to be a list of at least one number, but is 'all'"),
    ],
)
def test_wrong_input_is_refused_before_any_work(make_pipeline, arguments, message):
    pipe = make_pipeline()
    pipe.transformer.forward = None  # any work would fail
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": 1, **arguments})


def test_sigmas_for_schedulers_of_diffusers_have_to_be_a_list(make_pipeline):
    pipe = make_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    for sigmas in (float("nan"), "all", [[1.0, 0.5]]):
        with pytest.raises(ValueError, match="`sigmas` has to be a list of at least one number, but is"):
            pipe(1, sigmas=sigmas, output_type="latent")


@pytest.mark.parametrize("scheduler_class", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler])
def test_sigmas_for_schedulers_of_diffusers_are_checked(make_pipeline, scheduler_class):
    """As for the package's own: with or without the last 0."""
    pipe = make_pipeline()
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    pipe.scheduler = scheduler_class.from_config(
        pipe.scheduler.config, **(flow if scheduler_class is UniPCMultistepScheduler else {})
    )
    latents = [
        pipe(1, sigmas=sigmas, generator=torch.manual_seed(0), output_type="latent").images
        for sigmas in ([1.0, 0.5, 0.25], [1.0, 0.5, 0.25, 0.0])
    ]
    assert torch.equal(*latents) and latents[0].isfinite().all()
    for sigmas in ([], [0.0]):
        with pytest.raises(ValueError, match="`sigmas` ha"):
            pipe(1, sigmas=sigmas, output_type="latent")
    for sigmas in (
        [0.5, 1.0],
        [1.0, 0.5, 0.5],
        [1.0, float("nan"), 0.2],
        [2.0, 1.0],
        [1.0, 0.5, 0.0, 0.0],
        [1.0, -0.5],
    ):
        with pytest.raises(ValueError, match=r"`sigmas` have to decrease and to lie in \(0, 1\], but are"):
            pipe(1, sigmas=sigmas, output_type="latent")


def test_uploading_into_a_subfolder_is_refused(make_pipeline, tmp_path):
    with pytest.raises(ValueError, match="`subfolder` has to be None, since .* but is 'a'"):
        make_pipeline().push_to_hub("lsep/x", subfolder="a")
    with pytest.raises(ValueError, match="`subfolder` is none of the arguments for uploading, which are commit_mes"):
        make_pipeline().save_pretrained(tmp_path / "new", push_to_hub=True, subfolder="a")
    assert not (tmp_path / "new").exists()


def test_names_need_an_id2label(tiny_transformer):
    with pytest.raises(ValueError, match="The pipeline has no names of classes"):
        LSEPPipeline(tiny_transformer(), FlowMatchSDEScheduler())("three")


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (
            FlowMatchHeunDiscreteScheduler(),
            {"sigmas": [1.0, 0.5]},
            "`sigmas` cannot be used with FlowMatchHeunDiscrete",
        ),
        (
            DPMSolverMultistepScheduler(**FLOW),
            {"sigmas": [1.0, 0.5]},
            "`sigmas` cannot be used with DPMSolverMultistep",
        ),
        (DDIMScheduler(), {}, "`scheduler` has to be a flow-matching scheduler, but DDIMScheduler has"),
        (
            DPMSolverMultistepScheduler(use_flow_sigmas=True),
            {},
            "`scheduler` has to take a velocity, .* but DPMSolverMultistepScheduler has `prediction_type='epsilon'`",
        ),
        (FlowMatchSDEScheduler(path_type="cosine"), {}, "`scheduler` has `path_type='cosine'`, but .* path 'linear'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ConfigMixin) else None,
)
def test_schedulers_that_do_not_fit_are_refused(make_pipeline, scheduler, arguments, message):
    pipe = make_pipeline()
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipe(1, **arguments)


def test_names_have_to_be_a_dictionary(make_pipeline):
    with pytest.raises(ValueError, match="`id2label` has to be a dict of names by class ids, but is of type list"):
        make_pipeline(id2label=["ant", "bee"])


def test_a_callback_that_returns_something_else(make_pipeline):
    message = "`callback_on_step_end` has to be a function that returns a dict or None, but is of type int"
    with pytest.raises(ValueError, match=message):
        make_pipeline()(1, num_inference_steps=2, output_type="latent", callback_on_step_end=lambda *_: 3)


def test_unknown_path_is_refused(make_pipeline):
    with pytest.raises(ValueError, match="`path_type` has to be one of .*, but is 'vp'"):
        make_pipeline(path_type="vp")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_latents_of_a_callback_become_float32(ode_pipeline, dtype):
    def change(pipe, i, timestep, tensors):
        return {"latents": tensors["latents"].to(dtype)} if i == 0 else None

    assert run(ode_pipeline, 1, callback_on_step_end=change)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"latents": None}, "`latents` has to be a tensor"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, "`latents` has to be of shape"),
        ({"class_labels": torch.tensor([0.5])}, "`class_labels` has to be a tensor of integers"),
        (torch.zeros(2), "`callback_on_step_end` has to be a function that returns a dict or None"),
    ],
)
def test_what_a_callback_may_not_return(ode_pipeline, returned, message):
    with pytest.raises(ValueError, match=message):
        run(ode_pipeline, 1, callback_on_step_end=lambda *arguments: returned)


def test_a_transformer_that_predicts_other_channels_is_refused(make_pipeline):
    pipe = make_pipeline(num_layers=1, out_channels=8)
    with pytest.raises(ValueError, match="`in_channels=4` and `out_channels=8`"):
        pipe(0, num_inference_steps=1, output_type="latent")
