# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The sizes of the papers."""

# Widths, depths and heads of DiT (arXiv 2212.09748, table 1), which SiT, REPA and LSEP keep.
_SIZES = {
    "S": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
}

SIT_PRESETS: dict[str, dict[str, int]] = {
    f"SiT-{size}/{patch_size}": {"patch_size": patch_size, **arguments}
    for size, arguments in _SIZES.items()
    for patch_size in (2, 4, 8)
}
"""Constructor arguments of [`SiTTransformer2DModel`] by the name the papers use, such as `"SiT-XL/2"`."""
