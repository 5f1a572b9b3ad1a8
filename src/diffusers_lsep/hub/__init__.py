# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Saved pipelines on the Hugging Face Hub: uploads, model cards, and code that travels with them."""
