# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The reverse SDE of a flow-matching model, which two schedulers solve."""

import math
from dataclasses import dataclass

from .argument_checks import check_choice, check_number
from .interpolants import Interpolant


DIFFUSION_FORMS = ("constant", "sigma", "linear", "decreasing", "increasing-decreasing", "sbdm")
LAST_STEPS = ("mean", "tweedie", "euler")

# Where the grid starts when the diffusion is singular at t = 1, as in SiT.
SBDM_START = 1 - 1e-3

# A diffusion above this, and a time below that, have nothing but rounding errors left.
MAX_DIFFUSION_NORM = 1e6
MIN_TIME = 1e-9


@dataclass(frozen=True)
class ReverseSDE:
    """
    `dx = (v - w s) dt + sqrt(2 w) dW`, with the velocity `v`, the score `s = -noise / sigma(t)` and half the squared
    diffusion coefficient `w(t)` (SiT, arXiv 2401.08740, equation 6 and table 2). Solved from `start` to
    `last_step_size`, and from there to 0 in one step without noise.

    Args:
        path ([`Interpolant`]): The path of the model.
        diffusion_form (`str`):
            `w(t)`, one of `DIFFUSION_FORMS`. Checked by the schedulers, as one of them also takes `"none"`, the ODE.
        diffusion_norm (`float`): Factor of `w(t)`, from 0 to 1,000,000 (`"decreasing"`: of the cosine).
        last_step (`str`): One of `LAST_STEPS`.
        last_step_size (`float`): Between 0 and `start`.

    Raises:
        `ValueError`: if an argument is none of the above.
    """

    path: Interpolant
    diffusion_form: str
    diffusion_norm: float
    last_step: str
    last_step_size: float

    def __post_init__(self):
        check_choice("last_step", self.last_step, LAST_STEPS)
        norm = check_number(
            "diffusion_norm",
            self.diffusion_norm,
            f"be a number from 0 to {MAX_DIFFUSION_NORM:,.0f}",
            lambda x: 0 <= x <= MAX_DIFFUSION_NORM,
        )
        last_step_size = check_number(
            "last_step_size",
            self.last_step_size,
            f"lie between 0 and {self.start:g}",
            lambda x: MIN_TIME <= x < self.start,
        )
        object.__setattr__(self, "diffusion_norm", norm)
        object.__setattr__(self, "last_step_size", last_step_size)

    @property
    def start(self) -> float:
        """The largest `t` at which `w` is finite."""
        return SBDM_START if self.diffusion_form == "sbdm" else 1.0

    def half_variance(self, t: float) -> float:
        """`w(t)`."""
        norm, path = self.diffusion_norm, self.path
        match self.diffusion_form:
            case "constant":
                return norm
            case "sigma":
                return norm * path.sigma(t)
            case "linear":
                return norm * t
            case "decreasing":
                return 0.25 * (norm * math.cos(math.pi * (1 - t)) + 1) ** 2
            case "increasing-decreasing":
                return norm * math.sin(math.pi * (1 - t)) ** 2
            case _:
                # "sbdm": sigma sigma' - sigma^2 alpha' / alpha
                return norm * path.sigma(t) * path.wronskian / path.alpha(t)
