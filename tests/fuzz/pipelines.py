# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Generated constructions and calls of the pipeline, with this package's schedulers and with those of diffusers."""

import functools

import diffusers
import numpy as np
import PIL.Image
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
    near_tensors,
    number,
    random_tensors,
    tensor,
)
from fuzz.models import judge_pair
from fuzz.schedulers import WRONG_GRIDS, judge_sigmas
from hypothesis import strategies as st
from tiny_models import make_pipeline, make_transformer

from diffusers_lsep import (
    FlowMatchHeunODEScheduler,
    FlowMatchSDEMultistepScheduler,
    FlowMatchSDEScheduler,
    LSEPPipeline,
)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "sde": FlowMatchSDEScheduler,
    "sbdm": functools.partial(FlowMatchSDEScheduler, diffusion_form="sbdm", path_type="cosine"),
    "multistep": FlowMatchSDEMultistepScheduler,
    "heun": FlowMatchHeunODEScheduler,
    "euler of diffusers": diffusers.FlowMatchEulerDiscreteScheduler,
    "shifted euler of diffusers": functools.partial(diffusers.FlowMatchEulerDiscreteScheduler, shift=3.0),
    "heun of diffusers": diffusers.FlowMatchHeunDiscreteScheduler,
    "dpm++ of diffusers": functools.partial(diffusers.DPMSolverMultistepScheduler, **FLOW),
    "unipc of diffusers": functools.partial(diffusers.UniPCMultistepScheduler, **FLOW),
}
OWN = ("sde", "sbdm", "multistep", "heun")
NAMES = {0: "ant", 1: "bee, hornet", 2: "crane", 3: "crane", 4: "7"}
UNIQUE = {"ant": 0, "bee": 1, "hornet": 1, "7": 4, "bee, hornet": 1}


@functools.cache
def pipeline(name: str, pixels: bool) -> LSEPPipeline:
    pipe = make_pipeline(
        SCHEDULERS[name](), id2label=NAMES, in_channels=3 if pixels else 4, sample_size=4, num_layers=1, num_classes=10
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def judge_label(value) -> str:
    if isinstance(value, str):
        if value in UNIQUE:
            return GOOD
        return GOOD if value.isascii() and value.isdecimal() and len(value) == 1 else BAD
    return count(0, 10, 10)(value)


def judge_labels(value, none: str = GOOD) -> str:
    """Classes by ids and by names; several of them, or one."""
    if value is None:
        return none
    if isinstance(value, (list, tuple, range)) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 1):
        if isinstance(value, torch.Tensor) and (value.device.type == "meta" or value.is_sparse):
            return BAD
        verdicts = [judge_label(x.item() if isinstance(x, (np.generic, torch.Tensor)) else x) for x in value]
        if not verdicts or BAD in verdicts:
            return BAD
        return EITHER if EITHER in verdicts else GOOD
    return judge_label(value)


one_label = st.one_of(st.integers(0, 10), st.sampled_from([*UNIQUE, "3", np.int64(4), np.uint8(0), torch.tensor(2)]))
LABELS = st.one_of(
    st.none(),
    one_label,
    st.lists(one_label, min_size=1, max_size=3),
    st.lists(st.integers(0, 10), min_size=1, max_size=3).map(np.array),
    st.lists(st.integers(0, 10), min_size=1, max_size=3).map(torch.tensor),
)
WRONG_LABELS = st.one_of(
    st.sampled_from([11, -1, "crane", "xyz", "-1", "10", "11", 1.5, [1, None], [[1]], [0, 11], [True]]),
    st.sampled_from([["²"], "9" * 9000, "x" * 100_000]),
    st.text(max_size=4),
    st.lists(st.one_of(one_label, st.integers(-2, 12), st.text(max_size=3), st.floats()), max_size=3),
)


def count_labels(value) -> int:
    is_many = isinstance(value, (list, tuple, range)) or (getattr(value, "ndim", 0) == 1)
    return len(value) if is_many else 1


def judge_generator(batch_size: int, value) -> str:
    if value is None or isinstance(value, torch.Generator):
        return GOOD
    if isinstance(value, list) and len(value) == batch_size:
        return GOOD if all(isinstance(x, torch.Generator) for x in value) else BAD
    return BAD


