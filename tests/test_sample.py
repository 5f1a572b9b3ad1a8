# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from tiny_models import make_pipeline, make_vae

from diffusers_lsep import (
    FlowMatchHeunODEScheduler,
    FlowMatchSDEScheduler,
    SiTTransformer2DModel,
)
from diffusers_lsep.files import hash_weights
from diffusers_lsep.labels import find_class_ids
from diffusers_lsep.sampling import choose_class_ids, make_generator


SCRIPT = Path(__file__).parents[1] / "examples" / "sample.py"


@pytest.fixture(scope="module")
def sample(load_example):
    """The script as a module: its `main` in this process, where a new one is not the point."""
    return load_example("sample")


@pytest.fixture
def save_pipeline(tmp_path):
    def save(names=None, vae=None, name="pipeline", **config):
        names = names or {i: f"digit {i}" for i in range(10)}
        make_pipeline(vae=vae, id2label=names, num_layers=1, **config).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def pipeline_dir(save_pipeline):
    return save_pipeline(in_channels=3)


@pytest.fixture
def run(sample, pipeline_dir, tmp_path):
    def call(name, *arguments):
        output_dir = tmp_path / name
        standard = ["--pretrained_model_name_or_path", str(pipeline_dir), "--output_dir", str(output_dir)]
        sample.main([*standard, "--num_inference_steps", "2", *map(str, arguments)])
        return output_dir

    return call


@pytest.fixture
def interrupt(run, sample, monkeypatch):
    """Runs the script until it is killed after some batches of two images."""

    def interrupt(name, *arguments, after=2):
        write, count = sample.ImageStore.write, iter(range(100))

        def write_or_die(store, batch, images):
            if next(count) == after:
                raise KeyboardInterrupt
            write(store, batch, images)

        with monkeypatch.context() as patch:
            patch.setattr(sample.ImageStore, "write", write_or_die)
            with pytest.raises(KeyboardInterrupt):
                run(name, "--batch_size", 2, *arguments)

    return interrupt


def test_classes_become_pngs_and_a_grid(run):
    output_dir = run("out", "--class_labels", 3, "digit 7", "--num_images_per_class", 3, "--batch_size", 4)
    names = sorted(path.name for path in (output_dir / "images").iterdir())
    assert names == [f"{i}-class-{3 if i < 3 else 7}.png" for i in range(6)]
    assert Image.open(output_dir / "images" / names[0]).size == (8, 8)
    grid = Image.open(output_dir / "grid.png")
    assert grid.width > 3 * 64 and grid.height > 2 * 64
    settings = json.loads((output_dir / "samples.json").read_text())
    assert settings["class_ids"] == [3, 3, 3, 7, 7, 7] and settings["sampler"] == "FlowMatchSDEScheduler"
    assert sorted(path.name for path in output_dir.iterdir()) == ["grid.png", "images", "samples.json"]


def test_digits_are_names_first_and_what_is_drawn_is_printed(run, save_pipeline, capsys):
    """Folders are sorted as text: 1, 10, 2."""
    save_pipeline({0: "1", 1: "10", 2: "2, two"}, in_channels=3, num_classes=3)
    capsys.readouterr()
    output_dir = run("out", "--class_labels", 1, "two", 0, "--num_images_per_class", 2)
    names = sorted(path.name for path in (output_dir / "images").iterdir())
    assert [name.rpartition("-")[2] for name in names] == ["0.png", "0.png", "2.png", "2.png", "0.png", "0.png"]
    printed = "images to draw: 6\n  class 0, '1': 4\n  class 2, '2, two': 2\n"
    assert printed in capsys.readouterr().out
    run("fid", "--num_images", 9, "--label_sampling", "balanced")
    assert "  class 1, '10': 3\n" in capsys.readouterr().out


def test_of_many_classes_a_summary_is_printed(run, save_pipeline, capsys):
    save_pipeline({i: f"class {i}" for i in range(30)}, in_channels=3, num_classes=30)
    capsys.readouterr()
    run("out", "--num_images", 40, "--label_sampling", "balanced")
    summary = "images to draw: 40, 1 to 2 of each of 30 classes, from class 0, 'class 0', to class 29, 'class 29'\n"
    assert summary in capsys.readouterr().out


