"""The recipe section that says which preferences are trained on, and the pairs it comes to.

Imports nothing heavy before pairs are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmalign.config import Settings
from mmalign.errors import UserError
from mmalign.pairing import Pairing, PairingSummary, Strategy, make_pairs
from mmalign.records import Label, Preference


class PairingSettings(Settings):
    """How pairs are made from records; see `mmalign.pairing.Pairing`."""

    strategy: Strategy = Field(
        default="auto",
        description="by votes, best against worst, all pairs, or unpaired: desirable pictures beside undesirable ones",
    )
    score: str | None = Field(default=None, description="the score to compare by; null: the only one there is")
    min_gap: float = Field(default=0.0, ge=0, description="pairs with a smaller difference are left out")
    max_gap: float | None = Field(default=None, description="pairs with a larger one are left out")
    ties: Literal["drop", "soft"] = Field(
        default="drop", description="drop, or soft: a coin flip for losses with soft labels"
    )
    spread: float | None = Field(
        default=None,
        gt=0,
        description="pairs by scores have probability sigmoid(gap / spread), for losses with soft labels; null: sure",
    )
    max_pairs_per_prompt: int | None = Field(default=None, gt=0, description="a seeded draw from prompts with more")
    seed: int = Field(default=0, ge=0, description="of that draw, and of which unpaired pictures meet")
    threshold: float | None = Field(
        default=None, description="unpaired pictures are desirable from this score on; null: from the middle"
    )

    def build(self) -> Pairing:
        """The core's description of the same."""
        return Pairing(**dict(self))


class PairDataSettings(Settings):
    """Which preferences."""

    path: Annotated[Path, Field(strict=False)] = Field(description="a preference store")
    split: str = Field(default="train", description="of the store")
    pairing: PairingSettings = PairingSettings()
    shuffle_labels: bool = Field(default=False, description="the control: labels by coin flip teach nothing")
    draw_labels: bool = Field(
        default=False, description="labels drawn with the probability of pairing.spread, like a rater's who errs"
    )

    @model_validator(mode="after")
    def _drawn_from_something(self) -> PairDataSettings:
        if self.draw_labels and self.pairing.spread is None:
            raise ValueError("draw_labels needs pairing.spread, which says how probable a label is")
        return self


def read_pairs(settings: PairDataSettings, seed: int) -> tuple[list[Preference], str]:
    """The pairs that a recipe's data section describes, and a line about how they were made.

    Raises:
        UserError: no store there, or pairs that its records do not make.
    """
    from mmalign.preferences import Store

    if not settings.path.exists():
        raise UserError(
            "no preference store here",
            place=f"data.path={settings.path}",
            fix="Make one with 'mmalign data import', or say in the recipe how it is made.",
        )
    store = Store.open(settings.path)
    summary = PairingSummary()
    pairs = list(make_pairs(store.records(split=settings.split), settings.pairing.build(), summary))
    if settings.draw_labels:
        pairs = [_drawn(pair, seed) for pair in pairs]
    return (shuffled(pairs, seed) if settings.shuffle_labels else pairs), str(summary)


def shuffled(pairs: Sequence[Preference], seed: int) -> list[Preference]:
    """The pairs with labels by coin flip, each by its own."""
    from mmalign.randomness import key_seed

    coin = [key_seed("shuffled label", seed, pair.item_id) & 1 for pair in pairs]
    return [pair.flip() if heads else pair for pair, heads in zip(pairs, coin, strict=True)]


DRAWN = "label_probability"  # in a pair's provenance: of the label that was drawn


def _drawn(pair: Preference, seed: int) -> Preference:
    from mmalign.randomness import key_seed

    probability = pair.ordered()[2]
    agrees = key_seed("drawn label", seed, pair.item_id) % 2**32 / 2**32 < probability
    about = {**pair.provenance, DRAWN: probability if agrees else 1 - probability}
    label: Label = "a" if pair.label == "tie" else pair.label  # who must choose flips a coin
    sure = replace(pair, label=label, confidence=None, gap=None, provenance=about)
    return sure if agrees else sure.flip()


def best_agreement(pair: Preference) -> float:
    """How probably the best judge there could be agrees with the label: one who prefers the more probable side.

    Known where the label was drawn from its probability; otherwise what the label's confidence allows.
    """
    if DRAWN in pair.provenance:
        probability = float(pair.provenance[DRAWN])
        return 0.5 if probability == 0.5 else float(probability > 0.5)
    confidence = pair.ordered()[2]
    return max(confidence, 1 - confidence)
