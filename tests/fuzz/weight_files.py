# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Damaged and forged files of weights: `.pt` of the original projects, and `.safetensors` in diffusers' layout."""

import argparse
import functools
import io
import json
import tempfile
from pathlib import Path

import torch
from fuzz.cases import Case
from fuzz.data_files import Trap, damage, without_code
from hypothesis import strategies as st
from original_checkpoints import original_weights
from safetensors.torch import save
from tiny_models import make_transformer

from diffusers_lsep import LinearProbe, SiTTransformer2DModel, convert_original_checkpoint


@functools.cache
def checkpoint() -> tuple[dict, dict[str, torch.Tensor]]:
    """A checkpoint as LSEP's code writes it, and the weights of the model that it is of."""
    model = make_transformer(num_layers=1, sample_size=4, num_attention_heads=2)
    with torch.no_grad():
        weights = {
            name: value.detach().clone() for name, value in original_weights(model, LinearProbe(16, 10)).items()
        }
    args = argparse.Namespace(model="tiny", num_classes=10, path_type="linear", prediction="v", encoder_depth=1)
    return {"model": weights, "ema": weights, "args": args, "steps": 3}, model.state_dict()


JUNK_VALUES = (None, 3, "x", b"y", [], {}, float("nan"), 10**30, (1, 2), {"a": torch.zeros(1)}, torch.zeros(2))


def change_tensor(draw, tensor: torch.Tensor):
    kind = draw(st.sampled_from(["dtype", "nan", "shape", "meta", "sparse", "expanded", "empty", "none"]))
    return {
        "dtype": lambda: tensor.to(draw(st.sampled_from([torch.int64, torch.bool, torch.complex64, torch.float64]))),
        "nan": lambda: torch.full_like(tensor, draw(st.sampled_from([float("nan"), float("inf")]))),
        "shape": lambda: tensor.reshape(draw(st.sampled_from([(-1,), (1, *tensor.shape)])))[:-1],
        "meta": lambda: tensor.to("meta"),
        "sparse": lambda: tensor.to_sparse(),
        "expanded": lambda: torch.zeros(()).expand(*tensor.shape),
        "empty": lambda: torch.zeros(0),
        "none": lambda: draw(st.sampled_from(JUNK_VALUES)),
    }[kind]()


@st.composite
def originals(draw) -> Case:
    whole, expected = checkpoint()
    content = {**whole, "ema": dict(whole["ema"]), "args": argparse.Namespace(**vars(whole["args"]))}
    kind = draw(
        st.sampled_from(["right", "bytes", "bytes", "bytes", "tensor", "names", "args", "content", "trap", "argument"])
    )
    weights, options = content["ema"], {"num_attention_heads": 2}
    name = draw(st.sampled_from(sorted(weights)))
    if kind == "tensor":
        weights[name] = change_tensor(draw, weights[name])
    elif kind == "names":
        change = draw(st.sampled_from(["missing", "renamed", "more", "number"]))
        if change == "more":
            weights[draw(st.sampled_from(["blocks.7.attn.qkv.weight", "x", "decoder_blocks.0.attn.proj.bias"]))] = (
                torch.zeros(1)
            )
        else:
            value = weights.pop(name)
            if change != "missing":
                weights[f"module.{name}" if change == "renamed" else 3] = value
    elif kind == "args":
        argument = draw(
            st.sampled_from(["num_classes", "path_type", "prediction", "encoder_depth", "qk_norm", "model"])
        )
        setattr(content["args"], argument, draw(st.sampled_from(JUNK_VALUES)))
    elif kind == "content":
        content = draw(
            st.sampled_from([*JUNK_VALUES, {"ema": None}, {"ema": {}}, {"model": {}}, {"ema": [1]}, {1: 2}])
        )
    elif kind == "trap":
        content["opt"] = Trap()
    elif kind == "argument":
        options[
            draw(st.sampled_from(["num_attention_heads", "weights", "source", "path_type", "sample_size", "no"]))
        ] = draw(st.sampled_from([None, 0, -1, 3, 10**9, 1.5, "x", b"y", [], {}, float("nan")]))
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=draw(st.sampled_from([True, True, True, False])))
    is_zip = file.getvalue()[:2] == b"PK"
    data = damage(draw, file.getvalue()) if kind == "bytes" else file.getvalue()

    def call():
        with tempfile.TemporaryDirectory() as folder, without_code():
            path = Path(folder, "checkpoint.pt")
            path.write_bytes(data)
            return convert_original_checkpoint(path, **options)

    def check(converted) -> str | None:
        if kind == "argument" or (kind == "bytes" and not is_zip):
            return None  # of files before torch 1.6, which have no checksums, values may be others
        found = converted.transformer.state_dict()
        same = found.keys() == expected.keys() and all(
            torch.equal(found[k], v.to(found[k].dtype)) for k, v in expected.items()
        )
        return None if same else "other weights"

    names = ["`checkpoint_path`", *(f"`{name}`" for name in options)]
    bad = names if kind in ("content", "trap") else []
    either = names if kind in ("bytes", "tensor", "names", "args", "argument") else []
    return Case(f".pt, {kind}", call, bad, either, check)


@st.composite
def single_files(draw) -> Case:
    """Weights in diffusers' layout; a bit that is flipped in a number has no checksum, so that only headers change."""
    _, expected = checkpoint()
    weights = dict(expected)
    data = save(weights, metadata={"format": "pt"})
    header_end = 8 + int.from_bytes(data[:8], "little")
    kind = draw(st.sampled_from(["right", "header", "header", "cut", "tensor", "names", "length", "config"]))
    if kind == "header":
        data = damage(draw, data[:header_end]) + data[header_end:]
    elif kind == "cut":
        data = data[: draw(st.integers(0, len(data) - 1))]
    elif kind == "length":
        data = draw(st.sampled_from([2**63, 2**40, 0, len(data)])).to_bytes(8, "little") + data[8:]
    elif kind == "tensor":
        name = draw(st.sampled_from(sorted(weights)))
        weights[name] = draw(
            st.sampled_from([torch.zeros(3), torch.zeros(weights[name].shape, dtype=torch.int64), torch.zeros(0, 2)])
        )
        data = save(weights)
    elif kind == "names":
        name = draw(st.sampled_from(sorted(weights)))
        value = weights.pop(name)
        if draw(st.booleans()):
            weights[f"x.{name}"] = value
        data = save(weights)
    model = make_transformer(num_layers=1, sample_size=4, num_attention_heads=2)
    config = json.loads(model.to_json_string())
    if kind == "config":
        name = draw(st.sampled_from([*config, "extra"]))
        config[name] = draw(st.sampled_from([None, 0, -1, 3, 10**9, 2**62, 1.5, "x", [], {}, True, float("nan")]))

    def call():
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config))
            path = Path(folder, "diffusion_pytorch_model.safetensors")
            path.write_bytes(data)
            return SiTTransformer2DModel.from_single_file(path)

    def check(found) -> str | None:
        same = all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
        return None if same or kind == "config" else "other weights"

    names = ["pretrained_model_link_or_path_or_dict", "`config`", *(f"`{name}" for name in config)]
    bad = names if kind in ("cut", "tensor", "names", "length") else []
    return Case(f".safetensors, {kind}", call, bad, names if kind in ("header", "config") else [], check, (OSError,))


SURFACES = {"original checkpoint": originals(), "single file": single_files()}
