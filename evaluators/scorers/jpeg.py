"""How large a picture is as a JPEG: a reward that anybody can check, and that needs no model.

    kilobytes        bytes at quality 95 / 1000; grows with the number of pixels
    bits_per_pixel   for pictures of different sizes

DDPO's compressibility is -kilobytes: a weight of -1. The bytes depend on the JPEG library, so its version is part
of the identity.

Source: Black et al. 2305.13301.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import PIL
from PIL import Image, features

from evaluators.scorer import Card
from mmalign.errors import UserError, nearest

QUALITY = 95
NUMBERS = ("kilobytes", "bits_per_pixel")
CARD = Card(unit="kilobytes at quality 95, 5 to 308 for 512 x 512", licence="Apache-2.0")


class JpegSize:
    """See the module's docstring; what the prompts say changes nothing."""

    numbers = NUMBERS

    def __init__(self, main: str) -> None:
        if main not in NUMBERS:
            raise UserError(f"jpeg has no number '{main}'", fix=nearest(main, NUMBERS))
        library = f"{PIL.__version__} {features.version('jpg')} {features.check('libjpeg_turbo')}"
        self.main, self.identity = main, f"jpeg@1#{hashlib.sha256(library.encode()).hexdigest()[:8]}"

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """See `Scorer`."""
        return [self._one(image) for _, image in zip(prompts, images, strict=True)]

    def _one(self, image: Image.Image) -> dict[str, float]:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=QUALITY)
        size = buffer.tell()
        return {"kilobytes": size / 1000, "bits_per_pixel": 8 * size / (image.width * image.height)}


def build(main: str = "kilobytes") -> JpegSize:
    """The size; `main` says in which unit."""
    return JpegSize(main)