def test_a_grid_is_not_drawn_beside_images_to_measure(run):
    """Of which samples.json would speak no more."""
    folder = run("out", "--num_images", 2)
    with pytest.raises(ValueError, match="already has samples.npz, of another run"):
        run("out", "--class_labels", 1)
    assert json.loads((folder / "samples.json").read_text())["num_images"] == 2
    run("out", "--class_labels", 1, "--overwrite_output_dir")
    assert sorted(path.name for path in folder.iterdir()) == ["grid.png", "images", "samples.json"]


def test_another_pipeline_is_refused(run, tmp_path):
    DiTPipeline(DiTTransformer2DModel(1, 8, 4, num_layers=1), make_vae(), DDIMScheduler()).save_pretrained(
        tmp_path / "dit"
    )
    with pytest.raises(ValueError, match="has to be an LSEPPipeline, but is a DiTPipeline"):
        run("out", "--class_labels", 1, "--pretrained_model_name_or_path", tmp_path / "dit")


@pytest.mark.parametrize("name", ["sample", "figures"])
def test_the_examples_of_the_help_fit_the_digits(load_example, name):
    text = load_example(name).__doc__
    (labels,) = re.findall(r"--class_labels (.*?) --", text)
    digits = [str(digit) for digit in range(10)]
    ids = find_class_ids(labels.split(), dict(enumerate(digits)), 10)
    assert [digits[class_id] for class_id in ids] == labels.split()


def test_images_are_floored_samples_of_the_pipeline(run, pipeline_dir):
    output_dir = run("out", "--num_images", 5, "--batch_size", 3, "--guidance_scale", 1.5, "--save_images")
    archive = np.load(output_dir / "samples.npz")
    assert archive["arr_0"].shape == (5, 8, 8, 3) and archive["arr_0"].dtype == np.uint8
    pipe = DiffusionPipeline.from_pretrained(pipeline_dir)
    generators = [make_generator(0, i) for i in range(3)]
    tensors = pipe(archive["arr_1"][:3], 2, guidance_scale=1.5, generator=generators, output_type="latent").images
    expected = np.floor(np.clip(255 * (tensors.permute(0, 2, 3, 1).numpy() + 1) / 2, 0, 255))
    assert (np.abs(archive["arr_0"][:3] - expected) > 0).mean() < 0.01  # 255 * (x / 2 + 0.5) in another order
    assert np.abs(archive["arr_0"][:3] - expected).max() <= 1
    png = np.asarray(Image.open(output_dir / "images" / f"4-class-{archive['arr_1'][4]}.png"))
    np.testing.assert_array_equal(png, archive["arr_0"][4])


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs_can_be_asked_for_afterwards(run, save_pipeline, capsys, channels):
    save_pipeline(in_channels=channels)
    arguments = ["--num_images", 12, "--batch_size", 5]
    expected = run("at-once", *arguments, "--save_images") / "images"
    before = (run("later", *arguments) / "samples.npz").read_bytes()
    later = run("later", *arguments, "--save_images")
    printed = capsys.readouterr()
    assert "12 images with these settings are in" in printed.out
    assert "Steps" not in printed.err, "bars of single batches are for terminals"
    assert (later / "samples.npz").read_bytes() == before
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in (later / "images").iterdir()) == names and len(names) == 12
    assert all((later / "images" / name).read_bytes() == (expected / name).read_bytes() for name in names)


def test_labels_are_random_or_balanced_or_none(run, pipeline_dir, capsys):
    random = np.load(run("random", "--num_images", 40) / "samples.npz")["arr_1"]
    balanced = np.load(run("balanced", "--num_images", 40, "--label_sampling", "balanced") / "samples.npz")["arr_1"]
    assert np.bincount(balanced, minlength=10).tolist() == [4] * 10
    assert np.bincount(random, minlength=10).tolist() != [4] * 10 and set(random) <= set(range(10))
    none = run("none", "--num_images", 4, "--label_sampling", "none")
    assert np.load(none / "samples.npz")["arr_1"].tolist() == [10] * 4
    assert json.loads((none / "samples.json").read_text())["class_labels"] == "no class"
    pipe = DiffusionPipeline.from_pretrained(pipeline_dir)
    generators = [make_generator(0, i) for i in range(32)]
    images = pipe(num_images_per_label=32, num_inference_steps=2, generator=generators, output_type="pt").images[:4]
    drawn = np.load(none / "samples.npz")["arr_0"] / 255
    np.testing.assert_allclose(drawn, images.permute(0, 2, 3, 1), rtol=0, atol=1.01 / 255)
    assert "class 10, 'no class': 4" in capsys.readouterr().out
    again = np.load(run("fewer", "--num_images", 10) / "samples.npz")["arr_1"]
    np.testing.assert_array_equal(again, random[:10])


