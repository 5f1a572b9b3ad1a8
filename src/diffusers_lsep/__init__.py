# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""LSEP ("No Alignment Needed for Generation", arXiv 2509.21565) for diffusers."""

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register_with_diffusers


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

# What diffusers has to know, and where it is.
_COMPONENTS = {
    "FlowMapScheduler": "diffusers_lsep.scheduling_flow_map",
    "FlowMatchHeunODEScheduler": "diffusers_lsep.scheduling_flow_match_heun_ode",
    "FlowMatchSDEMultistepScheduler": "diffusers_lsep.scheduling_flow_match_sde_multistep",
    "FlowMatchSDEScheduler": "diffusers_lsep.scheduling_flow_match_sde",
    "LSEPPipeline": "diffusers_lsep.pipeline_lsep",
    "SiTTransformer2DModel": "diffusers_lsep.transformer_sit",
}
_MODULE_OF = {
    **_COMPONENTS,
    "LSEPObjective": "diffusers_lsep.objective",
    "LinearProbe": "diffusers_lsep.objective",
    "SIT_PRESETS": "diffusers_lsep.presets",
    "convert_original_checkpoint": "diffusers_lsep.conversion",
    # diffusers looks the base classes of a library's components up in the library itself.
    "ModelMixin": "diffusers.models.modeling_utils",
    "SchedulerMixin": "diffusers.schedulers.scheduling_utils",
}

# As diffusers itself, the package imports a name when it is asked for: `diffusers-lsep --help` needs no torch.
if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from .conversion import convert_original_checkpoint
    from .objective import LinearProbe, LSEPObjective
    from .pipeline_lsep import LSEPPipeline
    from .presets import SIT_PRESETS
    from .scheduling_flow_map import FlowMapScheduler
    from .scheduling_flow_match_heun_ode import FlowMatchHeunODEScheduler
    from .scheduling_flow_match_sde import FlowMatchSDEScheduler
    from .scheduling_flow_match_sde_multistep import FlowMatchSDEMultistepScheduler
    from .transformer_sit import SiTTransformer2DModel
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


register_with_diffusers(_COMPONENTS)
