# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import argparse
import io
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from original_checkpoints import HEADS, NAMES, REFERENCE, load_original, original_weights
from safetensors.torch import load_file

from diffusers_lsep import FlowMatchSDEScheduler, LinearProbe, LSEPPipeline, convert_original_checkpoint
from diffusers_lsep.commands.convert import imagenet_id2label, read_id2label


@pytest.fixture
def save(tmp_path):
    def save(content, **kwargs):
        torch.save(content, tmp_path / "checkpoint.pt", **kwargs)
        return tmp_path / "checkpoint.pt"

    return save


@pytest.fixture
def lsep():
    """A fresh copy of `lsep_tiny.pt`, for tests to change."""
    return load_original("lsep_tiny")


# The networks


@pytest.mark.parametrize("name", NAMES)
def test_the_converted_network_gives_what_the_original_code_gave(name):
    converted = convert_original_checkpoint(REFERENCE / f"{name}.pt", **HEADS)
    expected = load_file(REFERENCE / f"{name}.expected.safetensors")
    inputs = [expected[f"forward.{key}"] for key in ("sample", "timestep", "class_labels")]
    with torch.no_grad():
        output = converted.transformer(*inputs).sample
        torch.testing.assert_close(output, expected["forward.output"], rtol=0, atol=1e-5)
        if "forward.hidden" in expected:
            depth = json.loads((REFERENCE / f"{name}.json").read_text())["model"]["encoder_depth"]
            hidden = converted.transformer.hidden_states_at(*inputs, depth)
            torch.testing.assert_close(hidden, expected["forward.hidden"], rtol=0, atol=1e-5)

    assert converted.source == name.split("_")[0]
    assert isinstance(converted.scheduler, FlowMatchSDEScheduler)
    assert converted.scheduler.config.path_type == ("cosine" if "cosine" in name else "linear")
    assert (converted.probe is not None) == (converted.source == "lsep")
    assert not converted.transformer.training
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in converted.transformer.parameters())


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_weights_and_probe_are_those_that_were_asked_for(lsep, weights):
    converted = convert_original_checkpoint(REFERENCE / "lsep_tiny.pt", weights=weights, **HEADS)
    for name, tensor in original_weights(converted.transformer, converted.probe).items():
        torch.testing.assert_close(tensor, lsep[weights][name], rtol=0, atol=1e-6 if name == "pos_embed" else 0)
    assert not torch.equal(lsep["ema"]["classifier.1.weight"], lsep["model"]["classifier.1.weight"])


@pytest.mark.parametrize("args", ["linear", "cosine"])
@pytest.mark.parametrize(
    "config",
    [
        {"patch_size": 4, "in_channels": 3, "num_classes": 3, "mlp_ratio": 2.0},
        {"patch_size": 1, "in_channels": 5, "sample_size": 3, "num_classes": 7, "num_layers": 3, "qk_norm": True},
        {"num_classes": 1, "attention_head_dim": 9, "mlp_ratio": 100 / 36},
    ],
)
def test_lsep_and_repa_files_of_other_configurations(tiny_transformer, save, config, args):
    model = tiny_transformer(**config)
    probe = LinearProbe(model.inner_dim, model.config.num_classes)
    namespace = argparse.Namespace(path_type=args, num_classes=model.config.num_classes, prediction="v")
    weights = original_weights(model, probe)
    path = save({"model": {}, "ema": weights, "opt": {"state": {}}, "args": namespace, "steps": 7})
    converted = convert_original_checkpoint(path, **HEADS)
    assert {n: v for n, v in converted.transformer.config.items() if n[0] != "_"} == {
        n: v for n, v in model.config.items() if n[0] != "_"
    }
    assert converted.scheduler.config.path_type == args
    for ours, theirs in ((converted.transformer, model), (converted.probe, probe)):
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name
    assert torch.equal(converted.transformer.pos_embed.pos_embed, model.pos_embed.pos_embed)


