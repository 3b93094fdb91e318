"""What a scorer is, and how one is found: by the name of its file in `evaluators/scorers/`.

A scorer maps (prompt, picture) to named numbers. The same object is used as reward, labeller, filter and metric, so a
number means the same everywhere. Each file has a `CARD`, which says what the scorer is before any weights are looked
for, and a `build`, which makes one.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from evaluators.weights import Weights
from mmalign.errors import UserError, nearest, reason


@runtime_checkable
class Scorer(Protocol):
    """Scores pictures.

    `numbers` names all that it may give, `main` the one that is the score. `identity` is stored with every number:
    `id@version`, and `#` with the first digits of a hash where there are weights; the same identity is the same number.
    """

    @property
    def identity(self) -> str: ...

    @property
    def main(self) -> str: ...

    @property
    def numbers(self) -> tuple[str, ...]: ...

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """Named numbers for each (prompt, picture). A picture's numbers do not depend on the rest of the batch."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A scorer before it is loaded.

    Attributes:
        unit: of the main number, with its usual range.
        licence: of what the numbers are made by, the weights' own included.
        weights: what it loads; none for scorers that are rules.
        needs: packages it cannot do without and that only an extra brings.
        asks: options that must be said.
    """

    unit: str
    licence: str
    weights: tuple[Weights, ...] = ()
    needs: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()


def known() -> list[str]:
    """The scorers there are."""
    return sorted(path.stem for path in (Path(__file__).parent / "scorers").glob("[a-z]*.py"))


def _module(name: str) -> Any:
    if name not in known():
        raise UserError(f"no scorer '{name}'", fix=nearest(name, known()))
    return importlib.import_module(f"evaluators.scorers.{name}")


def card(name: str) -> Card:
    """What the scorer of a name is.

    Raises:
        UserError: no such scorer.
    """
    found: Card = _module(name).CARD
    return found


def load(name: str, options: Mapping[str, Any] | None = None) -> Scorer:
    """The scorer of a name, built with its options.

    Raises:
        UserError: no such scorer, it does not take these options, or its weights are missing or wrong.
    """
    module = _module(name)
    try:
        scorer: Scorer = module.build(**(options or {}))
    except TypeError as error:
        raise UserError(f"scorer '{name}' does not take these options: {error}") from error
    return scorer


def main_scores(scorer: Scorer, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
    """The scorer's main number per picture; anything but a finite number is refused."""
    values = [float(row[scorer.main]) for row in scorer.score_images(prompts, images)]
    if len(values) != len(images):
        raise UserError(f"{scorer.identity} returned {len(values)} scores for {len(images)} pictures")
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise UserError(f"{scorer.identity} returned {value}", place=f"picture {index}: {prompts[index]!r}")
    return values


# ------------------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A picture's numbers, or why it has none. Never both, and never a number that stands for a failure."""

    numbers: dict[str, float] = field(default_factory=dict)
    error: str | None = None


def score_each(
    scorer: Scorer, prompts: Sequence[str], images: Sequence[Image.Image | Callable[[], Image.Image]]
) -> list[Scored]:
    """One row per picture, whatever is wrong with some: a bad one gives a row with an error and spoils no other.

    Args:
        images: pictures, or what opens them (`Media.open`), so that a file that cannot be decoded is a row as well.
            `UserError` and what Pillow raises over a damaged file are errors of the row; anything else is a bug.
    """
    if len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} pictures")
    rows: list[Scored | None] = [None] * len(images)
    opened: dict[int, Image.Image] = {}
    for index, image in enumerate(images):
        try:
            opened[index] = image if isinstance(image, Image.Image) else image()
            opened[index].load()  # Pillow decodes late: damage shows here
        except (UserError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            opened.pop(index, None)
            rows[index] = Scored(error=reason(error))
    for index, row in _score_opened(scorer, prompts, opened).items():
        rows[index] = row
    return [row if row is not None else Scored(error="not scored") for row in rows]


def _score_opened(scorer: Scorer, prompts: Sequence[str], images: Mapping[int, Image.Image]) -> dict[int, Scored]:
    """All at once; in halves only when that is refused, to find which of them are meant."""
    if not images:
        return {}
    try:
        given = scorer.score_images([prompts[index] for index in images], list(images.values()))
    except UserError as error:
        if len(images) == 1:
            return {index: Scored(error=reason(error)) for index in images}
        found: dict[int, Scored] = {}
        names = list(images)
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            found |= _score_opened(scorer, prompts, {index: images[index] for index in half})
        return found
    if len(given) != len(images):
        raise UserError(f"{scorer.identity} returned {len(given)} scores for {len(images)} pictures")
    return {index: _checked(scorer, numbers) for index, numbers in zip(images, given, strict=True)}


def _checked(scorer: Scorer, numbers: Mapping[str, float]) -> Scored:
    for name, value in numbers.items():
        if not math.isfinite(value):
            return Scored(error=f"{scorer.identity} returned {name} = {value}")
    return Scored(numbers=dict(numbers))
