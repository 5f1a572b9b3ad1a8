# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`diffusers-lsep evaluate` and its `evaluate.Metric`, with random weights in Inception."""

import copy
import json
import os
import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from image_folders import save_images
from tiny_models import make_dinov2, make_pipeline

from diffusers_lsep import FlowMatchSDEScheduler, LSEPPipeline
from diffusers_lsep.cli import main
from diffusers_lsep.commands.evaluate import format_table
from diffusers_lsep.evaluation import protocol as command
from diffusers_lsep.evaluation.features import extract_features
from diffusers_lsep.evaluation.images import open_images
from diffusers_lsep.evaluation.inception import InceptionFeatures
from diffusers_lsep.evaluation.metrics import feature_statistics, inception_score
from diffusers_lsep.evaluation.protocol import compute_feature_metrics, evaluate_images
from diffusers_lsep.files import hash_weights
from diffusers_lsep.sampling import DrawnSamples, choose_class_ids, make_generator, set_scheduler


SIZE = 8


def make_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Samples, references, and what the network made of them."""
    folder = tmp_path_factory.mktemp("evaluate")
    np.savez(folder / "samples.npz", arr_0=make_images(8))
    np.savez(folder / "reference.npz", arr_0=make_images(6, seed=1))
    return folder


@pytest.fixture(scope="module")
def features(folder, inception_weights):
    inception = InceptionFeatures(inception_weights)
    return {
        name: extract_features(open_images(folder / f"{name}.npz"), inception, folder / "cache", batch_size=4)
        for name in ("samples", "reference")
    }


@pytest.fixture
def arguments(folder, features, inception_weights, tmp_path):
    """The command's arguments, quick ones unless others are given; features come from the cache."""

    def make(*args, samples=folder / "samples.npz", reference=folder / "reference.npz", metrics=("kid",)):
        return [
            "evaluate",
            *([str(samples)] if samples is not None else []),
            *("--reference", str(reference), "--inception_weights", str(inception_weights)),
            *("--cache_dir", str(folder / "cache"), "--batch_size", "4"),
            *(("--metrics", *metrics) if metrics is not None else ()),
            *("--output_dir", str(tmp_path / "out")),
            *args,
        ]

    return make


def read_results(tmp_path):
    return json.loads((tmp_path / "out" / "eval_results.json").read_text())


@pytest.mark.slow
def test_all_metrics_against_a_reference_with_statistics(arguments, features, folder, tmp_path, capsys, caplog):
    # As ADM's VIRTUAL files: statistics that are not those of the images. Here they are the samples', moved, so that
    # the Frechet distances are known.
    moved = {}
    for (mu, sigma), name, shift in ((("mu", "sigma"), "pool", 0.25), (("mu_s", "sigma_s"), "spatial", 0.5)):
        mean, covariance = feature_statistics(features["samples"][name])
        moved |= {mu: mean + shift, sigma: covariance}
    np.savez(folder / "VIRTUAL.npz", arr_0=make_images(6, seed=1), **moved)
    main(arguments(reference=folder / "VIRTUAL.npz", metrics=None))

    results = read_results(tmp_path)
    values = results["metrics"]
    assert values["fid"] == pytest.approx(2048 * 0.25**2, rel=1e-8)
    assert values["sfid"] == pytest.approx(2023 * 0.5**2, rel=1e-8)
    assert values["inception_score"] == inception_score(features["samples"]["logits"])
    expected = compute_feature_metrics(
        features["samples"]["pool"], features["reference"]["pool"], ("precision", "recall", "kid")
    )
    assert {name: values[name] for name in expected} == expected
    assert set(values) == {"fid", "sfid", "inception_score", *expected}

    assert results["num_images"] == 8 and results["num_reference_images"] == 6 and results["image_size"] == [8, 8]
    assert results["dataset"] == str(folder / "VIRTUAL.npz")
    assert results["stored_reference_statistics"] == ["pool", "spatial"]
    output = capsys.readouterr().out
    assert "FID ↓" in output and "Precision ↑" in output and f"{values['fid']:.4f}" in output
    notes = results["notes"]
    assert [record.getMessage() for record in caplog.records if record.name == command.__name__] == notes
    for expected_note in (
        "`samples` holds 8 images, the protocol asks for 50,000",
        "images are 8 x 8, published numbers for ImageNet are for 256 x 256 or 512 x 512",
        "`samples` holds 8 images for FID's 2,048 features: the covariance is singular",
        "`samples` holds 8 images for sFID's 2,023 features",
        "`reference` holds 6 images, precision and recall are published against 10,000",
        "KID is taken on subsets of 6 images",
        "are not those of the Inception of 2015",
    ):
        assert any(expected_note in note for note in notes), expected_note
    assert not any("no stored statistics" in note for note in notes)


