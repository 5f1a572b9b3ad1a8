# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`examples/figures.py`: guidance sweeps and denoising strips of tiny pipelines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from image_folders import save_images
from PIL import Image
from tiny_models import make_dinov2, make_pipeline

from diffusers_lsep import FlowMatchSDEScheduler, LSEPPipeline
from diffusers_lsep.evaluation.guidance import measure
from diffusers_lsep.evaluation.metrics import feature_statistics
from diffusers_lsep.evaluation.protocol import compute_feature_metrics
from diffusers_lsep.figures import COLOURS
from diffusers_lsep.interpolants import get_interpolant
from diffusers_lsep.sampling import DrawnSamples, set_scheduler


SCRIPT = Path(__file__).parents[1] / "examples" / "figures.py"


@pytest.fixture(scope="module")
def script(load_example):
    return load_example("figures")


@pytest.fixture
def save_pipeline(tmp_path):
    def save(vae=None, **config):
        names = {i: f"digit {i}, {i}th" for i in range(10)}
        pipe = make_pipeline(vae=vae, id2label=names, num_layers=1, patch_size=4, **config)
        pipe.save_pretrained(tmp_path / "model")

    return save


@pytest.fixture
def reference(tmp_path):
    """Grey images in a folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8)
    save_images(tmp_path / "reference", pixels)
    return pixels


@pytest.fixture
def arguments(tmp_path):
    def make(command, *more, steps=2):
        standard = ["--pretrained_model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "out"]
        if command != "denoising-strip":
            standard += ["--reference", tmp_path / "reference", "--features", "pixels", "--num_images", 11]
            standard += ["--batch_size", 4, "--cache_dir", tmp_path / "cache"]
        else:
            standard += ["--class_labels", 3, "digit 7"]
        return [*map(str, [command, *standard, "--num_inference_steps", steps, *more])]

    return make


TWO_SCALES = ("--guidance_scales", 1, 2, "--guidance_interval", 0, 1, "--guidance_interval", 0, 0.5)


def read_sweep(folder):
    return json.loads((folder / "out" / "guidance-sweep.json").read_text())


@pytest.mark.slow
def test_sweep_measures_what_sample_py_draws(
    script, load_example, save_pipeline, reference, arguments, tmp_path, capsys
):
    save_pipeline(in_channels=1)
    script.main(arguments("guidance-sweep", *TWO_SCALES, "--label_sampling", "balanced", "--seed", 3))
    printed = capsys.readouterr().out
    assert (
        "at every setting, images to draw: 11\n  class 0, 'digit 0, 0th': 2\n  class 1, 'digit 1, 1th': 1\n" in printed
    )
    sweep = read_sweep(tmp_path)
    settings = [(result["guidance_scale"], result["guidance_interval"]) for result in sweep["results"]]
    assert settings == [(1, [0, 1]), (2, [0, 1]), (1, [0, 0.5]), (2, [0, 0.5])]
    for i, result in enumerate(sweep["results"]):
        flags = ["--pretrained_model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / f"samples-{i}"]
        flags += ["--num_images", 11, "--num_inference_steps", 2, "--batch_size", 4, "--seed", 3]
        flags += ["--label_sampling", "balanced", "--guidance_scale", result["guidance_scale"]]
        flags += ["--guidance_interval", *result["guidance_interval"]]
        load_example("sample").main([*map(str, flags)])
        images = np.load(tmp_path / f"samples-{i}" / "samples.npz")["arr_0"][..., 0]
        pixels = [values.reshape(len(values), 64).astype(np.float32) / 255 for values in (images, reference)]
        expected = compute_feature_metrics(*pixels, metrics=("fid", "precision", "recall"))
        expected["frechet_distance"] = expected.pop("fid")
        assert expected.items() <= result.items()
    distances = [result["frechet_distance"] for result in sweep["results"]]
    assert distances[0] == distances[2] and len(set(distances)) == 3, "without guidance there is no interval"

    assert sweep["num_images"] == 11 and sweep["num_reference_images"] == 9 and sweep["features"] == "pixels-grey"
    assert sweep["seed"] == 3 and sweep["num_inference_steps"] == 2 and sweep["label_sampling"] == "balanced"
    assert "guidance_scale" not in sweep
    notes = "\n".join(sweep["notes"])
    assert "every class is drawn equally often" in notes and "repeated to three channels" not in notes
    assert "`samples`: 11 images for 64 features: the covariance is singular" in notes
    assert "`reference`: 9 images for 64 features" in notes
    with Image.open(tmp_path / "out" / "guidance-sweep.png") as image:
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()
    assert all(list(bytes.fromhex(colour[1:])) in colours for colour in COLOURS[:2]), "a line for each interval"


def test_sweep_draws_nothing_twice(script, save_pipeline, reference, arguments, tmp_path, monkeypatch):
    save_pipeline(in_channels=1)
    draw, scales = LSEPPipeline.__call__, []

    def count(self, *args, guidance_scale, guidance_interval, **kwargs):
        scales.append((guidance_scale, tuple(guidance_interval)))
        if guidance_scale == 3:
            raise KeyboardInterrupt
        return draw(self, *args, guidance_scale=guidance_scale, guidance_interval=tuple(guidance_interval), **kwargs)

    monkeypatch.setattr(LSEPPipeline, "__call__", count)
    options = ("--guidance_interval", 0, 1, "--guidance_interval", 0, 0.7, "--guidance_scales", 1, 2)
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments("guidance-sweep", *options, 3))
    assert scales == [(1, (0, 1))] * 3 + [(2, (0, 1))] * 3 + [(3, (0, 1))], "three batches each"
    assert not (tmp_path / "out").exists()
    scales.clear()
    script.main(arguments("guidance-sweep", *options))
    assert scales == [(2, (0, 0.7))] * 3


@pytest.mark.slow
def test_sweep_by_two_processes(script, save_pipeline, reference, arguments, tmp_path, warm_python):
    save_pipeline(in_channels=1)
    script.main(arguments("guidance-sweep", *TWO_SCALES))
    alone = read_sweep(tmp_path)
    argv = arguments("guidance-sweep", *TWO_SCALES, "--cache_dir", tmp_path / "other", "--overwrite_output_dir")
    command = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(
        [*command, *argv], env=environment, timeout=300, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("written: ") == 1 and result.stdout.count("guidance 2 on [0, 0.5]") == 1
    assert read_sweep(tmp_path) == alone


@pytest.mark.slow
def test_sweep_with_a_network(script, save_pipeline, reference, arguments, tmp_path):
    from diffusers_lsep.evaluation.dinov2 import DINOv2Features

    make_dinov2(image_size=224, patch_size=14, initializer_range=0.2).save_pretrained(tmp_path / "dinov2")
    save_pipeline(in_channels=3)
    network = ("--features", "dinov2", "--dinov2_model", tmp_path / "dinov2")
    # An .npz is taken as it is; a folder is cut to the pipeline's size.
    large = np.random.default_rng(1).integers(0, 256, (9, 20, 16, 3), dtype=np.uint8)
    save_images(tmp_path / "reference", large)
    script.main(arguments("guidance-sweep", "--guidance_scales", 1, *network))
    assert read_sweep(tmp_path)["num_reference_images"] == 9
    pixels = np.repeat(reference[..., None], 3, axis=3)
    np.savez(tmp_path / "reference.npz", arr_0=pixels)
    npz = ("--reference", tmp_path / "reference.npz", "--overwrite_output_dir")
    script.main(arguments("guidance-sweep", "--guidance_scales", 1, *network, *npz))
    (result, _), name = read_sweep(tmp_path)["results"], read_sweep(tmp_path)["features"]

    extractor = DINOv2Features(str(tmp_path / "dinov2"))
    assert name == extractor.name
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    samples = DrawnSamples(pipe, "samples", 11, num_inference_steps=2, batch_size=4)
    features = [extractor(images)["class_token"] for images in (*samples.batches(0, 11, 11), pixels)]
    expected = compute_feature_metrics(*features, metrics=("fid", "precision", "recall"))
    assert result["frechet_distance"] == pytest.approx(expected["fid"], rel=1e-3)
    assert (result["precision"], result["recall"]) == (expected["precision"], expected["recall"])


def test_statistics_that_a_reference_brings_are_used():
    features = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    mean, covariance = feature_statistics(features)
    assert measure(features, features, (mean + 2, covariance))["frechet_distance"] == pytest.approx(12)
    values = measure(features, features)
    assert values == {"frechet_distance": pytest.approx(0, abs=1e-9), "precision": 1.0, "recall": 1.0}


@pytest.mark.slow
def test_cache_sweep_measures_what_caches_do(script, reference, arguments, tmp_path, capsys):
    pipe = make_pipeline(FlowMatchSDEScheduler(diffusion_form="none"), num_layers=3, patch_size=4, in_channels=1)
    pipe.save_pretrained(tmp_path / "model")
    caches = ("--cache", "FirstBlockCache", 0, 1, "--cache", "TaylorSeer", 1, 3, "--cache", "FasterCache", 2)
    caches += ("--cache", "MagCache", 0.5, "--cache", "PyramidAttentionBroadcast", 3, "--cache", "SeaCache", 0.5)
    more = ("--guidance_interval", 0, 1, "--guidance_interval", 0.2, 0.6, "--max_distance", 0.5)
    script.main(arguments("cache-sweep", *caches, *more, steps=8))
    printed = capsys.readouterr().out

    sweep = json.loads((tmp_path / "out" / "cache-sweep.json").read_text())
    assert sweep["num_images"] == 11 and sweep["guidance_scale"] == 1.5 and sweep["features"] == "pixels-grey"
    settings = [(result["cache"], result["setting"]) for result in sweep["results"]]
    assert len(settings) == 18 and settings[:9] == settings[9:] and settings[0] == (None, None)
    for interval in ([0, 1], [0.2, 0.6]):
        results = {
            (result["cache"], result["setting"]): result
            for result in sweep["results"]
            if result["guidance_interval"] == interval
        }
        plain = results.pop((None, None))
        samples = DrawnSamples(pipe, "samples", 11, 8, 1.5, tuple(interval), batch_size=4)
        (drawn,) = samples.batches(0, 11, 11)
        pixels = [values.reshape(len(values), 64).astype(np.float32) / 255 for values in (drawn[..., 0], reference)]
        assert plain["frechet_distance"] == pytest.approx(compute_feature_metrics(*pixels, metrics=("fid",))["fid"])
        for result in (plain, results.pop(("FirstBlockCache", 0)), results.pop(("TaylorSeer", 1))):
            assert (result["share_computed"], result["image_distance"]) == (1, 0), "nothing is left out"
            assert result["frechet_distance"] == plain["frechet_distance"]
        # Of 8 steps the first and, at this threshold, no other; of each the first of three blocks
        if interval == [0, 1]:
            assert results["FirstBlockCache", 1]["share_computed"] == pytest.approx((8 + 2) / 24)
        for result in results.values():
            assert 0.2 < result["share_computed"] < 1 and 0 < result["image_distance"] < 0.5
        best = min(results.values(), key=lambda result: result["share_computed"])
        name = f"{best['cache']} {best['setting']:g}: {best['share_computed']:.1%} of the blocks computed"
        low, high = interval
        assert f"largest saving with a distance of at most 0.5: guidance on [{low:g}, {high:g}], {name}" in printed
    with Image.open(tmp_path / "out" / "cache-sweep.png") as image:
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()
    assert all(list(bytes.fromhex(colour[1:])) in colours for colour in COLOURS[:2]), "a line for each cache"

    script.main(arguments("cache-sweep", "--cache", "TaylorSeer", 1, "--overwrite_output_dir"))
    assert "largest saving with a distance of at most 0.02: none" in capsys.readouterr().out


@pytest.fixture
def strip(script, arguments, monkeypatch):
    """Runs `denoising-strip` and returns what is drawn."""

    def run(*more, **kwargs):
        drawn = []
        monkeypatch.setattr(script, "plot_denoising_strip", lambda *figure: drawn.append(figure))
        script.main(arguments("denoising-strip", *more, **kwargs))
        return drawn[0]

    return run


@pytest.mark.parametrize("scheduler", [None, "ode", "heun", "unipc", "dpmpp"])
def test_strip_ends_with_the_pipeline_s_images(strip, save_pipeline, tmp_path, scheduler):
    save_pipeline(in_channels=1)
    flags = ("--scheduler", scheduler) if scheduler else ()
    guidance = ("--guidance_scale", 2, "--guidance_interval", 0, 0.6)
    path, states, predictions, times, labels, title = strip(
        "--num_columns", 4, *guidance, "--seeds", 0, 5, *flags, steps=6
    )
    assert path == tmp_path / "out" / "denoising-strip.png" and title == "model: 6 steps, guidance 2"
    assert labels == ["digit 3, seed 0", "digit 3, seed 5", "digit 7, seed 0", "digit 7, seed 5"]
    assert states.shape == predictions.shape == (4, 4, 8, 8, 1)

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    set_scheduler(pipe, scheduler)
    assert pipe.scheduler.config.get("solver_order") == (2 if scheduler in ("unipc", "dpmpp") else None)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 5, 0, 5)]
    images = pipe(
        [3, 3, 7, 7], 6, guidance_scale=2, guidance_interval=(0, 0.6), generator=generators, output_type="np"
    ).images
    np.testing.assert_array_equal(states[-1], images)
    np.testing.assert_allclose(predictions[-1], images, atol=1e-6)
    # Steps 0, 2, 4, 6 of 6
    grid = pipe.scheduler.sigmas.tolist()
    grid = sorted(set(grid), reverse=True)
    assert times == pytest.approx(grid[::2]) and len(grid) == 7 and times[-1] == 0
    assert len(np.unique(states[1])) > 20 and not np.array_equal(states[1], states[2])


def test_strip_shows_the_model_s_predictions(strip, save_pipeline, tmp_path):
    save_pipeline(in_channels=1)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    velocities = {
        name: pipe.transformer(noise, torch.ones(2), torch.tensor(labels)).sample.detach()
        for name, labels in (("class", [3, 7]), ("null", [10, 10]))
    }
    guided = velocities["null"] + 3 * (velocities["class"] - velocities["null"])
    for high, velocity in ((1, guided), (0.9, velocities["class"])):
        _, states, predictions, times, _, _ = strip("--guidance_scale", 3, "--guidance_interval", 0, high, steps=3)
        data = get_interpolant("linear").predict_original_sample(velocity, noise, 1.0)
        for found, expected in ((states, noise), (predictions, data)):
            expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
            # The guided pass takes both in one batch, which changes last bits
            np.testing.assert_allclose(found[0], expected, atol=1e-5)
        assert len(times) == 4, "there are no more steps to show"


def test_strip_decodes_latents(script, strip, save_pipeline, arguments, tiny_vae_folder, tmp_path):
    save_pipeline(vae=AutoencoderKL.from_pretrained(tiny_vae_folder))
    _, states, predictions, times, labels, title = strip("--seeds", 1, "--num_columns", 3)
    assert states.shape == predictions.shape == (3, 2, 16, 16, 3)
    assert labels == ["digit 3", "digit 7"] and title == "model: 2 steps"
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    images = pipe([3, 7], 2, generator=generators, output_type="np").images
    np.testing.assert_array_equal(states[-1], images)


def test_strip_takes_digits_for_names_first_and_prints_what_is_drawn(strip, tiny_transformer, tmp_path, capsys):
    transformer = tiny_transformer(num_layers=1, in_channels=1, num_classes=3)
    names = {0: "1", 1: "10", 2: "2"}  # folders, sorted as text
    LSEPPipeline(transformer, FlowMatchSDEScheduler(), id2label=names).save_pretrained(tmp_path / "model")
    labels = strip("--class_labels", 1, 2)[4]
    assert labels == ["1", "2"]
    assert "images to draw: 2\n  class 0, '1': 1\n  class 2, '2': 1\n" in capsys.readouterr().out


def test_strip_is_a_picture(script, save_pipeline, arguments, tmp_path, capsys):
    save_pipeline(in_channels=3)
    script.main(arguments("denoising-strip"))
    assert "written: " in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["denoising-strip.png"]
    with Image.open(tmp_path / "out" / "denoising-strip.png") as image:
        assert image.height > 400 and len(np.unique(np.asarray(image))) > 100


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("guidance-sweep", ["--num_images", 3], "argument --num_images: has to be at least 4, but is 3"),
        ("guidance-sweep", ["--batch_size", 0], "argument --batch_size: has to be at least 1, but is 0"),
        ("guidance-sweep", ["--seed", -1], "argument --seed: has to be at least 0, but is -1"),
        (
            "guidance-sweep",
            ["--guidance_scales", "nan"],
            "argument --guidance_scales: has to be in 0..1000, but is nan",
        ),
        ("guidance-sweep", ["--guidance_interval", 0.5, 0.2], "0 <= LOW <= HIGH <= 1, but is 0.5 0.2"),
        ("guidance-sweep", ["--features", "vgg"], "invalid choice: 'vgg'"),
        ("cache-sweep", ["--cache", "TeaCache", 1], "NAME has to be one of FirstBlockCache, MagCache"),
        ("cache-sweep", ["--cache", "MagCache"], "MagCache has to be followed by a SETTING"),
        ("cache-sweep", ["--cache", "SeaCache", -1], "SETTING of SeaCache has to be at least 0, but is -1"),
        ("cache-sweep", ["--cache", "TaylorSeer", 1.5], "SETTING of TaylorSeer has to be a whole number, but is 1.5"),
        ("cache-sweep", ["--guidance_interval", 0.5, 0.2], "0 <= LOW <= HIGH <= 1, but is 0.5 0.2"),
        (
            "denoising-strip",
            ["--num_inference_steps", 0],
            "argument --num_inference_steps: has to be at least 1, but is 0",
        ),
        ("denoising-strip", ["--num_columns", 1], "argument --num_columns: has to be at least 2, but is 1"),
        ("denoising-strip", ["--seeds", 1, -2], "argument --seeds: has to be at least 0, but is -2"),
        ("denoising-strip", ["--guidance_interval", 0, 2], "has to be in 0..1, but is 2"),
    ],
)
def test_wrong_arguments_are_usage_errors(script, arguments, capsys, command, options, message):
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments(command, *options))
    assert message in capsys.readouterr().err


def test_what_does_not_fit_is_refused_before_work(script, save_pipeline, reference, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(LSEPPipeline, "__call__", lambda *args, **kwargs: pytest.fail("an image was drawn"))
    save_pipeline(in_channels=1)
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "colour.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8))
    for name, message in (
        ("large.npz", "`--reference` has to hold images of 8 x 8, .* but they are 16 x 16"),
        ("few.npz", "`--reference` has to hold 4 images, but holds 3"),
        ("colour.npz", "`features` 'pixels' of grey samples need a grey reference"),
        ("absent.npz", "`reference` has to exist, but there is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main(arguments("guidance-sweep", "--reference", tmp_path / name))
    with pytest.raises(ValueError, match=r"`--class_labels` has to lie in 0\.\.9, but holds 10"):
        script.main(arguments("denoising-strip", "--class_labels", 10))
    save_pipeline(in_channels=4)
    for command in ("guidance-sweep", "cache-sweep", "denoising-strip"):
        with pytest.raises(ValueError, match="`vae` is needed for images, .* 4 channels"):
            script.main(arguments(command))
    assert not (tmp_path / "out").exists()

    (tmp_path / "out").mkdir()
    for command in ("guidance-sweep", "cache-sweep", "denoising-strip"):
        (tmp_path / "out" / f"{command}.png").write_text("mine")
        with pytest.raises(ValueError, match=f"already has {command}.png.*`--overwrite_output_dir`"):
            script.main(arguments(command))
        assert (tmp_path / "out" / f"{command}.png").read_text() == "mine"


def test_torch_fidelity_is_asked_for(script, save_pipeline, reference, arguments, monkeypatch):
    save_pipeline(in_channels=1)
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'diffusers_lsep\[eval\]'"):
        script.main(arguments("guidance-sweep", "--features", "inception"))


def test_matplotlib_is_asked_for_before_work(script, arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in ("guidance-sweep", "cache-sweep", "denoising-strip"):
        with pytest.raises(ImportError, match=rf"{command} needs matplotlib: pip install 'diffusers_lsep\[eval\]'"):
            script.main(arguments(command))
