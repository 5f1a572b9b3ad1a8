# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The memory that training needs: for weights and all that belongs to them, and for what a step keeps, counted."""

import argparse
import functools
import math
import operator
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.utils import is_torch_version
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ..objective import LSEPObjective
from .setup import Setup, build_objective


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def state_needed(setup: Setup, objective: LSEPObjective, num_shards: int = 1) -> int:
    """
    Bytes of the weights in float32, frozen ones too, and of gradients, AdamW's two moments and averages of what is
    trained.

    Args:
        setup ([`Setup`]): What the flags of a run come to.
        objective ([`LSEPObjective`]): The objective, whose weights may be on the meta device.
        num_shards (`int`, defaults to `1`): Among how many processes the weights are shared out.
    """
    args = setup.args
    parameters = sum(p.numel() for p in objective.transformer.parameters())
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    encoder = setup.encoder.model if setup.encoder is not None else None
    teacher = setup.teacher.transformer if setup.teacher is not None else None
    frozen = [model for model in (setup.vae, encoder, teacher) if model is not None]
    frozen_parameters = sum(p.numel() for model in frozen for p in model.parameters())
    copies = 1 + num_tensors_kept(args)
    return 4 * ((parameters + trained * copies) // num_shards + frozen_parameters)


def num_tensors_kept(args: argparse.Namespace) -> int:
    """How many tensors there are in a checkpoint for each one that is trained, beside itself: moments and averages."""
    return 2 + int(args.use_ema) + len(args.post_hoc_ema_sigmas or ())


def copies_needed(setup: Setup, objective: LSEPObjective) -> int:
    """Bytes of the copies on the host that [`CheckpointWriter`] writes from."""
    weights = sum(tensor.numel() for tensor in objective.state_dict().values())
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    return 4 * (weights + trained * num_tensors_kept(setup.args))


def activations_needed(setup: Setup, compiles: bool) -> int:
    """
    Bytes that a step of a run keeps for its backward pass ([`count_activations`]), without those of regularizers.

    Args:
        setup ([`Setup`]): What its flags come to.
        compiles (`bool`): Whether it is compiled.
    """
    args = setup.args
    # How many samples have another label in the probe's stream, which is then computed for them
    p, q = args.class_dropout_prob, args.probe_dropout_prob
    differ = abs(p - q) if args.coupled_dropout else p + q - 2 * p * q
    num_separate = math.ceil(args.train_batch_size * args.probe_fraction * differ)
    # Autocast on GPUs keeps LayerNorms in float32, on CPUs not. Old versions abort at tensors on a GPU that is not
    # there.
    simulates = torch.cuda.is_available() or is_torch_version(">=", "2.15.0")
    device_type = "cuda" if torch.backends.cuda.is_built() and simulates and not compiles else "cpu"
    with torch.device("meta"):
        objective = build_objective(setup, load=False)
    objective.regularizers = nn.ModuleDict()
    with without_values(device_type):
        objective.to_empty(device=device_type)
        batch = empty_batch(objective, args.train_batch_size, num_separate)
        return count_activations(objective, batch, DTYPES.get(args.mixed_precision, torch.float32), compiles)


def empty_batch(objective: LSEPObjective, batch_size: int, num_separate: int) -> dict[str, torch.Tensor]:
    """Arguments of `forward` with all draws, on PyTorch's default device."""
    config = objective.transformer.config
    latents, row = torch.zeros(batch_size, config.in_channels, *[config.sample_size] * 2), torch.zeros(batch_size)
    batch = {"latents": latents, "noise": latents, "class_labels": row.long(), "timesteps": row}
    batch["class_dropout_mask"] = row.bool()
    if objective.probe is not None:
        batch["probe_dropout_mask"] = row.bool()
        batch["separate_rows"] = torch.arange(num_separate)
        if objective.crop_size is not None:
            batch["crop_window"] = torch.ones(batch_size, 3, dtype=torch.int64)
    return batch


def count_activations(
    objective: LSEPObjective, batch: dict[str, torch.Tensor], dtype: torch.dtype, compiles: bool = False
) -> int:
    """
    Bytes of the tensors that autograd keeps for the backward pass of a batch: without weights, which are there anyway,
    but with their copies in the dtype of autocast. The forward pass is run for it, on tensors without values inside of
    [`without_values`].

    Args:
        objective ([`LSEPObjective`]): The objective. What regularizers keep is counted too.
        batch (`dict`): The arguments of its `forward`.
        dtype (`torch.dtype`): Of autocast; `torch.float32` is none.
        compiles (`bool`, defaults to `False`):
            Whether the blocks are compiled: then that is counted which the compiler of PyTorch would keep of a block,
            by `torch._functorch.config.activation_memory_budget`. On the CPU only.
    """
    transformer, device_type = objective.transformer, batch["latents"].device.type
    weights = {tensor.untyped_storage()._cdata for tensor in (*objective.parameters(), *objective.buffers())}
    kept: dict[int, torch.Tensor] = {}  # by their storage, which is not freed as long as they are here
    sizes: defaultdict[nn.Module | None, int] = defaultdict(int)  # of blocks, and of all around them
    inputs: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    running: list[nn.Module | None] = [None]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in kept:
            kept[storage._cdata] = tensor
            sizes[running[-1]] += storage.nbytes()
        return tensor

    def enter(block: nn.Module, arguments: tuple):
        inputs[block] = arguments
        running.append(block)

    def leave(block: nn.Module, arguments: tuple, output: torch.Tensor):
        running.pop()

    checkpoints = transformer.gradient_checkpointing
    handles = [hook for block in transformer.transformer_blocks for hook in
               (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))]  # fmt: skip
    try:
        transformer.disable_gradient_checkpointing()
        with autocast(device_type, dtype), FusedAttention():
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                objective(**batch)
            for handle in handles:
                handle.remove()
            if compiles:
                sizes_of: dict[Any, int] = {}
                for block, (tokens, condition) in inputs.items():
                    if (key := (tokens.shape, tokens.dtype)) not in sizes_of:
                        sizes_of[key] = count_compiled(block, tokens.detach(), condition.detach())
                    sizes[block] = sizes_of[key]
    finally:
        for handle in handles:
            handle.remove()
        if checkpoints:
            transformer.enable_gradient_checkpointing()
    of_blocks = [sizes[block] for block in inputs]
    if checkpoints:  # of a block its input is kept, and all of one block at a time
        return sizes[None] + sum(tokens.nbytes for tokens, _ in inputs.values()) + max(of_blocks)
    return sizes[None] + sum(of_blocks)


