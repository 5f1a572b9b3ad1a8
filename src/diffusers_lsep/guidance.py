# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Guidance away from a class, from none, or from a weaker model: by scales, or by one of diffusers' guiders."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from .argument_checks import check_interval, check_number, describe
from .interpolants import get_interpolant


if TYPE_CHECKING:  # one of the guiders imports kornia where that is installed
    from diffusers.guiders import BaseGuidance


# The slack with which `t` counts as inside `guidance_interval`: schedulers keep their grids in float32.
INTERVAL_TOLERANCE = 1e-6

# What a guider may ask the model for: with and without the class, and with the class through some of the blocks only.
GUIDER_PREDICTIONS = ("pred_cond", "pred_uncond", "pred_cond_skip")


def check_internal_guidance(internal_guidance_scale: float, transformer: Any):
    """Raises a `ValueError` if the transformer cannot give the prediction that is asked for."""
    check_number("internal_guidance_scale", internal_guidance_scale)
    if internal_guidance_scale <= 1:
        return
    if transformer.config.get("internal_guidance_depth") is None:
        raise ValueError(
            "`internal_guidance_scale` has to be 1 with a transformer without `internal_guidance_depth`, but is"
            f" {internal_guidance_scale}."
        )
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError(
            "`internal_guidance_scale` has to be 1 with a cache, which leaves out blocks before the one that it reads,"
            f" but is {internal_guidance_scale}. Call `disable_cache()` first."
        )


def check_guidance_transformer(guidance_transformer: Any, transformer: Any):
    """Raises a `ValueError` if a weaker model, where there is one, has another task than the transformer."""
    if guidance_transformer is None or transformer is None:
        return
    for name in ("in_channels", "out_channels", "sample_size", "num_classes"):
        # Where `out_channels` is None it is `in_channels`.
        needed, found = (m.config.get(name) or m.config.in_channels for m in (transformer, guidance_transformer))
        if found != needed:
            raise ValueError(
                f"`guidance_transformer` has to have the transformer's `{name}`, {needed}, but has {found}."
            )
    is_map, weak_is_map = (m.config.get("flow_map_depth") is not None for m in (transformer, guidance_transformer))
    if is_map != weak_is_map:
        kinds = {True: "the mean velocity of a flow map", False: "the velocity"}
        raise ValueError(
            f"`guidance_transformer` has to predict {kinds[is_map]}, as the transformer does, but predicts"
            f" {kinds[weak_is_map]}."
        )


def check_autoguidance(autoguidance_scale: float, guidance_transformer: Any, transformer: Any, guider: Any):
    """Raises a `ValueError` if there is no weaker model that fits, or if a guider is to guide as well."""
    check_number("autoguidance_scale", autoguidance_scale)
    if autoguidance_scale <= 1:
        return
    if guidance_transformer is None:
        raise ValueError(
            "`autoguidance_scale` has to be 1 for a pipeline without a `guidance_transformer`, but is"
            f" {autoguidance_scale}."
        )
    if guider is not None:
        raise ValueError(f"`autoguidance_scale` has to be 1 with a `guider`, but is {autoguidance_scale}.")
    check_guidance_transformer(guidance_transformer, transformer)  # it may have been swapped


def is_in_interval(t: float, guidance_interval: tuple[float, float]) -> bool:
    """Whether guidance acts at the time `t`; both ends belong to the interval."""
    low, high = guidance_interval
    return low - INTERVAL_TOLERANCE <= t <= high + INTERVAL_TOLERANCE