@pytest.mark.slow
def test_statistics_of_the_images_where_none_are_stored(folder, features, inception_weights, monkeypatch):
    # The distance itself is tested elsewhere: which moments it is given is what matters here
    monkeypatch.setattr(command, "frechet_distance", lambda *moments: [float(np.sum(m)) for m in moments])
    results = evaluate_images(
        open_images(folder / "samples.npz"),
        open_images(folder / "reference.npz", "reference"),
        metrics=["fid", "sfid"],
        inception_weights=inception_weights,
        batch_size=4,
        cache_dir=folder / "cache",
    )
    for name, feature in (("fid", "pool"), ("sfid", "spatial")):
        moments = [
            *feature_statistics(features["samples"][feature]),
            *feature_statistics(features["reference"][feature]),
        ]
        assert results["metrics"][name] == [float(np.sum(m)) for m in moments]
        title = command.METRICS[name]
        assert any(f"`reference` has no stored statistics for {title}: those of its 6" in n for n in results["notes"])


def test_samples_that_follow_the_protocol_are_not_warned_of(tmp_path):
    class Protocol:
        count, size, notes, statistics = 50_000, (256, 256), [], {}

    class Virtual:
        count, size, notes, statistics = 10_000, (256, 256), [], {"pool": (), "spatial": ()}

    assert command._comparability_notes(Protocol, Virtual, command.DEFAULT_METRICS, command.PROTOCOL_DINOV2) == []


