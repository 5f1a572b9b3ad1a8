# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from .argument_checks import check_count, check_tensor, check_type, make_plain
from .devices import exact_dtype
from .interpolants import get_interpolant, timesteps_from_uniform
from .objective_checks import (
    check_batch,
    check_factor,
    check_objective,
    check_regularizer_weights,
    check_window,
    make_regularizers,
)
from .regularizers.regularizer import Regularizer, RegularizerContext
from .transformer_sit import SiTTransformer2DModel


class LinearProbe(ModelMixin, ConfigMixin):
    r"""
    The linear classifier that LSEP trains on the intermediate tokens of a transformer (arXiv 2509.21565): the mean of
    the tokens, a LayerNorm and a linear layer. It is used in training only.

    Args:
        hidden_size (`int`): Width `D` of the tokens.
        num_classes (`int`): Number of classes `K`, without the null class.
        depth (`int`, *optional*): After how many blocks it was trained to read, for whoever loads it.

    Raises:
        `ValueError`: if an argument is below 1.
    """

    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(self, hidden_size: int, num_classes: int, depth: int | None = None):
        super().__init__()
        hidden_size, num_classes = check_count("hidden_size", hidden_size), check_count("num_classes", num_classes)
        if depth is not None:
            check_count("depth", depth)
        make_plain(self)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.linear = nn.Linear(hidden_size, num_classes)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: torch.Tensor, window: torch.Tensor | None = None) -> torch.Tensor:
        """
        Classifies images by their tokens.

        Args:
            tokens (`torch.Tensor` of shape `[B, N, D]`): Tokens of square images, row by row.
            window (`torch.Tensor` of shape `[B, 3]`, *optional*):
                For each image the square window `(top, left, size)`, in tokens, to take the mean over; the whole image
                if not given.

        Returns:
            `torch.Tensor` of shape `[B, K]`: logits.

        Raises:
            `ValueError`: if an argument is none of these. Numbers are looked at on the CPU only.
        """
        check_tensor("tokens", tokens, ("batch", "tokens", self.config.hidden_size))
        if window is not None:
            check_tensor("window", window, (tokens.shape[0], 3), "integers")
            grid_size = math.isqrt(tokens.shape[1])
            if grid_size**2 != tokens.shape[1]:
                raise ValueError(f"`tokens` has to be a square of tokens with a `window`, but are {tokens.shape[1]}.")
            check_window("window", window, grid_size)
        # The mean in float32: 256 and more summands in bfloat16 would lose the small ones.
        if window is None:
            pooled = tokens.mean(dim=1, dtype=torch.float32)
        else:
            pooled = (tokens.float() * window_weights(window, tokens.shape[1]).unsqueeze(-1)).sum(dim=1)
        return self.linear(self.norm(pooled.to(self.norm.weight.dtype)))


