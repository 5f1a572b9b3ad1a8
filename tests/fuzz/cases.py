# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Generated calls, and the judge of how they end.

Every value is drawn together with what ought to become of it, decided here and not by the code under test: `GOOD` has
to work, `BAD` has to be refused, with `EITHER` one or the other. A call of good values has to give a right result; one
with a bad value has to end in a `ValueError` or `TypeError`, raised by this package, that names an argument which is
bad.
"""

import contextlib
import decimal
import faulthandler
import fractions
import math
import operator
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st


GOOD, BAD, EITHER = "good", "bad", "either"

SECONDS = 20  # of computing that a call may take
MESSAGE_LENGTH = 2_000  # of an error: a value is shown, and not a whole tensor

# How a call ends.
WORKED, REFUSED, RAW, SILENT, HUNG = "worked", "refused", "raw", "silent", "hung"


@dataclass
class Case:
    """
    A call and what is expected of it.

    Args:
        what (`str`): The call, for the report.
        call (`Callable`): Makes it.
        bad (`list[str]`): What a refusal has to name, one of these; nothing if it has to work.
        either (`list[str]`): What it may also name, or else the call has to work.
        check (`Callable`): Says what is wrong with the result, if anything.
        errors (`tuple`): Errors that are documented beside `ValueError` and `TypeError`.
    """

    what: str
    call: Callable[[], Any]
    bad: list[str] = field(default_factory=list)
    either: list[str] = field(default_factory=list)
    check: Callable[[Any], str | None] = lambda result: None
    errors: tuple[type[Exception], ...] = ()

    def __repr__(self) -> str:
        return f"{self.what} (bad: {self.bad}, either: {self.either})"


class Hung(BaseException):
    """Raised in a call that takes too long."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raises [`Hung`] in a call that computes for too long."""

    def interrupt(*_):
        raise Hung

    before = signal.signal(signal.SIGPROF, interrupt)
    # Of computing, as the machine may have other work; and again and again, as some callbacks swallow what is raised.
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 1)
    # Where no line of Python's is reached any more, or something is waited for: the process ends, and says where.
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


def judge(case: Case) -> tuple[str, str]:
    """How a call ends, one of the five words above, and why that is wrong, or what the refusal says."""
    try:
        with time_limit():
            result = case.call()
    except Hung:
        return HUNG, "".join(traceback.format_stack(limit=3))
    except (ValueError, TypeError, *case.errors) as error:
        return _judge_refusal(case, error)
    except Exception as error:
        return RAW, _describe(error)
    if case.bad:
        return SILENT, f"{case.bad} accepted"
    try:
        with time_limit():
            problem = case.check(result)
    except Hung:
        return HUNG, "".join(traceback.format_stack(limit=3))
    except Exception as error:  # what was accepted does not work
        problem = _describe(error)
    return (SILENT, problem) if problem else (WORKED, "")


def _judge_refusal(case: Case, error: Exception) -> tuple[str, str]:
    names, message = [*case.bad, *case.either], str(error)
    if not names:
        return RAW, f"what is allowed is refused: {_describe(error)}"
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if not frame.f_globals["__name__"].startswith("diffusers_lsep") and not isinstance(error, case.errors):
        return RAW, _describe(error)
    if not any(name in message for name in names):
        return RAW, f"names none of {names}: {_describe(error)}"
    if len(message) > MESSAGE_LENGTH:
        return RAW, f"a message of {len(message)} characters: {message[:200]}"
    return REFUSED, message