@pytest.mark.parametrize("depth, expected", [(2, 2), (4, 4), (5, None), (0, None), ("2", None), (True, None)])
def test_the_probe_has_the_depth_of_the_training_arguments(save, lsep, depth, expected, tmp_path):
    assert lsep["args"].encoder_depth == 2
    lsep["args"].encoder_depth = depth
    probe = convert_original_checkpoint(save(lsep), **HEADS).probe
    assert probe.config.depth == expected
    probe.save_pretrained(tmp_path / "probe")
    assert LinearProbe.from_pretrained(tmp_path / "probe").config.depth == expected
    bare = convert_original_checkpoint(save(lsep["ema"]), **HEADS).probe
    assert bare.config.depth is None


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize(
    ("config", "path_type"),
    [
        ({"patch_size": 2, "in_channels": 4}, "Linear"),
        ({"patch_size": 4, "in_channels": 3, "num_classes": 3}, "GVP"),
        ({"patch_size": 1, "in_channels": 5, "sample_size": 3, "qk_norm": True}, "Linear"),
    ],
)
def test_sit_is_the_same_network_with_time_velocity_and_channels_turned(
    tiny_transformer, save, config, path_type, doubled
):
    channels = config["in_channels"]
    model = tiny_transformer(**config, out_channels=2 * channels if doubled else None)
    namespace = argparse.Namespace(image_size=256, path_type=path_type, prediction="velocity")
    converted = convert_original_checkpoint(save({"ema": original_weights(model), "args": namespace}), **HEADS)
    assert converted.source == "sit" and converted.probe is None
    assert converted.scheduler.config.path_type == {"Linear": "linear", "GVP": "cosine"}[path_type]
    assert converted.transformer.config.out_channels is None

    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(5, channels, *[model.config.sample_size] * 2, generator=generator)
    t, labels = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]), torch.tensor([0, 1, 2, 0, model.config.num_classes])
    with torch.no_grad():
        expected = -model(sample, 1 - t, labels).sample[:, :channels]
        torch.testing.assert_close(converted.transformer(sample, t, labels).sample, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("with_args", [False, True])
def test_old_and_new_names_of_repa_give_the_same_model(save, bare, with_args):
    checkpoint = load_original("repa_tiny")
    expected = convert_original_checkpoint(REFERENCE / "repa_tiny.pt", **HEADS).transformer.state_dict()
    weights = {name.replace("blocks.2.", "decoder_blocks.0."): value for name, value in checkpoint["ema"].items()}
    assert "decoder_blocks.0.attn.qkv.weight" in weights and not any("blocks.2" in name for name in weights)
    content = weights if bare else {"ema": weights, **({"args": checkpoint["args"]} if with_args else {})}
    converted = convert_original_checkpoint(save(content), **HEADS)
    assert converted.source == "repa"
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.transformer.state_dict().items())


def test_files_of_the_old_format_of_torch_are_read(save):
    expected = convert_original_checkpoint(REFERENCE / "sit_tiny.pt", **HEADS).transformer.state_dict()
    path = save(load_original("sit_tiny"), _use_new_zipfile_serialization=False)
    converted = convert_original_checkpoint(path, **HEADS)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.transformer.state_dict().items())


def test_the_model_does_not_change_with_its_file(save, lsep):
    path = save(lsep)
    transformer = convert_original_checkpoint(path, **HEADS).transformer
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())


def test_weights_in_half_precision_stay_so(save, lsep):
    half = {name: tensor.half() for name, tensor in lsep["ema"].items()}
    converted = convert_original_checkpoint(save({**lsep, "ema": half}), **HEADS)
    assert converted.transformer.dtype == converted.probe.dtype == torch.float16


def test_another_sample_size_builds_the_position_table_anew():
    transformer = convert_original_checkpoint(REFERENCE / "lsep_tiny.pt", sample_size=12, **HEADS).transformer
    assert transformer.config.sample_size == 12 and transformer.pos_embed.pos_embed.shape == (1, 36, 64)
    assert transformer(torch.zeros(1, 4, 12, 12), 0.5, torch.tensor([0])).sample.shape == (1, 4, 12, 12)


# What the file does not tell


