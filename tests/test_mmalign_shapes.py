"""The embedded world: scenes and captions, pictures and the checker, the vocabulary, the shipped models' hashes."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign import shapes
from mmalign.shapes import checker, words
from mmalign.shapes.render import SIZE, coverage, render, templates
from mmalign.shapes.scenes import (
    COLOURS,
    INVERSE,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SHARES,
    Scene,
    Split,
    Thing,
    draw_scenes,
    every_scene,
    negatives,
    parse,
    questions,
)

SOME = every_scene()[::4]  # a few hundred scenes of every kind
SPLITS: tuple[Split, Split] = ("train", "heldout")


def noisy(picture: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, picture.shape)
    return np.clip(np.round(picture + noise), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------- scenes and captions


def test_every_scene_has_a_caption_of_its_own_that_is_parsed_back() -> None:
    scenes = every_scene()
    assert len(scenes) == len(set(scenes)) == 1278
    assert Counter(scene.kind for scene in scenes) == {"one": 18, "relation": 18 * 17 * 4, "count": 36}
    assert len({scene.caption for scene in scenes}) == 1278
    assert [parse(scene.caption) for scene in scenes] == list(scenes)


def test_parse_forgives_case_space_and_full_stop_but_no_other_sentence() -> None:
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "left of")
    assert parse("  A red  circle left of\na blue square. ") == scene
    for text in (
        "",
        "a circle",
        "red circle",
        "a red circle left of a red circle",
        "four red circles",
        "a red circles",
    ):
        assert parse(text) is None


def test_meaning_is_shared_by_exactly_the_two_ways_to_say_a_relation() -> None:
    one, other = Thing("red", "circle"), Thing("blue", "square")
    for relation in RELATIONS:
        there, back = Scene((one, other), relation), Scene((other, one), INVERSE[relation])
        assert there.meaning == back.meaning
        assert there.meaning != Scene((other, one), relation).meaning
    sayings = Counter(scene.meaning for scene in every_scene())
    assert Counter(sayings.values()) == {1: 18 + 36, 2: 18 * 17 * 4 // 2}


def test_the_split_does_not_leak() -> None:
    pairs = [scene for scene in every_scene() if scene.kind == "relation"]
    by_pair: dict[frozenset[Thing], list[Scene]] = {}
    for scene in pairs:
        by_pair.setdefault(frozenset(scene.things), []).append(scene)
    assert len(by_pair) == 18 * 17 // 2
    for scenes in by_pair.values():
        assert len(scenes) == 8  # both orders, four relations
        assert len({scene.split for scene in scenes}) == 1
    meanings = {name: {scene.meaning for scene in every_scene() if scene.split == name} for name in SPLITS}
    assert not meanings["train"] & meanings["heldout"]
    assert all(scene.split == "train" for scene in every_scene() if scene.kind == "one")
    share = np.mean([scenes[0].split == "heldout" for scenes in by_pair.values()])
    assert 0.2 < share < 0.4
    seen = {thing for scene in every_scene() if scene.split == "train" for thing in scene.things}
    assert len(seen) == 18  # nothing held out is new by itself


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_drawn_in_proportion_from_one_split_and_the_same_for_a_seed(split: Split) -> None:
    drawn = draw_scenes(4000, split=split, seed=3)
    assert {scene.split for scene in drawn} == {split}
    assert drawn == draw_scenes(4000, split=split, seed=3)
    assert drawn != draw_scenes(4000, split=split, seed=4)
    kinds = [kind for kind in SHARES if split == "train" or kind != "one"]
    total = sum(SHARES[kind] for kind in kinds)
    found = Counter(scene.kind for scene in drawn)
    assert set(found) == set(kinds)
    for kind in kinds:  # four standard errors of a share are at most 4 * 0.5 / sqrt(4000) = 0.032
        assert found[kind] / 4000 == pytest.approx(SHARES[kind] / total, abs=0.032)


def test_negatives_change_one_attribute_and_never_say_the_same() -> None:
    known = set(every_scene())
    kinds: Counter[str] = Counter()
    for scene in every_scene():
        changed = list(negatives(scene))
        assert changed
        for what, negative in changed:
            kinds[what] += 1
            assert negative in known
            assert negative.meaning != scene.meaning
            if what in ("colour", "shape"):
                assert negative.relation == scene.relation
                assert len(negative.things) == len(scene.things)
                assert negative.things[0] != scene.things[0]
            elif what == "relation":
                assert negative.things == scene.things
            elif what == "count":
                assert set(negative.things) == set(scene.things)
            else:
                assert Counter(t.colour for t in negative.things) == Counter(t.colour for t in scene.things)
                assert Counter(t.shape for t in negative.things) == Counter(t.shape for t in scene.things)
    assert set(kinds) == {"colour", "shape", "relation", "count", "swap"}


def test_questions_are_answered_by_what_the_scene_has() -> None:
    for scene in SOME:
        asked = list(questions(scene))
        assert len({text for _, text, _ in asked}) == len(asked)
        yes = {
            category: {text for kind, text, answer in asked if answer and kind == category} for category, *_ in asked
        }
        assert yes["object"] == {f"is there a {thing}?" for thing in scene.things}
        assert yes["count"] == {
            {
                1: "is there exactly one object?",
                2: "are there exactly two objects?",
                3: "are there exactly three objects?",
            }[len(scene.things)]
        }
        if scene.relation:
            first, second = scene.things
            assert yes["relation"] == {f"is the {first} {scene.relation} the {second}?"}
        else:
            assert "relation" not in yes
        assert Counter(category for category, *_ in asked)["object"] == len(COLOURS) * len(SHAPES)


def test_the_answers_hold_in_the_picture() -> None:
    for number, scene in enumerate(SOME[::5]):
        picture = render(scene, number)
        shown, count = checker.shown(picture), len(checker.look(picture))
        for category, text, answer in questions(scene):
            if category == "object":
                colour, shape = text.removesuffix("?").split()[-2:]
                assert (Thing(colour, shape) in shown) == answer
            elif category == "count":
                number_asked = {"one": 1, "two": 2, "three": 3}[text.split()[3]]
                assert (count == number_asked) == answer
            else:
                first, second = scene.things
                word = next(word for word in RELATIONS if f" {word} " in text)
                assert checker.check(picture, Scene((first, second), word)).relation == float(answer)


# ---------------------------------------------------------------------------------------- pictures and the checker


def test_a_picture_is_bytes_and_the_same_for_a_seed() -> None:
    scene = SOME[100]
    picture = render(scene, 5)
    assert picture.dtype == np.uint8 and picture.shape == (SIZE, SIZE, 3)
    assert (picture == render(scene, 5)).all()
    assert (picture != render(scene, 6)).any()


@pytest.mark.parametrize("sigma", [0.0, 8.0])
def test_a_picture_of_a_scene_is_faithful_also_with_noise(sigma: float) -> None:
    for number, scene in enumerate(SOME):
        verdict = checker.check(noisy(render(scene, number), sigma, number), scene)
        assert (verdict.count, verdict.colour, verdict.shape) == (1.0, 1.0, 1.0), scene.caption
        assert verdict.relation == (1.0 if scene.relation else None), scene.caption
        assert verdict.reward == 1.0 and verdict.faithful


def test_both_sayings_of_a_relation_are_faithful() -> None:
    for number, scene in enumerate(scene for scene in SOME if scene.relation):
        first, second = scene.things
        assert checker.check(render(scene, number), Scene((second, first), INVERSE[str(scene.relation)])).faithful


def test_every_hard_negative_is_rejected() -> None:
    for number, scene in enumerate(SOME[::2]):
        picture = render(scene, number)
        for what, negative in negatives(scene):
            verdict = checker.check(picture, negative)
            assert not verdict.faithful, (scene.caption, what, negative.caption)
            assert 0.0 <= verdict.reward < 1.0
            part = {"colour": verdict.colour, "shape": verdict.shape, "count": verdict.count}.get(what, verdict.reward)
            assert part < 1.0


def test_a_scene_with_something_added_or_missing_is_not_faithful() -> None:
    pair = Scene((Thing("red", "circle"), Thing("blue", "square")), "above")
    assert not checker.check(render(pair, 0), Scene((pair.things[0],))).faithful
    alone = checker.check(render(Scene((pair.things[0],)), 0), pair)
    assert (alone.count, alone.colour, alone.shape, alone.relation) == (0.0, 0.5, 0.5, 0.0)
    empty = checker.check(np.full((SIZE, SIZE, 3), 128, np.uint8), pair)
    assert (empty.reward, empty.found) == (0.0, ())


def test_what_is_found_lies_where_it_was_drawn() -> None:
    for shape, colour in itertools.product(SHAPES, COLOURS):
        (found,) = checker.look(render(Scene((Thing(colour, shape),)), 2))
        assert (found.colour, found.shape) == (colour, shape)
        assert abs(found.x - SIZE / 2) < 5 and abs(found.y - SIZE / 2) < 7  # the jitter, and a triangle's mass is low
        assert found.overlap > checker.MIN_OVERLAP


def test_templates_are_the_shapes_in_the_middle() -> None:
    assert list(templates()) == list(SHAPES)
    for shape, template in templates().items():
        assert (template == coverage(shape, SIZE / 2, SIZE / 2)).all()
        assert template[SIZE // 2, SIZE // 2] == 1.0 and template[0].sum() == 0.0
        assert np.allclose(template, template[:, ::-1])  # all three are symmetric


def test_style_prefers_a_bright_and_flat_ground() -> None:
    def ground(level: float, slope: float) -> np.ndarray:
        ramp = level + slope * (np.arange(SIZE) / SIZE - 0.5)
        return np.broadcast_to(np.round(255 * ramp)[None, :, None], (SIZE, SIZE, 3)).astype(np.uint8)

    assert checker.style(ground(0.8, 0)) > checker.style(ground(0.5, 0)) > checker.style(ground(0.2, 0))
    assert checker.style(ground(0.6, 0)) > checker.style(ground(0.6, 0.1)) > checker.style(ground(0.6, 0.3))
    assert checker.style(ground(1.0, 0)) == 1.0
    assert checker.style(np.tile(np.array([255, 0, 0], np.uint8), (SIZE, SIZE, 1))) == 0.0  # no ground at all
    flat, thing = ground(0.8, 0), coverage("circle", 16, 16) > 0
    flat[thing] = (255, 0, 0)  # what stands on the ground has no part in it
    assert checker.style(flat) == pytest.approx(0.8, abs=1e-6)


# --------------------------------------------------------------------------------------------------- the vocabulary


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer from the files a tokenizer of CLIP is made of."""
    from transformers import CLIPTokenizer

    vocabulary, merges = words.vocabulary()
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return CLIPTokenizer.from_pretrained(folder)


