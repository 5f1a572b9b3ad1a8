# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""
CUDA without CUDA: the shape, dtype and device of every tensor on a GPU, by torch's `FakeTensorMode`, without values
and without a driver. What is on the host is computed as always. PyTorch has to be built with CUDA, as its wheels for
Linux are.

What would be an error on a device is one here too: mixing devices, or (unless asked otherwise) reading a value. What
is slow rather than wrong, copies between host and device, is counted by [`Copies`].
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


DEVICE_NAME = "NVIDIA H100 80GB HBM3"


class _SimulatedCuda(FakeTensorMode):
    """Fake tensors for the device, and real ones for the host."""

    # The property of this name asks `torch.cuda.is_available()`, and what follows from a yes is a call of the driver.
    avoid_device_init = True

    def __init__(self, readable: bool):
        super().__init__(allow_non_fake_inputs=False)
        self.readable = readable

    def __deepcopy__(self, memo: dict) -> "_SimulatedCuda":
        return self  # of the tensors that are copied it is the one mode

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type != "cuda" and not any(isinstance(value, FakeTensor) for value in tensors):
            return function(*args, **kwargs)
        if self.readable and function is torch.ops.aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        if self.readable and function is torch.ops.aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0].zero_()  # host memory, new or not
        args, kwargs = tree_map_only(torch.Tensor, self._to_fake, (args, kwargs))
        output = super().__torch_dispatch__(function, types, args, kwargs)
        if self.readable and any(isinstance(x, FakeTensor) and x.device.type == "cuda" for x in tensors):
            output = tree_map_only(torch.Tensor, self._to_host, output)
        return output

    def _to_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor, static_shapes=True)

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Zeros for what has come from the device, also where torch has made memory for it already."""
        if tensor.device.type != "cpu":
            return tensor
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, FakeTensor) else tensor.zero_()


@contextmanager
def simulated_cuda(readable: bool = False) -> Iterator[None]:
    """
    A machine with one GPU, `cuda:0`, whose tensors have no values.

    Args:
        readable (`bool`, defaults to `False`): Whether to read zeros from the device where that would be an error.
    """
    answers: dict[str, Any] = {
        "torch.cuda.is_available": True,
        "torch.cuda.device_count": 1,
        "torch.cuda.current_device": 0,
        "torch.cuda.is_bf16_supported": True,
        "torch.cuda.get_device_capability": (9, 0),
        "torch.cuda.get_device_name": DEVICE_NAME,
        "torch.cuda.set_device": None,
        "torch.cuda.synchronize": None,
        "torch.cuda.empty_cache": None,
        "torch.cuda.max_memory_allocated": 0,
        "torch.cuda.reset_peak_memory_stats": None,
        # Outside of the engine, checkpointing would compute a block anew for each of the tensors that it has saved.
        "torch._C._current_graph_task_id": 1,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, return_value=answer))
        stack.enter_context(mock.patch("torch.Tensor.backward", backward))
        stack.enter_context(mock.patch("torch.Tensor.pin_memory", lambda tensor, device=None: tensor))
        stack.enter_context(mock.patch("torch.nn.Module._apply", _replace_tensors))
        yield stack.enter_context(_SimulatedCuda(readable))


@torch.no_grad()
def _replace_tensors(module: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
    """`module.to(...)`, by new parameters: those of fake tensors cannot be swapped where they are."""
    for each in module.modules() if recurse else [module]:
        for name, old in each._parameters.items():
            new = function(old) if old is not None else old
            if new is not old:
                each._parameters[name] = nn.Parameter(new, old.requires_grad)
        for name, old in each._buffers.items():
            each._buffers[name] = function(old) if old is not None else old
    return module


@torch.no_grad()
def backward(loss: torch.Tensor, gradient: torch.Tensor | None = None, **options: Any):
    """`loss.backward()`, node by node: autograd's own engine asks the driver about the device."""
    waiting: Counter = Counter()
    stack, seen = [loss.grad_fn], {loss.grad_fn}
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)

    gradients: defaultdict = defaultdict(dict)
    gradients[loss.grad_fn][loss.output_nr] = torch.ones_like(loss) if gradient is None else gradient
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        received = gradients.pop(node, {})
        inputs = [_fit(received.get(index), wanted) for index, wanted in enumerate(node._input_metadata)]
        if hasattr(node, "variable"):  # a leaf
            if inputs[0] is not None:
                leaf = node.variable
                leaf.grad = inputs[0].detach().clone() if leaf.grad is None else leaf.grad.add_(inputs[0])
            continue
        outputs = node(*inputs) if any(value is not None for value in inputs) else None
        if not isinstance(outputs, tuple):
            outputs = (outputs,) * len(node.next_functions)
        for (following, index), value in zip(node.next_functions, outputs):
            if following is None:
                continue
            if value is not None:
                known = gradients[following].get(index)
                gradients[following][index] = value if known is None else known + value
            waiting[following] -= 1
            if waiting[following] == 0:
                ready.append(following)


def _fit(gradient: torch.Tensor | None, wanted: Any) -> torch.Tensor | None:
    """A gradient in the shape and dtype of what it belongs to, as the engine makes them."""
    if gradient is None:
        return None
    return gradient.sum_to_size(wanted.shape).to(wanted.dtype)


class Copies(TorchDispatchMode):
    """
    Counts the copies between host and device, inside of [`simulated_cuda`].

    Attributes:
        all (`list[str]`): The operations that copied.
        blocking (`list[str]`):
            Those of them for which the host waits: not `non_blocking`. (Those that are do not wait if the host's
            memory is pinned, which is not seen here.)
    """

    def __init__(self):
        super().__init__()
        self.all: list[str] = []
        self.blocking: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        aten = torch.ops.aten
        inputs, outputs = _places((args, kwargs)), _places(output)
        if function is aten._to_copy.default or function is aten.copy_.default:
            is_copy = len(inputs | outputs) > 1
        else:
            # A number on the host is handed to a kernel with its call; any other tensor has to be brought.
            numbers = _places((args, kwargs), numbers=False)
            is_copy = len(numbers | outputs) > 1 or (function is aten._local_scalar_dense.default and "cuda" in inputs)
        if is_copy:
            self.all.append(str(function))
            waits = not (kwargs.get("non_blocking") or (function is aten.copy_.default and any(args[2:])))
            if waits:
                self.blocking.append(str(function))
        return output


def _places(values: Any, numbers: bool = True) -> set[str]:
    """The types of the devices of tensors, with or without those of one number on the host."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    return {x.device.type for x in tensors if numbers or x.ndim > 0 or x.device.type != "cpu"}
