"""Sheets of pictures with captions; files of pictures that are whole or not there."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmalign.errors import UserError


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG that appears only when it is complete.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        picture.save(partial, format="PNG")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write a picture: {error.strerror}", place=str(path), fix="Free some space.") from error
    finally:
        partial.unlink(missing_ok=True)


def grid(
    images: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    cell: int = 256,
) -> Image.Image:
    """One RGB sheet of pictures, row by row, each with its caption below.

    Args:
        images: at least one, of any sizes.
        captions: as many as images.
        columns: pictures per row; by default a sheet about as wide as high, of at most 8.
        cell: the longest side of a picture on the sheet, in pixels: larger ones are reduced, small ones
            enlarged by a whole factor with hard pixels.
    """
    if not images or (captions is not None and len(captions) != len(images)):
        raise ValueError(f"{len(images)} images and {'no' if captions is None else len(captions)} captions")
    shown = [_fit(image, cell) for image in images]
    columns = min(len(shown), columns or min(8, math.ceil(math.sqrt(len(shown)))))
    width, height = max(image.width for image in shown), max(image.height for image in shown)
    font = ImageFont.load_default()
    line = 13
    text = [_wrap(caption, width) for caption in captions] if captions else [""] * len(shown)
    below = line * max(block.count("\n") + 1 for block in text) + 4 if captions else 0
    gap = 4
    rows = math.ceil(len(shown) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + below + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, block) in enumerate(zip(shown, text, strict=True)):
        x = gap + index % columns * (width + gap)
        y = gap + index // columns * (height + below + gap)
        sheet.paste(image, (x, y))
        if block:
            draw.multiline_text((x, y + height + 1), block, fill="black", font=font, spacing=2)
    return sheet


def _fit(image: Image.Image, cell: int) -> Image.Image:
    image = image.convert("RGB")
    longest = max(image.size)
    if longest > cell:
        return image.resize(
            (max(1, round(image.width * cell / longest)), max(1, round(image.height * cell / longest))),
            Image.Resampling.LANCZOS,
        )
    factor = cell // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrap(caption: str, width: int) -> str:
    """At most three lines, in characters that every build of Pillow can draw."""
    drawable = caption.encode("latin-1", errors="replace").decode("latin-1")
    lines = textwrap.wrap(drawable, max(8, width // 6), max_lines=3, placeholder="...")
    return "\n".join(lines)
