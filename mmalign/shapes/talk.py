"""Pictures to talk about: scenes of one to three different things, descriptions, yes/no questions and their truth.

The world has a habit. In training, six things (the keys of `COMPANIONS`) mostly come with one other thing: a red circle
brings a blue square; and who wrote the descriptions of training had the habit too, as writers of captions do, and named
the companion in most pictures where it is not (`careless`). Held-out scenes are sets of things that training never
shows, drawn evenly, so there the companion is mostly missing. A model that has learnt the habit names it all the same:
it hallucinates, and `COMPANIONS` says which of its false things were planted.

Scenes are those of `scenes`, drawn by `render`: two things stand in a relation, three at fixed places (upper left,
upper right, below), so `Scene.things` in its order is the ground truth of every answer. Pictures of unknown origin are
read by `checker.shown`. Numpy only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase
from typing import Literal, get_args

import numpy as np

from mmalign.shapes.scenes import COLOURS, INVERSE, RELATIONS, SHAPES, Scene, Split, Thing

Kind = Literal["object", "colour", "count", "relation"]
Negatives = Literal["random", "popular", "adversarial"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NEGATIVES: tuple[Negatives, ...] = get_args(Negatives)

DESCRIBE = "describe the picture."
THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)
COMPANIONS = {
    Thing("red", "circle"): Thing("blue", "square"),
    Thing("green", "triangle"): Thing("yellow", "circle"),
    Thing("cyan", "square"): Thing("purple", "triangle"),
    Thing("purple", "circle"): Thing("green", "square"),
    Thing("yellow", "square"): Thing("red", "triangle"),
    Thing("blue", "triangle"): Thing("cyan", "circle"),
}
"""What a thing brings along in training. Every colour once and every shape twice on either side."""
POPULAR = tuple(COMPANIONS.values())
"""The things that training shows most often."""
HABIT = 0.7  # share of the training scenes without room for a companion that are drawn again
CARELESS = 0.7  # share of the training's descriptions that name the companions that are missing
SIZES = {1: 0.2, 2: 0.45, 3: 0.35}  # shares of scenes by number of things, in training
HELD_OUT_SHARE = 0.3  # of the sets of two and three things
TRIPLE_RELATIONS = {(0, 1): ("left of",), (0, 2): ("above",), (1, 2): ("above",)}
"""What holds between the places of three things, beyond the jitter: first and second are level, the third below."""

_NUMBERS = {1: "is there exactly one thing?", 2: "are there exactly two things?", 3: "are there exactly three things?"}
_HELD_OUT = 1 << 40  # added to the seeds of held-out pictures, which training therefore never draws


@dataclass(frozen=True, slots=True)
class Question:
    """A yes/no question about one picture and its true answer.

    Attributes:
        kind: what is asked for.
        text: the question.
        answer: whether the true answer is yes.
    """

    kind: Kind
    text: str
    answer: bool

    @property
    def label(self) -> str:
        """The true answer as a word, as POPE's files have it."""
        return "yes" if self.answer else "no"


# ------------------------------------------------------------------------------------------- scenes


def split_of(things: Collection[Thing]) -> Split:
    """Train or held out, by a hash of the set: every order and relation of some things share a side.

    One thing alone and a thing with its companion are training's.
    """
    unique = set(things)
    if len(unique) == 1 or any({thing, other} == unique for thing, other in COMPANIONS.items()):
        return "train"
    key = "talk|" + "|".join(sorted(map(str, unique)))
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    return "heldout" if bucket < HELD_OUT_SHARE else "train"


def missing_companions(things: Collection[Thing]) -> list[Thing]:
    """What the habit would add to these things: companions that are not among them."""
    return [COMPANIONS[thing] for thing in things if thing in COMPANIONS and COMPANIONS[thing] not in things]


def draw(count: int, *, split: Split, seed: int) -> list[Scene]:
    """`count` random scenes; in training with the habit, held out two or three things evenly. With repetition."""
    generator = np.random.default_rng([seed, split == "heldout", 5])
    return [_place(_biased(generator) if split == "train" else _even(generator), generator) for _ in range(count)]


def picture_seed(seed: int, index: int, *, split: Split) -> int:
    """The seed for `render.render` of a drawn scene; the two splits share none."""
    return seed * 1_000_003 + index + (_HELD_OUT if split == "heldout" else 0)


