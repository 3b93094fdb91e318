"""What a preference is: two sides that may differ in any slot, and the record they were made from.

A `Record` keeps everything that was observed about one prompt (candidates, scores, votes, provenance,
licence). A `Preference` is what a method trains on. `mmalign.pairing` makes the second from the first;
nothing is thrown away on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from mmalign.errors import UserError
from mmalign.media import Media

Label: TypeAlias = Literal["a", "b", "tie"]
LABELS: tuple[Label, ...] = ("a", "b", "tie")
PLACEHOLDER = "<image>"
"""Where an image stands in the text of a record; a prompt without any has its images first."""
_SWAPPED: dict[Label, Label] = {"a": "b", "b": "a", "tie": "tie"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of a pair.

    Args:
        prompt: the instruction.
        media: images that belong to the prompt (the inputs of a VLM; empty for text-to-image).
        response: an image (text-to-image) or a text (VLM).
    """

    prompt: str
    media: tuple[Media, ...] = ()
    response: str | Media | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two sides and which one is preferred.

    Args:
        item_id: unique among the pairs; `record/candidate~candidate`.
        label: the preferred side, or "tie".
        confidence: probability that the label is right (0.5 to 1); on a tie, 0.5 says "train it as a coin
            flip" and None says that nobody decided how to train it.
        gap: score of the preferred side minus that of the other (0 or more), in the scorer's unit.
        weights: named per-element weights (tokens, phrases, timesteps) of the sides.
        context: user, direction, rationale, group, messages: what the sides share beyond the prompt.
        provenance: models, seeds, scorer, source.
    """

    item_id: str
    a: Side
    b: Side
    label: Label
    confidence: float | None = None
    gap: float | None = None
    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    split: str = "train"

    def swap(self) -> Preference:
        """The same preference with the sides exchanged."""
        return replace(self, a=self.b, b=self.a, label=_SWAPPED[self.label])

    def flip(self) -> Preference:
        """The opposite preference between the same sides: what a wrong label says. A tie stays one."""
        return replace(self, label=_SWAPPED[self.label])

    @property
    def chosen(self) -> Side:
        """The preferred side. A tie has none: asking is a bug (it would be trained as a win)."""
        return self._sides()[0]

    @property
    def rejected(self) -> Side:
        """The other side; see `chosen`."""
        return self._sides()[1]

    def _sides(self) -> tuple[Side, Side]:
        if self.label == "tie":
            raise ValueError(f"{self.item_id} is a tie: it has no chosen side, use ordered()")
        return (self.a, self.b) if self.label == "a" else (self.b, self.a)

    def ordered(self) -> tuple[Side, Side, float]:
        """(first, second, probability that the first is preferred): what a soft-label loss trains on.

        The first side is the chosen one; for a softened tie it is `a`, with probability 0.5.
        """
        if self.label == "tie":
            if self.confidence is None:
                raise ValueError(f"{self.item_id} is a tie without a confidence: drop it or pair with 'soft'")
            return self.a, self.b, self.confidence
        return *self._sides(), 1.0 if self.confidence is None else self.confidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One answer to a record's prompt: an image or a text, never both.

    `prompt` and `media` replace the record's for this candidate alone, for preferences whose sides differ
    in the input (another picture, a rewritten prompt) instead of, or besides, the response.
    """

    candidate_id: str
    image: Media | None = None
    text: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    model: str | None = None
    seed: int | None = None
    prompt: str | None = None
    media: tuple[Media, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """One judgement of two candidates, named by their ids.

    Args:
        rater: who voted (a user, an annotator, a model).
        confidence: the rater's own probability that the label is right, 0.5 to 1.
        milliseconds: time the rater took.
    """

    a: str
    b: str
    label: Label
    rater: str | None = None
    confidence: float | None = None
    milliseconds: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Everything known about one prompt.

    Args:
        media: input images of the prompt (VLM); empty for text-to-image.
        context: anything JSON; `group` names what must stay in one split (the photograph a crop is from).
        place: where it was read from, for messages; not stored, not compared.
    """

    record_id: str
    prompt: str
    media: tuple[Media, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    votes: tuple[Vote, ...] = ()
    split: str = "train"
    licence: str | None = None
    source: str | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)

    @property
    def where(self) -> str:
        return self.place or f"record '{self.record_id}'"

    def images(self) -> Iterator[tuple[str, Media]]:
        """(field name, image) of every image in the record."""
        for index, media in enumerate(self.media):
            yield f"media[{index}]", media
        for index, candidate in enumerate(self.candidates):
            if candidate.image is not None:
                yield f"candidates[{index}].image", candidate.image
            for inner, media in enumerate(candidate.media or ()):
                yield f"candidates[{index}].media[{inner}]", media


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong in one row.

    Args:
        row: file and row.
        field: which field.
        expected: what should be there.
        got: what is there.
    """

    row: str
    field: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.row}: {self.field}: expected {self.expected}, got {self.got}"

    def error(self) -> UserError:
        """The problem as the error that stops a run."""
        return UserError(
            f"{self.field}: expected {self.expected}, got {self.got}",
            place=self.row,
            fix="`mmalign data check` lists every such row",
        )


