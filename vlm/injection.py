"""POVID's rejected answers by rule: a true answer with plausible false things, colours, numbers and places.

A false thing is drawn by how often the true answers of the data name it together with the things of this one,

    weight(f) = sum over true things o of  count(o and f) / count(o)  +  count(f) / (1000 answers)  +  1e-6,

so what a model invents out of habit is what is injected most. What may be true of the picture is never injected: in the
shapes world its scene says so, elsewhere everything that the true answers about the picture say, and whatever may be
another word for it.

    object      another thing in a thing's place          answer     yes for no, no for yes
    attribute   another colour                            addition   a false thing more
    count       another number                            omission   a true thing less, beside a false one: the answers
    relation    the opposite place                                   with an addition are as many, so lengths stay equal

The same answer, seed and data give the same edits. The authors ask a model for the mistakes: see `injection_prompt`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mmalign.shapes import talk
from mmalign.shapes.scenes import RELATIONS, Scene, Thing
from vlm import words
from vlm.wording import Mention, Reading, Relation, Span, Vocabulary, alike, plural, with_article

EditKind: TypeAlias = Literal["object", "attribute", "count", "relation", "answer", "addition", "omission"]

_FLIPPED = {"yes": "no", "no": "yes"}
_SHORT = re.compile(r"\s*([^\W\d_]+)\s*[.!]?\s*")
_FLOOR = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One change of an answer: `answer[start:end]` was `old` and became `new`."""

    kind: EditKind
    start: int
    end: int
    old: str
    new: str

    def as_json(self) -> dict[str, Any]:
        """For a record's context."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Injected:
    """A false answer and how it came about: edits in the order of the true answer."""

    text: str
    edits: tuple[Edit, ...]


# ------------------------------------------------------------------------------------------------ what is true


@runtime_checkable
class Truth(Protocol):
    """What is known of a picture. Every question is whether something may be true of it."""

    def has(self, noun: str, colour: str) -> bool:
        """Whether such a thing may be there; any colour's for ""."""
        ...

    def counts(self, noun: str, colour: str, number: int) -> bool:
        """Whether there may be exactly so many."""
        ...

    def holds(self, first: Mention | None, relation: str, second: Mention | None) -> bool:
        """Whether the first may stand so to the second."""
        ...


class SceneTruth:
    """The truth of a picture of the shapes world."""

    def __init__(self, scene: Scene) -> None:
        self._things = scene.things
        # Of copies no order is known: every relation between them may hold.
        copies = len(set(scene.things)) < len(scene.things)
        same = {(thing, relation, thing) for thing in scene.things for relation in RELATIONS} if copies else set()
        self._relations = talk.relations(scene) | same

    def has(self, noun: str, colour: str) -> bool:
        return self._matching(noun, colour) > 0

    def counts(self, noun: str, colour: str, number: int) -> bool:
        return self._matching(noun, colour) == number

    def holds(self, first: Mention | None, relation: str, second: Mention | None) -> bool:
        def fits(mention: Mention | None, thing: Thing) -> bool:
            return mention is None or (mention.name == thing.shape and mention.colour_word in ("", thing.colour))

        return any(fits(first, a) and fits(second, b) for a, name, b in self._relations if name == relation)

    def _matching(self, noun: str, colour: str) -> int:
        return sum(thing.shape == noun and colour in ("", thing.colour) for thing in self._things)