def test_the_vocabulary_numbers_every_token_once_and_the_end_last() -> None:
    vocabulary, merges = words.vocabulary()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert vocabulary[words.END] == len(vocabulary) - 1
    assert vocabulary[words.START] == len(vocabulary) - 2
    assert len(set(merges)) == len(merges)
    assert len(set(words.byte_symbols())) == 256


def test_every_word_is_one_token(tokenizer: Any) -> None:
    vocabulary, _ = words.vocabulary()
    start, end = vocabulary[words.START], vocabulary[words.END]
    for word in words.WORDS:
        assert tokenizer(word).input_ids == [start, vocabulary[word + words.WORD_END], end], word
    for scene in SOME:
        assert len(tokenizer(scene.caption).input_ids) == len(scene.caption.split()) + 2
        for _, text, _ in questions(scene):
            assert len(tokenizer(text).input_ids) == len(text.split()) + 3  # and the question mark


def test_other_text_falls_back_to_bytes(tokenizer: Any) -> None:
    for text in ("zebra", "größer 龍", "naïve 🙂", "x" * 20):
        ids = tokenizer(text).input_ids
        tokens = tokenizer.convert_ids_to_tokens(ids[1:-1])
        # only the frame is special: an unknown token would be the end token's id, which some pipelines read as "stop"
        assert not {words.START, words.END} & set(tokens)
        assert tokenizer.decode(ids[1:-1]).strip() == text
    assert set(NUMBERS.values()) <= set(words.WORDS)


@pytest.mark.parametrize("folder", ["clip", "t2i/tokenizer"])
def test_the_shipped_tokenizers_have_this_vocabulary(folder: str, tokenizer: Any) -> None:
    from transformers import CLIPTokenizer

    shipped = CLIPTokenizer.from_pretrained(shapes.model_folder(folder))
    assert shipped.get_vocab() == words.vocabulary()[0]
    for text in (SOME[200].caption, "zebra"):
        assert shipped(text).input_ids == tokenizer(text).input_ids


# ------------------------------------------------------------------------------------------------ the shipped files


def test_the_shipped_models_are_the_ones_listed_and_small() -> None:
    folder: Path = shapes.model_folder(".")
    rows = [line.split("  ", 1) for line in (folder / "SHA256SUMS").read_text().splitlines()]
    listed = {path: digest for digest, path in rows}
    assert len(listed) == len(rows)
    beside = {"README.md", "SHA256SUMS"}
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    assert set(files) - beside == set(listed)
    for name, digest in listed.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest, name
    assert sum(file.stat().st_size for file in files.values()) <= 24_000_000
