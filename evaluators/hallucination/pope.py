"""POPE (Li et al. 2305.10355): yes/no questions about objects, half of them about absent ones.

Questions: JSON lines `{"question_id", "image", "text", "label"}`, label "yes" or "no", as the authors publish them.
Answers: JSON lines in the order of the questions (`{"question", "answer"}`, the authors') or by id (`{"question_id",
"text"}`, LLaVA's).

"Yes" is the positive class. With TP, FP, TN, FN over all questions:

    accuracy (TP + TN) / N    precision TP / (TP + FP)    recall TP / P    F1 2 TP / (2 TP + FP + FN)
    yes_ratio (TP + FP) / N   of the answers, never of the labels      unparsed    answers that are neither

An answer that is neither is wrong, is not a "yes", and so misses its object when there is one: FN = P - TP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from evaluators.hallucination import files
from evaluators.hallucination.estimate import Estimate, share
from mmalign.errors import UserError, nearest

Name = TypeVar("Name", bound=Hashable)
NUMBERS = ("accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question, its label (whether the true answer is yes) and the picture it is about."""

    question_id: str
    image: str
    text: str
    label: bool


# ------------------------------------------------------------------------------------------ answers


def published(answer: str) -> bool | None:
    """The authors' rule: before the first full stop, without commas, a word "No", "not" or "no" means no, else yes.

    So nothing is ever unparsed, and "NO", "none" and an empty answer are a yes.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def strict(answer: str) -> bool | None:
    """ "yes" or "no", in any case, perhaps with a final full stop or exclamation mark, and nothing else; or None."""
    said = re.sub(r"[.!]$", "", answer.strip()).lower()
    return {"yes": True, "no": False}.get(said)


def lmms_eval(answer: str) -> bool | None:
    """lmms-eval's rule: "yes" or "no" in any case and nothing else, so that "Yes." is neither."""
    return {"yes": True, "no": False}.get(answer.strip().lower())


def vlmevalkit(answer: str) -> bool | None:
    """VLMEvalKit's rule: the word "yes" and no word "no" anywhere, or the other way round; else neither.

    Marks of punctuation are dropped where a space is beside one of their kind, or a number has a comma, and are spaces
    elsewhere; full stops are dropped.
    """
    text = answer.lower()
    comma = re.search(r"\d,\d", text) is not None
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside = f"{mark} " in answer.lower() or f" {mark}" in answer.lower() or comma
        text = text.replace(mark, "" if beside else " ")
    words = set(re.sub(r"\.(?!\d)", "", text).split())
    return None if ("yes" in words) == ("no" in words) else "yes" in words


PARSERS: dict[str, Callable[[str], bool | None]] = {
    "published": published,
    "strict": strict,
    "lmms-eval": lmms_eval,
    "vlmevalkit": vlmevalkit,
}


def parser_of(name: str) -> Callable[[str], bool | None]:
    """The parser of a name.

    Raises:
        UserError: there is none.
    """
    if name not in PARSERS:
        raise UserError(f"no parser '{name}'", fix=nearest(name, PARSERS))
    return PARSERS[name]


# ------------------------------------------------------------------------------------------ numbers


def units(
    labels: Sequence[bool], answers: Sequence[str], images: Sequence[Name], *, parser: str = "published"
) -> dict[str, list[tuple[Name, bool]]]:
    """What each number is the share of: (image, hit), in the order of the questions.

    Args:
        labels: whether the true answer is yes, of each question.
        answers: what the model said.
        images: what the question is about.
        parser: one of `PARSERS`. With lmms-eval, recall and F1 pass over present objects whose answer is neither, and
            yes_ratio is that of the labels, as that harness has them.
    """
    read = parser_of(parser)
    rows = [(image, label, read(answer)) for image, label, answer in zip(images, labels, answers, strict=True)]
    precision = [(image, label) for image, label, said in rows if said]
    legacy = parser == "lmms-eval"
    recall = [(image, bool(said)) for image, label, said in rows if label and not (legacy and said is None)]
    return {
        "accuracy": [(image, said is label) for image, label, said in rows],
        "precision": precision,
        "recall": recall,
        # 2 TP / (2 TP + FP + FN) is the mean over what was said to be there and what is there, each a hit when both
        "f1": [*precision, *recall],
        "yes_ratio": [(image, label if legacy else bool(said)) for image, label, said in rows],
        "unparsed": [(image, said is None) for image, _, said in rows],
    }


def measure(
    labels: Sequence[bool], answers: Sequence[str], images: Sequence[str], *, parser: str = "published"
) -> dict[str, Estimate]:
    """POPE's numbers with intervals from resampling images; arguments as of `units`."""
    return {name: share(found) for name, found in units(labels, answers, images, parser=parser).items()}


# -------------------------------------------------------------------------------------------- files


def read_questions(path: Path) -> list[Asked]:
    """The questions of a published file.

    Raises:
        UserError: a field is missing or wrong, or an id comes twice.
    """
    found: dict[str, Asked] = {}
    for place, row in files.rows_of(path):
        label = files.text(row, "label", place)
        if label not in ("yes", "no"):
            raise UserError(f"label: expected 'yes' or 'no', got {label!r}", place=place)
        question_id = files.identifier(row, "question_id", place)
        if question_id in found:
            raise UserError(f"question_id {question_id} comes twice", place=place)
        found[question_id] = Asked(
            question_id=question_id,
            image=files.text(row, "image", place),
            text=files.text(row, "text", place),
            label=label == "yes",
        )
    return list(found.values())


def read_answers(path: Path, questions: Sequence[Asked]) -> list[str]:
    """The answer to each question, in the questions' order.

    Raises:
        UserError: a question without its answer, an answer without its question or with another one, or two answers.
    """
    rows = files.rows_of(path)
    if "question_id" not in rows[0][1]:
        return _in_order(rows, questions, path)
    known = {question.question_id for question in questions}
    by_id: dict[str, str] = {}
    for place, row in rows:
        question_id = files.identifier(row, "question_id", place)
        if question_id not in known:
            raise UserError(f"no question has the id {question_id}", place=place, fix="Is it of another split?")
        if question_id in by_id:
            raise UserError(f"question_id {question_id} is answered twice", place=place)
        by_id[question_id] = files.text(row, "text" if "answer" not in row else "answer", place)
    missing = [question.question_id for question in questions if question.question_id not in by_id]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(questions)} questions have no answer, the first is {missing[0]}", place=str(path)
        )
    return [by_id[question.question_id] for question in questions]


def _in_order(rows: Sequence[tuple[str, files.Row]], questions: Sequence[Asked], path: Path) -> list[str]:
    if len(rows) != len(questions):
        raise UserError(
            f"{len(rows)} answers without ids for {len(questions)} questions",
            place=str(path),
            fix="Give every answer its question_id, or answer all questions in their order.",
        )
    answers = []
    for (place, row), question in zip(rows, questions, strict=True):
        if "question" in row and files.text(row, "question", place) != question.text:
            raise UserError(
                f"expected the answer to {question.text!r}, got one to {row['question']!r}",
                place=place,
                fix="Give every answer its question_id, or answer the questions in their order.",
            )
        answers.append(files.text(row, "answer", place))
    return answers


def measure_files(questions: Path, answers: Path, *, parser: str = "published") -> dict[str, Estimate]:
    """POPE's numbers of one questions file and its answers."""
    asked = read_questions(questions)
    return measure(
        [question.label for question in asked],
        read_answers(answers, asked),
        [question.image for question in asked],
        parser=parser,
    )
