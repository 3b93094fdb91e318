"""Is the difference real? Paired comparisons of two models on the same prompts and seeds.

The unit is one (prompt, seed): a score under the base and under the tuned model. The units of one prompt form
a *cluster*: they resemble each other, so intervals and tests draw or flip whole prompts, never single units.
A win is 1, a tie 1/2, a loss 0. NumPy only; everything random is seeded, and seed 0 is a seed.

The intervals are those that cover in simulation (`benchmarks/coverage.py`): the plain percentile bootstrap is too
narrow for few prompts (90 to 93 % at 20) and far too narrow for shares near 0 or 1 (52 % at 20 prompts).

Sources: Wilson 1927 (score interval); Efron and Tibshirani 1993 (percentile bootstrap, permutation tests);
Hesterberg 2015 (the expanded percentile interval); Kish 1965 (effective size of a clustered sample); Phipson and
Smyth 2010 (the added one); Holm 1979; Miller 2411.00640 (clusters and power in evaluations).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmalign.errors import UserError

Values = NDArray[np.float64]
Interval = tuple[float, float]

_CHUNK = 4_000_000  # draws held at a time, 32 MB


# ------------------------------------------------------------------------------------------- win rates


def win_scores(base: ArrayLike, tuned: ArrayLike, *, tolerance: float = 0.0) -> Values:
    """[units]: 1 where tuned - base exceeds `tolerance`, 0 where it is below -tolerance, else 0.5."""
    return _outcomes(_differences(base, tuned), tolerance)


def wilson_interval(wins: int | float, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion, honest at 0 and n where the normal one has no width.

        centre = (p + z^2 / 2n) / (1 + z^2 / n)      half = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)

    Args:
        wins: successes; a tie adds one half.
        n: independent units; with several seeds per prompt that is the number of prompts.

    Raises:
        UserError: there are no units.
    """
    if n < 1:
        raise UserError("There is nothing to compare", fix="Give at least one prompt.")
    if not 0 <= wins <= n:
        raise ValueError(f"{wins} wins out of {n}")
    return _wilson(wins / n, n, _quantile(confidence))


# ------------------------------------------------------------------------------------------- intervals


def share_interval(
    values: ArrayLike, clusters: Iterable[Hashable] | None = None, *, confidence: float = 0.95
) -> Interval:
    """Wilson's interval of a mean of values in [0, 1] (win scores, 0/1 outcomes) whose units come in clusters.

    n is the number of independent 0/1 outcomes that would scatter as much as this mean does,

        n = p (1 - p) / v      v = C / (C - 1) sum_c (sum_c - p size_c)^2 / N^2

    with C clusters and N units, and Student's t with C - 1 degrees of freedom stands in for z, since v is estimated.
    It stays in [0, 1] and has a width at 0 and 1, where resampling has none: clusters that all ended alike count as
    one outcome each.

    Raises:
        UserError: no values, a value that is not finite, or fewer than two clusters.
        ValueError: a value outside of [0, 1].
    """
    data = _finite("value", values)
    if data.min() < 0 or data.max() > 1:
        raise ValueError(f"shares lie in [0, 1], not in [{data.min()}, {data.max()}]")
    sums, sizes = _by_cluster(data, clusters)
    count = _require_two(len(sums))
    p = float(data.mean())
    if np.ptp(sums / sizes) == 0:
        return wilson_interval(count * p, count, confidence=confidence)
    scatter = count / (count - 1) * float(((sums - p * sizes) ** 2).sum()) / len(data) ** 2
    return _wilson(p, p * (1 - p) / scatter, student_quantile((1 + confidence) / 2, count - 1))