class SaidTruth:
    """What true answers say about a picture, and all that may be another word for it."""

    def __init__(self, answers: Iterable[str], vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._mentions = [mention for answer in answers for mention in vocabulary.read(answer).mentions]

    def has(self, noun: str, colour: str) -> bool:
        same = [mention for mention in self._mentions if alike(mention.name, noun)]
        if not colour:
            return bool(same)
        return any(mention.colour_word and self._vocabulary.alike(mention.colour_word, colour) for mention in same)

    def counts(self, noun: str, colour: str, number: int) -> bool:
        return any(mention.number == number for mention in self._mentions if alike(mention.name, noun))

    def holds(self, first: Mention | None, relation: str, second: Mention | None) -> bool:
        return False  # of two relations that exclude one another the true answer says which holds


# ------------------------------------------------------------------------------------------------ what is plausible


class CoOccurrence:
    """How often true answers name things, two things together, and a thing in a colour."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.answers = 0
        self.named: Counter[str] = Counter()
        self.together: dict[str, Counter[str]] = {}
        self.coloured: Counter[tuple[str, str]] = Counter()

    @classmethod
    def learn(cls, vocabulary: Vocabulary, answers: Iterable[str]) -> CoOccurrence:
        """The table of these answers."""
        table = cls(vocabulary)
        for answer in answers:
            table.add(vocabulary.read(answer))
        return table

    def add(self, reading: Reading) -> None:
        """Count one answer."""
        self.answers += 1
        things = sorted({self.vocabulary.key(mention) for mention in reading.mentions})
        self.named.update(things)
        for one in things:
            self.together.setdefault(one, Counter()).update(other for other in things if other != one)
        self.coloured.update((mention.name, mention.colour_word) for mention in reading.mentions if mention.colour_word)

    def weights(self, things: Sequence[str], present: Collection[str]) -> Float[ndarray, " things"]:
        """How readily each thing is invented where `present` is; see the module."""
        habits: dict[str, float] = defaultdict(float)
        for one in sorted(present):
            for other, count in self.together.get(one, {}).items():
                habits[other] += count / self.named[one]
        rest = 1000 * max(self.answers, 1)
        return np.array([habits[thing] + self.named[thing] / rest + _FLOOR for thing in things])


# ------------------------------------------------------------------------------------------------ the injector


class Injector:
    """Makes false answers.

    Args:
        table: of the data's true answers.
        edits: false things, colours, numbers and places per answer, where it has so many.
        additions: share of the answers that list things to which a false one is added; from as many, one is left out.
    """

    def __init__(self, table: CoOccurrence, *, edits: int = 1, additions: float = 0.0) -> None:
        if not 0 <= additions <= 0.5 or edits < 1:
            raise ValueError("additions is a share from 0 to 0.5, edits at least 1")
        self.table, self.vocabulary = table, table.vocabulary
        self._edits, self._additions = edits, additions
        self._things = self._every_thing()

    def rewrite(self, answer: str, truth: Truth, *, seed: int) -> Injected | None:
        """A false answer in the style of a true one; None where the rules find nothing to change."""
        generator = np.random.default_rng(seed)
        short = self._short(answer, generator)
        if short is not None:
            return _applied(answer, [short])
        work = _Work(self.vocabulary.read(answer), self.vocabulary)
        edits: list[Edit] = []
        lists = _lists(answer, work.reading.mentions)
        lot = generator.random()
        if lists and lot < self._additions:
            edits += self._added(answer, work, truth, lists, generator)
        elif lists and lot < 2 * self._additions:
            edits += self._left_out(answer, work, lists, generator)
        false = [edit for edit in edits if edit.kind != "omission"]
        while len(false) < self._edits:
            edit = self._changed(answer, work, truth, generator)
            if edit is None:
                break
            false.append(edit)
        if not false:
            return None
        return _applied(answer, [*false, *(edit for edit in edits if edit.kind == "omission")])

    # -------------------------------------------------------------------------------- kinds of edits

    def _short(self, answer: str, generator: np.random.Generator) -> Edit | None:
        """The edit of an answer of one word: yes or no, a colour, a number."""
        match = _SHORT.fullmatch(answer)
        if match is None:
            return None
        word = match.group(1).lower()
        choices: list[str] = []
        kind: EditKind = "answer"
        if word in _FLIPPED:
            choices = [_FLIPPED[word]]
        elif word in self.vocabulary.colours:
            kind, choices = (
                "attribute",
                [one for one in self.vocabulary.colours if not self.vocabulary.alike(one, word)],
            )
        elif word in self.vocabulary.numbers:
            kind, choices = "count", [number for number in self.vocabulary.numbers if number != word]
        if not choices:
            return None
        return _edit(kind, answer, match.span(1), choices[generator.integers(len(choices))])

    def _changed(self, answer: str, work: _Work, truth: Truth, generator: np.random.Generator) -> Edit | None:
        """One false thing, colour, number or place in the place of a true one: a kind at random, then where."""
        makers = [self._object, self._attribute, self._count]
        for kind in generator.permutation(len(makers) + 1):
            if kind == len(makers):
                relations = [relation for relation in work.reading.relations if relation.span not in work.touched]
                spots: Sequence[Relation | Mention] = relations
            else:
                spots = work.free()
            for spot in generator.permutation(len(spots)):
                one = spots[spot]
                if isinstance(one, Relation):
                    edit = self._relation(answer, one, work, truth, generator)
                else:
                    edit = makers[kind](answer, one, work, truth, generator)
                if edit is not None:
                    work.touched.add(one.span)
                    return edit
        return None

    def _object(
        self, answer: str, mention: Mention, work: _Work, truth: Truth, generator: np.random.Generator
    ) -> Edit | None:
        false = self._false_thing(work, truth, generator, taken=self.vocabulary.key(mention))
        if false is None:
            return None
        span, name = mention.noun, false
        if self.vocabulary.by_colour:
            if mention.colour is not None and mention.colour > mention.noun:  # "the circle is red": change the colour
                return None
            if mention.colour is not None:
                span = (mention.colour[0], mention.noun[1])
            else:
                name = false.split(" ")[1]
                if truth.has(name, ""):
                    return None
        work.said.add(false)
        return self._phrase(answer, mention, span, plural(name) if mention.plural else name, "object")

    def _attribute(
        self, answer: str, mention: Mention, work: _Work, truth: Truth, generator: np.random.Generator
    ) -> Edit | None:
        if mention.colour is None:
            return None
        colours = [
            colour
            for colour in self.vocabulary.colours
            if not self.vocabulary.alike(colour, mention.colour_word)
            and not truth.has(mention.name, colour)
            and f"{colour} {mention.name}" not in work.said
        ]
        if not colours:
            return None
        weights = [self.table.coloured[mention.name, colour] + 1.0 for colour in colours]
        colour = colours[_drawn(weights, generator)]
        work.said.add(f"{colour} {mention.name}")
        return self._phrase(answer, mention, mention.colour, colour, "attribute")

    def _count(
        self, answer: str, mention: Mention, work: _Work, truth: Truth, generator: np.random.Generator
    ) -> Edit | None:
        if mention.lead is None or mention.lead_word not in self.vocabulary.numbers:
            return None
        numbers = [
            number
            for number in self.vocabulary.numbers
            if number != mention.lead_word
            and not truth.counts(mention.name, mention.colour_word, words.NUMBERS.index(number) + 2)
        ]
        if not numbers:
            return None
        return _edit("count", answer, mention.lead, numbers[generator.integers(len(numbers))])

    def _relation(
        self, answer: str, relation: Relation, work: _Work, truth: Truth, generator: np.random.Generator
    ) -> Edit | None:
        if any(one is not None and one.span in work.touched for one in (relation.first, relation.second)):
            return None  # about a thing that is false already, anything holds
        others = [
            other
            for other in self.vocabulary.relations[relation.name]
            if not truth.holds(relation.first, other, relation.second)
        ]
        if not others:
            return None
        work.touched |= {one.span for one in (relation.first, relation.second) if one is not None}
        return _edit("relation", answer, relation.span, others[generator.integers(len(others))])

    def _added(
        self, answer: str, work: _Work, truth: Truth, lists: Sequence[_Joint], generator: np.random.Generator
    ) -> list[Edit]:
        """A false thing more in one of the answer's lists: after the thing before its "and"."""
        false = self._false_thing(work, truth, generator)
        if false is None:
            return []
        work.said.add(false)
        at = lists[int(generator.integers(len(lists)))].first.span[1]
        return [Edit(kind="addition", start=at, end=at, old="", new=f", {with_article(false)}")]

    def _left_out(
        self, answer: str, work: _Work, lists: Sequence[_Joint], generator: np.random.Generator
    ) -> list[Edit]:
        """A true thing less in one of the answer's lists."""
        joint = lists[int(generator.integers(len(lists)))]
        work.touched.add(joint.first.span)
        return [_edit("omission", answer, joint.cut, "")]

    # ----------------------------------------------------------------------------------------- words

    def _false_thing(
        self, work: _Work, truth: Truth, generator: np.random.Generator, taken: str | None = None
    ) -> str | None:
        """Something that is not there and not said yet; what the false thing replaces invites nothing."""
        present = {self.vocabulary.key(mention) for mention in work.reading.mentions}
        present = present - {taken} or present  # a thing alone invites what goes with it
        weights = self.table.weights(self._things, present)
        # The largest log weight with Gumbel noise is a draw by weight; if that is there, the next largest, and so on.
        for index in np.argsort(-(np.log(weights) + generator.gumbel(size=len(weights))), kind="stable"):
            thing: str = self._things[index]
            if thing not in work.said and not truth.has(*_noun_and_colour(thing, self.vocabulary)):
                return thing
        return None

    def _every_thing(self) -> list[str]:
        if self.vocabulary.by_colour:
            return [f"{colour} {noun}" for colour in self.vocabulary.colours for noun in sorted(self.vocabulary.nouns)]
        return sorted(self.table.named)

    def _phrase(self, answer: str, mention: Mention, span: Span, new: str, kind: EditKind) -> Edit:
        """The edit of a mention's words, "a" becoming "an" before them where they are next to it."""
        lead = mention.lead
        if lead is not None and mention.lead_word in ("a", "an") and not answer[lead[1] : span[0]].strip():
            article = with_article(new).split(" ", 1)[0]
            if article != mention.lead_word:
                article = article.capitalize() if answer[lead[0]].isupper() else article
                return _edit(kind, answer, (lead[0], span[1]), f"{article} {new}")
        if answer[span[0]].isupper():
            new = new[0].upper() + new[1:]
        return _edit(kind, answer, span, new)


class _Work:
    """What has been changed of an answer so far."""

    def __init__(self, reading: Reading, vocabulary: Vocabulary) -> None:
        self.reading = reading
        self.touched: set[Span] = set()
        self.said = {vocabulary.key(mention) for mention in reading.mentions}

    def free(self) -> list[Mention]:
        return [mention for mention in self.reading.mentions if mention.span not in self.touched]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Joint:
    """Two things joined by "and".

    Args:
        first: the one before it.
        cut: what goes if that one is left out.
    """

    first: Mention
    cut: Span


def _lists(answer: str, mentions: Sequence[Mention]) -> list[_Joint]:
    """Where an answer lists things: "a dog and a cat", "a dog, a cat and a bird"."""
    found = []
    for index, (first, second) in enumerate(itertools.pairwise(mentions)):
        if answer[first.span[1] : second.span[0]] not in (" and ", ", and "):
            continue
        between = answer[mentions[index - 1].span[1] : first.span[0]] if index else ""
        if between == ", ":
            found.append(_Joint(first=first, cut=(first.span[0] - len(between), first.span[1])))
        elif not index or re.search(r"[.;:!?]", between):  # else "a cat on the couch and a dog" is no list
            found.append(_Joint(first=first, cut=(first.span[0], second.span[0])))
    return found


def _noun_and_colour(thing: str, vocabulary: Vocabulary) -> tuple[str, str]:
    if not vocabulary.by_colour:
        return thing, ""
    colour, noun = thing.split(" ", 1)
    return noun, colour


def _drawn(weights: Sequence[float], generator: np.random.Generator) -> int:
    edges = np.cumsum(weights)
    return int(np.searchsorted(edges, generator.random() * edges[-1], side="right").clip(max=len(weights) - 1))


def _edit(kind: EditKind, answer: str, span: Span, new: str) -> Edit:
    old = answer[slice(*span)]
    if old[:1].isupper() and new:
        new = new[0].upper() + new[1:]
    return Edit(kind=kind, start=span[0], end=span[1], old=old, new=new)


def _applied(answer: str, edits: Sequence[Edit]) -> Injected:
    ordered = tuple(sorted(edits, key=lambda edit: (edit.start, edit.end)))
    text = answer
    for edit in reversed(ordered):
        text = text[: edit.start] + edit.new + text[edit.end :]
    return Injected(text=text, edits=ordered)


# ------------------------------------------------------------------------------------------------ by a model


def injection_prompt(question: str, answer: str, edits: int) -> str:
    """What a model is asked that shall write the false answer."""
    mistakes = "one mistake" if edits == 1 else f"{edits} mistakes"
    return (
        "Here are a question about the picture and an answer to it that is true. "
        f"Write the answer again with {mistakes} of the kind that somebody makes who has hardly looked and goes by "
        "what is usual: name a thing that often comes with the others but is not in the picture, or get a colour, a "
        "number or a position wrong. Where the answer draws a conclusion, let it follow from the mistake. Keep "
        "everything else: the style, the order, and about the same length. Do not hint that anything is wrong. Reply "
        "with the new answer and nothing else.\n\n"
        f"Question: {question}\nTrue answer: {answer}\nAnswer with {mistakes}:"
    )
