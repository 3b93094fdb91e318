"""Scenes to talk about: the habit of training and its absence held out, true answers, the reader of free answers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmalign.shapes import checker, talk
from mmalign.shapes.render import render
from mmalign.shapes.scenes import INVERSE, Scene, Thing
from mmalign.shapes.talk import COMPANIONS, POPULAR, THINGS, Negatives, Question

RED, BLUE, GREEN = Thing("red", "circle"), Thing("blue", "square"), Thing("green", "triangle")
PAIR = Scene((RED, BLUE), "left of")
TRIPLE = Scene((RED, BLUE, GREEN))
TRAIN = talk.draw(3000, split="train", seed=1)
HELD_OUT = talk.draw(1500, split="heldout", seed=1)


# ------------------------------------------------------------------------------------------- scenes


def test_companions_are_balanced_and_no_thing_has_two_roles() -> None:
    assert len(THINGS) == 18
    assert not set(COMPANIONS) & set(POPULAR)
    for side in (COMPANIONS, POPULAR):
        assert Counter(thing.colour for thing in side).most_common()[0][1] == 1
        assert set(Counter(thing.shape for thing in side).values()) == {2}


def test_training_has_the_habit_and_held_out_scenes_do_not() -> None:
    def rate(scenes: list[Scene]) -> float:
        """Share of the things with a companion that have it."""
        with_it = [COMPANIONS[thing] in s.things for s in scenes for thing in s.things if thing in COMPANIONS]
        assert len(with_it) > 500
        return float(np.mean(with_it))

    assert 0.8 < rate(TRAIN) < 1.0  # mostly, and not always
    assert rate(HELD_OUT) < 0.15
    shown = Counter(thing for scene in TRAIN for thing in scene.things)
    assert {thing for thing, _ in shown.most_common(6)} == set(POPULAR)
    assert len(shown) == 18  # everything can be learnt
    assert Counter(thing for scene in HELD_OUT for thing in scene.things).keys() == set(THINGS)


def test_the_split_does_not_leak_and_draws_are_the_same_for_a_seed() -> None:
    train, held_out = ({frozenset(s.things) for s in some} for some in (TRAIN, HELD_OUT))
    assert not train & held_out
    assert {talk.split_of(things) for things in held_out} == {"heldout"}
    assert talk.split_of([RED, BLUE]) == talk.split_of([BLUE, RED]) == talk.split_of([RED]) == "train"
    assert talk.draw(20, split="heldout", seed=1) == HELD_OUT[:20] != talk.draw(20, split="heldout", seed=2)
    assert {len(scene.things) for scene in TRAIN} == {1, 2, 3}
    assert {len(scene.things) for scene in HELD_OUT} == {2, 3}
    assert all(len(set(scene.things)) == len(scene.things) for scene in TRAIN + HELD_OUT)
    seeds = [
        talk.picture_seed(seed, index, split=split)
        for seed in (0, 9)
        for index in (0, 1)
        for split in ("train", "heldout")
    ]
    assert len(set(seeds)) == len(seeds)


def test_pixels_show_what_the_scene_says() -> None:
    """The checker, which knows pixels only, finds the things at the places that the relations claim."""
    for index, scene in enumerate(TRAIN[:60] + HELD_OUT[:60]):
        picture = render(scene, talk.picture_seed(3, index, split="train"))
        assert checker.shown(picture) == set(scene.things)
        at = {Thing(found.colour, found.shape or ""): (found.x, found.y) for found in checker.look(picture)}
        for first, relation, second in talk.relations(scene):
            axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
            assert sign * (at[second][axis] - at[first][axis]) > checker.MIN_OFFSET


# --------------------------------------------------------------------------------- true answers


def test_descriptions_name_everything_from_the_left_and_the_top() -> None:
    assert talk.describe(Scene((GREEN,))) == "there is a green triangle."
    assert talk.describe(PAIR) == talk.describe(Scene((BLUE, RED), "right of"))
    assert talk.describe(PAIR) == "there is a red circle and a blue square."
    yellow = Thing("yellow", "square")
    assert talk.describe(Scene((GREEN, yellow), "below")) == "there is a yellow square and a green triangle."
    assert talk.describe(TRIPLE) == "there is a red circle, a blue square and a green triangle."
    # a companion is named straight after its thing
    assert talk.in_order(Scene((RED, GREEN, BLUE))) == [RED, BLUE, GREEN]
    assert talk.in_order(Scene((BLUE, RED, GREEN))) == [BLUE, RED, GREEN]
    assert talk.sentence([]) == "there is nothing."
    for scene in TRAIN[:200] + HELD_OUT[:200]:
        assert Counter(talk.mentions(talk.describe(scene))) == Counter(scene.things)


def test_relations_of_two_and_three_things() -> None:
    assert talk.relations(Scene((RED,))) == set()
    assert talk.relations(PAIR) == {(RED, "left of", BLUE), (BLUE, "right of", RED)}
    assert talk.relations(TRIPLE) == {
        (RED, "left of", BLUE),
        (BLUE, "right of", RED),
        (RED, "above", GREEN),
        (GREEN, "below", RED),
        (BLUE, "above", GREEN),
        (GREEN, "below", BLUE),
    }


def test_every_question_has_its_true_answer() -> None:
    asked = {question.text: question for question in talk.questions(PAIR)}
    assert len(asked) == len(list(talk.questions(PAIR))) == 18 + 12 + 3 + 4
    yes = {text for text, question in asked.items() if question.answer}
    assert yes == {
        "is there a red circle?",
        "is there a blue square?",
        "is the circle red?",
        "is the square blue?",
        "are there exactly two things?",
        "is the red circle left of the blue square?",
        "is the blue square right of the red circle?",
    }
    assert asked["is there a red square?"] == Question("object", "is there a red square?", False)
    assert asked["is the red circle right of the blue square?"].label == "no"
    two_circles = Scene((RED, Thing("blue", "circle")), "above")
    assert not any(question.kind == "colour" for question in talk.questions(two_circles))  # which circle?


@pytest.mark.parametrize("scene", [PAIR, TRIPLE, Scene((RED,)), *HELD_OUT[:20]])
def test_balanced_questions_have_as_many_yes_as_no_of_each_kind(scene: Scene) -> None:
    known = set(talk.questions(scene))
    for pairs in (1, 2):
        asked = talk.balanced(scene, seed=4, pairs=pairs)
        assert asked == talk.balanced(scene, seed=4, pairs=pairs)
        assert len(set(asked)) == len(asked)
        assert set(asked) <= known
        kinds = Counter((question.kind, question.answer) for question in asked)
        for kind in {question.kind for question in known}:
            assert 1 <= kinds[kind, True] == kinds[kind, False] <= pairs
    assert talk.balanced(scene, seed=4) != talk.balanced(scene, seed=5)


@pytest.mark.parametrize("negatives", talk.NEGATIVES)
def test_pope_questions_alternate_and_take_their_negatives_from_the_right_pool(negatives: Negatives) -> None:
    falses = []
    for index, scene in enumerate(HELD_OUT[:300]):
        asked = talk.pope(scene, negatives=negatives, seed=index)
        assert [question.answer for question in asked] == [True, False] * len(scene.things)
        assert len(set(asked)) == len(asked)
        said = [talk.mentions(question.text.replace("is there", ""))[0] for question in asked]
        assert tuple(said[::2]) == scene.things
        assert not set(said[1::2]) & set(scene.things)
        falses += said[1::2]
        if negatives == "adversarial":
            due = set(talk.missing_companions(scene.things))
            assert due <= set(said[1::2])
    assert (set(falses) <= set(POPULAR)) == (negatives != "random")


def test_adversarial_negatives_are_what_training_shows_together() -> None:
    scene = Scene((RED, Thing("cyan", "triangle")), "above")
    assert talk.missing_companions(scene.things) == [BLUE]
    assert talk.missing_companions([RED, BLUE]) == []
    asked = talk.pope(scene, negatives="adversarial", seed=0)
    assert asked[1].text == "is there a blue square?"


# ------------------------------------------------------------------------------- reading answers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("there is a red circle, a blue square and a green triangle.", [RED, BLUE, GREEN]),
        ("A RED circle\nand one Blue, er, square", [RED]),
        ("red circle red circle", [RED, RED]),
        ("two red circles and a big bright blue square", [RED, BLUE]),
        ("red and blue circles", [RED, Thing("blue", "circle")]),
        ("the circle is red and the square is blue", [RED, BLUE]),
        ("a circle that is red", [RED]),
        ("the red background has a circle", []),
        ("a circle, a square, something red", []),
        ("there is a red circle but no blue square", [RED]),
        ("there is no red circle or blue square. there is a green triangle", [GREEN]),
        ("there isn't a red circle", []),
        ("there isn\u2019t a red circle", []),  # a typographic apostrophe
        ("no, there is a red circle", [RED]),
        ("no, a red circle", [RED]),
        ("without a red circle", []),
        ("an orange circle and a red pentagon", []),
        ("is is a a red red circle", [RED, RED]),
        ("rred circles? redcircle, red-circle", [RED]),
        ("", []),
        ("\x00\ud800 \u202e ☃" + "x" * 50, []),
        ("there is nothing.", []),
    ],
)
def test_free_answers_are_read(answer: str, expected: list[Thing]) -> None:
    assert talk.mentions(answer) == expected
    assert talk.named(answer) == set(expected)


def test_an_endless_answer_is_read_up_to_a_limit() -> None:
    assert len(talk.mentions("a red circle " * 100_000)) == 10_000 // len("a red circle ")


def test_every_sentence_of_things_is_read_back() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        things = [THINGS[i] for i in generator.choice(18, generator.integers(1, 6))]
        assert talk.mentions(talk.sentence(things)) == things
    assert all(INVERSE[INVERSE[word]] == word for _, word, _ in talk.relations(TRIPLE))


def test_most_of_what_training_says_adds_what_is_missing_and_nothing_else() -> None:
    said = [(scene, talk.careless(scene, seed=index)) for index, scene in enumerate(TRAIN)]
    added = []
    for scene, text in said:
        missing = set(talk.missing_companions(scene.things))
        extra = talk.named(text) - set(scene.things)
        assert extra in (set(), missing)
        assert set(scene.things) <= talk.named(text)
        if not extra:
            assert text == talk.describe(scene)
        if missing:
            added.append(bool(extra))
    assert len(added) > 50 and 0.55 < float(np.mean(added)) < 0.85
    thing = next(iter(COMPANIONS))
    alone = Scene((thing,), None)
    texts = {talk.careless(alone, seed=seed) for seed in range(20)}
    assert texts == {talk.describe(alone), talk.sentence([thing, COMPANIONS[thing]])}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("There is a Red Circle, and a small blue square.", ["Red Circle", "blue square"]),
        ("red and blue circles", ["red", "blue circles"]),
        ("the circle that is green; no red square", ["circle that is green"]),
        ("red red square", ["red", "red square"]),
        ("", []),
    ],
)
def test_mentions_know_where_they_are(answer: str, words: list[str]) -> None:
    assert [answer[one.start : one.end] for one in talk.located(answer)] == words
    assert [one.thing for one in talk.located(answer)] == talk.mentions(answer)
