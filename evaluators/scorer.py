"""What a scorer is, and how one is found: by the name of its file in `evaluators/scorers/`.

A scorer maps (prompt, picture, context) to named numbers. The same object is used as reward, labeller, filter and
metric, so a number means the same everywhere.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from mmalign.errors import UserError, nearest


@runtime_checkable
class Scorer(Protocol):
    """Scores pictures.

    `numbers` names all that it may give, `main` the one that is the score; `identity` as `id@version` is stored with
    every number.
    """

    @property
    def identity(self) -> str: ...

    @property
    def main(self) -> str: ...

    @property
    def numbers(self) -> tuple[str, ...]: ...

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """Named numbers for each (prompt, picture). A picture's numbers do not depend on the rest of the batch."""
        ...


def known() -> list[str]:
    """The scorers there are."""
    return sorted(path.stem for path in (Path(__file__).parent / "scorers").glob("[a-z]*.py"))


def load(name: str, options: Mapping[str, Any] | None = None) -> Scorer:
    """The scorer of a name, built with its options.

    Raises:
        UserError: no such scorer, or it does not take these options.
    """
    if name not in known():
        raise UserError(f"no scorer '{name}'", fix=nearest(name, known()))
    module = importlib.import_module(f"evaluators.scorers.{name}")
    try:
        scorer: Scorer = module.build(**(options or {}))
    except TypeError as error:
        raise UserError(f"scorer '{name}' does not take these options: {error}") from error
    return scorer


def main_scores(scorer: Scorer, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
    """The scorer's main number per picture; anything but a finite number is refused."""
    values = [float(row[scorer.main]) for row in scorer.score(prompts, images)]
    if len(values) != len(images):
        raise UserError(f"{scorer.identity} returned {len(values)} scores for {len(images)} pictures")
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise UserError(f"{scorer.identity} returned {value}", place=f"picture {index}: {prompts[index]!r}")
    return values
