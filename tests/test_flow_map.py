# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Flow maps: the transformer's second time, the sampler, and where both meet in the pipeline."""

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from gaussian_flow import MEAN, STD, GaussianFlow
from tiny_models import make_pipeline, make_transformer

from diffusers_lsep import (
    FlowMapScheduler,
    FlowMatchHeunODEScheduler,
    FlowMatchSDEScheduler,
    LSEPPipeline,
    SiTTransformer2DModel,
)


def make_inputs(batch_size=3):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "timestep": torch.linspace(0.4, 1, batch_size),
        "class_labels": torch.arange(batch_size),
    }


# --- the transformer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_second_time_that_equals_the_first_is_the_model_without_it(tmp_path, depth):
    model, inputs = make_transformer(num_layers=4, qk_norm=True), make_inputs()
    model.save_pretrained(tmp_path)
    flow_map = SiTTransformer2DModel.from_pretrained(tmp_path, flow_map_depth=depth)
    assert flow_map.state_dict().keys() == model.state_dict().keys()
    expected = model(**inputs).sample
    assert torch.equal(flow_map(**inputs).sample, expected)
    assert torch.equal(flow_map(**inputs, r_timestep=inputs["timestep"]).sample, expected)
    inputs["timestep"] = 0.5
    assert torch.equal(flow_map(**inputs, r_timestep=0.5).sample, model(**inputs).sample)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_blocks_from_the_depth_on_and_the_output_see_the_second_time(depth):
    """Where the first blocks know no time the model is that of the second time alone, and the other way round."""
    model, inputs = make_transformer(num_layers=4, flow_map_depth=depth), make_inputs()
    r = inputs["timestep"] * 0.3
    assert not torch.equal(model(**inputs, r_timestep=r).sample, model(**inputs).sample)

    def without_time(blocks):
        for block in blocks:
            block.norm1.linear.weight.data.zero_()
            block.norm1.linear.bias.data.zero_()

    early, late = (make_transformer(num_layers=4, flow_map_depth=depth) for _ in range(2))
    without_time(early.transformer_blocks[:depth])
    assert torch.equal(early(**inputs, r_timestep=r).sample, early(**inputs | {"timestep": r}).sample)
    without_time(late.transformer_blocks[depth:])
    late.norm_out.linear.weight.data.zero_()
    assert torch.equal(late(**inputs, r_timestep=r).sample, late(**inputs).sample)


def test_a_second_time_with_gradient_checkpointing():
    model, inputs = make_transformer(num_layers=3, flow_map_depth=2), make_inputs()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**inputs, r_timestep=0.1).sample.square().mean().backward()
        gradients.append(model.time_embedding.linear_1.weight.grad.clone())
        model.enable_gradient_checkpointing()
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"flow_map_depth": 0}, "`flow_map_depth` has to be None or lie in 1..1, but is 0"),
        ({"flow_map_depth": 2}, "`flow_map_depth` has to be None or lie in 1..1, but is 2"),
        ({"flow_map_depth": "1"}, "`flow_map_depth` has to be None or lie in 1..1, but is '1'"),
        (
            {"flow_map_depth": 1, "internal_guidance_depth": 1},
            "`flow_map_depth` has to be None with an `internal_guidance_depth`, but is 1",
        ),
    ],
)
def test_impossible_depths_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_transformer(**config)


def test_a_second_time_without_a_depth_is_refused():
    with pytest.raises(ValueError, match="`r_timestep` has to be None for a model without `flow_map_depth`"):
        make_transformer()(**make_inputs(), r_timestep=0.1)


# --- the sampler, with the exact flow map -------------------------------------------------------------------------


