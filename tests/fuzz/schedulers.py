# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Generated constructions and calls of this package's schedulers."""

import functools
import inspect
import math

import numpy as np
import torch
from fuzz.cases import (
    BAD,
    EITHER,
    FLOATS,
    GOOD,
    Argument,
    Case,
    as_number,
    choice,
    count,
    describe_call,
    draw_arguments,
    find_nonfinite,
    near_tensors,
    number,
    random_tensors,
    tensor,
)
from hypothesis import strategies as st

from diffusers_lsep import (
    FlowMapScheduler,
    FlowMatchHeunODEScheduler,
    FlowMatchSDEMultistepScheduler,
    FlowMatchSDEScheduler,
)


CLASSES = (FlowMatchSDEScheduler, FlowMatchSDEMultistepScheduler, FlowMatchHeunODEScheduler, FlowMapScheduler)
FORMS = ("constant", "sigma", "linear", "decreasing", "increasing-decreasing", "sbdm")
MOST_STEPS = 1_000_000


def config_arguments(scheduler_class: type) -> dict[str, Argument]:
    forms = (*FORMS, "none") if scheduler_class is FlowMatchSDEScheduler else FORMS
    numbers = st.one_of(st.floats(0, 4), st.floats(0, 4, width=32).map(np.float32), st.integers(0, 3))
    arguments = {
        "num_train_timesteps": Argument(st.integers(1, 1000), count(1, 2000, MOST_STEPS)),
        "path_type": Argument(st.sampled_from(["linear", "cosine"]), choice("linear", "cosine")),
        # Every other time the form that is singular at 1, and so has limits of its own.
        "diffusion_form": Argument(st.sampled_from(forms) | st.just("sbdm"), choice(*forms)),
        "diffusion_norm": Argument(
            numbers, number(lambda x: 0 <= x <= 100, lambda x: 100 < x <= 1e6), st.floats(-1, 1e9)
        ),
        "last_step": Argument(st.sampled_from(["mean", "tweedie", "euler"]), choice("mean", "tweedie", "euler")),
        "last_step_size": Argument(
            st.floats(1e-4, 0.9),
            number(lambda x: 1e-4 <= x <= 0.9, lambda x: 0 < x < 1e-4 or 0.9 < x < 1),
            st.floats(0.999, 1) | st.sampled_from([0.999, 0.99899, 1 - 1e-16, 1e-9, 1e-200, 5e-324, 1.0]),
        ),
    }
    arguments["renoising"] = Argument(st.floats(0, 1), number(lambda x: 0 <= x <= 1), st.sampled_from([-0.1, 1.1]))
    known = inspect.signature(scheduler_class.__init__).parameters
    return {name: argument for name, argument in arguments.items() if name in known}


def find_problem_of_grid(scheduler) -> str | None:
    sigmas, timesteps = scheduler.sigmas, scheduler.timesteps
    if sigmas.dtype != torch.float64 or sigmas.ndim != 1 or len(timesteps) != len(sigmas) - 1:
        return f"sigmas {sigmas.dtype} {list(sigmas.shape)}, timesteps {list(timesteps.shape)}"
    if not (sigmas.isfinite().all() and 0 < sigmas[0] <= 1 and sigmas[-1] == 0):
        return f"sigmas from {sigmas[0]} to {sigmas[-1]}"
    strict = sigmas.unique_consecutive() if scheduler.order == 2 else sigmas
    if not (strict.diff() < 0).all():
        return "sigmas do not decrease"
    expected = (scheduler.config.num_train_timesteps * sigmas[:-1]).float()
    return None if torch.equal(expected, timesteps) else "timesteps are not the sigmas"


@st.composite
def constructions(draw) -> Case:
    scheduler_class = draw(st.sampled_from(CLASSES))
    values, bad, either = draw_arguments(draw, config_arguments(scheduler_class))
    is_singular = isinstance(values.get("diffusion_form"), str) and values["diffusion_form"] == "sbdm"
    if is_singular and (as_number(values.get("last_step_size")) or 0) >= 0.999:
        bad.append("`last_step_size`")  # where the diffusion is singular

    def check(scheduler) -> str | None:
        again = scheduler_class.from_config(scheduler_class(**scheduler.config).config)
        if again.config != scheduler.config:
            return "another config after `from_config`"
        scheduler.to_json_string()  # it can be saved
        if scheduler.config.get("last_step_size", 0) > 0.9999:  # There may be no room for steps.
            return None
        scheduler.set_timesteps(3)
        return find_problem_of_grid(scheduler)

    what = describe_call(scheduler_class.__name__, values)
    return Case(what, lambda: scheduler_class(**values), bad, either, check)


