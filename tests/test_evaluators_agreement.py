"""Scorers' accuracy on pairs, and `mmalign eval preference`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import write_store

from evaluators.agreement import agreement, scorer_agreement
from evaluators.preference import main
from mmalign.cli import run_entry
from mmalign.errors import UserError
from mmalign.media import Media
from mmalign.records import Preference, Side


class Red:
    """How red a picture is."""

    identity, main, numbers = "red@1", "red", ("red",)

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        return [{"red": float(np.asarray(image)[..., 0].mean())} for image in images]


def pair(number: int, chosen: int, rejected: int, prompt: str = "") -> Preference:
    def side(red: int) -> Side:
        data = Media(data=b"junk") if red < 0 else Media.from_image(Image.new("RGB", (4, 4), (red, 0, 0)))
        return Side(prompt=prompt or f"prompt {number}", response=data)

    return Preference(item_id=str(number), a=side(chosen), b=side(rejected), label="a")


def test_wins_ties_and_failures() -> None:
    pairs = [pair(0, 9, 1), pair(1, 9, 1), pair(2, 1, 9), pair(3, 5, 5), pair(4, -1, 5)]
    found = scorer_agreement("red", Red(), pairs, batch_size=2)
    assert (found.accuracy, found.pairs, found.ties, found.failed, found.groups) == (2.5 / 4, 4, 1, 1, 4)
    assert found.margins == (8, 8, -8, 0, None) and found.margin_mean == 2
    assert found.ci95 is not None and found.ci95[0] < 0.625 < found.ci95[1]
    assert found.as_json()["ci95"] == list(found.ci95)


def test_pairs_of_one_prompt_are_a_cluster() -> None:
    pairs = [pair(index, 9, 1, prompt=f"p{index // 4}") for index in range(8)]
    assert scorer_agreement("red", Red(), pairs).groups == 2


def test_a_group_has_several_prompts() -> None:
    from dataclasses import replace

    reds = [(9, 1), (9, 1), (1, 9)]
    pairs = [pair(number, *two, prompt=f"p{number // 2}") for number, two in enumerate(reds)]
    found = scorer_agreement(
        "red", Red(), [replace(one, context={"group": "photo"}) for one in [*pairs, pair(3, 9, 1)]]
    )
    assert (found.published.rank.count, found.published.rank.value) == (3, 2 / 3)  # p0 right, p1 wrong, prompt 3 right


def test_published_accuracies_stand_beside() -> None:
    from dataclasses import replace

    pairs = [pair(0, 9, 1), pair(1, 2, 1), pair(2, 1, 9), pair(3, 5, 5), pair(4, -1, 5)]
    tie = replace(pair(5, 40, 3), label="tie", confidence=0.5)
    found = scorer_agreement("red", Red(), [*pairs, tie])
    assert (found.accuracy, found.pairs, found.ties) == (2.5 / 4, 4, 1)  # without the labelled tie
    assert found.published.strict.value == 2 / 4  # equal scores are wrong
    assert found.published.rank.value == 3 / 4  # equal scores are right, a prompt a pair
    assert found.published.pickscore.count == 5
    assert found.as_json()["published"]["strict"]["value"] == 2 / 4


def test_texts_and_broken_pictures_are_one_line() -> None:
    text = Preference(item_id="0", a=Side(prompt="a", response="x"), b=Side(prompt="a", response="y"), label="a")
    with pytest.raises(UserError, match="pairs are of texts"):
        scorer_agreement("red", Red(), [text])
    with pytest.raises(UserError, match="could score no pair"):
        scorer_agreement("red", Red(), [pair(0, -1, -1)])


def test_what_has_no_accuracy_is_one_line() -> None:
    from dataclasses import replace

    pairs = [pair(0, 9, 1), pair(1, 9, 1)]
    with pytest.raises(UserError, match=r"1 of 2 margins are no finite numbers \(a run\)"):
        agreement("a run", [1.0, float("nan")], pairs)
    ties = [replace(one, label="tie", confidence=0.5) for one in pairs]
    with pytest.raises(UserError, match=r"all 2 pairs that could be judged are ties by their labels \(red"):
        scorer_agreement("red", Red(), ties)


def test_the_command_asks_scorers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(tmp_path / "store", 6)
    words = ["--store", str(store), "--split", "train", "--scorer", "shapes,main=style"]
    assert run_entry(main, [*words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["judge"].startswith("shapes (shapes@1") and found["pairs"] == 6 and found["groups"] == 3
    assert run_entry(main, [*words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "| shapes (shapes@1" in said and "ties counted half" in said
    assert (tmp_path / "out" / "preference.md").read_text() == said
    content = json.loads((tmp_path / "out" / "preference.json").read_text())
    assert content["judges"] == [found] and content["split"] == "train"
    rows = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    margins = [row["margins"][found["judge"]] for row in rows]
    assert len({row["group"] for row in rows}) == 3 and sum(margins) / 6 == pytest.approx(found["margin_mean"])
    assert run_entry(main, [*words, "--ties"]) == 0
    assert "with ties (PickScore)" in capsys.readouterr().out
    assert run_entry(main, ["run", *words, "--ties"]) == 2
    assert "Ask scorers alone" in capsys.readouterr().err
    assert run_entry(main, ["--store", str(store)]) == 2
    assert "nobody to ask" in capsys.readouterr().err
    assert run_entry(main, [*words[:2], "--split", "held", "--scorer", "shapes"]) == 2
    assert "no split 'held'" in capsys.readouterr().err
