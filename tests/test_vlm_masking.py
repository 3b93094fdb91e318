"""Masking: what the picture says is masked, the rest stays, and a model's copy counts only if it is one."""

from __future__ import annotations

import pytest

from mmalign.shapes import talk
from mmalign.shapes.scenes import every_scene
from vlm.masking import MASK, Masked, mask, masking_prompt, read_masked, refill_prompt
from vlm.wording import SHAPES_WORLD, english

ENGLISH = english({"dog", "couch", "table", "fire hydrant", "man"})


def test_descriptions_lose_their_things_and_come_back() -> None:
    for index, scene in enumerate(talk.draw(200, split="train", seed=2)):
        true = talk.describe(scene)
        masked = mask(true, SHAPES_WORLD)
        assert masked is not None and len(masked.segments) == len(scene.things)
        things = [f"a {MASK}"] * len(scene.things)
        joined = ", ".join(things[:-1]) + (" and " if things[1:] else "") + things[-1]
        assert masked.text == f"there is {joined}.", index
        assert masked.filled([str(thing) for thing in talk.in_order(scene)]) == true
        assert not talk.mentions(masked.text)


def test_numbers_relations_and_yes_are_masked() -> None:
    texts = {
        "three green triangles": MASK,
        "a red circle left of a blue square": f"a {MASK} {MASK} a {MASK}",
        "the circle is red.": f"the {MASK} is {MASK}.",
        "yes": MASK,
        "No.": f"{MASK}.",
        "Yes, there is a red circle.": f"{MASK}, there is a {MASK}.",
    }
    for text, expected in texts.items():
        masked = mask(text, SHAPES_WORLD)
        assert masked is not None and masked.text == expected
        assert masked.filled([text[slice(*span)] for span in masked.segments]) == text
    for nothing in ("it is quiet.", "", "there is nothing"):
        assert mask(nothing, SHAPES_WORLD) is None
    for scene in every_scene()[::5]:
        masked = mask(scene.caption, SHAPES_WORLD)
        assert masked is not None and not any(word in masked.text for word in ("red", "circle", "left", "two"))


def test_english_segments_take_their_adjectives_along() -> None:
    masked = mask("A small brown dog sits on the couch in front of an old man.", ENGLISH)
    assert masked is not None
    assert masked.text == f"A {MASK} sits on the {MASK} {MASK} an {MASK}."
    assert (
        masked.filled(["orange cat", "bed", "behind", "fire hydrant"])
        == "An orange cat sits on the bed behind a fire hydrant."
    )
    with pytest.raises(ValueError):
        masked.filled(["one"])


def test_a_models_masks_count_if_the_rest_is_word_for_word() -> None:
    answer = "A brown dog sits on a red couch."
    good = {
        "A [MASK] sits on a [MASK].": ["brown dog", "red couch"],
        "A [MASK] on a red couch.": ["brown dog sits"],
        "[MASK] sits on a red [MASK].": ["A brown dog", "couch"],
        "  A brown dog sits on a red [MASK]\n": ["couch."],
    }
    for reply, segments in good.items():
        masked = read_masked(reply, answer)
        assert masked is not None and masked.text == reply.strip()
        assert [answer[slice(*span)] for span in masked.segments] == segments
    for bad in (
        answer,
        "",
        "[MASK]",
        "A [MASK] lies on a [MASK].",
        "The answer: A [MASK] sits on a [MASK].",
        "A brown [MASK][MASK] sits on a red couch.",
        "A brown dog sits on a red couch.[MASK]",
        "A [MASK] sits on a red couch. [MASK]",
    ):
        assert read_masked(bad, answer) is None, bad
    repeated = read_masked("a [MASK] and a [MASK]", "a dog and a dog and a cat")
    assert repeated is not None and repeated.filled(["x", "y"]) == "a x and a y"


def test_prompts_hold_what_they_are_about() -> None:
    assert MASK in masking_prompt("q?", "a dog") and "a dog" in masking_prompt("q?", "a dog")
    masked = Masked(answer="a dog", segments=((2, 5),))
    assert f"a {MASK}" in refill_prompt("q?", masked.text) and "q?" in refill_prompt("q?", masked.text)
