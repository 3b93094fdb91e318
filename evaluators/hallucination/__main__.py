"""`python -m evaluators.hallucination chair|pope`: the published measures on files in their published formats."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from evaluators.hallucination import chair, pope
from evaluators.hallucination.estimate import table
from mmalign.cli import Parser, run_entry


def main(argv: list[str] | None = None) -> int:
    """Print the numbers of one file of captions or answers, with 95 % intervals clustered by image."""
    parser = Parser(prog="python -m evaluators.hallucination", description=__doc__)
    measures = parser.add_subparsers(dest="measure", required=True)

    captions = measures.add_parser("chair", help="objects that captions name and pictures do not have")
    captions.add_argument("captions", type=Path, help="captions: JSON list or lines of {image_id, caption}")
    captions.add_argument(
        "--annotations", type=Path, nargs="+", required=True, help="COCO instances and captions files"
    )
    captions.add_argument("--synonyms", type=Path, required=True, help="a line per object: name, synonym, ...")
    captions.add_argument("--every-compound", action="store_true", help="join every two-word synonym, not only COCO's")

    answers = measures.add_parser("pope", help="yes/no questions about objects")
    answers.add_argument("answers", type=Path, help="JSON lines of {question_id, text} or {question, answer}")
    answers.add_argument(
        "--questions", type=Path, required=True, help="JSON lines of {question_id, image, text, label}"
    )
    answers.add_argument("--parser", choices=list(pope.PARSERS), default="published", help="how answers are read")

    for one in (captions, answers):
        one.add_argument("--json", action="store_true", help="machine-readable")
    said = parser.parse_args(argv)
    if said.measure == "chair":
        numbers = chair.measure_files(
            said.captions, said.annotations, said.synonyms, every_compound=said.every_compound
        )
    else:
        numbers = pope.measure_files(said.questions, said.answers, parser=said.parser)
    print(json.dumps({name: one.as_json() for name, one in numbers.items()}) if said.json else table(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
