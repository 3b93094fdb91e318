"""`mmalign eval KIND ...`: the evaluations, each found by name when it is asked for.

mmalign eval t2i MODEL ... --out FOLDER     base against tuned models: pictures, scores, comparison
mmalign eval preference --store STORE       who ranks held-out pairs as people did: runs and scorers
mmalign eval vlm MEASURE ...                POPE, CHAIR, AMBER, MME, MMHal, of answers or of a model
mmalign eval geneval DETECTIONS             GenEval's rules on what any detector found
"""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.cli import resolve
from mmalign.errors import UserError, nearest

KINDS = {
    "t2i": "diffusion.evaluate:main",
    "preference": "diffusion.ranking:main",
    "vlm": "vlm.evaluate:main",
    "geneval": "evaluators.geneval:main",
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Hand the rest of the words to the evaluation that the first one names."""
    words = list(argv or [])
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: mmalign eval {{{','.join(KINDS)}}} ...\n\n{(__doc__ or '').strip()}")
        return 0
    if words[0] not in KINDS:
        raise UserError(f"mmalign eval: unknown '{words[0]}'", fix=nearest(words[0], KINDS))
    return resolve(KINDS[words[0]])(words[1:])
