# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes diffusers know this package. The only file that touches diffusers' internals."""

from typing import Any

import diffusers
from diffusers.loaders import single_file_model
from diffusers.pipelines import pipeline_loading_utils


LIBRARY_NAME = "diffusers_lsep"


def register_with_diffusers(*classes: type):
    """
    Lets `DiffusionPipeline.from_pretrained`, `save_pretrained` and `push_to_hub` handle the given classes.

    - A pipeline class is looked up as an attribute of `diffusers`.
    - A component is looked up in its library, `diffusers_lsep`. Saving writes the library's name in place of a module
      path only if it is one of `LOADABLE_CLASSES`; so does loading from the Hub accept it without remote code. What
      stands there are the base classes, which the library has to have as attributes of its own, and the methods by
      which their children are saved and loaded.

    Args:
        classes (`type`): Model, scheduler and pipeline classes, which become attributes of `diffusers`.

    Raises:
        `ImportError`: if this version of diffusers keeps its loadable classes elsewhere.
    """
    loadable_classes: Any = getattr(pipeline_loading_utils, "LOADABLE_CLASSES", None)
    single_file_classes: Any = getattr(single_file_model, "SINGLE_FILE_LOADABLE_CLASSES", None)
    where = "pipelines.pipeline_loading_utils.LOADABLE_CLASSES"
    try:
        base_classes = {name: list(loadable_classes["diffusers"][name]) for name in ("ModelMixin", "SchedulerMixin")}
        where = "loaders.single_file_model.SINGLE_FILE_LOADABLE_CLASSES"
        # Single files come to diffusers in its own layout: see `single_file_loading.py`.
        entry = {"checkpoint_mapping_fn": lambda checkpoint, **kwargs: checkpoint, "default_subfolder": "transformer"}
        single_file_classes["SiTTransformer2DModel"] = {
            key: entry[key] for key in single_file_classes["SD3Transformer2DModel"]
        }
    except (KeyError, TypeError) as error:
        raise ImportError(
            f"diffusers_lsep cannot register with diffusers {diffusers.__version__}: `diffusers.{where}` is not what"
            " it was in diffusers 0.42. Install a version of diffusers that diffusers_lsep supports, or a newer"
            " diffusers_lsep."
        ) from error

    loadable_classes[LIBRARY_NAME] = base_classes
    for cls in classes:
        setattr(diffusers, cls.__name__, cls)
