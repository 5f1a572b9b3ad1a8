# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The stream of samples that training consumes.

Training is one endless stream of samples with global indices 0, 1, 2, ...: sample `g` belongs to epoch `g // n` and
takes the row at position `g % n` of that epoch's permutation. Everything random about it comes from one generator that
is keyed by `(seed, g)`. So a run can be continued anywhere, on any number of processes, with nothing to restore.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..interpolants import get_interpolant, timesteps_from_uniform
from .draws import Purpose, keyed_generator
from .images import UnreadableImageError
from .sources import SampleSource


@lru_cache(maxsize=2)  # A batch can reach from one epoch into the next.
def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The rows in the order in which an epoch goes through them."""
    return keyed_generator(seed, epoch, Purpose.ORDER).permutation(num_rows)


class SampleStream(torch.utils.data.Dataset):
    r"""
    The samples of training, by their global indices, with all their random draws. A list of indices gives a batch:
    `images` or `moments` or both (with `posterior_noise`, which both need where there is a VAE), and the arguments of
    [`LSEPObjective`] of the same names: `class_labels`, `noise`, `timesteps`, `class_dropout_mask`,
    `probe_dropout_mask`, `crop_window`, `separate_rows`, and `probe_rows` if the probe is not trained on all. With
    `num_regularizer_draws` there are `regularizer_draws` too, for `ask_teachers`.

    Args:
        source ([`SampleSource`]): Reads images or moments.
        latent_shape (`tuple[int, int, int]`): `[C, S, S]` of what the transformer sees.
        seed (`int`): Key of all draws, not below 0.
        samples_per_step (`int`, defaults to `1`): Samples of an optimiser step on all processes together.
        grid_size (`int`, defaults to `1`): Side of the grid of tokens.
        crop_size_min (`int`, *optional*):
            Smallest side of the probe's window, in tokens; the largest is `grid_size`. Not given, it is `grid_size`.
        class_dropout_prob (`float`, defaults to `0.1`): Probability of the null class in the main stream.
        probe_dropout_prob (`float`, defaults to `0.9`): Probability of the null class in the probe's stream.
        path_type (`str`, defaults to `"linear"`): The path, on which `timestep_sampling="logit_normal"` depends.
        timestep_sampling (`str`, defaults to `"uniform"`): As in [`LSEPObjective`].
        random_flip (`bool`, defaults to `False`): Whether half of the samples are mirrored left to right.
        posterior_noise (`bool`, defaults to `False`): Whether the noise of a VAE's posterior is drawn too.
        image_source ([`SampleSource`], *optional*): Reads the images of the same rows, where `source` reads moments.
        coupled_dropout (`bool`, defaults to `False`):
            Whether the labels of both streams are dropped by one number per sample in place of two. Either stream
            drops as often as before, so that the expected loss is the same, but they agree as often as they can. The
            numbers are spread evenly over the samples of a step, so that all steps cost the same; over the steps each
            of them is uniform.
        probe_fraction (`float`, defaults to `1.0`):
            The part of the samples that the probe is trained on, in (0, 1]: evenly spread over the samples of a step,
            and over the steps each with this probability. A batch may have none.
        num_regularizer_draws (`int`, defaults to `0`):
            How many uniform numbers there are for each sample besides, from a generator of their own.
        replace_unreadable (`bool`, defaults to `False`):
            Whether an image that cannot be read is replaced by the next one of its class, which depends on the data
            alone. Batches then have one more entry where that happened: `unreadable`, a list of dicts with `id` and
            `error`.
    """

    def __init__(
        self,
        source: SampleSource,
        latent_shape: tuple[int, int, int],
        seed: int,
        samples_per_step: int = 1,
        grid_size: int = 1,
        crop_size_min: int | None = None,
        class_dropout_prob: float = 0.1,
        probe_dropout_prob: float = 0.9,
        path_type: str = "linear",
        timestep_sampling: str = "uniform",
        random_flip: bool = False,
        posterior_noise: bool = False,
        image_source: SampleSource | None = None,
        coupled_dropout: bool = False,
        probe_fraction: float = 1.0,
        replace_unreadable: bool = False,
        num_regularizer_draws: int = 0,
    ):
        self.source = source
        self.image_source = image_source
        self.latent_shape = latent_shape
        self.seed = seed
        self.samples_per_step = samples_per_step
        self.grid_size = grid_size
        self.crop_size_min = grid_size if crop_size_min is None else crop_size_min
        self.class_dropout_prob = class_dropout_prob
        self.probe_dropout_prob = probe_dropout_prob
        self.path_type = path_type
        self.timestep_sampling = timestep_sampling
        self.random_flip = random_flip
        self.posterior_noise = posterior_noise
        self.coupled_dropout = coupled_dropout
        self.probe_fraction = probe_fraction
        self.replace_unreadable = replace_unreadable
        self.num_regularizer_draws = num_regularizer_draws

    def rows(self, indices: list[int]) -> np.ndarray:
        """The rows of the data set that these samples take."""
        num_rows = len(self.source.labels)
        return np.array([epoch_order(num_rows, self.seed, g // num_rows)[g % num_rows] for g in indices])

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """The class indices of rows that the source has just loaded."""
        return self.source.labels[rows]

    def substitutes(self, row: int) -> Iterable[int]:
        """The rows to try in place of this one, if it cannot be read: the next ones, those of its class first."""
        others = np.roll(np.arange(len(self.source.labels)), -1 - row)[:-1]
        return others[np.argsort(self.source.labels[others] != self.source.labels[row], kind="stable")].tolist()

    def window_sizes(self, indices: list[int]) -> np.ndarray:
        """The side of the probe's window, in tokens: one for all samples of an optimiser step."""
        steps, position = np.unique(np.array(indices) // self.samples_per_step, return_inverse=True)
        low, high = self.crop_size_min, self.grid_size
        sizes = [keyed_generator(self.seed, int(s), Purpose.STEP).integers(low, high, endpoint=True) for s in steps]
        return np.array(sizes)[position]

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        draws = self._draw(indices, Purpose.SAMPLE)
        size = self.window_sizes(indices)
        start = (draws["crop"] * (self.grid_size - size[:, None] + 1)).astype(np.int64)
        batch = self._load(self.rows(indices), draws, flips=(draws["flip"] < 0.5) & self.random_flip)
        class_dropout, probe_dropout = draws["class_dropout"], draws["probe_dropout"]
        chosen = np.ones(len(indices), dtype=bool)
        if self.coupled_dropout or self.probe_fraction < 1:
            chosen, spread = self._spread(indices)
            if self.coupled_dropout:
                class_dropout = probe_dropout = spread
        drops = (class_dropout < self.class_dropout_prob, probe_dropout < self.probe_dropout_prob)
        batch["class_dropout_mask"], batch["probe_dropout_mask"] = (torch.from_numpy(drop) for drop in drops)
        batch["crop_window"] = torch.from_numpy(np.concatenate([start, size[:, None]], axis=1))

        # Where both streams see the same label the probe reads the main stream's tokens: less work, the same loss.
        batch["separate_rows"] = torch.from_numpy(np.flatnonzero((drops[0] != drops[1]) & chosen))
        if self.probe_fraction < 1:
            batch["probe_rows"] = torch.from_numpy(np.flatnonzero(chosen))
        self._add_regularizer_draws(batch, indices, Purpose.REGULARIZERS)
        return batch

    def _add_regularizer_draws(self, batch: dict[str, Any], indices: list[int], purpose: Purpose):
        if self.num_regularizer_draws > 0:
            generators = [keyed_generator(self.seed, index, purpose) for index in indices]
            draws = np.stack([rng.random(self.num_regularizer_draws, dtype=np.float32) for rng in generators])
            batch["regularizer_draws"] = torch.from_numpy(draws)

    def _spread(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """
        Which samples the probe is trained on, and a number in [0, 1) for each sample: both spread evenly over a step,
        and by the step's two random shifts with the right probability at each place in it (systematic sampling).
        """
        steps, position = np.divmod(np.array(indices), self.samples_per_step)
        unique, inverse = np.unique(steps, return_inverse=True)
        shifts = np.array([keyed_generator(self.seed, int(s), Purpose.SHIFT).random(2) for s in unique])
        shift_of_choice, shift = shifts[inverse].T

        def chosen_before(end: np.ndarray | int) -> np.ndarray:
            return np.floor(end * self.probe_fraction + shift_of_choice).astype(np.int64)

        # Chosen samples and others have lattices of their own, so that the work for the chosen ones is even as well.
        before, count = chosen_before(position), chosen_before(self.samples_per_step)
        chosen = chosen_before(position + 1) > before
        rank = np.where(chosen, before, position - before)
        count = np.where(chosen, count, self.samples_per_step - count)
        stride = np.array([_coprime_stride(n) for n in count.tolist()])
        return chosen, (rank * stride % count / count + shift) % 1

    def held_out_batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """
        A batch of these rows with draws that are the same at every call, to measure on: no image is mirrored, the main
        stream is given the label, and the probe's stream, which has to find it in the image, is not.
        """
        batch = self._load(np.array(rows), self._draw(rows, Purpose.HELD_OUT), flips=np.zeros(len(rows), dtype=bool))
        batch["class_dropout_mask"] = torch.zeros(len(rows), dtype=torch.bool)
        batch["probe_dropout_mask"] = torch.ones(len(rows), dtype=torch.bool)
        batch["crop_window"] = torch.tensor([[0, 0, self.grid_size]]).repeat(len(rows), 1)
        self._add_regularizer_draws(batch, rows, Purpose.HELD_OUT_REGULARIZERS)
        return batch

    def _draw(self, indices: list[int], purpose: Purpose) -> dict[str, np.ndarray]:
        # The order of the draws is part of the format: a run can be resumed by a later version only if it stays.
        uniform = np.empty((len(indices), 6), dtype=np.float32)
        noise = np.empty((len(indices), *self.latent_shape), dtype=np.float32)
        posterior_noise = np.empty_like(noise) if self.posterior_noise else None
        for i, index in enumerate(indices):
            rng = keyed_generator(self.seed, index, purpose)
            rng.random(out=uniform[i], dtype=np.float32)
            rng.standard_normal(out=noise[i], dtype=np.float32)
            if posterior_noise is not None:
                rng.standard_normal(out=posterior_noise[i], dtype=np.float32)
        draws: dict[str, np.ndarray] = {
            "timestep": uniform[:, 0],
            "class_dropout": uniform[:, 1],
            "probe_dropout": uniform[:, 2],
            "crop": uniform[:, 3:5].astype(np.float64),
            "flip": uniform[:, 5],
            "noise": noise,
        }
        if posterior_noise is not None:
            draws["posterior_noise"] = posterior_noise
        return draws

    def _load(self, rows: np.ndarray, draws: dict[str, np.ndarray], flips: np.ndarray) -> dict[str, Any]:
        uniform = torch.from_numpy(draws["timestep"].copy())
        samples, labels, rows, unreadable = self._read(rows, flips)
        batch: dict[str, Any] = {
            self.source.kind: samples,
            "class_labels": torch.from_numpy(labels),
            "noise": torch.from_numpy(draws["noise"]),
            "timesteps": timesteps_from_uniform(uniform, get_interpolant(self.path_type), self.timestep_sampling),
        }
        if self.image_source is not None:
            batch[self.image_source.kind] = self.image_source.load(rows, flips)
        if self.posterior_noise:
            batch["posterior_noise"] = torch.from_numpy(draws["posterior_noise"])
        if unreadable:
            batch["unreadable"] = unreadable
        return batch

    def _read(
        self, rows: np.ndarray, flips: np.ndarray
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray, list[dict[str, str]]]:
        """The samples of these rows, their labels, the rows that they are of in the end, and what cannot be read."""
        try:
            return self.source.load(rows, flips), self.labels_of(rows), rows, []
        except UnreadableImageError as error:
            if not self.replace_unreadable or error.images is None or error.errors is None:
                raise
            samples, errors = error.images, error.errors
        rows, labels, unreadable = rows.copy(), self.labels_of(rows), list(errors.values())
        for position in errors:
            for row in self.substitutes(rows[position]):
                substitute = np.array([row])
                try:
                    samples[position] = self.source.load(substitute, flips[position : position + 1])[0]
                    labels[position], rows[position] = self.labels_of(substitute)[0], row
                    break
                except UnreadableImageError as error:
                    unreadable += (error.errors or {}).values()
            else:
                raise ValueError("none of the images can be read.")
        return samples, labels, rows, unreadable


def _coprime_stride(count: int) -> int:
    """A stride with which `count` places are visited one by one, and every part of the way visits all regions."""
    stride = round(count * (5**0.5 - 1) / 2)  # steps by the golden ratio
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def keep_batch(batch: Any) -> Any:
    """The `collate_fn` of a [`SampleStream`], which makes whole batches itself."""
    return batch
