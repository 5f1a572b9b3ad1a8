# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA at the pipeline, as diffusers' users call it."""

import logging

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_models import make_pipeline

from diffusers_lsep import LSEPPipeline


NAMES = {0: "ant", 1: "bee", 2: "cow"}


def make(**config):
    pipe = make_pipeline(id2label=NAMES, in_channels=3, num_classes=3, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe([0, 1], num_inference_steps=3, guidance_scale=2.0, generator=generator, output_type="np").images


def add_adapter(pipe, name="default", seed=0, targets=("to_q", "to_k", "to_v", "to_out.0")):
    """Random LoRA layers of which alpha is not the rank."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), init_lora_weights=False)
    torch.manual_seed(seed)
    pipe.transformer.add_adapter(config, name)


def save_adapter(folder, seed=0, classes=None, targets=("to_q", "to_v", "class_embedding"), **config):
    """Random LoRA layers of a pipeline, in a file with metadata."""
    pipe = make(**config)
    if classes is not None and classes.get("new_classes"):
        pipe = make_pipeline(in_channels=3, num_classes=classes["num_classes"])
    add_adapter(pipe, seed=seed, targets=targets)
    metadata = pipe.transformer.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(pipe.transformer)
    LSEPPipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata, classes=classes)
    return folder


NEW = {"num_classes": 2, "id2label": {0: "dog", 1: "elk"}, "new_classes": True, "sample_size": 8}


def test_saved_and_loaded_with_alpha(tmp_path):
    """As diffusers' training scripts save."""
    pipe, other = make(), make()
    before = draw(pipe)
    add_adapter(pipe)
    expected = draw(pipe)
    metadata = _collate_lora_metadata({"transformer": pipe.transformer})
    layers = get_peft_model_state_dict(pipe.transformer)
    LSEPPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, **metadata)
    other.load_lora_weights(tmp_path)
    assert other.transformer.peft_config["default_0"].lora_alpha == 6
    assert np.abs(expected - before).max() > 0.01
    np.testing.assert_array_equal(draw(other), expected)
    assert other.config.id2label == NAMES  # it brought none

    state_dict, metadata = LSEPPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert metadata["transformer.lora_alpha"] == 6 and len(state_dict) == 2 * 2 * 4
    another = make()
    another.load_lora_weights(state_dict, adapter_name="by hand")  # no metadata: alpha is the rank
    assert another.transformer.peft_config["by hand"].lora_alpha == 4
    assert np.abs(draw(another) - expected).max() > 1e-3


def test_saving_without_metadata_is_warned_of(tmp_path, caplog):
    pipe = make()
    add_adapter(pipe)
    with caplog.at_level(logging.WARNING, "diffusers_lsep"):
        LSEPPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.transformer))
    assert "whoever loads these layers takes the rank for alpha" in caplog.text
    with pytest.raises(ValueError, match="`transformer_lora_layers` has to hold the layers to save, but is None"):
        LSEPPipeline.save_lora_weights(tmp_path)


def test_what_the_transformer_has_saved(tmp_path):
    pipe, other = make(), make()
    add_adapter(pipe)
    pipe.transformer.save_lora_adapter(tmp_path)
    other.load_lora_weights(tmp_path)
    np.testing.assert_array_equal(draw(other), draw(pipe))


def test_adapters_are_combined_fused_and_unloaded(tmp_path):
    pipe = make()
    before = draw(pipe)
    for seed, name in enumerate(("one", "two")):
        pipe.load_lora_weights(save_adapter(tmp_path / name, seed, targets=("to_q", "ff.net.2")), adapter_name=name)
    assert pipe.get_list_adapters() == {"transformer": ["one", "two"]} and pipe.get_active_adapters() == ["two"]
    two = draw(pipe)
    pipe.set_adapters(["one", "two"], [0.5, 1.0])
    both = draw(pipe)
    assert np.abs(both - two).max() > 1e-3 and np.abs(two - before).max() > 1e-3
    pipe.fuse_lora(adapter_names=["one", "two"])
    assert pipe.fused_loras == {"one", "two"}
    np.testing.assert_allclose(draw(pipe), both, rtol=0, atol=1e-5)
    pipe.unfuse_lora()
    pipe.disable_lora()
    np.testing.assert_allclose(draw(pipe), before, rtol=0, atol=1e-5)
    pipe.enable_lora()
    pipe.delete_adapters("one")
    assert pipe.get_list_adapters() == {"transformer": ["two"]}
    np.testing.assert_allclose(draw(pipe), two, rtol=0, atol=1e-5)
    pipe.unload_lora_weights()
    np.testing.assert_allclose(draw(pipe), before, rtol=0, atol=1e-5)
    assert pipe.transformer.state_dict().keys() == make().transformer.state_dict().keys()