def without(weights, *prefixes):
    return {name: tensor for name, tensor in weights.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize("source", ["lsep", "repa", "sit"])
def test_a_source_that_the_content_does_not_decide_is_asked_for(save, lsep, source):
    path = save(without(lsep["ema"], "classifier."))
    with pytest.raises(ValueError, match=r"`source` .*\['lsep', 'repa', 'sit'\]") as error:
        convert_original_checkpoint(path, **HEADS)
    assert str(path) in str(error.value)

    converted = convert_original_checkpoint(path, source=source, **HEADS)
    assert converted.source == source and converted.probe is None
    weight, sign = lsep["ema"]["final_layer.linear.weight"], -1 if source == "sit" else 1
    assert torch.equal(converted.transformer.proj_out.weight, sign * weight)


def test_training_arguments_alone_do_not_make_a_sit_file(save, lsep):
    weights = without(lsep["ema"], "classifier.")
    with pytest.raises(ValueError, match="`source`"):
        convert_original_checkpoint(save({"ema": weights, "args": argparse.Namespace(image_size=256)}), **HEADS)
    with pytest.raises(ValueError, match="`source`"):
        convert_original_checkpoint(save({"ema": weights, "args": argparse.Namespace(path_type="Linear")}), **HEADS)


def test_a_source_that_contradicts_the_content_is_an_error(save, lsep):
    with pytest.raises(ValueError, match=r"`source` is 'sit', but .*`classifier\.\*` \(lsep\)"):
        convert_original_checkpoint(REFERENCE / "lsep_tiny.pt", source="sit", **HEADS)
    with pytest.raises(ValueError, match=r"`source` is 'repa', but .*twice the channels.*\(sit\)"):
        convert_original_checkpoint(REFERENCE / "sit_tiny.pt", source="repa", **HEADS)
    lsep["ema"]["projectors.0.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="more than one project"):
        convert_original_checkpoint(save(lsep), **HEADS)


def test_heads_that_cannot_be_known_are_asked_for(save, lsep):
    with pytest.raises(ValueError, match="`num_attention_heads` .*has to be given"):
        convert_original_checkpoint(REFERENCE / "lsep_tiny.pt")
    # the name of a preset that the file is not, and a width that only happens to be a preset's
    lsep["args"].model = "SiT-XL/2"
    with pytest.raises(ValueError, match="width 64, model 'SiT-XL/2'.*`num_attention_heads`"):
        convert_original_checkpoint(save(lsep))
    for overrides in ({"num_attention_heads": 8}, {"attention_head_dim": 8}):
        config = convert_original_checkpoint(REFERENCE / "lsep_tiny.pt", **overrides).transformer.config
        assert (config.num_attention_heads, config.attention_head_dim) == (8, 8)


def test_heads_are_known_from_query_norms_and_presets(tiny_transformer, save):
    config = convert_original_checkpoint(REFERENCE / "lsep_tiny_cosine.pt").transformer.config
    assert (config.num_attention_heads, config.attention_head_dim) == (4, 16)

    weights = original_weights(
        tiny_transformer(num_layers=1, num_attention_heads=3, attention_head_dim=128, mlp_ratio=1.0)
    )
    config = convert_original_checkpoint(save(weights), source="lsep").transformer.config
    assert (config.num_attention_heads, config.attention_head_dim) == (6, 64), "SiT-S, whatever made the file"
    checkpoint = {"ema": weights, "args": argparse.Namespace(model="my own model")}
    with pytest.raises(ValueError, match="`num_attention_heads`"):
        convert_original_checkpoint(save(checkpoint), source="lsep")
    checkpoint["args"].model = "SiT-S/2"
    with pytest.raises(
        ValueError, match=r"missing: blocks\.1\.adaLN_modulation\.1\.weight.*blocks\.11\.mlp\.fc2\.bias"
    ):
        convert_original_checkpoint(save(checkpoint), source="lsep")


def test_the_path_of_a_file_without_training_arguments_can_be_given(save, lsep):
    assert convert_original_checkpoint(save(lsep["ema"]), **HEADS).scheduler.config.path_type == "linear"
    converted = convert_original_checkpoint(save(lsep["ema"]), path_type="cosine", **HEADS)
    assert converted.scheduler.config.path_type == "cosine"


# What is refused


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"checkpoint_path": "nowhere.pt"}, "`checkpoint_path` .* nowhere.pt"),
        ({"checkpoint_path": REFERENCE}, "`checkpoint_path`"),
        ({"weights": "best"}, r"`weights` .*\['ema', 'model'\], but is 'best'"),
        ({"source": "dit"}, r"`source` .*\['lsep', 'repa', 'sit'\], but is 'dit'"),
        ({"path_type": "VP"}, "`path_type` .*'linear' or 'cosine', but is 'VP'"),
        ({"path_type": "cosine"}, "`path_type` is 'cosine', but .*trained on the path 'linear'"),
        ({"heads": 4}, "`heads` is not known.*'num_attention_heads'"),
        ({"num_attention_heads": 0}, "`num_attention_heads` .*at least 1, but is 0"),
        ({"num_attention_heads": "4"}, "`num_attention_heads` .*an integer .*'4'"),
        ({"num_attention_heads": 5}, "`num_attention_heads` 5 times `attention_head_dim` 12 .* 64"),
        ({"sample_size": 9}, "`sample_size` has to be divisible by `patch_size`"),
        (
            {"num_classes": 11},
            r"of the wrong shape: y_embedder\.embedding_table\.weight \(\[11, 64\], not \[12, 64\]\)",
        ),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        convert_original_checkpoint(**{"checkpoint_path": REFERENCE / "lsep_tiny.pt", **HEADS, **kwargs})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"path_type": "VP"}, "trained on the path 'VP'.*'Linear', 'GVP'"),
        ({"prediction": "noise"}, "predicts 'noise'"),
        ({"num_classes": 11}, "`num_classes=11`, but the label table has 11 rows"),
    ],
)
def test_sit_models_that_cannot_be_converted(save, args, message):
    args = argparse.Namespace(**{"image_size": 256, "path_type": "Linear", **args})
    with pytest.raises(ValueError, match=message):
        convert_original_checkpoint(save({"ema": load_original("sit_tiny"), "args": args}), **HEADS)


