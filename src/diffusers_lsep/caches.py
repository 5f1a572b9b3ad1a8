# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""
What diffusers' caches lack for a class-conditional image model whose guidance is switched on and off: what the inputs
are, and one state for every cache context.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    ModelHook,
    SeaCacheConfig,
)
from diffusers.hooks.faster_cache import FasterCacheBlockHook, FasterCacheDenoiserHook
from diffusers.hooks.hooks import CacheContext, StateManager
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook
from diffusers.models.cache_utils import CacheMixin


# The cache context of a call that is made outside of any.
DEFAULT_CONTEXT = "inference"

# The cache context of a batch that holds both halves of classifier-free guidance: null class first, as FasterCache
# expects it.
GUIDED_CONTEXT = "cond_uncond"


def fit_cache_config(config: Any, num_layers: int) -> Any:
    """
    Fills in what a cache has to know about a [`SiTTransformer2DModel`], and what its user does not.

    Args:
        config: The config of a cache, which stays as it is.
        num_layers (`int`): Number of transformer blocks.

    Returns:
        The config to use.

    Raises:
        `ValueError`: if the cache needs more blocks.
    """
    if isinstance(config, FirstBlockCacheConfig) and num_layers < 2:
        raise ValueError(
            f"`config` has to be of another cache than FirstBlockCache, which needs two blocks or more, as the model"
            f" has {num_layers}."
        )
    if isinstance(config, MagCacheConfig) and config.threshold == 0:
        # Where the ratios are 1 it expects no error, and would leave blocks out.
        return replace(config, threshold=-math.inf)
    if isinstance(config, SeaCacheConfig) and config.raw_vision_callback is None:
        return replace(config, raw_vision_callback=_list_latents)
    if isinstance(config, FasterCacheConfig):
        names = ("hidden_states", "timestep", "class_labels")
        return replace(config, tensor_format="BCHW", _unconditional_conditional_input_kwargs_identifiers=names)
    return config


def _list_latents(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What SeaCache watches: the latents as videos `[C, 1, S, S]`."""
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return list(hidden_states.unsqueeze(2))


class StatePerContext(StateManager):
    """
    Stands in for the one state that some hooks of diffusers have, and keeps one for every cache context: a batch
    without guidance is not as large as one with it, and the predictions of a guider are not those of each other.
    Outside of any context it is the state of the latest.
    """

    def __init__(self, state_class: type):
        super().__init__(state_class)
        self._latest = CacheContext(DEFAULT_CONTEXT)

    @property
    def context(self) -> CacheContext:
        return self._context or self._latest

    def set_context(self, context: CacheContext | None):
        super().set_context(context)
        self._latest = context or self._latest

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.get_state(), name)

    def __setattr__(self, name: str, value: Any):
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self.get_state(), name, value)


def keep_state_per_context(model: Any):
    """Gives the hooks of PyramidAttentionBroadcast and FasterCache in a model one state for every cache context."""
    for hook in _find_hooks(model, (PyramidAttentionBroadcastHook, FasterCacheDenoiserHook, FasterCacheBlockHook)):
        hook.state = StatePerContext(type(hook.state))
        if isinstance(hook, FasterCacheBlockHook):
            hook.current_timestep_callback = partial(_no_timestep_at_first, hook, hook.current_timestep_callback)


def _no_timestep_at_first(hook: FasterCacheBlockHook, current_timestep: Callable[[], float]) -> float:
    # FasterCache would reuse what is not there yet where the first call is in the range that it may skip.
    return current_timestep() if hook.state.cache is not None else math.inf


def set_halves(model: Any, config: FasterCacheConfig, context_name: str):
    """
    Tells FasterCache whether the batch holds both halves of guidance, of which it may leave out one. Outside of any
    context it is as the config says.
    """
    has_one = context_name not in (GUIDED_CONTEXT, DEFAULT_CONTEXT)
    for hook in _find_hooks(model, (FasterCacheDenoiserHook, FasterCacheBlockHook)):
        hook.is_guidance_distilled = config.is_guidance_distilled or has_one


def _find_hooks(model: Any, classes: tuple[type[ModelHook], ...]) -> Iterator[Any]:
    for module in model.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            yield from (hook for hook in registry.hooks.values() if isinstance(hook, classes))


class SiTCacheMixin(CacheMixin):
    """[`CacheMixin`] for a [`SiTTransformer2DModel`]."""

    config: Any
    _cache_context: str | None = None

    def enable_cache(self, config: Any):
        """
        Lets a cache of diffusers reuse parts of earlier calls, as [`CacheMixin.enable_cache`] does.

        SeaCache gets its `raw_vision_callback` and FasterCache the names and the format of its inputs from here. For
        training and for `hidden_states_at` the cache has to be disabled.

        Args:
            config: The config of the cache, such as [`FirstBlockCacheConfig`].

        Raises:
            `ValueError`: if there is a cache already, if the config is of none that diffusers knows, or if the cache
            needs more blocks than the model has.
        """
        super().enable_cache(fit_cache_config(config, self.config.num_layers))
        keep_state_per_context(self)

    @contextmanager
    def cache_context(self, name: str, **kwargs) -> Iterator[None]:
        """
        Says what kind of call is made within, see [`CacheMixin.cache_context`]. Each kind has a cache of its own: the
        pipeline's are `"cond"`, `"cond_uncond"` for a batch with both halves of guidance, null class first, and one
        for each prediction of a guider. Calls outside are of one kind, which is right if they follow one trajectory.
        """
        if isinstance(self._cache_config, FasterCacheConfig):
            set_halves(self, self._cache_config, name)
        self._cache_context = name
        try:
            with super().cache_context(name, **kwargs):
                yield
        finally:
            self._cache_context = None

    def _reset_stateful_cache(self, recurse: bool = True):
        # Contexts have to reach what `apply_first_block_cache` and the like put in after the last call, too.
        HookRegistry.check_if_exists_or_initialize(self).invalidate_child_registries_cache()
        super()._reset_stateful_cache(recurse)

    def default_cache_context(self) -> AbstractContextManager[None]:
        """The context of a call that is made outside of any, if there is a cache."""
        needs_context = self.is_cache_enabled and self._cache_context is None
        return self.cache_context(DEFAULT_CONTEXT) if needs_context else nullcontext()