def shown(value: object, limit: int = 60) -> str:
    """A value for a message: its type when the type is the news, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value)} bytes"
    text = repr(value)
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return text if isinstance(value, str) else f"{text} ({type(value).__name__})"


def check_record(record: Record, *, decode: bool = False) -> Iterator[Problem]:
    """What is wrong with one record by itself; `decode` opens every image as well."""

    def problem(name: str, expected: str, got: object) -> Problem:
        return Problem(row=record.where, field=name, expected=expected, got=shown(got))

    texts: list[tuple[str, object]] = [("record_id", record.record_id), ("prompt", record.prompt)]
    for name, value in [*texts, ("split", record.split)]:
        if not isinstance(value, str):
            yield problem(name, "text", value)
        elif not value.strip():
            yield problem(name, "text that is not empty", value)
        elif not _is_unicode(value):
            yield problem(name, "valid Unicode", value)
    for name, value in [("licence", record.licence), ("source", record.source)]:
        if value is not None and not isinstance(value, str):
            yield problem(name, "text", value)
        elif value is not None and not _is_unicode(value):
            yield problem(name, "valid Unicode", value)
    try:
        json.dumps(record.context, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        yield Problem(row=record.where, field="context", expected="plain JSON values", got=str(error))

    if not record.candidates:
        yield Problem(row=record.where, field="candidates", expected="at least one", got="none")
    known: set[str] = set()
    for index, candidate in enumerate(record.candidates):
        name = f"candidates[{index}]"
        if not isinstance(candidate.candidate_id, str) or not candidate.candidate_id:
            yield problem(f"{name}.candidate_id", "text that is not empty", candidate.candidate_id)
        elif candidate.candidate_id in known:
            yield problem(f"{name}.candidate_id", "an id used once in the record", candidate.candidate_id)
        else:
            known.add(candidate.candidate_id)
        if (candidate.image is None) == (candidate.text is None):
            both = "neither" if candidate.image is None else "both"
            yield Problem(row=record.where, field=name, expected="an image or a text", got=both)
        for key in ("text", "prompt", "model"):
            value = getattr(candidate, key)
            if value is not None and not isinstance(value, str):
                yield problem(f"{name}.{key}", "text", value)
            elif value is not None and not _is_unicode(value):
                yield problem(f"{name}.{key}", "valid Unicode", value)
        if candidate.seed is not None and (
            not isinstance(candidate.seed, int) or not -(2**63) <= candidate.seed < 2**63
        ):
            yield problem(f"{name}.seed", "a whole number of at most 64 bits", candidate.seed)
        for score, number in candidate.scores.items():
            if not is_number(number):
                yield problem(f"{name}.scores.{score}", "a finite number", number)

    for index, vote in enumerate(record.votes):
        name = f"votes[{index}]"
        for side in ("a", "b"):
            if getattr(vote, side) not in known:
                yield problem(f"{name}.{side}", "the id of a candidate", getattr(vote, side))
        if vote.a == vote.b:
            yield problem(f"{name}.b", "another candidate than a", vote.b)
        if vote.label not in LABELS:
            yield problem(f"{name}.label", "a, b or tie", vote.label)
        if vote.confidence is not None and not (is_number(vote.confidence) and 0.5 <= vote.confidence <= 1):
            yield problem(f"{name}.confidence", "a probability from 0.5 to 1", vote.confidence)
        if vote.milliseconds is not None and not isinstance(vote.milliseconds, int):
            yield problem(f"{name}.milliseconds", "a whole number", vote.milliseconds)

    if decode:
        for name, media in record.images():
            try:
                media.open()
            except UserError as error:
                yield Problem(row=record.where, field=name, expected="an image that opens", got=f"'{error.cause}'")


def is_number(value: object) -> bool:
    """A finite real number; True and False are not numbers here."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**1023  # JSON has integers that no float holds
    return isinstance(value, float) and math.isfinite(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can carry and Parquet cannot
        return False
    return True


def validate(records: Iterable[Record | Problem], *, decode: bool = True) -> Iterator[Problem]:
    """Everything that is wrong with a stream of records: row by row, then as a whole.

    As a whole means duplicate ids, no records at all, and judgements that are all ties. Problems in the
    stream (rows that an importer could not read) pass through. Only ids are kept in memory.
    """
    seen: dict[str, str] = {}
    judged = decided = 0
    empty = True
    for record in records:
        empty = False
        if isinstance(record, Problem):
            yield record
            continue
        yield from check_record(record, decode=decode)
        if isinstance(record.record_id, str):
            if record.record_id in seen:
                yield Problem(
                    row=record.where,
                    field="record_id",
                    expected="an id used once",
                    got=f"'{record.record_id}', already at {seen[record.record_id]}",
                )
            seen.setdefault(record.record_id, record.where)
        judged += len(record.votes)
        decided += sum(vote.label != "tie" for vote in record.votes)
        names = {name for candidate in record.candidates for name in candidate.scores}
        for name in names:
            values = [c.scores[name] for c in record.candidates if name in c.scores]
            judged += len(values) > 1
            decided += len(set(values)) > 1
    if empty:
        yield Problem(row="all rows", field="records", expected="at least one", got="none")
    elif judged and not decided:
        yield Problem(
            row="all rows",
            field="votes and scores",
            expected="at least one that prefers a candidate",
            got=f"{judged} ties",
        )
