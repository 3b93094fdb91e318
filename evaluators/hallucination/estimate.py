"""A measured share with its interval, clustered by image: answers about one picture resemble each other."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmalign.statistics import Interval, share_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A share of units.

    Attributes:
        value: hits / n, in [0, 1]; None where there are no units (no thing was named, nothing was answered yes).
        ci95: its interval, Wilson's at the effective number of images; None with fewer than two images.
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


def share(units: Iterable[tuple[Hashable, bool]]) -> Estimate:
    """The share of units that are hits.

    Args:
        units: (image, hit) of each.
    """
    found = list(units)
    if not found:
        return Estimate(value=None, ci95=None, n=0, images=0)
    images = [image for image, _ in found]
    hits = np.array([hit for _, hit in found], dtype=np.float64)
    clusters = len(set(images))
    return Estimate(
        value=float(hits.mean()),
        ci95=share_interval(hits, images) if clusters >= 2 else None,
        n=len(found),
        images=clusters,
    )


def table(measures: Mapping[str, Estimate]) -> str:
    """One line per number: name, value, interval, units."""
    width = max(map(len, measures))
    return "\n".join(f"{name:<{width}}  {one}  n={one.n}, images={one.images}" for name, one in measures.items())
