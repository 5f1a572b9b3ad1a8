# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""All surfaces by name: what generates calls of each."""

from fuzz import data_files, models, pipelines, repositories, schedulers, weight_files


MODULES = (schedulers, models, pipelines, data_files, weight_files, repositories)
SURFACES = {name: cases for module in MODULES for name, cases in module.SURFACES.items()}
