# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def make_labeled_grid(
    images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None, min_size: int = 64
) -> Image.Image:
    """
    Puts images into one, row by row, as people look at them: small images enlarged without smoothing, and with a
    caption under each.

    Args:
        images (`Sequence[PIL.Image.Image]`): Images of one size.
        columns (`int`): Number of images in a row.
        labels (`Sequence[str]`, *optional*): A caption for each image; cut where it is wider than the image.
        min_size (`int`, defaults to `64`):
            Images whose shorter side is below are enlarged by the smallest whole factor that reaches it.

    Returns:
        `PIL.Image.Image`: The grid, on white.

    Raises:
        `ValueError`: if there is no image, if `columns` is below 1, or if the number of captions is another one.
    """
    if not images:
        raise ValueError("`images` has to hold at least one image, but is empty.")
    if columns < 1:
        raise ValueError(f"`columns` has to be at least 1, but is {columns}.")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"`labels` has to hold {len(images)} captions, one for each image, but holds {len(labels)}.")

    factor = max(1, -(-min_size // min(images[0].size)))
    width, height = (side * factor for side in images[0].size)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    gap = max(2, width // 32)
    font_size = max(10, width // 9)
    caption_height = round(1.4 * font_size) if labels is not None else 0
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    white = 255 if mode == "L" else (255, 255, 255)
    size = (columns * (width + gap) + gap, rows * (height + caption_height + gap) + gap)
    grid = Image.new(mode, size, white)
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(font_size)

    for i, image in enumerate(images):
        left = gap + (i % columns) * (width + gap)
        top = gap + (i // columns) * (height + caption_height + gap)
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if labels is not None:
            caption = labels[i]
            while caption and draw.textlength(caption, font) > width:
                caption = caption[:-1]
            draw.text((left + width / 2, top + height + 1), caption, fill=0, font=font, anchor="ma")
    return grid
