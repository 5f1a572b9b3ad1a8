# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Metrics of generated images, and linear probing. Nothing is imported before it is used."""

import importlib


_MODULES = {
    "DINOv2Features": "dinov2",
    "GenerationMetric": "evaluate_metric",
    "InceptionFeatures": "inception",
    "evaluate_images": "protocol",
    "feature_statistics": "metrics",
    "frechet_distance": "metrics",
    "inception_score": "metrics",
    "kernel_distance": "metrics",
    "open_images": "images",
    "precision_recall": "metrics",
}

__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