def test_seeds_differ_and_batch_size_hardly_matters(run):
    arrays = [
        np.load(run(f"run{i}", "--num_images", 12, *arguments) / "samples.npz")["arr_0"].astype(int)
        for i, arguments in enumerate((["--batch_size", 5], ["--batch_size", 12], ["--seed", 1, "--batch_size", 5]))
    ]
    difference = np.abs(arrays[0] - arrays[1])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.001
    assert (arrays[0] != arrays[2]).mean() > 0.5


@pytest.mark.slow
def test_two_processes_and_an_interruption_change_nothing(run, interrupt, pipeline_dir, tmp_path, warm_python):
    arguments = ["--num_images", 11, "--batch_size", 2, "--save_images"]
    expected = run("whole", *arguments)

    # Killed after two batches, and gone on with by two processes.
    interrupt("interrupted", *arguments)
    assert (tmp_path / "interrupted" / ".unfinished" / "done").read_bytes() == b"\1\1\0\0\0\0"
    assert not (tmp_path / "interrupted" / "samples.npz").exists()

    command = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    command += ["--pretrained_model_name_or_path", pipeline_dir, "--output_dir", tmp_path / "interrupted"]
    command += ["--num_inference_steps", 2, *arguments]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        list(map(str, command)), check=True, env=environment, timeout=300, stdout=subprocess.PIPE, text=True
    ).stdout
    assert "drawn by 2 process(es)" in output
    found = tmp_path / "interrupted"
    assert (found / "samples.npz").read_bytes() == (expected / "samples.npz").read_bytes()
    assert (found / "samples.json").read_text() == (expected / "samples.json").read_text()
    pictures = [
        {path.name: path.read_bytes() for path in (folder / "images").iterdir()} for folder in (found, expected)
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 11
    assert not (found / ".unfinished").exists()


def test_an_unfinished_run_with_other_settings_is_not_mixed(run, interrupt):
    interrupt("out", "--num_images", 4, "--batch_size", 2, after=1)
    with pytest.raises(ValueError, match=r"other settings: guidance_scale \(1.0 before, 2.0 now\)"):
        run("out", "--num_images", 4, "--batch_size", 2, "--guidance_scale", 2.0)
    run("out", "--num_images", 4, "--batch_size", 2)


def test_a_run_without_a_finished_batch_does_not_bind(run, interrupt):
    with pytest.raises(ValueError, match="`guidance_scale` has to be"):
        run("out", "--num_images", 4, "--guidance_scale", "nan")
    interrupt("out", "--num_images", 4, "--batch_size", 32, after=0)
    run("out", "--num_images", 4, "--guidance_scale", 2.0)


def test_few_images_make_a_small_batch(run):
    out = run("out", "--class_labels", 0, 1, "--num_images_per_class", 3)
    assert json.loads((out / "samples.json").read_text())["batch_size"] == 6


def test_images_of_another_path_are_not_taken_for_these(run, pipeline_dir):
    run("out", "--num_images", 2)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        path = pipeline_dir / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "path_type": "cosine"}))
    with pytest.raises(ValueError, match="with other settings: .*path_type"):
        run("out", "--num_images", 2)


