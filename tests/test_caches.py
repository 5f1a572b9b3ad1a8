# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""diffusers' caches and the other hooks of its transformers, on ours."""

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_layer_skip,
)
from diffusers.hooks.layer_skip import _LAYER_SKIP_HOOK
from diffusers.utils import logging
from tiny_models import make_batch, make_pipeline, make_transformer

from diffusers_lsep import FlowMatchHeunODEScheduler, FlowMatchSDEScheduler, LSEPObjective


STEPS = 12

# Of every cache: settings with which it leaves something out, and those with which it never does.
ACTIVE = {
    "FirstBlockCache": {"threshold": 0.3},
    "TaylorSeer": {"cache_interval": 2, "disable_cache_before_step": 1},
    "TaylorSeer lite": {"cache_interval": 2, "disable_cache_before_step": 1, "use_lite_mode": True},
    "MagCache": {"threshold": 0.3},
    "PyramidAttentionBroadcast": {"spatial_attention_block_skip_range": 2},
    "SeaCache": {"threshold": 0.5},
    "FasterCache": {"spatial_attention_block_skip_range": 2},
}
IDLE = {
    "FirstBlockCache": {"threshold": 0.0},
    "TaylorSeer": {"cache_interval": 1},
    "TaylorSeer lite": {"cache_interval": 1, "use_lite_mode": True},
    "MagCache": {"threshold": 0.0},
    "PyramidAttentionBroadcast": {"spatial_attention_block_skip_range": 1},
    "SeaCache": {"threshold": 0.0},
    "FasterCache": {"spatial_attention_block_skip_range": 1, "unconditional_batch_skip_range": 1},
}
INTERVALS = {"everywhere": (0.0, 1.0), "early": (0.5, 1.0), "late": (0.0, 0.5), "in the middle": (0.3, 0.7)}


