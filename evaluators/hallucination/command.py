"""The measures on the command line: of answers in their published files. `mmalign eval vlm` adds models that answer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.cli import Parser
from mmalign.errors import UserError

if TYPE_CHECKING:
    from evaluators.hallucination.estimate import Estimate


def add_measures(parser: Parser) -> Mapping[str, argparse.ArgumentParser]:
    """A subcommand per measure; the answers' file may be left out by who makes it."""
    measures = parser.add_subparsers(dest="measure", required=True)

    captions = measures.add_parser("chair", help="objects that captions name and pictures do not have")
    captions.add_argument("answers", type=Path, nargs="*", help="captions: JSON list or lines of {image_id, caption}")
    captions.add_argument(
        "--annotations", type=Path, nargs="+", required=True, help="COCO instances and captions files"
    )
    captions.add_argument("--synonyms", type=Path, required=True, help="a line per object: name, synonym, ...")
    captions.add_argument("--every-compound", action="store_true", help="join every two-word synonym, not only COCO's")

    answers = measures.add_parser("pope", help="yes/no questions about objects; one file per split")
    answers.add_argument(
        "answers", type=Path, nargs="*", help="JSON lines of {question_id, text} or {question, answer}"
    )
    answers.add_argument(
        "--questions", type=Path, nargs="+", required=True, help="JSON lines of {question_id, image, text, label}"
    )
    answers.add_argument(
        "--parser",
        default="published",
        help="how answers are read: published (default) or strict; of other harnesses: lmms-eval, vlmevalkit",
    )

    both = measures.add_parser("amber", help="descriptions and yes/no questions with the benchmark's own files")
    both.add_argument("answers", type=Path, nargs="*", help='[{"id", "response"}]')
    both.add_argument("--annotations", type=Path, required=True, help="annotations.json")
    both.add_argument("--words", type=Path, nargs=2, metavar=("RELATION", "SAFE"), help="for descriptions")
    both.add_argument("--queries", type=Path, help="the query file: answers about one picture are a cluster")

    tasks = measures.add_parser("mme", help="two yes/no questions per picture in 14 tasks")
    tasks.add_argument("answers", type=Path, nargs="*", help="a folder of TASK.txt: image, question, truth, answer")

    rated = measures.add_parser("mmhal", help="ratings 0 to 6 by any judge")
    rated.add_argument("answers", type=Path, nargs="*", help="the judge's file, a judgement per question")
    rated.add_argument("--questions", type=Path, help="the benchmark's file: answers about one picture are a cluster")
    rated.add_argument(
        "--rule", default="counted", help="a judgement without a rating: counted (left out, default), or published (0)"
    )
    every = {"chair": captions, "pope": answers, "amber": both, "mme": tasks, "mmhal": rated}
    for one in every.values():
        one.add_argument("--json", action="store_true", help="machine-readable")
    return every


def measured(said: argparse.Namespace) -> dict[str, Estimate]:
    """The numbers of the files that were named.

    Raises:
        UserError: no answers, or a file is wrong.
    """
    if not said.answers:
        raise UserError("there are no answers", fix="Name the file that has them.")
    from evaluators.hallucination import amber, chair, mme, mmhal

    if said.measure == "pope":
        return _splits(said)
    if len(said.answers) > 1:
        raise UserError(f"{said.measure} reads one file of answers, got {len(said.answers)}")
    (answers,) = said.answers
    if said.measure == "chair":
        return chair.measure_files(answers, said.annotations, said.synonyms, every_compound=said.every_compound)
    if said.measure == "amber":
        relation, safe = said.words or (None, None)
        return amber.measure_files(answers, said.annotations, relation, safe, said.queries)
    if said.measure == "mme":
        return mme.measure_files(answers)
    return mmhal.measure_files(answers, said.questions, rule=said.rule)


def _splits(said: argparse.Namespace) -> dict[str, Estimate]:
    """POPE's numbers; of several splits `SPLIT/number`, and the mean over splits, which is what tables report."""
    from evaluators.hallucination import pope
    from evaluators.hallucination.estimate import Estimate

    if len(said.questions) != len(said.answers):
        raise UserError(
            f"{len(said.answers)} files of answers for {len(said.questions)} of questions",
            fix="Give one for each split, in the same order.",
        )
    found = {
        questions.stem: pope.measure_files(questions, answers, parser=said.parser)
        for questions, answers in zip(said.questions, said.answers, strict=True)
    }
    if len(found) < len(said.questions):
        raise UserError("two files of questions have the same name", place="--questions")
    if len(found) == 1:
        return next(iter(found.values()))
    numbers = {f"{split}/{name}": one for split, by in found.items() for name, one in by.items()}
    for name in pope.NUMBERS:
        each = [by[name] for by in found.values()]
        values = [one.value for one in each if one.value is not None]
        mean = sum(values) / len(values) if len(values) == len(each) else None
        # splits ask about the same pictures: an interval of the mean would need their questions together
        numbers[f"mean/{name}"] = Estimate(
            value=mean, ci95=None, n=sum(one.n for one in each), images=max(one.images for one in each)
        )
    return numbers


def said_of(numbers: Mapping[str, Estimate], *, as_json: bool) -> str:
    """The numbers as a table or as JSON."""
    from evaluators.hallucination.estimate import table

    return json.dumps({name: one.as_json() for name, one in numbers.items()}) if as_json else table(numbers)