@pytest.mark.parametrize(
    ("name", "sampler", "setting"),
    [
        ("sde", "FlowMatchSDEScheduler", ("diffusion_form", "linear")),
        ("sde2", "FlowMatchSDEMultistepScheduler", ("diffusion_form", "linear")),
        ("ode", "FlowMatchSDEScheduler", ("diffusion_form", "none")),
        ("heun", "FlowMatchHeunODEScheduler", ("path_type", "linear")),
        ("dpmpp", "DPMSolverMultistepScheduler", ("solver_order", 2)),
        ("unipc", "UniPCMultistepScheduler", ("solver_order", 2)),
    ],
)
@pytest.mark.parametrize("saved_before", [False, True])
def test_schedulers(run, pipeline_dir, name, sampler, setting, saved_before):
    if saved_before:  # when FlowMatchSDEScheduler had a `solver_order`
        path = pipeline_dir / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "solver_order": 1}))
    settings = json.loads((run("out", "--num_images", 2, "--scheduler", name) / "samples.json").read_text())
    assert settings["sampler"] == sampler
    key, value = setting
    assert settings["sampler_config"][key] == value
    # What is kept for other schedulers is no setting of this one.
    assert ("last_step" in settings["sampler_config"]) == name.startswith(("sde", "ode"))
    assert ("path_type" in settings["sampler_config"]) == sampler.startswith("FlowMatch")


@pytest.mark.parametrize("name", ["sde", "sde2"])
def test_schedulers_of_the_sde_keep_the_saved_one(run, pipeline_dir, name):
    """Also where the pipeline was saved with another one in its place, but not with the ODE."""
    sde = FlowMatchSDEScheduler(diffusion_form="sigma", last_step_size=0.02)
    for scheduler, form in (
        (sde, "sigma"),
        (FlowMatchHeunODEScheduler.from_config(sde.config), "sigma"),
        (FlowMatchSDEScheduler(diffusion_form="none", last_step_size=0.02), "linear"),
    ):
        scheduler.save_pretrained(pipeline_dir / "scheduler")
        index = json.loads((pipeline_dir / "model_index.json").read_text())
        index["scheduler"] = ["diffusers_lsep", type(scheduler).__name__]
        (pipeline_dir / "model_index.json").write_text(json.dumps(index))
        output_dir = run("out", "--num_images", 2, "--scheduler", name, "--overwrite_output_dir")
        config = json.loads((output_dir / "samples.json").read_text())["sampler_config"]
        assert config["diffusion_form"] == form and config["last_step_size"] == (0.02 if form == "sigma" else 0.04)


def images_of(folder):
    return np.load(folder / "samples.npz")["arr_0"]


def test_an_unfinished_run_goes_on_with_the_same_weights_from_anywhere(run, interrupt, pipeline_dir, tmp_path):
    arguments = ["--num_images", 8, "--batch_size", 2]
    expected = run("whole", *arguments)
    interrupt("out", "--num_images", 8)
    pipeline_dir.rename(tmp_path / "moved")
    found = run("out", *arguments, "--pretrained_model_name_or_path", tmp_path / "moved")
    np.testing.assert_array_equal(images_of(found), images_of(expected))
    settings = [json.loads((folder / "samples.json").read_text()) for folder in (expected, found)]
    assert settings[0].pop("pretrained_model_name_or_path") == str(pipeline_dir)
    assert settings[1].pop("pretrained_model_name_or_path") == str(tmp_path / "moved")
    assert settings[0] == settings[1]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["transformer", "vae"])
@pytest.mark.parametrize("kind", ["--num_images", "--class_labels"])
def test_an_unfinished_run_does_not_go_on_with_other_weights(
    run, interrupt, save_pipeline, tiny_vae_folder, tmp_path, model, kind
):
    """The path stays as it is, as that of a `checkpoint` folder that is written anew."""
    vaes = [AutoencoderKL.from_pretrained(tiny_vae_folder) for _ in range(2)]
    arguments = ("--num_images", 8) if kind == "--num_images" else ("--class_labels", "digit 1", "digit 2")
    save_pipeline(vae=vaes[0])
    interrupt("out", *arguments)
    unfinished = (tmp_path / "out" / ".unfinished" / "images.npy").read_bytes()
    if model == "vae":
        with torch.no_grad():
            vaes[1].decoder.conv_out.bias += 0.1
    save_pipeline(vae=vaes[1], seed=1 if model == "transformer" else 0)
    message = (
        rf"unfinished run with other settings: weights\.{model} \(\w+ before, \w+ now\)\. .*`--overwrite_output_dir`"
    )
    with pytest.raises(ValueError, match=message):
        run("out", *arguments, "--batch_size", 2)
    assert (tmp_path / "out" / ".unfinished" / "images.npy").read_bytes() == unfinished

    found = run("out", *arguments, "--batch_size", 2, "--overwrite_output_dir")
    expected = run("fresh", *arguments, "--batch_size", 2)
    for path in [path for path in expected.rglob("*") if path.is_file()]:
        assert (found / path.relative_to(expected)).read_bytes() == path.read_bytes()
    if kind == "--num_images":
        weights = json.loads((found / "samples.json").read_text())["weights"]
        assert weights == {
            "transformer": hash_weights(DiffusionPipeline.from_pretrained(tmp_path / "pipeline").transformer),
            "vae": hash_weights(vaes[1]),
        }