def test_weights_that_the_file_does_not_have(save, lsep):
    with pytest.raises(ValueError, match=r"checkpoint.pt: the file has no weights 'ema', only \['model'\]"):
        convert_original_checkpoint(save({"model": lsep["model"], "args": lsep["args"]}), **HEADS)
    with pytest.raises(ValueError, match="bare state dict .*`weights` cannot be 'model'"):
        convert_original_checkpoint(REFERENCE / "sit_tiny.pt", weights="model", **HEADS)


def test_every_wrong_weight_is_listed(save, lsep):
    weights = lsep["ema"]
    del weights["blocks.1.attn.qkv.weight"], weights["classifier.0.bias"]
    weights["blocks.0.mlp.fc3.weight"] = weights["extra"] = torch.zeros(2)
    weights["blocks.0.mlp.fc2.weight"] = torch.zeros(64, 255)
    weights["blocks.0.mlp.fc2.bias"] = torch.zeros(64, dtype=torch.int64)
    weights["blocks.2.mlp.fc2.bias"] = torch.zeros(64, dtype=torch.float64)
    weights["blocks.3.mlp.fc2.bias"] = torch.zeros(1).expand(64)
    weights["final_layer.linear.bias"][3] = float("nan")
    weights["classifier.1.bias"][3] = float("inf")
    path = save(lsep)
    with pytest.raises(ValueError) as error:
        convert_original_checkpoint(path, **HEADS)
    lines = str(error.value).splitlines()
    assert (
        lines[0]
        == f"`checkpoint_path` {path}: the file does not hold the weights of the network that it should (lsep):"
    )
    assert lines[1] == "  missing: blocks.1.attn.qkv.weight, classifier.0.bias"
    assert lines[2] == "  unknown: blocks.0.mlp.fc3.weight, extra"
    assert lines[3] == (
        "  of the wrong dtype: blocks.0.mlp.fc2.bias (torch.int64, torch.strided, not float32),"
        " blocks.2.mlp.fc2.bias (torch.float64, torch.strided, not float32)"
    )
    assert lines[4] == "  of the wrong shape: blocks.0.mlp.fc2.weight ([64, 255], not [64, 256])"
    assert lines[5] == "  larger than their storage: blocks.3.mlp.fc2.bias"
    assert lines[6] == "  with values that are NaN or infinite: final_layer.linear.bias, classifier.1.bias"
    assert len(lines) == 7


