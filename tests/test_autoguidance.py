# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Guidance by a second, weaker model (EDM2's autoguidance)."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, DiffusionPipeline
from PIL import Image
from tiny_models import make_pipeline, make_transformer

from diffusers_lsep import FlowMatchSDEScheduler, LSEPPipeline
from diffusers_lsep.hub.remote_code import add_code


def make_guided(seed=0, **config) -> LSEPPipeline:
    pipe = make_pipeline(seed=seed, in_channels=1, **config)
    pipe.register_modules(guidance_transformer=make_transformer(seed=7, num_layers=1, in_channels=1))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_formula():
    """`v_weak + w (v - v_weak)` for the same class; the direction of classifier-free guidance is added to it."""
    pipe = make_guided()
    x, classes = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 5, 9])
    with torch.no_grad():
        time, null = torch.full((3,), 0.4), torch.full((3,), 10)
        v, weak = (m(x, time, classes).sample for m in (pipe.transformer, pipe.guidance_transformer))
        uncond = pipe.transformer(x, time, null).sample
        found = pipe.predict_velocity(x, 0.4, classes, autoguidance_scale=2.5)
        torch.testing.assert_close(found, weak + 2.5 * (v - weak), rtol=1e-4, atol=1e-4)
        found = pipe.predict_velocity(x, 0.4, classes, guidance_scale=1.5, autoguidance_scale=2.5)
        torch.testing.assert_close(found, v + 0.5 * (v - uncond) + 1.5 * (v - weak), rtol=1e-4, atol=1e-4)
        assert torch.equal(pipe.predict_velocity(x, 0.4, classes), v)


def test_in_the_interval_and_at_no_other_time():
    pipe, times = make_guided(), []
    forward = pipe.guidance_transformer.forward

    def note(hidden_states, timestep, class_labels, **options):
        times.append((float(timestep[0]), class_labels.tolist()))
        return forward(hidden_states, timestep=timestep, class_labels=class_labels, **options)

    pipe.guidance_transformer.forward = note
    call = {"num_inference_steps": 4, "output_type": "np"}

    def draw(**arguments):
        return pipe([3, 4], generator=torch.Generator().manual_seed(0), **call, **arguments).images

    plain = draw()
    assert not times
    pipe.scheduler = FlowMatchSDEScheduler(diffusion_form="none")  # t = 1, 0.75, 0.5, 0.25
    plain, guided = draw(), draw(autoguidance_scale=2.0, guidance_interval=(0.4, 0.8))
    assert times == [(0.75, [3, 4]), (0.5, [3, 4])] and np.abs(plain - guided).max() > 1e-3
    assert np.array_equal(plain, draw(autoguidance_scale=2.0, guidance_interval=(0.0, 0.1)))
    # A model that is as good has nothing to lead away from.
    pipe.register_modules(guidance_transformer=pipe.transformer)
    np.testing.assert_allclose(draw(autoguidance_scale=3.0), plain, atol=1e-5)

    def turn_off(pipe, step, timestep, tensors):
        pipe._autoguidance_scale = 1.0

    pipe.register_modules(guidance_transformer=make_guided().guidance_transformer)
    once = draw(autoguidance_scale=2.0, callback_on_step_end=turn_off)
    assert np.array_equal(once, draw(autoguidance_scale=2.0, guidance_interval=(0.9, 1.0)))


def test_saved_with_the_pipeline(tmp_path):
    pipe = make_guided()
    pipe.save_pretrained(tmp_path / "both")
    make_pipeline(in_channels=1).save_pretrained(tmp_path / "one")
    index = json.loads((tmp_path / "both" / "model_index.json").read_text())
    assert index["guidance_transformer"] == ["diffusers_lsep", "SiTTransformer2DModel"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "both", dtype=torch.bfloat16)
    assert loaded.guidance_transformer.config.num_layers == 1 and loaded.guidance_transformer.dtype == torch.bfloat16

    # A folder of before this component was known, and the component given
    path = tmp_path / "one" / "model_index.json"
    index = json.loads(path.read_text())
    assert index.pop("guidance_transformer") == [None, None]
    path.write_text(json.dumps(index))
    assert DiffusionPipeline.from_pretrained(tmp_path / "one").guidance_transformer is None
    given = LSEPPipeline.from_pretrained(tmp_path / "one", guidance_transformer=pipe.guidance_transformer)
    assert given.guidance_transformer is pipe.guidance_transformer

    add_code(tmp_path / "both")
    index = json.loads((tmp_path / "both" / "model_index.json").read_text())
    assert index["guidance_transformer"] == ["transformer_sit", "SiTTransformer2DModel"]
    remote = DiffusionPipeline.from_pretrained(tmp_path / "both", trust_remote_code=True)
    call = {"num_inference_steps": 2, "autoguidance_scale": 2.0, "output_type": "np"}
    images = [p(3, generator=torch.Generator().manual_seed(0), **call).images for p in (pipe, remote)]
    np.testing.assert_allclose(*images, atol=1e-5)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"in_channels": 3}, "`guidance_transformer` has to have the transformer's `in_channels`, 1, but has 3"),
        ({"sample_size": 4}, "`guidance_transformer` has to have the transformer's `sample_size`, 8, but has 4"),
        ({"num_classes": 2}, "`guidance_transformer` has to have the transformer's `num_classes`, 10, but has 2"),
        (
            {"flow_map_depth": 1},
            "predict the velocity, as the transformer does, but predicts the mean velocity",
        ),
    ],
)
def test_models_of_another_task(config, message):
    weaker = make_transformer(**{"in_channels": 1, **config})
    pipe = make_pipeline(in_channels=1)
    with pytest.raises(ValueError, match=message):
        LSEPPipeline(pipe.transformer, pipe.scheduler, guidance_transformer=weaker)
    pipe.register_modules(guidance_transformer=weaker)
    with pytest.raises(ValueError, match=message):
        pipe(1, autoguidance_scale=2.0)