def test_an_unfinished_run_is_discarded_with_its_settings(run, interrupt):
    interrupt("out", "--num_images", 8)
    found = run("out", "--num_images", 8, "--batch_size", 3, "--seed", 1, "--overwrite_output_dir")
    expected = run("fresh", "--num_images", 8, "--batch_size", 3, "--seed", 1)
    np.testing.assert_array_equal(images_of(found), images_of(expected))
    assert not (found / ".unfinished").exists()


def test_other_names_of_the_classes_are_other_settings(run, interrupt, save_pipeline, tmp_path):
    interrupt("out", "--class_labels", "digit 1", after=1)
    save_pipeline({0: "digit 1", 1: "digit 0"}, in_channels=3)
    with pytest.raises(ValueError, match=r"class_ids \(\[1, 1, 1, 1\] before, \[0, 0, 0, 0\] now\)"):
        run("out", "--class_labels", "digit 1", "--batch_size", 2)


def test_images_of_a_discarded_run_are_gone(run):
    run("out", "--class_labels", "digit 1", "digit 2")
    output_dir = run("out", "--class_labels", "digit 1", "--num_images_per_class", 2, "--overwrite_output_dir")
    assert len(list((output_dir / "images").iterdir())) == 2


@pytest.mark.parametrize("force_upcast", [True, False])
def test_half_precision_is_the_transformers_alone(run, save_pipeline, tiny_vae_folder, tmp_path, force_upcast):
    """The papers decode in float32, with weights that were never rounded."""
    vae = AutoencoderKL.from_pretrained(tiny_vae_folder, force_upcast=force_upcast)
    folder = save_pipeline(vae=vae)
    found = images_of(run("out", "--num_images", 6, "--batch_size", 6, "--dtype", "bfloat16")).astype(float)
    dtype = {"transformer": torch.bfloat16, "default": torch.float32}
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    generators = [make_generator(0, i) for i in range(6)]
    latents = pipe(choose_class_ids(6, 10), 2, generator=generators, output_type="latent").images
    with torch.no_grad():
        images = vae.decode(latents / vae.config.scaling_factor).sample
    expected = np.floor(np.clip(255 * (images.permute(0, 2, 3, 1).numpy() + 1) / 2, 0, 255))
    assert np.abs(found - expected).max() <= 1 and (found != expected).mean() < 0.01


def test_internal_guidance(run, save_pipeline, tmp_path):
    folder = save_pipeline(in_channels=3, internal_guidance_depth=1, name="with-head")
    options = ["--pretrained_model_name_or_path", folder, "--num_images", 2]
    images = images_of(run("guided", *options, "--internal_guidance_scale", 2))
    assert (images != images_of(run("plain", *options))).any()
    assert json.loads((tmp_path / "guided" / "samples.json").read_text())["internal_guidance_scale"] == 2
    with pytest.raises(ValueError, match="`internal_guidance_scale` has to be 1 with a transformer without"):
        run("without-head", "--class_labels", 1, "--internal_guidance_scale", 2)
    assert not (tmp_path / "without-head").exists()


def test_values_that_overflow_are_no_black_images(run, pipeline_dir, tmp_path):
    transformer = SiTTransformer2DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    transformer.proj_out.bias.data.fill_(1e5)  # beyond float16's 65,504
    transformer.save_pretrained(pipeline_dir / "transformer")
    message = "`transformer` in float16 has come to values .* after step 1 of 2. Try .*`--dtype`.* 'bfloat16'"
    with pytest.raises(ValueError, match=message):
        run("half", "--class_labels", 1, "--dtype", "float16")
    assert not (tmp_path / "half" / "grid.png").exists()
    assert (run("full", "--class_labels", 1) / "grid.png").is_file()
    transformer.proj_out.bias.data.fill_(float("nan"))
    transformer.save_pretrained(pipeline_dir / "transformer")
    with pytest.raises(ValueError, match="`transformer` in float32 .* Its weights may be damaged"):
        run("nan", "--class_labels", 1)