def trace_block(
    block: nn.Module, tokens: torch.Tensor, condition: torch.Tensor
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """
    Forward and backward pass of a block as PyTorch's compiler would cut them apart, for tensors without values on the
    CPU (autograd asks the driver of any other device). The first inputs of the forward pass are the weights; its first
    output is that of the block, and the others are kept.
    """
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    function = aot_function(
        lambda weights, tokens, condition: torch.func.functional_call(block, weights, (tokens, condition)),
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )
    output = function(dict(block.named_parameters()), tokens.requires_grad_(), condition.requires_grad_())
    output.backward(torch.zeros_like(output))
    return graphs[0], graphs[1]


def count_compiled(block: nn.Module, tokens: torch.Tensor, condition: torch.Tensor) -> int:
    """Bytes that a compiled block keeps for its backward pass, without its weights."""
    nodes = list(trace_block(block, tokens, condition)[0].graph.nodes)
    weights = [node for node in nodes if node.op == "placeholder"][: len(list(block.parameters()))]
    output, *kept = (find_base(node) for node in nodes[-1].args[0] if isinstance(node, torch.fx.Node))
    values = [node.meta["val"] for node in set(kept) - {output, *weights}]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def find_base(node: Any) -> torch.fx.Node:
    """Of a view, what it is a view of."""
    while node.op == "call_function":
        returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
        # `split` and its like give lists of views, of which `getitem` takes one.
        is_part = node.target is operator.getitem and find_base(node.args[0]) is not node.args[0]
        if not is_part and not any(value.alias_info is not None for value in returns):
            break
        node = node.args[0]
    return node


@contextmanager
def without_values(device_type: str) -> Iterator[None]:
    """Tensors that are made in here are on that device, which need not be there, and take no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device_type):
        yield


@contextmanager
def autocast(device_type: str, dtype: torch.dtype) -> Iterator[None]:
    """`torch.autocast`, for a device that need not be there."""
    if dtype == torch.float32:
        yield
        return
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, True)
    torch.set_autocast_dtype(device_type, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])


class FusedAttention(TorchFunctionMode):
    """
    Attention by the fused kernel, which keeps no matrix of all pairs of tokens. Without values PyTorch would choose
    the plain formula.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        names = ("query", "key", "value")
        query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
        aten, options = torch.ops.aten, {"scale": kwargs.get("scale")}
        if query.device.type == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, **options)[0]
        if query.dtype == torch.float32:
            return aten._scaled_dot_product_efficient_attention(query, key, value, None, True, **options)[0]
        return aten._scaled_dot_product_flash_attention(query, key, value, **options)[0]
