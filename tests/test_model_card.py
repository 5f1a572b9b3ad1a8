# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import argparse
import importlib.metadata
import json
import re
import shutil
import types

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.utils import logging
from huggingface_hub import ModelCard
from PIL import Image
from tiny_models import make_pipeline

from diffusers_lsep import FlowMatchHeunODEScheduler, FlowMatchSDEScheduler, LSEPPipeline
from diffusers_lsep.evaluation.protocol import METRICS
from diffusers_lsep.files import hash_weights
from diffusers_lsep.hub.gallery import Gallery
from diffusers_lsep.hub.model_card import (
    METRIC_NAMES,
    merge_model_cards,
    update_evaluation,
    write_model_card,
)
from diffusers_lsep.hub.push import bring_card
from diffusers_lsep.hub.remote_code import add_code
from diffusers_lsep.hub.saved_pipeline import SavedPipeline
from diffusers_lsep.training.results import describe_hardware, describe_training


RESULTS = {"metrics": {"fid": 5.7, "inception_score": 120.0}, "dataset": "ImageNet", "num_images": 50000}


@pytest.fixture
def save(tiny_transformer, tmp_path):
    """Saves a tiny pipeline."""

    def save(variant=None, id2label=None, max_shard_size="10GB", **config):
        pipe = make_pipeline(id2label=id2label, **config)
        pipe.save_pretrained(tmp_path / "sit-tiny", variant=variant, max_shard_size=max_shard_size)
        return tmp_path / "sit-tiny"

    return save


def write_results(folder, weights=None, **results):
    """Results of the weights in the folder, as `evaluate --update_card` writes them."""
    weights = SavedPipeline(folder).hashes if weights is None else weights
    (folder / "eval_results.json").write_text(json.dumps({**RESULTS, "weights": weights, **results}))


