"""Single candidates as desirable or undesirable, for methods that need no pairs (Diffusion-KTO).

    by votes    desirable if it ever won a comparison, as Diffusion-KTO's authors label Pick-a-Pic; undesirable if it
                has only lost. The same answer to the same prompt in several records is one item. Candidates that were
                in ties alone have no label and are left out
    by score    desirable if score >= threshold, else undesirable. Without a threshold: the median over all prompts,
                or, where nothing is below it (labels 0 and 1, mostly 0), the next value above

Items of one split are then set side by side as the two sides of a `Preference`, the desirable one as `a`.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from mmalign.errors import UserError
from mmalign.records import Candidate, Record, Vote


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A candidate, the record it is from, and what its label comes from."""

    record: Record
    candidate: Candidate
    scorer: str
    score: float | None = None


class Items:
    """Candidates of a stream of records with what was said about them; images stay where they are."""

    def __init__(self) -> None:
        self._voted: dict[tuple[str, ...], Item] = {}
        self._won: set[tuple[str, ...]] = set()
        self._lost: set[tuple[str, ...]] = set()
        self._scored: dict[str, list[Item]] = {}

    def add_votes(self, record: Record) -> None:
        """Take in a record's votes."""
        known = {candidate.candidate_id: candidate for candidate in record.candidates}
        keys: dict[str, tuple[str, ...]] = {}
        for vote in record.votes:
            check_vote(record, vote, known)
            for name in (vote.a, vote.b):
                if name not in keys:
                    keys[name] = _identity(record, known[name])
                    item = Item(record=record, candidate=known[name], scorer="votes")
                    self._voted.setdefault(keys[name], item)
        for winner, loser in decided(record):
            self._won.add(keys[winner])
            self._lost.add(keys[loser])

    def add_scores(self, record: Record, name: str, scored: Sequence[tuple[Candidate, float]]) -> None:
        """Take in one score of a record's candidates."""
        items = self._scored.setdefault(name, [])
        items += [Item(record=record, candidate=candidate, scorer=name, score=value) for candidate, value in scored]

    @property
    def undecided(self) -> int:
        """Candidates that were in ties alone."""
        return len(self._voted.keys() - self._won - self._lost)

    def thresholds(self) -> dict[str, float]:
        """Score -> the threshold that splits it where none is given."""
        return {
            name: middle([item.score for item in items if item.score is not None])
            for name, items in self._scored.items()
            if items
        }

    def labelled(self, threshold: float | None = None) -> Iterator[tuple[Item, bool]]:
        """(item, whether it is desirable), in the order of the records: those with votes, then those with scores."""
        for key, item in self._voted.items():
            if key in self._won or key in self._lost:
                yield item, key in self._won
        for name, own in self.thresholds().items():
            for item in self._scored[name]:
                if item.score is not None:
                    yield item, item.score >= (own if threshold is None else threshold)


def middle(values: Sequence[float]) -> float:
    """The median, or the next value above the lowest one where the median is the lowest: something stays below it."""
    median, low = statistics.median(values), min(values)
    return median if median > low else min((value for value in values if value > low), default=low)


def decided(record: Record) -> list[tuple[str, str]]:
    """(id of the winner, id of the loser) of every vote that is no tie."""
    sides = [(vote.a, vote.b) if vote.label == "a" else (vote.b, vote.a) for vote in record.votes]
    return [both for vote, both in zip(record.votes, sides, strict=True) if vote.label != "tie"]


def side_by_side(desirable: Sequence[Item], undesirable: Sequence[Item], seed: int) -> Iterator[tuple[Item, Item]]:
    """(desirable, undesirable): the longer list in its order, the shorter one shuffled and recycled. None if one is
    empty.

    Shuffled, since sides of one prompt would otherwise often meet, and a method may use the prompt of the other side
    as an unrelated one.
    """
    turned = len(undesirable) > len(desirable)
    longer, shorter = (undesirable, desirable) if turned else (desirable, undesirable)
    drawn = random.Random(seed).sample(shorter, len(shorter))
    for index, item in enumerate(longer if drawn else ()):
        other = drawn[index % len(drawn)]
        yield (other, item) if turned else (item, other)


def check_vote(record: Record, vote: Vote, known: Container[str]) -> None:
    """Refuse a vote that is not about two different candidates of the record, whose ids are `known`."""
    if vote.a not in known or vote.b not in known or vote.a == vote.b:
        raise UserError(
            f"a vote compares '{vote.a}' with '{vote.b}', which are not two candidates",
            place=record.where,
            fix="`mmalign data check` lists every such row",
        )


def _identity(record: Record, candidate: Candidate) -> tuple[str, ...]:
    """Equal for the same answer to the same prompt in the same split."""
    prompt = record.prompt if candidate.prompt is None else candidate.prompt
    media = record.media if candidate.media is None else candidate.media
    answer = f"text {candidate.text}" if candidate.image is None else candidate.image.sha256()
    return (record.split, prompt, answer, *(item.sha256() for item in media))
