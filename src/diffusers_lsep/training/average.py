# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The average of the weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel


class WeightAverage(EMAModel):
    """
    diffusers' `EMAModel` of parameters that are all trained, to the bit with `foreach=True`, but with one pass over
    the weights where that one makes a copy of them on the way, and exchanged for the weights without any copy.
    """

    optimization_step: int

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]):
        decay = self.get_decay(self.optimization_step + 1)
        if decay <= 0.5:  # the first steps of a warm-up, for which `lerp` rounds in another way
            return super().step(parameters)
        self.optimization_step, self.cur_decay_value = self.optimization_step + 1, decay
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - decay)

    @contextmanager
    def in_place_of(self, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        """Gives the parameters the values of the average until the block ends."""
        pairs = list(zip(parameters, self.shadow_params, strict=True))

        def exchange():
            for parameter, average in pairs:
                parameter.data, average.data = average.data, parameter.data

        exchange()
        try:
            yield
        finally:
            exchange()