@pytest.fixture(autouse=True)
def quiet():
    """FasterCache and SeaCache say on every use that they are experimental, or where they compute everything."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture
def pipe():
    pipe = make_pipeline(FlowMatchSDEScheduler(diffusion_form="none"), num_layers=4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_config(pipe, name, **settings):
    timestep = {"current_timestep_callback": lambda: pipe.current_timestep}
    classes = {
        "FirstBlockCache": (FirstBlockCacheConfig, {}),
        "TaylorSeer": (TaylorSeerCacheConfig, {"taylor_factors_dtype": torch.float32}),
        "TaylorSeer lite": (TaylorSeerCacheConfig, {"taylor_factors_dtype": torch.float32}),
        "MagCache": (MagCacheConfig, {"num_inference_steps": STEPS, "mag_ratios": [0.99] * STEPS}),
        "PyramidAttentionBroadcast": (PyramidAttentionBroadcastConfig, timestep),
        "SeaCache": (SeaCacheConfig, {}),
        "FasterCache": (FasterCacheConfig, timestep),
    }
    config_class, defaults = classes[name]
    return config_class(**defaults, **settings)


def draw(pipe, classes=(1, 2, 5), guidance_scale=2.0, interval="everywhere", steps=STEPS):
    call = {"guidance_scale": guidance_scale, "guidance_interval": INTERVALS[interval]}
    generator = torch.Generator().manual_seed(0)
    return pipe(list(classes), num_inference_steps=steps, **call, generator=generator, output_type="latent").images


@pytest.mark.parametrize("name", ACTIVE)
def test_cache_that_leaves_nothing_out_gives_the_same_images(pipe, name):
    for interval in INTERVALS:
        expected = draw(pipe, interval=interval)
        pipe.transformer.enable_cache(make_config(pipe, name, **IDLE[name]))
        assert torch.equal(draw(pipe, interval=interval), expected), interval
        pipe.transformer.disable_cache()


def test_mag_cache_leaves_nothing_out_at_threshold_0_whatever_its_ratios_are(pipe):
    expected = draw(pipe)
    pipe.transformer.enable_cache(MagCacheConfig(threshold=0.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS))
    assert torch.equal(draw(pipe), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVE)
def test_cache_changes_images_a_little_and_disabling_it_restores_them(pipe, name):
    """With guidance at all times, at some, and at none; every call starts anew."""
    for interval, guidance_scale in [*((interval, 2.0) for interval in INTERVALS), ("everywhere", 1.0)]:
        expected = draw(pipe, interval=interval, guidance_scale=guidance_scale)
        pipe.transformer.enable_cache(make_config(pipe, name, **ACTIVE[name]))
        images = [draw(pipe, interval=interval, guidance_scale=guidance_scale) for _ in range(2)]
        assert torch.equal(*images), interval
        assert 1e-5 < (images[0] - expected).norm() / expected.norm() < 0.2, interval
        pipe.transformer.disable_cache()
        assert torch.equal(draw(pipe, interval=interval, guidance_scale=guidance_scale), expected), interval


@pytest.mark.parametrize("interval", INTERVALS)
def test_a_cache_that_is_applied_by_its_function_after_a_call(pipe, interval):
    expected = draw(pipe, interval=interval)
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.3))
    images = draw(pipe, interval=interval)
    assert 1e-5 < (images - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize("name", ACTIVE)
def test_cache_survives_an_interrupted_call(pipe, name):
    pipe.transformer.enable_cache(make_config(pipe, name, **ACTIVE[name]))
    expected = draw(pipe)

    def interrupt(pipe, i, timestep, tensors):
        if i == 5:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        pipe([3], STEPS, guidance_scale=2.0, output_type="latent", callback_on_step_end=interrupt)
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("name", ACTIVE)
def test_cache_works_with_heun_and_on_the_cosine_path(name):
    pipe = make_pipeline(FlowMatchHeunODEScheduler(path_type="cosine"), num_layers=4)
    pipe.set_progress_bar_config(disable=True)
    expected = draw(pipe, interval="in the middle")
    pipe.transformer.enable_cache(make_config(pipe, name, **ACTIVE[name]))
    images = draw(pipe, interval="in the middle")
    assert 1e-5 < (images - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize("name", ["FirstBlockCache", "SeaCache", "MagCache"])
def test_cache_leaves_out_whole_blocks(pipe, name):
    calls = []
    handle = pipe.transformer.transformer_blocks[2].ff.register_forward_hook(lambda *_: calls.append(1))
    draw(pipe)
    assert len(calls) == STEPS
    pipe.transformer.enable_cache(make_config(pipe, name, **ACTIVE[name]))
    draw(pipe)
    assert 0 < len(calls) - STEPS < STEPS
    handle.remove()


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_faster_cache_saves_the_null_class(pipe, guidance_scale):
    """What it leaves out with guidance is the null class, not the one asked for."""
    rows = []
    handle = pipe.transformer.class_embedding.register_forward_hook(
        lambda _, inputs, __: rows.append(inputs[0].tolist())
    )
    pipe.transformer.enable_cache(make_config(pipe, "FasterCache", **ACTIVE["FasterCache"]))
    draw(pipe, classes=[1, 2], guidance_scale=guidance_scale)
    handle.remove()
    kinds = [row for i, row in enumerate(rows) if row not in rows[:i]]
    assert kinds == ([[10, 10, 1, 2], [1, 2]] if guidance_scale > 1 else [[1, 2]])


def test_kinds_of_calls_have_caches_of_their_own(tiny_transformer):
    """Predictions that alternate, as a guider's do: each is the same as alone."""
    model, batch = tiny_transformer(num_layers=4), make_batch()
    timestep = {"current_timestep_callback": lambda: 500}

    def predict(kinds, step):
        outputs = {}
        for kind, label in kinds.items():
            with model.cache_context(kind), torch.no_grad():
                x = batch["latents"] + 0.01 * step
                outputs[kind] = model(x, 0.5, torch.full((6,), label), return_dict=False)[0]
        return outputs

    for config_class, settings in (
        (FirstBlockCacheConfig, {"threshold": 0.5}),
        (PyramidAttentionBroadcastConfig, timestep),
        (FasterCacheConfig, {**timestep, "is_guidance_distilled": True}),
    ):
        results = []
        for kinds in ({"pred_cond": 1, "pred_uncond": 10}, {"pred_cond": 1}, {"pred_uncond": 10}):
            model.enable_cache(config_class(**settings))
            results.append([predict(kinds, step) for step in range(4)])
            model.disable_cache()
        for step, outputs in enumerate(results[0]):
            assert torch.equal(outputs["pred_cond"], results[1][step]["pred_cond"]), config_class
            assert torch.equal(outputs["pred_uncond"], results[2][step]["pred_uncond"]), config_class


@pytest.mark.parametrize("name", ["PyramidAttentionBroadcast", "FasterCache"])
def test_callbacks_can_look_at_the_state(pipe, name):
    """Which these two keep in their hooks, as people who watch them expect."""
    pipe.transformer.enable_cache(make_config(pipe, name, **ACTIVE[name]))
    hooks = list(pipe.transformer.transformer_blocks[0].attn._diffusers_hook.hooks.values())
    iterations = []

    def look(pipe, i, timestep, tensors):
        iterations.append(hooks[0].state.iteration)
        return {}

    pipe([3], STEPS, guidance_scale=2.0, output_type="latent", callback_on_step_end=look)
    assert iterations == list(range(1, STEPS + 1))
    assert hooks[0].state.iteration == 0 and hooks[0].state.cache is None