@st.composite
def schedulers(draw):
    """A scheduler of whatever class, with settings that are right."""
    scheduler_class = draw(st.sampled_from(CLASSES))
    return scheduler_class(**{name: draw(x.values) for name, x in config_arguments(scheduler_class).items()})


def name_of(scheduler) -> str:
    return describe_call(type(scheduler).__name__, {k: v for k, v in scheduler.config.items() if k[0] != "_"})


def judge_sigmas(start: float, value) -> str:
    """A grid is good if its times decrease from no more than the start, by no less than a step of float32."""
    if value is None:
        return GOOD
    if isinstance(value, torch.Tensor) and value.dtype in FLOATS and value.device.type == "cpu":
        value = value.tolist() if value.layout == torch.strided else None
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return BAD if not isinstance(value, (torch.Tensor, np.ndarray, range)) else EITHER
    numbers = [as_number(x) for x in value]
    if any(x is None for x in numbers):
        return EITHER if value and all(isinstance(x, bool) for x in value) else BAD
    times = numbers + [0.0] if numbers and numbers[-1] != 0 else numbers
    if len(times) < 2 or not all(a > b for a, b in zip(times, times[1:])) or not times[0] <= 1:
        return BAD
    if times[0] > start or not all(x >= 0 for x in times):
        return BAD
    # Very small or very near times: the float32 timesteps may not tell them apart.
    clear = times[-2] >= 1e-6 and all(a - b > 1e-6 for a, b in zip(times, times[1:]))
    return GOOD if clear else EITHER


GRIDS = st.lists(st.floats(0.01, 0.95), min_size=1, max_size=6, unique_by=lambda x: round(x, 4)).map(
    lambda x: sorted(x, reverse=True)
)
FORMATS = st.sampled_from([list, tuple, np.array, lambda x: torch.tensor(x, dtype=torch.float64), lambda x: [*x, 0.0]])
WRONG_GRIDS = st.one_of(
    st.lists(st.floats(-0.5, 1.5) | st.sampled_from([math.nan, math.inf, 0.0, 1.0, 1e-300, 5e-324]), max_size=5),
    st.lists(st.floats(1e-3, 1, allow_nan=False), max_size=5).map(lambda x: sorted(x, reverse=True)),
    st.sampled_from(
        [
            [0.9, math.nan, 0.2],
            [0.5, math.nan],
            [math.nan],
            [math.nan, 0.0],
            [0.5, 0.5 - 1e-12],
            [1e-300],
            [1.0, 1e-15],
        ]
    ),
)


def grid_arguments(scheduler) -> dict[str, Argument]:
    start = 0.999 if scheduler.config.get("diffusion_form") == "sbdm" else 1.0
    return {
        "num_inference_steps": Argument(st.integers(1, 20), count(1, 100, MOST_STEPS, none=GOOD)),
        "sigmas": Argument(st.none(), functools.partial(judge_sigmas, start), WRONG_GRIDS),
        "device": Argument(
            st.sampled_from([None, "cpu", torch.device("cpu")]),
            choice(None, "cpu"),
            st.sampled_from(["", "nowhere", 2.5]),
        ),
    }


@st.composite
def grids(draw) -> Case:
    scheduler = draw(schedulers())
    values, bad, either = draw_arguments(draw, grid_arguments(scheduler))
    if isinstance(values["device"], (int, np.integer)):  # of an accelerator, which may be there
        values["device"], bad = None, [name for name in bad if name != "`device`"]
    if draw(st.booleans()) and values["sigmas"] is None:
        values["num_inference_steps"], values["sigmas"] = None, draw(FORMATS)(draw(GRIDS))
        bad = [name for name in bad if name == "`device`"]
        either = [name for name in either if name == "`device`"]
    if values["num_inference_steps"] is None and values["sigmas"] is None:
        bad += ["`num_inference_steps`"]
    elif values["num_inference_steps"] is not None and values["sigmas"] is not None:
        either += ["`num_inference_steps`", "`sigmas`"]  # they may go together

    def call():
        scheduler.set_timesteps(**values)
        return scheduler

    return Case(describe_call(f"{name_of(scheduler)}.set_timesteps", values), call, bad, either, find_problem_of_grid)


SHAPE = (2, 3, 4)


