# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Post-hoc EMA: averages of the weights whose length is chosen after training (EDM2, arXiv 2312.02696, section 3 and
appendix C).

While a run goes on it keeps two or more averages with a power function as their profile, and from time to time writes
all of them into a small file, `ema_snapshots/step-N.safetensors`. An average of another length is then the combination
of these whose profile is the nearest by least squares.
"""

import argparse
import json
import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from ..command_line import ArgumentParser, number
from ..files import whole_file
from .flags import Flags


SNAPSHOTS_FOLDER = "ema_snapshots"
SNAPSHOT_DTYPES = {"float32": torch.float32, "float16": torch.float16}
# The width of a profile that is flat, `gamma = 0`: the plain mean of all steps.
MAX_SIGMA_REL = 1 / math.sqrt(12)


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """
    The exponent of the power function of this length (section 3.1; it is the largest root of a cubic).

    Args:
        sigma_rel (`float`):
            Length of the average: the standard deviation of its profile over the number of steps, in (0, 0.2886].

    Raises:
        `ValueError`: if there is no such average.
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise ValueError(f"`sigma_rel` has to be above 0 and at most {MAX_SIGMA_REL:.6f}, but is {sigma_rel}.")
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real.max()))  # all three are real, and for `MAX_SIGMA_REL` the largest is 0


def profile_products(
    gammas: np.ndarray, steps: np.ndarray, other_gammas: np.ndarray, other_steps: np.ndarray
) -> np.ndarray:
    """
    Inner products of the profiles `(gamma + 1) tau^gamma / t^(gamma + 1)`, `tau` in [0, t], of averages with these
    exponents after `t` steps (appendix C). float64, in the shape that the arguments broadcast to.
    """
    shorter = np.minimum(steps, other_steps) / np.maximum(steps, other_steps)
    exponents = np.where(steps < other_steps, other_gammas, gammas)  # that of the longer one
    scale = (gammas + 1) * (other_gammas + 1) / (gammas + other_gammas + 1)
    return scale * shorter**exponents / np.maximum(steps, other_steps)


def solve_weights(stored: Sequence[tuple[float, int]], sigma_rel: float, step: int) -> tuple[np.ndarray, float]:
    """
    How to combine stored averages into one of another length (section 3.2, appendix C).

    Args:
        stored (`Sequence[tuple[float, int]]`): Length and step of each.
        sigma_rel (`float`): The length that is asked for.
        step (`int`): The step after which it is asked for.

    Returns:
        `tuple[np.ndarray, float]`: the weight of each, float64, and the distance of the combination's profile to the
        one that is asked for, over the norm of that one.
    """
    gammas = np.array([sigma_rel_to_gamma(length) for length, _ in stored])
    steps = np.array([float(after) for _, after in stored])
    gamma = np.array(sigma_rel_to_gamma(sigma_rel))
    # Each scaled to the norm one, as their norms differ by the root of their steps
    norms = np.sqrt(profile_products(gammas, steps, gammas, steps))
    norm = np.sqrt(profile_products(gamma, np.array(float(step)), gamma, np.array(float(step))))
    products = profile_products(gammas[:, None], steps[:, None], gammas, steps) / np.outer(norms, norms)
    targets = profile_products(gammas, steps, gamma, np.array(float(step))) / (norms * norm)
    solution = np.linalg.lstsq(products, targets, rcond=None)[0]
    missed = solution @ products @ solution - 2 * solution @ targets + 1
    return solution * norm / norms, math.sqrt(max(0.0, missed))