@pytest.mark.parametrize("name", ACTIVE)
def test_calls_outside_of_any_context_are_of_one_kind(pipe, name):
    """One's own loop with both halves of guidance in each batch, the null class first."""
    model, batch, classes = pipe.transformer, make_batch(), []
    arguments = {"timestep": torch.full((6,), 0.5), "class_labels": torch.tensor([10, 10, 10, 1, 2, 3])}
    pipe._current_timestep = 500
    x = batch["latents"][:3].repeat(2, 1, 1, 1)
    with torch.no_grad():
        expected = model(hidden_states=x * 1.1, **arguments).sample
        model.enable_cache(make_config(pipe, name, **ACTIVE[name]))
        handle = model.class_embedding.register_forward_hook(lambda _, inputs, __: classes.append(inputs[0].tolist()))
        outputs = [model(hidden_states=x * scale, **arguments).sample for scale in (1.0, 1.05, 1.1)]
        handle.remove()
    assert outputs[-1].shape == expected.shape and (outputs[-1] - expected).norm() / expected.norm() < 0.5
    assert ([1, 2, 3] in classes) == (name == "FasterCache"), "it leaves out the null class"


@pytest.mark.slow
def test_compiled_blocks_have_caches_too(pipe):
    expected = draw(pipe, interval="in the middle")
    pipe.transformer.enable_cache(make_config(pipe, "FirstBlockCache", **ACTIVE["FirstBlockCache"]))
    cached = draw(pipe, interval="in the middle")
    pipe.transformer.compile_repeated_blocks(backend="aot_eager")
    torch.testing.assert_close(draw(pipe, interval="in the middle"), cached)
    pipe.transformer.disable_cache()
    torch.testing.assert_close(draw(pipe, interval="in the middle"), expected)


def test_config_of_the_user_stays_as_it_is(pipe):
    for name in ("SeaCache", "FasterCache"):
        config = make_config(pipe, name)
        before = vars(config).copy()
        pipe.transformer.enable_cache(config)
        pipe.transformer.disable_cache()
        assert vars(config) == before


def test_training_and_probing_with_a_cache_are_refused(tiny_transformer):
    model, batch = tiny_transformer(num_layers=4), make_batch()
    model.enable_cache(FirstBlockCacheConfig())
    refusal = r"`apply_blocks`.* has to run every block, but FirstBlockCacheConfig .*disable_cache\(\)"
    with pytest.raises(ValueError, match=refusal):
        model.hidden_states_at(batch["latents"], 0.5, batch["class_labels"], 2)
    with pytest.raises(ValueError, match=refusal):
        LSEPObjective(model, probe=None)(batch["latents"], batch["class_labels"], batch["noise"], batch["timesteps"])
    model.disable_cache()
    assert model.hidden_states_at(batch["latents"], 0.5, batch["class_labels"], 2).shape == (6, 16, 32)


def test_first_block_cache_on_a_single_block_is_refused(tiny_transformer):
    model = tiny_transformer(num_layers=1)
    with pytest.raises(ValueError, match="`config` has to be of another cache than FirstBlockCache.* has 1"):
        model.enable_cache(FirstBlockCacheConfig())
    assert not model.is_cache_enabled
    model.enable_cache(TaylorSeerCacheConfig())


# Skipped layers and perturbed attention


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"skip_ff": False},
        {"skip_attention": False},
        {"skip_attention": False, "skip_ff": False, "skip_attention_scores": True},
        {"dropout": 0.5},
    ],
    ids=["block", "attention", "feed-forward", "attention scores", "dropout"],
)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_skipped_layers_change_the_output_and_come_back(settings, qk_norm):
    model, batch = make_transformer(num_layers=4, qk_norm=qk_norm), make_batch()

    @torch.no_grad()
    def predict():
        return model(batch["latents"], batch["timesteps"], batch["class_labels"]).sample

    expected = predict()
    apply_layer_skip(model, LayerSkipConfig(indices=[1, 2], **settings))
    output = predict()
    assert output.isfinite().all() and not torch.allclose(output, expected, rtol=1e-3, atol=1e-3)
    HookRegistry.check_if_exists_or_initialize(model).remove_hook(_LAYER_SKIP_HOOK, recurse=True)
    assert torch.equal(predict(), expected)


def test_skipped_blocks_are_as_if_they_were_not_there():
    model, batch = make_transformer(num_layers=3), make_batch()
    apply_layer_skip(model, LayerSkipConfig(indices=[1]))
    with torch.no_grad():
        output = model(batch["latents"], batch["timesteps"], batch["class_labels"]).sample
    HookRegistry.check_if_exists_or_initialize(model).remove_hook(_LAYER_SKIP_HOOK, recurse=True)
    del model.transformer_blocks[1]
    with torch.no_grad():
        assert torch.equal(model(batch["latents"], batch["timesteps"], batch["class_labels"]).sample, output)


def test_perturbed_attention_takes_the_values(tiny_transformer):
    """Without scores, every token attends to itself: what single tokens give."""
    block = tiny_transformer().transformer_blocks[0]
    tokens = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = torch.cat([block.attn(token) for token in tokens.split(1, dim=1)], dim=1)
        model = torch.nn.Module()
        model.transformer_blocks = torch.nn.ModuleList([block])
        config = LayerSkipConfig(indices=[0], skip_attention=False, skip_ff=False, skip_attention_scores=True)
        apply_layer_skip(model, config)
        torch.testing.assert_close(block.attn(tokens), alone)
