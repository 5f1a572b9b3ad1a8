# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Generated configs and calls of the transformer, the probe, the objective and the regularizers."""

import functools
import json
import math

import numpy as np
import torch
from fuzz.cases import (
    BAD,
    EITHER,
    FLOATS,
    GOOD,
    INTEGERS,
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
from tiny_models import make_transformer

from diffusers_lsep import LinearProbe, LSEPObjective, SiTTransformer2DModel
from diffusers_lsep.regularizers import (
    DispersiveRegularizer,
    InternalGuidanceRegularizer,
    LayerSyncRegularizer,
    REPARegularizer,
    SelfTranscendenceRegularizer,
    SRARegularizer,
)


def sizes(*values: int, limit: float = 10**6) -> Argument:
    """A size of a network, of which only small ones are built."""
    return Argument(st.sampled_from(values), count(1, max(values), limit), st.sampled_from([0, -1, 2.0, 10**9, 2**40]))


CONFIG = {
    "sample_size": sizes(4, 8),
    "patch_size": sizes(1, 2),
    "in_channels": sizes(1, 3, 4),
    "out_channels": Argument(st.sampled_from([None, 1, 8]), count(1, 8, 10**6, none=GOOD)),
    "num_layers": sizes(1, 2, 3),
    "num_attention_heads": sizes(1, 2, 3),
    "attention_head_dim": sizes(4, 8),
    "mlp_ratio": Argument(
        st.sampled_from([1, 2.0, 4.0, 0.5, np.float32(1.5)]),
        number(lambda x: 0.5 <= x <= 16, lambda x: 0 < x < 0.5 or 16 < x < 1e7),
        st.sampled_from([0.0, -2.0, 1e-9, 1e12, math.nan, "4", None]),
    ),
    "num_classes": sizes(1, 10),
    "qk_norm": Argument(
        st.booleans(),
        lambda value: GOOD if isinstance(value, bool) else EITHER if isinstance(value, (int, np.bool_)) else BAD,
    ),
    "internal_guidance_depth": Argument(st.sampled_from([None, None, 1]), count(1, 1, 10**6, none=GOOD)),
    "flow_map_depth": Argument(st.sampled_from([None, None, 1]), count(1, 1, 10**6, none=GOOD)),
}


@st.composite
def configs(draw) -> Case:
    values, bad, either = draw_arguments(draw, CONFIG)
    numbers = {name: as_number(value) for name, value in values.items()}
    if (numbers["patch_size"] or 1) > (numbers["sample_size"] or 1) or (numbers["sample_size"] or 0) % max(
        1, numbers["patch_size"] or 1
    ):
        bad.append("`sample_size`")
    if (numbers["num_attention_heads"] or 0) * (numbers["attention_head_dim"] or 0) % 4:
        bad.append("`num_attention_heads")
    if (numbers["internal_guidance_depth"] or 0) > (numbers["num_layers"] or 10**9):
        bad.append("`internal_guidance_depth`")
    is_both = values["internal_guidance_depth"] is not None and values["flow_map_depth"] is not None
    if is_both or (numbers["flow_map_depth"] or 0) >= (numbers["num_layers"] or 10**9):
        bad.append("`flow_map_depth`")

    def check(model) -> str | None:
        again = type(model).from_config(json.loads(model.to_json_string()))
        changed = [name for name in CONFIG if again.config[name] != model.config[name]]
        if changed:
            return f"{changed} are others after saving"
        size, channels = model.config.sample_size, model.config.in_channels
        output = model(torch.ones(1, channels, size, size), 0.5, torch.tensor([0])).sample
        return find_nonfinite("the output", output, (1, model.out_channels, size, size))

    return Case(describe_call("SiT", values), lambda: SiTTransformer2DModel(**values), bad, either, check)


@functools.cache
def transformer(with_depth: str | None = None) -> SiTTransformer2DModel:
    """Three blocks of width 16, a grid of 4 x 4 tokens, 10 classes."""
    config = {with_depth: 2} if with_depth else {}
    return make_transformer(num_layers=3, num_attention_heads=2, sample_size=8, **config).requires_grad_(True)


LATENTS = (2, 4, 8, 8)


def labels(batch_size: int, largest: int) -> Argument:
    wrong = st.one_of(near_tensors((batch_size,)), st.sampled_from([torch.tensor([0, largest + 1]), [1, 2], 3]))
    inside = lambda x: bool(((x >= 0) & (x <= largest)).all())  # noqa: E731
    values = st.lists(st.integers(0, largest), min_size=batch_size, max_size=batch_size).map(torch.tensor)
    return Argument(values, tensor((batch_size,), *INTEGERS, values=inside), wrong)


def judge_time(value) -> str:
    if isinstance(value, torch.Tensor):
        if value.is_complex() or value.dtype == torch.bool or value.ndim > 1 or value.numel() not in (1, 2):
            return BAD
        if value.dtype not in FLOATS or value.device.type == "meta" or value.is_sparse:
            return EITHER
        return GOOD if bool(((value >= 0) & (value <= 1)).all()) else BAD
    if isinstance(value, (np.ndarray, list)):
        return EITHER if isinstance(value, np.ndarray) and value.size == 1 else BAD
    return number(lambda x: 0 <= x <= 1)(value)


TIMES = st.one_of(
    st.floats(0, 1),
    st.floats(0, 1, width=32).map(torch.tensor),
    st.lists(st.floats(0, 1, width=32), min_size=2, max_size=2).map(torch.tensor),
)
WRONG_TIMES = st.sampled_from([999.0, torch.tensor([0.5, math.nan]), torch.zeros(3), torch.zeros(2, 1), -1e-3, "0.5"])
STREAM = {
    # Of another precision than the weights it is for autocast to say what happens.
    "hidden_states": Argument(
        random_tensors(*LATENTS),
        tensor(LATENTS, torch.float32),
        near_tensors(LATENTS, (torch.float32, torch.int64, torch.bool, torch.complex64)),
    ),
    "timestep": Argument(TIMES, judge_time, WRONG_TIMES),
    "class_labels": labels(2, 10),
}


def with_doubts(values, bad, either) -> tuple[list[str], list[str]]:
    """Which of two arguments is wrong, is in doubt where their lengths differ."""
    for first in ("hidden_states", "latents", "tokens"):
        if f"`{first}`" in [*bad, *either]:
            either = [*either, *(f"`{name}`" for name in values)]
    return bad, either


@st.composite
def forwards(draw) -> Case:
    kind = draw(st.sampled_from([None, "internal_guidance_depth", "flow_map_depth"]))
    model, arguments = transformer(kind), STREAM
    if kind == "flow_map_depth":
        arguments = {
            **STREAM,
            "r_timestep": Argument(TIMES, lambda x: GOOD if x is None else judge_time(x), WRONG_TIMES),
        }
    values, bad, either = draw_arguments(draw, arguments)
    bad, either = with_doubts(values, bad, either)

    @torch.no_grad()
    def check(output) -> str | None:
        if not torch.equal(output.sample, model(**values).sample):
            return "another result at the second time"
        if values.get("r_timestep") is not None or either:
            return find_nonfinite("the output", output.sample, LATENTS)
        times = torch.as_tensor(values["timestep"]).reshape(-1).expand(2).float()
        rows = zip(values["hidden_states"].split(1), times, values["class_labels"].split(1))
        single = [model(*row).sample for row in rows]
        if not torch.allclose(output.sample, torch.cat(single), rtol=1e-3, atol=1e-3):
            return "another result one by one"
        return find_nonfinite("the output", output.sample, LATENTS)

    call = torch.no_grad()(lambda: model(**values))
    return Case(describe_call("transformer", values), call, bad, either, check)


@st.composite
def hidden_states(draw) -> Case:
    def judge_depths(value) -> str:
        if isinstance(value, (list, tuple, range, set)):
            verdicts = [count(0, 3, 3)(x) for x in value]
            return BAD if BAD in verdicts else EITHER if EITHER in verdicts or not isinstance(value, list) else GOOD
        if isinstance(value, (np.ndarray, torch.Tensor, dict)) and getattr(value, "ndim", 1):
            return EITHER
        return count(0, 3, 3)(value)

    depths = Argument(
        st.one_of(st.integers(0, 3), st.lists(st.integers(0, 3), min_size=1, max_size=3), st.just(np.int64(2))),
        judge_depths,
        st.sampled_from([4, -1, [1, 4], [1.5], "2", [[1]]]),
    )
    values, bad, either = draw_arguments(draw, {**STREAM, "num_layers": depths})
    bad, either = with_doubts(values, bad, either)
    model = transformer()

    def check(tokens) -> str | None:
        tokens = tokens if isinstance(tokens, list) else [tokens]
        problems = [find_nonfinite("tokens", x, (2, 16, 16)) for x in tokens]
        return next(filter(None, problems), None)

    call = torch.no_grad()(lambda: model.hidden_states_at(**values))
    return Case(describe_call("hidden_states_at", values), call, bad, either, check)


def windows(batch_size: int, grid_size: int, none: str) -> Argument:
    """Windows (top, left, size) inside of a grid of tokens."""

    def inside(value) -> bool:
        start, size = value[:, :2].long(), value[:, 2:].long()
        return bool(((start >= 0) & (size >= 1) & (start + size <= grid_size)).all())

    def place(triple) -> list[int]:
        size = 1 + triple[2] % grid_size
        return [triple[0] % (grid_size - size + 1), triple[1] % (grid_size - size + 1), size]

    triple = st.tuples(*[st.integers(0, 99)] * 3).map(place)
    values = st.lists(triple, min_size=batch_size, max_size=batch_size).map(torch.tensor)
    shape = (batch_size, 3)
    return Argument(
        st.one_of(values, st.none()) if none == GOOD else values,
        tensor(shape, *INTEGERS, none=none, values=inside),
        st.one_of(near_tensors(shape), st.just(torch.tensor([[0, 0, 5]] * batch_size)), st.just([[0, 0, 1]] * 2)),
    )


@st.composite
def probes(draw) -> Case:
    """Construction of a probe, or a call of one."""
    if draw(st.booleans()):
        depth = Argument(st.sampled_from([None, 1, 8]), count(1, 8, 10**6, none=GOOD))
        arguments = {"hidden_size": sizes(4, 16), "num_classes": sizes(1, 10), "depth": depth}
        values, bad, either = draw_arguments(draw, arguments)
        what = describe_call("LinearProbe", values)

        def check_probe(probe) -> str | None:
            again = LinearProbe.from_config(json.loads(probe.to_json_string()))
            return None if again.config.hidden_size == probe.config.hidden_size else "another config after saving"

        return Case(what, lambda: LinearProbe(**values), bad, either, check_probe)
    probe = LinearProbe(16, 10)
    shape = (2, 16, 16)
    arguments = {
        "tokens": Argument(random_tensors(*shape), tensor(shape, *FLOATS), near_tensors(shape)),
        "window": windows(2, 4, GOOD),
    }
    values, bad, either = draw_arguments(draw, arguments)
    bad, either = with_doubts(values, bad, either)
    tokens = values["tokens"]
    if isinstance(tokens, torch.Tensor) and tokens.ndim == 3 and tokens.dtype in FLOATS and tokens.shape[2] == 16:
        # Of another number of images or tokens, which is right if there is no window.
        side = math.isqrt(tokens.shape[1])
        if tokens.shape[0] and tokens.shape[1] and (values["window"] is None or tuple(tokens.shape) == shape):
            bad = [name for name in bad if name != "`tokens`"]
        if 0 in tokens.shape[:2]:
            bad, either = [name for name in bad if name != "`tokens`"], [*either, "`tokens`"]
        if side**2 != tokens.shape[1]:
            either.append("`tokens`")

    def check(logits) -> str | None:
        if tokens.device.type == "meta" or tokens.is_sparse or tuple(tokens.shape) != shape:
            return None
        grid = tokens.float().unflatten(1, (4, 4))
        boxes = [(0, 0, 4)] * 2 if values["window"] is None else values["window"].tolist()
        means = [grid[i, y : y + n, x : x + n].flatten(0, 1).mean(dim=0) for i, (y, x, n) in enumerate(boxes)]
        expected = probe.linear(probe.norm(torch.stack(means)))
        near = torch.allclose(logits, expected, atol=1e-3)
        return None if near else f"logits are off by {(logits - expected).abs().max()}"

    call = torch.no_grad()(lambda: probe(**values))
    return Case(describe_call("probe", values), call, bad, either, torch.no_grad()(check))


unit = number(lambda x: 0 <= x <= 1)
UNIT = Argument(st.floats(0, 1), unit, st.sampled_from([-0.1, 1.1, math.nan]))


def judge_pair(low: float, high: float, integers: bool, none: str = BAD):
    """The verdict on (a, b) with low <= a <= b <= high."""

    def verdict(value) -> str:
        if value is None:
            return none
        if isinstance(value, (str, bytes, dict, set)) or not hasattr(value, "__len__"):
            return BAD
        if isinstance(value, (np.ndarray, torch.Tensor, range)):
            return EITHER
        found = [as_number(x) for x in value]
        if len(found) != 2 or None in found or not low <= found[0] <= found[1] <= high:
            return EITHER if any(isinstance(x, bool) for x in value) else BAD
        if integers and not all(isinstance(x, (int, np.integer)) for x in value):
            return EITHER if all(float(x).is_integer() for x in value) else BAD
        return GOOD

    return verdict


OBJECTIVE = {
    "path_type": Argument(st.sampled_from(["linear", "cosine"]), choice("linear", "cosine")),
    "probe_depth": Argument(st.integers(1, 3), count(1, 3, 3)),
    "probe_dropout_prob": UNIT,
    "class_dropout_prob": UNIT,
    "crop_size": Argument(
        st.sampled_from([None, (1, 4), (3, 4), [2, 2]]),
        judge_pair(1, 4, True, GOOD),
        st.sampled_from([(0, 2), (3, 5), (3,), (2.5, 3), "34", (1, 2, 3), 3]),
    ),
    "probe_weight_start": Argument(st.floats(0, 1), number(lambda x: 0 <= x < 1e6, lambda x: 1e6 <= x < math.inf)),
    "probe_weight_end": Argument(st.floats(0, 1), number(lambda x: 0 <= x < 1e6, lambda x: 1e6 <= x < math.inf)),
    "num_probe_weights": Argument(st.integers(2, 12), count(2, 1000, 10**6)),
    "timestep_sampling": Argument(st.sampled_from(["uniform", "logit_normal"]), choice("uniform", "logit_normal")),
    "probe_fraction": Argument(st.floats(0.1, 1), number(lambda x: 0.1 <= x <= 1, lambda x: 0 < x < 0.1)),
}


@st.composite
def objectives(draw) -> Case:
    values, bad, either = draw_arguments(draw, OBJECTIVE)
    arguments = {
        "transformer": Argument(st.just(transformer()), lambda value: BAD),
        "probe": Argument(
            st.just(LinearProbe(16, 10)), lambda value: EITHER if value is None else BAD, st.just(LinearProbe(8, 10))
        ),
        "regularizers": Argument(
            st.sampled_from([None, {}, {"layersync": LayerSyncRegularizer(1, 2)}]),
            lambda value: EITHER if value is None or value == {} else BAD,
            st.sampled_from([{"a": 3}, [LayerSyncRegularizer(1, 2)], {1: LayerSyncRegularizer(1, 2)}, {"a.b": None}]),
        ),
    }
    modules, bad_modules, either_modules = draw_arguments(draw, arguments, most=1)
    if modules["probe"] is None:  # what is for the probe is of no matter then
        bad = [name for name in bad if name not in ("`probe_depth`", "`crop_size`")]
        either += ["`probe_depth`", "`crop_size`"]
    if as_number(values["num_probe_weights"]) == 1:
        either.append("`num_probe_weights")

    def check(objective) -> str | None:
        output = objective(torch.ones(LATENTS), torch.tensor([1, 2]), generator=torch.Generator().manual_seed(0))
        if not output.loss.isfinite():
            return "the loss is not finite"
        return None

    what = describe_call("LSEPObjective", {**modules, **values})
    call = lambda: LSEPObjective(**modules, **values)  # noqa: E731
    return Case(what, call, [*bad, *bad_modules], [*either, *either_modules], check)


def make_objective(kind: str, rows: bool) -> LSEPObjective:
    model = transformer("internal_guidance_depth" if kind == "internal guidance" else None)
    regularizers = {
        "layersync": {"layersync": LayerSyncRegularizer(1, 2)},
        "dispersive": {"dispersive": DispersiveRegularizer(2)},
        "repa": {"repa": REPARegularizer(16, 8, depth=1, projector_size=8)},
        "internal guidance": {"internal": InternalGuidanceRegularizer()},
    }.get(kind)
    return LSEPObjective(
        model, None if kind == "plain" else LinearProbe(16, 10), probe_depth=2, crop_size=(2, 4), num_probe_weights=4,
        regularizers=regularizers, probe_fraction=0.5 if rows else 1.0,
    )  # fmt: skip


def rows_argument(batch_size: int) -> Argument:
    def are_rows(value) -> bool:
        return bool(((value >= 0) & (value < batch_size)).all()) and len(set(value.tolist())) == len(value)

    values = st.lists(st.integers(0, batch_size - 1), unique=True, max_size=batch_size)
    return Argument(
        st.one_of(st.none(), values.map(lambda x: torch.tensor(x, dtype=torch.int64))),
        tensor((None,), *INTEGERS, none=GOOD, values=are_rows),
        st.one_of(
            near_tensors((batch_size,)),
            st.lists(st.integers(-1, batch_size), min_size=2, max_size=3).map(torch.tensor),  # twice, or outside
            st.sampled_from([torch.tensor([-1]), [0], 1]),
        ),
    )


@st.composite
def losses(draw) -> Case:
    kind = draw(st.sampled_from(["lsep", "lsep", "plain", "layersync", "dispersive", "repa", "internal guidance"]))
    has_rows = draw(st.booleans())
    objective = make_objective(kind, has_rows)
    mask = Argument(
        st.one_of(st.none(), st.sampled_from([torch.tensor([True, False]), torch.tensor([False, False])])),
        tensor((2,), torch.bool, none=GOOD),
        near_tensors((2,)),
    )
    times = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=2).map(torch.tensor)
    inside = lambda x: bool(((x >= 0) & (x <= 1)).all())  # noqa: E731
    like_latents = tensor(LATENTS, *FLOATS, none=GOOD)
    names = list(objective.regularizers)

    def judge_dictionary(wanted, required):
        def verdict(value) -> str:
            if value is None:
                return BAD if required and wanted else GOOD
            if not isinstance(value, dict):
                return BAD
            return EITHER if set(value) == set(wanted) else BAD

        return verdict

    targets = {"repa": torch.ones(2, 16, 8)} if kind == "repa" else None
    weights = {name: torch.tensor(0.5) for name in names}
    wrong_targets = [{}, {"repa": torch.ones(2, 16, 9)}, {"repa": torch.ones(3, 16, 8)}, {"repa": 1}, {"other": None}]
    arguments = {
        "latents": Argument(random_tensors(*LATENTS), tensor(LATENTS, *FLOATS), near_tensors(LATENTS)),
        "class_labels": labels(2, 10 if kind == "plain" else 9),  # without a probe the null class is one
        "noise": Argument(st.one_of(st.none(), random_tensors(*LATENTS)), like_latents, near_tensors(LATENTS)),
        "timesteps": Argument(
            st.one_of(st.none(), times),
            tensor((2,), *FLOATS, none=GOOD, values=inside),
            st.one_of(near_tensors((2,)), st.just(torch.tensor([0.5, math.nan]))),
        ),
        "class_dropout_mask": mask,
        "probe_dropout_mask": mask,
        "crop_window": windows(2, 4, GOOD),
        "probe_weight_scale": Argument(
            st.sampled_from([1.0, 0.0, 0.5, torch.tensor(0.1)]),
            number(lambda x: 0 <= x < 1e6, lambda x: x >= 1e6 and x < math.inf),
        ),
        "generator": Argument(
            st.none(), lambda value: GOOD if value is None or isinstance(value, torch.Generator) else BAD
        ),
        "targets": Argument(
            st.just(targets),
            judge_dictionary(["repa"] if kind == "repa" else [], True),
            st.sampled_from(wrong_targets),
        ),
        "separate_rows": rows_argument(2),
        "probe_rows": rows_argument(2) if has_rows else Argument(st.none(), tensor((None,), none=GOOD)),
        "regularizer_weights": Argument(
            st.sampled_from([None, weights]),
            judge_dictionary(names, False),
            st.sampled_from([{}, {"x": 1.0}, dict.fromkeys(names, math.nan), dict.fromkeys(names, "1")]),
        ),
    }
    values, bad, either = draw_arguments(draw, arguments, most=2)
    if isinstance(values["probe_rows"], torch.Tensor) and not has_rows:
        bad, either = [name for name in bad if name != "`probe_rows`"], [*either, "`probe_rows`"]
    bad, either = with_doubts(values, bad, either)
    for name, wanted in (("targets", ["repa"]), ("regularizer_weights", names)):
        found = values[name]
        if isinstance(found, dict) and set(found) == set(wanted) and f"`{name}`" in either and "`latents`" not in bad:
            shape_fits = name != "targets" or getattr(found.get("repa"), "shape", None) == (2, 16, 8)
            if not shape_fits or any(as_number(x) is None or not math.isfinite(as_number(x)) for x in found.values()
                                     if name != "targets"):  # fmt: skip
                bad.append(f"`{name}`")
    if "`targets`" in [*bad, *either]:
        (bad if "`targets`" in bad else either).append("`target`")  # its name for the regularizer that reads it

    @torch.no_grad()
    def check(output) -> str | None:
        for name in ("loss", "denoising_loss", "probe_loss"):
            problem = find_nonfinite(name, getattr(output, name), ())
            if problem:
                return problem
        if kind == "dispersive" or output.denoising_losses.shape != (2,):
            return None if output.denoising_losses.shape == (2,) else "not one loss for each sample"
        if any(values[name] is None for name in ("noise", "timesteps", "class_dropout_mask")):
            return None
        # Against the transformer by itself
        x, noise, t = values["latents"].float(), values["noise"].float(), values["timesteps"].float().view(-1, 1, 1, 1)
        dropped = torch.where(values["class_dropout_mask"], 10, values["class_labels"])
        velocity = objective.transformer((1 - t) * x + t * noise, values["timesteps"], dropped).sample
        expected = (velocity - (noise - x)).square().flatten(1).mean(dim=1)
        near = torch.allclose(output.denoising_losses, expected, rtol=1e-3, atol=1e-4)
        return None if near else f"losses {output.denoising_losses.tolist()} and not {expected.tolist()}"

    call = lambda: objective(**values)  # noqa: E731
    return Case(describe_call(f"{kind} objective", values), call, bad, either, check)