@pytest.mark.parametrize("way", ["unload", "delete"])
def test_classes_come_and_go_with_the_adapter(tmp_path, way):
    pipe = make()
    before = draw(pipe)
    pipe.load_lora_weights(save_adapter(tmp_path, classes=NEW), adapter_name="pets")
    assert pipe.labels == {"dog": 0, "elk": 1} and pipe.transformer.config.num_classes == 2
    assert pipe("elk", num_inference_steps=2).images[0].size == (8, 8)
    with pytest.raises(ValueError, match=r"`class_labels` has to lie in 0\.\.1, but holds 3"):
        pipe(3)
    # Of weight 0 it draws what the base model draws without a class.
    pipe.set_adapters("pets", 0.0)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        drawn = pipe.transformer(x, t, torch.tensor([0, 2])).sample
        torch.testing.assert_close(drawn, make().transformer(x, t, torch.tensor([3, 3])).sample)
    if way == "unload":
        pipe.unload_lora_weights()
    else:
        pipe.delete_adapters("pets")
    np.testing.assert_array_equal(draw(pipe), before)
    assert pipe.labels == {"ant": 0, "bee": 1, "cow": 2} and pipe.transformer.config.num_classes == 3


@pytest.mark.parametrize("way", ["unload", "delete"])
def test_adapters_leave_a_compiled_transformer_as_it_was(tmp_path, way):
    pipe = make()
    weights = pipe.transformer.state_dict()
    pipe.transformer = torch.compile(pipe.transformer)
    pipe.load_lora_weights(save_adapter(tmp_path, classes=NEW), adapter_name="pets")
    if way == "delete":
        pipe.delete_adapters("pets")
        assert not hasattr(pipe.transformer, "peft_config")
    pipe.unload_lora_weights()
    torch.testing.assert_close(pipe.transformer._orig_mod.state_dict(), weights)


def test_an_adapter_that_is_loaded_twice_stays(tmp_path):
    pipe = make()
    save_adapter(tmp_path, classes=NEW)
    pipe.load_lora_weights(tmp_path, adapter_name="pets")
    expected = draw(pipe)
    with pytest.raises(ValueError, match="`adapter_name` has to be a new one, but there is an adapter 'pets' already"):
        pipe.load_lora_weights(tmp_path, adapter_name="pets")
    assert pipe.labels == {"dog": 0, "elk": 1}
    np.testing.assert_array_equal(draw(pipe), expected)


def test_classes_go_though_another_adapter_is_fused(tmp_path):
    pipe, fused = make(), make()
    for part in (pipe, fused):
        part.load_lora_weights(save_adapter(tmp_path / "style", 1, targets=("to_q",)), adapter_name="style")
    fused.fuse_lora()
    pipe.load_lora_weights(save_adapter(tmp_path / "pets", classes=NEW), adapter_name="pets")
    pipe.fuse_lora(adapter_names=["style"])
    pipe.delete_adapters("pets")
    assert pipe.labels == {"ant": 0, "bee": 1, "cow": 2}
    np.testing.assert_allclose(draw(pipe), draw(fused), rtol=0, atol=1e-5)


def test_another_pipeline_of_the_same_transformer_gives_the_classes_back(tmp_path):
    pipe = make()
    before = draw(pipe)
    pipe.load_lora_weights(save_adapter(tmp_path, classes=NEW))
    other = LSEPPipeline.from_pipe(pipe)
    other.unload_lora_weights()
    assert other.labels == {"ant": 0, "bee": 1, "cow": 2}
    np.testing.assert_array_equal(draw(other), before)


