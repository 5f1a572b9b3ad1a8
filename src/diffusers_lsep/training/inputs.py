# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""From a batch of the stream to the arguments of the objective: what frozen models have to say about it."""

from collections.abc import Callable, Collection
from typing import Any

import torch

from ..autoencoders import Autoencoder, encode_moments
from ..data.moments import sample_posterior
from ..objective import LSEPObjective
from ..regularizers.teachers import Teacher, ask_teachers
from .setup import Setup


def objective_inputs(
    batch: dict[str, Any],
    objective: LSEPObjective,
    setup: Setup,
    normalization: dict[str, Any],
    average: Teacher | None,
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
        average ([`~regularizers.teachers.Teacher`], *optional*):
            The transformer with the averaged weights, where a regularizer asks for it.
        idle (`Collection[str]`): The regularizers without weight: their teachers are not asked, their targets zero.
        autocast (`Callable`): The context in which the encoder and the teachers compute.
    """
    images, draws, targets = batch.pop("images", None), batch.pop("regularizer_draws", None), {}
    if setup.encoder is not None:
        with autocast():
            targets["repa"] = setup.encoder(images)
    batch["latents"] = images if setup.vae is None else encode(batch, images, setup.vae, normalization)

    by_name = {name: module.teacher for name, module in objective.regularizers.items() if module.teacher is not None}
    if by_name:
        teachers: dict[str, Any] = {"average": average, "frozen": setup.teacher}
        asked = {name: teachers[kind] for name, kind in by_name.items() if name not in idle}
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
