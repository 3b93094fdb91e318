"""Draws scenes: 32x32 RGB, anti-aliased shapes of one size on a softly graded grey ground."""

from __future__ import annotations

import colorsys

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from mmalign.shapes.scenes import SHAPES, Scene

SIZE = 32  # pixels, width and height
RADIUS = 5.5  # pixels: half the width of every shape
HUES = {"red": 0.0, "yellow": 55.0, "green": 120.0, "cyan": 180.0, "blue": 225.0, "purple": 292.0}  # degrees
JITTER = {"one": 4.0, "relation": 1.5, "count": 1.0}  # pixels, uniform, each axis

_AXIS = np.arange(SIZE, dtype=np.float32) + 0.5
_PLACES = {
    "left of": ((8.5, 16.0), (23.5, 16.0)),
    "right of": ((23.5, 16.0), (8.5, 16.0)),
    "above": ((16.0, 8.5), (16.0, 23.5)),
    "below": ((16.0, 23.5), (16.0, 8.5)),
}
_COUNT_PLACES = {2: (_PLACES["left of"], _PLACES["above"]), 3: (((8.5, 8.5), (23.5, 8.5), (16.0, 23.0)),)}


def coverage(shape: str, x: float, y: float) -> Float[ndarray, "32 32"]:
    """Share of each pixel that the shape centred at (x, y) covers: its signed distance in pixels, clipped."""
    dx, dy = _AXIS[None, :] - x, _AXIS[:, None] - y
    if shape == "circle":
        distance = np.hypot(dx, dy) - RADIUS
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - RADIUS * 0.9
    else:  # upright, apex at the top: two slanted edges of slope 2 and a base
        height = RADIUS * 1.05
        distance = np.maximum(dy - height, (2.0 * np.abs(dx) - (dy + height)) / np.sqrt(5.0))
    covered: ndarray = np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)
    return covered


def places(scene: Scene, generator: np.random.Generator) -> list[tuple[float, float]]:
    """Where the things of the scene are drawn: (x, y) centres in pixels."""
    if scene.relation:
        base = _PLACES[scene.relation]
    elif scene.kind == "one":
        base = ((16.0, 16.0),)  # type: ignore[assignment]  # a tuple of one place
    else:
        choices = _COUNT_PLACES[len(scene.things)]
        base = choices[generator.integers(len(choices))]  # type: ignore[assignment]  # of two or three
    spread = JITTER[scene.kind]
    return [(x + generator.uniform(-spread, spread), y + generator.uniform(-spread, spread)) for x, y in base]


def render(scene: Scene, seed: int) -> UInt8[ndarray, "32 32 3"]:
    """The picture of a scene; the seed chooses places, ground and shades."""
    generator = np.random.default_rng([seed, 11])
    level, slope, angle = (
        generator.uniform(0.3, 0.8),
        generator.uniform(0, 0.2),
        generator.uniform(0, 2 * np.pi),
    )
    across, down = (_AXIS / SIZE - 0.5)[None, :], (_AXIS / SIZE - 0.5)[:, None]
    ground = np.clip(level + slope * (np.cos(angle) * across + np.sin(angle) * down), 0, 1)
    picture = np.repeat(ground[:, :, None], 3, axis=2).astype(np.float32)
    for thing, (x, y) in zip(scene.things, places(scene, generator), strict=True):
        hue = (HUES[thing.colour] + generator.uniform(-6, 6)) % 360 / 360
        shade = colorsys.hsv_to_rgb(hue, generator.uniform(0.85, 1.0), generator.uniform(0.8, 1.0))
        mask = coverage(thing.shape, x, y)[:, :, None]
        picture = picture * (1 - mask) + np.asarray(shade, dtype=np.float32) * mask
    return np.round(picture * 255).astype(np.uint8)


def templates() -> dict[str, Float[ndarray, "32 32"]]:
    """Each shape centred in the picture, for matching."""
    return {shape: coverage(shape, SIZE / 2, SIZE / 2) for shape in SHAPES}
