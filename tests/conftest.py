# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import os


# Before any Hugging Face library is imported: no test may reach out to the Hub by accident.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
