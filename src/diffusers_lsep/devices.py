# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What devices lack."""

import torch


def exact_dtype(device: torch.device | str) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if torch.device(device).type in ("mps", "npu") else torch.float64