def test_a_missing_weight_that_the_shapes_come_from_is_named(save, lsep):
    del lsep["ema"]["x_embedder.proj.weight"]
    with pytest.raises(ValueError, match=r"checkpoint.pt: .*x_embedder\.proj\.weight missing"):
        convert_original_checkpoint(save(lsep), **HEADS)


def test_a_position_table_that_is_not_the_fixed_one(save, lsep):
    lsep["ema"]["pos_embed"][0, 3, 5] += 0.01
    with pytest.raises(ValueError, match="pos_embed is not the fixed sine and cosine table"):
        convert_original_checkpoint(save(lsep), **HEADS)
    lsep["ema"]["pos_embed"] = lsep["ema"]["pos_embed"][:, :15]
    with pytest.raises(ValueError, match=r"pos_embed has the shape \[1, 15, 64\]"):
        convert_original_checkpoint(save(lsep), **HEADS)
    lsep["ema"]["pos_embed"] = torch.zeros(1).expand(1, 10**12, 64)
    with pytest.raises(ValueError, match="pos_embed claims more elements than its storage holds"):
        convert_original_checkpoint(save(lsep), **HEADS)


def test_old_names_that_collide(save):
    weights = load_original("repa_tiny")["ema"]
    weights = {**weights, "decoder_blocks.0.mlp.fc1.bias": weights["blocks.2.mlp.fc1.bias"]}
    args = argparse.Namespace(encoder_depth=2)
    with pytest.raises(ValueError, match=r"decoder_blocks\.0\.mlp\.fc1\.bias is blocks\.2\.mlp\.fc1\.bias .*as well"):
        convert_original_checkpoint(save({"ema": weights, "args": args}), **HEADS)


@pytest.mark.parametrize(
    "content", [[1, 2], {"ema": [1]}, {"ema": {"a": "text"}}, {"state": 1}, {3: torch.zeros(1)}, {}]
)
def test_files_that_hold_something_else(save, content):
    with pytest.raises(ValueError, match="checkpoint.pt: the (file|content)"):
        convert_original_checkpoint(save(content), **HEADS)


def test_weights_under_other_names_are_said_to_be_so(save, lsep):
    content = {"ema": {f"module.{name}": tensor for name, tensor in without(lsep["ema"], "classifier.").items()}}
    with pytest.raises(ValueError, match=r"no `x_embedder.proj.weight` among `module\."):
        convert_original_checkpoint(save(content), **HEADS)


# Files that would do harm


class Malicious:
    """Unpickled, it creates a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("kind", ["weights", "args", "old format", "plain pickle"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, save, lsep, kind):
    target = tmp_path / "pwned"
    if kind == "plain pickle":
        path = tmp_path / "checkpoint.pt"
        path.write_bytes(pickle.dumps({"args": Malicious(target)}, protocol=2))
    elif kind == "weights":
        path = save({**lsep["ema"], "extra": Malicious(target)})
    else:
        lsep["args"].extra = Malicious(target)
        path = save(lsep, _use_new_zipfile_serialization=kind == "args")

    with pytest.raises(ValueError, match=rf"{path}: the file is refused, .* `{os.mkdir.__module__}\.mkdir`") as error:
        convert_original_checkpoint(path, **HEADS)
    assert not target.exists()
    assert "weights_only" not in str(error.value), "torch's advice how to load it all the same is not passed on"
    if kind == "plain pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert target.exists(), "or else the file was harmless and this test proves nothing"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_of_a_newer_protocol_is_refused_and_runs_nothing(tmp_path, save, lsep):
    lsep["args"].extra = Malicious(tmp_path / "pwned")
    with pytest.raises(ValueError, match="checkpoint.pt: the file is refused"):
        convert_original_checkpoint(save(lsep, pickle_protocol=4), **HEADS)
    assert not (tmp_path / "pwned").exists()


def test_allowing_namespaces_does_not_outlive_the_call(lsep):
    convert_original_checkpoint(REFERENCE / "lsep_tiny.pt", **HEADS)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("length", [0, 3, 100, 5_000, 1_000_000, -1])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files(tmp_path, length, zipped):
    whole = io.BytesIO()
    torch.save(load_original("sit_tiny"), whole, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(whole.getvalue()[:length])
    with pytest.raises(ValueError, match=rf"`checkpoint_path` {path}: the file is (damaged|refused)"):
        convert_original_checkpoint(path, **HEADS)


def rewrite(path, change):
    """Rewrites the records of a file of `torch.save`."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename.partition("/")[2], old.read(record)))


