# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""A training step against that of the authors' code, where a reader has a clone of it (and `timm`, which it imports).

python benchmarks/run.py original_repo --original_repo path/to/LSEP
"""

import importlib
import sys
from pathlib import Path

import torch
from pairs import paired_ratio
from training_step import SHAPE, make_draws, make_pair, separate_rows


def run(original_repo: Path, pairs: int = 7, batch_size: int = 16) -> list[dict]:
    torch.set_num_threads(2)
    sys.path.insert(0, str(original_repo))
    try:
        model_class = importlib.import_module("models.sit_LSEP").SiT
        loss_class = importlib.import_module("loss").LSEP_Loss
    finally:
        sys.path.remove(str(original_repo))

    torch.manual_seed(0)
    original = model_class(
        path_type="linear",
        input_size=SHAPE["size"],
        hidden_size=SHAPE["width"],
        decoder_hidden_size=SHAPE["width"],
        depth=SHAPE["layers"],
        num_heads=SHAPE["heads"],
        encoder_depth=4,
        use_cfg=True,
        random_crop_kwargs=[True, 12, 17],
        qk_norm=False,
        fused_attn=True,
    ).train()
    original_loss = loss_class(multi_weights=[0.0225, 0.03, 10, "steps"])
    _, objective = make_pair(probe_depth=4)
    draws = make_draws(batch_size, num_shared=round(0.18 * batch_size))
    draws["separate_rows"] = separate_rows(draws)

    def original_step():
        original.zero_grad()
        denoising, probe = original_loss(original, draws["latents"], {"y": draws["class_labels"]})
        (denoising.mean() + probe).backward()

    def step():
        objective.zero_grad()
        objective(**draws).loss.backward()

    return [
        {"name": "step: ours / authors' code, float32", "target": None, **paired_ratio(step, original_step, pairs)}
    ]
