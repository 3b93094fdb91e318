"""Does a judge prefer what people preferred? The accuracy of scorers, and of what a run learned, on pairs.

    margin   = score(chosen) - score(rejected), or the difference of a tuned model's implicit rewards
    accuracy = share of pairs with margin > 0, margins of 0 half

Beside it stand the three published definitions of accuracy (`evaluators.accuracy`); PickScore's alone uses pairs that
the labels call ties. Pairs that cannot be judged are counted and left out. The interval keeps the pairs of one group
together: of the named group, else of the same pictures asked about, else of the same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evaluators.accuracy import TIE, Published, published
from evaluators.scorer import Scorer, score_each
from mmalign.errors import UserError
from mmalign.media import Media
from mmalign.progress import Progress
from mmalign.records import Preference, Side
from mmalign.statistics import Interval, share_interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How runs are asked.

    Attributes:
        batch_size: pairs per forward; changes nothing in their margins but rounding.
        draws: (timestep, noise) draws per pair, where a run's rewards are estimates.
        seed: of the draws.
    """

    batch_size: int
    draws: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Of one judge with the labels of pairs.

    Attributes:
        margin_mean: over the pairs that were judged.
        ties: pairs with a margin of 0; failed: pairs left out.
        published: the accuracies that papers report.
        margins: of all pairs in their order; None: left out.
    """

    judge: str
    accuracy: float
    ci95: Interval | None
    margin_mean: float
    pairs: int
    groups: int
    ties: int
    failed: int
    published: Published
    margins: tuple[float | None, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the margins."""
        plain = {
            name: list(value) if isinstance(value, tuple) else value
            for name in ("judge", "accuracy", "ci95", "margin_mean", "pairs", "groups", "ties", "failed")
            for value in [getattr(self, name)]
        }
        return {**plain, "published": asdict(self.published)}


def groups_of(pairs: Sequence[Preference]) -> list[str]:
    """What must stay together: the group, else the pictures asked about, else the prompt; where all is one, pairs."""
    named = [str(pair.context.get("group", _asked(pair.a))) for pair in pairs]
    return named if len(set(named)) > 1 else [pair.item_id for pair in pairs]


def _asked(side: Side) -> str:
    return " ".join(media.sha256() for media in side.media) or side.prompt


def agreement(judge: str, margins: Sequence[float | None], pairs: Sequence[Preference]) -> Agreement:
    """A judge's accuracy from its margins.

    Args:
        margins: of the pairs, in their order; None for those that it could not judge, of which not all may be.

    Raises:
        UserError: a margin is not a finite number, or no label of a pair that could be judged takes a side.
    """
    labels = [pair.ordered()[2] for pair in pairs]
    rows = zip(groups_of(pairs), pairs, labels, margins, strict=True)
    judged = [(group, pair, label, margin) for group, pair, label, margin in rows if margin is not None]
    groups, values = [group for group, *_ in judged], np.array([margin for *_, margin in judged])
    prompts = [(pair.a.prompt, *(media.sha256() for media in pair.a.media)) for _, pair, _, _ in judged]
    confidence = np.array([label for _, _, label, _ in judged])
    if broken := int((~np.isfinite(values)).sum()):
        raise UserError(f"{broken} of {len(values)} margins are no finite numbers", place=judge)
    sided = confidence != TIE
    if not sided.any():
        raise UserError(f"all {len(sided)} pairs that could be judged are ties by their labels", place=judge)
    of_sided = [group for group, one in zip(groups, sided, strict=True) if one]
    hits = np.heaviside(values[sided], 0.5)
    clusters = len(set(of_sided))
    return Agreement(
        judge=judge,
        accuracy=float(hits.mean()),
        ci95=share_interval(hits, of_sided) if clusters > 1 else None,
        margin_mean=float(values[sided].mean()),
        pairs=int(sided.sum()),
        groups=clusters,
        ties=int((values[sided] == 0).sum()),
        failed=len(pairs) - len(judged),
        published=published(values, confidence, prompts, groups),
        margins=tuple(margins),
    )


def scorer_agreement(name: str, scorer: Scorer, pairs: Sequence[Preference], *, batch_size: int = 32) -> Agreement:
    """A scorer's accuracy on pairs of pictures, by its main number.

    Raises:
        UserError: the pairs are of texts, or none could be scored.
    """
    margins: list[float | None] = []
    with Progress(len(pairs), f"score with {name}", unit="pair") as shown:
        for start in range(0, len(pairs), batch_size):
            some = pairs[start : start + batch_size]
            sides = [side for pair in some for side in pair.ordered()[:2]]
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
    if all(margin is None for margin in margins):
        raise UserError(f"{scorer.identity} could score no pair", place=name)
    return agreement(f"{name} ({scorer.identity})", margins, pairs)
