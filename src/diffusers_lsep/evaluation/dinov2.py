# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The network of FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675), through transformers."""

import numpy as np
import torch

from ..files import hash_weights
from ..sampling import float32_products


RESOLUTION = 224
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DINOv2Features:
    """
    Features of images for FD-DINOv2: the normalised class token of images that are resized to 224 x 224 (bicubic,
    antialiased) and normalised by ImageNet's mean and deviation, in float32 (no TF32).

    Args:
        model_name_or_path (`str`, defaults to `"facebook/dinov2-large"`):
            Id or folder of a model that `transformers.AutoModel` loads and whose first token is the class token.
            Published numbers use ViT-L/14, the default.
        device (`str` or `torch.device`, defaults to `"cpu"`):
            Where the network runs.

    Attributes:
        widths (`dict[str, int]`): `class_token` and the model's width.
        name (`str`): Identifies the weights: `dinov2-` and the first 8 digits of their SHA-256.

    Raises:
        `ValueError`: if there is no such model, or it is no vision transformer.
    """

    def __init__(self, model_name_or_path: str = "facebook/dinov2-large", device: str | torch.device = "cpu"):
        from transformers import AutoModel

        try:
            # Left open, whether to run a model's own code would be asked on the terminal.
            options = {"use_safetensors": True, "trust_remote_code": False}
            model = AutoModel.from_pretrained(model_name_or_path, dtype=torch.float32, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"`dinov2_model` {model_name_or_path!r} cannot be loaded: {error}") from error
        patch_size = getattr(model.config, "patch_size", None)
        if not isinstance(patch_size, int) or RESOLUTION % patch_size:
            raise ValueError(
                f"`dinov2_model` has to be a vision transformer whose patch size divides {RESOLUTION}, but is "
                f"{model_name_or_path!r} ({model.config.model_type}, patch size {patch_size})."
            )
        self.name = f"dinov2-{hash_weights(model)[:8]}"
        self.widths = {"class_token": model.config.hidden_size}
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """
        Args:
            images (`np.ndarray`): Images `[B, H, W, 3]`, uint8.

        Returns:
            `dict[str, np.ndarray]`: float32 features `[B, width]` under the name `class_token`.
        """
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float()
        pixels = torch.nn.functional.interpolate(pixels, size=(RESOLUTION, RESOLUTION), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        with float32_products(allow_tf32=False):
            tokens = self.model((pixels / 255 - mean) / std).last_hidden_state
        return {"class_token": tokens[:, 0].cpu().numpy()}
