# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""From a batch of the stream to the arguments of the objective: what frozen models have to say about it."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from ..autoencoders import Autoencoder, encode_moments
from ..data.moments import sample_posterior
from ..objective import LSEPObjective
from ..regularizers.teachers import Teacher, WeightsTeacher, ask_teachers
from .checkpoints import named_averages
from .flow_map import NUM_DRAWS, add_flow_map_target
from .setup import Setup


def make_teachers(
    objective: LSEPObjective, flow_map: bool, average: Callable[[], EMAModel | None]
) -> dict[str, Teacher]:
    """
    The transformer that is being trained, as something to ask, before anything wraps or shards it.

    Args:
        objective ([`LSEPObjective`]): The objective.
        flow_map (`bool`): Whether it becomes a flow map.
        average (`Callable`): Gives the average of the objective's trained parameters.

    Returns:
        `dict[str, Teacher]`: `"average"`, with the averaged weights, where a regularizer asks for these; `"student"`,
        as it is, for a flow map.
    """

    def weights(averaged: bool) -> dict[str, torch.Tensor]:
        named: dict[str, torch.Tensor] = dict(objective.named_parameters())
        ema = average() if averaged else None
        if ema is not None:
            named |= named_averages(objective, ema)
        return {k.removeprefix("transformer."): v for k, v in named.items() if k.startswith("transformer.")}

    asked = {"student": flow_map, "average": any(r.teacher == "average" for r in objective.regularizers.values())}
    return {
        kind: WeightsTeacher(objective.transformer, partial(weights, kind == "average"))
        for kind, is_asked in asked.items()
        if is_asked
    }


def objective_inputs(
    batch: dict[str, Any],
    objective: LSEPObjective,
    setup: Setup,
    normalization: dict[str, Any],
    teachers: dict[str, Teacher],
    idle: Collection[str],
    autocast: Callable[[], Any],
) -> dict[str, Any]:
    """
    The arguments of [`LSEPObjective`] for a batch of the stream: images and moments become latents, and there are
    the targets of REPA and of the regularizers that have a teacher.

    Args:
        batch (`dict`): The batch, which loses what is used up.
        objective ([`LSEPObjective`]): The objective.
        setup ([`Setup`]): VAE, encoder and frozen teacher.
        normalization (`dict`): Of the VAE's latents, see [`~autoencoders.get_normalization`].
        teachers (`dict[str, Teacher]`): Those of [`make_teachers`].
        idle (`Collection[str]`): The regularizers without weight: their teachers are not asked, their targets zero.
        autocast (`Callable`): The context in which the encoder and the teachers compute.
    """
    images, draws, targets = batch.pop("images", None), batch.pop("regularizer_draws", None), {}
    if setup.encoder is not None:
        with autocast():
            targets["repa"] = setup.encoder(images)
    batch["latents"] = images if setup.vae is None else encode(batch, images, setup.vae, normalization)

    if setup.args.flow_map:  # before the other teachers: it changes the times
        assert draws is not None
        with autocast():
            add_flow_map_target(batch, setup.args, teachers["student"], setup.teacher, draws[:, -NUM_DRAWS:])
    by_name = {name: module.teacher for name, module in objective.regularizers.items() if module.teacher is not None}
    if by_name:
        known: dict[str, Any] = {**teachers, "frozen": setup.teacher}
        asked = {name: known[kind] for name, kind in by_name.items() if name not in idle}
        names = ("latents", "class_labels", "noise", "timesteps", "class_dropout_mask")
        with autocast():
            targets |= ask_teachers(objective, asked, draws=draws, **{name: batch[name] for name in names})
        config = objective.transformer.config
        shape = (
            len(batch["latents"]),
            (config.sample_size // config.patch_size) ** 2,
            objective.transformer.inner_dim,
        )
        targets |= {name: batch["latents"].new_zeros(shape) for name in by_name if name not in asked}
    if targets:
        batch["targets"] = targets
    return batch


def encode(
    batch: dict[str, Any], images: torch.Tensor | None, vae: Autoencoder, normalization: dict[str, Any]
) -> torch.Tensor:
    """The normalised latents of images or of the moments of a batch, which loses these and the posterior's noise."""
    moments, noise = batch.pop("moments", None), batch.pop("posterior_noise", None)
    if moments is None:
        assert images is not None
        moments = encode_moments(vae, images)
    return sample_posterior(moments, noise, **normalization)
