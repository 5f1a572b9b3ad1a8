# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Code in a fresh process: the libraries read their settings, and the Hub's address, when they are imported."""

import json
import subprocess
import sys
from pathlib import Path


def run_client(code: str, environment: dict[str, str], folder: Path) -> dict:
    """Runs code that fills a dict `REPORT`, which is returned."""
    code = f"import json\nREPORT = {{}}\n{code}\nprint('REPORT', json.dumps(REPORT))"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.rpartition("REPORT ")[2])