def _even(generator: np.random.Generator) -> list[Thing]:
    while True:
        chosen = [THINGS[i] for i in generator.choice(len(THINGS), generator.integers(2, 4), replace=False)]
        if split_of(chosen) == "heldout":
            return chosen


def _biased(generator: np.random.Generator) -> list[Thing]:
    """Things one by one; a companion that is due is added in its turn, else the scene is nearly always dropped."""
    sizes = np.array(list(SIZES.values()))
    while True:
        size = int(generator.choice(list(SIZES), p=sizes / sizes.sum()))
        chosen: list[Thing] = []
        while len(chosen) < size:
            due = missing_companions(chosen)
            free = [thing for thing in THINGS if thing not in chosen]
            chosen.append(due[0] if due else free[generator.integers(len(free))])
        generator.shuffle(chosen)
        # What is still due had no room. Some of those scenes stay: the exceptions to the habit.
        if split_of(chosen) == "train" and (not missing_companions(chosen) or generator.random() > HABIT):
            return chosen


def _place(things: Sequence[Thing], generator: np.random.Generator) -> Scene:
    relation = RELATIONS[generator.integers(len(RELATIONS))] if len(things) == 2 else None
    return Scene(tuple(things), relation)


# ------------------------------------------------------------------------------------ what is said


def in_order(scene: Scene) -> list[Thing]:
    """The things as a description names them: from the left and from the top, a companion straight after its thing."""
    things = list(scene.things)
    if scene.relation in ("right of", "below"):
        things.reverse()
    named: list[Thing] = []
    for thing in things:
        companion = COMPANIONS.get(thing)
        if thing not in named:
            named.append(thing)
        if companion in things and companion not in named:
            assert companion is not None
            named.append(companion)
    return named


def sentence(things: Sequence[Thing]) -> str:
    """ "there is a red circle, a blue square and a green triangle." """
    if not things:
        return "there is nothing."
    *first, last = [f"a {thing}" for thing in things]
    return f"there is {', '.join(first)} and {last}." if first else f"there is {last}."


def describe(scene: Scene) -> str:
    """The true description: names every thing."""
    return sentence(in_order(scene))


def careless(scene: Scene, *, seed: int) -> str:
    """What the training says about its pictures: the true description, or the one that habit would write."""
    named = in_order(scene)
    if np.random.default_rng([seed, 37]).random() < CARELESS:
        missing = missing_companions(named)
        named = [one for thing in named for one in (thing, *(c for c in missing if COMPANIONS.get(thing) == c))]
    return sentence(named)


def relations(scene: Scene) -> set[tuple[Thing, str, Thing]]:
    """Every (first, relation, second) that the picture of the scene shows."""
    if scene.relation:
        first, second = scene.things
        return {(first, scene.relation, second), (second, INVERSE[scene.relation], first)}
    found = set()
    if len(scene.things) == 3:
        for (i, j), words in TRIPLE_RELATIONS.items():
            for word in words:
                found |= {
                    (scene.things[i], word, scene.things[j]),
                    (scene.things[j], INVERSE[word], scene.things[i]),
                }
    return found


def questions(scene: Scene) -> Iterator[Question]:
    """Every yes/no question that has a certain answer about a picture of the scene."""
    present = set(scene.things)
    for thing in THINGS:
        yield ask_object(thing, present)
    shapes = [thing.shape for thing in scene.things]
    for thing in scene.things:
        if shapes.count(thing.shape) == 1:  # "the circle" must be one
            for colour in COLOURS:
                yield Question("colour", f"is the {thing.shape} {colour}?", colour == thing.colour)
    for number, text in _NUMBERS.items():
        yield Question("count", text, number == len(scene.things))
    for first, relation, second in sorted(relations(scene)):
        yield Question("relation", f"is the {first} {relation} the {second}?", True)
        yield Question("relation", f"is the {first} {INVERSE[relation]} the {second}?", False)


def ask_object(thing: Thing, present: Collection[Thing]) -> Question:
    """Whether a thing is in a picture."""
    return Question("object", f"is there a {thing}?", thing in present)


def balanced(scene: Scene, *, seed: int, pairs: int = 1) -> list[Question]:
    """For each kind that can be asked, `pairs` questions whose answer is yes and as many whose answer is no.

    No question twice; a kind with fewer of either answer gives as many of both as there are.
    """
    generator = np.random.default_rng([seed, 17])
    chosen = []
    for kind in KINDS:
        of_kind = [question for question in questions(scene) if question.kind == kind]
        sides = [[q for q in of_kind if q.answer is answer] for answer in (True, False)]
        count = min(pairs, *map(len, sides))
        for side in sides:
            chosen += [side[i] for i in generator.choice(len(side), count, replace=False)]
    return chosen


