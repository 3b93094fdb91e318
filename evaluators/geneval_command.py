"""`mmalign eval geneval DETECTIONS`: GenEval's rules on the boxes that any detector found.

A line of DETECTIONS is a picture; `evaluators/geneval.py` says what is in it:

    {"prompt": "a dog left of a bench", "tag": "position",
     "include": [{"class": "bench", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
     "detections": [{"class": "dog", "score": 0.93, "box": [x0, y0, x1, y1], "color": "brown"}]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mmalign.cli import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign eval geneval DETECTIONS`: the numbers of a file of detections."""
    parser = Parser(prog="mmalign eval geneval", description=__doc__)
    parser.add_argument("detections", type=Path, help="JSON lines, a picture each")
    parser.add_argument("--threshold", type=float, help="confidence from which a box counts (default: 0.3)")
    parser.add_argument("--counting-threshold", type=float, help="the same for prompts about numbers (default: 0.9)")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    said = parser.parse_args(argv)

    from evaluators.geneval import COUNTING_THRESHOLD, THRESHOLD, measure, read_pictures
    from evaluators.hallucination.estimate import table

    threshold = THRESHOLD if said.threshold is None else said.threshold
    counting = COUNTING_THRESHOLD if said.counting_threshold is None else said.counting_threshold
    numbers = measure(read_pictures(said.detections, threshold=threshold, counting=counting))
    print(json.dumps({name: one.as_json() for name, one in numbers.items()}) if said.json else table(numbers))
    return 0
