# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""REPA (arXiv 2410.06940) and iREPA (arXiv 2512.10794) as a regularizer of [`LSEPObjective`]: tokens that agree with a
frozen encoder's."""

import inspect
import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..argument_checks import check_choice, check_count, check_number, check_tensor
from .regularizer import Regularizer, RegularizerContext, make_mlp


# Of an encoder without a preprocessor_config.json.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


PROJECTORS = ("mlp", "conv")


class REPARegularizer(Regularizer):
    r"""
    The alignment loss of REPA (arXiv 2410.06940, section 3),

        - 1/N sum_n cos(h_phi(tokens_n), target_n)

    between the tokens of the main stream, through a projector `h_phi` (three linear layers with SiLU between them),
    and the patch tokens that an encoder gives for the clean image ([`REPAEncoder`]). iREPA (arXiv 2512.10794) keeps
    more of where things are: its projector is a 3 x 3 convolution on the grid of tokens, and the encoder's tokens are
    normalised over the patches, channel by channel, `(target - alpha mean) / (std + 1e-6)`.

    Args:
        hidden_size (`int`): Width `D` of the transformer's tokens.
        target_size (`int`): Width `E` of the encoder's tokens.
        depth (`int`, defaults to `8`): After how many blocks the tokens are read; REPA takes 8 for SiT-L and -XL, 4
            for SiT-B.
        weight (`float`, defaults to `0.5`): Factor of the loss; iREPA takes 1.
        projector_size (`int`, defaults to `2048`): Width of the projector's hidden layers.
        projector (`str`, defaults to `"mlp"`): `"mlp"`, or iREPA's `"conv"`.
        target_alpha (`float`, *optional*):
            What part of the mean over the patches is taken from the encoder's tokens, before they are divided by their
            standard deviation; iREPA takes 0.6. They stay as they are if not given.

    Raises:
        `ValueError`: if `weight` is no number from 0 on, or there is no such `projector`.
    """

    reads = ("target",)

    def __init__(
        self,
        hidden_size: int,
        target_size: int,
        depth: int = 8,
        weight: float = 0.5,
        projector_size: int = 2048,
        projector: str = "mlp",
        target_alpha: float | None = None,
    ):
        super().__init__(weight)
        check_choice("projector", projector, PROJECTORS)
        hidden_size, target_size = check_count("hidden_size", hidden_size), check_count("target_size", target_size)
        projector_size = check_count("projector_size", projector_size)
        self.depth = check_count("depth", depth)
        self.depths = (self.depth,)
        self.target_alpha = None if target_alpha is None else check_number("target_alpha", target_alpha)
        self.target_size = target_size
        self.projector: nn.Module
        if projector == "conv":
            self.projector = nn.Conv2d(hidden_size, target_size, kernel_size=3, padding=1)
        else:
            self.projector = make_mlp(hidden_size, projector_size, projector_size, target_size)

    def forward(self, context: RegularizerContext) -> torch.Tensor:
        """
        Computes the loss of each sample, in [-1, 1].

        Args:
            context ([`RegularizerContext`]): With `tokens`, and the encoder's as `target`, `[B, N, E]`.

        Returns:
            `torch.Tensor` of shape `[B]`, float32.
        """
        tokens = context.tokens[self.depth]
        check_tensor("target", context.target, (*tokens.shape[:2], self.target_size))
        target = context.target.float()
        if self.target_alpha is not None:
            mean, std = target.mean(dim=1, keepdim=True), target.std(dim=1, keepdim=True)
            target = (target - self.target_alpha * mean) / (std + 1e-6)
        if isinstance(self.projector, nn.Conv2d):
            grid_size = math.isqrt(tokens.shape[1])
            grid = tokens.transpose(1, 2).unflatten(2, (grid_size, grid_size))
            projected = self.projector(grid).flatten(2).transpose(1, 2)
        else:
            projected = self.projector(tokens)
        return -F.cosine_similarity(projected.float(), target, dim=-1).mean(dim=1)


