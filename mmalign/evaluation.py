"""`mmalign eval KIND ...`: the evaluations, each found by name when it is asked for.

mmalign eval t2i MODEL ... --out FOLDER     base against tuned models: pictures, scores, comparison
mmalign eval preference --store STORE       who ranks held-out pairs as people did: runs and scorers
mmalign eval vlm MEASURE ...                POPE, CHAIR, AMBER, MME, MMHal, of answers or of a model
mmalign eval geneval DETECTIONS             GenEval's rules on what any detector found
"""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.cli import Parser, resolve

KINDS = {
    "t2i": "diffusion.evaluation:main",
    "preference": "evaluators.preference:main",
    "vlm": "vlm.evaluation:main",
    "geneval": "evaluators.geneval_command:main",
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Hand the rest of the words to the evaluation that the first one names."""
    words = list(argv or [])
    parser = Parser(prog="mmalign eval", description=__doc__)
    parser.add_argument("kind", choices=list(KINDS))
    kind: str = parser.parse_args(words[:1]).kind
    return resolve(KINDS[kind])(words[1:])
