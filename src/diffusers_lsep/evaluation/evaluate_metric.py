# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The same numbers as an `evaluate.Metric`."""

import os
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from .images import EncodedImages, NpzImages, is_image_file, open_images
from .protocol import FEATURE_METRICS, compute_feature_metrics, evaluate_images


class GenerationMetric(evaluate.Metric):
    """
    FID, sFID, Inception Score, precision, recall, KID and FD-DINOv2 through 🤗 Evaluate, without `evaluate.load` and
    without a connection (the weights have to be at hand).

    `compute(predictions=..., references=...)` takes the samples and the reference, each either as

    - the path of an `.npz`, a folder of images or a data set (`str`, or a list of one), as `diffusers-lsep evaluate`;
    - a list of image files;
    - features `[N, D]` of any network: then `fid`, `kid`, `precision` and `recall` are computed of these.

    The other arguments of [`evaluate_images`] can be given besides. The two need not be of equal length, other than in
    `add_batch`, which collects rows of files or features.

    Examples:

    ```python
    >>> from diffusers_lsep.evaluation import GenerationMetric

    >>> metric = GenerationMetric()
    >>> metric.compute(predictions="samples.npz", references="VIRTUAL_imagenet256_labeled.npz")  # doctest: +SKIP
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        rows = (datasets.Value("string"), datasets.Sequence(datasets.Value("float32")))
        return evaluate.MetricInfo(
            description="Distances between generated and real images, as ADM's evaluator computes them.",
            citation="Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, arXiv 2105.05233",
            inputs_description="predictions: samples; references: real images; files or features.",
            features=[datasets.Features({"predictions": row, "references": row}) for row in rows],
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs) -> dict[str, float] | None:
        """
        Args:
            predictions (`str`, `Sequence[str]` or `np.ndarray`, *optional*):
                The samples; if neither is given, what `add` and `add_batch` collected.
            references (`str`, `Sequence[str]` or `np.ndarray`, *optional*):
                The reference.
            kwargs:
                `metrics`, and for images the arguments of [`evaluate_images`].

        Returns:
            `dict[str, float]`: the metrics.

        Raises:
            `ValueError`: if one of the two is missing or a file and the other features, and as [`evaluate_images`].
        """
        if predictions is None and references is None:
            return super().compute(**kwargs)
        if predictions is None or references is None:
            raise ValueError("`predictions` and `references` have to be given both, or neither after `add_batch`.")
        # Evaluate would put both into one table: 50,000 samples could then not meet 10,000 references.
        return self._compute(predictions=predictions, references=references, **kwargs)

    def _compute(
        self, *, predictions: Any, references: Any, metrics: Sequence[str] | None = None, **kwargs
    ) -> dict[str, float]:
        are_paths = [_is_paths(value) for value in (predictions, references)]
        if are_paths[0] != are_paths[1]:
            raise ValueError("`predictions` and `references` have to be both files, or both features.")
        if are_paths[0]:
            samples, reference = _open(predictions, "samples"), _open(references, "reference")
            return evaluate_images(samples, reference, metrics=metrics, **kwargs)["metrics"]
        if kwargs:
            raise ValueError(f"{sorted(kwargs)} cannot be used with features.")
        unknown = sorted(set(metrics or ()) - set(FEATURE_METRICS))
        if unknown:
            raise ValueError(f"`metrics` of features has to be some of {list(FEATURE_METRICS)}, but is {unknown}.")
        features = np.asarray(predictions, np.float32), np.asarray(references, np.float32)
        return compute_feature_metrics(*features, metrics=metrics or FEATURE_METRICS)


def _is_paths(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) or (len(value) > 0 and isinstance(value[0], (str, os.PathLike)))


def _open(paths: str | os.PathLike | Sequence[str], argument: str) -> NpzImages | EncodedImages:
    if not isinstance(paths, (str, os.PathLike)) and len(paths) == 1 and not is_image_file(paths[0]):
        paths = paths[0]
    return open_images(paths, argument)