def forgive_other_shapes(values: dict, first: str, second: str, time: str, bad: list[str], either: list[str]):
    """Two tensors that are wrong in one way are of another shape that fits, and numbers on "meta" cannot be seen."""
    a, b = values[first], values[second]
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape):
        return bad, either
    doubts = {f"`{name}`" for name in (first, second, *([time] if a.device.type == "meta" else []))}
    doubtful = [name for name in bad if name in doubts]
    others = ["`variance_noise`", "`generator`"] if doubtful else []  # which are right for the other shape only
    return [name for name in bad if name not in doubts], [*either, *doubtful, *others]


@st.composite
def steps(draw) -> Case:
    """A step somewhere in a schedule, with the steps before it right."""
    scheduler = draw(schedulers())
    scheduler.set_timesteps(draw(st.integers(1, 5)))
    if draw(st.booleans()):
        scheduler.set_begin_index(draw(st.sampled_from([0, 0, 1])))
    before = draw(st.integers(0, len(scheduler.timesteps) - 1)) if scheduler.begin_index in (None, 0) else 0
    sample = draw(random_tensors(*SHAPE))
    for i in range(before):
        sample = scheduler.step(draw(random_tensors(*SHAPE)), scheduler.timesteps[i], sample).prev_sample
    index = before if scheduler.begin_index in (None, 0) else scheduler.begin_index

    def judge_time(value) -> str:
        found = as_number(value)
        if isinstance(value, (str, bytes)) or found is None or not math.isfinite(found):
            return EITHER if isinstance(value, (bool, np.bool_, torch.Tensor, np.ndarray)) else BAD
        if isinstance(value, int) or not any(abs(found - t) < 1e-6 for t in scheduler.timesteps.tolist()):
            # A step that is not the first is known by its place.
            return EITHER if isinstance(value, int) or before or scheduler.begin_index is not None else BAD
        return EITHER

    def judge_generator(value) -> str:
        if value is None or isinstance(value, torch.Generator):
            return GOOD
        if isinstance(value, list) and all(isinstance(x, torch.Generator) for x in value):
            return GOOD if len(value) == len(sample) else (EITHER if len(value) == 1 else BAD)
        return BAD

    make = torch.Generator
    generators = st.sampled_from([None, make().manual_seed(0), [make(), make().manual_seed(1)]])
    index = min(index, len(scheduler.timesteps) - 1)
    arguments = {
        "model_output": Argument(random_tensors(*SHAPE, dtypes=FLOATS), tensor(SHAPE, *FLOATS), near_tensors(SHAPE)),
        "timestep": Argument(
            st.sampled_from([scheduler.timesteps[index], scheduler.timesteps[index].item()]),
            judge_time,
            st.sampled_from([scheduler.timesteps, 999.5, -1.0, "0", torch.tensor([1, 2])]),
        ),
        "sample": Argument(st.just(sample), tensor(SHAPE, *FLOATS), near_tensors(SHAPE)),
        "generator": Argument(generators, judge_generator, st.sampled_from([[], [make()] * 3, [None, None], 0])),
        "variance_noise": Argument(
            st.one_of(st.none(), random_tensors(*SHAPE)), tensor(SHAPE, *FLOATS, none=GOOD), near_tensors(SHAPE)
        ),
    }
    values, bad, either = draw_arguments(draw, arguments)
    bad, either = forgive_other_shapes(values, "sample", "model_output", "timestep", bad, either)
    if judge_time(values["timestep"]) == EITHER and not isinstance(values["timestep"], float):
        either.append("`timestep`")
    if scheduler.begin_index is not None and scheduler.begin_index >= len(scheduler.timesteps):
        bad.append("steps of this schedule are done")
    if isinstance(values["sample"], torch.Tensor) and "`sample`" in bad:
        either += ["`model_output`", "`variance_noise`", "`generator`"]  # which is wrong, is in doubt

    def check(output) -> str | None:
        found = output.prev_sample
        if found.dtype != values["sample"].dtype:
            return f"the sample is {found.dtype}, and was {values['sample'].dtype}"
        if values["sample"].device.type == "meta" or values["model_output"].device.type == "meta":
            return None
        if values["sample"].is_sparse or values["model_output"].is_sparse:
            return None
        return find_nonfinite("the sample", found, tuple(values["sample"].shape))

    return Case(
        describe_call(f"{name_of(scheduler)}.step", values), lambda: scheduler.step(**values), bad, either, check
    )