class GuidanceMixin:
    """
    What a pipeline predicts with its `transformer`: the velocity, guided as its attributes say. Callbacks may set
    these while it runs.
    """

    config: Any
    transformer: Any
    guidance_transformer: Any
    _guidance_scale: float
    _guidance_interval: tuple[float, float]
    _guidance_active: bool
    _guider: "BaseGuidance | None"
    _attention_kwargs: dict[str, Any] | None
    _internal_guidance_scale: float
    _autoguidance_scale: float

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_interval(self) -> tuple[float, float]:
        return self._guidance_interval

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current step is guided."""
        return self._guidance_active

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    def check_guidance(
        self,
        guidance_scale: float,
        internal_guidance_scale: float,
        autoguidance_scale: float,
        guidance_interval: tuple[float, float],
        guider: "BaseGuidance | None",
    ):
        """Raises a `ValueError` if the arguments of a call do not go with each other or with the models."""
        check_number("guidance_scale", guidance_scale)
        check_interval("guidance_interval", guidance_interval)
        check_internal_guidance(internal_guidance_scale, self.transformer)
        check_autoguidance(autoguidance_scale, self.guidance_transformer, self.transformer, guider)
        if guider is None:
            return
        from diffusers.guiders import BaseGuidance  # loads kornia where that is installed

        if not isinstance(guider, BaseGuidance):
            raise ValueError(f"`guider` has to be a guider of diffusers, but is {describe(guider)}.")
        if guidance_scale != 1:
            raise ValueError(
                f"`guidance_scale` has to be left at 1.0 with a `guider`, which has its own, but is {guidance_scale}."
            )
        others = [name for name in guider._input_predictions if name not in GUIDER_PREDICTIONS]
        if others:
            raise ValueError(
                f"`guider` has to combine predictions out of {list(GUIDER_PREDICTIONS)}, but {type(guider).__name__}"
                f" needs {others}."
            )

    def predict_velocity(
        self,
        latents: torch.Tensor,
        t: float,
        class_ids: torch.Tensor,
        guidance_scale: float = 1.0,
        negative_class_ids: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        step: dict[str, Any] | None = None,
        internal_guidance_scale: float = 1.0,
        r: float | None = None,
        autoguidance_scale: float = 1.0,
    ) -> torch.Tensor:
        """
        Predicts the velocity, with classifier-free guidance (arXiv 2207.12598) if its scale is above 1.

        Args:
            latents (`torch.Tensor` of shape `[B, C, S, S]`): The state at the time `t`.
            t (`float`): The time, in [0, 1].
            class_ids (`torch.Tensor` of shape `[B]`): Classes.
            guidance_scale (`float`, defaults to `1.0`): Scale of the guidance.
            negative_class_ids (`torch.Tensor` of shape `[B]`, *optional*): What it leads away from (no class).
            attention_kwargs (`dict`, *optional*): For the transformer.
            step (`dict`, *optional*):
                `step_index`, `num_inference_steps` and `timestep`, which tell caches where in a loop this is.
            internal_guidance_scale (`float`, defaults to `1.0`): Scale of Internal Guidance; off if not above 1.
            r (`float`, *optional*): The time that a flow map is to go to, whose mean velocity this is then.
            autoguidance_scale (`float`, defaults to `1.0`):
                Scale `w` of autoguidance (arXiv 2406.02507): `(w - 1)` times the velocity of the class less that of
                `guidance_transformer` is added. Off if not above 1.

        Returns:
            `torch.Tensor`: float32 `[B, C, S, S]`.
        """
        call = (t, attention_kwargs, step or {}, internal_guidance_scale, r)
        if autoguidance_scale > 1:
            weaker = self._call_transformer(latents, class_ids, "cond", t, None, {}, 1.0, r, self.guidance_transformer)
        if guidance_scale <= 1:
            velocity = guided = self._call_transformer(latents, class_ids, "cond", *call)
        else:
            velocity, guided = self._guide_from_class(latents, class_ids, guidance_scale, negative_class_ids, call)
        return guided + (autoguidance_scale - 1) * (velocity - weaker) if autoguidance_scale > 1 else guided

    def _guide_from_class(
        self,
        latents: torch.Tensor,
        class_ids: torch.Tensor,
        guidance_scale: float,
        negative_class_ids: torch.Tensor | None,
        call: tuple,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The velocity of the class, and the one that classifier-free guidance makes of it."""
        if negative_class_ids is None:
            negative_class_ids = torch.full_like(class_ids, self.transformer.config.num_classes)
        # In the order of diffusers' pipelines, which some caches rely on
        latents, class_ids = torch.cat([latents, latents]), torch.cat([negative_class_ids, class_ids])
        velocity = self._call_transformer(latents, class_ids, "cond_uncond", *call)
        negative_velocity, velocity = velocity.chunk(2)
        return velocity, negative_velocity + guidance_scale * (velocity - negative_velocity)

    def _call_transformer(
        self,
        latents: torch.Tensor,
        class_ids: torch.Tensor,
        context: str,
        t: float,
        attention_kwargs: dict[str, Any] | None,
        step: dict[str, Any],
        internal_guidance_scale: float,
        r: float | None,
        transformer: Any = None,
    ) -> torch.Tensor:
        transformer = self.transformer if transformer is None else transformer
        time = torch.full((len(latents),), t, dtype=torch.float32, device=latents.device)
        latents = latents.to(transformer.dtype)
        arguments: dict[str, Any] = {} if attention_kwargs is None else {"attention_kwargs": attention_kwargs}
        if r is not None:
            arguments["r_timestep"] = torch.full_like(time, r)
        with self._cache_context(transformer, context, t, step):
            output = transformer(latents, timestep=time, class_labels=class_ids, return_dict=False, **arguments)
        velocity = output[0].float()
        if internal_guidance_scale > 1:
            velocity = velocity + (internal_guidance_scale - 1) * (velocity - output[1].float())
        return velocity

    def _cache_context(
        self, transformer: Any, name: str, t: float, step: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """
        Says to a cache which kind of call is made, and where in the loop. A module in the transformer's place, which
        need not be one of diffusers, may have no caches.
        """
        if not hasattr(transformer, "cache_context"):
            return nullcontext()
        if step:
            path = get_interpolant(self.config.path_type)
            alpha, sigma = path.alpha(t), path.sigma(t)
            # The linear path's time with this ratio of noise to data
            step = {**step, "sigma": sigma / (alpha + sigma)}
        return transformer.cache_context(name, **step)

    def _set_guidance_active(self, is_active: bool, step_index: int):
        """What caches hold is from an interrupted call, or too old once the guidance goes on or off."""
        is_new = step_index == 0 or is_active != self._guidance_active
        for model in (self.transformer, self.guidance_transformer):
            if is_new and hasattr(model, "_reset_stateful_cache"):
                model._reset_stateful_cache()
        self._guidance_active = is_active

    def _predict_step(
        self,
        tensors: dict[str, torch.Tensor],
        t: float,
        scale: float,
        in_interval: bool,
        step: dict[str, Any],
        r: float | None,
    ) -> torch.Tensor:
        """The velocity of a step of the loop. `tensors` are what callbacks see."""
        latents, class_ids = tensors["latents"], tensors["class_labels"]
        negative_class_ids = tensors["negative_class_labels"]
        if self._guider is None:
            self._set_guidance_active(scale > 1, step["step_index"])
            autoguidance_scale = self._autoguidance_scale if in_interval else 1.0
            options = (negative_class_ids, self._attention_kwargs, step, self._internal_guidance_scale, r)
            return self.predict_velocity(latents, t, class_ids, scale, *options, autoguidance_scale)

        # As the modular pipelines of diffusers do it
        guider = self._guider
        guider.set_state(step["step_index"], step["num_inference_steps"], step["timestep"])
        was_enabled = guider._enabled
        if not in_interval:
            guider.disable()
        try:
            batches = guider.prepare_inputs({"class_labels": (class_ids, negative_class_ids)})
            self._set_guidance_active(len(batches) > 1, step["step_index"])
            for batch in batches:
                guider.prepare_models(self.transformer)
                try:
                    context = getattr(batch, guider._identifier_key)
                    batch.noise_pred = self._call_transformer(
                        latents,
                        batch.class_labels,
                        context,
                        t,
                        self._attention_kwargs,
                        step,
                        self._internal_guidance_scale,
                        r,
                    )
                finally:
                    guider.cleanup_models(self.transformer)
            return guider(batches).pred
        finally:
            if was_enabled:
                guider.enable()