def judge_tensor_inputs(value) -> str:
    names = {"latents", "class_labels", "negative_class_labels", "pred_original_sample", "prompt_embeds"}
    if value is None or not isinstance(value, (list, tuple)):
        return EITHER if value is None or isinstance(value, (set, range)) else BAD
    return GOOD if all(isinstance(x, str) and x in names for x in value) else BAD


def keep(pipe, i, timestep, tensors):
    return tensors


CALLBACKS = st.sampled_from([None, keep, lambda *_: None])


@st.composite
def calls(draw) -> Case:
    name, pixels = draw(st.sampled_from([*SCHEDULERS])), draw(st.booleans())
    pipe = pipeline(name, pixels)
    channels = pipe.transformer.config.in_channels
    first, bad, either = draw_arguments(
        draw,
        {
            "class_labels": Argument(LABELS, judge_labels, WRONG_LABELS),
            "num_images_per_label": Argument(st.integers(1, 2), count(1, 2, 10**6)),
        },
        most=1,
    )
    known = not bad and not either
    batch_size = count_labels(first["class_labels"]) * (first["num_images_per_label"] if known else 1)
    shape = (batch_size, channels, 4, 4)
    makers = [torch.Generator().manual_seed(i) for i in range(max(1, batch_size))]
    types = ["pil", "np", "pt", "latent"] if pixels else ["latent"]
    start = 0.999 if name == "sbdm" else 1.0
    arguments = {
        "num_inference_steps": Argument(st.integers(1, 4), count(1, 4, 10**6), st.sampled_from([0, 2.0, "3", 10**12])),
        "guidance_scale": Argument(
            st.sampled_from([1.0, 2.0, 0, np.float32(1.5), torch.tensor(1.5)]),
            number(lambda x: abs(x) < 100, lambda x: 100 <= abs(x) < np.inf),
        ),
        "guidance_interval": Argument(
            st.sampled_from([(0.0, 1.0), [0.2, 0.7], np.array([0.0, 0.5]), (0, 0)]),
            judge_pair(0, 1, False),
            st.sampled_from([(0.7, 0.2), (0.1,), (0, 2), (np.nan, 1.0), "01", {0.1: 1, 0.5: 2}]),
        ),
        "generator": Argument(
            st.sampled_from([None, makers[0], makers]),
            functools.partial(judge_generator, batch_size),
            st.sampled_from([0, makers + makers, [0], tuple(makers), [None] * batch_size]),
        ),
        "latents": Argument(
            st.one_of(st.none(), random_tensors(*shape, dtypes=FLOATS)),
            tensor(shape, *FLOATS, none=GOOD),
            near_tensors(shape),
        ),
        "sigmas": Argument(st.none(), functools.partial(judge_sigmas, start), WRONG_GRIDS),
        "output_type": Argument(st.sampled_from(types), choice(*types)),
        "return_dict": Argument(st.booleans(), lambda value: EITHER),
        "callback_on_step_end": Argument(
            CALLBACKS,
            lambda value: GOOD if value is None or value is keep else EITHER if callable(value) else BAD,
            st.sampled_from([lambda *_: 3, "keep"]),
        ),
        "callback_on_step_end_tensor_inputs": Argument(
            st.sampled_from([["latents"], [], ["class_labels", "pred_original_sample"]]),
            judge_tensor_inputs,
            st.sampled_from([["noise"], "latents", [1], [["latents"]]]),
        ),
        "negative_class_labels": Argument(
            st.one_of(st.none(), one_label),
            lambda value: judge_labels(value),
            WRONG_LABELS,
        ),
        "guider": Argument(
            st.none(),
            lambda value: GOOD if value is None else BAD,
            st.sampled_from(["cfg", diffusers.DDIMScheduler()]),
        ),
        "attention_kwargs": Argument(
            st.sampled_from([None, {}, {"scale": 1.0}]),
            lambda value: GOOD if value is None else EITHER if isinstance(value, dict) else BAD,
        ),
        "internal_guidance_scale": Argument(
            st.sampled_from([1.0, 0, 0.5]), number(lambda x: x <= 1, lambda x: np.isinf(x) and False)
        ),
    }
    rest, bad_rest, either_rest = draw_arguments(draw, arguments)
    values, bad, either = {**first, **rest}, [*bad, *bad_rest], [*either, *either_rest]
    if not known:  # then it is not known how many there have to be
        either += ["`generator`", "`latents`", "`negative_class_labels`"]
    if values["negative_class_labels"] is not None and count_labels(values["negative_class_labels"]) not in (
        1,
        count_labels(values["class_labels"]),
    ):
        bad.append("`negative_class_labels`")
    if values["sigmas"] is not None:
        bad = [each for each in bad if each != "`num_inference_steps`"]
        either.append("`num_inference_steps`")
        if name not in OWN:
            # Those of diffusers check less, and other things.
            bad = [each for each in bad if each != "`sigmas`"]
            either += ["`sigmas`", "`scheduler`"]
    if name == "sbdm":  # of the other path
        pipe = make_pipeline(
            SCHEDULERS[name](), id2label=NAMES, in_channels=channels, sample_size=4, num_layers=1, path_type="cosine"
        )
        pipe.set_progress_bar_config(disable=True)
    if as_number(values["internal_guidance_scale"]) == np.inf:
        bad.append("`internal_guidance_scale`")

    def run():
        for i, maker in enumerate(makers):
            maker.manual_seed(i)
        torch.manual_seed(0)
        return pipe(**values)

    def check(output) -> str | None:
        images = output.images if values["return_dict"] else output[0]
        again = run()
        again = again.images if values["return_dict"] else again[0]
        kind = values["output_type"]
        if len(images) != batch_size and known:
            return f"{len(images)} images, not {batch_size}"
        if kind == "pil":
            right = all(isinstance(x, PIL.Image.Image) and x.size == (4, 4) for x in images)
            return None if right and images == again else "other images"
        images, again = (torch.as_tensor(x) for x in (images, again))
        if known and tuple(images.shape) != ((batch_size, 4, 4, channels) if kind == "np" else shape):
            return f"images of shape {list(images.shape)}"
        if kind in ("np", "pt") and not bool(((images >= 0) & (images <= 1)).all()):
            return "pixels are outside of [0, 1]"
        if not images.isfinite().all() and "`guidance_scale`" not in either:
            return "images are not finite"
        return None if torch.equal(images.nan_to_num(), again.nan_to_num()) else "another result at the second time"

    return Case(describe_call(f"{name}: pipe", values), run, bad, either, check)