def bootstrap_interval(
    values: ArrayLike,
    clusters: Iterable[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Expanded percentile interval of the mean over units, from resampling whole clusters with replacement.

    A resample's mean is the sum over its units divided by their number, so clusters may differ in size. Resamples of
    C clusters scatter less than C new ones would, by sqrt((C - 1) / C), and the normal distribution has lighter tails
    than Student's t; so the percentile taken is Phi(-sqrt(C / (C - 1)) t_{C - 1}) instead of 2.5 %: for 20 clusters
    1.6 %, for 200 2.4 %.

    Args:
        values: one per unit: score differences, win scores, 0/1 outcomes, ...
        clusters: the prompt of each unit; None makes every unit its own.

    Raises:
        UserError: no values, a value that is not finite, or fewer than two clusters.
    """
    data = _finite("value", values)
    sums, sizes = _by_cluster(data, clusters)
    count = _require_two(len(sums))
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _CHUNK // count)
    for start in range(0, resamples, step):
        drawn = generator.integers(0, count, (min(step, resamples - start), count))
        means[start : start + step] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    reach = math.sqrt(count / (count - 1)) * student_quantile((1 + confidence) / 2, count - 1)
    tail = NormalDist().cdf(-reach)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


# ----------------------------------------------------------------------------------------------- tests


def sign_test(differences: ArrayLike, clusters: Iterable[Hashable] | None = None) -> float:
    """Exact two-sided binomial test that wins and losses are equally likely; ties are dropped.

    Every cluster casts one vote, the sign of the sum of its differences. No votes at all give p = 1.
    """
    sums, _ = _by_cluster(_finite("difference", differences), clusters)
    wins, losses = int((sums > 0).sum()), int((sums < 0).sum())
    n = wins + losses
    # log C(n, k) for k = 0 ... min(wins, losses), by summing the ratios of neighbours
    k = np.arange(1, min(wins, losses) + 1)
    log_ways = np.concatenate([[0.0], np.cumsum(np.log(n - k + 1) - np.log(k))])
    peak = log_ways[-1]
    log_tail = peak + math.log(float(np.exp(log_ways - peak).sum())) - n * math.log(2)
    return min(1.0, 2 * math.exp(log_tail))


def permutation_test(
    differences: ArrayLike,
    clusters: Iterable[Hashable] | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided sign-flip test of a zero mean difference: under the null, base and tuned may be swapped.

    All units of a cluster flip together. Every assignment of signs is enumerated when there are at most
    `resamples` of them, which is exact; otherwise p = (1 + exceedances) / (1 + resamples).
    """
    sums, _ = _by_cluster(_finite("difference", differences), clusters)
    sums = sums[sums != 0]  # flipping nothing changes nothing
    count = len(sums)
    # Sums that are equal in exact arithmetic may differ by rounding; they count as reaching the observed one.
    reached = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    exact = count < resamples.bit_length() and 2**count <= resamples
    total = 2**count if exact else resamples
    generator = np.random.default_rng(seed)
    exceedances = 0
    step = max(1, _CHUNK // max(1, count))
    for start in range(0, total, step):
        rows = min(step, total - start)
        if exact:
            flipped = np.arange(start, start + rows)[:, None] >> np.arange(count) & 1
        else:
            flipped = generator.integers(0, 2, (rows, count), dtype=np.int8)
        exceedances += int((np.abs((1 - 2.0 * flipped) @ sums) >= reached).sum())
    return exceedances / total if exact else (1 + exceedances) / (1 + total)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that all that stay below alpha hold together at level alpha (Holm 1979).

    With the m values sorted, p'_(k) = max over j <= k of min(1, (m - j + 1) p_(j)).
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


# ----------------------------------------------------------------------------------------------- power


def cluster_deviation(values: ArrayLike, clusters: Iterable[Hashable] | None = None) -> float:
    """The standard deviation per independent unit: that of the mean over clusters times sqrt(their number).

    Raises:
        UserError: no values, a value that is not finite, or fewer than two clusters.
    """
    data = _finite("value", values)
    sums, sizes = _by_cluster(data, clusters)
    count = _require_two(len(sums))
    spread = float(((sums - data.mean() * sizes) ** 2).sum()) / (count - 1)
    return math.sqrt(spread) * count / len(data)


def effect_size(differences: ArrayLike, clusters: Iterable[Hashable] | None = None) -> float | None:
    """Cohen's d of paired differences, mean / deviation per prompt; None where all prompts moved by the same."""
    deviation = cluster_deviation(differences, clusters)
    return None if deviation == 0 else float(np.mean(np.asarray(differences, dtype=np.float64))) / deviation


def minimum_detectable_difference(deviation: float, n: int, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """The mean paired difference that a two-sided test at level alpha finds with probability `power`.

        (z_{1 - alpha / 2} + z_power) deviation / sqrt(n)

    Args:
        deviation: standard deviation of the paired differences, per independent unit.
        n: independent units (prompts).
    """
    if n < 1:
        raise UserError("There is nothing to compare", fix="Give at least one prompt.")
    return (_quantile(1 - alpha) + NormalDist().inv_cdf(power)) * deviation / math.sqrt(n)


def minimum_detectable_win_rate(n: int, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """How far from 0.5 a win rate must be to be found; the worst case, no ties. 0.063 for 500 prompts."""
    return minimum_detectable_difference(0.5, n, power=power, alpha=alpha)


# ---------------------------------------------------------------------------------------------- report


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedReport:
    """What a comparison of two models says.

    Attributes:
        n: units compared; prompts: clusters they fall into; ties: units without a winner.
        win_rate: share of units the tuned model wins, ties half.
        ci95: its interval, Wilson's at the effective number of prompts (`share_interval`).
        p_value: exact sign test, one vote per prompt: whether its units were won more often than lost.
        mean_difference: tuned minus base, in the scorer's unit.
        mean_difference_ci95: its interval, from resampling prompts.
        mde: distance from 0.5 that a win rate needs for 80 % power at this number of prompts.
    """

    n: int
    prompts: int
    ties: int
    win_rate: float
    ci95: Interval
    p_value: float
    mean_difference: float
    mean_difference_ci95: Interval
    mde: float


def paired_report(
    base: ArrayLike,
    tuned: ArrayLike,
    prompts: Iterable[Hashable] | None = None,
    *,
    tolerance: float = 0.0,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedReport:
    """Compare the tuned model with the base on the same units.

    Args:
        base, tuned: a score per unit, higher is better; the same prompts and seeds in the same order.
        prompts: the prompt of each unit; None makes every unit its own prompt.
        tolerance: differences up to this size are ties.
        resamples, seed: of the bootstrap.

    Raises:
        UserError: nothing to compare, lengths that differ, a score that is not finite, or one prompt only.
    """
    prompts = None if prompts is None else list(prompts)
    differences = _differences(base, tuned)
    scores = _outcomes(differences, tolerance)
    ci95 = share_interval(scores, prompts)
    count = len(scores) if prompts is None else len(set(prompts))
    return PairedReport(
        n=len(scores),
        prompts=count,
        ties=int((scores == 0.5).sum()),
        win_rate=float(scores.mean()),
        ci95=ci95,
        p_value=sign_test(scores - 0.5, prompts),
        mean_difference=float(differences.mean()),
        mean_difference_ci95=bootstrap_interval(differences, prompts, resamples=resamples, seed=seed),
        mde=minimum_detectable_win_rate(count),
    )


# --------------------------------------------------------------------------------------------- helpers


def _quantile(confidence: float) -> float:
    """z such that a standard normal lies within +-z with probability `confidence`."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def student_quantile(probability: float, degrees: int | None) -> float:
    """The value that Student's t with so many degrees of freedom stays below with a probability.

    From the exact distribution function at whole degrees (Abramowitz and Stegun 26.7.3 and 26.7.4), by bisection.

    Args:
        probability: in (0, 1).
        degrees: 1 or more; None, or more than 10,000, is the normal distribution.
    """
    if degrees is None or degrees > 10_000:
        return NormalDist().inv_cdf(probability)
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while _student_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _student_cdf(value: float, degrees: int) -> float:
    """P(t < value) for value >= 0."""
    angle = math.atan2(value, math.sqrt(degrees))
    square = math.cos(angle) ** 2
    odd = degrees % 2
    # terms cos^(odd), cos^(odd + 2), ... with coefficients 2/3, 4/5, ... (odd) or 1/2, 3/4, ... (even)
    k = np.arange(1, (degrees - odd) // 2)
    ratios = (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k)) * square
    series = 1.0 + float(np.cumprod(ratios).sum()) if degrees > 1 else 0.0
    sine, cosine = math.sin(angle), math.cos(angle)
    inside = (angle + sine * cosine * series) * 2 / math.pi if odd else sine * series
    return 0.5 + inside / 2


def _wilson(p: float, n: float, z: float) -> Interval:
    scale = 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def _require_two(count: int) -> int:
    if count < 2:
        raise UserError("One prompt cannot give an interval", fix="Compare on at least two prompts.")
    return count


def _finite(name: str, values: ArrayLike) -> Values:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1:
        raise ValueError(f"{name}s must be one-dimensional, not {data.shape}")
    if not len(data):
        raise UserError("There is nothing to compare", fix="Give at least one prompt.")
    bad = np.flatnonzero(~np.isfinite(data))
    if len(bad):
        raise UserError(
            f"{len(bad)} of {len(data)} {name}s are not finite, the first is {data[bad[0]]}",
            place=f"{name} {bad[0]}",
            fix="Score these again or leave them out on both sides.",
        )
    return data


def _differences(base: ArrayLike, tuned: ArrayLike) -> Values:
    before, after = _finite("base score", base), _finite("tuned score", tuned)
    if len(before) != len(after):
        raise UserError(
            f"{len(before)} base scores against {len(after)} tuned scores",
            fix="Score both models on the same prompts and seeds.",
        )
    return after - before


def _outcomes(differences: Values, tolerance: float) -> Values:
    return np.where(differences > tolerance, 1.0, np.where(differences < -tolerance, 0.0, 0.5))


def _by_cluster(values: Values, clusters: Iterable[Hashable] | None) -> tuple[Values, Values]:
    """Sum and number of the values in each cluster, clusters in order of first appearance."""
    if clusters is None:
        return values, np.ones(len(values))
    named = list(clusters)
    if len(named) != len(values):
        raise UserError(
            f"{len(named)} prompts for {len(values)} values", fix="Name the prompt of every unit, in order."
        )
    index = {cluster: i for i, cluster in enumerate(dict.fromkeys(named))}
    member = np.array([index[cluster] for cluster in named])
    return np.bincount(member, values).astype(np.float64), np.bincount(member).astype(np.float64)