def make_gaussian(scheduler, path_type="linear", **config):
    flow = GaussianFlow(path_type=path_type, flow_map_depth=1, **config)
    pipe = LSEPPipeline(flow, scheduler, path_type=path_type)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_exact_flow_map_has_no_error_at_any_number_of_steps(path_type, steps):
    pipe = make_gaussian(FlowMapScheduler(path_type=path_type), path_type)
    noise = torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    images = pipe(0, steps, latents=noise, output_type="latent").images
    torch.testing.assert_close(images, pipe.transformer.move(noise, 1.0, 0.0), atol=2e-6, rtol=0)
    assert pipe.transformer.times == pytest.approx(torch.linspace(1, 0, steps + 1)[:-1].tolist())
    assert pipe.transformer.r_times == pytest.approx(torch.linspace(1, 0, steps + 1)[1:].tolist())


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("renoising", [0.3, 1.0])
def test_renoising_keeps_the_distribution(path_type, renoising):
    """32,768 values: the standard error of their standard deviation is 0.0008, that of their mean 0.0011."""
    pipe = make_gaussian(FlowMapScheduler(path_type=path_type, renoising=renoising), path_type)
    images = pipe(0, 4, generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert images.std().item() == pytest.approx(STD, abs=0.003)
    assert images.mean().item() == pytest.approx(MEAN, abs=0.005)
    expected = [(1 - renoising) * t for t in (0.75, 0.5, 0.25, 0)]
    assert pipe.transformer.r_times == pytest.approx(expected)


def test_renoising_at_the_data_is_the_consistency_sampler_of_diffusers_model():
    """`x_0` is predicted and noised to the next time, with noise that is given."""
    scheduler, flow = FlowMapScheduler(renoising=1.0), GaussianFlow()
    scheduler.set_timesteps(2)
    sample, noise = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    velocity = (sample - flow.move(sample, 1.0, 0.0)) / 1.0
    found = scheduler.step(velocity, scheduler.timesteps[0], sample, variance_noise=noise).prev_sample
    torch.testing.assert_close(found, 0.5 * flow.move(sample, 1.0, 0.0) + 0.5 * noise)


def test_steps_of_velocities_have_the_error_of_eulers_method():
    """The same model without its second time: of first order, where the flow map is exact."""
    noise = torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (64, 128):
        pipe = make_gaussian(FlowMatchEulerDiscreteScheduler())
        images = pipe(0, steps, latents=noise, output_type="latent").images
        assert pipe.transformer.r_times == []
        errors.append((images - pipe.transformer.move(noise, 1.0, 0.0)).abs().max().item())
    assert errors[0] > 1e-3 and errors[0] / errors[1] == pytest.approx(2, rel=0.1)


# --- the pipeline -------------------------------------------------------------------------------------------------


def draw(pipe, steps=3, **arguments):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", **arguments}
    return pipe([1, 5], steps, **arguments).images


def test_swapped_saved_and_loaded(tmp_path):
    pipe = make_pipeline(flow_map_depth=1)
    pipe.scheduler = FlowMapScheduler.from_config(pipe.scheduler.config, renoising=0.5)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is FlowMapScheduler and loaded.scheduler.config.renoising == 0.5
    assert torch.equal(draw(loaded), draw(pipe))
    loaded.scheduler = FlowMapScheduler.from_config(FlowMatchSDEScheduler.from_config(loaded.scheduler.config).config)
    assert loaded.scheduler.config.renoising == 0.5, "kept while another scheduler is in its place"


def test_the_flow_map_scheduler_of_diffusers_gives_the_same_images():
    pipe = make_pipeline(FlowMapScheduler(), flow_map_depth=1)
    expected = draw(pipe)
    pipe.scheduler = FlowMapEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(draw(pipe), expected)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchSDEScheduler(),
        FlowMatchHeunODEScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_with_another_scheduler_a_flow_map_is_a_flow(scheduler):
    assert torch.equal(draw(make_pipeline(scheduler, flow_map_depth=1)), draw(make_pipeline(scheduler)))


def test_guidance_has_the_second_time_on_both_sides():
    """A scale, and the guider of the same formula."""
    pipe = make_pipeline(FlowMapScheduler(), flow_map_depth=1)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids, times = torch.tensor([1, 5]), {"timestep": torch.ones(2), "r_timestep": torch.zeros(2)}
    with torch.no_grad():
        one, other = (pipe.transformer(noise, class_labels=labels, **times).sample for labels in (ids, ids * 0 + 10))
    expected = noise - (other + 2 * (one - other))
    torch.testing.assert_close(draw(pipe, 1, latents=noise, guidance_scale=2.0), expected, atol=1e-5, rtol=1e-5)
    guided = draw(pipe, 1, latents=noise, guider=ClassifierFreeGuidance(guidance_scale=2.0))
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)


def test_a_cache_leaves_blocks_out_of_a_flow_map_too():
    pipe = make_pipeline(FlowMapScheduler(), num_layers=4, flow_map_depth=2)
    expected = draw(pipe, 8)
    for threshold, is_equal in ((0.0, True), (0.3, False)):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        assert torch.equal(draw(pipe, 8), expected) == is_equal
        pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe, 8), expected)


def test_what_does_not_fit_is_refused():
    pipe = make_pipeline(FlowMapScheduler())
    with pytest.raises(ValueError, match="`scheduler` has to be one for velocities, as .* Try `FlowMatchSDEScheduler"):
        draw(pipe)
    with pytest.raises(ValueError, match="`renoising` has to lie in .0, 1., but is 1.5"):
        FlowMapScheduler(renoising=1.5)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_the_preview_is_where_the_step_would_lead(path_type):
    pipe = make_pipeline(FlowMapScheduler(path_type=path_type), path_type=path_type, num_layers=2, flow_map_depth=1)
    seen = []

    def keep(pipe, i, timestep, tensors):
        seen.append(tensors["pred_original_sample"])

    names = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["pred_original_sample"]}
    found = pipe(0, num_inference_steps=1, output_type="latent", **names).images
    torch.testing.assert_close(seen[0], found, rtol=1e-5, atol=1e-5)
