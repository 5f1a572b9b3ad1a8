# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA (arXiv 2106.09685) at the pipeline."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.utils import get_adapter_name, logging
from diffusers.utils.torch_utils import unwrap_module

from .transformer_sit import SiTTransformer2DModel


logger = logging.get_logger(__name__)

# In the metadata of an adapter's file, before what is about the pipeline. Before what is about the layers stands
# "transformer.", and diffusers reads that only.
PIPELINE_PREFIX = "pipeline."


def replace_classes(transformer: SiTTransformer2DModel, num_classes: int):
    """
    Gives a transformer a new label table, of which every row is the old null class's: it starts as the model that
    draws anything.

    Args:
        transformer ([`SiTTransformer2DModel`]): The model, changed in place.
        num_classes (`int`): The new number of classes, without the null class.
    """
    null_row = transformer.class_embedding.weight.detach()[-1:]
    _set_label_table(transformer, null_row.repeat(num_classes + 1, 1))


def _set_label_table(transformer: SiTTransformer2DModel, table: torch.Tensor):
    transformer.class_embedding = nn.Embedding.from_pretrained(table, freeze=False)
    transformer.register_to_config(num_classes=len(table) - 1)


@dataclass
class _LoadedClasses:
    """
    What adapters changed, beside the layers, and what was there before: the label table, if it was replaced, and
    `id2label`. An attribute of the transformer, which several pipelines may share.
    """

    table: torch.Tensor | None
    id2label: dict[int, str] | None
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)  # the classes that each brought
    deleted: set[str] = field(default_factory=set)  # adapters that brought classes, and may have been fused


