"""Are a scorer's probabilities true? sigmoid(h) against how often the preferred picture was preferred.

    log loss            mean of -p log sigmoid(h) - (1 - p) log sigmoid(-h)              log 2 for a scorer that knows
    Brier               mean of (sigmoid(h) - p)^2                                            nothing, in nats
    ECE                 mean over pairs of |how sure - how often right| of the pair's bin
    temperature         T that makes the log loss of h / T smallest: above 1 the scorer is too sure

How sure is max(sigmoid(h), sigmoid(-h)), from 1/2 to 1; bins hold equally many pairs (Naeini et al. 2015; adaptive bins
after Nguyen and O'Connor 2015; temperature Guo et al. 2017). ECE is 0 only in the limit: of n pairs a perfectly
calibrated scorer shows about sqrt(bins / n) / 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
BINS = 10
FEWEST = 10  # pairs in a bin


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Pairs about which a scorer is equally sure."""

    sure: float
    right: float
    pairs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """See the module's docstring."""

    log_loss: float
    brier: float
    ece: float
    temperature: float
    bins: tuple[Bin, ...]


def calibration(margins: Values, confidence: Values) -> Calibration:
    """Of the margins of pairs.

    Args:
        margins: h, score of the preferred picture minus that of the other, in nats.
        confidence: p, the probability that the label is right; 1/2 for a tie.
    """
    sure = probability(np.abs(margins))
    right = np.where(margins > 0, confidence, np.where(margins < 0, 1 - confidence, 0.5))
    order = np.argsort(sure, kind="stable")
    bins = [
        Bin(sure=float(sure[some].mean()), right=float(right[some].mean()), pairs=len(some))
        for some in np.array_split(order, max(1, min(BINS, len(order) // FEWEST)))
    ]
    return Calibration(
        log_loss=log_loss(margins, confidence),
        brier=float(np.mean((probability(margins) - confidence) ** 2)),
        ece=sum(one.pairs * abs(one.sure - one.right) for one in bins) / len(order),
        temperature=temperature(margins, confidence),
        bins=tuple(bins),
    )


def probability(margins: Values) -> Values:
    """sigmoid(h), which no h overflows."""
    found: Values = (1 + np.tanh(margins / 2)) / 2
    return found


def log_loss(margins: Values, confidence: Values) -> float:
    """Mean cross-entropy of labels and sigmoid(h), in nats."""
    return float(np.mean(np.logaddexp(0, -margins) + (1 - confidence) * margins))


def temperature(margins: Values, confidence: Values) -> float:
    """The T > 0 with the smallest log loss of h / T, within [1/100, 100]: the loss is convex in 1 / T, so bisection of
    its slope finds it. At the bounds where none does: a scorer that is always right cannot be too sure."""

    def slope(inverse: float) -> float:
        return float(np.mean(margins * (probability(margins * inverse) - confidence)))

    low, high = 0.01, 100.0
    if slope(low) >= 0:
        return 1 / low
    if slope(high) <= 0:
        return 1 / high
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)
