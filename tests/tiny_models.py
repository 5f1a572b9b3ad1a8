# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Models with random weights everywhere, as small as they can be."""

import diffusers
import torch
from diffusers import AutoencoderKL
from transformers import Dinov2Config, Dinov2Model

from diffusers_lsep import FlowMatchSDEScheduler, LSEPPipeline, SiTTransformer2DModel


def make_transformer(seed=0, **config) -> SiTTransformer2DModel:
    """All weights are drawn: a fresh model gives zero."""
    sizes = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, "num_classes": 10}
    model = SiTTransformer2DModel(**{**sizes, **config})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm_q.weight" in name or "norm_k.weight" in name else 0.0
            parameter.copy_(offset + torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def make_pipeline(scheduler=None, vae=None, id2label=None, path_type=None, seed=0, **config) -> LSEPPipeline:
    scheduler = FlowMatchSDEScheduler() if scheduler is None else scheduler
    return LSEPPipeline(make_transformer(seed, **config), scheduler, vae=vae, id2label=id2label, path_type=path_type)


def make_vae(blocks=2, **config) -> AutoencoderKL:
    """Halves the side of images `blocks - 1` times; four blocks are the shape of Stable Diffusion's."""
    torch.manual_seed(0)
    defaults = {
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "block_out_channels": (4,) * (blocks - 1) + (8,),
        "norm_num_groups": 2,
        "latent_channels": 4,
    }
    return AutoencoderKL(**{**defaults, **config}).eval()


# Every class of autoencoder that has tests: latents of four channels, half as large as the image; of Flux2 patches of
# 2 x 2 latents, eight channels and a quarter as large. As their own pipelines have them: SD3 and Flux with a shift.
_BLOCKS = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
_BLOCKS |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
_STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.5], "latents_std": [0.5, 1.5, 2.0, 0.25]}
_VIDEO = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
AUTOENCODERS = {
    "KL": ("AutoencoderKL", {**_BLOCKS, "scaling_factor": 0.5}),
    "KL-shift": ("AutoencoderKL", {**_BLOCKS, "scaling_factor": 1.5, "shift_factor": 0.06, "use_quant_conv": False}),
    "KL-statistics": ("AutoencoderKL", {**_BLOCKS, "scaling_factor": 0.5, **_STATISTICS}),
    "Tiny": (
        "AutoencoderTiny",
        {f"{part}_block_out_channels": (4, 4) for part in ("encoder", "decoder")}
        | {f"num_{part}_blocks": (1, 1) for part in ("encoder", "decoder")},
    ),
    "DC": (
        "AutoencoderDC",
        {"latent_channels": 4, "attention_head_dim": 2, "scaling_factor": 0.41}
        | {f"{part}_block_types": ("ResBlock", "EfficientViTBlock") for part in ("encoder", "decoder")}
        | {f"{part}_block_out_channels": (4, 8) for part in ("encoder", "decoder")}
        | {f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")}
        | {f"{part}_qkv_multiscales": ((), (5,)) for part in ("encoder", "decoder")},
    ),
    "Flux2": ("AutoencoderKLFlux2", {**_BLOCKS, "latent_channels": 2, "sample_size": 16}),
    "HunyuanImage": (
        "AutoencoderKLHunyuanImage",
        {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 64)}
        | {"layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 16, "scaling_factor": 0.76},
    ),
    "KVAE": (
        "AutoencoderKLKVAE",
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 1)},
    ),
    "QwenImage": ("AutoencoderKLQwenImage", {**_VIDEO, **_STATISTICS}),
    "Wan": ("AutoencoderKLWan", {**_VIDEO, **_STATISTICS, "scale_factor_spatial": 2}),
    "Asymmetric": (
        "AsymmetricAutoencoderKL",
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        | {"down_block_out_channels": (4, 8), "up_block_out_channels": (4, 8), "norm_num_groups": 2},
    ),
}


def make_autoencoder(name, **config):
    """One of `AUTOENCODERS`, with other arguments where they are given."""
    torch.manual_seed(0)
    class_name, arguments = AUTOENCODERS[name]
    vae = getattr(diffusers, class_name)(**{**arguments, **config}).eval()
    if name == "Flux2":
        vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 8))
        vae.bn.running_var.copy_(torch.linspace(0.2, 3, 8))
    return vae


def make_dinov2(**config) -> Dinov2Model:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    return Dinov2Model(Dinov2Config(**{**sizes, **config})).eval()


def make_batch(seed=0, batch_size=6) -> dict[str, torch.Tensor]:
    """What `LSEPObjective` gets for `make_transformer()`, with all draws but the windows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "class_labels": torch.randint(0, 10, (batch_size,), generator=generator),
        "noise": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "timesteps": torch.rand(batch_size, generator=generator),
        "class_dropout_mask": torch.rand(batch_size, generator=generator) < 0.5,
        "probe_dropout_mask": torch.rand(batch_size, generator=generator) < 0.5,
    }
