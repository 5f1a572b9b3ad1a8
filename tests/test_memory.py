# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The memory of a training step, counted before it runs."""

import pytest
import torch
from tiny_models import make_transformer
from torch._functorch import config as functorch_config

from diffusers_lsep import SIT_PRESETS, LinearProbe, LSEPObjective, SiTTransformer2DModel
from diffusers_lsep.training import summary
from diffusers_lsep.training.checkpoint_writer import CheckpointWriter
from diffusers_lsep.training.memory import copies_needed, count_activations, empty_batch, without_values


def make_objective(checkpoints=False, preset=None, make=make_transformer, **config) -> LSEPObjective:
    transformer = make(**(SIT_PRESETS[preset] if preset else {}), **config).train()
    if checkpoints:
        transformer.enable_gradient_checkpointing()
    probe = LinearProbe(transformer.inner_dim, transformer.config.num_classes)
    return LSEPObjective(transformer, probe, probe_depth=8 if preset else 1)


def count(device_type="cpu", dtype=torch.float32, compiles=False, batch_size=6, num_separate=5, **arguments) -> int:
    with without_values(device_type):
        objective = make_objective(make=SiTTransformer2DModel, **{"sample_size": 8, **arguments})
        return count_activations(objective, empty_batch(objective, batch_size, num_separate), dtype, compiles)


TINY = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, "num_classes": 10}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"qk_norm": True, "num_layers": 3}], ids=["plain", "qk_norm"])
def test_equals_what_autograd_keeps_of_real_tensors(dtype, config):
    """Every storage that a real forward pass leaves to its backward pass, but weights, and each once."""
    objective = make_objective(**config)
    batch = empty_batch(objective, batch_size=6, num_separate=5)
    ours = {tensor.untyped_storage().data_ptr() for tensor in (*objective.parameters(), *objective.buffers())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            objective(**batch)
    expected = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in ours)
    # Without values PyTorch rounds the moments of such a LayerNorm to bfloat16, which it does not do with values.
    tolerance = 0.02 if config and dtype == torch.bfloat16 else 0
    assert count(dtype=dtype, **{**TINY, **config}) == pytest.approx(expected, rel=tolerance, abs=0)


@pytest.mark.slow
def test_grows_with_blocks_and_rows():
    sizes = [count(**{**TINY, "num_layers": layers}) for layers in (2, 3, 4)]
    block = sizes[1] - sizes[0]
    assert sizes[2] - sizes[1] == block > 0
    # Checkpointed, a block keeps its input, and one block at a time all of it: 6 x 16 tokens of width 32 in float32.
    checkpointed = [count(checkpoints=True, **{**TINY, "num_layers": layers}) for layers in (2, 3, 4)]
    assert checkpointed[2] - checkpointed[1] == checkpointed[1] - checkpointed[0] == 6 * 16 * 32 * 4
    assert checkpointed[0] < sizes[0]
    rows = [count(batch_size=size, num_separate=size, **TINY) for size in (10, 20, 30)]
    assert rows[2] - rows[1] == pytest.approx(rows[1] - rows[0], rel=1e-3)


@pytest.mark.slow
def test_the_compiler_keeps_less_and_with_a_budget_less_yet():
    arguments = {
        "dtype": torch.bfloat16,
        **TINY,
        "sample_size": 16,
        "num_attention_heads": 6,
        "attention_head_dim": 64,
    }
    eager, compiled = count(**arguments), count(compiles=True, **arguments)
    with functorch_config.patch(activation_memory_budget=0.5):
        assert count(compiles=True, **arguments) < compiled < eager


@pytest.mark.slow
def test_the_figure_of_the_guide():
    """SiT-XL/2 at 256 px, 32 images, in bfloat16 on a GPU; a part of it are the weights' copies, two bytes each."""
    arguments = {"preset": "SiT-XL/2", "sample_size": 32, "num_classes": 1000}
    size = count("cuda", torch.bfloat16, batch_size=32, num_separate=26, **arguments)
    assert size / 1e9 == pytest.approx(18.5, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--no-use_ema"], ["--post_hoc_ema_sigmas", 0.05, 0.1]])
def test_copies_for_checkpoints_are_counted(train, monkeypatch, flags):
    """What is counted ahead, and what is there at the end, but for the numbers of AdamW's steps."""
    counted, writers = [], []

    def count(*arguments):
        counted.append(copies_needed(*arguments))
        return counted[-1]

    def finish(writer, finish=CheckpointWriter.finish):
        writers.append(writer)
        finish(writer)

    monkeypatch.setattr(summary, "copies_needed", count)
    monkeypatch.setattr(CheckpointWriter, "finish", finish)
    assert train("--max_train_steps", 1, *flags) == 0
    there = sum(copy.nbytes for copy in writers[-1]._copies.values() if copy.ndim > 0)
    assert counted == [there]


@pytest.mark.slow
def test_a_run_says_what_it_needs(train, capsys):
    train("--dry_run", "--mixed_precision", "bf16")
    printed = capsys.readouterr().out
    assert "GB of activations (not compiled), and 0.00 GB in the one that writes checkpoints" in printed
    train("--dry_run", "--gradient_checkpointing")
    assert "GB of activations (not compiled, with gradient checkpointing)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_compiled_run_says_what_it_needs_with_a_budget(train, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with functorch_config.patch(activation_memory_budget=1.0):
        train("--dry_run", "--activation_memory_budget", 0.5)
        assert functorch_config.activation_memory_budget == 0.5
    assert "GB of activations (compiled)" in capsys.readouterr().out


def test_a_budget_is_for_the_compiler(train):
    with pytest.raises(ValueError, match="`--activation_memory_budget` 0.5 needs a compiled step"):
        train("--dry_run", "--activation_memory_budget", 0.5)
