# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from diffusers.utils import apply_lora_scale

from .auto_map import AutoMapMixin
from .caches import SiTCacheMixin
from .registration import register_with_hooks
from .single_file import SiTSingleFileMixin
from .transformer_checks import check_condition, check_config, check_depths, check_states


@dataclass
class SiTTransformer2DModelOutput(Transformer2DModelOutput):
    """
    Output of a [`SiTTransformer2DModel`] with `internal_guidance_depth`.

    Args:
        sample (`torch.Tensor` of shape `[B, C, S, S]`): The velocity.
        internal_sample (`torch.Tensor` of shape `[B, C, S, S]`): That of the output layer inside of the network.
    """

    internal_sample: torch.Tensor = None  # type: ignore[assignment]


class SiTPatchEmbed(PatchEmbed):
    """
    diffusers' patch embedding, with tokens in the dtype of the latents under autocast too: they are what every block
    adds to, so what is rounded off them is lost for all later ones.
    """

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        tokens = self.proj(latent).flatten(2).transpose(1, 2)
        return (tokens + self.pos_embed).to(latent.dtype)


class SiTAttnProcessor:
    """Self-attention of a [`SiTTransformerBlock`] through the attention backend that is active in diffusers."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "SiTAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(attn, hidden_states)

        # A fixed head size and `-1` for the heads: under tensor parallelism a rank holds only some of them.
        query = query.unflatten(-1, (-1, attn.head_dim))
        key = key.unflatten(-1, (-1, attn.head_dim))
        value = value.unflatten(-1, (-1, attn.head_dim))

        if attn.norm_q is not None and attn.norm_k is not None:
            # The norms come out in float32 under autocast; attention kernels want one dtype.
            query = attn.norm_q(query).to(value.dtype)
            key = attn.norm_k(key).to(value.dtype)

        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[0](hidden_states.flatten(2, 3))

    def project(self, attn: "SiTAttention", hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values."""
        if attn.fused_projections:
            return attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


