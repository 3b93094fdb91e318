"""`python -m evaluators.hallucination MEASURE`: the published measures on files in their published formats."""

from __future__ import annotations

import sys

from evaluators.hallucination.command import add_measures, measured, said_of
from mmalign.cli import Parser, run_entry


def main(argv: list[str] | None = None) -> int:
    """Print the numbers of files of answers, with 95 % intervals clustered by image."""
    parser = Parser(prog="python -m evaluators.hallucination", description=__doc__)
    add_measures(parser)
    said = parser.parse_args(argv)
    print(said_of(measured(said), as_json=said.json))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