def window_weights(window: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    The weights `[B, N]` (float32, 0 outside and `1 / size^2` inside) with which a sum over tokens is the mean over
    each image's window `(top, left, size)`, `[B, 3]`. A masked mean in place of a crop: no loop, and no shape that
    depends on the size.
    """
    grid_size = math.isqrt(num_tokens)
    start, size = window[:, :2].unsqueeze(-1), window[:, 2].view(-1, 1, 1)
    position = torch.arange(grid_size, device=window.device)
    inside = ((position >= start) & (position < start + size)).float() / size  # [B, 2, grid]
    return (inside[:, 0].unsqueeze(-1) * inside[:, 1].unsqueeze(-2)).flatten(1)


@dataclass
class LSEPObjectiveOutput(BaseOutput):
    """
    Output of [`LSEPObjective`].

    Args:
        loss (`torch.Tensor`): Scalar to minimise, `denoising_loss + probe_loss` and the regularizers' losses.
        denoising_loss (`torch.Tensor`): Scalar, the mean squared error of the velocity.
        probe_loss (`torch.Tensor`): Scalar, the weighted cross-entropy of the probe; 0 without a probe.
        probe_accuracy (`torch.Tensor`, *optional*):
            Scalar in [0, 1], of the samples that the probe is trained on; 0 if there are none, None without a probe.
        denoising_losses (`torch.Tensor` of shape `[B]`): The samples' own losses, without gradient.
        probe_losses (`torch.Tensor` of shape `[P]`, *optional*):
            The weighted probe losses of the samples that the probe is trained on, without gradient; None without a
            probe.
        regularizer_losses (`dict[str, torch.Tensor]`, *optional*):
            Scalars, the weighted losses of the regularizers by name, without gradient; None without any.
    """

    loss: torch.Tensor
    # Defaults, so that accelerate's mixed precision can rebuild the output from a dict.
    denoising_loss: torch.Tensor = None  # type: ignore[assignment]
    probe_loss: torch.Tensor = None  # type: ignore[assignment]
    probe_accuracy: torch.Tensor | None = None
    denoising_losses: torch.Tensor = None  # type: ignore[assignment]
    probe_losses: torch.Tensor | None = None
    regularizer_losses: dict[str, torch.Tensor] | None = None


class LSEPObjective(nn.Module):
    r"""
    The training objective of LSEP (arXiv 2509.21565): flow matching, and next to it the cross-entropy of a linear
    probe on the tokens of an intermediate block,

        loss = mean_i |v(x_t, t, y) - v|^2 + mean_i w(t_i) CE(probe(h_k(x_t, t, y')), y_i)

    Both streams see the same `x_t` and `t`, but drop their labels independently; the probe's stream ends after
    `probe_depth` blocks. The two share one pass through these blocks. The module holds transformer and probe, so that
    DDP and FSDP wrap one forward. It does the same in training and in evaluation mode.

    Args:
        transformer ([`SiTTransformer2DModel`]): The model, in float32: half precision is for autocast.
        probe ([`LinearProbe`], *optional*): Its probe. None trains a plain SiT.
        path_type (`str`, defaults to `"linear"`): The path, `"linear"` or `"cosine"`.
        probe_depth (`int`, defaults to `8`): After how many blocks the probe reads, `1..num_layers`.
        probe_dropout_prob (`float`, defaults to `0.9`): Probability of the null class in the probe's stream.
        class_dropout_prob (`float`, defaults to `0.1`): Probability of the null class in the main stream.
        crop_size (`tuple[int, int]`, *optional*):
            Smallest and largest side, both inclusive and in tokens, of the window whose tokens the probe averages. Its
            size is drawn once per batch and its position per sample. Not given, the probe sees all tokens.
        probe_weight_start (`float`, defaults to `0.0225`): `w` at `t = 0`.
        probe_weight_end (`float`, defaults to `0.03`): `w` at `t = 1`.
        num_probe_weights (`int`, defaults to `10`):
            Into how many steps of equal length `w` is cut between the two.
        timestep_sampling (`str`, defaults to `"uniform"`):
            Distribution of `t`, `"uniform"` or `"logit_normal"` (`ln(sigma / alpha)` is standard normal).
        regularizers (`dict[str, Regularizer]`, *optional*):
            Further losses by name, such as [`~regularizers.REPARegularizer`]. Each is handed what it says that it
            reads of this one pass ([`~regularizers.RegularizerContext`]).
        probe_fraction (`float`, defaults to `1.0`):
            The part of the samples, in (0, 1], that the probe is trained on where `probe_rows` name them. Its loss is
            divided by their expected number, so that each weighs the same however many of them a batch has.
        share_streams (`bool`, defaults to `True`):
            Whether samples on which both streams see the same label, 18 % of them with these probabilities, are
            computed once: the same loss for less work. See `separate_rows` of `forward`.

    Raises:
        `ValueError`: if an argument is outside these ranges or does not fit the transformer.
    """

    probe_weights: torch.Tensor
    regularizers: Any  # a `ModuleDict` of `Regularizer`s

    def __init__(
        self,
        transformer: SiTTransformer2DModel,
        probe: LinearProbe | None,
        path_type: str = "linear",
        probe_depth: int = 8,
        probe_dropout_prob: float = 0.9,
        class_dropout_prob: float = 0.1,
        crop_size: tuple[int, int] | None = None,
        probe_weight_start: float = 0.0225,
        probe_weight_end: float = 0.03,
        num_probe_weights: int = 10,
        timestep_sampling: str = "uniform",
        regularizers: dict[str, Regularizer] | None = None,
        probe_fraction: float = 1.0,
        share_streams: bool = True,
    ):
        super().__init__()
        self.transformer = transformer
        self.probe = probe
        self.regularizers = make_regularizers(regularizers)
        self.path = get_interpolant(path_type)
        self.probe_depth = probe_depth
        self.probe_dropout_prob = probe_dropout_prob
        self.class_dropout_prob = class_dropout_prob
        self.crop_size = crop_size
        self.timestep_sampling = timestep_sampling
        self.probe_fraction = probe_fraction
        self.share_streams = share_streams
        check_objective(self, probe_weight_start, probe_weight_end, num_probe_weights)

        weights = torch.linspace(float(probe_weight_start), float(probe_weight_end), num_probe_weights)
        self.register_buffer("probe_weights", weights, persistent=False)

    def draw_crop_window(
        self, batch_size: int, device: torch.device | str, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Draws the windows `(top, left, size)` of a batch, `[B, 3]`: one size for all, a position for each."""
        grid_size = self.transformer.config.sample_size // self.transformer.config.patch_size
        if self.crop_size is None:
            raise ValueError("`crop_size` has to be (low, high) for windows to be drawn, but is None.")
        low, high = self.crop_size
        size = torch.randint(low, high + 1, (1, 1), generator=generator, device=device).expand(batch_size, 1)
        uniform = torch.rand(batch_size, 2, generator=generator, device=device, dtype=exact_dtype(device))
        start = (uniform * (grid_size - size + 1)).long().minimum(grid_size - size)  # float32 may round up
        return torch.cat([start, size], dim=1)

    def draw_dropout_masks(
        self, batch_size: int, device: torch.device | str, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Draws which labels of a batch each stream drops. In every sample the two are independent of each other, but
        samples are drawn such that the number of those that only one stream drops is the same in every batch, up to
        rounding (systematic sampling): so the work is, and its shapes are known without asking the device.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]`: `class_dropout_mask`, `probe_dropout_mask` and
            `separate_rows` of `forward`.
        """
        main, probe = self.class_dropout_prob, self.probe_dropout_prob
        # 1. Numbers in [0, 1): a lattice with one shift for all of it, in random order. Of each alone: uniform
        uniform = torch.randperm(batch_size, generator=generator, device=device)
        uniform = (uniform + torch.rand((), generator=generator, device=device)) / batch_size % 1  # if rounded up to 1

        # 2. What falls where: both drop, main drops, probe drops, none does. The middle two are one interval
        class_dropout_mask = uniform < main
        only_probe = (uniform >= main) & (uniform < main + (1 - main) * probe)
        probe_dropout_mask = (uniform < main * probe) | only_probe

        # 3. The samples in it, filled up with others to the most that there can be, whatever is rounded
        num_rows = math.floor(batch_size * (main + probe - 2 * main * probe) + 1e-3) + 1
        if num_rows >= batch_size:
            return class_dropout_mask, probe_dropout_mask, None
        differs = (class_dropout_mask != probe_dropout_mask).to(torch.uint8)
        return class_dropout_mask, probe_dropout_mask, differs.argsort(descending=True, stable=True)[:num_rows]

    def find_separate_rows(
        self, class_dropout_mask: torch.Tensor, probe_dropout_mask: torch.Tensor
    ) -> torch.Tensor | None:
        """
        The samples on which the masks differ. None if all do, or where to find their number would make the host wait
        for a device, or the compiler give up on one graph for all batches.
        """
        if class_dropout_mask.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        rows = (class_dropout_mask != probe_dropout_mask).nonzero()[:, 0]
        return rows if len(rows) < len(class_dropout_mask) else None

    def forward(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        class_dropout_mask: torch.Tensor | None = None,
        probe_dropout_mask: torch.Tensor | None = None,
        crop_window: torch.Tensor | None = None,
        probe_weight_scale: float | torch.Tensor = 1.0,
        generator: torch.Generator | None = None,
        targets: dict[str, torch.Tensor] | None = None,
        separate_rows: torch.Tensor | None = None,
        probe_rows: torch.Tensor | None = None,
        regularizer_weights: dict[str, torch.Tensor] | None = None,
        r_timesteps: torch.Tensor | None = None,
        target_velocity: torch.Tensor | None = None,
    ) -> LSEPObjectiveOutput:
        """
        Computes the loss of a batch. Whatever is random can be given; what is not given is drawn.

        Args:
            latents (`torch.Tensor` of shape `[B, C, S, S]`): Scaled latents, or images in [-1, 1].
            class_labels (`torch.Tensor` of shape `[B]`):
                Class indices in `0..num_classes - 1`; without a probe also the null class, `num_classes`.
            noise (`torch.Tensor` of shape `[B, C, S, S]`, *optional*): Standard normal noise.
            timesteps (`torch.Tensor` of shape `[B]`, *optional*): Times `t` in [0, 1], in float32.
            class_dropout_mask (`torch.Tensor` of shape `[B]`, bool, *optional*):
                Where the main stream sees the null class.
            probe_dropout_mask (`torch.Tensor` of shape `[B]`, bool, *optional*):
                Where the probe's stream sees the null class.
            crop_window (`torch.Tensor` of shape `[B, 3]`, int64, *optional*):
                The window `(top, left, size)` of the probe for each sample, in tokens. Drawn only if `crop_size` was
                given.
            probe_weight_scale (`float` or scalar `torch.Tensor`, defaults to `1.0`):
                Factor of the probe's loss, for its decay late in training.
            generator (`torch.Generator`, *optional*): Draws what is not given.
            targets (`dict[str, torch.Tensor]`, *optional*):
                What the regularizers that read a `target` compare with, by their names (see
                [`~regularizers.teachers.ask_teachers`]).
            separate_rows (`torch.Tensor` of shape `[M]`, int64, *optional*):
                The samples of the batch, each once, that the probe's stream is computed for; on the others the probe
                reads the main stream's tokens. The same loss for less work if both streams see the same label on the
                others, as on 18 % of the samples with the paper's dropout. If not given they are found, with
                `share_streams`: always where both masks are drawn here, and where they are given on the CPU and
                nothing is compiled. Else all.
            probe_rows (`torch.Tensor` of shape `[P]`, int64, *optional*):
                The samples of the batch, each once, that the probe is trained on, each with the probability
                `probe_fraction`: its loss is their sum over `probe_fraction * B`. All, and the mean over them, if not
                given.
            regularizer_weights (`dict[str, torch.Tensor]`, *optional*):
                Factors of the regularizers' losses, by their names, where they change over the steps; each one's
                `weight` if not given.
            r_timesteps, target_velocity (`torch.Tensor`, *optional*):
                Of a flow map, the times in [0, t] to go to, `[B]`, and what is to be predicted, `[B, C, S, S]` (see
                [`~flow_map.mean_velocity_target`]). Its `loss` has `log(|u - target|^2 + 0.001)`, as in arXiv
                2510.24474, for `denoising_loss`.

        Returns:
            [`LSEPObjectiveOutput`]

        Raises:
            `ValueError`: if an argument is none of these. Numbers are looked at on the CPU only, and nothing where
            this is compiled.
        """
        if not torch.compiler.is_compiling():
            draws = {"noise": noise, "timesteps": timesteps, "crop_window": crop_window}
            draws |= {"class_dropout_mask": class_dropout_mask, "probe_dropout_mask": probe_dropout_mask}
            draws |= {"r_timesteps": r_timesteps, "target_velocity": target_velocity}
            check_batch(self, latents, class_labels, draws, {"separate_rows": separate_rows, "probe_rows": probe_rows})
            probe_weight_scale = check_factor("probe_weight_scale", probe_weight_scale)
            check_type("generator", generator, torch.Generator, "a `torch.Generator`")
            check_type("targets", targets, dict, "a dict of tensors by the regularizers' names")
            regularizer_weights = check_regularizer_weights(self.regularizers, regularizer_weights)
        batch_size, device = latents.shape[0], latents.device
        targets = {} if targets is None else targets
        needed = [name for name, regularizer in self.regularizers.items() if "target" in regularizer.reads]
        if targets.keys() != set(needed):
            raise ValueError(f"`targets` has to be given for {needed}, but is for {list(targets)}.")

        class_labels = class_labels.long()  # of all integers the only ones that everything below takes
        separate_rows = separate_rows.long() if separate_rows is not None else None
        probe_rows = probe_rows.long() if probe_rows is not None else None

        # 1. Draws
        if noise is None:
            noise = torch.randn(latents.shape, generator=generator, device=device, dtype=torch.float32)
        if timesteps is None:
            uniform = torch.rand(batch_size, generator=generator, device=device, dtype=torch.float32)
            timesteps = timesteps_from_uniform(uniform, self.path, self.timestep_sampling)
        share = self.share_streams and self.probe is not None and separate_rows is None
        if share and class_dropout_mask is None and probe_dropout_mask is None:
            masks = self.draw_dropout_masks(batch_size, device, generator)
            class_dropout_mask, probe_dropout_mask, separate_rows = masks
        if class_dropout_mask is None:
            class_dropout_mask = torch.rand(batch_size, generator=generator, device=device) < self.class_dropout_prob
        if probe_dropout_mask is None and self.probe is not None:
            probe_dropout_mask = torch.rand(batch_size, generator=generator, device=device) < self.probe_dropout_prob
        if share and probe_dropout_mask is not None:
            found = self.find_separate_rows(class_dropout_mask, probe_dropout_mask)
            separate_rows = found if found is not None else separate_rows
        if crop_window is None and self.crop_size is not None and self.probe is not None:
            crop_window = self.draw_crop_window(batch_size, device, generator)

        # 2. Point on the path and its velocity, in float32
        timesteps, latents, noise = timesteps.float(), latents.float(), noise.float()
        time = timesteps.view(-1, 1, 1, 1)
        noisy_latents = self.path.interpolate(latents, noise, time)
        true_velocity = self.path.velocity(latents, noise, time)
        target = true_velocity if target_velocity is None else target_velocity

        # 3. Network
        null_class = self.transformer.config.num_classes
        labels, probe_labels = torch.where(class_dropout_mask, null_class, class_labels), None
        if self.probe is not None and probe_dropout_mask is not None:
            probe_labels = torch.where(probe_dropout_mask, null_class, class_labels)
        velocity, tokens_at, probe_tokens, known = self._forward_streams(
            noisy_latents, timesteps, labels, probe_labels, separate_rows, r_timesteps
        )
        # Not by `|=`, which dynamo of torch 2.6 does not know
        known.update(latents=latents, noise=noise, noisy_latents=noisy_latents, timesteps=timesteps, path=self.path)
        known.update(class_labels=class_labels, dropped_labels=labels, null_class=null_class)
        known.update(velocity=true_velocity, prediction=velocity, probe_tokens=probe_tokens)

        # 4. Losses, in float32
        squares = (velocity.float() - target).square().flatten(1)
        denoising_losses = squares.mean(dim=1)
        loss = denoising_loss = denoising_losses.mean()
        if r_timesteps is not None:
            loss = (squares.sum(dim=1) + 1e-3).log().mean()
        probe_loss, probe_losses, probe_accuracy = torch.zeros_like(denoising_loss), None, None
        if self.probe is not None and probe_tokens is not None:
            if probe_rows is not None:
                probe_tokens, timesteps, class_labels = (
                    x[probe_rows] for x in (probe_tokens, timesteps, class_labels)
                )
                crop_window = crop_window[probe_rows] if crop_window is not None else None
            logits = self.probe(probe_tokens, window=crop_window)
            num_weights = len(self.probe_weights)
            weights = self.probe_weights[(timesteps * num_weights).long().clamp(max=num_weights - 1)]
            cross_entropy = F.cross_entropy(logits.float(), class_labels, reduction="none")
            probe_losses = cross_entropy * weights * probe_weight_scale
            probe_loss = probe_losses.mean()
            # The largest of logits that are NaN is the first.
            is_correct = (logits.detach().argmax(dim=1) == class_labels) & cross_entropy.detach().isfinite()
            probe_accuracy = is_correct.float().mean()
            if probe_rows is not None:  # of another number in every batch, which may be 0
                probe_loss = probe_losses.sum() / (self.probe_fraction * batch_size)
                probe_accuracy = probe_accuracy.nan_to_num()
            loss = loss + probe_loss
        regularizer_losses = self._regularize(tokens_at, known, targets, regularizer_weights)
        for regularizer_loss in regularizer_losses.values():
            loss = loss + regularizer_loss
        return LSEPObjectiveOutput(
            loss=loss,
            denoising_loss=denoising_loss.detach(),
            probe_loss=probe_loss.detach(),
            probe_accuracy=probe_accuracy,
            denoising_losses=denoising_losses.detach(),
            probe_losses=probe_losses.detach() if probe_losses is not None else None,
            regularizer_losses={name: value.detach() for name, value in regularizer_losses.items()} or None,
        )

    def _regularize(
        self,
        tokens_at: dict[int, torch.Tensor],
        known: dict[str, Any],
        targets: dict[str, torch.Tensor],
        weights: dict[str, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """The weighted losses of the regularizers, each of which is handed what it reads."""
        losses = {}
        for name, regularizer in self.regularizers.items():
            read: dict[str, Any] = {x: targets[name] if x == "target" else known[x] for x in regularizer.reads}
            context = RegularizerContext({depth: tokens_at[depth] for depth in regularizer.depths}, **read)
            weight = regularizer.weight if weights is None else weights[name]
            losses[name] = weight * regularizer(context).mean()
        return losses

    def weights_at(self, step: int, epoch: float) -> dict[str, float]:
        """The `regularizer_weights` after so many steps, or passes over the data."""
        return {name: regularizer.weight_at(step, epoch) for name, regularizer in self.regularizers.items()}

    def _forward_streams(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor,
        probe_labels: torch.Tensor | None,
        separate_rows: torch.Tensor | None,
        r_timesteps: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor], torch.Tensor | None, dict[str, Any]]:
        """
        One pass through the network. Returns the velocity, the main stream's tokens after each depth that something
        reads, the probe's tokens, and what else regularizers may read of the network.
        """
        transformer, batch_size, r_temb = self.transformer, noisy_latents.shape[0], None
        if r_timesteps is not None:
            r_temb = transformer.embed_condition(r_timesteps, labels, dtype=noisy_latents.dtype)

        # Both streams are one batch as far as the probe's goes, and their patches are the same.
        tokens = transformer.embed_patches(noisy_latents)
        if probe_labels is not None:
            both = [
                (x, y if separate_rows is None else y[separate_rows])
                for x, y in ((tokens, tokens), (timesteps, timesteps), (labels, probe_labels))
            ]
            tokens, timesteps, labels = (torch.cat(pair) for pair in both)
        temb = transformer.embed_condition(timesteps, labels, dtype=noisy_latents.dtype)

        depths = {transformer.config.num_layers, *(d for module in self.regularizers.values() for d in module.depths)}
        if self.probe is not None:
            depths.add(self.probe_depth)
        internal_depth = None
        if any("internal_prediction" in module.reads for module in self.regularizers.values()):
            internal_depth = transformer.config.internal_guidance_depth
            depths.add(internal_depth)
        tokens_at, probe_tokens, start = {}, None, 0
        for depth in sorted(depths):
            tokens = transformer.apply_blocks(tokens, temb, start, depth, r_temb)
            if self.probe is not None and depth == self.probe_depth:
                tokens, probe_tokens = tokens[:batch_size], tokens[batch_size:]
                if separate_rows is not None:
                    probe_tokens = tokens.index_copy(0, separate_rows, probe_tokens)
                temb = temb[:batch_size]
            tokens_at[depth], start = tokens[:batch_size], depth
        known = {"condition": temb[:batch_size]}
        if internal_depth is not None:
            known["internal_prediction"] = transformer.project_out(tokens_at[internal_depth], temb, internal=True)
        return transformer.project_out(tokens, temb if r_temb is None else r_temb), tokens_at, probe_tokens, known