def test_tensors_that_claim_more_elements_than_their_storage_holds(save):
    # A record is cut, in the middle of the file and at its end: the claimed size reaches into the next one, or beyond.
    weights = load_original("sit_tiny")
    for cut in (3, len(weights) - 1):
        path = save(weights)
        rewrite(path, lambda name, data, cut=cut: data[:-4] if name == f"data/{cut}" else data)
        with pytest.raises(ValueError, match=rf"{path}: .*claims more elements than its storage holds"):
            convert_original_checkpoint(path, **HEADS)

    # The pickle claims more: 11 rows of 64 become 11 rows of 65 in the size of the tensor.
    table = "y_embedder.embedding_table.weight"
    path = save(weights)

    def claim(name, data):
        if name != "data.pkl":
            return data
        start = data.index(table.encode())
        changed = data[start:].replace(b"K\x0bK\x40\x86", b"K\x0bK\x41\x86", 1)
        assert changed != data[start:]
        return data[:start] + changed

    rewrite(path, claim)
    with pytest.raises(ValueError, match=rf"{path}: .*claims more elements than its storage holds"):
        convert_original_checkpoint(path, **HEADS)


@pytest.mark.parametrize("place", [0.25, 0.5, 0.75])
def test_a_flipped_bit_is_found(save, place):
    path = save(load_original("sit_tiny"))
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}: the file is damaged, .*data/\d+ does not have the checksum"):
        convert_original_checkpoint(path, **HEADS)


def test_weights_without_values_are_named(save):
    weights = load_original("sit_tiny")
    name = "blocks.1.attn.qkv.weight"
    with pytest.raises(ValueError, match=rf"no values of \['{name}'\]"):
        convert_original_checkpoint(save({**weights, name: weights[name].to("meta")}), **HEADS)
    with pytest.raises(ValueError, match=rf"has to hold dense tensors, but \['{name}'\] are sparse"):
        convert_original_checkpoint(save({**weights, name: weights[name].to_sparse()}), **HEADS)


def test_rewriting_the_records_alone_is_no_error(save):
    path = save(load_original("sit_tiny"))
    rewrite(path, lambda name, data: data)
    convert_original_checkpoint(path, **HEADS)


# The names of the classes


def test_imagenet_names(tiny_transformer):
    id2label = imagenet_id2label()
    assert list(id2label) == list(range(1000))
    assert id2label[0] == "tench, Tinca tinca, n01440764" and id2label[999].startswith("toilet tissue, ")
    synsets = [re.fullmatch(r".+, (n\d{8})", label)[1] for label in id2label.values()]
    assert synsets == sorted(set(synsets)), "the order of the classes is that of the synsets"

    pipe = LSEPPipeline(tiny_transformer(num_classes=1000), FlowMatchSDEScheduler(), id2label=id2label)
    assert pipe.get_label_ids(["golden retriever", "macaw", "n02012849", "n03126707"]) == [207, 88, 134, 517]
    with pytest.raises(ValueError, match="'crane' .*134 .*517"):
        pipe.get_label_ids("crane")


def test_the_names_state_their_source_and_licence():
    import diffusers_lsep

    content = json.loads((Path(diffusers_lsep.__file__).parent / "imagenet_labels.json").read_text())
    assert "WordNet 3.0" in content["_source"] and "Copyright 2006 by Princeton University" in content["_license"]


def test_names_from_a_file(tmp_path):
    path = tmp_path / "names.json"
    for content in (["cat", "dog, hound"], {"1": "dog, hound", "0": "cat"}):
        path.write_text(json.dumps(content))
        assert read_id2label(path) == {0: "cat", 1: "dog, hound"}
    for content in ("{", '{"a": "cat"}', "3", '["cat", 3]', '{"0": null}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="`id2label` .*names.json"):
            read_id2label(path)
    with pytest.raises(ValueError, match="`id2label` .*absent.json"):
        read_id2label(tmp_path / "absent.json")
