# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""
Refuses arguments of a wrong type, size or value, in words that name them. Numbers may be of any library; what is
returned is Python's own, which alone a config can be saved with.
"""

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from torch._C._functorch import peek_interpreter_stack


MAX_COUNT = 1_000_000  # of steps, images and classes: more are a mistake, and would end in a want of memory

SHOWN_CHARACTERS = 200  # of a value, in a message


def describe(value: Any) -> str:
    """A value, for a message: no more of it than can be read."""
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a tensor of {dtype} and shape {list(value.shape)}"
    try:
        text = repr(value)
    except Exception:  # of an integer with thousands of digits, or of somebody's class
        return f"of type {type(value).__name__}"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _to_float(value: Any) -> float:
    """A number of whatever library as Python's; NaN if it is none."""
    if isinstance(value, (str, bytes, bytearray)) or getattr(value, "ndim", False):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def check_number(
    name: str,
    value: Any,
    condition: str = "be a finite number",
    holds: Callable[[float], bool] = math.isfinite,
) -> float:
    """
    Raises a `ValueError` if the argument `name` is no number, or not one for which the condition `holds`; NaN is none.
    """
    number = _to_float(value)
    if math.isnan(number) or not holds(number):
        raise ValueError(f"`{name}` has to {condition}, but is {describe(value)}.")
    return number


def check_not_negative(name: str, value: Any) -> float:
    """Raises a `ValueError` if the argument `name` is no finite number from 0 on."""
    return check_number(name, value, "be a number not below 0", lambda x: 0 <= x < math.inf)


def check_positive(name: str, value: Any) -> float:
    """Raises a `ValueError` if the argument `name` is no finite number above 0."""
    return check_number(name, value, "be above 0", lambda x: 0 < x < math.inf)


def check_probability(name: str, value: Any) -> float:
    """Raises a `ValueError` if the argument `name` does not lie in [0, 1]."""
    return check_number(name, value, "lie in [0, 1]", lambda x: 0 <= x <= 1)


def check_interval(name: str, value: Any) -> tuple[float, float]:
    """Raises a `ValueError` if the argument `name` is no pair of times."""
    # Of what can be looked at again: a generator cannot.
    is_sequence = isinstance(value, (Sequence, torch.Tensor, np.ndarray)) and getattr(value, "ndim", 1) == 1
    times = [_to_float(x) for x in value] if is_sequence else []
    if len(times) != 2 or not 0 <= times[0] <= times[1] <= 1:
        raise ValueError(f"`{name}` has to be (low, high) with 0 <= low <= high <= 1, but is {describe(value)}.")
    return times[0], times[1]


def check_count(name: str, value: Any, low: int = 1, high: float = MAX_COUNT) -> int:
    """Raises a `ValueError` if the argument `name` is no integer, of whatever library, or not in `low..high`."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        count = operator.index(value)
    except (TypeError, RuntimeError):
        raise ValueError(f"`{name}` has to be an integer, but is {describe(value)}.") from None
    if not low <= count <= high:
        limit = f"at least {low}" if count < low else f"at most {high:,}"
        raise ValueError(f"`{name}` has to be {limit}, but is {describe(count)}.")
    return count


def check_choice(name: str, value: Any, choices: Iterable[str]):
    """Raises a `ValueError` if the argument `name` is none of some strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` has to be one of {list(choices)}, but is {describe(value)}.")


def check_type(name: str, value: Any, allowed: Any, description: str):
    """Raises a `ValueError` if the argument `name` is neither None nor `allowed`, which the description says."""
    if value is not None and not isinstance(value, allowed):
        raise ValueError(f"`{name}` has to be {description}, but is of type {type(value).__name__}.")


# What a tensor may hold, by the word that messages have for it.
_HOLDS: dict[str, Callable[[torch.Tensor], bool]] = {
    "floating-point numbers": torch.is_floating_point,
    "integers": lambda x: not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool),
    "booleans": lambda x: x.dtype == torch.bool,
}


def check_tensor(name: str, value: Any, shape: Sequence[int | str] | None = None, of: str = "floating-point numbers"):
    """
    Raises a `ValueError` if the argument `name` is no tensor of what it has to hold, or of another shape. Looks at no
    number, for which a device would have to be waited for.

    Args:
        name (`str`): The argument.
        value: What it is.
        shape (`Sequence[int | str]`, *optional*): Its shape; a word stands for any length. Any shape if not given.
        of (`str`, defaults to `"floating-point numbers"`): What it holds, or `"integers"` or `"booleans"`.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` has to be a tensor, but is of type {type(value).__name__}.")
    if not _HOLDS[of](value):
        raise ValueError(f"`{name}` has to be a tensor of {of}, but is {describe(value)}.")
    if shape is None:
        return
    sizes = zip(shape, value.shape)
    if len(shape) != value.ndim or any(isinstance(n, int) and n != size for n, size in sizes):
        expected = ", ".join(map(str, shape))
        raise ValueError(f"`{name}` has to be of shape [{expected}], but is of shape {list(value.shape)}.")


def can_be_seen(tensor: torch.Tensor) -> bool:
    """Whether looking at numbers costs nothing: an accelerator has to be waited for, a compiler has none to show."""
    is_plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided and not torch.compiler.is_compiling()
    return is_plain and tensor.device.type == "cpu" and peek_interpreter_stack() is None


def check_values(name: str, tensor: torch.Tensor, low: float, high: float):
    """
    Raises a `ValueError` if a number of the tensor `name` is not in `low..high`, or is NaN, where that `can_be_seen`.
    """
    if not can_be_seen(tensor):
        return
    fits = (tensor >= low) & (tensor <= high)
    if not bool(fits.all()):
        values = tensor.detach()[~fits][:8].tolist()
        raise ValueError(f"`{name}` has to lie in {low:g}..{high:g}, but holds {describe(values)}.")


def check_generator(name: str, value: Any, num_samples: int):
    """Raises a `ValueError` if the argument `name` is not None, a generator, or a list of one for each sample."""
    for each in value if isinstance(value, list) else [value]:
        check_type(name, each, torch.Generator, "a `torch.Generator`, or a list of them")
    if isinstance(value, list) and (len(value) != num_samples or None in value):
        raise ValueError(
            f"`{name}` has to be one generator or a list of one for each of the {num_samples} images, but is a list of"
            f" {sum(each is not None for each in value)}."
        )


def make_plain(component: ConfigMixin):
    """Puts Python's own numbers into a config in place of numpy's and torch's, with which it could not be saved."""
    plain = {}
    for name, value in component.config.items():
        if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
            plain[name] = value.item()
        elif isinstance(value, numbers.Number) and not isinstance(value, (int, float)):
            plain[name] = _to_float(value)
    component.register_to_config(**plain)


def check_flag(name: str, value: Any):
    """Raises a `ValueError` if the argument `name` is not True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` has to be True or False, but is {describe(value)}.")