class LSEPLoraLoaderMixin(SanaLoraLoaderMixin):
    r"""
    Loads LoRA layers into the transformer of an [`LSEPPipeline`], as diffusers' pipelines with a transformer do. What
    is Sana's is taken as it is: that mixin has nothing of Sana but its name.

    An adapter that `train_lsep.py --lora_rank` wrote brings its classes along. The change of the label table is a LoRA
    layer of full rank like the others, so that it is scaled, combined, fused and unloaded with them; the names of the
    classes are in the metadata of its file. Where they are other classes than those of the base model, the table is
    made of its null row before (a weight of 0 then draws anything). With the last such adapter the classes of before
    come back, unless it was fused.
    """

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor], **kwargs):
        """
        The layers in a file, see [`~loaders.StableDiffusionLoraLoaderMixin.lora_state_dict`]. Files of
        `transformer.save_lora_adapter` are read too. Of pickles (`.bin`) diffusers reads tensors alone.
        """
        return_metadata = kwargs.pop("return_lora_metadata", False)
        state_dict, metadata = super().lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        if any(name.startswith("transformer_blocks.") for name in state_dict):
            state_dict = {f"{cls.transformer_name}.{name}": value for name, value in state_dict.items()}
            metadata = metadata and {f"{cls.transformer_name}.{name}": value for name, value in metadata.items()}
        return (state_dict, metadata) if return_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs,
    ):
        """
        Loads an adapter into the transformer, and takes over its classes if it brings any.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                Id on the Hub, folder, file or state dict. A state dict has no metadata: neither alpha nor classes.
            adapter_name (`str`, *optional*): The name to refer to it; `"default_0"` and so on if not given.
            hotswap (`bool`, defaults to `False`):
                Whether it takes the place of the adapter of this name, for compiled models; without classes only.
            kwargs: See [`~loaders.StableDiffusionLoraLoaderMixin.load_lora_weights`].

        Raises:
            `ValueError`: if it is no LoRA, or if its classes are not those of the model or of another adapter.
        """
        if not isinstance(pretrained_model_name_or_path_or_dict, (str, os.PathLike, dict)):
            raise ValueError(
                "`pretrained_model_name_or_path_or_dict` has to be an id on the Hub, a folder, a file or a state dict,"
                f" but is {pretrained_model_name_or_path_or_dict!r}."
            )
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", True)
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        if not all("lora" in name for name in state_dict):
            raise ValueError(
                "`pretrained_model_name_or_path_or_dict` has to hold LoRA layers alone, but has"
                f" {sorted(name for name in state_dict if 'lora' not in name)[:3]}."
            )
        classes = {
            name.removeprefix(PIPELINE_PREFIX): value
            for name, value in (metadata or {}).items()
            if name.startswith(PIPELINE_PREFIX)
        }
        adapter_name = adapter_name or get_adapter_name(self.transformer)
        if classes:
            if classes.get("id2label"):
                classes["id2label"] = {int(class_id): label for class_id, label in classes["id2label"].items()}
            self._check_classes(classes, hotswap)
            if adapter_name in getattr(self.transformer, "peft_config", {}):
                raise ValueError(
                    f"`adapter_name` has to be a new one, but there is an adapter {adapter_name!r} already:"
                    f" `pipe.delete_adapters({adapter_name!r})` removes it."
                )

        with self._without_offloading():
            if classes:
                self._begin_classes(adapter_name, classes)
            try:
                self.load_lora_into_transformer(
                    state_dict,
                    transformer=self.transformer,
                    adapter_name=adapter_name,
                    metadata=metadata,
                    _pipeline=self,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    hotswap=hotswap,
                )
            except Exception:
                if classes:
                    self._end_classes([adapter_name])
                raise

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        classes: dict[str, Any] | None = None,
    ):
        """
        Saves the LoRA layers of a transformer.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write into.
            transformer_lora_layers (`dict[str, torch.Tensor]`): As `peft.get_peft_model_state_dict(transformer)`.
            is_main_process (`bool`, defaults to `True`): Whether this process is the one that writes.
            weight_name (`str`, defaults to `"pytorch_lora_weights.safetensors"`): Name of the file.
            save_function (`Callable`, *optional*): Writes the file in place of safetensors.
            safe_serialization (`bool`, defaults to `True`): Whether the file is safetensors.
            transformer_lora_adapter_metadata (`dict`, *optional*):
                `transformer.peft_config[adapter_name].to_dict()`. Without it alpha is lost.
            classes (`dict`, *optional*):
                What goes with the layers: `num_classes`, `id2label`, `sample_size`, and `new_classes`, whether the
                label table is relative to the null row of the base model's, and not to that as a whole.
        """
        if not transformer_lora_layers:
            raise ValueError(
                f"`transformer_lora_layers` has to hold the layers to save, but is {transformer_lora_layers}."
            )
        if transformer_lora_adapter_metadata is None:
            logger.warning(
                "`transformer_lora_adapter_metadata` is not given: whoever loads these layers takes the rank for"
                " alpha. Give `transformer.peft_config[adapter_name].to_dict()`."
            )
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={cls.transformer_name: transformer_lora_layers},
            lora_metadata={
                cls.transformer_name: transformer_lora_adapter_metadata,
                PIPELINE_PREFIX.removesuffix("."): classes,
            },
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
        )

    def unload_lora_weights(self):
        """Removes all adapters, see [`~loaders.LoraBaseMixin.unload_lora_weights`], with the classes they brought."""
        with self._without_offloading():
            self._end_classes(list(self._loaded_classes.adapters) if self._loaded_classes else [])
            unwrap_module(self.transformer).unload_lora()

    def delete_adapters(self, adapter_names: list[str] | str):
        """Removes these adapters, see [`~loaders.LoraBaseMixin.delete_adapters`]."""
        adapter_names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        with self._without_offloading():
            self._end_classes(adapter_names)
            unwrap_module(self.transformer).delete_adapters(adapter_names)

    @property
    def _loaded_classes(self) -> _LoadedClasses | None:
        return getattr(self.transformer, "_loaded_classes", None)

    def _check_classes(self, classes: dict[str, Any], hotswap: bool):
        if hotswap:
            raise ValueError("`hotswap` has to be False for an adapter that brings its classes along, but is True.")
        for name, loaded in (self._loaded_classes.adapters if self._loaded_classes else {}).items():
            if any(loaded.get(key) != classes.get(key) for key in ("num_classes", "new_classes", "id2label")):
                raise ValueError(
                    f"`pretrained_model_name_or_path_or_dict` was trained on other classes than the adapter {name!r}:"
                    f" {_describe(classes)}, not {_describe(loaded)}. `pipe.unload_lora_weights()` makes room for it."
                )
        num_classes = self.transformer.config.num_classes
        if not classes.get("new_classes") and classes.get("num_classes", num_classes) != num_classes:
            raise ValueError(
                f"`pretrained_model_name_or_path_or_dict` was trained on a model of {classes['num_classes']} classes,"
                f" but this one has {num_classes}."
            )
        size = self.transformer.config.sample_size
        if classes.get("sample_size", size) != size:
            logger.warning(
                f"The adapter was trained at `sample_size={classes['sample_size']}`, but the transformer has {size}:"
                " load that with `SiTTransformer2DModel.from_pretrained(..., sample_size=...)` for the same images."
            )

    def _begin_classes(self, adapter_name: str, classes: dict[str, Any]):
        loaded = self._loaded_classes
        if loaded is None:
            table = None
            if classes.get("new_classes"):
                table = self.transformer.class_embedding.weight.detach()
                replace_classes(self.transformer, classes["num_classes"])
            loaded = self.transformer._loaded_classes = _LoadedClasses(table, self.config.id2label)
            if classes.get("id2label") is not None:
                self.register_to_config(id2label=classes["id2label"])
        loaded.adapters[adapter_name] = classes

    def _end_classes(self, adapter_names: list[str]):
        loaded = self._loaded_classes
        if loaded is None:
            return
        loaded.deleted |= loaded.adapters.keys() & {*adapter_names}
        loaded.adapters = {name: classes for name, classes in loaded.adapters.items() if name not in adapter_names}
        if loaded.adapters:
            return
        # What is fused stays when its adapter goes, and so do the classes.
        layers = self.transformer.modules()
        if loaded.deleted.isdisjoint(name for layer in layers for name in getattr(layer, "merged_adapters", ())):
            if loaded.table is not None:
                _set_label_table(self.transformer, loaded.table.to(self.transformer.class_embedding.weight))
            self.register_to_config(id2label=loaded.id2label)
        self.transformer._loaded_classes = None

    @contextmanager
    def _without_offloading(self) -> Iterator[None]:
        """Without the hooks of accelerate, which hold the weights of every module that there was. As in diffusers."""
        is_model_offload, is_sequential_offload, _ = self._optionally_disable_offloading(self)
        try:
            yield
        finally:
            if is_model_offload:
                self.enable_model_cpu_offload()
            elif is_sequential_offload:
                self.enable_sequential_cpu_offload()


def _describe(classes: dict[str, Any]) -> str:
    names = list((classes.get("id2label") or {}).values())
    return f"{classes.get('num_classes')} classes{f', {names[:5]}' if names else ''}"
