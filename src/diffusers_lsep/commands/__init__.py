# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""One module for each command of `diffusers-lsep`, with `add_arguments(parser)` and `run(args)`."""