class SiTAttention(nn.Module, AttentionModuleMixin):
    """
    Multi-head self-attention with bias on every projection.

    Args:
        query_dim (`int`): Width of the tokens.
        heads (`int`): Number of heads.
        dim_head (`int`): Width of a head.
        qk_norm (`bool`, defaults to `False`): Whether queries and keys pass a LayerNorm (affine, eps 1e-5) per head.
        processor (`SiTAttnProcessor`, *optional*): What computes the attention.
    """

    _default_processor_cls = SiTAttnProcessor
    _available_processors = [SiTAttnProcessor]

    # Of the mixin. A type checker would take them for submodules.
    fused_projections: bool
    processor: SiTAttnProcessor
    set_processor: Callable[[SiTAttnProcessor], None]
    to_qkv: nn.Linear

    def __init__(
        self,
        query_dim: int,
        heads: int,
        dim_head: int,
        qk_norm: bool = False,
        processor: SiTAttnProcessor | None = None,
    ):
        super().__init__()
        self.heads = heads
        self.head_dim = dim_head
        self.use_bias = True
        self.is_cross_attention = False

        inner_dim = heads * dim_head
        self.to_q = nn.Linear(query_dim, inner_dim)
        self.to_k = nn.Linear(query_dim, inner_dim)
        self.to_v = nn.Linear(query_dim, inner_dim)
        self.norm_q = nn.LayerNorm(dim_head, eps=1e-5) if qk_norm else None
        self.norm_k = nn.LayerNorm(dim_head, eps=1e-5) if qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, query_dim)])

        self.set_processor(processor if processor is not None else self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class SiTTransformerBlock(nn.Module):
    """
    A transformer block with adaLN-Zero conditioning (arXiv 2212.09748, section 3.2).

    Args:
        dim (`int`): Width of the tokens and of the condition.
        num_attention_heads (`int`): Number of attention heads.
        attention_head_dim (`int`): Width of a head.
        mlp_ratio (`float`, defaults to `4.0`): Hidden width of the MLP over the width of the tokens.
        qk_norm (`bool`, defaults to `False`): Whether queries and keys are normalised.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.attn = SiTAttention(dim, num_attention_heads, attention_head_dim, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu-approximate")

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        # 1. Self-attention. norm1 also gives the modulation of the MLP.
        norm_hidden_states, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)
        hidden_states = hidden_states + gate_msa.unsqueeze(1) * self.attn(norm_hidden_states)

        # 2. MLP
        norm_hidden_states = self.norm2(hidden_states) * (1 + scale_mlp.unsqueeze(1)) + shift_mlp.unsqueeze(1)
        return hidden_states + gate_mlp.unsqueeze(1) * self.ff(norm_hidden_states)


# Where the hooks of diffusers get into a block. Here, as this file also stands alone in a repository with code.
register_with_hooks(SiTTransformerBlock, SiTAttnProcessor)


class SiTTransformer2DModel(
    AutoMapMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, SiTCacheMixin, SiTSingleFileMixin
):
    r"""
    The Scalable Interpolant Transformer (SiT, arXiv 2401.08740): a class-conditional DiT that predicts the velocity of
    a flow from data (`t = 0`) to noise (`t = 1`).

    Args:
        sample_size (`int`, defaults to `32`):
            Height and width of the latents (or of the images, for a model on pixels). The table of position
            embeddings follows it and is not saved, so `from_pretrained(..., sample_size=64)` makes a 512 px model of a
            256 px one.
        patch_size (`int`, defaults to `2`): Height and width of a patch, which is one token.
        in_channels (`int`, defaults to `4`): Channels of the input.
        out_channels (`int`, *optional*): Channels of the output; `in_channels` if not given.
        num_layers (`int`, defaults to `28`): Number of transformer blocks.
        num_attention_heads (`int`, defaults to `16`): Number of attention heads.
        attention_head_dim (`int`, defaults to `72`):
            Width of a head. `num_attention_heads * attention_head_dim` is the width of the tokens and has to be
            divisible by 4.
        mlp_ratio (`float`, defaults to `4.0`): Hidden width of the MLPs over the width of the tokens.
        num_classes (`int`, defaults to `1000`): Number of classes. Index `num_classes` is the null class.
        qk_norm (`bool`, defaults to `False`): Whether queries and keys pass a LayerNorm.
        internal_guidance_depth (`int`, *optional*):
            After how many blocks, `1..num_layers`, a second output layer stands, whose weaker prediction can guide
            the model (Internal Guidance, arXiv 2512.24176). There is none if not given.
        flow_map_depth (`int`, *optional*):
            After how many blocks, `1..num_layers - 1`, `r_timestep` takes the place of `timestep`, so that the model
            predicts the mean velocity between the two times (Decoupled MeanFlow, arXiv 2510.24474). It adds no
            weights: `from_pretrained(..., flow_map_depth=18)` makes a flow map, to be trained, of any model.

    Raises:
        `ValueError`: if a size is below 1 or beyond what any machine holds, or a depth outside of these ranges, if
        there are both depths, if `sample_size` is not divisible by `patch_size`, or if the width is not divisible by
        4.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SiTTransformerBlock", "SiTPatchEmbed"]
    _repeated_blocks = ["SiTTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "time_embedding", "class_embedding", "norm"]
    _cp_plan = {
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    _tp_plan = {
        "transformer_blocks.*.attn.to_q": "colwise",
        "transformer_blocks.*.attn.to_k": "colwise",
        "transformer_blocks.*.attn.to_v": "colwise",
        "transformer_blocks.*.attn.to_out.0": "rowwise",
        "transformer_blocks.*.ff.net.0.proj": "colwise",
        "transformer_blocks.*.ff.net.2": "rowwise",
    }

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        qk_norm: bool = False,
        internal_guidance_depth: int | None = None,
        flow_map_depth: int | None = None,
    ):
        super().__init__()
        check_config(self)
        config = self.config  # in Python's numbers, whatever was given
        self.out_channels = config.out_channels or config.in_channels
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        self.inner_dim = heads * head_dim

        # 1. Input: patches, time, class
        side, patch_size = config.sample_size, config.patch_size
        self.pos_embed = SiTPatchEmbed(side, side, patch_size, config.in_channels, embed_dim=self.inner_dim)
        self.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(in_channels=256, time_embed_dim=self.inner_dim)
        self.class_embedding = nn.Embedding(config.num_classes + 1, self.inner_dim)

        # 2. Transformer blocks
        self.transformer_blocks = nn.ModuleList(
            [
                SiTTransformerBlock(self.inner_dim, heads, head_dim, config.mlp_ratio, config.qk_norm)
                for _ in range(config.num_layers)
            ]
        )

        # 3. Output
        self.norm_out = AdaLayerNormContinuous(self.inner_dim, self.inner_dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(self.inner_dim, patch_size * patch_size * self.out_channels)

        self.gradient_checkpointing = False
        self.initialize_weights()

        # 4. Output inside of the network: a copy, which is zero too and draws nothing
        if internal_guidance_depth is not None:
            self.internal_norm_out, self.internal_proj_out = deepcopy(self.norm_out), deepcopy(self.proj_out)
            self._cp_plan = {**self._cp_plan, "internal_proj_out": self._cp_plan["proj_out"]}

    def initialize_weights(self):
        """
        Draws the weights as SiT does: Xavier-uniform projections, N(0, 0.02) for the embeddings of time and class,
        zero for all modulations and for the output layer, so that every block starts as the identity.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        nn.init.normal_(self.time_embedding.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear_2.weight, std=0.02)
        nn.init.normal_(self.class_embedding.weight, std=0.02)

        for block in self.transformer_blocks:
            for projection in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
                # The three are rows of one Xavier-uniform matrix [3 D, D] in the original: bound sqrt(6 / (3 D + D)),
                # which is the Xavier bound sqrt(6 / 2 D) of a single [D, D] matrix times sqrt(1 / 2).
                nn.init.xavier_uniform_(projection.weight, gain=0.5**0.5)
            nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(self.norm_out.linear.weight)
        nn.init.zeros_(self.proj_out.weight)

    def embed_patches(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Turns latents `[B, C, S, S]` into tokens `[B, N, D]` with their position embedding, `N = (S / patch_size)^2`.

        Raises:
            `ValueError`: if the shape is not the one that the model was built for.
        """
        check_states(hidden_states, self.config)
        return self.pos_embed(hidden_states)

    def embed_condition(
        self,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor,
        dtype: torch.dtype,
        argument: str = "timestep",
    ) -> torch.Tensor:
        """
        Embeds time and class.

        Args:
            timestep (`torch.Tensor` of shape `[B]` or `float`): `t` in [0, 1]; its sinusoids are computed in float32.
            class_labels (`torch.Tensor` of shape `[B]`): Class indices in `0..num_classes`.
            dtype (`torch.dtype`): The dtype to compute in.
            argument (`str`, defaults to `"timestep"`): What messages call `timestep`.

        Returns:
            `torch.Tensor` of shape `[B, D]`.

        Raises:
            `ValueError`: if `timestep` or `class_labels` is none of these. Numbers are looked at on the CPU only.
        """
        check_condition(timestep, class_labels, self.config.num_classes, argument)
        if not torch.is_tensor(timestep):
            timestep = torch.tensor(timestep, dtype=torch.float32)
        timestep = timestep.to(class_labels.device).expand(class_labels.shape[0])
        temb = self.time_embedding(self.time_proj(timestep).to(dtype)).to(dtype)
        return temb + self.class_embedding(class_labels.long()).to(dtype)

    def _embed(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor | float, class_labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[B, N, D]` and their condition `[B, D]`."""
        check_states(hidden_states, self.config, class_labels)
        temb = self.embed_condition(timestep, class_labels, dtype=hidden_states.dtype)
        return self.embed_patches(hidden_states), temb

    def apply_blocks(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        start: int = 0,
        end: int | None = None,
        r_temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Runs the transformer blocks `start..end - 1` (to the last one if `end` is not given) on tokens `[B, N, D]` with
        the condition `[B, D]` of `embed_condition`; if there is one of the second time, `r_temb`, those from
        `flow_map_depth` on with it.

        Raises:
            `ValueError`: if a cache or context parallelism is enabled, with which only `forward` works: blocks would
            be left out, or see a part of the tokens.
        """
        if self.is_cache_enabled:
            raise ValueError(
                "`apply_blocks`, for training and probing, has to run every block, but"
                f" {type(self._cache_config).__name__} leaves some out. Call `disable_cache()` first."
            )
        if self._parallel_config is not None and self._parallel_config.context_parallel_config is not None:
            raise ValueError(
                "`apply_blocks`, for training and probing, has to see all tokens, but with context parallelism every"
                " process has a part of them."
            )
        return self._run_blocks(hidden_states, temb, start, end, r_temb)

    def _run_blocks(self, hidden_states: torch.Tensor, temb: torch.Tensor, start=0, end=None, r_temb=None):
        for index, block in enumerate(self.transformer_blocks[start:end], start):
            if r_temb is not None and index >= self.config.flow_map_depth:
                temb = r_temb
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, temb)
            else:
                hidden_states = block(hidden_states, temb)
        return hidden_states

    def project_out(self, hidden_states: torch.Tensor, temb: torch.Tensor, internal: bool = False) -> torch.Tensor:
        """
        Turns the tokens `[B, N, D]` after the last block into the velocity `[B, C, S, S]`; with `internal`, those
        after `internal_guidance_depth` blocks.
        """
        if internal:
            hidden_states = self.internal_proj_out(self.internal_norm_out(hidden_states, temb))
        else:
            hidden_states = self.proj_out(self.norm_out(hidden_states, temb))
        patch_size = self.config.patch_size
        grid_size = self.config.sample_size // patch_size
        hidden_states = hidden_states.unflatten(1, (grid_size, grid_size))
        hidden_states = hidden_states.unflatten(-1, (patch_size, patch_size, self.out_channels))
        return hidden_states.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        r_timestep: torch.Tensor | float | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor, ...]:
        """
        Predicts the velocity `d x_t / d t`; a flow map, with an `r_timestep`, the mean one `(x_t - x_r) / (t - r)`.

        Args:
            hidden_states (`torch.Tensor` of shape `[B, C, S, S]`): The noisy latents `x_t`.
            timestep (`torch.Tensor` of shape `[B]`, or scalar):
                `t` in [0, 1], where 1 is noise: the schedulers' `timesteps` divided by their `num_train_timesteps`.
                Keep it in float32 whatever the dtype of the model.
            class_labels (`torch.Tensor` of shape `[B]`):
                Class indices in `0..num_classes`; `num_classes` stands for no class.
            attention_kwargs (`dict`, *optional*): `scale` scales the LoRA layers, if there are any.
            return_dict (`bool`, defaults to `True`): Whether to return an output class in place of a tuple.
            r_timestep (`torch.Tensor` of shape `[B]`, or scalar, *optional*):
                With `flow_map_depth`, the time `r` in [0, t] to go to. `timestep` if not given.

        Returns:
            [`~models.modeling_outputs.Transformer2DModelOutput`] or `tuple`: the velocity `[B, C, S, S]`; and, of a
            model with `internal_guidance_depth`, what is predicted there ([`SiTTransformer2DModelOutput`]).

        Raises:
            `ValueError`: if `hidden_states` is not of the shape that the model was built for, or if there is an
            `r_timestep` without `flow_map_depth`.
        """
        # 1. Input
        hidden_states, temb = self._embed(hidden_states, timestep, class_labels)
        r_temb = None
        if r_timestep is not None:
            if self.config.flow_map_depth is None:
                raise ValueError("`r_timestep` has to be None for a model without `flow_map_depth`, but is given.")
            r_temb = self.embed_condition(r_timestep, class_labels, dtype=hidden_states.dtype, argument="r_timestep")

        depth = self.config.internal_guidance_depth
        with self.default_cache_context():
            # 2. Blocks
            if depth is not None:
                hidden_states = self._run_blocks(hidden_states, temb, end=depth)
                internal_sample = self.project_out(hidden_states, temb, internal=True)
            hidden_states = self._run_blocks(hidden_states, temb, start=depth or 0, r_temb=r_temb)

            # 3. Output
            sample = self.project_out(hidden_states, temb if r_temb is None else r_temb)

        if depth is not None:
            output = SiTTransformer2DModelOutput(sample=sample, internal_sample=internal_sample)
            return output if return_dict else output.to_tuple()
        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)

    def hidden_states_at(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor,
        num_layers: int | list[int],
    ) -> torch.Tensor | list[torch.Tensor]:
        """
        Returns the tokens after some of the blocks, for probing; no block beyond the deepest one asked for is run.

        Args:
            hidden_states (`torch.Tensor` of shape `[B, C, S, S]`): The noisy latents `x_t`.
            timestep (`torch.Tensor` of shape `[B]`, or scalar): `t` in [0, 1].
            class_labels (`torch.Tensor` of shape `[B]`): Class indices in `0..num_classes`.
            num_layers (`int` or `list[int]`):
                After how many blocks, `0..num_layers` of the config (0: the embedded patches).

        Returns:
            `torch.Tensor` of shape `[B, N, D]`, or a list of such in the order of `num_layers`.

        Raises:
            `ValueError`: if a depth is outside the model.
        """
        is_list = isinstance(num_layers, (list, tuple, range))
        given: Any = num_layers if is_list else [num_layers]
        depths = check_depths(given, self.config.num_layers)

        hidden_states, temb = self._embed(hidden_states, timestep, class_labels)
        tokens, start = {}, 0
        for depth in sorted(set(depths)):
            hidden_states = self.apply_blocks(hidden_states, temb, start, depth)
            tokens[depth], start = hidden_states, depth
        return [tokens[depth] for depth in depths] if is_list else tokens[depths[0]]
