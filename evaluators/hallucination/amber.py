"""AMBER (Wang et al. 2311.07397): what descriptions invent, and yes/no questions whose positive answer is "No".

Descriptions, with the nouns N of an answer that the benchmark's vocabulary knows, the objects A that are there, and the
objects H that people expect and that are not:

    chair  unsafe nouns / nouns          cover  objects of A that are named / |A|
    hal    answers with an unsafe noun   cog    objects of H that are named / |H|

A noun is safe when it is in the list of safe words, is in A, or is associated with a member of A. Questions:

    accuracy    precision  right "No" / said "No"    recall  right "No" / true "no"    f1

over all and by kind; an answer is read as "Yes" or "No" when it is that word, or begins with it. `amber` is
(100 - chair + f1) / 2, both in percent.

The files are the benchmark's own: annotations.json, relation.json (a word and what it is associated with),
safe_words.txt; answers are [{"id", "response"}]. Nouns are found without a tagger: every word, made singular, that is
in the vocabulary. The published script tags them with spaCy and takes near synonyms (similarity above 0.8) for equal,
so its numbers differ from these; rows that bring `nouns` of their own are taken at their word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluators.hallucination import files
from evaluators.hallucination.chair import Vocabulary
from evaluators.hallucination.estimate import Estimate, share
from mmalign.errors import UserError

KINDS = {  # of the benchmark's annotations -> the dimension and its part
    "discriminative-hallucination": ("existence", "existence"),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation", "relation"),
    "relation": ("relation", "relation"),
}
GENERATIVE = "generative"


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What is true of one item.

    Attributes:
        kind: generative or a key of KINDS.
        there, expected: objects of a description, A and H; answer: of a question.
    """

    kind: str
    there: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    answer: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The benchmark's words: what each is associated with, and those that are always safe."""

    associated: Mapping[str, tuple[str, ...]]
    safe: frozenset[str]

    @property
    def known(self) -> frozenset[str]:
        """Every word that can be a hallucination."""
        return frozenset(self.associated).union(*self.associated.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What a model said about an item; its nouns where somebody tagged them."""

    id: str
    text: str
    nouns: tuple[str, ...] | None = None


def parse(answer: str) -> bool | None:
    """Yes or No as the first word, in any case; None for anything else."""
    said = re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE)
    return None if said is None else said[1].lower() == "yes"


# ---------------------------------------------------------------------------------------------- descriptions


def describe(responses: Sequence[Response], truths: Mapping[str, Truth], words: Words) -> dict[str, Estimate]:
    """chair, cover, hal and cog, with intervals by picture."""
    vocabulary = Vocabulary([[word] for word in sorted(words.known)], every_compound=True)
    unsafe, covered, false, expected = [], [], [], []
    for response in responses:
        truth = truths[response.id]
        said = vocabulary.objects(response.text) if response.nouns is None else list(response.nouns)
        said = [word for word in said if word in words.known]
        there = {object_: {object_, *words.associated.get(object_, ())} for object_ in truth.there}
        named = set(said)
        wrong = [word not in words.safe and not any(word in near for near in there.values()) for word in said]
        unsafe += [(response.id, one) for one in wrong]
        false.append((response.id, any(wrong)))
        covered += [(response.id, bool(near & named)) for near in there.values()]
        expected += [
            (response.id, bool({object_, *words.associated.get(object_, ())} & named)) for object_ in truth.expected
        ]
    return {"chair": share(unsafe), "cover": share(covered), "hal": share(false), "cog": share(expected)}


# ------------------------------------------------------------------------------------------------- questions


def discriminate(
    responses: Sequence[Response], truths: Mapping[str, Truth], images: Mapping[str, str] | None = None
) -> dict[str, Estimate]:
    """Accuracy, precision, recall and F1 of "No", over all questions and by dimension.

    Args:
        images: of each question; answers about one picture are a cluster. By default each question has its own.
    """
    rows = []
    for response in responses:
        truth = truths[response.id]
        image = images.get(response.id, response.id) if images else response.id
        rows.append((KINDS[truth.kind], image, truth.answer, parse(response.text)))
    numbers: dict[str, Estimate] = {}
    groups: dict[str, list[tuple[str, bool | None, bool | None]]] = {"": []}
    for (dimension, part), image, answer, said in rows:
        for group in dict.fromkeys(("", f"/{dimension}", f"/{part}")):
            groups.setdefault(group, []).append((image, answer, said))
    for group, found in groups.items():
        precision = [(image, answer is False) for image, answer, said in found if said is False]
        recall = [(image, said is False) for image, answer, said in found if answer is False]
        numbers |= {
            f"accuracy{group}": share((image, said is answer) for image, answer, said in found),
            f"precision{group}": share(precision),
            f"recall{group}": share(recall),
            f"f1{group}": share([*precision, *recall]),
        }
    return numbers | {"unparsed": share((image, said is None) for _, image, _, said in rows)}


def measure(
    responses: Sequence[Response],
    truths: Mapping[str, Truth],
    words: Words | None,
    images: Mapping[str, str] | None = None,
) -> dict[str, Estimate]:
    """The numbers of whichever of the two parts was answered, and the AMBER score where both were.

    Raises:
        UserError: descriptions without the benchmark's words.
    """
    told = [one for one in responses if truths[one.id].kind == GENERATIVE]
    asked = [one for one in responses if truths[one.id].kind != GENERATIVE]
    numbers: dict[str, Estimate] = {}
    if told:
        if words is None:
            raise UserError(
                "descriptions need the benchmark's words",
                fix="Give --relation relation.json and --safe safe_words.txt.",
            )
        numbers |= describe(told, truths, words)
    if asked:
        numbers |= discriminate(asked, truths, images)
    chair, f1 = numbers.get("chair"), numbers.get("f1")
    if chair and f1 and chair.value is not None and f1.value is not None:
        score = 100 * (1 - chair.value + f1.value) / 2
        numbers["amber"] = Estimate(value=score, ci95=None, n=len(responses), images=chair.images + f1.images)
    return numbers


# ----------------------------------------------------------------------------------------------------- files


def read_truths(path: Path) -> dict[str, Truth]:
    """The benchmark's annotations.

    Raises:
        UserError: a field is missing or wrong, or an id comes twice.
    """
    rows = files.value_of(path)
    if not isinstance(rows, list):
        raise UserError("expected a list of annotations", place=str(path))
    found: dict[str, Truth] = {}
    for number, value in enumerate(rows):
        place = f"{path} annotation {number}"
        row = files.entry(value, place)
        name, kind = files.identifier(row, "id", place), files.text(row, "type", place)
        if name in found:
            raise UserError(f"id {name} comes twice", place=place)
        if kind == GENERATIVE:
            there, expected = (_words(row, field, place) for field in ("truth", "hallu"))
            found[name] = Truth(kind=kind, there=there, expected=expected)
            continue
        if kind not in KINDS:
            raise UserError(f"type: expected {GENERATIVE} or {', '.join(KINDS)}, got {kind!r}", place=place)
        answer = {"yes": True, "no": False}.get(files.text(row, "truth", place).lower())
        if answer is None:
            raise UserError(f"truth: expected 'yes' or 'no', got {row['truth']!r}", place=place)
        found[name] = Truth(kind=kind, answer=answer)
    return found


def _words(row: files.Row, field: str, place: str) -> tuple[str, ...]:
    values = files.listed(row, field, place)
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"{field}: expected a list of words", place=place)
    return tuple(value.lower() for value in values)


def read_words(relation: Path, safe: Path) -> Words:
    """The benchmark's associations and its safe words."""
    found = files.entry(files.value_of(relation), str(relation))
    associated = {word.lower(): _words(found, word, f"{relation} '{word}'") for word in found}
    lines = (line.strip().lower() for line in files.decoded(safe).splitlines())
    return Words(associated=associated, safe=frozenset(line for line in lines if line))


def read_responses(path: Path, truths: Mapping[str, Truth]) -> list[Response]:
    """Answers: a list of {"id", "response"}, or JSON lines of it.

    Raises:
        UserError: a field is missing or wrong, an id comes twice or is not annotated, or there are none.
    """
    if path.suffix == ".jsonl":
        rows: Sequence[tuple[str, Any]] = files.rows_of(path)
    else:
        value = files.value_of(path)
        if not isinstance(value, list):
            raise UserError("expected a list of answers", place=str(path))
        rows = [(f"{path} answer {number}", row) for number, row in enumerate(value)]
    found: dict[str, Response] = {}
    for place, value in rows:
        row = files.entry(value, place)
        name = files.identifier(row, "id", place)
        if name in found:
            raise UserError(f"id {name} is answered twice", place=place)
        if name not in truths:
            raise UserError(f"no annotation has the id {name}", place=place)
        tagged = None if row.get("nouns") is None else _words(row, "nouns", place)
        found[name] = Response(id=name, text=files.text(row, "response", place), nouns=tagged)
    if not found:
        raise UserError("the file has no answers", place=str(path))
    return list(found.values())


def read_images(path: Path) -> dict[str, str]:
    """The picture of each question, from the benchmark's query file: [{"id", "image", "query"}]."""
    rows = files.value_of(path)
    if not isinstance(rows, list):
        raise UserError("expected a list of queries", place=str(path))
    found = {}
    for number, value in enumerate(rows):
        place = f"{path} query {number}"
        row = files.entry(value, place)
        found[files.identifier(row, "id", place)] = files.text(row, "image", place)
    return found


def measure_files(
    responses: Path,
    annotations: Path,
    relation: Path | None = None,
    safe: Path | None = None,
    queries: Path | None = None,
) -> dict[str, Estimate]:
    """AMBER's numbers of one file of answers."""
    truths = read_truths(annotations)
    words = read_words(relation, safe) if relation is not None and safe is not None else None
    images = None if queries is None else read_images(queries)
    return measure(read_responses(responses, truths), truths, words, images)
