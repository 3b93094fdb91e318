"""A measured share with its interval, clustered by image: answers about one picture resemble each other."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmalign.statistics import Interval, bootstrap_interval, wilson_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A share of units.

    Attributes:
        value: hits / n, in [0, 1]; None where there are no units (no thing was named, nothing was answered yes).
        ci95: its interval, from resampling images; Wilson's over images when every image ended alike; None with fewer
            than two images.
        n: units: captions, mentions, things, questions.
        images: the images they belong to.
    """

    value: float | None
    ci95: Interval | None
    n: int
    images: int

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a report."""
        ci95 = None if self.ci95 is None else list(self.ci95)
        return {"value": self.value, "ci95": ci95, "n": self.n, "images": self.images}

    def __str__(self) -> str:
        if self.value is None:
            return "none to count"
        interval = "" if self.ci95 is None else f" [{self.ci95[0]:.3f}, {self.ci95[1]:.3f}]"
        return f"{self.value:.3f}{interval}"


def share(units: Iterable[tuple[Hashable, bool]], *, seed: int = 0) -> Estimate:
    """The share of units that are hits.

    Args:
        units: (image, hit) of each.
        seed: of the bootstrap.
    """
    found = list(units)
    images = [image for image, _ in found]
    hits = np.array([hit for _, hit in found], dtype=np.float64)
    clusters = len(set(images))
    if not found:
        return Estimate(value=None, ci95=None, n=0, images=0)
    value = float(hits.mean())
    ci95 = None
    if clusters >= 2:
        ci95 = bootstrap_interval(hits, images, seed=seed)
        if ci95[0] == ci95[1]:  # every image ended alike: resampling has no width, which is not certainty
            ci95 = wilson_interval(clusters * value, clusters)
    return Estimate(value=value, ci95=ci95, n=len(found), images=clusters)


def table(measures: Mapping[str, Estimate]) -> str:
    """One line per number: name, value, interval, units."""
    width = max(map(len, measures))
    return "\n".join(f"{name:<{width}}  {one}  n={one.n}, images={one.images}" for name, one in measures.items())
