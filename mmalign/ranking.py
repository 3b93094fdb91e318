"""Which of several models is better, from who beat whom: Bradley-Terry with ties, after Davidson.

With strengths theta and a tie parameter eta = log nu, for models i and j

    P(i wins)  =  e^theta_i / Z        P(tie) = e^(eta + (theta_i + theta_j) / 2) / Z        Z: the sum of all three

The likelihood is concave and is maximised by Newton's method, under a normal prior of standard deviation `PRIOR` that
keeps a model which won every time at a finite place and weighs as much as a few hundredths of a game. All games count
alike, whenever they were played: unlike an Elo rating that is updated game by game, the result has no order.

Sources: Davidson 1970 (ties); Hunter 2004 (when the maximum exists); White 1982 (the sandwich).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmalign.errors import UserError
from mmalign.statistics import Interval, student_quantile

Values = NDArray[np.float64]

PRIOR = 5.0  # standard deviation of a strength: e^5 = 148 to 1
ELO = 400 / math.log(10)  # Elo points per unit of strength
CENTRE = 1500.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Strengths of models.

    Attributes:
        strengths: theta of each model; their sum is 0. A difference of 1 is e to 1 in decided games.
        intervals: 95 % (or the asked) interval of each.
        covariance: of the strengths, [models, models].
        ties: nu; 0 where there were no ties. Between equals, nu / (2 + nu) of the games are ties.
        games: games played by each model.
        clusters: independent units behind the intervals.
    """

    strengths: tuple[float, ...]
    intervals: tuple[Interval, ...]
    covariance: Values
    ties: float
    games: tuple[int, ...]
    clusters: int

    @property
    def elo(self) -> tuple[float, ...]:
        """The strengths on the Elo scale: mean 1500, 400 points for ten to one."""
        return tuple(CENTRE + ELO * strength for strength in self.strengths)

    @property
    def elo_intervals(self) -> tuple[Interval, ...]:
        """Their intervals."""
        return tuple((CENTRE + ELO * low, CENTRE + ELO * high) for low, high in self.intervals)

    @property
    def order(self) -> tuple[int, ...]:
        """Models from the strongest to the weakest."""
        return tuple(sorted(range(len(self.strengths)), key=lambda model: -self.strengths[model]))

    def win_rate(self, first: int, second: int) -> float:
        """Expected win rate of one model against another, a tie counting half."""
        gap = self.strengths[first] - self.strengths[second]
        win, loss, tie = math.exp(gap / 2), math.exp(-gap / 2), self.ties
        return (win + tie / 2) / (win + loss + tie)


