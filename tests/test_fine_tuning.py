# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Training that starts from a saved pipeline, whole or through LoRA."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from client_process import run_client
from diffusers import AutoencoderKL, DiffusionPipeline
from hub_server import HubServer
from huggingface_hub import ModelCard
from image_folders import save_class_folders
from safetensors.torch import load_file
from tiny_models import make_pipeline

from diffusers_lsep import FlowMatchSDEScheduler, LinearProbe, LSEPPipeline, SiTTransformer2DModel
from diffusers_lsep.hub.model_card import write_lora_card
from diffusers_lsep.lora_pipeline import replace_classes
from diffusers_lsep.training.fine_tuning import LORA_TARGETS, add_lora, merge_lora, read_pretrained


NAMES = ["ant", "bee", "cow"]
# Flags of a run; the pipeline says what the model is.
SHORT = [
    *("--train_batch_size", "4", "--max_train_steps", "4", "--checkpointing_steps", "2", "--logging_steps", "1"),
    *("--validation_steps", "100", "--validation_inference_steps", "2", "--num_validation_images", "1"),
    *("--num_cpu_threads", "1", "--report_to", "none", "--probe_depth", "1", "--ema_decay", "0.9"),
]


def make_images(folder: Path, names: list[str], size: int = 8) -> Path:
    return save_class_folders(folder, names, [(size, size)] * (2 * len(names)))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of three classes, and of two."""
    folder = tmp_path_factory.mktemp("images")
    return make_images(folder / "three", NAMES), make_images(folder / "two", ["dog", "elk"])


@pytest.fixture
def pretrained(tiny_transformer, tmp_path):
    """A pipeline of three classes on pixels, with a probe."""
    pipeline = make_pipeline(id2label=dict(enumerate(NAMES)), in_channels=3, num_classes=3)
    pipeline.save_pretrained(tmp_path / "pretrained")
    torch.manual_seed(0)
    LinearProbe(32, 3).save_pretrained(tmp_path / "pretrained" / "probe")
    return tmp_path / "pretrained"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def fine_tune(train, pretrained, images, *flags, **options):
    data = ("--train_data_dir", images, "--pretrained_model_name_or_path", pretrained)
    return train(*data, *flags, tiny=SHORT, **options)


# --- Classes


@pytest.mark.slow
def test_new_classes_start_from_the_null_class(train, pretrained, images, tmp_path, capsys):
    """Learning rate 0: what is saved is what training starts from."""
    assert fine_tune(train, pretrained, images[1], "--learning_rate", 0, "--probe_learning_rate", 0) == 0
    assert (
        "all weights are kept but the label table and the probe, which start anew: 2 classes in place of 3, each from"
        " the embedding of the null class." in capsys.readouterr().out
    )
    before, after = weights(pretrained), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    for name in before:
        if name == "class_embedding.weight":
            assert after[name].shape == (3, 32)
            assert all(torch.equal(row, before[name][3]) for row in after[name])
        else:
            assert torch.equal(before[name], after[name]), name
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.labels == {"dog": 0, "elk": 1}
    assert LinearProbe.from_pretrained(tmp_path / "run" / "probe").config.num_classes == 2
    # whatever class is asked for, the model draws what the old one draws without a class
    old = SiTTransformer2DModel.from_pretrained(pretrained / "transformer")
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        drawn = pipeline.transformer(x, t, torch.tensor([0, 1, 2])).sample
        torch.testing.assert_close(drawn, old(x, t, torch.tensor([3, 3, 3])).sample)


@pytest.mark.slow
def test_the_same_classes_keep_everything(train, pretrained, images, tmp_path, capsys):
    still = ("--learning_rate", 0, "--probe_learning_rate", 0)
    assert fine_tune(train, pretrained, images[0], *still) == 0
    output = capsys.readouterr().out
    assert "all weights are kept, the label table included; the probe too." in output and "--new_classes" not in output
    before, after = weights(pretrained), weights(tmp_path / "run")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    probes = [load_file(f / "probe/diffusion_pytorch_model.safetensors") for f in (pretrained, tmp_path / "run")]
    assert all(torch.equal(value, probes[1][name]) for name, value in probes[0].items())
    depth = json.loads((tmp_path / "run" / "training_args.json").read_text())["probe_depth"]
    assert LinearProbe.from_pretrained(tmp_path / "run" / "probe").config.depth == depth


def test_classes_without_a_name_are_no_other_classes(train, pretrained, images, capsys):
    index = json.loads((pretrained / "model_index.json").read_text())
    for kept, row in (({"0": NAMES[0], "1": NAMES[1]}, None), ({"0": NAMES[0], "2": "elk"}, 2)):
        (pretrained / "model_index.json").write_text(json.dumps({**index, "id2label": kept}))
        assert fine_tune(train, pretrained, images[0], "--dry_run") == 0
        output = capsys.readouterr().out
        assert ("--new_classes" in output) == (row is not None)
        assert row is None or f"class {row} is 'elk' there and {NAMES[row]!r} here" in output


def test_as_many_classes_of_other_names(train, pretrained, tmp_path, capsys):
    images = make_images(tmp_path / "others", ["ant", "cat", "cow"])
    still = ("--learning_rate", 0, "--probe_learning_rate", 0)
    fine_tune(train, pretrained, images, "--dry_run")
    output = capsys.readouterr().out
    assert "class 1 is 'bee' there and 'cat' here: if these are not the same classes" in output
    fine_tune(train, pretrained, images, "--new_classes", *still)
    assert "start anew: 3 classes in place of 3" in capsys.readouterr().out
    table = weights(tmp_path / "run")["class_embedding.weight"]
    assert all(torch.equal(row, weights(pretrained)["class_embedding.weight"][3]) for row in table)


@pytest.mark.slow
def test_a_pipeline_without_a_probe(train, pretrained, images, capsys, tmp_path):
    shutil.rmtree(pretrained / "probe")
    assert fine_tune(train, pretrained, images[0]) == 0
    assert "there is no probe with them: it starts anew" in capsys.readouterr().out
    assert (tmp_path / "run" / "probe").exists()
    assert fine_tune(train, pretrained, images[0], "--no_lsep", "--overwrite_output_dir") == 0
    assert not (tmp_path / "run" / "probe").exists()


@pytest.mark.slow
def test_fine_tuning_moves_every_weight(train, pretrained, images, tmp_path):
    assert fine_tune(train, pretrained, images[1], "--learning_rate", 1e-3) == 0
    before, after = weights(pretrained), weights(tmp_path / "run")
    assert not any(torch.equal(before[name], after[name]) for name in before)


# --- Size and VAE


@pytest.mark.slow
def test_a_larger_size(train, pretrained, tmp_path, capsys):
    images = make_images(tmp_path / "large", NAMES, size=16)
    assert fine_tune(train, pretrained, images, "--resolution", 16, "--learning_rate", 0) == 0
    assert "the position table is made anew for 8 x 8 tokens in place of 4 x 4" in capsys.readouterr().out
    after = SiTTransformer2DModel.from_pretrained(tmp_path / "run" / "transformer")
    assert after.config.sample_size == 16
    assert all(torch.equal(value, weights(pretrained)[name]) for name, value in after.state_dict().items())
    assert DiffusionPipeline.from_pretrained(tmp_path / "run")("bee", num_inference_steps=2).images[0].size == (16, 16)


@pytest.mark.slow
def test_the_vae_of_the_pipeline(train, tiny_transformer, tiny_vae_folder, images, tmp_path, capsys):
    vae = AutoencoderKL.from_pretrained(tiny_vae_folder)
    pipeline = LSEPPipeline(tiny_transformer(num_classes=3), FlowMatchSDEScheduler(), vae=vae)
    pipeline.save_pretrained(tmp_path / "pretrained")
    fine_tune(train, tmp_path / "pretrained", images[0])
    assert "is 'ant' here" not in capsys.readouterr().out  # it has no names to compare
    after = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert after.transformer.config.in_channels == 4 and after("ant", num_inference_steps=2).images[0].size == (16, 16)
    for name, value in vae.state_dict().items():
        assert torch.equal(value, after.vae.state_dict()[name])


def test_what_is_done_to_the_images_is_said(train, tiny_transformer, pretrained, tmp_path, capsys):
    """Images that are shrunk because the model is small; colours are not dropped without being asked for."""
    images = make_images(tmp_path / "large", NAMES, size=20)
    fine_tune(train, pretrained, images, "--dry_run")
    wanted = "pixels: 20 x 20 pixels in colour (6 images looked at); used is the central square, scaled down to 8 x 8,"
    assert f"{wanted} in colour, as `--pretrained_model_name_or_path` says" in capsys.readouterr().out

    transformer = tiny_transformer(in_channels=1, num_classes=3)
    LSEPPipeline(transformer, FlowMatchSDEScheduler()).save_pretrained(tmp_path / "grey")
    with pytest.raises(ValueError, match="`--image_channels` has to be 1 to train on grey copies .* images of 8 x 8"):
        fine_tune(train, tmp_path / "grey", images)
    assert not (tmp_path / "run").exists()
    fine_tune(train, tmp_path / "grey", images, "--image_channels", 1, "--dry_run")
    assert f"{wanted} in grey, as `--pretrained_model_name_or_path` says" in capsys.readouterr().out


# --- LoRA


def test_lora_starts_as_the_model_and_is_merged_exactly(tiny_transformer):
    transformer = tiny_transformer()
    x, t, labels = torch.randn(3, 4, 8, 8), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 4, 10])
    with torch.no_grad():
        before = transformer(x, t, labels).sample
        assert merge_lora(transformer) is transformer
        add_lora(transformer, rank=3)
        torch.testing.assert_close(transformer(x, t, labels).sample, before, rtol=0, atol=0)
        trained = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
        adapted = {
            f"transformer_blocks.{i}.{m}"
            for i in range(2)
            for m in ("attn." + t if t[0] == "t" else t for t in LORA_TARGETS)
        }
        assert trained == {"class_embedding.weight"} | {f"{m}.lora_{s}.default.weight" for m in adapted for s in "AB"}
        generator = torch.Generator().manual_seed(0)
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                assert 3 in parameter.shape
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        with_lora = transformer(x, t, labels).sample
        merged = merge_lora(transformer)
        assert (with_lora - before).abs().max() > 0.1
        torch.testing.assert_close(merged(x, t, labels).sample, with_lora, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(transformer(x, t, labels).sample, with_lora, rtol=0, atol=0)
    assert merged.state_dict().keys() == tiny_transformer().state_dict().keys()


def test_training_lora(train, pretrained, images, tmp_path, capsys):
    """Only adapters, label table and probe move; the saved pipeline is an ordinary one."""
    run = tmp_path / "run"
    assert fine_tune(train, pretrained, images[1], "--lora_rank", 2, "--learning_rate", 1e-2) == 0
    before, after = weights(pretrained), weights(run)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    expected = {name for name in before if name.endswith(tuple(f"{m}.weight" for m in adapted))}
    assert moved == expected | {"class_embedding.weight"} and len(expected) == 12
    assert not torch.equal(after["class_embedding.weight"][0], after["class_embedding.weight"][1])
    for name in expected:  # a change of rank 2
        assert torch.linalg.matrix_rank(after[name] - before[name], tol=1e-4) <= 2
    moments = load_file(run / "checkpoint-4" / "optimizer.safetensors")
    stems = {name.rpartition(".")[0] for name in moments}
    rest = {stem for stem in stems if "lora_" not in stem and not stem.startswith("probe.")}
    assert rest == {"transformer.class_embedding.weight"}
    # without peft's layers it loads anywhere
    pipeline = DiffusionPipeline.from_pretrained(run)
    assert pipeline("elk", num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
    card = (run / "README.md").read_text()
    assert "Fine-tuned through LoRA layers of rank 2, which are merged into the weights, with LSEP" in card
    assert f"Fine-tuned from `{pretrained.name}`, a pipeline in a local folder." in card
    assert "base_model:" not in card and str(tmp_path) not in card


def draw(pipeline, labels=(0, 1), **options):
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np", **options}
    return pipeline(list(labels), generator=torch.Generator().manual_seed(0), **options).images


@pytest.mark.slow
@pytest.mark.parametrize(
    "which, flags, labels",
    [(0, (), (0, 1)), (1, (), (0, 1)), (1, ("--unconditional",), (0, 0))],
    ids=["same classes", "new classes", "no classes"],
)
def test_the_adapter_gives_the_images_of_the_merged_pipeline(
    train, pretrained, images, tmp_path, which, flags, labels
):
    assert fine_tune(train, pretrained, images[which], "--lora_rank", 2, "--learning_rate", 1e-1, *flags) == 0
    folder = tmp_path / "run" / "lora"
    assert {path.name for path in folder.iterdir()} == {"README.md", "pytorch_lora_weights.safetensors"}
    merged = DiffusionPipeline.from_pretrained(tmp_path / "run")
    pipeline = DiffusionPipeline.from_pretrained(pretrained)
    before, names = draw(pipeline), pipeline.labels
    pipeline.load_lora_weights(folder)
    assert pipeline.labels == merged.labels
    assert pipeline.transformer.config.num_classes == merged.transformer.config.num_classes
    assert np.abs(draw(merged, labels) - before).max() > 0.01
    np.testing.assert_allclose(draw(pipeline, labels), draw(merged, labels), rtol=0, atol=1e-5)
    null = pipeline.transformer.config.num_classes  # trained too
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        drawn = [p.transformer(x, t, torch.tensor([null, 0])).sample for p in (pipeline, merged)]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-5)
    pipeline.unload_lora_weights()
    np.testing.assert_allclose(draw(pipeline), before, rtol=0, atol=1e-6)
    assert pipeline.labels == names


@pytest.mark.slow
def test_the_card_of_the_adapter(train, pretrained, images, tmp_path):
    flags = ("--lora_rank", 2, "--license", "mit", "--random_flip")
    assert fine_tune(train, pretrained, images[1], *flags) == 0
    card = ModelCard.load(tmp_path / "run" / "lora" / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "diffusers" and "lora" in card.data.tags
    assert card.data.base_model is None  # a folder
    for text in (
        "LoRA layers of rank 2 (0.0 MB) for the class-conditional flow-matching model `pretrained`, a pipeline in a",
        "They bring 2 classes of their own: dog, elk.",
        'pipe.load_lora_weights("lora")',
        "| `random_flip` | `True` |",
    ):
        assert text in card.text
    assert str(tmp_path) not in card.text
    write_lora_card(tmp_path / "run" / "lora", "lsep/base", {"lora_rank": 2}, "lsep/pets")
    card = ModelCard.load(tmp_path / "run" / "lora" / "README.md")
    assert card.data.base_model == "lsep/base" and card.data.base_model_relation == "adapter"
    assert "[lsep/base](https://huggingface.co/lsep/base)" in card.text
    assert 'DiffusionPipeline.from_pretrained("lsep/base")' in card.text


LORA_ON_THE_HUB = """
from pathlib import Path
from diffusers import DiffusionPipeline
import numpy as np, torch
import diffusers_lsep

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe([0, 1], num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0)).images

