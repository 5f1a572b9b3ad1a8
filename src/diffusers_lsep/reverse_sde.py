# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The reverse SDE of a flow-matching model, which two schedulers solve."""

import math
from dataclasses import dataclass

from .interpolants import Interpolant


DIFFUSION_FORMS = ("constant", "sigma", "linear", "decreasing", "increasing-decreasing", "sbdm")
LAST_STEPS = ("mean", "tweedie", "euler")

# Where the grid starts when the diffusion is singular at t = 1, as in SiT.
SBDM_START = 1 - 1e-3


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
        diffusion_norm (`float`): Factor of `w(t)`, not negative (`"decreasing"`: of the cosine).
        last_step (`str`): One of `LAST_STEPS`.
        last_step_size (`float`): In (0, 1).

    Raises:
        `ValueError`: if an argument is none of the above.
    """

    path: Interpolant
    diffusion_form: str
    diffusion_norm: float
    last_step: str
    last_step_size: float

    def __post_init__(self):
        if not (math.isfinite(self.diffusion_norm) and self.diffusion_norm >= 0):
            raise ValueError(f"`diffusion_norm` has to be a number not below 0, but is {self.diffusion_norm}.")
        if self.last_step not in LAST_STEPS:
            raise ValueError(f"`last_step` has to be one of {list(LAST_STEPS)}, but is {self.last_step!r}.")
        if not 0 < self.last_step_size < 1:
            raise ValueError(f"`last_step_size` has to lie between 0 and 1, but is {self.last_step_size}.")

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