def bradley_terry(
    wins: ArrayLike,
    ties: ArrayLike | None = None,
    *,
    names: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> Ranking:
    """Strengths of models from counts of games.

    Args:
        wins: [models, models], how often the row's model beat the column's; or [clusters, models, models] with the
            games of each prompt (or rater), which resemble each other: intervals then come from how clusters differ
            (sandwich), and are never narrower than those of independent games.
        ties: the same for ties, symmetric: a tie is counted in [i, j] and in [j, i]; None means that there are none.
        names: of the models, for messages.

    Raises:
        UserError: fewer than two models, no games, or models that no chain of games connects.
        ValueError: counts that cannot be.
    """
    won = np.asarray(wins, dtype=np.float64)
    tied = np.zeros_like(won) if ties is None else np.asarray(ties, dtype=np.float64)
    if won.ndim not in (2, 3) or won.shape[-1] != won.shape[-2] or tied.shape != won.shape:
        raise ValueError(f"wins {won.shape} and ties {tied.shape} are not counts between the same models")
    clustered = won.ndim == 3
    won, tied = (won, tied) if clustered else (won[None], tied[None])
    if (won < 0).any() or (tied < 0).any() or not np.array_equal(tied, tied.swapaxes(1, 2)):
        raise ValueError("counts are 0 or more, and ties are symmetric")
    models = won.shape[-1]
    if models < 2:
        raise UserError("There is nothing to rank", fix="Give at least two models.")
    pairs = list(combinations(range(models), 2))
    first, second = np.array(pairs).T
    # [clusters, pairs, 3]: the first wins, the second wins, a tie
    counts = np.stack([won[:, first, second], won[:, second, first], tied[:, first, second]], axis=-1)
    total = counts.sum(0)
    _require_connected(total.sum(-1), pairs, models, names)
    with_ties = bool(total[:, 2].any())
    features = _features(pairs, models, with_ties)
    total, counts = total[:, : features.shape[1]], counts[:, :, : features.shape[1]]

    point = np.zeros(models + with_ties)
    for _ in range(100):
        probabilities = _probabilities(features, point)
        played = total.sum(-1)
        slope = np.einsum("po,pof->f", total - played[:, None] * probabilities, features) - point / PRIOR**2
        curvature = _information(features, probabilities, played) + np.eye(len(point)) / PRIOR**2
        step = np.linalg.solve(curvature, slope)
        point = point + step / max(1.0, float(np.abs(step).max()))  # far from the top a full step may overshoot
        if np.abs(step).max() < 1e-10:
            break

    inverse = np.linalg.inv(curvature)
    used = counts[counts.sum((1, 2)) > 0]
    centre = np.eye(models) - 1 / models  # strengths are relative: what they have in common is the prior's alone
    covariance = centre @ inverse[:models, :models] @ centre
    degrees = None
    if clustered and len(used) > 1:
        scores = np.einsum("cpo,pof->cf", used - used.sum(-1)[..., None] * probabilities, features)
        sandwich = (inverse @ (scores.T @ scores) @ inverse)[:models, :models] * len(used) / (len(used) - 1)
        widen = np.sqrt(np.maximum(np.diag(sandwich) / np.diag(covariance), 1.0))
        covariance = covariance * np.outer(widen, widen)
        degrees = len(used) - 1
    half = student_quantile((1 + confidence) / 2, degrees) * np.sqrt(np.diag(covariance))
    strengths = point[:models] - point[:models].mean()
    games = won.sum(0) + won.sum(0).T + tied.sum(0)
    return Ranking(
        strengths=tuple(strengths.tolist()),
        intervals=tuple((float(s - h), float(s + h)) for s, h in zip(strengths, half, strict=True)),
        covariance=covariance,
        ties=math.exp(point[-1]) if with_ties else 0.0,
        games=tuple(int(count) for count in games.sum(1)),
        clusters=len(used) if clustered else int(total.sum()),
    )


def _features(pairs: Sequence[tuple[int, int]], models: int, with_ties: bool) -> Values:
    """[pairs, outcomes, parameters]: what the logarithm of each outcome's weight is linear in."""
    features = np.zeros((len(pairs), 2 + with_ties, models + with_ties))
    for row, (first, second) in enumerate(pairs):
        features[row, 0, first] = features[row, 1, second] = 1.0
        if with_ties:
            features[row, 2, [first, second, models]] = 0.5, 0.5, 1.0
    return features


def _probabilities(features: Values, point: Values) -> Values:
    """[pairs, outcomes]."""
    weights = features @ point
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def _information(features: Values, probabilities: Values, played: Values) -> Values:
    """Games times the covariance of an outcome's features, summed over pairs."""
    mean = np.einsum("po,pof->pf", probabilities, features)
    second = np.einsum("p,po,pof,pog->fg", played, probabilities, features, features)
    return np.asarray(second - np.einsum("p,pf,pg->fg", played, mean, mean))


def _require_connected(
    played: Values, pairs: Sequence[tuple[int, int]], models: int, names: Sequence[str] | None
) -> None:
    reached, waiting = {0}, [0]
    while waiting:
        model = waiting.pop()
        for (first, second), count in zip(pairs, played, strict=True):
            if count and model in (first, second):
                other = first + second - model
                if other not in reached:
                    reached.add(other)
                    waiting.append(other)
    if missing := sorted(set(range(models)) - reached):
        label = names or [f"model {model}" for model in range(models)]
        raise UserError(
            f"nothing connects {label[missing[0]]} with {label[0]}: no comparison, not even through others",
            fix="Compare them on common prompts, or rank them apart.",
        )
