"""From a picture of any size to the pixels that the VAE encodes: which size, which crop, mirrored or not.

Both sides of a pair get the same target size, the same relative crop and the same flip, so that they differ in
what was preferred and in nothing else.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from diffusion.settings import LatentSettings
from mmalign.errors import UserError
from mmalign.media import FORMATS, Media
from mmalign.randomness import Draws, key_seed

VERSION = 1  # part of every cache key: raise it when the same settings would give other pixels

Size = tuple[int, int]
"""(width, height) in pixels."""

_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_ORIENTATION = 274


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One way to look at a picture.

    Args:
        x, y: where the crop lies in what is left over, 0 to 1; 0.5 is the centre.
        mirrored: left and right exchanged before the crop.
    """

    x: float = 0.5
    y: float = 0.5
    mirrored: bool = False


def views_of(settings: LatentSettings, item: str) -> list[View]:
    """The views of a pair: the plain one first, the others drawn once from (seed, item, view)."""
    views = [View()]
    for number in range(1, settings.views):
        if settings.crop == "center":
            views.append(View(mirrored=True))
            continue
        draws = Draws([key_seed("view", settings.seed, item, number)])
        x, y, coin = (float(draws.uniform()) for _ in range(3))
        views.append(View(x=x, y=y, mirrored=settings.flip and coin < 0.5))
    return views


def fit(image: Image.Image, size: Size, view: View) -> tuple[Image.Image, tuple[int, int]]:
    """Resize (bilinear with antialiasing) until `size` is just covered, mirror, crop.

    Returns:
        The picture of exactly `size`, and (top, left) of the crop in the resized picture: SDXL's conditioning.
    """
    width, height = size
    scale = max(width / image.width, height / image.height)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.BILINEAR)
    if view.mirrored:
        image = ImageOps.mirror(image)
    left, top = round(view.x * (covering[0] - width)), round(view.y * (covering[1] - height))
    return image.crop((left, top, left + width, top + height)), (top, left)


def to_pixels(images: Sequence[Image.Image]) -> Float[Tensor, "batch 3 height width"]:
    """RGB pictures of one size as numbers in [-1, 1]."""
    array = np.stack([np.asarray(image, dtype=np.uint8) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def size_of(media: Media) -> Size:
    """(width, height) as displayed, from the header alone.

    Raises:
        UserError: it is not a picture; see `Media.open`.
    """
    try:
        with Image.open(io.BytesIO(media.read()), formats=FORMATS) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _TURNED
    except UserError:
        raise
    except Exception:  # damaged headers raise nearly anything; opening says which picture and what is wrong
        return media.open().size
    return (height, width) if turned else (width, height)


def bucket_sizes(settings: LatentSettings, resolution: int, multiple: int) -> list[Size]:
    """The sizes that pictures are brought to.

    `auto` gives sides from half to twice the resolution in steps of about a sixteenth of it, with areas of at most
    its square: no bucket needs more memory than the square one.

    Args:
        multiple: sides must be multiples of it.

    Raises:
        UserError: a size of the recipe that is not.
    """
    if settings.buckets == "square":
        return [(resolution, resolution)]
    if settings.buckets == "auto":
        step = max(multiple, math.ceil(resolution / 16 / multiple) * multiple)
        half = math.ceil(resolution / 2 / step) * step
        upright = [(short, resolution**2 // short // step * step) for short in range(half, resolution, step)]
        return sorted({(resolution, resolution), *upright, *((long, short) for short, long in upright)})
    for width, height in settings.buckets:
        if width % multiple or height % multiple:
            raise UserError(
                f"the bucket {width} x {height} has a side that is not a multiple of {multiple}",
                place="data.buckets",
                fix=f"The model needs multiples of {multiple}",
            )
    if not settings.buckets:
        raise UserError("no buckets", place="data.buckets", fix="Give sizes, or square, or auto")
    return sorted(set(settings.buckets))


def nearest_bucket(sizes: Sequence[Size], buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is closest to the pictures' (their geometric mean); the larger one of two."""
    aspect = sum(math.log(width / height) for width, height in sizes) / len(sizes)
    return min(buckets, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), -size[0] * size[1]))
