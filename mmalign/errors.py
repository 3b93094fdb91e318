"""The one kind of error a user sees: a single line with the cause, the place and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave us (a config, a dataset, a path, a checkpoint), never a bug.

    Printed as one line by every entry point, which then exits with code 2.

    Args:
        cause: what is wrong, in the user's terms.
        place: file, row, field or key where it is wrong.
        fix: what to do about it, as a sentence.
    """

    def __init__(self, cause: str, *, place: str | None = None, fix: str | None = None) -> None:
        self.cause, self.place, self.fix = cause, place, fix
        where = f" ({place})" if place else ""
        then = f". {fix}" if fix else ""
        super().__init__(" ".join(f"{cause}{where}{then}".split()))


def reason(error: BaseException) -> str:
    """The first line of a library's message, short enough for ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(". ")


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint for a mistyped name: the closest valid one, or the whole list when none is close."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."