def test_fused_classes_stay_and_are_saved(tmp_path):
    pipe = make()
    pipe.load_lora_weights(save_adapter(tmp_path / "lora", classes=NEW))
    expected = draw(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    np.testing.assert_allclose(draw(pipe), expected, rtol=0, atol=1e-5)
    pipe.save_pretrained(tmp_path / "fused")
    fused = LSEPPipeline.from_pretrained(tmp_path / "fused")
    assert fused.labels == {"dog": 0, "elk": 1}
    np.testing.assert_array_equal(draw(fused), draw(pipe))


def test_a_second_adapter_of_the_same_classes(tmp_path):
    pipe = make()
    for seed, name in enumerate(("one", "two")):
        pipe.load_lora_weights(save_adapter(tmp_path / name, seed, classes=NEW), adapter_name=name)
    pipe.set_adapters(["one", "two"])
    assert draw(pipe).shape == (2, 8, 8, 3)
    pipe.delete_adapters("two")
    assert pipe.labels == {"dog": 0, "elk": 1}
    with pytest.raises(
        ValueError, match=r"other classes than the adapter 'one': 3 classes, \['x', 'y', 'z'\], not 2 classes"
    ):
        other = {**NEW, "num_classes": 3, "id2label": {0: "x", 1: "y", 2: "z"}}
        pipe.load_lora_weights(save_adapter(tmp_path / "other", classes=other))
    assert pipe.get_list_adapters() == {"transformer": ["one"]}


def test_with_group_offloading(tmp_path):
    save_adapter(tmp_path, classes=NEW)
    pipe, plain = make(), make()
    before = draw(plain)
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    for each in (pipe, plain):
        each.load_lora_weights(tmp_path)
    np.testing.assert_array_equal(draw(pipe), draw(plain))
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(draw(pipe), before)


@pytest.mark.parametrize(
    "classes, options, message",
    [
        ({"num_classes": 5}, {}, "was trained on a model of 5 classes, but this one has 3"),
        (NEW, {"hotswap": True, "adapter_name": "a"}, "`hotswap` has to be False for an adapter that brings"),
    ],
)
def test_adapters_that_do_not_fit(tmp_path, classes, options, message):
    pipe = make()
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(save_adapter(tmp_path, classes=classes), **options)
    with pytest.raises(ValueError, match=r"has to hold LoRA layers alone, but has \['proj_out.weight'\]"):
        pipe.load_lora_weights({"proj_out.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path_or_dict` has to be an id .* but is None"):
        pipe.load_lora_weights(None)
    assert pipe.get_list_adapters() == {} and pipe.config.id2label == NAMES


def test_an_adapter_of_another_width_leaves_nothing(tmp_path):
    pipe = make()
    before = draw(pipe)
    save_adapter(tmp_path, classes=NEW)
    state_dict, metadata = LSEPPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    name = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    layers = {**state_dict, name: torch.zeros(4, 7)}
    layers = {name.removeprefix("transformer."): value for name, value in layers.items()}
    metadata = {k.removeprefix("transformer."): v for k, v in metadata.items() if k.startswith("transformer.")}
    LSEPPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata, classes=NEW)
    with pytest.raises(RuntimeError, match="size mismatch"):
        pipe.load_lora_weights(tmp_path)
    assert pipe.labels == {"ant": 0, "bee": 1, "cow": 2}
    np.testing.assert_array_equal(draw(pipe), before)


def test_another_size_is_warned_of(tmp_path, caplog):
    pipe = make()
    with caplog.at_level(logging.WARNING, "diffusers_lsep"):
        pipe.load_lora_weights(save_adapter(tmp_path, classes={**NEW, "sample_size": 16}))
    assert "The adapter was trained at `sample_size=16`, but the transformer has 8" in caplog.text


def test_adapters_are_not_saved_with_the_model(tmp_path):
    pipe = make()
    pipe.load_lora_weights(save_adapter(tmp_path / "lora"), adapter_name="pets")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"`transformer` has to be without adapters for saving, but has \['pets'\]"
        ):
            pipe.save_pretrained(tmp_path / "saved")
        pipe.fuse_lora()
    fused = draw(pipe)
    pipe.delete_adapters("pets")
    with pytest.raises(ValueError, match="without adapters for saving, but has their layers"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(draw(DiffusionPipeline.from_pretrained(tmp_path / "saved")), fused, atol=1e-5)
