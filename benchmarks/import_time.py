# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`import diffusers_lsep` against `from diffusers import DiffusionPipeline`, each in a new process."""

import subprocess
import sys

from pairs import paired_ratio


def run(pairs: int = 9) -> list[dict]:
    def python(code):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    result = paired_ratio(python("import diffusers_lsep"), python("from diffusers import DiffusionPipeline"), pairs)
    return [{"name": "import diffusers_lsep / diffusers", "target": 1.10, **result}]
