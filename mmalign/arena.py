"""`mmalign arena`: the voting page, of what was made before or, as `mmalign arena live`, of pairs drawn meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.cli import resolve

LIVE = "live"


def main(argv: Sequence[str] | None = None) -> int | None:
    """`mmalign arena [live] ...`."""
    words = list(argv or [])
    if words[:1] == [LIVE]:
        return resolve("diffusion.live:main")(words[1:])
    return resolve("evaluators.arena.command:main")(words)