@st.composite
def noises(draw) -> Case:
    """The forward process, against its formula."""
    scheduler = draw(schedulers())
    largest = scheduler.config.num_train_timesteps
    times = st.floats(0, 1, width=32).map(lambda t: largest * t)

    def judge_times(value) -> str:
        if isinstance(value, torch.Tensor):
            if value.dtype not in (*FLOATS, torch.int64, torch.int32) or value.device.type == "meta":
                return EITHER if value.ndim == 0 or value.shape == (2,) else BAD
            if value.layout != torch.strided or value.ndim > 1:
                return EITHER if value.numel() == 1 else BAD
            fits = value.ndim == 0 or len(value) in (1, 2)
            return GOOD if fits and bool(((value >= 0) & (value <= largest)).all()) else BAD
        if isinstance(value, (list, tuple, np.ndarray, range)):
            return EITHER
        return number(lambda x: 0 <= x <= largest)(value)

    timesteps = Argument(
        st.one_of(times, times.map(torch.tensor), st.lists(times, min_size=2, max_size=2).map(torch.tensor)),
        judge_times,
        st.sampled_from([-1.0, largest + 1.0, torch.tensor([0.0, math.nan]), torch.zeros(4), torch.zeros(2, 1)]),
    )
    data = Argument(random_tensors(*SHAPE, dtypes=FLOATS[:2]), tensor(SHAPE, *FLOATS), near_tensors(SHAPE))
    method = draw(st.sampled_from(["add_noise", "scale_noise"]))
    names = ("original_samples", "timesteps") if method == "add_noise" else ("sample", "timestep")
    values, bad, either = draw_arguments(draw, {names[0]: data, "noise": data, names[1]: timesteps})
    bad, either = forgive_other_shapes(values, names[0], "noise", names[1], bad, either)
    # `add_noise` is `scale_noise` under another name.
    bad, either = ([*x, *(f"`{n}`" for n in ("sample", "timestep") if x)] for x in (bad, either))
    if f"`{names[0]}`" in [*bad, *either]:
        either += ["`noise`", f"`{names[1]}`", "`timestep`"]

    def check(result) -> str | None:
        x, noise, t = values[names[0]], values["noise"], values[names[1]]
        if any(isinstance(v, torch.Tensor) and (v.device.type == "meta" or v.is_sparse) for v in (x, noise, t)):
            return None
        t = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1) / largest
        angle = t * math.pi / 2
        alpha, sigma = (1 - t, t) if scheduler.config.path_type == "linear" else (angle.cos(), angle.sin())
        expected = alpha * x.double() + sigma * noise.double()
        near = torch.allclose(result.double(), expected, rtol=2e-2, atol=5e-2 if x.dtype in FLOATS[2:] else 1e-3)
        if result.dtype != x.dtype or not near:
            return f"{result.dtype} values are off by {(result.double() - expected).abs().max()}"
        return None

    what = describe_call(f"{name_of(scheduler)}.{method}", values)
    return Case(what, lambda: getattr(scheduler, method)(**values), bad, either, check)


@st.composite
def indices(draw) -> Case:
    """`set_begin_index` and `index_for_timestep`."""
    scheduler = draw(schedulers())
    scheduler.set_timesteps(draw(st.integers(2, 5)))
    if draw(st.booleans()):
        argument = Argument(st.integers(0, 1), count(0, 1), st.integers(-3, 9))
        values, bad, either = draw_arguments(draw, {"begin_index": argument}, most=1)
        return Case(
            describe_call("set_begin_index", values),
            lambda: scheduler.set_begin_index(**values),
            bad,
            either,
            lambda _: None if scheduler.begin_index == values["begin_index"] else "another index",
        )
    times = scheduler.timesteps
    index = draw(st.integers(0, len(times) - 1))

    def judge_time(value) -> str:
        found = as_number(value)
        if found is None:
            return EITHER if isinstance(value, (bool, np.bool_, torch.Tensor, np.ndarray)) else BAD
        return EITHER if any(abs(found - t) < 1e-6 for t in times.tolist()) else BAD

    argument = Argument(
        st.sampled_from([times[index], times[index].item()]), judge_time, st.sampled_from([times, torch.zeros(2), "x"])
    )
    values, bad, either = draw_arguments(draw, {"timestep": argument}, most=1)
    return Case(
        describe_call("index_for_timestep", values),
        lambda: scheduler.index_for_timestep(**values),
        bad,
        either,
        lambda found: None if abs(times[found] - float(values["timestep"])) < 1e-3 else "another time",
    )


SURFACES = {
    "scheduler construction": constructions(),
    "scheduler grid": grids(),
    "scheduler step": steps(),
    "scheduler noise": noises(),
    "scheduler index": indices(),
}
