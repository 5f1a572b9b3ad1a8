# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The images that a model card shows."""

from dataclasses import dataclass

from ..labels import as_markdown


@dataclass
class Gallery:
    """
    Images in a model card and how they were made.

    Args:
        image (`str`): File of the grid, relative to the pipeline's folder.
        class_labels (`list[int]` or `list[str]`): Classes of the images, row by row.
        seeds (`list[int]`): Seeds of their generators, one per image.
    """

    image: str
    class_labels: list[int] | list[str]
    seeds: list[int]

    def describe_classes(self) -> str:
        """The classes, those of the first row alone where all rows have them."""
        names = [as_markdown(str(name)) for name in self.class_labels]
        period = next((n for n in range(1, len(names)) if names[n:] == names[:-n] and len(names) % n == 0), len(names))
        times = len(names) // period
        return ", ".join(names[:period]) + (f"; {times} times" if times > 1 else "")

    def describe_seeds(self) -> str:
        """The seeds, the first and the last alone where they follow each other."""
        first, last = self.seeds[0], self.seeds[-1]
        if len(self.seeds) > 2 and self.seeds == list(range(first, last + 1)):
            return f"{first} to {last}"
        return ", ".join(map(str, self.seeds))