@pytest.fixture
def warnings(caplog):
    """What the library of diffusers logs."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def read(folder):
    return ModelCard.load(folder / "README.md")


def test_metadata(save):
    folder = save()
    card = ModelCard.load(
        write_model_card(
            folder, license="mit", source="lsep", dataset="ylecun/mnist", base_model="lsep/base", repo_id="lsep/tiny"
        )
    )
    assert card.data.to_dict() == {
        "license": "mit",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["class-conditional", "sit", "lsep", "arxiv:2509.21565"],
        "datasets": ["ylecun/mnist"],
        "base_model": "lsep/base",
    }


def test_claims_no_method_by_itself(save):
    card = ModelCard.load(write_model_card(save()))
    assert card.data.tags == ["class-conditional", "sit"]
    assert "Trained" not in card.text and "## Citation" not in card.text


def test_a_card_that_knows_the_method_keeps_it(save):
    folder = save()
    known = ModelCard.load(write_model_card(folder, source="sit"))
    (folder / "README.md").unlink()
    unknown = ModelCard.load(write_model_card(folder))
    merged = merge_model_cards(known, unknown)
    assert "not trained with LSEP" in merged.text and "arxiv:2401.08740" in merged.data.tags
    of_others = re.sub(r'("weights": {"transformer": ")\w+', r"\1other", unknown.content)
    replaced = merge_model_cards(merged, ModelCard(of_others))
    assert "not trained with LSEP" not in replaced.text and "arxiv:2401.08740" not in replaced.data.tags
    unknown.text = unknown.text.replace("| Classes |", "| Classes | renamed")
    assert "| Classes | renamed" in merge_model_cards(known, unknown).text


@pytest.mark.parametrize("with_code", [False, True])
def test_the_card_goes_along_with_the_pipeline_that_was_loaded(save, tmp_path, with_code):
    folder = save()
    Image.new("RGB", (8, 4)).save(folder / "grid.png")
    sampling = {"num_inference_steps": 7, "guidance_scale": 1.5}
    write_model_card(folder, source="sit", gallery=Gallery("grid.png", [1], [1]), sampling=sampling)
    pipe = DiffusionPipeline.from_pretrained(folder)
    for name in ("same", "other"):
        pipe.save_pretrained(tmp_path / name)
        if with_code:
            add_code(tmp_path / name)
        bring_card(folder, tmp_path / name, "somebody/digits")
        assert (tmp_path / name / "grid.png").is_file() == (name == "same")
        pipe.scheduler = FlowMatchHeunODEScheduler.from_config(pipe.scheduler.config)
    card = ModelCard.load(tmp_path / "same" / "README.md")
    assert "not trained with LSEP" in card.text and "grid.png" in card.text
    assert "    num_inference_steps=7,\n    guidance_scale=1.5,\n" in card.text
    assert ("trust_remote_code=True" in card.text) == with_code != ("import diffusers_lsep" in card.text)
    assert ("# digits" in card.text) == with_code and "arxiv:2401.08740" in card.data.tags
    assert not (tmp_path / "other" / "README.md").exists()
    bring_card("your-name/your-model", tmp_path / "other", "somebody/digits")


def test_a_card_that_cannot_be_brought_is_left(save, tmp_path, warnings):
    folder = save()
    (tmp_path / "elsewhere.md").write_text("---\n---\n")
    DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    (folder / "README.md").symlink_to(tmp_path / "elsewhere.md")  # as in the Hub's cache
    bring_card(folder, tmp_path / "saved", "somebody/digits")
    assert "is left there: " in warnings.text and not (tmp_path / "saved" / "README.md").exists()


def test_claims_no_licence_by_itself(save):
    card = ModelCard.load(write_model_card(save()))
    assert card.data.license is None
    assert "license" not in card.content.split("---")[1]
    assert "No licence has been declared" in card.text


def test_describes_the_pipeline(save):
    folder = save(num_classes=1000, in_channels=3)
    text = ModelCard.load(write_model_card(folder, source="repa")).text
    count = sum(parameter.numel() for parameter in LSEPPipeline.from_pretrained(folder).transformer.parameters())
    assert f"SiT with 2 blocks of width 32, patch size 2, {count:,} parameters" in text
    assert "8 × 8 pixels, directly on pixels" in text
    assert "| Classes | 1,000 |" in text
    assert "not trained with LSEP" in text
    assert "| `diffusion_form` | `linear` |" in text
    assert not re.search(r"TODO|More Information Needed|\[optional\]|\{\{|None", text)


def test_a_config_that_leaves_values_to_their_defaults(save):
    folder = save(num_classes=1000)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    del config["num_classes"]
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    assert "| Classes | 1,000 |" in ModelCard.load(write_model_card(folder)).text


def test_names_of_classes_are_shown_as_they_are(save):
    folder = save(num_classes=2, id2label={0: "<script>x</script>", 1: "a|b *c* [d](e)\nf"})
    text = ModelCard.load(write_model_card(folder)).text
    assert r"| Classes | 2: &lt;script&gt;x&lt;/script&gt;, a\|b \*c\* \[d\](e) f |" in text


def test_names_that_are_no_text_become_question_marks(save):
    folder = save(num_classes=2, id2label={0: "cat", 1: "dog"})
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"dog"', r'"d\ud800g"'))
    write_model_card(folder)
    assert "d?g" in read(folder).text


def test_names_the_preset(save):
    folder = save(num_layers=12, num_attention_heads=6, attention_head_dim=64, patch_size=4)
    assert "SiT-S/4, " in ModelCard.load(write_model_card(folder)).text


def test_training_flags_without_secrets(save):
    flags = {"learning_rate": 1e-4, "hub_token": "hf_secret", "resume": None, "crop|size": "12"}
    text = ModelCard.load(write_model_card(save(), training_args=flags)).text
    assert "| `learning_rate` | `0.0001` |" in text
    assert "| `crop\\|size` | `12` |" in text
    assert "hf_secret" not in text and "resume" not in text


def test_gallery_names_its_seeds(save):
    folder = save()
    Image.new("RGB", (8, 4)).save(folder / "grid.png")
    text = ModelCard.load(write_model_card(folder, gallery=Gallery("grid.png", [7, "cat"], [1, 2]))).text
    assert "![Generated images](grid.png)" in text
    assert "Classes, row by row: 7, cat. Each image has a generator of its own, with the seeds 1, 2." in text
    rows = Gallery("grid.png", ["a", "b", "a", "b", "a", "b"], [3, 4, 5, 6, 7, 8])
    text = ModelCard.load(write_model_card(folder, gallery=rows, training_facts=["Data: cats."])).text
    assert "row by row: a, b; 3 times. Each image" in text and "the seeds 3 to 8." in text
    assert "| Classes | 10 |" in text or "| Classes | 10: " in text


def test_what_is_known_of_a_training(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Cats, 8x8\nmany\n")
    lines = [
        {"step": 10, "seconds_per_step": 30.0},
        {"step": 20, "seconds_per_step": 6.0, "validation_probe_accuracy": None},
        {"step": 20, "validation_denoising_loss": 0.41237, "validation_probe_accuracy": 0.59166},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = argparse.Namespace(train_data_dir=str(tmp_path / "data"), max_train_steps=20)
    data, length, held_out = describe_training(tmp_path, args, samples_per_step=4, num_images=40, hardware="a CPU")
    assert data == "Data: Cats, 8x8 (licence: cc-by-4.0)."
    assert length == "Length: 20 steps of 4 images (2.0 passes) in 6 minutes on a CPU."
    assert "after 20 steps: denoising loss 0.4124, accuracy of the probe 0.592 (mean over all times" in held_out
    args = argparse.Namespace(train_data_dir=None, max_train_steps=20)
    assert describe_training(tmp_path / "data", args, 4, 40, "a CPU") == ["Length: 20 steps of 4 images (2.0 passes)."]


@pytest.mark.parametrize(
    ("device", "processes", "expected"),
    [("cpu", 1, "a CPU"), ("cpu", 2, "CPUs, in 2 processes"), ("mps", 1, "MPS"), ("cuda", 8, "8 x H200")],
)
def test_hardware_is_that_of_all_processes(monkeypatch, device, processes, expected):
    """And what accelerate trains on, whatever else is in the machine."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    accelerator = types.SimpleNamespace(device=torch.device(device), num_processes=processes)
    assert describe_hardware(accelerator) == expected


