# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`from diffusers_lsep import *` against `from diffusers import DiffusionPipeline`, each in a new process."""

import subprocess
import sys

from pairs import paired_ratio


def run(pairs: int = 9) -> list[dict]:
    def python(code):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    ours, baseline = "from diffusers_lsep import *", "from diffusers import DiffusionPipeline"
    result = paired_ratio(python(ours), python(baseline), pairs)
    return [{"name": f"{ours} / diffusers", "target": 1.10, **result}]
