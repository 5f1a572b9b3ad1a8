# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`from_single_file` of the model and the pipeline."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from client_process import run_client
from diffusers import FlowMatchEulerDiscreteScheduler, GGUFQuantizationConfig
from diffusers.loaders import FromOriginalModelMixin, FromSingleFileMixin
from hub_server import HubServer
from original_checkpoints import HEADS, NAMES, REFERENCE, load_original, original_weights
from safetensors.torch import load_file, save_file
from tiny_models import make_pipeline, make_transformer, make_vae

from diffusers_lsep import FlowMatchSDEScheduler, LSEPPipeline, SiTTransformer2DModel, convert_original_checkpoint


WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(model):
    generator = torch.Generator().manual_seed(0)
    size = model.config.sample_size
    x = torch.randn(2, model.config.in_channels, size, size, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([0.2, 0.9]), torch.tensor([0, 1])).sample


def assert_same(model, expected):
    assert model.config.items() >= {k: v for k, v in expected.config.items() if not k.startswith("_")}.items()
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not model.training
    torch.testing.assert_close(run(model), run(expected), rtol=0, atol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline with names and a VAE."""
    folder = tmp_path_factory.mktemp("pipeline")
    scheduler = FlowMatchEulerDiscreteScheduler()
    make_pipeline(scheduler, make_vae(), {i: f"class {i}" for i in range(10)}, qk_norm=True).save_pretrained(folder)
    return folder


# --- Files of the original projects


@pytest.mark.parametrize("name", NAMES)
def test_original_files(name):
    heads = json.loads((REFERENCE / f"{name}.json").read_text()).get("num_attention_heads", 4)
    expected = convert_original_checkpoint(REFERENCE / f"{name}.pt", num_attention_heads=heads)
    options = {"num_attention_heads": heads}
    assert_same(SiTTransformer2DModel.from_single_file(REFERENCE / f"{name}.pt", **options), expected.transformer)
    pipe = LSEPPipeline.from_single_file(str(REFERENCE / f"{name}.pt"), **options)
    assert_same(pipe.transformer, expected.transformer)
    assert pipe.scheduler.config == expected.scheduler.config
    assert pipe.config.path_type == expected.scheduler.config.path_type and pipe.vae is None


def test_options(tmp_path):
    file = REFERENCE / "lsep_tiny.pt"
    model = SiTTransformer2DModel.from_single_file(file, dtype=torch.bfloat16, sample_size=16, **HEADS)
    assert model.dtype == torch.bfloat16 and model.config.sample_size == 16
    assert run(model.float()).shape[-1] == 16
    of_model = convert_original_checkpoint(file, weights="model", **HEADS).transformer
    assert_same(SiTTransformer2DModel.from_single_file(file, weights="model", device="cpu", **HEADS), of_model)
    assert_same(SiTTransformer2DModel.from_single_file(load_original("lsep_tiny"), weights="model", **HEADS), of_model)
    # the heads of a model that is no preset, in a config
    of_model.save_pretrained(tmp_path)
    assert_same(SiTTransformer2DModel.from_single_file(file, weights="model", config=tmp_path), of_model)


def test_original_weights_as_safetensors(tmp_path):
    """They are a bare state dict, of which the content does not tell where it is from."""
    expected = make_transformer()
    original = {name: value.contiguous() for name, value in original_weights(expected).items()}
    save_file(original, tmp_path / "weights.safetensors")
    load = SiTTransformer2DModel.from_single_file
    with pytest.raises(ValueError, match=r"`pretrained_model_link_or_path_or_dict`.*: .*`source` \(`--source`\) has"):
        load(tmp_path / "weights.safetensors", **HEADS)
    assert_same(load(tmp_path / "weights.safetensors", source="repa", **HEADS), expected)
    converted = convert_original_checkpoint(tmp_path / "weights.safetensors", source="repa", **HEADS)
    assert_same(converted.transformer, expected)


def test_a_pipeline_of_imagenet_has_its_names():
    expected = make_transformer(num_classes=1000, num_layers=1)
    pipe = LSEPPipeline.from_single_file(original_weights(expected), source="lsep", vae=make_vae(), **HEADS)
    assert pipe.labels["golden retriever"] == 207 and pipe.vae is not None
    assert_same(pipe.transformer, expected)
    named = LSEPPipeline.from_single_file(original_weights(expected), source="lsep", id2label={0: "x"}, **HEADS)
    assert named.labels == {"x": 0}


# --- diffusers' layout


def test_diffusers_layout(folder, tmp_path):
    expected = SiTTransformer2DModel.from_pretrained(folder / "transformer")
    load = SiTTransformer2DModel.from_single_file
    file = folder / "transformer" / WEIGHTS
    assert issubclass(SiTTransformer2DModel, FromOriginalModelMixin) and issubclass(LSEPPipeline, FromSingleFileMixin)
    assert_same(load(file), expected)  # the config is beside it
    assert_same(load(file, config=None), expected)
    elsewhere = tmp_path / "renamed.safetensors"
    elsewhere.write_bytes(file.read_bytes())
    for where in ({"config": folder}, {"config": str(folder), "subfolder": "transformer"}):
        assert_same(load(elsewhere, **where), expected)
    assert_same(load(load_file(file), config=folder / "transformer", low_cpu_mem_usage=False), expected)
    assert load(elsewhere, config=folder, torch_dtype=torch.float16).dtype == torch.float16
    assert load(elsewhere, config=folder, sample_size=16).config.sample_size == 16
    on_meta = {name: value.to("meta") for name, value in load_file(file).items()}
    model = load(on_meta, config=folder, device="meta", dtype=torch.bfloat16)
    assert {value.device.type for value in (*model.parameters(), *model.buffers())} == {"meta"}
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe([0, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images


def test_the_path_of_the_pipeline_that_the_file_lies_in(tmp_path, monkeypatch):
    """Without it a model of the cosine path would draw on the linear one, and nothing would say so."""
    expected = make_pipeline(FlowMatchSDEScheduler(path_type="cosine"), in_channels=3)
    expected.save_pretrained(tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "transformer" / WEIGHTS
    pipe = LSEPPipeline.from_single_file(file)
    assert pipe.config.path_type == pipe.scheduler.config.path_type == "cosine"
    np.testing.assert_array_equal(draw(pipe), draw(expected))
    assert LSEPPipeline.from_single_file(file, path_type="linear").config.path_type == "linear"
    (tmp_path / "pipeline" / "model_index.json").unlink()
    monkeypatch.chdir(file.parent)
    assert LSEPPipeline.from_single_file(WEIGHTS).config.path_type == "linear"


@pytest.mark.slow
def test_pipelines_with_a_config(folder, tmp_path):
    expected = LSEPPipeline.from_pretrained(folder)
    pipe = LSEPPipeline.from_single_file(folder / "transformer" / WEIGHTS, config=folder)
    assert pipe.labels == expected.labels and isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    np.testing.assert_array_equal(draw(pipe), draw(expected))
    vae = make_vae(scaling_factor=0.5)
    pipe = LSEPPipeline.from_single_file(
        folder / "transformer" / WEIGHTS, config=folder, vae=vae, dtype=torch.bfloat16
    )
    assert pipe.vae is vae and pipe.transformer.dtype == torch.bfloat16
    cosine = LSEPPipeline.from_single_file(folder / "transformer" / WEIGHTS, config=folder, path_type="cosine")
    assert cosine.config.path_type == "cosine"
    plain = LSEPPipeline.from_single_file(folder / "transformer" / WEIGHTS)
    assert plain.vae is None and plain.config.path_type == "linear"
    # an original file, and all else from a pipeline
    make_pipeline(vae=make_vae(), **HEADS, **_sizes("lsep_tiny")).save_pretrained(tmp_path)
    pipe = LSEPPipeline.from_single_file(REFERENCE / "lsep_tiny.pt", config=tmp_path)
    assert_same(pipe.transformer, convert_original_checkpoint(REFERENCE / "lsep_tiny.pt", **HEADS).transformer)
    assert pipe.vae is not None
    make_pipeline(vae=make_vae(), **HEADS, **_sizes("lsep_tiny_cosine")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`config` is of a model on the path 'linear', but that of the file is 'cosi"):
        LSEPPipeline.from_single_file(REFERENCE / "lsep_tiny_cosine.pt", config=tmp_path)


def _sizes(name):
    config = convert_original_checkpoint(REFERENCE / f"{name}.pt", **HEADS).transformer.config
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in HEADS}


# --- What is refused


@pytest.mark.parametrize(
    "change, message",
    [
        ({"proj_out.bias": None}, "missing: proj_out.bias"),
        ({"more": torch.zeros(1)}, "unknown: more"),
        ({"proj_out.bias": torch.zeros(7)}, r"of the wrong shape: proj_out.bias \(\[7\], not \[16\]\)"),
        ({"proj_out.bias": torch.zeros(16, dtype=torch.int)}, "no floating point tensor: proj_out.bias"),
        ({"proj_out.bias": "text"}, "no floating point tensor: proj_out.bias"),
    ],
)
def test_wrong_weights_are_listed(folder, change, message):
    state_dict = {**load_file(folder / "transformer" / WEIGHTS), **change}
    state_dict = {name: value for name, value in state_dict.items() if value is not None}
    with pytest.raises(
        ValueError, match=rf"does not hold the weights of the model that `config` desc.*:\n  {message}"
    ):
        SiTTransformer2DModel.from_single_file(state_dict, config=folder)


@pytest.mark.parametrize(
    "given, options, message",
    [
        ("lsep_tiny.pt", {"original_config": "a"}, "`original_config` is not known; `from_single_file` takes"),
        ("lsep_tiny.pt", {"weights": "best"}, r"`weights` has to be one of \['ema', 'model'\], but is 'best'"),
        ("lsep_tiny.pt", {"source": "sit"}, "`source` is 'sit', but the file is not: it has `classifier"),
        ("lsep_tiny.pt", {"config": {}}, "`config` has to be a folder or a repository on the Hub, but is {}"),
        ("lsep_tiny.pt", {"config": REFERENCE}, "`config` '.*reference' has no config of a SiTTransformer2DModel"),
        ("README.md", {}, "`pretrained_model_link_or_path_or_dict` .*README.md: the file is refused"),
        ("nowhere.safetensors", {}, "has to be a file, a link to one on the Hub .* but is '.*nowhere.safetensors'"),
    ],
)
def test_what_is_wrong_is_named(given, options, message):
    with pytest.raises(ValueError, match=message):
        SiTTransformer2DModel.from_single_file(str(REFERENCE / given), **options)


def test_diffusers_layout_refuses(folder, tmp_path):
    file = folder / "transformer" / WEIGHTS
    load = SiTTransformer2DModel.from_single_file
    with pytest.raises(ValueError, match="`source` and `weights` are for files of the original projects"):
        load(file, source="sit")
    with pytest.raises(ValueError, match="`config` has to be the folder or Hub id of such a model"):
        load(load_file(file))
    with pytest.raises(ValueError, match="`config` '.*vae' has to be of a SiTTransformer2DModel, but is of a Autoenc"):
        load(file, config=folder / "vae")
    with pytest.raises(ValueError, match="`device` is for `SiTTransformer2DModel.from_single_file`"):
        LSEPPipeline.from_single_file(file, device="cpu")
    with pytest.raises(ValueError, match="`config` has `num_layers=2`, but the file is of a model with 3"):
        load(original_weights(make_transformer(num_layers=3, qk_norm=True)), source="repa", config=folder)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="`pretrained_model_link_or_path_or_dict` .*damaged.safetensors is damaged"):
        load(damaged, config=folder)


def test_no_pickle_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="the file is refused, because it could run code"):
        SiTTransformer2DModel.from_single_file(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


# --- GGUF


def write_gguf(path, model, quantized):
    writer = gguf.GGUFWriter(path, "sit")
    for name, value in model.state_dict().items():
        array = value.numpy()
        if quantized(name):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def test_gguf(folder, tmp_path):
    expected = SiTTransformer2DModel.from_pretrained(folder / "transformer")
    write_gguf(tmp_path / "sit.gguf", expected, lambda name: name.endswith((".to_q.weight", ".ff.net.0.proj.weight")))
    options = {"config": folder, "quantization_config": GGUFQuantizationConfig(compute_dtype=torch.float32)}
    model = SiTTransformer2DModel.from_single_file(tmp_path / "sit.gguf", **options)
    assert type(model.transformer_blocks[0].attn.to_q).__name__ == "GGUFLinear"
    error = (run(model) - run(expected)).abs().max()
    assert 0 < error < 0.02 * run(expected).abs().max()
    pipe = LSEPPipeline.from_single_file(tmp_path / "sit.gguf", **options)
    np.testing.assert_allclose(draw(pipe), draw(LSEPPipeline.from_pretrained(folder)), atol=0.05)
    with pytest.raises(ValueError, match="`quantization_config` has to be a GGUFQuantizationConfig .* but is None"):
        SiTTransformer2DModel.from_single_file(tmp_path / "sit.gguf", config=folder)
    half = {**options, "quantization_config": GGUFQuantizationConfig(compute_dtype=torch.bfloat16)}
    pipe = LSEPPipeline.from_single_file(tmp_path / "sit.gguf", **half)
    assert np.isfinite(draw(pipe)).all()


def test_gguf_of_an_embedding_is_refused(folder, tmp_path):
    model = SiTTransformer2DModel.from_pretrained(folder / "transformer")
    write_gguf(tmp_path / "sit.gguf", model, lambda name: name == "class_embedding.weight")
    with pytest.raises(ValueError, match="quantized, which only linear layers can be: class_embedding.weight"):
        SiTTransformer2DModel.from_single_file(
            tmp_path / "sit.gguf", config=folder, quantization_config=GGUFQuantizationConfig()
        )


# --- Links


CLIENT = """
import os, torch
import diffusers_lsep
from diffusers_lsep import LSEPPipeline, SiTTransformer2DModel

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe([0, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images

expected = draw(LSEPPipeline.from_pretrained(os.environ["FOLDER"]))
link = "https://huggingface.co/lsep/base/blob/main/transformer/diffusion_pytorch_model.safetensors"
model = SiTTransformer2DModel.from_single_file(link)
REPORT["config"] = model.config.qk_norm
REPORT["pipeline"] = torch.equal(draw(LSEPPipeline.from_single_file(link, config="lsep/base")), expected)
REPORT["endpoint"] = type(SiTTransformer2DModel.from_single_file(
    os.environ["HF_ENDPOINT"] + "/lsep/base/resolve/main/transformer/diffusion_pytorch_model.safetensors"
)).__name__
original = SiTTransformer2DModel.from_single_file("hf.co/lsep/files/blob/main/lsep.pt", num_attention_heads=4)
REPORT["original"] = original.config.num_attention_heads
try:
    SiTTransformer2DModel.from_single_file("https://huggingface.co/lsep/files/blob/main/other.pt")
except OSError as error:
    REPORT["missing"] = type(error).__name__
"""


@pytest.mark.slow
def test_links_to_the_hub(folder, tmp_path):
    with HubServer(tmp_path / "hub", {"hf_owner": "lsep"}) as hub:
        environment = hub.environment(tmp_path / "home", HF_TOKEN="hf_owner", FOLDER=str(folder))
        upload = f"""
from diffusers_lsep import LSEPPipeline
from huggingface_hub import HfApi

LSEPPipeline.from_pretrained({str(folder)!r}).push_to_hub("lsep/base")
HfApi().create_repo("lsep/files")
HfApi().upload_file(path_or_fileobj={str(REFERENCE / "lsep_tiny.pt")!r}, path_in_repo="lsep.pt", repo_id="lsep/files")
"""
        run_client(upload, environment, tmp_path)
        report = run_client(CLIENT, environment, tmp_path)
    assert report == {
        "config": True,
        "pipeline": True,
        "endpoint": "SiTTransformer2DModel",
        "original": 4,
        "missing": "RemoteEntryNotFoundError",
    }