@torch.no_grad()
def resample_positions(model: nn.Module, grid_size: int):
    """
    Makes the position table of a vision transformer fit another grid, for good: bicubic with antialiasing, in float32.
    The first row, the class token's, stays. A model without a table `[1, 1 + n^2, E]` is left as it is.

    Args:
        model (`nn.Module`): A model of `transformers`; its table is `embeddings.position_embeddings`.
        grid_size (`int`): Side of the new grid, in tokens.
    """
    embeddings: Any = getattr(model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if not isinstance(table, nn.Parameter) or table.ndim != 3:
        return
    side = math.isqrt(table.shape[1] - 1)
    if side == grid_size or side**2 != table.shape[1] - 1:
        return
    grid = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(grid_size, grid_size), mode="bicubic", antialias=True)
    resampled = torch.cat([table[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)
    embeddings.position_embeddings = nn.Parameter(resampled.to(table.dtype), requires_grad=False)


class REPAEncoder:
    """
    A frozen vision transformer such as DINOv2, through `transformers.AutoModel`, that gives one token per token of the
    transformer in training. It is no `nn.Module`: its weights are in no checkpoint and in no average.

    A learned position table (DINOv2's, for one) is resampled to the grid once, with antialiasing, so that the targets
    are those of REPA's own code. Left to itself, `transformers` does it for each batch, for DINOv2 without
    antialiasing.

    Args:
        model_name_or_path (`str`): Id or folder of the encoder, for REPA `"facebook/dinov2-base"`.
        grid_size (`int`):
            Tokens along one side of the transformer. Images are resized (bicubic) to `grid_size` patches of the
            encoder: 256 px become 224 x 224 for a SiT with patch 2 and patches of 14 pixels.

    Attributes:
        size (`int`): Width `E` of the tokens.
        resolution (`int`): Side of the images that the encoder sees.

    Raises:
        `ValueError`: if there is no such model, or it does not give patch tokens.
    """

    def __init__(self, model_name_or_path: str, grid_size: int):
        from transformers import AutoModel
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            # Left open, whether to run a model's own code would be asked on the terminal.
            options = {"use_safetensors": True, "trust_remote_code": False}
            model = AutoModel.from_pretrained(model_name_or_path, dtype=torch.float32, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"`repa_encoder` {str(model_name_or_path)!r} cannot be loaded: {error}") from error
        try:
            processing, _ = ImageProcessingMixin.get_image_processor_dict(model_name_or_path)
        except OSError:
            processing = {}
        self.mean = torch.tensor(processing.get("image_mean", IMAGENET_MEAN)).view(3, 1, 1)
        self.std = torch.tensor(processing.get("image_std", IMAGENET_STD)).view(3, 1, 1)
        self.model = model.eval().requires_grad_(False)
        # DINOv2 always adapts its position table, others are asked to.
        adapts = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if adapts else {}

        what = f"`repa_encoder` {str(model_name_or_path)!r} ({model.config.model_type})"
        patch_size = getattr(model.config, "patch_size", None)
        if model.main_input_name != "pixel_values" or not isinstance(patch_size, int):
            raise ValueError(f"{what} has to be a vision transformer, with pixels as input and a patch size.")
        self.grid_size = grid_size
        self.resolution = grid_size * patch_size
        resample_positions(model, grid_size)
        try:
            tokens = self(torch.zeros(1, 3, self.resolution, self.resolution))
        except ValueError as error:
            raise ValueError(f"{what} cannot take images of {self.resolution} x {self.resolution}: {error}") from error
        if tokens.shape[1] != grid_size**2:
            raise ValueError(
                f"{what} has to give {grid_size**2} patch tokens for images of {self.resolution} x {self.resolution},"
                f" but gives {tokens.shape[1]}."
            )
        self.size = tokens.shape[2]

    def to(self, device: torch.device | str) -> "REPAEncoder":
        """Moves the encoder to a device, and returns it."""
        self.model.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """
        Encodes images.

        Args:
            images (`torch.Tensor` of shape `[B, C, H, W]`): Clean images in [-1, 1], in colour or grey.

        Returns:
            `torch.Tensor` of shape `[B, grid_size**2, E]`: the last layer's patch tokens, row by row.
        """
        pixels = ((images + 1) / 2 - self.mean) / self.std  # grey becomes three equal channels
        if pixels.shape[-1] != self.resolution:
            pixels = F.interpolate(pixels, size=(self.resolution, self.resolution), mode="bicubic")
        tokens = self.model(pixel_values=pixels, **self.options).last_hidden_state
        # The class token and registers come first.
        return tokens[:, -(self.grid_size**2) :]
