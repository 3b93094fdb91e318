"""Does a scorer prefer what people preferred? Its accuracy on pairs.

    accuracy = share of pairs with score(chosen) > score(rejected), equal scores half

Pairs whose pictures cannot be opened or scored are counted and left out. The interval keeps the pairs of one group
(photographs, prompts) together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluators.scorer import Scorer, score_each
from mmalign.errors import UserError
from mmalign.media import Media
from mmalign.progress import Progress
from mmalign.records import Preference
from mmalign.statistics import Interval, share_interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Of one judge with the labels of pairs.

    Attributes:
        ties: pairs with equal scores; failed: pairs left out.
    """

    judge: str
    accuracy: float
    ci95: Interval | None
    pairs: int
    groups: int
    ties: int
    failed: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name in ("judge", "accuracy", "ci95", "pairs", "groups", "ties", "failed")
            for value in [getattr(self, name)]
        }


def groups_of(pairs: Sequence[Preference]) -> list[str]:
    """What must stay together in a resample: the group, else the prompt; the pair itself where all are of one."""
    named = [str(pair.context.get("group", pair.chosen.prompt)) for pair in pairs]
    return named if len(set(named)) > 1 else [pair.item_id for pair in pairs]


def scorer_agreement(name: str, scorer: Scorer, pairs: Sequence[Preference], *, batch_size: int = 32) -> Agreement:
    """A scorer's accuracy on pairs of pictures, by its main number.

    Raises:
        UserError: the pairs are of texts, or none could be scored.
    """
    margins: list[float | None] = []
    with Progress(len(pairs), f"score with {name}", unit="pair") as shown:
        for start in range(0, len(pairs), batch_size):
            some = pairs[start : start + batch_size]
            sides = [side for pair in some for side in (pair.chosen, pair.rejected)]
            pictures = []
            for side in sides:
                if not isinstance(side.response, Media):
                    raise UserError("these pairs are of texts, which picture scorers cannot judge", place=name)
                pictures.append(side.response.open)
            rows = score_each(scorer, [side.prompt for side in sides], pictures)
            values = [row.numbers.get(scorer.main) for row in rows]
            for chosen, rejected in zip(values[::2], values[1::2], strict=True):
                margins.append(None if chosen is None or rejected is None else chosen - rejected)
            shown.update(len(some))
    kept = [(group, margin) for group, margin in zip(groups_of(pairs), margins, strict=True) if margin is not None]
    if not kept:
        raise UserError(f"{scorer.identity} could score no pair", place=name)
    groups = [group for group, _ in kept]
    hits = np.array([0.5 if margin == 0 else float(margin > 0) for _, margin in kept])
    clusters = len(set(groups))
    return Agreement(
        judge=f"{name} ({scorer.identity})",
        accuracy=float(hits.mean()),
        ci95=share_interval(hits, groups) if clusters > 1 else None,
        pairs=len(kept),
        groups=clusters,
        ties=int((hits == 0.5).sum()),
        failed=len(pairs) - len(kept),
    )
