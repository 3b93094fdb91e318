"""The arms of a comparison: each is a recipe and what is changed in it, and one may start where another ended.

arms:
  povid: ["loop.init_from=arm:stage1"]       from the last checkpoint of the arm stage1
  stage1: ["method={name: povid, stage: 1}"]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmalign import checkpoint
from mmalign.errors import UserError, nearest

_FROM = "loop.init_from=arm:"


def origin(words: Sequence[str]) -> str | None:
    """The arm that an arm starts from, if any."""
    return next((word.removeprefix(_FROM) for word in reversed(words) if word.startswith(_FROM)), None)


def ordered(arms: Mapping[str, Sequence[str]]) -> list[str]:
    """The arms in an order in which each comes after what it starts from, else as they are.

    Raises:
        UserError: an arm starts from one that is not there, or in a circle.
    """
    found: list[str] = []
    for arm in arms:
        chain = [arm]
        while (before := origin(arms[chain[-1]])) is not None:
            if before not in arms:
                raise UserError(f"no arm '{before}' to start from", place=f"arm {chain[-1]}", fix=nearest(before, arms))
            if before in chain:
                raise UserError("arms that start from one another", place=f"arm {arm}")
            chain.append(before)
        found += [one for one in reversed(chain) if one not in found]
    return found


def resolved(words: Sequence[str], folder: Callable[[str], Path]) -> list[str]:
    """The same key=value with arms to start from as checkpoints.

    Args:
        folder: of an arm's run.

    Raises:
        UserError: that run has no checkpoint.
    """

    def resolve(word: str) -> str:
        if not word.startswith(_FROM):
            return word
        run = folder(word.removeprefix(_FROM))
        found = checkpoint.latest(run)
        if found.path is None:
            raise UserError("no checkpoint to start from", place=str(run), fix="Train that arm first.")
        return f"loop.init_from={found.path}"

    return [resolve(word) for word in words]