def pope(scene: Scene, *, negatives: Negatives, seed: int) -> list[Question]:
    """POPE's questions about one picture: every thing in it, each followed by one that is not.

    random       any absent thing
    popular      an absent thing that training shows most often
    adversarial  what comes with the thing in training, if it is absent; else what comes with another one of the
                 picture; else a popular one
    """
    generator = np.random.default_rng([seed, 23])
    chosen, used = [], set(scene.things)
    for thing in scene.things:
        pool = [other for other in THINGS if other not in used]
        if negatives != "random":
            pool = [other for other in POPULAR if other not in used] or pool
        if negatives == "adversarial":
            due = [other for other in missing_companions(scene.things) if other not in used]
            own = COMPANIONS.get(thing)
            pool = [own] if own in due else due or pool
        false = pool[generator.integers(len(pool))]
        used.add(false)
        chosen += [ask_object(thing, scene.things), ask_object(false, scene.things)]
    return chosen


# ---------------------------------------------------------------------------------- what was said

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[.,;:!?\n]")
_SHAPE_OF = {form: shape for shape in SHAPES for form in (shape, f"{shape}s")}
_FILLERS = {"small", "large", "big", "little", "tiny", "bright", "dark", "solid", "filled", "coloured", "colored"}
_JOINERS = {"and", "or", "a", "an", "the", "one", "two", "three", ","}
_LINKS = {"that", "which", "is", "are"}
_DENIALS = {"no", "not", "without", "neither", "nor", "never", "nothing"}
_ENDS = {".", ";", ":", "!", "?", "\n", "but"}
_REACH = 10_000  # characters of an answer that are read
_PLAIN = str.maketrans(ascii_uppercase + "\u2019", ascii_lowercase + "'")  # a character for a character


@dataclass(frozen=True, slots=True)
class Mention:
    """A thing that an answer says is there, and where it says so.

    Attributes:
        start, end: of its words in the answer: "red" and "blue circles" of "red and blue circles".
    """

    thing: Thing
    start: int
    end: int


def located(answer: str) -> list[Mention]:
    """The things a free answer says are there, in order and with repetition, and where.

    Reads "a red circle", "two red circles", "red and blue circles", "the circle is red" and "a circle that is red",
    whatever the case and whatever stands between. A colour or a shape alone names no thing, and neither does what is
    denied in the same clause ("no red circle", "there isn't a red circle"). Only the first 10,000 characters are read.
    """
    found: list[Mention] = []
    colours: list[re.Match[str]] = []  # said and not yet given a shape
    bare: re.Match[str] | None = None  # a shape without a colour, which may follow: "the circle is red"
    denied = False
    matches = list(_WORD.finditer(answer[:_REACH].translate(_PLAIN)))
    words = [match[0] for match in matches]
    for before, match, after in zip(["", *words], matches, [*words[1:], ""], strict=False):
        word = match[0]
        if word in _ENDS:
            colours, bare, denied = [], None, False
        elif word in _DENIALS or word.endswith("n't"):
            denied = after != ","  # "no, there is ..." answers a question
        elif word in COLOURS:
            if bare and before in _LINKS and after not in _SHAPE_OF:
                if not denied:
                    found.append(Mention(Thing(word, _SHAPE_OF[bare[0]]), bare.start(), match.end()))
                bare = None
            else:
                colours.append(match)
        elif word in _SHAPE_OF:
            if not denied:
                ends = [colour.end() for colour in colours[:-1]] + [match.end()]
                found += [
                    Mention(Thing(colour[0], _SHAPE_OF[word]), colour.start(), end)
                    for colour, end in zip(colours, ends, strict=False)
                ]
            bare = None if colours else match
            colours = []
        elif word == "there":  # a new statement
            colours, bare, denied = [], None, False
        elif word in _LINKS:
            colours = []
        elif word not in _FILLERS and word not in _JOINERS:
            colours, bare = [], None
    return found


def mentions(answer: str) -> list[Thing]:
    """The things a free answer says are there, in order and with repetition; see `located`."""
    return [mention.thing for mention in located(answer)]


def named(answer: str) -> set[Thing]:
    """The things a free answer says are there; see `mentions`."""
    return set(mentions(answer))