@st.composite
def constructions(draw) -> Case:
    def judge_names(value) -> str:
        if value is None:
            return GOOD
        if not isinstance(value, dict):
            return BAD
        integers = all(isinstance(k, (int, str)) and str(k).isascii() and str(k).isdecimal() for k in value)
        if not integers or not all(isinstance(x, str) for x in value.values()):
            return BAD
        return GOOD if all(int(k) < 10 for k in value) else EITHER

    names = st.dictionaries(
        st.one_of(st.integers(-1, 11), st.text(max_size=2), st.floats()),
        st.one_of(st.text(max_size=5), st.none(), st.integers()),
        max_size=3,
    )
    arguments = {
        # None of a component: as everywhere in diffusers, it may be put there afterwards.
        "transformer": Argument(
            st.just(make_transformer(num_layers=1, sample_size=4)),
            lambda value: EITHER if value is None or isinstance(value, torch.nn.Module) else BAD,
        ),
        "scheduler": Argument(
            st.sampled_from([SCHEDULERS["sde"](), SCHEDULERS["heun"]()]),
            lambda value: GOOD if value is None else BAD,
        ),
        "vae": Argument(st.none(), lambda value: GOOD if value is None else BAD),
        "id2label": Argument(
            st.sampled_from([None, NAMES, {"0": "ant"}, {}]),
            judge_names,
            st.one_of(names, st.sampled_from([{"a": "b"}, {0: None}, {0: 1}, ["ant"], {1.5: "x"}, {"1.5": "x"}])),
        ),
        "path_type": Argument(st.sampled_from([None, "linear"]), choice(None, "linear", "cosine")),
    }
    values, bad, either = draw_arguments(draw, arguments, most=2)

    def check(pipe) -> str | None:
        pipe.to_json_string()
        if not hasattr(pipe.transformer, "config") or pipe.scheduler is None or pipe.config.path_type != "linear":
            return None
        pipe.set_progress_bar_config(disable=True)
        images = pipe(0, num_inference_steps=1, output_type="latent").images
        return None if images.isfinite().all() else "images are not finite"

    what = describe_call("LSEPPipeline", values)
    return Case(what, lambda: LSEPPipeline(**values), bad, either, check)


SURFACES = {"pipeline call": calls(), "pipeline construction": constructions()}
