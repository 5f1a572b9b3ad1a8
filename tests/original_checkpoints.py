# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The small checkpoints of the original code in `reference/`, and our weights in its layout."""

import argparse
import re
from pathlib import Path

import torch


REFERENCE = Path(__file__).parent / "reference"
NAMES = ["lsep_tiny", "lsep_tiny_cosine", "repa_tiny", "sit_tiny"]
HEADS = {"num_attention_heads": 4}


def load_original(name):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(REFERENCE / f"{name}.pt", weights_only=True)


def original_weights(model, probe=None, num_tokens=None):
    """The weights of our model as the original code names and lays them out, by the rules of the file formats."""
    state = model.state_dict()
    table = model.pos_embed.pos_embed
    original = {"pos_embed": table if num_tokens is None else table[:, :num_tokens]}
    renames = {
        "pos_embed.proj": "x_embedder.proj",
        "time_embedding.linear_1": "t_embedder.mlp.0",
        "time_embedding.linear_2": "t_embedder.mlp.2",
        "class_embedding": "y_embedder.embedding_table",
        "proj_out": "final_layer.linear",
        "norm1.linear": "adaLN_modulation.1",
        "attn.norm_q": "attn.q_norm",
        "attn.norm_k": "attn.k_norm",
        "attn.to_out.0": "attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    }
    for name, tensor in state.items():
        module, kind = name.rsplit(".", 1)
        prefix = ""
        if match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
            prefix, module = f"blocks.{match[1]}.", match[2]
        if module == "attn.to_q":
            base = f"transformer_{prefix}attn.to_"
            original[f"{prefix}attn.qkv.{kind}"] = torch.cat([state[f"{base}{x}.{kind}"] for x in "qkv"])
        elif module == "norm_out.linear":
            scale, shift = tensor.chunk(2)
            original[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        elif module not in ("attn.to_k", "attn.to_v"):
            original[f"{prefix}{renames[module]}.{kind}"] = tensor
    if probe is not None:
        for name, tensor in probe.state_dict().items():
            original[name.replace("norm", "classifier.0").replace("linear", "classifier.1")] = tensor
    return original
