# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Losses beside LSEP's, one file each. `REGULARIZERS` has those that need no encoder, by their names in the flags."""

from .dispersive import DispersiveRegularizer
from .internal_guidance import InternalGuidanceRegularizer
from .layersync import LayerSyncRegularizer
from .regularizer import Flag, Regularizer, RegularizerContext
from .repa import REPAEncoder, REPARegularizer
from .self_transcendence import SelfTranscendenceRegularizer
from .sra import SRARegularizer


REGULARIZERS: dict[str, type[Regularizer]] = {
    "dispersive": DispersiveRegularizer,
    "layersync": LayerSyncRegularizer,
    "sra": SRARegularizer,
    "self-transcendence": SelfTranscendenceRegularizer,
    "internal-guidance": InternalGuidanceRegularizer,
}

__all__ = [
    "REGULARIZERS",
    "DispersiveRegularizer",
    "Flag",
    "InternalGuidanceRegularizer",
    "LayerSyncRegularizer",
    "REPAEncoder",
    "REPARegularizer",
    "Regularizer",
    "RegularizerContext",
    "SRARegularizer",
    "SelfTranscendenceRegularizer",
    "regularizer_key",
]


def regularizer_key(name: str) -> str:
    """How a regularizer is called in flags, metrics and weights: with underscores for hyphens."""
    return name.replace("-", "_")
