# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The autoencoders of diffusers as a transformer sees them: between images in [-1, 1] and normalised latents.

What differs between their classes is told by what they offer, and known here alone: what their latents are normalised
by, how much smaller than the image these are, whether they are drawn from a posterior, patches and frames.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLKVAE,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderTiny,
)
from diffusers.utils.torch_utils import unwrap_module


# Those that tests cover. Others work if they have a config like one of these.
Autoencoder: TypeAlias = (
    AutoencoderKL
    | AsymmetricAutoencoderKL
    | AutoencoderDC
    | AutoencoderKLFlux2
    | AutoencoderKLHunyuanImage
    | AutoencoderKLKVAE
    | AutoencoderKLQwenImage
    | AutoencoderKLWan
    | AutoencoderTiny
)

UNSUPPORTED = {
    "AutoencoderKLTemporalDecoder": "its decoder is for videos",
    "AutoencoderRAE": "it normalises its latents itself, and its images are in [0, 1]",
}

# Of the config of an AutoencoderKL what decides its latents and does not show in the names and shapes of the weights.
_ENCODER_OPTIONS = ("act_fn", "down_block_types", "norm_num_groups")
# Of the config of other classes what does not decide them, by parts of the names.
_NOT_OF_ENCODER = ("decode", "up_block", "upsampl", "post_quant", "sample_size", "force_upcast", "batch_norm_momentum")


