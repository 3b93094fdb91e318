"""How different pictures are from one another, and which of them are degenerate: what reward hunting costs.

    diversity      mean distance of two pictures, over the pairs within each prompt, or over all pairs
    degenerate     pictures that are flat, garish, noise, or nearly the same as one of another prompt

Distances are 1 - cosine in a feature space, CLIP's for instance, or the root mean square difference of small copies
of the pictures, which needs no model. Pictures of one prompt that resemble each other are a matter of diversity;
across prompts, near copies say that the prompt is ignored, and are counted as degenerate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mmalign.errors import UserError

Group = int | str

SMALL = 16  # pixels: side of the copies that are compared; noise and detail average out, the composition stays
# Below this deviation, in every channel and of 1, there is nothing to be seen: five of 255 levels, above what rounding
# and a VAE leave on a plain surface, far below the faintest object (a thing on 2 % of the picture that differs from
# its ground by 0.2 gives 0.028).
FLAT = 0.02
# A pixel is garish when one channel is full and another empty (within two levels). Photographs have few; paint may
# cover a third of a drawing; over more than half of the picture it is what climbing a colour reward looks like.
EXTREME, GARISH = 2, 0.5
# Correlation of neighbouring pixels: 0 for white noise, above 0.85 for photographs and the embedded world.
NOISE = 0.3
# Copies nearer than this (root mean square, of 1) are the same picture but for rounding and faint noise. In the
# embedded world another shape in the same place and on the same ground gives 0.022 or more, a picture moved by a
# pixel 0.038 or more.
SAME = 0.02


@runtime_checkable
class ImageFeatures(Protocol):
    """A scorer that also says where a picture lies in its feature space, as CLIP's does."""

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """[images, width], one row per picture."""
        ...


# --------------------------------------------------------------------------------------------------- distances


def cosine_distances(features: Float[Tensor, "images width"]) -> Float[Tensor, "images images"]:
    """1 - cosine of every two rows, in float64: 0 for the same direction, 1 for unrelated, at most 2."""
    unit = functional.normalize(features.double(), dim=-1)
    distances = (1 - unit @ unit.T).clamp_min(0)
    return distances.fill_diagonal_(0)


def pixel_distances(images: Sequence[Image.Image]) -> Float[Tensor, "images images"]:
    """Root mean square difference of every two pictures as SMALL x SMALL copies, in float64: 0 to 1."""
    flat = torch.stack([torch.from_numpy(_small(image)) for image in images]).flatten(1).double()
    # differences one by one: through a matrix product, those of near copies would be rounding
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(flat.shape[1])


def distances(images: Sequence[Image.Image], space: ImageFeatures | None = None) -> Float[Tensor, "images images"]:
    """Distance of every two pictures: in the scorer's feature space, or by pixels where there is none."""
    return pixel_distances(images) if space is None else cosine_distances(space.image_features(images))


def within(distances: Float[Tensor, "images images"], groups: Sequence[Group]) -> float:
    """Mean distance of two pictures of one prompt: of each prompt's pairs, then over prompts with two or more.

    Raises:
        UserError: no prompt has two pictures.
    """
    members: dict[Group, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    means = [across(distances[rows][:, rows]) for rows in members.values() if len(rows) > 1]
    if not means:
        raise UserError("diversity within prompts needs two pictures of a prompt", fix="Set per_prompt to 2 or more.")
    return sum(means) / len(means)


def across(distances: Float[Tensor, "images images"]) -> float:
    """Mean distance over all pairs of two different pictures.

    Raises:
        UserError: there are not two pictures.
    """
    count = len(distances)
    if count < 2:
        raise UserError("diversity needs at least two pictures", fix="Set count or per_prompt to 2 or more.")
    return float(distances.sum() / (count * (count - 1)))


def diversity(distances: Float[Tensor, "images images"], groups: Sequence[Group]) -> float:
    """`within` where any prompt has two pictures, `across` otherwise."""
    return within(distances, groups) if len(set(groups)) < len(groups) else across(distances)


# -------------------------------------------------------------------------------------------------- degenerate


@dataclass(frozen=True, kw_only=True, slots=True)
class Degenerate:
    """Shares of pictures with something wrong.

    Attributes:
        share: with any of the following.
        flat, garish, noise: see FLAT, GARISH and NOISE.
        copies: nearer than SAME to a picture of another prompt.
    """

    share: float
    flat: float
    garish: float
    noise: float
    copies: float


def degenerate(images: Sequence[Image.Image], prompts: Sequence[Group]) -> Degenerate:
    """What share of the pictures is degenerate, and how.

    Args:
        images: at least one.
        prompts: the prompt of each.
    """
    pictures = [_pixels(image) for image in images]
    flat = torch.tensor([_is_flat(picture) for picture in pictures])
    garish = torch.tensor([_is_garish(picture) for picture in pictures])
    # a plain picture with a speck of compression noise is flat, not noise
    noise = torch.tensor([_is_noise(picture) for picture in pictures]) & ~flat
    same = copies(images, prompts)
    found = (flat, garish, noise, same)
    any_of = torch.stack(found).any(0)
    shares = [kind.double().mean().item() for kind in (any_of, *found)]
    return Degenerate(share=shares[0], flat=shares[1], garish=shares[2], noise=shares[3], copies=shares[4])


def copies(images: Sequence[Image.Image], prompts: Sequence[Group]) -> Bool[Tensor, " images"]:
    """Whether a picture is nearer than SAME to one of another prompt."""
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    member = torch.tensor([number[prompt] for prompt in prompts])
    other = member[:, None] != member[None, :]
    return ((pixel_distances(images) < SAME) & other).any(1)


def _is_flat(picture: np.ndarray) -> bool:
    return bool(picture.reshape(-1, 3).std(0).max() < FLAT)


def _is_garish(picture: np.ndarray) -> bool:
    level = EXTREME / 255 + 1e-6
    return bool(((picture.max(2) >= 1 - level) & (picture.min(2) <= level)).mean() > GARISH)


def _is_noise(picture: np.ndarray) -> bool:
    """r = 1 - mean squared step to the neighbour / (2 variance), of brightness, both directions together."""
    bright = picture.mean(2)
    steps = np.concatenate([np.diff(bright, axis=0).ravel(), np.diff(bright, axis=1).ravel()])
    variance = float(bright.var())
    return steps.size > 0 and variance > 0 and 1 - float((steps**2).mean()) / (2 * variance) < NOISE


def _pixels(image: Image.Image) -> np.ndarray:
    """[height, width, 3] in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def _small(image: Image.Image) -> np.ndarray:
    return _pixels(image.convert("RGB").resize((SMALL, SMALL), Image.Resampling.BOX))
