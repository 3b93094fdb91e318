"""Several scorers as one: the weighted sum of their standardised numbers.

    composite = sum over terms of weight (value - mean) / std

The terms are those of a recipe's `reward` (`evaluators.rewards`), here with `mean` and `std` given: a composite that
took them from the pictures at hand would give a picture another number in other company.

    {name: composite, terms: [{name: pick, scorer: {name: pickscore}, mean: 21.0, std: 1.2},
                              {name: size, scorer: {name: jpeg}, weight: -0.1, mean: 60, std: 20}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from pydantic import ValidationError

from evaluators.scorer import Card
from mmalign.errors import UserError

CARD = Card(unit="weighted standard deviations", licence="the terms'", asks=("terms, each with its mean and std",))


class Composite:
    """See the module's docstring. Beside the sum it gives each term's value, in its own unit."""

    main = "composite"

    def __init__(self, terms: Sequence[Mapping[str, Any]]) -> None:
        from evaluators.rewards import Reward, RewardSettings

        try:
            settings = RewardSettings.model_validate({"terms": tuple(dict(term) for term in terms)})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise UserError(f"composite: {first['msg'].removeprefix('Value error, ')}", place=place) from error
        bare = [term.name for term in settings.terms if term.mean is None]
        if bare:
            fix = "Give both; mean 0 with std 1 keeps its own unit."
            raise UserError(f"composite: term '{bare[0]}' has no mean and std", place="terms", fix=fix)
        if "composite" in (names := [term.name for term in settings.terms]):
            raise UserError("composite: a term may not be called 'composite'", place="terms")
        self._reward = Reward(settings)
        self.numbers: tuple[str, ...] = ("composite", *names)
        self.identity = f"composite@1[{self._reward.identity}]"

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """See `Scorer`."""
        scores = self._reward.score(prompts, images)
        return [
            {"composite": total, **{name: values[index] for name, values in scores.parts.items()}}
            for index, total in enumerate(scores.total)
        ]


def build(terms: Sequence[Mapping[str, Any]]) -> Composite:
    """The weighted sum of `terms`."""
    return Composite(terms)