def load_autoencoder(name_or_path: str, argument: str, **options) -> Autoencoder:
    """
    Loads an autoencoder of whatever class, in float32 and frozen.

    Args:
        name_or_path (`str`): Folder or Hub id.
        argument (`str`): What messages call it.
        options: `subfolder` and `revision`.

    Raises:
        `ValueError`: if there is none, or it is none for images.
    """
    import diffusers

    try:
        class_name = AutoencoderKL.load_config(name_or_path, **options).get("_class_name")
        autoencoder_class: Any = getattr(diffusers, class_name or "", None)
        if not hasattr(autoencoder_class, "encode") or not hasattr(autoencoder_class, "decode"):
            raise ValueError(f"it is no autoencoder of diffusers, but {class_name}")
        vae = autoencoder_class.from_pretrained(name_or_path, torch_dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}` {name_or_path!r} cannot be loaded: {error}") from error
    check_autoencoder(vae, argument)
    return vae.eval().requires_grad_(False)


def check_autoencoder(vae: Autoencoder, argument: str, in_channels: int | None = None):
    """
    Raises a `ValueError` if a transformer cannot work on the latents of an autoencoder.

    Args:
        vae (an autoencoder of diffusers): The autoencoder.
        argument (`str`): What messages call it.
        in_channels (`int`, *optional*): Channels of the transformer, if it is known.
    """
    vae = unwrap_module(vae)
    class_name = type(vae).__name__
    if not hasattr(vae, "config") or not hasattr(vae, "decode"):
        raise ValueError(f"`{argument}` has to be an autoencoder of diffusers, but is of the class {class_name}.")
    if class_name in UNSUPPORTED:
        raise ValueError(f"`{argument}` cannot be of the class {class_name}: {UNSUPPORTED[class_name]}.")
    channels = get_latent_channels(vae)
    for name in ("latents_mean", "latents_std"):
        values = vae.config.get(name)
        if values is not None and len(values) != channels:
            raise ValueError(
                f"`{argument}` has to have one value of `{name}` for each of its {channels} channels, but has"
                f" {len(values)}."
            )
    if get_image_channels(vae) not in (1, 3):
        raise ValueError(
            f"`{argument}` has to be for grey or RGB images, but {class_name} is for {get_image_channels(vae)}"
            " channels."
        )
    get_scale_factor(vae)
    if in_channels not in (None, channels):
        raise ValueError(
            f"`{argument}` has {channels} latent channels ({class_name}), but `transformer` has"
            f" `in_channels={in_channels}`."
        )


def get_scale_factor(vae: Autoencoder) -> int:
    """
    How many times smaller than the image the latents are, as the transformer sees them.

    Raises:
        `ValueError`: if the autoencoder does not say it.
    """
    vae = unwrap_module(vae)
    # Asked of the object's own attributes: for a part of the config, `vae.name` would log a warning.
    factor = vars(vae).get("spatial_compression_ratio") or vae.config.get("spatial_compression_ratio")
    if factor is None:
        factor = 2 ** (len(_read_config(vae, "encoder_block_out_channels", "block_out_channels", "ch_mult")) - 1)
    return factor * _patch_size(vae)


def get_latent_channels(vae: Autoencoder) -> int:
    """Channels of the latents as the transformer sees them. Errors as in [`get_scale_factor`]."""
    return _read_config(vae, "latent_channels", "z_dim", "z_channels") * _patch_size(vae) ** 2


def get_image_channels(vae: Autoencoder) -> int:
    """Channels of the images: 1 for grey, 3 for RGB. Errors as in [`get_scale_factor`]."""
    vae = unwrap_module(vae)
    channels = _read_config(vae, "in_channels", "input_channels", "num_channels", "encoder_in_channels")
    if isinstance(vae, AutoencoderKLWan) and vae.config.get("patch_size"):  # of the images, which its encoder unfolds
        channels //= vae.config["patch_size"] ** 2
    return channels


def _read_config(vae: Autoencoder, *names: str) -> Any:
    """What the first of these says that the config has."""
    vae = unwrap_module(vae)
    for name in names:
        if vae.config.get(name) is not None:
            return vae.config[name]
    raise ValueError(
        f"`vae` has to have one of {', '.join(f'`{name}`' for name in names)} in its config, but"
        f" {type(vae).__name__} has none."
    )


def _patch_size(vae: Autoencoder) -> int:
    """Side of the patches of latents that are one to the transformer: 2 for Flux2, as in its own pipeline."""
    vae = unwrap_module(vae)
    return vae.config["patch_size"][0] if isinstance(vae, AutoencoderKLFlux2) else 1


def _takes_frames(vae: Autoencoder) -> bool:
    """Whether it is made for videos too: an image is a video of one frame, `[B, C, 1, H, W]`."""
    return any(isinstance(module, torch.nn.Conv3d) for module in vae.encoder.modules())


# --- Normalisation


def get_normalization(vae: Autoencoder, device: torch.device | None = None) -> dict[str, Any]:
    """
    What an autoencoder's latents are normalised by: `scaling_factor`, `shift_factor`, and `latents_mean` and
    `latents_std`, one number per channel; None where there is none. For Flux2 the last two are the statistics of its
    batch norm, over the channels of a patch. Arguments of [`normalize_latents`] and [`denormalize_latents`]: lists, as
    JSON has them, or tensors on `device` where that is given and they are used again and again.
    """
    vae = unwrap_module(vae)
    config = vae.config
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    values = {name: config.get(name) for name in names}
    if isinstance(vae, AutoencoderKLFlux2):
        values["latents_mean"] = vae.bn.running_mean.tolist()
        values["latents_std"] = torch.sqrt(vae.bn.running_var.float() + config["batch_norm_eps"]).tolist()
    if values["scaling_factor"] is None:
        values["scaling_factor"] = 1.0
    for name in ("latents_mean", "latents_std"):
        if values[name] is not None:
            values[name] = list(values[name]) if device is None else torch.tensor(values[name], device=device)
    return values


def normalize_latents(
    latents: torch.Tensor,
    scaling_factor: float = 1.0,
    shift_factor: float | None = None,
    latents_mean: Sequence[float] | torch.Tensor | None = None,
    latents_std: Sequence[float] | torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Latents of an autoencoder as the transformer sees them, `(x - shift) * scaling_factor / latents_std`, as the
    pipelines of diffusers do it: the shift is `latents_mean`, or where there is none `shift_factor`.

    Args:
        latents (`torch.Tensor` of shape `[B, C, S, S]`): As the autoencoder encodes them.
        scaling_factor (`float`, defaults to `1.0`), shift_factor (`float`, *optional*): From its config.
        latents_mean, latents_std (`C` numbers, *optional*): From its config, or the statistics of its batch norm.
    """
    shift = (shift_factor or 0.0) if latents_mean is None else _per_channel(latents_mean, latents)
    latents = (latents - shift) * scaling_factor
    return latents if latents_std is None else latents / _per_channel(latents_std, latents)


def denormalize_latents(
    latents: torch.Tensor,
    scaling_factor: float = 1.0,
    shift_factor: float | None = None,
    latents_mean: Sequence[float] | torch.Tensor | None = None,
    latents_std: Sequence[float] | torch.Tensor | None = None,
) -> torch.Tensor:
    """The inverse of [`normalize_latents`], with the same arguments."""
    if latents_std is not None:
        latents = latents * _per_channel(latents_std, latents)
    latents = latents / scaling_factor
    if latents_mean is not None:
        return latents + _per_channel(latents_mean, latents)
    return latents if shift_factor is None else latents + shift_factor


def _per_channel(values: Sequence[float] | torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values, dtype=latents.dtype, device=latents.device).view(-1, 1, 1)


def describe_normalization(vae: Autoencoder) -> str:
    """How the latents `x` of an autoencoder are normalised, for the reader of a model card. Needs no weights."""
    config, is_flux2 = vae.config, isinstance(vae, AutoencoderKLFlux2)
    scaling, shift = config.get("scaling_factor"), config.get("shift_factor")
    text = f"(x - {shift:g})" if shift else "x"
    if is_flux2 or config.get("latents_mean") is not None:
        text = "(x - mean)"
    if scaling not in (None, 1):
        text += f" * {scaling:g}"
    if is_flux2 or config.get("latents_std") is not None:
        text += " / std"
    if is_flux2:
        return f"`{text}`, with the running statistics of its batch norm over patches of 2 × 2 latents"
    return f"`{text}`{', per channel' if 'mean' in text or 'std' in text else ''}"


# --- Encoding and decoding


def encode_moments(vae: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """
    Mean and standard deviation of the latents of images in [-1, 1], `[B, 2 C, S, S]`, not normalised. Where an
    autoencoder has no posterior the deviation is 0. Never under autocast: in bfloat16 latents are off by 1 to 2 % of
    their deviation.
    """
    has_frames, patch_size = _takes_frames(vae), _patch_size(vae)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        posterior = vae.encode(images.unsqueeze(2) if has_frames else images, return_dict=False)[0]
    if isinstance(posterior, torch.Tensor):
        moments = [posterior, torch.zeros_like(posterior)]
    else:
        moments = [posterior.mean, posterior.std]
    if has_frames:
        moments = [value.squeeze(2) for value in moments]
    if patch_size > 1:
        moments = [F.pixel_unshuffle(value, patch_size) for value in moments]
    return torch.cat(moments, dim=1)


def decode_latents(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """
    Images in [-1, 1], `[B, 3, H, W]`, of normalised latents `[B, C, S, S]`.

    Both are float32, and never under autocast. An autoencoder in half precision decodes in float32 if its config has
    `force_upcast`, as AutoencoderKL's has by default: in bfloat16 images come out off by 0.1 grey levels, which the
    FID notices.
    """
    has_frames, patch_size = _takes_frames(vae), _patch_size(vae)
    latents = denormalize_latents(latents.float(), **get_normalization(vae))
    if patch_size > 1:
        latents = F.pixel_shuffle(latents, patch_size)
    if has_frames:
        latents = latents.unsqueeze(2)
    upcast = autoencoder_in_float32(vae) if vae.config.get("force_upcast") else nullcontext()
    with torch.autocast(latents.device.type, enabled=False), upcast:
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
    return images.squeeze(2) if has_frames else images


@contextmanager
def autoencoder_in_float32(vae: Autoencoder | None) -> Iterator[None]:
    """
    Has an autoencoder in half precision compute in float32 for a while. It keeps its dtype where something else casts
    or moves the weights while they are used: layerwise casting, quantization, offload of groups.
    """
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    dtype = vae.dtype if vae is not None else torch.float32
    if (
        vae is None
        or dtype.itemsize >= 4
        or any(parameter.dtype != dtype for parameter in vae.parameters())
        or _is_group_offload_enabled(vae)
    ):
        yield
        return
    vae.float()
    try:
        yield
    finally:
        torch.nn.Module.to(vae, dtype)  # that of diffusers would log a warning, every time


def encoder_options(vae: Autoencoder) -> Mapping[str, Any]:
    """What decides the latents beside the weights of the encoder and the normalisation, as JSON."""
    config = vae.config
    if isinstance(vae, AutoencoderKL):
        return {name: config[name] for name in _ENCODER_OPTIONS}
    names = [name for name in config if name[0] != "_" and not any(part in name for part in _NOT_OF_ENCODER)]
    normalization = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    return {
        "class": type(vae).__name__,
        **{name: config[name] for name in sorted(names) if name not in normalization},
    }
