"""Is a scorer right about pairs? Three published definitions of "accuracy", which differ by points on the same scores.

pickscore   a prediction is a tie where |sigmoid(h) - sigmoid(-h)| <= threshold; right 1, tie against a side 1/2
rank        of each prompt the share of pairs that are not inverted, equal scores counting as right; mean over prompts
strict      share of pairs with h > 0, over all pairs alike, equal scores counting as wrong

`rank` and `strict` leave out pairs that the labels call ties. The margin h is the preferred picture's score minus the
other's.

Sources: PickScore's eval_preference_predictor.py; HPSv2's train.py on HPDv2's test set; ImageReward's test.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmalign.statistics import Interval, share_interval

Values = NDArray[np.float64]
TIE = 0.5  # a label's confidence that says neither
THRESHOLDS = 11  # that are tried: 0, 0.1, ... 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """An accuracy.

    Attributes:
        ci95: clustered by prompt; None with fewer than two prompts.
        count: pairs, or prompts, that it is the mean of.
    """

    value: float
    ci95: Interval | None
    count: int

    @staticmethod
    def of(hits: Values, groups: Sequence[Hashable] | None) -> Share:
        """Of outcomes in [0, 1], clustered by group; None: each by itself."""
        clusters = len(hits) if groups is None else len(set(groups))
        interval = share_interval(hits, groups) if clusters > 1 else None
        return Share(value=float(hits.mean()), ci95=interval, count=len(hits))

    def __str__(self) -> str:
        between = "" if self.ci95 is None else f" [{self.ci95[0]:.3f}, {self.ci95[1]:.3f}]"
        return f"{self.value:.3f}{between}"


def pickscore(margins: Values, confidence: Values, groups: Sequence[Hashable], threshold: float | Values) -> Share:
    """PickScore's, which is the only one that uses labelled ties; see the module's docstring.

    Args:
        confidence: 1/2 for a labelled tie; otherwise the first of the pair is the preferred one.
        threshold: chosen on other pairs (`tie_threshold`); one for all, or one for each pair.
    """
    return Share.of(_with_ties(margins, confidence, threshold), groups)


def tie_threshold(margins: Values, confidence: Values) -> float:
    """The smallest threshold in [0, 1] with the most right predictions; 0 where no label is a tie."""
    if not (confidence == TIE).any():
        return 0.0
    tried = np.linspace(0, 1, THRESHOLDS)
    return float(tried[int(np.argmax([_with_ties(margins, confidence, one).mean() for one in tried]))])


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """All three of the same margins.

    Attributes:
        threshold: of `pickscore`, the mean of those used.
    """

    strict: Share
    rank: Share
    pickscore: Share
    threshold: float


def published(
    margins: Values, confidence: Values, prompts: Sequence[Hashable], groups: Sequence[Hashable]
) -> Published:
    """Every definition, with thresholds by `fitted_thresholds`.

    Args:
        prompts: what each pair answers, which `rank` is the mean over.
        groups: pairs that resemble each other, which intervals and halves keep together.
    """
    thresholds = fitted_thresholds(margins, confidence, groups)
    return Published(
        strict=strict(margins, confidence, groups),
        rank=rank(margins, confidence, prompts),
        pickscore=pickscore(margins, confidence, groups, thresholds),
        threshold=float(thresholds.mean()),
    )


def fitted_thresholds(margins: Values, confidence: Values, groups: Sequence[Hashable]) -> Values:
    """For each pair the threshold that fits the other half of the groups: no pair helps to choose its own."""
    half = np.array([hashlib.sha256(str(group).encode()).digest()[0] % 2 for group in groups])
    fits = np.array([tie_threshold(margins[half != side], confidence[half != side]) for side in (0, 1)])
    chosen: Values = fits[half]
    return chosen


def _with_ties(margins: Values, confidence: Values, threshold: float | Values) -> Values:
    tie = np.abs(np.tanh(margins / 2)) <= threshold  # sigmoid(h) - sigmoid(-h) = tanh(h / 2)
    labelled = confidence == TIE
    sided = (margins > 0).astype(float)
    return np.where(tie & labelled, 1.0, np.where(tie | labelled, 0.5, sided))


def rank(margins: Values, confidence: Values, prompts: Sequence[Hashable]) -> Share:
    """HPDv2's: the mean over prompts of 1 - inversions / pairs; see the module's docstring."""
    kept = confidence != TIE
    named = np.unique(np.array([str(prompt) for prompt in prompts])[kept], return_inverse=True)[1]
    right = (margins[kept] >= 0).astype(float)
    return Share.of(np.bincount(named, right) / np.bincount(named), None)


def strict(margins: Values, confidence: Values, groups: Sequence[Hashable]) -> Share:
    """ImageReward's: pooled over pairs; see the module's docstring."""
    kept = confidence != TIE
    return Share.of((margins[kept] > 0).astype(float), [g for g, keep in zip(groups, kept, strict=True) if keep])