class PowerFunctionEMA:
    """
    Averages `theta_gamma(t) = beta theta_gamma(t - 1) + (1 - beta) theta(t)`, `beta = (1 - 1/t)^(gamma + 1)` (section
    3.1), of what a pipeline and its probe are made of.

    Args:
        objective (`torch.nn.Module`): Has the modules `transformer` and `probe`, whose parameters are averaged.
        sigma_rels (`Sequence[float]`): A length for each average; there may be none.

    Attributes:
        averages (`dict[str, torch.Tensor]`): By `{sigma_rel}.{name}`, on the device and in the dtype of the parameter.
    """

    def __init__(self, objective: torch.nn.Module, sigma_rels: Sequence[float]):
        self.gammas = {sigma_rel: sigma_rel_to_gamma(sigma_rel) for sigma_rel in sigma_rels}
        self.parameters = {
            name: parameter
            for name, parameter in objective.named_parameters()
            if name.startswith(("transformer.", "probe."))
        }
        self.averages = {
            f"{sigma_rel}.{name}": parameter.detach().clone()
            for sigma_rel in sigma_rels
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def step(self, step: int):
        """Takes the parameters in, as they are after `step` steps: 1 and up, without a gap."""
        for sigma_rel, gamma in self.gammas.items():
            # 1 - beta; after the first step nothing stays of the initial weights
            new = -math.expm1((gamma + 1) * math.log1p(-1 / step)) if step > 1 else 1.0
            averages = [self.averages[f"{sigma_rel}.{name}"] for name in self.parameters]
            torch._foreach_lerp_(averages, list(self.parameters.values()), new)

    def save_snapshot(self, run: Path, step: int, dtype: str, is_main_process: bool):
        """
        Writes a snapshot, whole or not at all; one of the same step is replaced. A call for all processes.

        Args:
            run (`Path`): Folder of the run.
            step (`int`): Its step.
            dtype (`str`): What to store the averages as, one of `SNAPSHOT_DTYPES`.
            is_main_process (`bool`): Whether to write: the others only help to gather the tensors.
        """
        averages = {}
        for name, average in self.averages.items():  # one after the other, so that the device has none twice
            tensor = average.full_tensor() if isinstance(average, DTensor) else average
            if is_main_process:
                averages[name] = tensor.to("cpu", SNAPSHOT_DTYPES[dtype]).contiguous()
        if not is_main_process:
            return
        path = run / SNAPSHOTS_FOLDER / f"step-{step}.safetensors"
        path.parent.mkdir(exist_ok=True)
        metadata = {"sigma_rels": json.dumps(list(self.gammas))}  # of several the order in the file is random
        with whole_file(path) as partial:
            save_file(averages, partial, metadata)


def list_snapshots(run: Path) -> dict[int, Path]:
    """The snapshots in the folder of a run by their steps, in order."""
    found = ((re.fullmatch(r"step-(\d+)", path.stem), path) for path in (run / SNAPSHOTS_FOLDER).glob("*.safetensors"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def remove_snapshots_after(run: Path, step: int):
    """Deletes the snapshots of steps that a run which continues from this step takes once more."""
    for later, path in list_snapshots(run).items():
        if later > step:
            path.unlink()


def reconstruct_average(
    run: Path, sigma_rel: float, step: int | None = None, use_sigma_rels: Sequence[float] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, float | int]]:
    """
    The average of a length, from the snapshots of a run.

    Args:
        run (`Path`): Folder of the run.
        sigma_rel (`float`): The length, in (0, 0.2886].
        step (`int`, *optional*): The step after which, one of those that have a snapshot; the last if not given.
        use_sigma_rels (`Sequence[float]`, *optional*): Which of the stored averages to combine; all if not given.

    Returns:
        `tuple[dict, dict]`: the averaged weights in float32, as `transformer.{name}` and `probe.{name}`; and
        `sigma_rel`, `gamma`, `step`, `num_snapshots` and `profile_error`, the distance to the profile that is asked
        for, over its norm.

    Raises:
        `ValueError`: if there is no such snapshot, or if one is damaged or of another model.
    """
    snapshots = list_snapshots(run)
    if not snapshots:
        raise ValueError(
            f"`run` {str(run)!r} has to hold snapshots in {SNAPSHOTS_FOLDER}, but has none: train with"
            " `--post_hoc_ema_sigmas 0.05 0.1`."
        )
    step = max(snapshots) if step is None else step
    if step not in snapshots:
        raise ValueError(f"`step` has to be that of a snapshot, one of {list(snapshots)}, but is {step}.")
    gamma, used = sigma_rel_to_gamma(sigma_rel), {after: path for after, path in snapshots.items() if after <= step}
    with ExitStack() as stack:
        # 1. What there is
        stored, names = [], None
        for after, path in used.items():
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                lengths = json.loads((file.metadata() or {})["sigma_rels"])
            except (SafetensorError, KeyError, ValueError) as error:
                raise ValueError(f"`run` has a damaged snapshot, {path}: {error}. Delete it to do without.") from error
            lengths = [length for length in lengths if use_sigma_rels is None or length in use_sigma_rels]
            if not lengths:
                raise ValueError(f"`use_sigma_rels` has to name averages of the run, but is {use_sigma_rels}.")
            of_model = {
                (name.removeprefix(f"{lengths[0]}."), tuple(file.get_slice(name).get_shape()))
                for name in file.keys()  # noqa: SIM118, it is not a dictionary
                if name.startswith(f"{lengths[0]}.")
            }
            if names is not None and of_model != names:
                raise ValueError(f"`run` has snapshots of different models: {path} is not of the one before it.")
            names = of_model
            stored += [(file, length, after) for length in lengths]

        # 2. Their combination, one tensor after the other
        weights, missed = solve_weights([(length, after) for _, length, after in stored], sigma_rel, step)
        averages = {}
        for name, shape in sorted(names or ()):
            total = torch.zeros(shape, dtype=torch.float64)
            for (file, length, _), weight in zip(stored, weights):
                total.add_(file.get_tensor(f"{length}.{name}").double(), alpha=float(weight))
            averages[name] = total.float()
    facts = {"sigma_rel": sigma_rel, "gamma": gamma, "step": step, "num_snapshots": len(used), "profile_error": missed}
    return averages, facts


def add_post_hoc_ema_flags(flags: Flags):
    """Which averages a run keeps for afterwards."""
    add = flags.add
    add(
        "--post_hoc_ema_sigmas",
        type=float,
        nargs="+",
        metavar="SIGMA_REL",
        on_card=False,
        help="Besides, keep averages of these lengths (in parts of the run), such as 0.05 0.1, and write snapshots of"
        " them, from which `diffusers-lsep ema` makes an average of any length afterwards (default: none).",
    )
    add(
        "--post_hoc_ema_steps",
        type=number(int, 1),
        changeable=True,
        on_card=False,
        help="Write such a snapshot every so many steps (default: a fiftieth of the run).",
    )
    add(
        "--post_hoc_ema_dtype",
        choices=SNAPSHOT_DTYPES,
        default="float32",
        changeable=True,
        on_card=False,
        help="What they are stored as: float32 is exact, float16, as in EDM2, takes half the room and rounds.",
    )


def check_post_hoc_ema(parser: ArgumentParser, args: argparse.Namespace):
    """Ends with a usage error if the flags of post-hoc EMA cannot be followed."""
    sigmas = args.post_hoc_ema_sigmas
    if sigmas is None:
        parser.refuse_without("--post_hoc_ema_sigmas", args, ("post_hoc_ema_steps", "post_hoc_ema_dtype"))
        return
    if len(set(sigmas)) < max(2, len(sigmas)):
        parser.error(f"argument --post_hoc_ema_sigmas: has to be two different lengths or more, but is {sigmas}")
    for sigma_rel in sigmas:
        try:
            sigma_rel_to_gamma(sigma_rel)
        except ValueError as error:
            parser.error(f"argument --post_hoc_ema_sigmas: {error}")
    if args.lora_rank is not None:
        parser.error("--post_hoc_ema_sigmas averages all weights, and --lora_rank freezes them: leave out one of them")
