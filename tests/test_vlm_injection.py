"""Injected hallucinations: always false, plausible by the data's habits, as long as the truth, the same every time."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache

import numpy as np
import pytest

from mmalign.shapes import scenes, talk
from mmalign.shapes.scenes import INVERSE, RELATIONS, Scene, Thing
from vlm.injection import CoOccurrence, Injected, Injector, SaidTruth, SceneTruth, injection_prompt
from vlm.wording import SHAPES_WORLD, english, learn_nouns, plural, singular

TRAIN = talk.draw(1500, split="train", seed=3)
ANSWERS = [
    "A brown dog sits on a red couch next to a small wooden table. There is no cat in the room.",
    "Two men are riding bicycles on the street. A red car is parked behind the bus.",
    "The kitchen has a white stove, a black refrigerator and a wooden table with three chairs.",
    "A man holds a tennis racket on the court, and a tennis racket lies on the bench.",
    "A woman with an orange umbrella stands in front of a fire hydrant.",
    "A fire hydrant and a car are on the street, and a dog is beside the car.",
    "There is a cat on the couch and a dog under the table.",
]


@cache
def table() -> CoOccurrence:
    return CoOccurrence.learn(SHAPES_WORLD, [talk.describe(scene) for scene in TRAIN])


def every_talk_scene() -> list[Scene]:
    """All sets of things that `talk.draw` can draw, two of them in any relation."""
    found = [Scene((thing,)) for thing in talk.THINGS]
    found += [Scene(pair, relation) for pair in itertools.combinations(talk.THINGS, 2) for relation in RELATIONS]
    return found + [Scene(three) for three in itertools.combinations(talk.THINGS, 3)]


def rebuilt(answer: str, made: Injected) -> str:
    """The text that the edits come to."""
    parts, end = [], 0
    for edit in made.edits:
        assert answer[edit.start : edit.end] == edit.old and edit.start >= end
        parts += [answer[end : edit.start], edit.new]
        end = edit.end
    return "".join([*parts, answer[end:]])


@pytest.mark.parametrize("additions", [0.0, 0.5])
def test_no_injection_is_true_of_any_scene(additions: float) -> None:
    injector = Injector(table(), additions=additions)
    kinds: Counter[str] = Counter()
    for index, scene in enumerate(every_talk_scene()):
        true = talk.describe(scene)
        made = injector.rewrite(true, SceneTruth(scene), seed=index)
        assert made is not None
        said = talk.mentions(made.text)
        false = [thing for thing in said if thing not in scene.things]
        assert len(false) == 1 and len(set(said)) == len(said), (true, made.text)
        assert made.text == rebuilt(true, made)
        expected = talk.sentence(said)
        assert made.text == expected  # still good grammar
        kinds.update(edit.kind for edit in made.edits)
        change = {"addition": 1, "omission": -1}
        assert len(said) - len(scene.things) == sum(change.get(edit.kind, 0) for edit in made.edits)
    assert set(kinds) == ({"object", "attribute"} | ({"addition", "omission"} if additions else set()))


def test_captions_with_numbers_and_relations_become_false() -> None:
    injector = Injector(table())
    kinds: Counter[str] = Counter()
    for index, scene in enumerate(scenes.every_scene()[::3]):
        made = injector.rewrite(scene.caption, SceneTruth(scene), seed=index)
        assert made is not None
        other = scenes.parse(made.text)
        assert other is not None and other.meaning != scene.meaning, (scene.caption, made.text)
        kinds.update(edit.kind for edit in made.edits)
    assert set(kinds) == {"object", "attribute", "count", "relation"}


def test_statements_about_a_picture_become_false() -> None:
    injector = Injector(table())
    for index, scene in enumerate(TRAIN[:100]):
        for first, relation, second in sorted(talk.relations(scene)):
            made = injector.rewrite(f"The {first} is {relation} the {second}.", SceneTruth(scene), seed=index)
            assert made is not None and made.text.startswith("The ")
            (edit,) = made.edits
            if edit.kind == "relation":
                assert (first, edit.new, second) not in talk.relations(scene) and edit.new == INVERSE[relation]
            else:
                assert not set(talk.mentions(made.text)) <= set(scene.things)
        thing = scene.things[0]
        made = injector.rewrite(f"the {thing.shape} is {thing.colour}.", SceneTruth(scene), seed=index)
        assert made is not None and made.edits[0].kind == "attribute"
        assert talk.mentions(made.text)[0] not in scene.things


def test_short_answers_are_flipped_and_denials_left_alone() -> None:
    injector, truth = Injector(table()), SceneTruth(TRAIN[0])
    for true, false in (("yes", "no"), ("No.", "Yes."), ("NO", "Yes"), (" yes!", " no!")):
        made = injector.rewrite(true, truth, seed=0)
        assert made is not None and made.text == false and made.edits[0].kind == "answer"
    for nothing in ("No, there is no red circle.", "there isn't a red circle", "it is quiet", "", "???"):
        assert injector.rewrite(nothing, truth, seed=0) is None


def test_edits_depend_on_the_seed_alone() -> None:
    first, second = Injector(table(), additions=0.3), Injector(table(), additions=0.3)
    texts = [
        [injector.rewrite(talk.describe(scene), SceneTruth(scene), seed=seed) for seed, scene in enumerate(TRAIN[:200])]
        for injector in (first, second)
    ]
    assert texts[0] == texts[1]
    scene = TRAIN[1]
    assert len({str(first.rewrite(talk.describe(scene), SceneTruth(scene), seed=seed)) for seed in range(40)}) > 10


def test_false_things_follow_the_habits_of_the_data() -> None:
    scene = Scene((Thing("red", "circle"), Thing("cyan", "triangle")), "left of")  # a companion is missing
    injector = Injector(table())
    invented: Counter[Thing] = Counter()
    for seed in range(400):
        made = injector.rewrite(talk.describe(scene), SceneTruth(scene), seed=seed)
        assert made is not None
        if made.edits[0].kind == "object" and made.edits[0].old == "cyan triangle":
            invented.update(set(talk.mentions(made.text)) - set(scene.things))
    thing, times = invented.most_common(1)[0]
    assert thing == talk.COMPANIONS[Thing("red", "circle")]
    assert times > 0.5 * invented.total() > 25


def test_additions_and_omissions_keep_answers_as_long() -> None:
    injector = Injector(table(), additions=0.3)
    made = [injector.rewrite(talk.describe(scene), SceneTruth(scene), seed=seed) for seed, scene in enumerate(TRAIN)]
    lengths = [len(one.text.split()) for one in made if one is not None]
    true = [len(talk.describe(scene).split()) for scene in TRAIN]
    assert abs(np.mean(lengths) - np.mean(true)) < 0.02 * np.mean(true)
    kinds = Counter(edit.kind for one in made if one is not None for edit in one.edits)
    assert kinds["addition"] > 200 and kinds["omission"] > 200


def test_more_edits_are_as_many_as_there_is_room_for() -> None:
    injector = Injector(table(), edits=3)
    for seed, scene in enumerate(TRAIN[:100]):
        made = injector.rewrite(talk.describe(scene), SceneTruth(scene), seed=seed)
        assert made is not None and len(made.edits) == len(scene.things)
        assert not set(talk.mentions(made.text)) & set(scene.things)


# ------------------------------------------------------------------------------------------------ other data


def test_nouns_are_learnt_from_answers() -> None:
    nouns = learn_nouns(ANSWERS)
    assert {"dog", "table", "car", "street", "couch", "fire hydrant", "man"} <= nouns
    assert "tennis racket" not in nouns  # two of them, in one answer
    assert {"tennis racket", "umbrella", "chair"} <= learn_nouns(ANSWERS, least=1)
    assert not {"room.", "small", "red", "riding"} & learn_nouns(ANSWERS, least=1)
    for noun in ("dog", "bus", "child", "bench", "baby", "fire hydrant", "person", "glass"):
        assert singular(plural(noun)) == noun or " " in noun


def test_what_may_be_true_is_not_injected() -> None:
    vocabulary = english(learn_nouns(ANSWERS, least=1) | {"person", "sofa", "vehicle"})
    counted = CoOccurrence.learn(vocabulary, [*ANSWERS, "A person and a vehicle are by the sofa."])
    injector = Injector(counted)
    kinds: Counter[str] = Counter()
    for answer in ANSWERS:
        # everything that is said about the picture is true, also what another answer says
        truth = SaidTruth([answer, "There is a grey cat and a chair."], vocabulary)
        for seed in range(60):
            made = injector.rewrite(answer, truth, seed=seed)
            assert made is not None and made.text == rebuilt(answer, made) != answer
            for edit in made.edits:
                kinds[edit.kind] += 1
                new = set(edit.new.lower().split())
                if edit.kind == "object":
                    assert not new & {"cat", "chair"}
                    if "man" in answer or "men" in answer or "woman" in answer:
                        assert not new & {"man", "men", "woman", "person"}
                    if "couch" in answer:
                        assert "sofa" not in new
                    if " car" in answer:
                        assert "vehicle" not in new
                if edit.kind == "attribute" and edit.old == "red":
                    assert not new & {"orange", "pink", "maroon"}
            assert "There is no cat in the room." in made.text or "no cat" not in answer
    assert set(kinds) == {"object", "attribute", "count", "relation"}


def test_articles_and_capitals_fit_what_follows() -> None:
    vocabulary = english({"umbrella", "dog"})
    injector = Injector(CoOccurrence.learn(vocabulary, ["a dog", "an umbrella"]))
    made = injector.rewrite("A dog sits there.", SaidTruth(["A dog sits there."], vocabulary), seed=0)
    assert made is not None and made.text == "An umbrella sits there."
    made = injector.rewrite("I see an umbrella.", SaidTruth(["an umbrella"], vocabulary), seed=0)
    assert made is not None and made.text == "I see a dog."


def test_texts_that_are_not_plain_ascii_keep_their_places() -> None:
    vocabulary = english({"dog", "cat"})
    injector = Injector(CoOccurrence.learn(vocabulary, ["a dog and a cat"]))
    answer = "İİ café – a dog’s “toy” 🐶. A dog!"
    made = injector.rewrite(answer, SaidTruth([answer], vocabulary), seed=1)
    assert made is not None and made.text == "İİ café – a dog’s “toy” 🐶. A cat!"


def test_the_prompt_says_what_is_wanted() -> None:
    prompt = injection_prompt("What is there?", "A dog.", 2)
    assert "2 mistakes" in prompt and "What is there?" in prompt and "A dog." in prompt