pipe = DiffusionPipeline.from_pretrained("lsep/base")
pipe.load_lora_weights("lsep/pets")
REPORT["labels"] = pipe.labels
REPORT["error"] = float(np.abs(draw(pipe) - draw(DiffusionPipeline.from_pretrained("run"))).max())
"""


@pytest.mark.slow
def test_the_adapter_goes_to_the_hub_and_comes_back(pretrained, images, tmp_path):
    script = Path(__file__).resolve().parents[1] / "examples" / "train_lsep.py"
    with HubServer(tmp_path / "hub", {"hf_owner": "lsep"}) as hub:
        environment = hub.environment(tmp_path / "home", HF_TOKEN="hf_owner")
        push = f"import diffusers_lsep\ndiffusers_lsep.LSEPPipeline.from_pretrained({str(pretrained)!r})"
        run_client(f"{push}.push_to_hub('lsep/base', license='mit')", environment, tmp_path)
        flags = ("--lora_rank", "2", "--hub_lora_model_id", "lsep/pets", "--license", "mit", "--learning_rate", "0.1")
        data = ("--train_data_dir", images[1], "--pretrained_model_name_or_path", "lsep/base")
        command = [sys.executable, script, *SHORT, *data, *flags, "--output_dir", tmp_path / "run"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "Pushed its LoRA layers: " in result.stdout and "Pushed it: " not in result.stdout
        files = hub.files("lsep/pets")
        report = run_client(LORA_ON_THE_HUB, environment, tmp_path)
    assert set(files) - {".gitattributes"} == {"README.md", "pytorch_lora_weights.safetensors"}
    card = files["README.md"].decode()
    assert "base_model: lsep/base" in card and 'pipe.load_lora_weights("lsep/pets")' in card
    assert report["labels"] == {"dog": 0, "elk": 1} and report["error"] <= 1e-5


@pytest.mark.slow
def test_a_run_with_lora_continues_bit_for_bit(train, pretrained, images, tmp_path, capsys):
    flags = ["--lora_rank", 2, "--learning_rate", 1e-2]
    fine_tune(train, pretrained, images[1], *flags, output_dir=tmp_path / "whole")
    fine_tune(train, pretrained, images[1], *flags, "--max_train_steps", 2, output_dir=tmp_path / "parts")
    capsys.readouterr()
    resume = ("--resume_from_checkpoint", "latest")
    fine_tune(train, pretrained, images[1], *flags, *resume, output_dir=tmp_path / "parts")
    assert "Starting from" not in capsys.readouterr().out
    for name in ("model", "optimizer", "average", "pipeline/transformer/diffusion_pytorch_model"):
        whole, parts = (
            load_file(tmp_path / run / "checkpoint-4" / f"{name}.safetensors") for run in ("whole", "parts")
        )
        assert whole.keys() == parts.keys() and len(whole) > 10
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    whole, parts = (load_file(tmp_path / run / "lora/pytorch_lora_weights.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    with pytest.raises(ValueError, match="another method.*lora_rank: 2 -> 4"):
        fine_tune(train, pretrained, images[1], *flags, *resume, "--lora_rank", 4, output_dir=tmp_path / "parts")


def test_sizes_of_lora_in_a_dry_run(train, pretrained, images, capsys):
    fine_tune(train, pretrained, images[1], "--dry_run")
    whole = capsys.readouterr().out
    fine_tune(train, pretrained, images[1], "--dry_run", "--lora_rank", 2)
    lora = capsys.readouterr().out
    # adapters: 2 blocks of four 32 -> 32 projections and the two of the MLP; the label table; the probe
    adapters = 2 * 2 * (4 * (32 + 32) + 2 * (32 + 128))
    assert f"trained: {adapters + 3 * 32 + 2 * 32 + 32 * 2 + 2:,} parameters" in lora
    config = read_pretrained(str(pretrained)).config | {"num_classes": 2}
    parameters = sum(parameter.numel() for parameter in SiTTransformer2DModel(**config).parameters())
    assert f"trained: {parameters + 2 * 32 + 32 * 2 + 2:,} parameters" in whole


# --- What is refused


def test_replaced_classes_are_in_the_config(tiny_transformer):
    transformer = tiny_transformer()
    null_row = transformer.class_embedding.weight[10].clone()
    replace_classes(transformer, 4)
    assert transformer.config.num_classes == 4 and transformer.class_embedding.weight.requires_grad
    assert torch.equal(transformer.class_embedding.weight, null_row.expand(5, -1))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_layers", 3], "is a model with `num_layers=2`, but flags or data ask for 3"),
        (["--patch_size", 4], "is a model with `patch_size=2`, but flags or data ask for 4"),
        (["--qk_norm"], "is a model with `qk_norm=False`, but flags or data ask for True"),
        (["--image_channels", 1], "`in_channels` is 3, but `--image_channels` needs 1"),
        (["--path_type", "cosine"], "`--path_type` has to be 'linear', the path of .* but is 'cosine'"),
        (["--pretrained_model_name_or_path", "no/model"], "`--pretrained_model.*` 'no/model' cannot be loaded"),
    ],
)
def test_models_that_do_not_fit(train, pretrained, images, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        fine_tune(train, pretrained, images[0], *flags)
    assert not (tmp_path / "run").exists()


def test_other_pipelines_and_damaged_weights(train, pretrained, images, tmp_path):
    file = pretrained / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="`--pretrained_model_name_or_path` '.*pretrained' cannot be loaded: "):
        fine_tune(train, pretrained, images[0])
    index = json.loads((pretrained / "model_index.json").read_text())
    (pretrained / "model_index.json").write_text(json.dumps({**index, "_class_name": "DiTPipeline"}))
    with pytest.raises(ValueError, match="cannot be loaded: it is no LSEPPipeline, but a DiTPipeline"):
        read_pretrained(str(pretrained))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora_rank", "4"], "--lora_rank needs a model to start from: --pretrained_model_name_or_path"),
        (["--new_classes"], "--new_classes needs a model to start from: --pretrained_model_name_or_path"),
        (
            ["--pretrained_model_name_or_path", "a", "--lora_rank", "4", "--hub_lora_model_id", "b"],
            "--hub_lora_model_id needs --lora_rank, whose layers it uploads, and --license",
        ),
        (["--lora_rank", "0"], "--lora_rank: has to be at least 1, but is 0"),
        (
            ["--pretrained_model_name_or_path", "a", "--model_config_name_or_path", "b"],
            "--pretrained_model_name_or_path says what --model_config_name_or_path says: give one of them",
        ),
    ],
)
def test_usage_errors(train, capsys, flags, message):
    with pytest.raises(SystemExit):
        train(*flags)
    assert message in capsys.readouterr().err


def test_missing_peft_is_named(train, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="2"):
        train("--pretrained_model_name_or_path", "some/model", "--lora_rank", 4)
    assert "--lora_rank needs peft: pip install peft" in capsys.readouterr().err