def _describe(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-2:]
    places = " < ".join(f"{frame.filename.rsplit('site-packages/')[-1]}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__}: {str(error)[:300]} ({places})"


# What an argument may be by mistake, or by malice.
JUNK = (
    *(None, True, "3", "linear", "", b"x", [], (), {}, set(), object(), len, 1j, range(2), "\ud800"),
    *(0, -1, 1, 2, 2.5, -0.5, 1e-320, 1e308, -1e308, 10**9, 2**62, -(2**63), 2**64, 10**400, 10**5000),
    *(math.nan, math.inf, -math.inf, decimal.Decimal("NaN"), decimal.Decimal(1), fractions.Fraction(1, 3)),
    *([0.5, 0.25], [math.nan], ["a"], [[1], [2, 3]], [None], {"a": 1}, (0.2, 0.1), (math.nan, 1.0)),
    *(np.int64(2), np.int8(-3), np.uint8(1), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array(["a"])),
    *(np.zeros(3), np.array(1), np.array([1]), np.array(None), np.datetime64("2026-01-01"), np.zeros((0, 3))),
    *(torch.tensor(math.nan), torch.tensor(1), torch.tensor(0.5), torch.zeros(2, 2), torch.zeros(0)),
    *(torch.tensor([1 + 1j]), torch.zeros(3, dtype=torch.bool), torch.zeros(2, 3, device="meta")),
    *(torch.zeros(2, 3).to_sparse(), torch.float32, torch.Generator(), torch.nn.Linear(1, 1)),
)


def show(value: Any) -> str:
    """A value, for the report."""
    if isinstance(value, torch.Tensor):
        return f"tensor{list(value.shape)}:{str(value.dtype).removeprefix('torch.')}"
    try:
        return repr(value)[:80]
    except ValueError:  # an integer of too many digits
        return "10**5000"


@dataclass
class Argument:
    """
    An argument of a call.

    Args:
        values (`SearchStrategy`): Values that are right.
        verdict (`Callable`): What becomes of any other value.
        wrong (`SearchStrategy`, *optional*): Values that are nearly right, with `verdict` too.
    """

    values: st.SearchStrategy
    verdict: Callable[[Any], str]
    wrong: st.SearchStrategy | None = None


def draw_arguments(draw, arguments: dict[str, Argument], most: int = 3) -> tuple[dict, list[str], list[str]]:
    """Values of arguments, of which up to `most` are wrong; and the names of those that are bad and in doubt."""
    wrong = set(draw(st.lists(st.sampled_from(list(arguments)), max_size=most)))
    values, bad, either = {}, [], []
    for name, argument in arguments.items():
        if name not in wrong:
            values[name] = draw(argument.values)
            continue
        junk = st.sampled_from(JUNK)
        values[name] = draw(junk if argument.wrong is None else st.one_of(argument.wrong, junk))
        verdict = argument.verdict(values[name])
        if verdict != GOOD:
            (bad if verdict == BAD else either).append(f"`{name}`")
    return values, bad, either


def describe_call(name: str, values: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={show(value)}' for key, value in values.items())})"


def as_number(value: Any) -> float | None:
    """A number of any library, None where it is none."""
    if (
        isinstance(value, (str, bytes, bool, np.bool_))
        or getattr(value, "ndim", 0)
        or isinstance(value, np.datetime64)
    ):
        return None
    if isinstance(value, torch.Tensor) and (value.is_complex() or value.device.type == "meta"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def number(good: Callable[[float], bool], either: Callable[[float], bool] = lambda x: False, none: str = BAD):
    """The verdict on a number that has to be `good`; what is no plain number of Python's may be refused as well."""

    def verdict(value: Any) -> str:
        if value is None:
            return none
        if isinstance(value, (bool, np.bool_, decimal.Decimal, fractions.Fraction)):
            return EITHER
        found = as_number(value)
        if found is None:
            is_one = isinstance(value, (torch.Tensor, np.ndarray)) and getattr(value, "size", 0) == 1
            return EITHER if is_one else BAD
        if either(found):
            return EITHER
        return GOOD if good(found) else BAD

    return verdict


def count(low: int, high: int, limit: float = math.inf, none: str = BAD):
    """The verdict on an integer: good from `low` to `high`, bad below and above `limit`, and in doubt between."""

    def verdict(value: Any) -> str:
        if value is None:
            return none
        if isinstance(value, (bool, np.bool_, torch.Tensor, np.ndarray)):
            return EITHER if getattr(value, "ndim", 0) == 0 and getattr(value, "is_complex", bool)() is False else BAD
        try:
            found = operator.index(value)
        except TypeError:
            return BAD
        if low <= found <= high:
            return GOOD
        return BAD if found < low or found > limit else EITHER

    return verdict


def choice(*choices: Any):
    """The verdict on one of a few values."""
    return lambda value: GOOD if any(type(value) is type(x) and value == x for x in choices) else BAD


def tensor(shape: tuple[int | None, ...], *dtypes: torch.dtype, none: str = BAD, values=lambda x: True):
    """The verdict on a tensor of a shape (None: any length), of one of some dtypes."""

    def verdict(value: Any) -> str:
        if value is None:
            return none
        if not isinstance(value, torch.Tensor):
            return BAD
        fits = value.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, value.shape, strict=True))
        if not fits or value.dtype not in dtypes:
            return BAD
        if value.device.type == "meta" or value.layout != torch.strided:
            return EITHER
        return GOOD if values(value) else BAD

    return verdict


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)


@st.composite
def near_tensors(draw, shape: tuple[int, ...], kinds=(*FLOATS, *INTEGERS, torch.bool, torch.complex64)):
    """Tensors that have a shape, or nearly, of any dtype."""
    shape = list(shape)
    change = draw(
        st.sampled_from(["none", "none", "longer", "shorter", "one", "unsqueeze", "squeeze", "flat", "zero"])
    )
    if shape and change in ("longer", "shorter", "one", "zero"):
        axis = draw(st.integers(0, len(shape) - 1))
        shape[axis] = {"longer": shape[axis] + 1, "shorter": max(0, shape[axis] - 1), "one": 1, "zero": 0}[change]
    elif change == "unsqueeze":
        shape.insert(draw(st.integers(0, len(shape))), 1)
    elif change == "squeeze" and shape:
        shape.pop(draw(st.integers(0, len(shape) - 1)))
    elif change == "flat":
        shape = [math.prod(shape)]
    dtype = draw(st.sampled_from(kinds))
    seed = draw(st.integers(0, 3))
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    if not dtype.is_floating_point:
        values = values * draw(st.sampled_from([1, 3, 9, 40])) - draw(st.sampled_from([0, 0, 2]))
    return values.to(dtype)


def random_tensors(*shape: int, dtypes=(torch.float32,), scale: float = 1.0) -> st.SearchStrategy:
    """Tensors of normal numbers."""
    return st.builds(
        lambda seed, dtype: (
            scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        ).to(dtype),
        st.integers(0, 5),
        st.sampled_from(dtypes),
    )


def find_nonfinite(name: str, value: torch.Tensor, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a tensor that has to have a shape and finite numbers."""
    if tuple(value.shape) != tuple(shape):
        return f"{name} is of shape {list(value.shape)}, not {list(shape)}"
    return None if value.isfinite().all() else f"{name} is not finite"
