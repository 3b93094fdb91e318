"""How much a measure changed from one model to another on the same pictures.

A measure is a ratio of sums over pictures: false mentions / mentions, 2 TP / (2 TP + FP + FN). Its change has no value
for a single picture, so pictures are drawn with replacement, both models' ratios computed anew from the same draw, and
their difference taken; the interval is the expanded percentile one of `mmalign.statistics.bootstrap_interval`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmalign.errors import UserError
from mmalign.statistics import Interval, student_quantile

RESAMPLES = 10_000
_CHUNK = 4_000_000  # draws held at a time, 32 MB


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tally:
    """A measure's sums by picture; the measure is sum(hits) / sum(units).

    Args:
        hits, units: [pictures], in the same order for every model. Seeds or answers of one picture are added up.
    """

    hits: NDArray[np.float64]
    units: NDArray[np.float64]

    @property
    def value(self) -> float | None:
        """The measure; None without units."""
        units = float(self.units.sum())
        return float(self.hits.sum()) / units if units else None

    def __add__(self, other: Tally) -> Tally:
        return Tally(hits=self.hits + other.hits, units=self.units + other.units)


def tally(units: Iterable[tuple[int, float]], pictures: int) -> Tally:
    """The sums of (picture, hit) units."""
    found = list(units)
    of = np.array([picture for picture, _ in found], dtype=np.int64)
    hits = np.array([hit for _, hit in found], dtype=np.float64)
    return Tally(
        hits=np.bincount(of, hits, pictures).astype(np.float64),
        units=np.bincount(of, None, pictures).astype(np.float64),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A measure of two models.

    Attributes:
        base, tuned: the measure; None where a model gave it no units.
        ci95: interval of tuned - base; None where either is missing.
    """

    base: float | None
    tuned: float | None
    ci95: Interval | None

    @property
    def value(self) -> float | None:
        """tuned - base."""
        return None if self.base is None or self.tuned is None else self.tuned - self.base

    @property
    def certain(self) -> bool:
        """Whether the interval excludes no effect."""
        return self.ci95 is not None and not self.ci95[0] <= 0 <= self.ci95[1]

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a report."""
        ci95 = None if self.ci95 is None else list(self.ci95)
        return {"base": self.base, "tuned": self.tuned, "change": self.value, "ci95": ci95}


def changes(base: Mapping[str, Tally], tuned: Mapping[str, Tally], *, seed: int = 0) -> dict[str, Change]:
    """The change of every measure that both have.

    Args:
        base, tuned: tallies over the same pictures in the same order.
        seed: of the draws.

    Raises:
        UserError: fewer than two pictures.
    """
    names = [name for name in base if name in tuned]
    before, after = [base[name] for name in names], [tuned[name] for name in names]
    moved = _resampled(after, seed) - _resampled(before, seed)  # [resamples, measures]
    pictures = len(before[0].hits)
    tail = NormalDist().cdf(-math.sqrt(pictures / (pictures - 1)) * student_quantile(0.975, pictures - 1))
    found = {}
    for name, column, one, other in zip(names, moved.T, before, after, strict=True):
        known = one.value is not None and other.value is not None
        # A draw of pictures about which nothing was said has no ratio, and says nothing about its change.
        low, high = np.nanquantile(column, [tail, 1 - tail]) if known else (0.0, 0.0)
        ci95 = (float(low), float(high)) if known else None
        found[name] = Change(base=one.value, tuned=other.value, ci95=ci95)
    return found


def _resampled(tallies: Sequence[Tally], seed: int) -> NDArray[np.float64]:
    """[resamples, measures]; equal draws of pictures for an equal number of pictures and seed."""
    hits = np.stack([one.hits for one in tallies], axis=1)
    units = np.stack([one.units for one in tallies], axis=1)
    pictures = len(hits)
    if pictures < 2:
        raise UserError("one picture cannot give an interval", fix="Judge at least two")
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // pictures)
    ratios = []
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn = generator.multinomial(pictures, np.full(pictures, 1 / pictures), size).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios.append((drawn @ hits) / (drawn @ units))
    return np.concatenate(ratios)
