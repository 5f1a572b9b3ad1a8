# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""LSEP ("No Alignment Needed for Generation", arXiv 2509.21565) for diffusers."""

# diffusers looks the base classes of a library's components up in the library itself.
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .conversion import convert_original_checkpoint
from .objective import LinearProbe, LSEPObjective
from .pipeline_lsep import LSEPPipeline
from .presets import SIT_PRESETS
from .registration import register_with_diffusers
from .scheduling_flow_map import FlowMapScheduler
from .scheduling_flow_match_heun_ode import FlowMatchHeunODEScheduler
from .scheduling_flow_match_sde import FlowMatchSDEScheduler
from .scheduling_flow_match_sde_multistep import FlowMatchSDEMultistepScheduler
from .transformer_sit import SiTTransformer2DModel


__version__ = "0.1.0.dev0"

__all__ = [
    "SIT_PRESETS",
    "FlowMapScheduler",
    "FlowMatchHeunODEScheduler",
    "FlowMatchSDEMultistepScheduler",
    "FlowMatchSDEScheduler",
    "LSEPObjective",
    "LSEPPipeline",
    "LinearProbe",
    "ModelMixin",
    "SchedulerMixin",
    "SiTTransformer2DModel",
    "convert_original_checkpoint",
]

register_with_diffusers(
    SiTTransformer2DModel,
    FlowMatchSDEScheduler,
    FlowMatchSDEMultistepScheduler,
    FlowMatchHeunODEScheduler,
    FlowMapScheduler,
    LSEPPipeline,
)
