# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest
from diffusers import DPMSolverMultistepScheduler
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_lsep import FlowMatchHeunODEScheduler, FlowMatchSDEScheduler, LSEPPipeline
from diffusers_lsep.evaluation.evaluate import METRICS
from diffusers_lsep.model_card import METRIC_NAMES, Gallery, merge_model_cards, update_evaluation, write_model_card


RESULTS = {"metrics": {"fid": 5.7, "inception_score": 120.0}, "dataset": "ImageNet", "num_images": 50000}


@pytest.fixture
def save(tiny_transformer, tmp_path):
    """Saves a tiny pipeline."""

    def save(variant=None, id2label=None, **config):
        pipe = LSEPPipeline(tiny_transformer(**config), FlowMatchSDEScheduler(), id2label=id2label)
        pipe.save_pretrained(tmp_path / "sit-tiny", variant=variant)
        return tmp_path / "sit-tiny"

    return save


def read(folder):
    return ModelCard.load(folder / "README.md")


def test_metadata(save):
    folder = save()
    card = ModelCard.load(
        write_model_card(folder, license="mit", dataset="ylecun/mnist", base_model="lsep/base", repo_id="lsep/tiny")
    )
    assert card.data.to_dict() == {
        "license": "mit",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["class-conditional", "sit", "lsep", "arxiv:2509.21565"],
        "datasets": ["ylecun/mnist"],
        "base_model": "lsep/base",
    }


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
    assert "| 1 | 7 | 1 |\n| 2 | cat | 2 |" in text


def test_metrics_become_a_model_index(save):
    folder = save()
    (folder / "eval_results.json").write_text(json.dumps(RESULTS))
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
        (folder / "eval_results.json").write_text(json.dumps({**RESULTS, "metrics": {"fid": fid}}))
        update_evaluation(folder)
    after = read(folder)
    assert [result.metric_value for result in after.data.eval_results] == [5.7]
    assert after.text.startswith(before.text.rstrip())
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
    write_model_card(folder, license="mit", sampling={"guidance_scale": 2.5})
    card = read(folder)
    assert "My own words." in card.text
    assert "guidance_scale=2.5" in card.text
    assert "| `seed` | `3` |" in card.text  # known from before
    assert "No licence has been declared" not in card.text
    assert card.text.count("## Usage") == 1
    assert card.data.language == "en"
    assert card.data.tags == ["mine", "class-conditional", "sit", "lsep", "arxiv:2509.21565"]


def test_leaves_the_text_of_a_card_that_is_not_ours(save):
    folder = save()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nWords.\n")
    write_model_card(folder)
    assert read(folder).text == "# Mine\n\nWords.\n"
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
        ({"source": "dit"}, r"`source` has to be one of \['lsep', 'repa', 'sit'\], but is 'dit'"),
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
    (folder / "eval_results.json").write_text(json.dumps({"metrics": values, "dataset": "ImageNet"}))
    card = ModelCard.load(update_evaluation(folder))
    names = {result.metric_type: result.metric_name for result in card.data.eval_results}
    assert names == {**METRICS, "kid_std": "KID, standard deviation over its subsets"} == METRIC_NAMES
    for name, title in names.items():
        assert f"| {title} | {values[name]:.4g} |" in card.text and f"| {name} |" not in card.text


def test_settings_and_notes_of_an_evaluation_are_readable(save):
    folder = save()
    results = {**RESULTS, "sampling": {"seed": 0, "variant": None}, "notes": ["`samples` holds 5 images", "grey"]}
    (folder / "eval_results.json").write_text(json.dumps(results))
    text = ModelCard.load(update_evaluation(folder)).text
    assert "| `sampling.seed` | `0` |" in text and "variant" not in text and "| `num_images` | `50000` |" in text
    assert "\n\n- `samples` holds 5 images\n- grey\n" in text and "`notes`" not in text


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