@pytest.mark.slow
def test_reference_of_statistics_alone(arguments, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "frechet_distance", lambda *moments: 1.0)  # of 2,048 features it takes seconds
    np.savez(folder / "statistics.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    with pytest.raises(ValueError, match=r"`metrics` 'kid' cannot be had: it needs 2 images, but `reference` holds 0"):
        main(arguments(reference=folder / "statistics.npz", metrics=["kid"]))
    main(arguments(reference=folder / "statistics.npz", metrics=None))
    results = read_results(tmp_path)
    assert set(results["metrics"]) == {"fid", "inception_score"}
    assert "not measured, for want of images: sFID, Precision, Recall, KID" in results["notes"]
    with pytest.raises(ValueError, match="`samples` .* holds statistics but no images"):
        main(arguments("--overwrite_output_dir", samples=folder / "statistics.npz"))


@pytest.mark.slow
def test_features_of_the_cache_are_used(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(InceptionFeatures, "__call__", lambda self, images: 1 / 0)
    main(arguments())
    with pytest.raises(ZeroDivisionError):
        main(arguments("--overwrite_output_dir", "--cache_dir", str(tmp_path / "other")))


@pytest.mark.slow
def test_fd_dinov2(arguments, folder, tmp_path):
    from diffusers_lsep.evaluation.dinov2 import DINOv2Features

    make_dinov2(image_size=224, patch_size=14, initializer_range=0.2).save_pretrained(tmp_path / "dinov2")
    main(arguments("--dinov2_model", str(tmp_path / "dinov2"), metrics=["fd_dinov2"]))
    results = read_results(tmp_path)
    extractor = DINOv2Features(str(tmp_path / "dinov2"))
    tokens = [extractor(make_images(count, seed))["class_token"] for count, seed in ((8, 0), (6, 1))]
    expected = compute_feature_metrics(*tokens, metrics=["fid"])["fid"]
    assert results["metrics"] == {"fd_dinov2": pytest.approx(expected, rel=1e-4)}
    assert results["dinov2"] == extractor.name and "inception" not in results
    assert any("FD-DINOv2 is published with facebook/dinov2-large, not" in note for note in results["notes"])


@pytest.mark.slow
def test_samples_of_a_folder_and_settings(arguments, features, folder, tmp_path):
    save_images(tmp_path, make_images(8))
    (folder / "samples.json").write_text(json.dumps({"seed": 3, "class_labels": "balanced over all classes"}))
    main(arguments())
    from_npz = read_results(tmp_path)
    (folder / "samples.json").unlink()
    main(arguments("--overwrite_output_dir", samples=tmp_path))
    from_folder = read_results(tmp_path)
    assert from_folder["metrics"] == from_npz["metrics"]
    assert from_npz["sampling"] == {"seed": 3, "class_labels": "balanced over all classes"}
    assert any("every class was drawn equally often" in note for note in from_npz["notes"])
    assert from_folder["sampling"] is None


@pytest.mark.slow
def test_reference_is_cut_by_resolution(arguments, folder, tmp_path):
    rng = np.random.default_rng(0)
    save_images(tmp_path / "photos", [rng.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8) for i in range(6)])
    with pytest.raises(ValueError, match="`reference` .* has to hold images of one size, but has 6 sizes"):
        main(arguments(reference=tmp_path / "photos"))
    main(arguments("--resolution", "8", reference=tmp_path / "photos"))
    assert read_results(tmp_path)["num_reference_images"] == 6


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"samples": None},
            [],
            "exactly one of `SAMPLES` and `--checkpoints` has to be given, but they are None and None",
        ),
        ({}, ["--checkpoints", "run"], "exactly one of `SAMPLES` and `--checkpoints` has to be given"),
        (
            {},
            ["--update_card", "nowhere"],
            "`--update_card` has to be the folder of a saved pipeline, but is 'nowhere'",
        ),
        (
            {"samples": None},
            ["--checkpoints", "run", "--update_card", "nowhere"],
            "`--update_card` needs `SAMPLES`: a card is about one model",
        ),
        (
            {"samples": None},
            ["--checkpoints", "nowhere"],
            "`checkpoints` has to be a folder with `checkpoint-N` folders",
        ),
        ({"samples": "absent.npz"}, [], "`samples` has to exist, but there is no file 'absent.npz'"),
        ({"reference": "absent/data"}, [], "`reference` has to be an .npz, a folder of images or a data set"),
        ({}, ["--inception_weights", "absent.pth"], "`inception_weights` has to be a file, but there is none at"),
    ],
)
def test_usage_errors(arguments, changes, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        main(arguments(*options, **changes))


def test_folders_that_cannot_be_written_are_refused_before_any_work(arguments, tmp_path):
    (tmp_path / "file").write_text("mine")
    for flag in ("--output_dir", "--cache_dir"):
        with pytest.raises(ValueError, match=f"`{flag}` .*file/a' cannot be written: .*file' is no such folder"):
            main(arguments(flag, str(tmp_path / "file" / "a"), samples="nowhere", reference="nowhere"))


def test_other_errors_before_any_work(arguments, folder, tmp_path, capsys):
    for options, message in (
        (["--metrics", "fidd"], "invalid choice: 'fidd'"),
        (["--batch_size", "0"], "has to be at least 1, but is 0"),
        (["--num_images", "0"], "has to be at least 1, but is 0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments(*options))
        assert f"argument {options[0]}: {message}" in capsys.readouterr().err
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((5, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="have to be of one size, but they are 16 x 16 and 8 x 8"):
        main(arguments(samples=tmp_path / "large.npz"))
    np.savez(tmp_path / "few.npz", arr_0=make_images(3))
    with pytest.raises(ValueError, match="'precision' cannot be had: it needs 4 images, but `samples` holds 3"):
        main(arguments(samples=tmp_path / "few.npz", metrics=["precision"]))
    samples = open_images(folder / "samples.npz")
    with pytest.raises(ValueError, match=r"`metrics` has to be some of .*, but is \['fidd'\]"):
        evaluate_images(samples, samples, metrics=["fidd"])
    with pytest.raises(ValueError, match="`metrics` has to be some of .*, but is none"):
        evaluate_images(samples, samples, metrics=[])
    with pytest.raises(ValueError, match="`batch_size` has to be at least 1, but is 0"):
        evaluate_images(samples, samples, batch_size=0)


def test_extras_that_are_missing_are_named(arguments, save_pipeline, tmp_path, monkeypatch):
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'diffusers_lsep\[eval\]'"):
        main(arguments())
    # matplotlib draws when the work is done, but is asked for before
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    save_pipeline(tmp_path / "run" / "checkpoint-1" / "pipeline")
    monkeypatch.setattr(LSEPPipeline, "__call__", lambda *args, **kwargs: pytest.fail("an image was drawn"))
    with pytest.raises(ImportError, match="eval_curves.png needs matplotlib: pip install"):
        main(arguments("--checkpoints", str(tmp_path / "run"), samples=None))
    out = ("--output_dir", str(tmp_path / "out"))
    with pytest.raises(ImportError, match="the heat map needs matplotlib: pip install"):
        main(["probe", str(tmp_path / "run" / "checkpoint-1" / "pipeline"), "--data", "nowhere", *out])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_results_are_replaced_only_on_request(arguments, tmp_path):
    main(arguments())
    (tmp_path / "out" / "eval_results.json").write_text("mine")
    with pytest.raises(
        ValueError, match=r"`--output_dir` already holds .*eval_results.json; `--overwrite_output_dir`"
    ):
        main(arguments())
    assert (tmp_path / "out" / "eval_results.json").read_text() == "mine"
    main(arguments("--overwrite_output_dir"))
    assert "kid" in read_results(tmp_path)["metrics"]


@pytest.fixture
def save_pipeline():
    def save(path, seed=0):
        config = {"in_channels": 1, "patch_size": 4, "num_layers": 1}
        make_pipeline(id2label={0: "zero"}, seed=seed, **config).save_pretrained(path)

    return save


def test_update_card(arguments, save_pipeline, tmp_path, caplog):
    from huggingface_hub import ModelCard

    save_pipeline(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nWritten by hand.\n")
    main(arguments("--update_card", str(tmp_path / "pipeline")))
    assert "do not say which weights drew them" in caplog.text
    results = read_results(tmp_path)
    transformer = LSEPPipeline.from_pretrained(tmp_path / "pipeline").transformer
    assert results["weights"] == {"transformer": hash_weights(transformer)}
    copy = json.loads((tmp_path / "pipeline" / "eval_results.json").read_text())
    assert copy == {**results, "samples": "samples.npz", "dataset": "reference.npz"}
    card = ModelCard.load(tmp_path / "pipeline" / "README.md")
    assert "Written by hand." in card.text and card.data.license == "mit"
    entries = {entry.metric_type: entry for entry in card.data.eval_results}
    assert entries["kid"].metric_value == results["metrics"]["kid"]
    assert entries["kid"].dataset_name == "reference.npz" and str(tmp_path) not in card.content


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_update_card_needs_the_samples_of_its_pipeline(arguments, save_pipeline, folder, tmp_path, caplog, dtype):
    """Where `samples.json` has the hashes of the weights, in the dtype in which they were loaded."""
    save_pipeline(tmp_path / "drew", seed=0)
    save_pipeline(tmp_path / "other", seed=1)
    transformer = LSEPPipeline.from_pretrained(tmp_path / "drew").transformer.to(getattr(torch, dtype))
    settings = {"weights": {"transformer": hash_weights(transformer)}, "class_labels": "random over all classes"}
    (folder / "samples.json").write_text(json.dumps(settings))
    try:
        with pytest.raises(
            ValueError, match=r"drew `SAMPLES`, but .* was drawn by other weights \(transformer\) than"
        ):
            main(arguments("--update_card", str(tmp_path / "other")))
        assert not (tmp_path / "out").exists() and not (tmp_path / "other" / "README.md").exists()
        main(arguments("--update_card", str(tmp_path / "drew")))
    finally:
        (folder / "samples.json").unlink()
    assert "do not say which weights drew them" not in caplog.text
    card = (tmp_path / "drew" / "README.md").read_text()
    assert "| KID |" in card and "The classes of the samples were drawn at random" in card


def test_update_card_of_samples_that_a_weaker_model_guided(arguments, save_pipeline, folder, tmp_path):
    save_pipeline(tmp_path / "drew")
    transformer = LSEPPipeline.from_pretrained(tmp_path / "drew").transformer
    weights = {"transformer": hash_weights(transformer), "guidance_transformer": "0" * 64}
    (folder / "samples.json").write_text(json.dumps({"weights": weights, "autoguidance_scale": 2.0}))
    try:
        main(arguments("--update_card", str(tmp_path / "drew")))
    finally:
        (folder / "samples.json").unlink()
    assert "| `sampling.autoguidance_scale` | `2.0` |" in (tmp_path / "drew" / "README.md").read_text()


@pytest.mark.parametrize("broken", ["card", "weights"])
def test_a_broken_pipeline_is_found_before_anything_is_written(arguments, save_pipeline, tmp_path, broken):
    save_pipeline(tmp_path / "drew")
    if broken == "card":
        (tmp_path / "drew" / "README.md").write_text("---\ntags: [\n---\n")
    else:
        path = tmp_path / "drew" / "transformer" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="metadata in YAML" if broken == "card" else "is damaged"):
        main(arguments("--update_card", str(tmp_path / "drew")))
    assert not (tmp_path / "out").exists() and not (tmp_path / "drew" / "eval_results.json").exists()


@pytest.mark.slow
def test_checkpoints(arguments, save_pipeline, features, folder, tmp_path, capsys):
    run = tmp_path / "run"
    for step in (200, 1000):
        save_pipeline(run / f"checkpoint-{step}" / "pipeline", seed=step)
    (run / "checkpoint-30" / "samples").mkdir(parents=True)
    (run / "checkpoint-30" / "samples" / "samples.npz").write_bytes((folder / "samples.npz").read_bytes())
    options = ("--checkpoints", str(run), "--num_images", "6", "--num_inference_steps", "2")
    precision = ("--dtype", "bfloat16", "--allow_tf32")
    main(arguments(*options, *precision, samples=None, metrics=["kid", "inception_score"]))

    entries = json.loads((tmp_path / "out" / "eval_results.json").read_text())["checkpoints"]
    assert [(entry["step"], entry["num_images"]) for entry in entries] == [(30, 8), (200, 6), (1000, 6)]
    expected = compute_feature_metrics(features["samples"]["pool"], features["reference"]["pool"], ["kid"])
    assert (entries[1]["sampling"]["dtype"], entries[1]["sampling"]["allow_tf32"]) == ("bfloat16", True)
    assert entries[0]["metrics"] == {**expected, "inception_score": entries[0]["metrics"]["inception_score"]}
    assert len({entry["metrics"]["kid"] for entry in entries}) == 3
    sampling = {"num_inference_steps": 2, "guidance_scale": 1.0, "label_sampling": "random", "seed": 0}
    assert sampling.items() <= entries[1]["sampling"].items()
    assert any("grey images, repeated" in note for note in entries[1]["notes"])
    assert "step 1000" in capsys.readouterr().out
    with PIL.Image.open(tmp_path / "out" / "eval_curves.png") as image:
        assert image.width > image.height
        colours = {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3)}
        assert len(colours) > 20

    (run / "checkpoint-1000" / "pipeline" / "model_index.json").unlink()
    with pytest.raises(ValueError, match="checkpoint-1000 has neither samples/samples.npz nor a pipeline"):
        main(arguments(*options, "--overwrite_output_dir", samples=None))


def test_drawn_samples_are_those_of_the_sampling_script(save_pipeline, load_example, tmp_path):
    save_pipeline(tmp_path / "pipeline")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    flags = ["--pretrained_model_name_or_path", tmp_path / "pipeline", "--num_images", 37, "--num_inference_steps", 3]
    others = ["--guidance_scale", 2.0, "--guidance_interval", 0.0, 0.5, "--label_sampling", "balanced", "--seed", 5]
    others += ["--batch_size", 5]
    options = {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.5), "label_sampling": "balanced", "seed": 5}
    for name, more, settings in (("default", [], {}), ("other", others, {**options, "batch_size": 5})):
        load_example("sample").main([*map(str, [*flags, "--output_dir", tmp_path / name, *more])])
        expected = np.load(tmp_path / name / "samples.npz")["arr_0"]
        samples = DrawnSamples(pipe, "samples", 37, num_inference_steps=3, **settings)
        # In the batches of another network, and in the shares of two processes
        for bounds in ((0, 37), (0, 16, 37)):
            batches = [list(samples.batches(*pair, 8)) for pair in zip(bounds, bounds[1:])]
            assert [len(batch) for batch in sum(batches, [])] == [8, 8, 8, 8, 5]
            np.testing.assert_array_equal(np.concatenate(sum(batches, [])), expected)
        assert any("every class is drawn equally often" in note for note in samples.notes) == (name == "other")
    assert expected.std() > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_drawn_samples_are_decoded_in_float32(tiny_transformer, tiny_vae_folder, dtype):
    """Also by a VAE that does not ask for it."""
    vae = AutoencoderKL.from_pretrained(tiny_vae_folder, force_upcast=False).to(dtype)
    pipe = LSEPPipeline(tiny_transformer(num_layers=1), FlowMatchSDEScheduler(), vae=vae)
    pipe.set_progress_bar_config(disable=True)
    samples = DrawnSamples(pipe, "samples", 6, num_inference_steps=2, batch_size=6)
    (images,) = samples.batches(0, 6, 6)
    generators = [make_generator(0, i) for i in range(6)]
    latents = pipe(choose_class_ids(6, 10), 2, generator=generators, output_type="latent").images
    with torch.no_grad():
        expected = copy.deepcopy(vae).float().decode(latents / vae.config.scaling_factor).sample
    expected = (255 * (expected / 2 + 0.5)).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(images, expected)
    assert vae.dtype == dtype


def test_drawn_samples_need_a_vae_where_there_are_latents(tiny_transformer):
    with pytest.raises(ValueError, match="`vae` is needed for images, .* 4 channels"):
        DrawnSamples(LSEPPipeline(tiny_transformer(), FlowMatchSDEScheduler()), "samples", 6)


def test_the_hash_of_drawn_samples_tells_settings_and_weights_apart(save_pipeline, tmp_path):
    def load(seed=0, scheduler=None):
        save_pipeline(tmp_path / f"pipeline-{seed}", seed=seed)
        pipe = DiffusionPipeline.from_pretrained(tmp_path / f"pipeline-{seed}")
        set_scheduler(pipe, scheduler)
        return pipe

    variants = [{}, {"seed": 1}, {"guidance_scale": 2.0}, {"guidance_interval": (0.0, 0.5)}, {"batch_size": 3}]
    variants += [{"label_sampling": "balanced"}, {"num_inference_steps": 3}, {"num_images": 6}]
    samples = [DrawnSamples(load(), "samples", **{"num_images": 5, **variant}) for variant in variants]
    samples += [DrawnSamples(load(1), "samples", 5), DrawnSamples(load(0, "ode"), "samples", 5)]
    samples += [DrawnSamples(load().to(torch.bfloat16), "samples", 5), DrawnSamples(load(), "s", 5, allow_tf32=True)]
    assert len({each.content_hash for each in samples}) == len(samples)
    assert DrawnSamples(load(), "another name", 5).content_hash == samples[0].content_hash


def test_table():
    table = format_table(
        {
            "a.npz": {"fid": 1.23456, "inception_score": 215.979, "kid": 0.00123, "kid_std": 0.0001},
            "step 10": {"fid": 10.0, "inception_score": 3.0, "kid": 0.1, "kid_std": 0.0},
        }
    )
    assert table.splitlines() == [
        "| samples | FID ↓   | Inception Score ↑ | KID ↓               |",
        "|---------|---------|-------------------|---------------------|",
        "| a.npz   | 1.2346  | 215.98            | 0.001230 ± 0.000100 |",
        "| step 10 | 10.0000 | 3.00              | 0.100000 ± 0.000000 |",
    ]


@pytest.mark.slow
def test_two_processes_give_the_same_features_and_results(arguments, features, folder, tmp_path, warm_python):
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys

from diffusers_lsep.cli import main
from diffusers_lsep.evaluation.features import process_state
from diffusers_lsep.evaluation.inception import InceptionFeatures


extract = InceptionFeatures.__call__


def extract_and_tell(self, images):
    print(f"process {process_state().process_index} of {process_state().num_processes}: {len(images)} images")
    return extract(self, images)


InceptionFeatures.__call__ = extract_and_tell
main(sys.argv[1:])
"""
    )
    main(arguments())
    alone = read_results(tmp_path)
    # 8 and 6 images in batches of 4: a batch for either process
    argv = arguments("--cache_dir", str(tmp_path / "cache"), "--overwrite_output_dir")
    command_line = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    finished = subprocess.run(
        [*command_line, *argv], env=environment, timeout=300, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    told = sorted(re.findall(r"process \d of 2: \d+ images", finished.stdout))  # which may come in one line
    assert told == [
        "process 0 of 2: 4 images",
        "process 0 of 2: 4 images",
        "process 1 of 2: 2 images",
        "process 1 of 2: 4 images",
    ]
    assert finished.stdout.count("KID ↓") == 1
    assert read_results(tmp_path) == alone
    files = list((tmp_path / "cache").rglob("*.npy"))
    assert len(files) == 2 * 3
    for path in files:
        np.testing.assert_array_equal(np.load(path), np.load(folder / path.relative_to(tmp_path)))
    assert not list((tmp_path / "cache").rglob("*.partial"))


class TestGenerationMetric:
    @pytest.fixture
    def metric(self, tmp_path):
        from diffusers_lsep.evaluation import GenerationMetric

        return GenerationMetric(cache_dir=str(tmp_path))

    @pytest.fixture
    def options(self, folder, features, inception_weights):
        return {"inception_weights": inception_weights, "cache_dir": folder / "cache", "batch_size": 4}

    @pytest.mark.slow
    def test_paths_give_the_command_s_numbers(self, metric, arguments, folder, options, tmp_path, monkeypatch):
        metrics = ["kid", "precision", "recall", "inception_score"]
        main(arguments(metrics=metrics))
        expected = read_results(tmp_path)["metrics"]
        paths = {"predictions": str(folder / "samples.npz"), "references": str(folder / "reference.npz")}
        assert metric.compute(**paths, metrics=metrics, **options) == expected
        lists = {name: [path] for name, path in paths.items()}
        assert metric.compute(**lists, metrics=metrics, **options) == expected

    @pytest.mark.slow
    def test_image_files(self, metric, arguments, options, tmp_path):
        files = {}
        for name, images in (("samples", make_images(8)), ("reference", make_images(6, seed=1))):
            files[name] = sorted(save_images(tmp_path / name, images).iterdir())
        main(arguments())
        result = metric.compute(
            predictions=files["samples"], references=files["reference"], metrics=["kid"], **options
        )
        assert result == read_results(tmp_path)["metrics"]

    def test_features(self, metric, features):
        pools = [features[name]["pool"][:, :16] for name in ("samples", "reference")]
        result = metric.compute(predictions=pools[0], references=pools[1])
        assert result == compute_feature_metrics(*pools)
        assert set(result) == {"fid", "precision", "recall", "kid", "kid_std"}
        assert set(metric.compute(predictions=pools[0], references=pools[1], metrics=["fid"])) == {"fid"}

    def test_rows_are_collected(self, metric, features):
        pools = [features[name]["pool"][:6, :16] for name in ("samples", "reference")]
        for start in (0, 4):
            metric.add_batch(predictions=pools[0][start : start + 4], references=pools[1][start : start + 4])
        assert metric.compute() == compute_feature_metrics(*pools)

    def test_errors(self, metric, features):
        pool = features["samples"]["pool"]
        with pytest.raises(ValueError, match="`predictions` and `references` have to be given both"):
            metric.compute(predictions=pool)
        with pytest.raises(ValueError, match="`predictions` and `references` have to be both files, or both features"):
            metric.compute(predictions=pool, references="reference.npz")
        with pytest.raises(ValueError, match=r"\['batch_size'\] cannot be used with features"):
            metric.compute(predictions=pool, references=pool, batch_size=3)
        with pytest.raises(ValueError, match=r"`metrics` of features has to be some of .*, but is \['sfid'\]"):
            metric.compute(predictions=pool, references=pool, metrics=["sfid"])
        with pytest.raises(ValueError, match="`features` has to be finite, but row 0 holds NaN"):
            metric.compute(predictions=np.full((5, 3), np.nan), references=pool[:, :3])
        with pytest.raises(ValueError, match="`features` has to hold at least 2 rows, but holds 0"):
            metric.compute(predictions=np.zeros((0, 3)), references=pool[:, :3])


@pytest.mark.slow
def test_nothing_heavy_is_imported_before_it_is_used():
    script = """
import sys

import diffusers_lsep.evaluation as evaluation

evaluation.frechet_distance
heavy = {"datasets", "evaluate", "matplotlib", "torch_fidelity"} & set(sys.modules)
print(*heavy)
evaluation.open_images, evaluation.evaluate_images, evaluation.InceptionFeatures, evaluation.DINOv2Features
print(*{"evaluate", "matplotlib", "torch_fidelity"} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
