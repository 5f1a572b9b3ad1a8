# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The Inception network of FID, Inception Score, precision and recall: torch-fidelity's, with sFID's features."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import torch

from ..files import hash_file
from ..sampling import float32_products


# First digits of the SHA-256 of the 2015 weights, as torch-fidelity's file name states them.
OFFICIAL_HASH = "6726825d"

# sFID's features are the first channels of this convolution's output, after its ReLU (TensorFlow: `mixed_6/conv`).
SPATIAL_LAYER = "Mixed_6d.branch1x1"
SPATIAL_CHANNELS = 7


class InceptionFeatures:
    """
    Features of images by the Inception-v3 of 2015, resized as TensorFlow 1 did, in float32 (no TF32).

    Args:
        weights_path (`str` or `os.PathLike`, *optional*):
            The weights in torch-fidelity's layout. If not given, torch-fidelity's own file is used, which is
            downloaded once into PyTorch's hub folder.
        device (`str` or `torch.device`, defaults to `"cpu"`):
            Where the network runs.

    Attributes:
        widths (`dict[str, int]`):
            `pool` 2,048 (FID), `spatial` 17 x 17 x 7 = 2,023 (sFID), `logits` 1,008 without bias (Inception Score).
        name (`str`): Identifies the weights: `inception-` and the first 8 digits of their file's SHA-256.
        is_official (`bool`): Whether these are the weights of 2015 that published numbers are made with.

    Raises:
        `ImportError`: without torch-fidelity (extra `eval`).
        `OSError`: if there is no such file, or it cannot be downloaded.
        `ValueError`: if the file is not a state dict of this network with finite weights.
    """

    widths = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": 1008}

    def __init__(self, weights_path: str | os.PathLike | None = None, device: str | torch.device = "cpu"):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                f"FID needs torch-fidelity and torchvision: pip install 'diffusers_lsep[eval]' ({error})."
            ) from error

        path = Path(_official_weights_path() if weights_path is None else weights_path)
        digest, weights = _read_weights(path)
        self.name = f"inception-{digest[:8]}"
        self.is_official = digest.startswith(OFFICIAL_HASH)
        try:
            # torch-fidelity unpickles its file without `weights_only`: hand it tensors that were read safely.
            self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], weights)
        except RuntimeError as error:  # lists keys and shapes
            raise ValueError(f"`inception_weights` {str(path)!r} is no state dict of Inception: {error}") from error
        self.device = torch.device(device)
        self.network.to(self.device)
        self._spatial: torch.Tensor | None = None
        self.network.get_submodule(SPATIAL_LAYER).register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor):
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # TensorFlow's order: NHWC

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """
        Args:
            images (`np.ndarray`): Images `[B, H, W, 3]`, uint8.

        Returns:
            `dict[str, np.ndarray]`: float32 features `[B, width]` under the names of `widths`.
        """
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
        with float32_products(allow_tf32=False):
            pool, logits = self.network(pixels)
        features = {"pool": pool, "spatial": self._spatial, "logits": logits}
        return {name: value.cpu().numpy() for name, value in features.items()}


def _official_weights_path() -> Path:
    """The file in PyTorch's hub folder, where torch-fidelity keeps it too; downloaded if it is not there."""
    import huggingface_hub.constants
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    advice = f"Download it elsewhere and name it by `inception_weights`, or put it at {path}."
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise OSError(f"{URL_INCEPTION_V3} is needed, but HF_HUB_OFFLINE is set. {advice}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=OFFICIAL_HASH)
    except (OSError, RuntimeError) as error:  # no connection; not the file that it should be
        raise OSError(f"{URL_INCEPTION_V3} could not be downloaded: {error}. {advice}") from error
    return path


def _read_weights(path: Path) -> tuple[str, io.BytesIO]:
    """SHA-256 of the file, and its tensors as a new file in memory that holds nothing else."""
    if not path.is_file():
        raise FileNotFoundError(f"`inception_weights` has to be a file, but there is none at {str(path)!r}.")
    digest = hash_file(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"`inception_weights` {str(path)!r} cannot be read as plain weights: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"`inception_weights` {str(path)!r} has to hold a state dict, tensors under their names.")
    damaged = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if damaged:
        raise ValueError(f"`inception_weights` {str(path)!r} has to be finite, but {damaged} hold NaN or infinity.")
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    buffer.seek(0)
    return digest, buffer
