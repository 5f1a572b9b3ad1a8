# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What a flow map is trained towards: the identity of mean flows (MeanFlow, arXiv 2505.13447)."""

from collections.abc import Callable

import torch
from diffusers.models.attention_dispatch import attention_backend


DERIVATIVES = ("jvp", "difference")
DIFFERENCE = 0.005  # in time, to both sides: no more, or the curve shows; no less, or the rounding of float32 does

Flow = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`flow(x_t, t, class_labels)` gives the velocity `[B, C, S, S]`."""


@torch.no_grad()
def derivative_along(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    sample: torch.Tensor,
    time: torch.Tensor,
    velocity: torch.Tensor,
    derivative: str = "jvp",
) -> torch.Tensor:
    """
    The derivative `d/dt f(x_t, t)` where `x_t` moves with a velocity: `v df/dx + df/dt`.

    Args:
        function (`Callable`): `f`, of samples and times.
        sample (`torch.Tensor` of shape `[B, ...]`): `x_t`.
        time (`torch.Tensor` of shape `[B]`): `t` in [0, 1].
        velocity (`torch.Tensor` of shape `[B, ...]`): `v`.
        derivative (`str`, defaults to `"jvp"`):
            `"jvp"`: forward-mode differentiation, exact, for which attention has to be torch's own, in its plain form.
            `"difference"`: `(f(x + h v, t + h) - f(x - h v, t - h)) / 2 h` with `h = 0.005`, cut off at the ends of
            [0, 1]: an error of second order, there of first, for any attention, and less work; without autocast.

    Returns:
        `torch.Tensor`: of the shape of `f`.
    """
    if derivative == "jvp":
        with attention_backend("_native_math"):
            return torch.func.jvp(function, (sample, time), (velocity, torch.ones_like(time)))[1]
    later, earlier = (time + DIFFERENCE).clamp(max=1), (time - DIFFERENCE).clamp(min=0)
    shape = (-1,) + (1,) * (sample.ndim - 1)
    with torch.autocast(sample.device.type, enabled=False):  # what bfloat16 rounds off is half of the difference
        ends = [function(sample + (end - time).view(shape) * velocity, end) for end in (later, earlier)]
    return (ends[0] - ends[1]) / (later - earlier).view(shape)


@torch.no_grad()
def guided_velocity(
    flow: Flow,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor,
    null_class: int,
    velocity: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> torch.Tensor:
    """
    The velocity that a flow map is to follow, with guidance built in, where there is a class and `t` is inside of the
    interval.

    With the velocity of data and noise, it is guided by the model in training itself (arXiv 2502.12154; MeanFlow's
    with an `omega` of 1), which learns from it, so that in the end its own velocity is guided by the scale:

        v + (1 - 1 / s) (u(x_t, t, t | c) - u(x_t, t, t | null))

    Without, the flow is a teacher, and its velocity is guided as in sampling: `v(null) + s (v(c) - v(null))`.

    Args:
        flow (`Callable`): The model in training, or the teacher.
        noisy_latents (`torch.Tensor` of shape `[B, C, S, S]`): `x_t`.
        timesteps (`torch.Tensor` of shape `[B]`): `t`.
        class_labels (`torch.Tensor` of shape `[B]`): `c`, in `0..null_class`.
        null_class (`int`): Its index.
        velocity (`torch.Tensor` of shape `[B, C, S, S]`, *optional*): That of data and noise.
        guidance_scale (`float`, defaults to `1.0`): `s`.
        guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`): Times, both ends included.
    """
    if guidance_scale == 1:
        return flow(noisy_latents, timesteps, class_labels) if velocity is None else velocity
    labels = torch.cat([class_labels, torch.full_like(class_labels, null_class)])
    both = flow(torch.cat([noisy_latents, noisy_latents]), torch.cat([timesteps, timesteps]), labels)
    conditional, unconditional = both.chunk(2)
    low, high = guidance_interval
    inside = ((timesteps >= low) & (timesteps <= high) & (class_labels != null_class)).view(-1, 1, 1, 1)
    if velocity is None:
        velocity, factor = conditional, guidance_scale - 1
    else:
        factor = 1 - 1 / guidance_scale
    return velocity + factor * inside * (conditional - unconditional)


@torch.no_grad()
def mean_velocity_target(
    flow_map: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    r_timesteps: torch.Tensor,
    class_labels: torch.Tensor,
    velocity: torch.Tensor,
    derivative: str = "jvp",
) -> torch.Tensor:
    """
    What `u(x_t, t, r)` is to be, by the identity of mean flows (arXiv 2505.13447, equation 6), which the true mean
    velocity fulfils,

        u = v - (t - r) d/dt u(x_t, t, r)

    with the derivative, along the flow and at a fixed `r`, of the model in training.

    Args:
        flow_map (`Callable`): `u(x_t, t, r, class_labels)`.
        noisy_latents (`torch.Tensor` of shape `[B, C, S, S]`): `x_t`.
        timesteps (`torch.Tensor` of shape `[B]`): `t`.
        r_timesteps (`torch.Tensor` of shape `[B]`): `r` in [0, t].
        class_labels (`torch.Tensor` of shape `[B]`): Classes.
        velocity (`torch.Tensor` of shape `[B, C, S, S]`): `v`.
        derivative (`str`, defaults to `"jvp"`): As in [`derivative_along`].

    Returns:
        `torch.Tensor` of shape `[B, C, S, S]`.
    """

    def mean_velocity(sample: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return flow_map(sample, time, r_timesteps, class_labels).to(velocity.dtype)

    change = derivative_along(mean_velocity, noisy_latents, timesteps, velocity, derivative)
    return velocity - (timesteps - r_timesteps).view(-1, 1, 1, 1) * change
