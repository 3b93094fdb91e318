"""GenEval's rules on detections made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluators.geneval import Box, correct, measure, read_pictures, relations
from evaluators.geneval_command import main
from mmalign.cli import run_entry
from mmalign.errors import UserError

LEFT, RIGHT, ABOVE = [0, 40, 20, 60], [70, 40, 90, 60], [35, 0, 55, 20]


def found(name: str, box: list[int], score: float = 0.95, color: str | None = None) -> dict[str, Any]:
    return {"class": name, "score": score, "box": box, **({"color": color} if color else {})}


def row(
    tag: str, include: list[Any], detections: list[Any], exclude: list[Any] | None = None, prompt: str = "p"
) -> Any:
    return {"prompt": prompt, "tag": tag, "include": include, "exclude": exclude or [], "detections": detections}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(one) for one in rows))
    return path


def verdict(tmp_path: Path, one: Any) -> tuple[bool, list[str]]:
    (picture,) = read_pictures(write(tmp_path / "one.jsonl", one))
    return correct(picture)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 40, 20, 60), (70, 40, 90, 60), {"left of"}),
        ((70, 40, 90, 60), (0, 40, 20, 60), {"right of"}),
        ((40, 0, 60, 20), (40, 70, 60, 90), {"above"}),
        ((40, 70, 60, 90), (40, 0, 60, 20), {"below"}),
        ((0, 0, 20, 20), (70, 70, 90, 90), {"left of", "above"}),
        ((0, 0, 20, 20), (1, 1, 21, 21), set()),  # within a tenth of both sizes
        ((0, 0, 20, 20), (4, 0, 24, 20), set()),  # 4 apart, a tenth of both is 4
        ((0, 0, 20, 20), (12, 0, 32, 20), {"left of"}),  # (12 - 4) / 12 = 2/3
        ((0, 0, 20, 20), (7, 0, 27, 20), set()),  # (7 - 4) / 7 = 0.43
    ],
)
def test_positions_by_hand(first: Box, second: Box, expected: set[str]) -> None:
    assert relations(tuple(map(float, first)), tuple(map(float, second))) == expected  # type: ignore[arg-type]  # 4


def test_counts_colours_positions_and_what_must_not_be_there(tmp_path: Path) -> None:
    dog, bench = {"class": "dog", "count": 1}, {"class": "bench", "count": 1}
    both = [found("dog", LEFT, color="brown"), found("bench", RIGHT, color="red")]
    left, right = {**dog, "position": ["left of", 0]}, {**dog, "position": ["right of", 0]}
    brown, red = {**dog, "color": "brown"}, {**dog, "color": "red"}
    cases: list[tuple[Any, bool]] = [
        (row("two_object", [dog, bench], both), True),
        (row("two_object", [dog, bench], both[:1]), False),
        (row("position", [bench, left], both), True),
        (row("position", [bench, right], both), False),
        (row("position", [{"class": "cat", "count": 1}, left], both), False),
        (row("colors", [brown], both), True),
        (row("colors", [red], both), False),
        (row("single_object", [{**dog, "count": 2}], both), False),
        (row("counting", [dog], both, [{"class": "dog", "count": 2}]), True),
        (row("counting", [dog], [*both, found("dog", ABOVE)], [{"class": "dog", "count": 2}]), False),
    ]
    for one, expected in cases:
        holds, reasons = verdict(tmp_path, one)
        assert holds is expected and bool(reasons) is not expected, one
    assert verdict(tmp_path, cases[6][0])[1] == ["0 of 1 red dog"]


def test_confidence_counts_from_the_tasks_threshold(tmp_path: Path) -> None:
    dog = {"class": "dog", "count": 1}
    assert verdict(tmp_path, row("single_object", [dog], [found("dog", LEFT, 0.31)]))[0]
    assert not verdict(tmp_path, row("single_object", [dog], [found("dog", LEFT, 0.3)]))[0]
    assert not verdict(tmp_path, row("counting", [dog], [found("dog", LEFT, 0.9)]))[0]


def test_the_most_confident_ones_are_looked_at(tmp_path: Path) -> None:
    two = [found("dog", LEFT, 0.5, "red"), found("dog", RIGHT, 0.9, "blue")]
    assert not verdict(tmp_path, row("colors", [{"class": "dog", "count": 1, "color": "red"}], two))[0]


def test_tasks_count_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dog, there = [{"class": "dog", "count": 1}], [found("dog", LEFT)]
    rows = [row("single_object", dog, there, prompt=f"a{i}") for i in range(4)]
    rows += [row("colors", dog, there if i < 1 else [], prompt=f"b{i // 2}") for i in range(4)]
    file = write(tmp_path / "all.jsonl", *rows)
    numbers = measure(read_pictures(file))
    assert numbers["overall"].value == pytest.approx((1 + 1 / 4) / 2) and numbers["pictures"].value == 5 / 8
    assert numbers["prompts"].value == 5 / 6 and numbers["task/colors"].images == 2
    low, high = numbers["overall"].ci95 or (1, 0)
    assert low < 0.625 < high
    assert main([str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overall"]["value"] == 0.625


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": None}, "tag: expected text"),
        ({"include": "dog"}, "include: expected a list"),
        ({"include": [{"class": "dog", "count": 0}]}, "count: expected a whole number from 1"),
        ({"include": [{"class": "dog", "position": ["left of", 0]}]}, "position: expected one of"),
        ({"detections": [{"class": "dog", "score": 1, "box": [1, 2]}]}, "box: expected four numbers"),
        ({"detections": [{"class": "dog", "score": "x", "box": [1, 2, 3, 4]}]}, "score: expected a number"),
    ],
)
def test_bad_rows_are_one_line(tmp_path: Path, change: Any, message: str) -> None:
    one = row("colors", [{"class": "dog"}], []) | change
    with pytest.raises(UserError, match=message) as caught:
        read_pictures(write(tmp_path / "bad.jsonl", one))
    assert "\n" not in str(caught.value)
    assert run_entry(main, [str(tmp_path / "none.jsonl")]) == 2
