# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Flags of `examples/train_lsep.py` for a tiny model, and for a run of four steps."""

TINY_MODEL = [
    *("--patch_size", "2", "--num_layers", "2", "--num_attention_heads", "2", "--attention_head_dim", "4"),
    *("--probe_depth", "1"),
]
TINY_RUN = [
    *("--train_batch_size", "4", "--max_train_steps", "4", "--checkpointing_steps", "2", "--logging_steps", "1"),
    *("--validation_steps", "100", "--validation_inference_steps", "2", "--num_validation_images", "1"),
    *("--num_cpu_threads", "1", "--report_to", "none"),
]
