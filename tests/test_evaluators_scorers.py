"""Scorers: found by name, strict about what they take and give; CLIP's numbers are transformers' own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluators import scorer as scorers
from evaluators.scorer import Scorer, load, main_scores
from evaluators.towers import CosineScorer
from mmalign import shapes
from mmalign.errors import UserError
from mmalign.shapes.render import render
from mmalign.shapes.scenes import draw_scenes, negatives, parse

CAPTION = "a red circle left of a blue square"


def picture(caption: str, seed: int = 0) -> Image.Image:
    scene = parse(caption)
    assert scene is not None
    return Image.fromarray(render(scene, seed))


# -------------------------------------------------------------------------------------------------------- by name


def test_scorers_are_known_by_their_files() -> None:
    assert {"clip", "shapes"} <= set(scorers.known())
    assert isinstance(load("shapes"), Scorer)


def test_an_unknown_scorer_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no scorer 'shape'.*shapes"):
        load("shape")


@pytest.mark.parametrize("name", ["shapes", "clip"])
def test_an_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"scorer '{name}' does not take these options.*colour"):
        load(name, {"colour": "red"})


class Fixed:
    """A scorer that says what it is told to."""

    identity, main, numbers = "fixed@1", "taste", ("taste",)

    def __init__(self, values: Sequence[float]) -> None:
        self.values = values

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        return [{"taste": value} for value in self.values]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused_with_its_picture(wrong: float) -> None:
    images = [picture(CAPTION)] * 2
    with pytest.raises(UserError, match=r"fixed@1 returned -?(nan|inf) \(picture 1: 'second'\)"):
        main_scores(Fixed([0.5, wrong]), ["first", "second"], images)
    assert main_scores(Fixed([0.5, 0.25]), ["first", "second"], images) == [0.5, 0.25]


def test_a_score_for_every_picture_is_asked_for() -> None:
    with pytest.raises(UserError, match="fixed@1 returned 1 scores for 2 pictures"):
        main_scores(Fixed([0.5]), ["first", "second"], [picture(CAPTION)] * 2)


# --------------------------------------------------------------------------------------------------------- shapes


def test_the_shapes_checker_judges_the_caption() -> None:
    right, other = picture(CAPTION), picture("a green triangle")
    good, bad = load("shapes").score_images([CAPTION, CAPTION], [right, other])
    assert (good["reward"], good["faithful"], good["relation"]) == (1.0, 1.0, 1.0)
    assert (bad["reward"], bad["faithful"]) == (0.0, 0.0)
    assert "relation" not in load("shapes").score_images(["a red circle"], [right])[0]


def test_the_shapes_checker_takes_larger_pictures_and_other_modes() -> None:
    large = picture(CAPTION).resize((128, 128), Image.Resampling.NEAREST).convert("RGBA")
    assert load("shapes").score_images([CAPTION], [large]) == load("shapes").score_images([CAPTION], [picture(CAPTION)])


def test_the_main_number_is_chosen_and_a_mistyped_one_named() -> None:
    images = [picture(CAPTION)]
    row = load("shapes").score_images([CAPTION], images)[0]
    assert main_scores(load("shapes", {"main": "style"}), [CAPTION], images) == [row["style"]]
    with pytest.raises(UserError, match=r"no number 'stile'.*style"):
        load("shapes", {"main": "stile"})


def test_a_prompt_that_is_no_caption_is_a_mistake_of_the_user() -> None:
    with pytest.raises(UserError, match="not a caption of the shapes world: 'an oil painting of a cat'"):
        load("shapes").score_images(["an oil painting of a cat"], [picture(CAPTION)])


# ----------------------------------------------------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def clip() -> Scorer:
    return load("clip", {"device": "cpu"})


@pytest.fixture(scope="module")
def batch() -> tuple[list[str], list[Image.Image]]:
    drawn = draw_scenes(9, split="heldout", seed=5)
    captions = [scene.caption for scene in drawn]
    captions[-1] = "a photograph of something else entirely"  # of another length, and in bytes
    return captions, [Image.fromarray(render(scene, number)) for number, scene in enumerate(drawn)]


def test_a_clip_score_depends_on_its_prompt_and_picture_alone(
    clip: Scorer, batch: tuple[list[str], list[Image.Image]]
) -> None:
    prompts, images = batch
    together = main_scores(clip, prompts, images)
    alone = [main_scores(clip, [prompt], [image])[0] for prompt, image in zip(prompts, images, strict=True)]
    backwards = main_scores(clip, prompts[::-1], images[::-1])[::-1]
    assert together == pytest.approx(alone, abs=1e-6)
    assert together == pytest.approx(backwards, abs=1e-6)
    assert all(-1.0 <= score <= 1.0 for score in together)
    assert len(set(together)) == len(together)


def test_clip_is_the_cosine_of_transformers_features(clip: Scorer, batch: tuple[list[str], list[Image.Image]]) -> None:
    from transformers import AutoProcessor, CLIPModel

    prompts, images = batch
    folder = shapes.model_folder("clip")
    model: Any = CLIPModel.from_pretrained(folder).float().eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        text = model.get_text_features(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        image = model.get_image_features(pixel_values=inputs.pixel_values)
    # transformers 5 wraps the projected features in an output
    text, image = (getattr(found, "pooler_output", found) for found in (text, image))
    cosine = torch.nn.functional.cosine_similarity(text, image)
    assert main_scores(clip, prompts, images) == pytest.approx(cosine.tolist(), abs=1e-5)


def test_image_features_are_of_length_one_and_of_each_picture_alone(
    clip: Scorer, batch: tuple[list[str], list[Image.Image]]
) -> None:
    assert isinstance(clip, CosineScorer)
    features = clip.image_features(batch[1])
    assert features.dtype == torch.float32
    assert features.norm(dim=-1).tolist() == pytest.approx([1.0] * len(batch[1]), abs=1e-5)
    torch.testing.assert_close(features[3:4], clip.image_features(batch[1][3:4]), atol=1e-5, rtol=0)


def test_a_scorer_names_all_its_numbers(clip: Scorer, batch: tuple[list[str], list[Image.Image]]) -> None:
    assert set(clip.score_images(batch[0][:1], batch[1][:1])[0]) == set(clip.numbers)
    checker = load("shapes")
    assert set(checker.score_images([CAPTION], [picture(CAPTION)])[0]) == set(checker.numbers)


def test_the_embedded_clip_separates_hard_negatives(clip: Scorer) -> None:
    prompts, images, owners = [], [], []
    for number, scene in enumerate(draw_scenes(60, split="heldout", seed=9)):
        image = Image.fromarray(render(scene, 10_000 + number))
        said = [scene, *(negative for _, negative in negatives(scene))]
        prompts += [one.caption for one in said]
        images += [image] * len(said)
        owners += [(number, one is scene) for one in said]
    scores = main_scores(clip, prompts, images)
    own = {number: score for (number, true), score in zip(owners, scores, strict=True) if true}
    right = [own[number] > score for (number, true), score in zip(owners, scores, strict=True) if not true]
    assert len(right) > 300
    assert np.mean(right) >= 0.85


def test_a_missing_clip_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("nothing", "empty"):
        with pytest.raises(UserError, match=r"no folder with a config\.json for clip"):
            load("clip", {"path": str(tmp_path / folder)})