depth = Argument(st.integers(1, 3), count(1, 3, 10**6))
positive = Argument(
    st.floats(0.01, 10), number(lambda x: 0.01 <= x <= 10, lambda x: 0 < x < 0.01 or 10 < x < math.inf)
)
weight = Argument(st.floats(0, 10), number(lambda x: 0 <= x <= 10, lambda x: 10 < x < math.inf))
REGULARIZERS = {
    DispersiveRegularizer: {"depth": depth, "weight": weight, "temperature": positive},
    InternalGuidanceRegularizer: {"weight": weight},
    LayerSyncRegularizer: {
        "depth": Argument(st.just(1), count(1, 1, 10**6)),
        "target_depth": Argument(st.integers(2, 3), count(2, 3, 10**6)),
        "weight": weight,
    },
    REPARegularizer: {
        "hidden_size": sizes(16),
        "target_size": sizes(8),
        "depth": depth,
        "weight": weight,
        "projector_size": sizes(8, 16),
        "projector": Argument(st.sampled_from(["mlp", "conv"]), choice("mlp", "conv")),
        "target_alpha": Argument(
            st.sampled_from([None, 0.0, 0.6]), number(lambda x: 0 <= x <= 1, math.isfinite, none=GOOD)
        ),
    },
    SRARegularizer: {
        "hidden_size": sizes(16),
        "depth": depth,
        "teacher_depth": depth,
        "weight": weight,
        "loss": Argument(
            st.sampled_from(["smooth_l1", "cosine"]), choice("smooth_l1", "cosine", "cosine_over_tokens")
        ),
        "max_time_shift": UNIT,
        "decay_start_epoch": Argument(
            st.sampled_from([None, 0, 1.5]), number(lambda x: 0 <= x < math.inf, lambda x: x < 0, none=GOOD)
        ),
        "decay_epochs": positive,
    },
    SelfTranscendenceRegularizer: {
        "hidden_size": sizes(16),
        "velocity_size": Argument(st.sampled_from([None, 16]), count(1, 16, 10**6, none=GOOD)),
        "depth": depth,
        "teacher_depth": depth,
        "guidance_scale": Argument(st.floats(-10, 50), number(math.isfinite)),
        "weight": weight,
        "time_range": Argument(st.sampled_from([(0.4, 0.7), [0, 1]]), judge_pair(0, 1, False)),
        "mask": Argument(st.sampled_from(["samples", "batch"]), choice("samples", "batch")),
        "stop_step": Argument(st.sampled_from([None, 0, 100]), count(0, 10**6, math.inf, none=GOOD)),
        "projector_dim": Argument(st.just(2048), count(1, 4096, 10**9)),
    },
}


@st.composite
def regularizers(draw) -> Case:
    regularizer_class = draw(st.sampled_from(list(REGULARIZERS)))
    values, bad, either = draw_arguments(draw, REGULARIZERS[regularizer_class])
    first, second = (as_number(values.get(name)) or 0 for name in ("depth", "target_depth"))
    if regularizer_class is LayerSyncRegularizer and not first < second:
        bad.append("`target_depth`")

    def check(regularizer) -> str | None:
        found = regularizer.weight_at(0, 0.0), regularizer.weight_at(10**9, 1e6)
        return None if all(0 <= x < math.inf for x in found) else f"weights {found}"

    what = describe_call(regularizer_class.__name__, values)
    return Case(what, lambda: regularizer_class(**values), bad, either, check)


SURFACES = {
    "transformer config": configs(),
    "transformer call": forwards(),
    "transformer tokens": hidden_states(),
    "probe": probes(),
    "objective construction": objectives(),
    "objective call": losses(),
    "regularizer": regularizers(),
}