def test_metrics_become_a_model_index(save):
    folder = save()
    write_results(folder)
    card = ModelCard.load(write_model_card(folder, repo_id="lsep/tiny"))
    assert card.data.model_name == "tiny"
    assert {(r.metric_type, r.metric_name, r.metric_value, r.dataset_name) for r in card.data.eval_results} == {
        ("fid", "FID", 5.7, "ImageNet"),
        ("inception_score", "Inception Score", 120.0, "ImageNet"),
    }
    assert "| FID | 5.7 |" in card.text
    assert "| `num_images` | `50000` |" in card.text


def test_update_evaluation_touches_nothing_else(save):
    folder = save()
    write_model_card(folder, license="mit", sampling={"guidance_scale": 1.8}, training_args={"seed": 3})
    before = read(folder)
    for fid in (9.9, 5.7):
        write_results(folder, metrics={"fid": fid})
        update_evaluation(folder)
    after = read(folder)
    assert [result.metric_value for result in after.data.eval_results] == [5.7]
    assert after.text.startswith(before.text.partition("<!-- diffusers_lsep facts")[0].rstrip())
    assert after.text.count("## Evaluation") == 1
    assert after.data.license == "mit"


def test_update_evaluation_needs_results(save):
    with pytest.raises(ValueError, match="`folder` has to hold eval_results.json, but there is none in"):
        update_evaluation(save())


@pytest.mark.parametrize("content", ["{", "[]", '{"fid": 3}', '{"metrics": {"fid": "low"}}'])
def test_refuses_broken_results(save, content):
    folder = save()
    (folder / "eval_results.json").write_text(content)
    with pytest.raises(ValueError, match=r"eval_results.json has to be a JSON object with numbers under `metrics`"):
        write_model_card(folder)
    assert not (folder / "README.md").exists()


def test_writing_again_keeps_what_was_written_by_hand(save):
    folder = save()
    path = write_model_card(folder, training_args={"seed": 3})
    path.write_text(path.read_text().replace("tags:", "language: en\ntags:\n- mine") + "\nMy own words.\n")
    write_model_card(folder, license="mit", source="lsep", sampling={"guidance_scale": 2.5})
    card = read(folder)
    assert "\n\nMy own words.\n" in card.text
    assert "guidance_scale=2.5" in card.text
    assert "`seed`" not in card.text  # not known now
    assert "No licence has been declared" not in card.text
    assert card.text.count("## Usage") == 1
    assert card.data.language == "en"
    assert card.data.tags == ["mine", "class-conditional", "sit", "lsep", "arxiv:2509.21565"]


