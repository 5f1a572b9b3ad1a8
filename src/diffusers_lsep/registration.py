# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes diffusers know this package."""

import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    import torch.nn as nn


LIBRARY_NAME = "diffusers_lsep"


def register_with_diffusers(components: dict[str, str]):
    """
    Lets `DiffusionPipeline.from_pretrained`, `save_pretrained` and `push_to_hub` handle the given classes: at once if
    diffusers is imported, else as soon as it is, whoever imports it.

    - A pipeline class is looked up as an attribute of `diffusers`.
    - A component is looked up in its library, `diffusers_lsep`. Saving writes the library's name in place of a module
      path only if it is one of `LOADABLE_CLASSES`; so does loading from the Hub accept it without remote code. What
      stands there are the base classes, which the library has to have as attributes of its own, and the methods by
      which their children are saved and loaded.

    Args:
        components (`dict[str, str]`):
            The names of model, scheduler and pipeline classes, which become attributes of `diffusers`, and the modules
            that have them. Those are imported when somebody asks for the class.

    Raises:
        `ImportError`: if this version of diffusers keeps its loadable classes elsewhere. Then it is the import of
            diffusers that fails.
    """
    if "diffusers" in sys.modules:
        _register(components)
    else:
        sys.meta_path.insert(0, _CallAfterImport("diffusers", lambda: _register(components)))


def _register(components: dict[str, str]):
    import diffusers
    from diffusers.loaders import single_file_model
    from diffusers.pipelines import pipeline_loading_utils

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

    def lazily(name: str) -> Any:
        if name not in components:
            raise AttributeError(name)  # and so diffusers' own way of looking comes next
        value = getattr(importlib.import_module(components[name]), name)
        setattr(diffusers, name, value)
        return value

    diffusers.__getattr__ = lazily


class _CallAfterImport(MetaPathFinder):
    """Finds one module as the other finders do, and calls a function at the end of its import."""

    def __init__(self, name: str, function: Callable[[], None]):
        self.name, self.function = name, function

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        exec_module = spec.loader.exec_module

        def exec_and_call(module: ModuleType):
            exec_module(module)
            # Not in `find_spec`: many only ask whether there is such a module, and do not import it.
            if module.__name__ == self.name and self in sys.meta_path:
                self.function()
                sys.meta_path.remove(self)

        spec.loader.exec_module = exec_and_call
        return spec


def register_with_hooks(block_class: "type[nn.Module]", attention_processor_class: type):
    """
    Lets diffusers' hooks find their way in a transformer: caches, skipped layers, perturbed attention.

    Args:
        block_class (`type`): A block that takes `hidden_states` and returns them alone.
        attention_processor_class (`type`): The processor of its self-attention.

    Raises:
        `ImportError`: if this version of diffusers keeps what its hooks know elsewhere.
    """
    import diffusers

    try:
        from diffusers.hooks import _helpers as known

        metadata = known.TransformerBlockMetadata(return_hidden_states_index=0)
        known.TransformerBlockRegistry.register(block_class, metadata)
        processor_metadata = known.AttentionProcessorMetadata(skip_processor_output_fn=_skip_attention)
        known.AttentionProcessorRegistry.register(attention_processor_class, processor_metadata)
    except (ImportError, AttributeError, TypeError) as error:
        raise ImportError(
            f"diffusers_lsep cannot register with the hooks of diffusers {diffusers.__version__}: the registries of"
            " `diffusers.hooks._helpers` are not what they were in diffusers 0.42. Install a version of diffusers that"
            " diffusers_lsep supports, or a newer diffusers_lsep."
        ) from error


def _skip_attention(attn: "nn.Module", hidden_states: "torch.Tensor") -> "torch.Tensor":
    return hidden_states
