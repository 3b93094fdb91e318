"""Reads a picture of the shapes world back: what is in it, and how far it shows what a caption says.

Pixels with enough chroma are assigned to the nearest of the six hues; connected regions of one hue are things; a
region's shape is the template it overlaps best. Everything is plain numpy on 32x32 pixels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

from mmalign.shapes.render import HUES, SIZE, coverage
from mmalign.shapes.scenes import COLOURS, SHAPES, Scene, Thing

MIN_CHROMA = 0.28  # max minus min channel of a pixel that belongs to a thing
MIN_AREA = 14  # pixels: smaller regions are specks
MIN_OVERLAP = 0.62  # intersection over union with the best template; below, the thing has no shape
MIN_OFFSET = 5.0  # pixels between centres for "left of" and the other relations


@dataclass(frozen=True, slots=True)
class Found:
    """One thing seen in a picture; `shape` is None when it looks like none of the shapes."""

    colour: str
    shape: str | None
    x: float
    y: float
    area: int
    overlap: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far a picture shows what a caption says; every part in [0, 1]."""

    count: float
    colour: float
    shape: float
    relation: float | None
    found: tuple[Found, ...]

    @property
    def reward(self) -> float:
        """Mean of the parts that the caption speaks of."""
        parts = [self.count, self.colour, self.shape]
        if self.relation is not None:
            parts.append(self.relation)
        return float(np.mean(parts))

    @property
    def faithful(self) -> bool:
        """Everything is right and nothing is added."""
        return self.reward == 1.0


def look(picture: UInt8[ndarray, "32 32 3"]) -> list[Found]:
    """The things in a picture, largest first."""
    rgb = picture.astype(np.float32) / 255
    chroma = rgb.max(2) - rgb.min(2)
    colour = _nearest_colour(rgb)
    found = []
    for index, name in enumerate(COLOURS):
        labels = _regions((chroma > MIN_CHROMA) & (colour == index))
        for label in np.unique(labels[labels >= 0]):
            mask = labels == label
            area = int(mask.sum())
            if area >= MIN_AREA:
                found.append(_describe(name, mask, area))
    return sorted(found, key=lambda thing: -thing.area)


def check(picture: UInt8[ndarray, "32 32 3"], scene: Scene) -> Verdict:
    """Compare what a picture shows with what the scene says, under the assignment of things that fits best."""
    found = look(picture)
    wanted = scene.things
    count = 1.0 if len(found) == len(wanted) else 0.0
    best: tuple[float, Verdict] | None = None
    slots: list[Found | None] = [*found[:5], *([None] * max(0, len(wanted) - len(found[:5])))]
    for chosen in itertools.permutations(slots, len(wanted)):
        colour = float(np.mean([c is not None and c.colour == w.colour for c, w in zip(chosen, wanted, strict=True)]))
        shape = float(np.mean([c is not None and c.shape == w.shape for c, w in zip(chosen, wanted, strict=True)]))
        relation = None if scene.relation is None else _relation_holds(scene.relation, chosen)
        # colour and shape decide which thing is which; the relation is judged for that reading, not used to pick it
        # unless two readings are equally good
        rank = 10 * (colour + shape) + (relation or 0.0)
        if best is None or rank > best[0]:
            best = rank, Verdict(count, colour, shape, relation, tuple(found))
    assert best is not None  # a scene has at least one thing
    return best[1]


def shown(picture: UInt8[ndarray, "32 32 3"]) -> set[Thing]:
    """The well-formed things a picture shows: ground truth for hallucination measures."""
    return {Thing(f.colour, f.shape) for f in look(picture) if f.shape is not None}


def style(picture: UInt8[ndarray, "32 32 3"]) -> float:
    """A taste that has nothing to do with the caption: a bright and flat ground, in [0, 1].

    Mean brightness of the pixels without chroma, less twice their standard deviation.
    """
    rgb = picture.astype(np.float32) / 255
    ground = rgb.mean(2)[(rgb.max(2) - rgb.min(2)) < 0.15]
    if ground.size < SIZE:  # a picture without a ground has none of this taste
        return 0.0
    return float(np.clip(ground.mean() - 2 * ground.std(), 0, 1))


def _relation_holds(relation: str, chosen: Sequence[Found | None]) -> float:
    first, second = chosen
    if first is None or second is None:
        return 0.0
    dx, dy = second.x - first.x, second.y - first.y
    offset, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return float(offset >= MIN_OFFSET and offset > abs(across))


def _nearest_colour(rgb: Float[ndarray, "32 32 3"]) -> Int[ndarray, "32 32"]:
    """Index into COLOURS of the nearest hue (on the circle) of every pixel."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))
    centres = np.array([HUES[name] for name in COLOURS])
    distance = np.abs((hue[..., None] - centres + 180) % 360 - 180)
    nearest: ndarray = distance.argmin(-1)
    return nearest


def _regions(mask: Bool[ndarray, "32 32"]) -> Int[ndarray, "32 32"]:
    """4-connected regions: a label per pixel, -1 outside. Labels spread until nothing changes."""
    labels = np.where(mask, np.arange(mask.size).reshape(mask.shape), -1)
    while True:
        spread = labels.copy()
        for axis in (0, 1):
            for step in (1, -1):
                shifted = np.roll(spread, step, axis)
                edge = [slice(None), slice(None)]
                edge[axis] = slice(0, 1) if step == 1 else slice(-1, None)
                shifted[tuple(edge)] = -1
                spread = np.where(mask, np.maximum(spread, shifted), -1)
        if (spread == labels).all():
            return labels
        labels = spread


def _describe(colour: str, mask: Bool[ndarray, "32 32"], area: int) -> Found:
    rows, columns = np.nonzero(mask)
    x, y = float(columns.mean() + 0.5), float(rows.mean() + 0.5)
    overlaps = {shape: _overlap(mask, shape, x, y) for shape in SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])
    fits = overlaps[shape] >= MIN_OVERLAP
    return Found(colour, shape if fits else None, x, y, area, overlaps[shape])


def _overlap(mask: Bool[ndarray, "32 32"], shape: str, x: float, y: float) -> float:
    """Best intersection over union of the region with the shape whose centre of mass is at or near (x, y)."""
    lift = _CENTROID_BELOW[shape]
    best = 0.0
    for dx, dy in _NUDGES:
        template = _template(shape, round(2 * (x + dx)), round(2 * (y - lift + dy)))
        union = int((mask | template).sum())
        best = max(best, int((mask & template).sum()) / union)
    return best


@functools.lru_cache(maxsize=20_000)
def _template(shape: str, x2: int, y2: int) -> Bool[ndarray, "32 32"]:
    """The shape as pixels, its centre on a half-pixel grid (arguments are twice the coordinates)."""
    return coverage(shape, x2 / 2, y2 / 2) > MIN_CHROMA


_NUDGES = ((0.0, 0.0), (0.5, 0.0), (-0.5, 0.0), (0.0, 0.5), (0.0, -0.5))
_CENTROID_BELOW = {
    "circle": 0.0,
    "square": 0.0,
    "triangle": 1.8,
}  # pixels from the centre to the centre of mass