def test_leaves_the_text_of_a_card_that_is_not_ours(save):
    folder = save()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nWords.\n")
    write_model_card(folder)
    assert re.fullmatch(r"# Mine\n\nWords\.\n\n<!-- diffusers_lsep facts: .* -->\n", read(folder).text)
    assert read(folder).data.license == "mit"
    assert read(folder).data.library_name == "diffusers"


@pytest.mark.parametrize(
    ("options", "result"),
    [
        ({"in_channels": 3, "id2label": {i: f"n{i}, same" for i in range(10)}}, "png"),
        ({"in_channels": 1, "variant": "fp16"}, "png"),
        ({"in_channels": 4}, "latents"),
    ],
)
def test_code_runs_as_written(save, options, result, tmp_path, monkeypatch, capsys):
    folder = save(**options)
    text = ModelCard.load(write_model_card(folder, sampling={"num_inference_steps": 2})).text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert code.startswith("import diffusers_lsep")
    assert ('["n0", "n5"]' in code) == ("id2label" in options)
    assert ('variant="fp16"' in code) == ("variant" in options)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    if result == "png":
        assert Image.open("image_1.png").size == (8, 8)
    else:
        assert "torch.Size([2, 4, 8, 8])" in capsys.readouterr().out
        assert "the repository has no VAE" in text