@pytest.mark.parametrize("kind", [("--num_images", 2), ("--class_labels", "digit 1")])
def test_latents_without_a_vae_are_refused(run, save_pipeline, tmp_path, kind):
    save_pipeline(in_channels=4)
    with pytest.raises(ValueError, match="`vae` is needed for images"):
        run("out", *kind)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="`--output_dir` .*file/out' cannot be written: .*file' is no such folder"):
        run("file/out", "--num_images", 2, "--pretrained_model_name_or_path", "no/model")


def test_what_is_there_is_not_overwritten_unasked(run, tmp_path, capsys):
    before = (run("out", "--num_images", 2) / "samples.npz").read_bytes()
    with pytest.raises(ValueError, match="already has samples.npz, with other settings: seed .0 before, 1 now"):
        run("out", "--num_images", 2, "--seed", 1)
    (tmp_path / "out" / ".unfinished").mkdir()  # of a run that was killed as it ended
    run("out", "--num_images", 2)
    assert "2 images with these settings are in" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["samples.json", "samples.npz"]
    (tmp_path / "out" / "samples.json").unlink()
    with pytest.raises(ValueError, match="already has samples.npz, with other settings: samples.json cannot be read"):
        run("out", "--num_images", 2)
    output_dir = run("out", "--num_images", 2, "--seed", 1, "--overwrite_output_dir")
    assert (output_dir / "samples.npz").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --class_labels --num_images is required"),
        (["--class_labels", "1", "--num_images", "2"], "--num_images: not allowed with argument --class_labels"),
        (["--num_images", "0"], "argument --num_images: has to be at least 1, but is 0"),
        (["--num_images", "1", "--batch_size", "0"], "argument --batch_size: has to be at least 1, but is 0"),
        (["--num_images", "1", "--seed", "-1"], "argument --seed: has to be at least 0, but is -1"),
        (["--num_images", "1", "--guidance_interval", "0.5", "0.2"], "0 <= LOW <= HIGH <= 1, but is 0.5 0.2"),
        (["--num_images", "1", "--scheduler", "ddim"], "invalid choice: 'ddim'"),
        (["--class_labels", "1", "--label_sampling", "balanced"], "--label_sampling needs --num_images"),
        (["--class_labels", "1", "--label_sampling", "none"], "--label_sampling needs --num_images"),
        (["--class_labels", "1", "--save_images"], "--save_images needs --num_images"),
        (["--num_images", "1", "--num_images_per_class", "2"], "--num_images_per_class needs --class_labels"),
    ],
)
def test_wrong_arguments_are_usage_errors(run, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        run("out", *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("label", "message"), [("10", r"has to lie in 0\.\.9, but holds 10"), ("digit", "there is no class 'digit'")]
)
def test_unknown_classes_are_refused(run, tmp_path, label, message):
    with pytest.raises(ValueError, match=message):
        run("out", "--class_labels", label)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_compiled_blocks_draw_the_same_images(run, sample, monkeypatch):
    """With and without guidance, and a last batch that is not full: two sizes, each compiled once."""
    compile_blocks, options = SiTTransformer2DModel.compile_repeated_blocks, {}

    def compile_without_a_compiler(model, **arguments):
        options.update(arguments)
        compile_blocks(model, **arguments, backend="aot_eager")

    monkeypatch.setattr(SiTTransformer2DModel, "compile_repeated_blocks", compile_without_a_compiler)
    arguments = ["--num_images", 6, "--guidance_scale", 2, "--guidance_interval", 0, 0.5]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run("compiled", *arguments, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 and options["fullgraph"]
    assert json.loads((compiled / "samples.json").read_text())["compile"] is True
    images = [np.load(folder / "samples.npz")["arr_0"].astype(int) for folder in (compiled, run("eager", *arguments))]
    assert abs(images[0] - images[1]).max() <= 1
    torch.compiler.reset()
