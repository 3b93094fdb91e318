"""`mmalign scorers`: what there is to score with, its unit and licence, and where its weights are looked for.

    mmalign scorers
    mmalign scorers pickscore hpsv2 --weights /data/weights

Weights are looked for in the folder of weights, then in the local hub cache; the hub is asked only when
MMALIGN_DOWNLOAD=1 or a scorer's `download` option allows it.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.errors import UserError, nearest

if TYPE_CHECKING:
    from evaluators.weights import Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """A scorer and whether it can be loaded here and now.

    Attributes:
        missing: weights that are nowhere, and packages that are not installed, in words.
        places: of the weights: where they are, or where they were looked for.
        asks: options that must be said.
    """

    name: str
    unit: str
    licence: str
    missing: tuple[str, ...]
    places: tuple[str, ...]
    asks: tuple[str, ...]

    @property
    def loadable(self) -> bool:
        """Nothing is missing."""
        return not self.missing


def listed(name: str) -> Listed:
    """What is known of a scorer without loading it.

    Raises:
        UserError: no such scorer.
    """
    from evaluators import scorer, weights

    card = scorer.card(name)
    places, missing = [], [f"the package {need}" for need in card.needs if importlib.util.find_spec(need) is None]
    for one in card.weights:
        found = weights.local(one)
        if found is None:
            missing.append(one.described)
        places.append(str(found) if found is not None else _looked_for(one))
    return Listed(
        name=name,
        unit=card.unit,
        licence=card.licence,
        missing=tuple(missing),
        places=tuple(places),
        asks=card.asks,
    )


def _looked_for(one: Weights) -> str:
    from evaluators import weights

    file = f"/{one.file}" if one.file else ""
    own = weights.places(one)
    below = str(own[0]) if own else f"${weights.FOLDER}/{one.name}{file}"
    return below if one.page is not None else f"{below}, or {one.repo}{file} in the hub cache"


def summary() -> str:
    """One line for `mmalign doctor`."""
    from evaluators import scorer, weights

    rows = [listed(name) for name in scorer.known()]
    ready = [row.name for row in rows if row.loadable]
    folder = weights.folder_of_weights()
    place = f"${weights.FOLDER} is {folder}" if folder else f"${weights.FOLDER} is not set"
    return f"{len(ready)} of {len(rows)} loadable ({', '.join(ready)}); {place}; see `mmalign scorers`"


def main(argv: list[str]) -> int:
    """Print the scorers."""
    from mmalign.cli import Parser

    parser = Parser(prog="mmalign scorers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    parser.add_argument(
        "--weights", type=Path, metavar="FOLDER", help="the folder of weights; by default $MMALIGN_WEIGHTS"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args(argv)
    from evaluators import scorer, weights

    if arguments.weights is not None:
        if not arguments.weights.is_dir():
            raise UserError("there is no such folder", place=f"--weights {arguments.weights}")
        os.environ[weights.FOLDER] = str(arguments.weights)
    known = scorer.known()
    for name in arguments.names:
        if name not in known:
            raise UserError(f"no scorer '{name}'", fix=nearest(name, known))
    rows = [listed(name) for name in arguments.names or known]
    print(_json(rows) if arguments.json else "\n\n".join(map(_text, rows)))
    return 0


def _text(row: Listed) -> str:
    lines = [
        f"{row.name}  {'loadable' if row.loadable else 'not loadable'}",
        f"  unit     {row.unit}",
        f"  licence  {row.licence}",
    ]
    lines += [f"  asks for {option}" for option in row.asks]
    lines += [f"  weights  {place}" for place in row.places]
    lines += [f"  missing  {what}" for what in row.missing]
    return "\n".join(lines)


def _json(rows: list[Listed]) -> str:
    names = ("name", "unit", "licence", "loadable", "asks", "places", "missing")
    return json.dumps([{name: getattr(row, name) for name in names} for row in rows], indent=2)
