"""A user's own reward for the tests: how red a picture is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


def red(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
    """Mean of the red channel, in [0, 1]."""
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]
