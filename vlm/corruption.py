"""Pictures that say less: POVID's diffusion noise and mDPO's crops. Pure functions of a picture and a generator.

POVID's schedule (YiyangZhou/POVID, llava/train/train_dpo_inherent.py; VCD's before it), 1000 steps counted from 0:

    beta_k = sigmoid(s_k) (0.005 - 0.00001) + 0.00001,    s evenly from -6 to 6
    abar_t = product of (1 - beta_k) for k <= t
    x_t    = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise,   x_0 in [0, 1], every channel of every pixel
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

STEPS = 1000


@functools.cache
def signal_levels() -> Float[Tensor, " steps"]:
    """abar of every step, float64."""
    ramp = torch.linspace(-6, 6, STEPS, dtype=torch.float64)
    betas = torch.sigmoid(ramp) * (0.5e-2 - 1e-5) + 1e-5
    return torch.cumprod(1 - betas, dim=0)


def noised(
    image: Image.Image, step: int, generator: torch.Generator, *, overflow: Literal["clamp", "wrap"] = "clamp"
) -> Image.Image:
    """x_step of a picture, in its own size.

    Args:
        step: 0 to 999.
        overflow: what becomes of values beyond black and white: clamp them, or wrap as bytes do. The authors'
            conversion wraps, so that 1.02 is nearly black: far harsher than the noise.
    """
    if not 0 <= step < STEPS:
        raise ValueError(f"expected a step from 0 to {STEPS - 1}, got {step}")
    clean = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255  # channels first, as theirs
    level = float(signal_levels()[step])
    values = math.sqrt(level) * clean + math.sqrt(1 - level) * torch.randn(clean.shape, generator=generator)
    # wrapped: what a cast to a byte keeps
    values = (values.clamp(0, 1) * 255).round() if overflow == "clamp" else torch.trunc(values * 255) % 256
    return Image.fromarray(values.to(torch.uint8).permute(1, 2, 0).numpy())


def crop(image: Image.Image, generator: torch.Generator, area: tuple[float, float]) -> Image.Image:
    """A random part of a picture, enlarged to its size.

    Args:
        area: share of the picture's area that is kept, from and to; the sides' ratio is drawn from 3:4 to 4:3 of the
            picture's own, evenly in its logarithm.
    """
    share, ratio, right, down = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    kept = area[0] + share * (area[1] - area[0])
    stretch = math.exp((2 * ratio - 1) * math.log(4 / 3))
    width = min(image.width, max(1, round(image.width * math.sqrt(kept * stretch))))
    height = min(image.height, max(1, round(image.height * math.sqrt(kept / stretch))))
    left, top = int(right * (image.width - width + 1)), int(down * (image.height - height + 1))
    return image.crop((left, top, left + width, top + height)).resize(image.size, Image.Resampling.BICUBIC)


def blank(image: Image.Image) -> Image.Image:
    """The same size, all grey: nothing to see."""
    return Image.new("RGB", image.size, (128, 128, 128))