def test_refuses_what_is_no_pipeline_of_this_package(save):
    folder = save()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "DiTPipeline"}))
    with pytest.raises(ValueError, match="`folder` has to hold a saved LSEPPipeline, but .* holds a DiTPipeline"):
        write_model_card(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(
        ValueError, match="`folder` has to hold a saved LSEPPipeline, but there is no model_index.json"
    ):
        write_model_card(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "dit"}, r"`source` has to be one of \['lsep', 'repa', 'sit', 'training'\], but is 'dit'"),
        ({"source": "training"}, "`source` is 'training', so `training_args` has to be given, but is None"),
        ({"gallery": Gallery("none.png", [1], [1])}, "`gallery` names 'none.png', but there is no such file"),
        ({"gallery": Gallery("model_index.json", [1], [])}, "one seed per image, but has 0 seeds for 1 images"),
    ],
)
def test_refuses_wrong_facts(save, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_model_card(save(), **arguments)


def test_sampler_is_described_by_its_own_settings(save):
    folder = save()
    scheduler = FlowMatchSDEScheduler.from_pretrained(folder, subfolder="scheduler")
    assert "| `diffusion_form` | `linear` |" in ModelCard.load(write_model_card(folder)).text
    for scheduler_class in (FlowMatchHeunODEScheduler, DPMSolverMultistepScheduler):
        pipe = LSEPPipeline.from_pretrained(folder, scheduler=scheduler_class.from_config(scheduler.config))
        pipe.save_pretrained(folder)
        text = ModelCard.load(write_model_card(folder)).text
        assert f"| scheduler | `{scheduler_class.__name__}` |" in text and "| `num_train_timesteps` | `1000` |" in text
        assert "diffusion_form" not in text and ("solver_order" in text) == (
            scheduler_class is DPMSolverMultistepScheduler
        )


def test_every_metric_of_the_evaluation_has_its_name(save):
    folder = save()
    values = {name: 1.0 + i for i, name in enumerate([*METRICS, "kid_std"])}
    write_results(folder, metrics=values)
    card = ModelCard.load(update_evaluation(folder))
    names = {result.metric_type: result.metric_name for result in card.data.eval_results}
    assert names == {**METRICS, "kid_std": "KID, standard deviation over its subsets"} == METRIC_NAMES
    for name, title in names.items():
        assert f"| {title} | {values[name]:.4g} |" in card.text and f"| {name} |" not in card.text


def test_settings_and_notes_of_an_evaluation_are_readable(save):
    folder = save()
    sampling = {"seed": 0, "variant": None, "weights": {"transformer": "0123"}}
    write_results(folder, sampling=sampling, notes=["`samples` holds 5 images", "grey"])
    text = ModelCard.load(update_evaluation(folder)).text
    assert "| `sampling.seed` | `0` |" in text and "variant" not in text and "| `num_images` | `50000` |" in text
    assert "\n\n- `samples` holds 5 images\n- grey\n" in text
    evaluation = text.partition("## Evaluation")[2]
    assert "`notes`" not in evaluation and "weights`" not in evaluation and "0123" not in evaluation


@pytest.mark.parametrize(
    ("sampling", "sentence"),
    [
        ({"class_labels": "random over all classes"}, "The classes of the samples were drawn at random"),
        ({"label_sampling": "random"}, "The classes of the samples were drawn at random"),
        (
            {"class_labels": "balanced over all classes"},
            "every class was drawn equally often, which gives a lower FID",
        ),
        ({"label_sampling": "balanced"}, "every class was drawn equally often, which gives a lower FID"),
        ({"class_labels": "no class"}, "The samples were drawn without classes"),
        ({"label_sampling": "none"}, "The samples were drawn without classes"),
        ({"class_labels": ["3", "7"]}, "How the classes of the samples were chosen is not recorded"),
        (None, "How the classes of the samples were chosen is not recorded"),
    ],
)
def test_evaluation_says_how_classes_were_drawn(save, sampling, sentence):
    folder = save()
    write_results(folder, sampling=sampling)
    assert sentence in ModelCard.load(update_evaluation(folder)).text


# --- What is about other weights


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_weights_are_hashed_from_their_files(save, max_shard_size):
    folder = save(max_shard_size=max_shard_size)
    assert (len(list((folder / "transformer").glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    transformer = LSEPPipeline.from_pretrained(folder).transformer
    saved = SavedPipeline(folder)
    assert saved.hashes == {"transformer": hash_weights(transformer)}
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert saved.find_differences({"transformer": hash_weights(transformer.to(dtype)), "vae": None}) == []
    assert saved.find_differences({"transformer": "0123", "vae": "4567"}) == ["transformer", "vae"]


@pytest.mark.parametrize("weights", [{"transformer": "0123"}, {}])
def test_metrics_of_other_weights_are_left_out(save, warnings, weights):
    """Those without a hash, of an older version, as well."""
    folder = save()
    write_results(folder, weights)
    if not weights:
        (folder / "eval_results.json").write_text(json.dumps(RESULTS))
    card = ModelCard.load(write_model_card(folder))
    assert card.data.eval_results is None and "## Evaluation" not in card.text
    assert "is of other weights than those" if weights else "does not say that it is of the weights" in warnings.text

    # A card that has them already
    write_results(folder)
    update_evaluation(folder)
    assert read(folder).data.eval_results and "## Evaluation" in read(folder).text
    write_results(folder, {"transformer": "0123"})
    card = ModelCard.load(update_evaluation(folder))
    assert card.data.eval_results is None and "## Evaluation" not in card.text and "## Usage" in card.text


def test_a_new_card_says_nothing_of_the_old_weights(save):
    folder = save()
    write_results(folder)
    Image.new("RGB", (8, 4)).save(folder / "grid.png")
    facts = {"license": "mit", "dataset": "ylecun/mnist", "base_model": "lsep/base", "training_args": {"seed": 3}}
    path = write_model_card(folder, source="lsep", gallery=Gallery("grid.png", [7], [1]), **facts)
    text = path.read_text().replace("tags:", "language: en\ntags:\n- mine").replace("## Usage", "## Usage\n\nWords")
    path.write_text(text + "\nMy own words.\n")

    write_results(folder, {"transformer": "0123"})
    write_model_card(folder, source="sit")
    card = read(folder)
    assert card.data.to_dict() == {
        "language": "en",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["mine", "class-conditional", "sit", "arxiv:2401.08740"],
    }
    for old in ("5.7", "mnist", "lsep/base", "grid.png", "`seed`", "mit", "Trained with LSEP", "yun2025lsep"):
        assert old not in card.text
    assert "My own words." in card.text and "No licence has been declared" in card.text
    assert card.text.index("# sit-tiny") < card.text.index("## Usage") < card.text.index("My own words.")


def test_metadata_that_somebody_changed_stays(save):
    folder = save()
    path = write_model_card(folder, dataset="ylecun/mnist")
    text = path.read_text().replace("- ylecun/mnist", "- my/digits")
    path.write_text(text.replace("\nlibrary_name", "\nlicense: mit\nlibrary_name"))
    write_model_card(folder)
    assert read(folder).data.license == "mit" and read(folder).data.datasets == ["my/digits"]
    assert "No licence has been declared" not in read(folder).text


def test_metrics_in_a_card_of_somebody_else_go_with_the_weights(save):
    """They are the one thing that is generated in it."""
    folder = save()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nWords.\n")
    write_results(folder)
    update_evaluation(folder)
    assert [result.metric_type for result in read(folder).data.eval_results] == ["fid", "inception_score"]
    write_results(folder, {"transformer": "0123"})
    write_model_card(folder)
    card = read(folder)
    assert card.data.eval_results is None and card.data.license == "mit" and "Words." in card.text


def test_update_evaluation_replaces_a_card_of_other_weights(save):
    folder = save()
    path = write_model_card(folder, license="mit", training_args={"seed": 3})
    path.write_text(path.read_text() + "\nMy own words.\n")
    save(num_classes=5)
    write_results(folder)
    card = ModelCard.load(update_evaluation(folder))
    assert card.data.license is None and "`seed`" not in card.text and "My own words." in card.text
    assert "| Classes | 5 |" in card.text and "| FID | 5.7 |" in card.text


def test_merging_forgets_what_was_about_other_weights(save):
    def card(**config):
        folder = save(**config)
        write_results(folder)
        path = write_model_card(folder, license="mit", training_args={"seed": 3})
        on_hub = ModelCard(path.read_text() + "\nWritten on the Hub.\n")
        shutil.rmtree(folder)
        return on_hub

    old, same = card(), card()
    new = ModelCard.load(write_model_card(save(num_classes=5)))
    merged = merge_model_cards(old, new)
    assert merged.data.license is None and merged.data.eval_results is None
    assert "`seed`" not in merged.text and "5.7" not in merged.text and "Written on the Hub." in merged.text
    shutil.rmtree(save())
    merged = merge_model_cards(same, ModelCard.load(write_model_card(save())))
    assert merged.data.license == "mit" and len(merged.data.eval_results) == 2
    assert "| `seed` | `3` |" in merged.text and "| FID | 5.7 |" in merged.text


def test_card_of_an_older_version(save):
    """It has no facts: all that such a version generated counts as generated."""
    folder = save()
    path = write_model_card(folder, license="mit", dataset="ylecun/mnist", training_args={"seed": 3})
    path.write_text(re.sub("<!-- diffusers_lsep facts.*", "My own words.", path.read_text()))
    before = path.read_text()
    write_results(folder)
    card = ModelCard.load(update_evaluation(folder))
    assert card.data.license == "mit" and "| `seed` | `3` |" in card.text and "| FID | 5.7 |" in card.text
    path.write_text(before)
    write_model_card(folder)
    card = read(folder)
    assert card.data.license is None and card.data.datasets is None and "`seed`" not in card.text
    assert "My own words." in card.text


# --- What the flags of a training come to


@pytest.mark.parametrize(
    ("flags", "base_model", "said", "tags"),
    [
        ({}, None, ["Trained with LSEP", "no external encoder takes part."], ["lsep", "arxiv:2509.21565"]),
        (
            {"repa_encoder": "facebook/dinov2-base"},
            None,
            ["Trained with LSEP", "beside it, REPA", "of an external encoder, `facebook/dinov2-base`."],
            ["lsep", "arxiv:2509.21565", "arxiv:2410.06940"],
        ),
        (
            {"repa_encoder": "facebook/dinov2-base", "no_lsep": True},
            None,
            ["Trained with REPA", "without LSEP's probe", "of an external encoder, `facebook/dinov2-base`."],
            ["arxiv:2410.06940"],
        ),
        (
            {"no_lsep": True},
            None,
            ["Trained as a plain SiT", "neither LSEP's probe nor an external encoder takes part."],
            ["arxiv:2401.08740"],
        ),
        (
            {},
            "lsep/base",
            ["Fine-tuned with LSEP", "takes part in the fine-tuning.", "Fine-tuned from [lsep/base](https://hug"],
            ["lsep", "arxiv:2509.21565"],
        ),
        (
            {"lora_rank": 8, "no_lsep": True},
            "FOLDER/start",
            ["Fine-tuned through LoRA layers of rank 8, which are merged into the weights, as a plain SiT", "`start`"],
            ["arxiv:2401.08740"],
        ),
    ],
)
def test_sentences_derive_from_the_flags(save, tmp_path, flags, base_model, said, tags):
    folder = save()
    (tmp_path / "start").mkdir()
    base_model = base_model and base_model.replace("FOLDER", str(tmp_path))
    flags = {"no_lsep": False, "repa_encoder": None, "lora_rank": None, **flags}
    flags |= {"probe_depth": 1, "crop_size_min": 2, "repa_weight": 0.5}
    card = ModelCard.load(write_model_card(folder, source="training", base_model=base_model, training_args=flags))
    for sentence in said:
        assert sentence in card.text
    assert card.data.tags == ["class-conditional", "sit", *tags]
    assert card.data.base_model == ("lsep/base" if base_model == "lsep/base" else None)
    assert "checkpoint" not in card.text and str(tmp_path) not in card.content
    assert ("no external encoder" in card.text or "nor an external encoder" in card.text) == (
        not flags["repa_encoder"]
    )
    assert ("`repa_weight`" in card.text) == bool(flags["repa_encoder"])
    for text in ("`probe_depth`", "`crop_size_min`"):
        assert (text in card.text) == (not flags["no_lsep"])
    assert ("yun2025lsep" in card.text) == (not flags["no_lsep"])


def test_paths_lose_their_folders(save, tmp_path, monkeypatch):
    folder = save()
    for name in ("my-images", "dino"):
        (tmp_path / "data" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write_results(
        folder,
        dataset="/home/me/reference.npz",
        samples="data/my-images (train)",
        notes=["FD-DINOv2 is published with facebook/dinov2-large, not /home/me/models/dino"],
    )
    flags = {"no_lsep": False, "train_data_dir": str(tmp_path / "data" / "my-images"), "preset": "SiT-XL/2"}
    flags |= {"repa_encoder": "data/dino"}
    card = ModelCard.load(write_model_card(folder, source="training", dataset="data/my-images", training_args=flags))
    assert str(tmp_path) not in card.content and "/home/me" not in card.content and "data/" not in card.content
    assert card.data.datasets is None and {result.dataset_name for result in card.data.eval_results} == {
        "reference.npz"
    }
    for row in ("| `train_data_dir` | `my-images` |", "`preset` | `SiT-XL/2`", "`samples` | `my-images (train)`"):
        assert row in card.text
    assert "of an external encoder, `dino`" in card.text and "facebook/dinov2-large, not dino" in card.text
    assert 'from_pretrained("sit-tiny")' in card.text


def test_merging_prefers_the_text_that_was_written_by_hand(save):
    folder = save()
    path = write_model_card(folder, license="mit")
    generated = path.read_text()
    on_hub = ModelCard(generated.replace("tags:", "tags:\n- from-the-hub") + "\nWritten on the Hub.\n")

    merged = merge_model_cards(on_hub, ModelCard(generated))
    assert "Written on the Hub." in merged.text
    assert merged.data.tags[0] == "from-the-hub"

    merged = merge_model_cards(on_hub, ModelCard(generated + "\nWritten here.\n"))
    assert "Written here." in merged.text and "Written on the Hub." not in merged.text


def test_where_to_install_from(save, monkeypatch):
    """The address that setup.py has: it is in the metadata of the package, as soon as there is one."""
    assert "git+" not in write_model_card(save()).read_text()
    known = importlib.metadata.metadata("diffusers_lsep")
    known["Project-URL"] = "Repository, https://example.org/diffusers_lsep"
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: known)
    card = write_model_card(save()).read_text()
    assert "`pip install git+https://example.org/diffusers_lsep` installs the package. The import comes first" in card
