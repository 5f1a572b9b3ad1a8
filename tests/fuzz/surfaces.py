# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""All surfaces by name: what generates calls of each."""

from fuzz import models, pipelines, schedulers


SURFACES = {**schedulers.SURFACES, **models.SURFACES, **pipelines.SURFACES}