def test_calls_that_are_refused():
    pipe = make_guided()
    with pytest.raises(ValueError, match="`autoguidance_scale` has to be a finite number, but is nan"):
        pipe(1, autoguidance_scale=math.nan)
    with pytest.raises(ValueError, match="`autoguidance_scale` has to be 1 with a `guider`, but is 2"):
        pipe(1, autoguidance_scale=2, guider=ClassifierFreeGuidance(guidance_scale=2.0))
    with pytest.raises(ValueError, match="has to be 1 for a pipeline without a `guidance_transformer`, but is 2"):
        make_pipeline(in_channels=1)(1, autoguidance_scale=2)


@pytest.mark.slow
def test_scripts(load_example, tmp_path, capsys):
    """What `sample.py` draws is what the pipeline draws and what the sweep measures."""
    make_pipeline(seed=7, num_layers=1, in_channels=1).save_pretrained(tmp_path / "weaker")
    make_pipeline(in_channels=1, id2label={i: f"digit {i}" for i in range(10)}).save_pretrained(tmp_path / "model")
    standard = ["--pretrained_model_name_or_path", tmp_path / "model", "--num_inference_steps", 2, "--batch_size", 4]
    standard += ["--guidance_transformer", tmp_path / "weaker"]

    def sample(name, *flags):
        load_example("sample").main([*map(str, [*standard, "--output_dir", tmp_path / name, *flags])])
        return json.loads((tmp_path / name / "samples.json").read_text())

    settings = sample("guided", "--num_images", 11, "--autoguidance_scale", 2)
    assert settings["autoguidance_scale"] == 2 and settings["guidance_transformer"] == str(tmp_path / "weaker")
    assert settings["weights"].keys() == {"transformer", "guidance_transformer"}
    settings = sample("plain", "--num_images", 11)
    assert settings["weights"].keys() == {"transformer"} and settings["guidance_transformer"] is None
    images = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("guided", "plain")]
    assert not np.array_equal(*images)

    (tmp_path / "reference").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "reference" / f"{index}.png")
    sweep = [*standard, "--reference", tmp_path / "reference", "--features", "pixels", "--num_images", 11]
    sweep += ["--guidance_scales", 1, 2, "--guidance_interval", 0, 1, "--cache_dir", tmp_path / "cache"]
    load_example("figures").main([*map(str, ["guidance-sweep", *sweep, "--output_dir", tmp_path / "sweep"])])
    results = json.loads((tmp_path / "sweep" / "guidance-sweep.json").read_text())["results"]
    assert [(r["guidance"], r["guidance_scale"]) for r in results] == [
        *(("classifier-free", 1.0), ("classifier-free", 2.0), ("autoguidance", 1.0), ("autoguidance", 2.0))
    ]
    distances = [r["frechet_distance"] for r in results]
    assert distances[0] == distances[2] and len(set(distances)) == 3
    assert "autoguidance 2 on [0, 1]: frechet distance" in capsys.readouterr().out

    cosine = make_pipeline(scheduler=FlowMatchSDEScheduler(path_type="cosine"), in_channels=1)
    cosine.save_pretrained(tmp_path / "cosine")
    with pytest.raises(ValueError, match="has to be of the pipeline's path, 'linear', but .* is of 'cosine'"):
        sample("refused", "--num_images", 2, "--guidance_transformer", tmp_path / "cosine")
    with pytest.raises(ValueError, match="`guidance_transformer` .*nothing' cannot be loaded"):
        sample("refused", "--num_images", 2, "--guidance_transformer", tmp_path / "nothing")
    make_pipeline().save_pretrained(tmp_path / "latents")
    with pytest.raises(ValueError, match="has to have the transformer's `in_channels`, 1, but has 4"):
        sample("refused", "--num_images", 2, "--guidance_transformer", tmp_path / "latents")
    assert not (tmp_path / "refused").exists()
