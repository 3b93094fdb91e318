"""Scorers that need no model, composites, error rows, and `mmalign scorers`."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_scorers import PHOTOS, PROMPTS, write_clip

from evaluators import listing
from evaluators.scorer import Card, Scored, Scorer, card, known, load, main_scores, score_each
from mmalign import cli
from mmalign.errors import UserError
from mmalign.media import Media

# ------------------------------------------------------------------------------------------------------------- JPEG


def test_jpeg_sizes_are_those_of_the_published_pictures() -> None:
    ramp = np.repeat(np.linspace(0, 255, 512).astype(np.uint8)[None, :, None], 512, 0).repeat(3, 2)
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    images = [Image.new("RGB", (512, 512), (128, 128, 128)), Image.fromarray(ramp), Image.fromarray(noise)]
    flat, gradient, random = main_scores(load("jpeg"), ["x"] * 3, images)
    # of Pillow 12 and its bundled library: other builds differ a little
    assert flat == pytest.approx(4.72, rel=0.1)
    assert gradient == pytest.approx(15.59, rel=0.2)
    assert random == pytest.approx(308.1, rel=0.05)
    row = load("jpeg").score_images(["x"], images[2:])[0]
    assert row["bits_per_pixel"] == pytest.approx(random * 8000 / 512**2)
    assert load("jpeg", {"main": "bits_per_pixel"}).main == "bits_per_pixel"
    with pytest.raises(UserError, match=r"jpeg has no number 'bits'.*bits_per_pixel"):
        load("jpeg", {"main": "bits"})


def test_a_jpeg_size_is_that_of_the_file() -> None:
    buffer = io.BytesIO()
    PHOTOS[3].save(buffer, format="JPEG", quality=95)
    assert main_scores(load("jpeg"), ["x"], [PHOTOS[3]]) == [len(buffer.getvalue()) / 1000]
    assert load("jpeg").identity.startswith("jpeg@1#")


# -------------------------------------------------------------------------------------------------------- composites


def term(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "scorer": {"name": "jpeg"}, "mean": 2.0, "std": 0.5, **more}


def test_a_composite_is_the_weighted_sum_of_standardised_numbers() -> None:
    other = term("bits", number="bits_per_pixel", weight=-0.25, mean=4.0, std=2.0)
    scorer = load("composite", {"terms": [term("size"), other]})
    rows, jpeg = scorer.score_images(PROMPTS, PHOTOS), load("jpeg").score_images(PROMPTS, PHOTOS)
    for row, part in zip(rows, jpeg, strict=True):
        expected = (part["kilobytes"] - 2) / 0.5 - 0.25 * (part["bits_per_pixel"] - 4) / 2
        assert row == {"composite": pytest.approx(expected), "size": part["kilobytes"], "bits": part["bits_per_pixel"]}
    assert set(rows[0]) == set(scorer.numbers) and scorer.main == "composite"
    assert "less 4.0 over 2.0" in scorer.identity and "jpeg@1#" in scorer.identity
    alone = [scorer.score_images([p], [i])[0] for p, i in zip(PROMPTS, PHOTOS, strict=True)]
    assert alone == rows


COMPOSITES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "bare": ([term("size"), {"name": "b", "scorer": {"name": "jpeg"}}], "term 'b' has no mean and std"),
    "half": ([{"name": "b", "scorer": {"name": "jpeg"}, "mean": 1.0}], "mean and std belong together"),
    "none": ([], "at least 1"),
    "scorer": ([term("b", scorer={"name": "jpg"})], "no scorer 'jpg'.*jpeg"),
    "key": ([term("b", wieght=2.0)], "Extra inputs.*wieght"),
    "name": ([term("composite")], "may not be called 'composite'"),
}


@pytest.mark.parametrize(("terms", "said"), COMPOSITES.values(), ids=COMPOSITES)
def test_a_wrong_composite_is_a_line(terms: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load("composite", {"terms": terms})
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------- error rows


class Picky:
    """Scores by width, and refuses pictures that are 13 wide."""

    identity, main, numbers = "picky@1", "width", ("width",)

    def __init__(self) -> None:
        self.calls = 0

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        self.calls += 1
        if any(image.width == 13 for image in images):
            raise UserError("13 is refused")
        return [{"width": math.nan if image.width == 7 else float(image.width)} for image in images]


def test_a_bad_picture_is_a_row_with_an_error_and_spoils_no_other(tmp_path: Path) -> None:
    whole = io.BytesIO()
    PHOTOS[3].save(whole, format="PNG")
    damaged = whole.getvalue()[: len(whole.getvalue()) // 2]
    (tmp_path / "text.png").write_text("not a picture")
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, format="PNG")
    images: list[Image.Image | Callable[[], Image.Image]] = [
        Image.new("RGB", (20, 20)),
        Media(data=damaged).open,
        Media(path="text.png", root=str(tmp_path)).open,
        Media(path="nowhere.png", root=str(tmp_path)).open,
        Media(data=bomb.getvalue()).open,
        Image.new("RGB", (13, 20)),
        Image.new("RGB", (7, 20)),
        Image.open(io.BytesIO(damaged)),
        Media(data=whole.getvalue()).open,
    ]
    rows = score_each(Picky(), ["x"] * len(images), images)
    assert [row.numbers for row in rows] == [{"width": 20.0}, *[{}] * 7, {"width": 160.0}]
    said = [
        "cannot decode",
        "cannot decode",
        "does not exist",
        "the limit is",
        "13 is refused",
        "width = nan",
        "truncated",
    ]
    for row, text in zip(rows[1:8], said, strict=True):
        assert row.error is not None and text in row.error and "\n" not in row.error
    assert rows[0].error is None


def test_which_pictures_are_refused_is_found_by_halves() -> None:
    scorer = Picky()
    images = [Image.new("RGB", (13 if index == 37 else 20, 4)) for index in range(64)]
    rows = score_each(scorer, ["x"] * 64, images)
    assert [index for index, row in enumerate(rows) if row.error] == [37]
    assert scorer.calls == 1 + 2 * 6
    assert score_each(scorer, [], []) == []
    assert rows[37] == Scored(error="13 is refused")


def test_a_prompt_that_the_checker_cannot_read_is_a_row() -> None:
    rows = score_each(load("shapes"), ["a red circle", "an oil painting"], PHOTOS[:2])
    assert rows[0].error is None and "not a caption" in str(rows[1].error)


# ----------------------------------------------------------------------------------------------------- the listing


def test_every_scorer_has_a_card() -> None:
    for name in known():
        one = card(name)
        assert isinstance(one, Card) and one.unit and one.licence
        assert all(weights.repo.count("/") == 1 and weights.gigabytes for weights in one.weights)
    assert isinstance(load("jpeg"), Scorer)


def test_the_listing_says_unit_licence_and_where_weights_are_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMALIGN_WEIGHTS", raising=False)
    assert cli.main(["scorers", "pickscore", "shapes", "trained"]) == 0
    out = capsys.readouterr().out
    assert "pickscore  not loadable" in out and "shapes  loadable" in out
    assert "asks for path=RUN" in out[out.index("trained") :] and out.count("asks for") == 1
    assert "$MMALIGN_WEIGHTS/pickscore, or yuvalkirstain/PickScore_v1 in the hub cache" in out
    assert "about 3.9 GB, licence code MIT" in out
    write_clip(tmp_path / "pickscore")
    monkeypatch.setenv("MMALIGN_WEIGHTS", "elsewhere")  # so that what the verb sets is undone
    assert cli.main(["scorers", "pickscore", "--weights", str(tmp_path), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["loadable"] and row["places"] == [str(tmp_path / "pickscore")] and row["missing"] == []


def test_a_mistyped_scorer_or_folder_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scorers", "pikscore"]) == 2
    assert "no scorer 'pikscore'. Did you mean 'pickscore'?" in capsys.readouterr().err
    assert cli.main(["scorers", "--weights", str(tmp_path / "no")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_doctor_has_a_line_on_scorers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMALIGN_WEIGHTS", str(tmp_path))
    line = listing.summary()
    assert "shapes" in line and str(tmp_path) in line and "\n" not in line
