"""What an answer says about a picture, found by rules: things with their colours and numbers, and where they stand.

    "two brown dogs behind the couch"  ->  Mention(lead "two", colour "brown", noun "dog"), Relation("behind"), ...

A vocabulary gives the word classes. That of the shapes world is exact. For other data the words for colours, numbers
and relations are English, and the nouns are learnt: what stands after "a", "the" or a number (and adjectives) in
several answers. What is denied ("there is no dog", "without a dog") is not read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from mmalign.shapes import scenes
from vlm import words

Span: TypeAlias = tuple[int, int]

_ENDS = re.compile(r"[.;:!?\n]|\bbut\b")
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_LINKS = ("is", "are")
_LOOK_BACK = 4  # words between a noun and its "a" or "two"
_SINGULARS = {plural: noun for noun, plural in words.PLURALS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mention:
    """A phrase that says something is there: "two brown dogs".

    Args:
        span: of the whole phrase.
        lead, colour, noun: spans of "two", "brown" and "dogs"; the noun's is its own, the others may be missing.
        lead_word, colour_word: as written, in small letters; "" for none.
        name: the noun's singular.
        plural: whether it is written as plural.
    """

    span: Span
    lead: Span | None
    colour: Span | None
    noun: Span
    lead_word: str
    colour_word: str
    name: str
    plural: bool

    @property
    def number(self) -> int | None:
        """How many it says there are; None where it does not say."""
        return words.NUMBERS.index(self.lead_word) + 2 if self.lead_word in words.NUMBERS else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """A phrase that says where something stands, and the mentions before and after it in the clause."""

    span: Span
    name: str
    first: Mention | None
    second: Mention | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was found in a text, in its order."""

    mentions: tuple[Mention, ...]
    relations: tuple[Relation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The words that rules know.

    Args:
        nouns: singular, of one word or two.
        relations: phrase -> phrases that cannot hold together with it.
        same_colours: sets of colours that may be called by each other's names.
        by_colour: things of one noun and two colours are two things, as in the shapes world.
    """

    nouns: frozenset[str]
    colours: tuple[str, ...]
    numbers: tuple[str, ...]
    relations: Mapping[str, tuple[str, ...]]
    same_colours: tuple[frozenset[str], ...]
    by_colour: bool
    _forms: Mapping[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)
    _relation: re.Pattern[str] = field(init=False, repr=False, compare=False, default=_WORD)

    def __post_init__(self) -> None:
        forms = {form: noun for noun in sorted(self.nouns) for form in (plural(noun), noun)}
        phrases = "|".join(re.escape(phrase) for phrase in sorted(self.relations, key=len, reverse=True))
        object.__setattr__(self, "_forms", forms)
        object.__setattr__(self, "_relation", re.compile(rf"\b(?:{phrases})\b"))

    def key(self, mention: Mention) -> str:
        """What is counted as one kind of thing: "dog", and in the shapes world "red circle"."""
        return f"{mention.colour_word} {mention.name}" if self.by_colour and mention.colour_word else mention.name

    def read(self, text: str) -> Reading:
        """Things and relations that a text says are there."""
        mentions: list[Mention] = []
        relations: list[Relation] = []
        small = _small(text)
        for start, end in _clauses(small):
            clause = _mentions(small, start, end, self)
            mentions += clause
            for match in self._relation.finditer(small, start, end):
                if _denied(small[start : match.start()]):
                    continue
                before = [mention for mention in clause if mention.span[1] <= match.start()]
                after = [mention for mention in clause if mention.span[0] >= match.end()]
                relations.append(
                    Relation(
                        span=match.span(),
                        name=match.group(),
                        first=before[-1] if before else None,
                        second=after[0] if after else None,
                    )
                )
        return Reading(mentions=tuple(mentions), relations=tuple(relations))

    def alike(self, colour: str, other: str) -> bool:
        """Whether one colour may be called the other."""
        return colour == other or any({colour, other} <= same for same in self.same_colours)

    def noun_of(self, word: str) -> str | None:
        """The singular of a known noun, from either form."""
        return self._forms.get(word)


def learn_nouns(answers: Iterable[str], *, least: int = 2) -> frozenset[str]:
    """Nouns of the data: words that stand after "a", "the" or a number and adjectives in at least `least` answers.

    Two words are one noun where the first is followed by the second in most of its places ("fire hydrant").
    """
    heads: Counter[str] = Counter()
    places: Counter[str] = Counter()
    followed: dict[str, Counter[str]] = {}
    for answer in answers:
        found = set()
        tokens = _words_and_stops(answer.lower())
        for index, word in enumerate(tokens):
            if word not in words.LEADS and word not in words.NUMBERS:
                continue
            rest = index + 1
            while rest < len(tokens) and (tokens[rest] in words.ADJECTIVES or tokens[rest] in words.COLOURS):
                rest += 1
            head = tokens[rest] if rest < len(tokens) else None
            if head is None or not _may_be_noun(head):
                continue
            head = singular(head)
            found.add(head)
            places[head] += 1
            after = tokens[rest + 1] if rest + 1 < len(tokens) else None
            if after is not None and _may_be_noun(after) and not after.endswith("s"):
                followed.setdefault(head, Counter())[after] += 1
        heads.update(found)
    nouns = set()
    for head in [head for head, count in heads.items() if count >= least]:
        second, times = followed.get(head, Counter({"": 0})).most_common(1)[0]
        nouns.add(f"{head} {second}" if 2 * times > places[head] else head)
    return frozenset(nouns)


def plural(noun: str) -> str:
    """The plural of a noun, of its last word where it has two."""
    *first, last = noun.split(" ")
    if last in words.PLURALS:
        last = words.PLURALS[last]
    elif re.search(r"(?:s|x|z|ch|sh)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*first, last])


def singular(word: str) -> str:
    """The singular of a word, itself where it is none of the regular plurals."""
    if word in _SINGULARS:
        return _SINGULARS[word]
    if re.search(r"(?:ss|us|is)$", word):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(?:s|x|z|ch|sh)es$", word):
        return word[:-2]
    return word[:-1] if word.endswith("s") and len(word) > 3 else word


def with_article(phrase: str) -> str:
    """ "a dog", "an orange"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def alike(noun: str, other: str) -> bool:
    """Whether two nouns may name one thing: they share a word ("glass", "wine glass") or a sense ("man", "person")."""
    if set(noun.split()) & set(other.split()):
        return True
    return any(same & set(noun.split()) and same & set(other.split()) for same in words.SAME_OBJECTS)


SHAPES_WORLD = Vocabulary(
    nouns=frozenset(scenes.SHAPES),
    colours=scenes.COLOURS,
    numbers=tuple(scenes.NUMBERS.values()),
    relations={relation: (inverse,) for relation, inverse in scenes.INVERSE.items()},
    same_colours=(),
    by_colour=True,
)


def english(nouns: Iterable[str]) -> Vocabulary:
    """English words for colours, numbers and relations, and these nouns."""
    return Vocabulary(
        nouns=frozenset(nouns),
        colours=words.COLOURS,
        numbers=words.NUMBERS[:5],
        relations=words.RELATIONS,
        same_colours=words.SAME_COLOURS,
        by_colour=False,
    )


# ------------------------------------------------------------------------------------------------ reading


def _small(text: str) -> str:
    """In small letters, every one at its place; a few letters become two, and are then left as they are."""
    small = text.lower()
    return small if len(small) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _clauses(text: str) -> list[Span]:
    """Where the clauses are: up to a full stop, a line's end, a "but"."""
    ends = [match.start() for match in _ENDS.finditer(text)]
    return list(zip([0, *ends], [*ends, len(text)], strict=True))


def _denied(before: str) -> bool:
    """Whether what follows in the clause is denied. "No, there is ..." answers a question."""
    for match in _WORD.finditer(before):
        word = match.group().replace("\u2019", "'")
        if (word in words.DENIALS and before[match.end() : match.end() + 1] != ",") or word.endswith("n't"):
            return True
    return False


def _mentions(text: str, start: int, end: int, vocabulary: Vocabulary) -> list[Mention]:
    tokens = [(match.group(), match.span()) for match in _WORD.finditer(text, start, end)]
    found: list[Mention] = []
    free = 0  # the first word that belongs to no mention yet
    index = 0
    while index < len(tokens):
        pair = [span for _, span in tokens[index : index + 2]]
        two = vocabulary.noun_of(text[pair[0][0] : pair[-1][1]])
        size = len(pair) if two else 1
        name = two or vocabulary.noun_of(tokens[index][0])
        if name is None:
            index += 1
            continue
        mention = _mention(text, tokens, index, size, name, free, vocabulary)
        index = free = index + size
        if not _denied(text[start : mention.span[0]]):
            found.append(mention)
    return found


def _mention(
    text: str, tokens: list[tuple[str, Span]], index: int, size: int, name: str, free: int, vocabulary: Vocabulary
) -> Mention:
    noun = (tokens[index][1][0], tokens[index + size - 1][1][1])
    first, lead, colours = index, None, []
    while first > max(free, index - _LOOK_BACK) and text[tokens[first - 1][1][1] : tokens[first][1][0]].isspace():
        word, span = tokens[first - 1]
        if word in words.LEADS or word in words.NUMBERS:
            lead = span
            first -= 1
            break
        if word in vocabulary.colours:
            colours.append(span)
        elif word not in words.ADJECTIVES:
            break
        first -= 1
    colour = colours[0] if len(colours) == 1 else None
    if not colours:
        colour = _said_after(text, tokens, index + size, vocabulary)
    return Mention(
        span=(tokens[first][1][0], noun[1]),
        lead=lead,
        colour=colour,
        noun=noun,
        lead_word="" if lead is None else text[slice(*lead)],
        colour_word="" if colour is None else text[slice(*colour)],
        name=name,
        plural=text[slice(*noun)] != name,
    )


def _said_after(text: str, tokens: list[tuple[str, Span]], index: int, vocabulary: Vocabulary) -> Span | None:
    """The colour in "the circle is red"; none in "the circle is red circles' neighbour"."""
    if len(tokens) <= index + 1 or tokens[index][0] not in _LINKS or tokens[index + 1][0] not in vocabulary.colours:
        return None
    after = tokens[index + 2][0] if len(tokens) > index + 2 else ""
    return None if vocabulary.noun_of(after) else tokens[index + 1][1]


def _words_and_stops(text: str) -> list[str | None]:
    """Words in order; None where something other than space stands between."""
    found: list[str | None] = []
    end = 0
    for match in _WORD.finditer(text):
        if text[end : match.start()].strip():
            found.append(None)
        found.append(match.group())
        end = match.end()
    return found


def _may_be_noun(word: str) -> bool:
    classes = (words.NO_OBJECTS, words.ADJECTIVES, words.COLOURS, words.LEADS, words.NUMBERS)
    known = any(word in group for group in classes)
    return not known and len(word) > 2 and word.isalpha() and not re.search(r"(?:ing|ed|ly)$", word)
