"""What the shapes world can say: scenes, captions, questions, hard negatives and a split that does not leak.

A scene is one object ("a red circle"), two different objects in a spatial relation ("a red circle left of a blue
square"), or two or three copies of one object ("three green triangles"). Captions and scenes correspond one to one,
so a caption is parsed back exactly.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {2: "two", 3: "three"}
HELD_OUT_SHARE = 0.3  # of the unordered object pairs, and of the repeated objects
SHARES = {"one": 0.2, "relation": 0.5, "count": 0.3}  # how often each kind of scene is drawn

Kind = Literal["one", "relation", "count"]
Split = Literal["train", "heldout"]


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """A coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing; two things and a relation of the first to the second; or `len(things)` equal things."""

    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def kind(self) -> Kind:
        return "relation" if self.relation else "one" if len(self.things) == 1 else "count"

    @property
    def caption(self) -> str:
        first = self.things[0]
        if self.relation:
            return f"a {first} {self.relation} a {self.things[1]}"
        return f"a {first}" if len(self.things) == 1 else f"{NUMBERS[len(self.things)]} {first}s"

    @property
    def meaning(self) -> tuple[object, ...]:
        """Equal for two scenes exactly when one picture shows both: "B right of A" is "A left of B"."""
        first, *rest = self.things
        if self.relation and rest[0] < first:
            return (rest[0], first, INVERSE[self.relation])
        return (*self.things, self.relation)

    @property
    def split(self) -> Split:
        """Train or held out, by a hash of the *unordered* content.

        "B right of A" describes the picture of "A left of B", so both orders and every relation of a pair share a side.
        """
        if self.kind == "one":
            return "train"
        key = "|".join(sorted(map(str, self.things)))
        bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
        return "heldout" if bucket < HELD_OUT_SHARE else "train"


def parse(caption: str) -> Scene | None:
    """The scene a caption describes, or None when it is not a sentence of this world."""
    return _by_caption().get(" ".join(caption.lower().split()).removesuffix("."))


@functools.cache
def _by_caption() -> dict[str, Scene]:
    return {scene.caption: scene for scene in every_scene()}


@functools.cache
def every_scene() -> tuple[Scene, ...]:
    """All 1278 scenes of the world, in a fixed order."""
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    one = [Scene((thing,)) for thing in things]
    relation = [Scene(pair, word) for pair in itertools.permutations(things, 2) for word in RELATIONS]
    count = [Scene((thing,) * number) for number in NUMBERS for thing in things]
    return (*one, *relation, *count)


def draw_scenes(count: int, *, split: Split, seed: int) -> list[Scene]:
    """`count` random scenes of one split, kinds in the proportions of SHARES; with repetition."""
    generator = np.random.default_rng([seed, split == "heldout"])
    pools = {kind: [s for s in every_scene() if s.split == split and s.kind == kind] for kind in SHARES}
    kinds = [kind for kind in SHARES if pools[kind]]
    shares = np.array([SHARES[kind] for kind in kinds])
    drawn = generator.choice(len(kinds), size=count, p=shares / shares.sum())
    return [pools[kinds[k]][generator.integers(len(pools[kinds[k]]))] for k in drawn]


def negatives(scene: Scene) -> Iterator[tuple[str, Scene]]:
    """Scenes that differ from this one in one attribute: (what was changed, the changed scene). None shows the same."""
    first, *rest = scene.things
    copies = len(scene.things) if scene.kind == "count" else 1

    def changed(thing: Thing) -> Scene:
        return replace(scene, things=(thing,) * copies if copies > 1 else (thing, *rest))

    for colour in COLOURS:
        if colour != first.colour and replace(first, colour=colour) not in rest[: 1 if copies == 1 else 0]:
            yield "colour", changed(replace(first, colour=colour))
    for shape in SHAPES:
        if shape != first.shape and replace(first, shape=shape) not in rest[: 1 if copies == 1 else 0]:
            yield "shape", changed(replace(first, shape=shape))
    if scene.relation:
        second = scene.things[1]
        yield "relation", replace(scene, relation=INVERSE[scene.relation])
        other = RELATIONS[(RELATIONS.index(scene.relation) + 2) % 4]
        yield "relation", replace(scene, relation=other)
        if first.colour != second.colour and first.shape != second.shape:
            swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
            yield "swap", replace(scene, things=swapped)
    else:
        for number in (1, 2, 3):
            if number != len(scene.things):
                yield "count", Scene((first,) * number)


def questions(scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """Yes/no questions about a picture of the scene: (category, question, answer is yes)."""
    present = set(scene.things)
    for colour in COLOURS:
        for shape in SHAPES:
            thing = Thing(colour, shape)
            yield "object", f"is there a {thing}?", thing in present
    for number in (1, 2, 3):
        word = {1: "one object", 2: "two objects", 3: "three objects"}[number]
        verb = "is" if number == 1 else "are"
        yield "count", f"{verb} there exactly {word}?", number == len(scene.things)
    if scene.relation:
        first, second = scene.things
        for word in RELATIONS:
            yield "relation", f"is the {first} {word} the {second}?", word == scene.relation
