# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs the code of a document as a reader would: block after block, in one folder."""

import re
import subprocess
from pathlib import Path

from warm_python import warm_environment


ROOT = Path(__file__).parents[1]


def read_blocks(name: str) -> list[tuple[str, str]]:
    """Language and code of the blocks in a document of the repository, bash and Python."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(r"^```(bash|python)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def run_blocks(
    blocks: list[tuple[str, str]], folder: Path, environment: dict[str, str], substitutions: dict[str, str]
) -> None:
    """
    Runs the blocks one after the other.

    Args:
        blocks (`list[tuple[str, str]]`): Of [`read_blocks`].
        folder (`Path`): Where they run.
        environment (`dict[str, str]`): Their environment variables.
        substitutions (`dict[str, str]`): What is replaced in them before: things that are not here, and sizes.
    """
    used = set()
    with warm_environment(folder / "bin", environment, ("accelerate", "diffusers-lsep")) as environment:
        for language, block in blocks:
            for old, new in substitutions.items():
                if old in block:
                    used.add(old)
                    block = block.replace(old, new)
            interpreter = [folder / "bin" / "python", "-c"] if language == "python" else ["bash", "-euc"]
            result = subprocess.run(
                [*interpreter, block],
                cwd=folder,
                env=environment,
                timeout=300,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            assert result.returncode == 0, f"{block}\n{result.stdout[-5000:]}"
    assert used == substitutions.keys(), "a substitution that nothing needs"
