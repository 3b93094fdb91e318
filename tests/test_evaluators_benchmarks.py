"""AMBER, MME and MMHal against cases made by hand, POPE by other harnesses' rules, and the command over all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluators.hallucination import amber, mme, mmhal, pope
from evaluators.hallucination.__main__ import main
from mmalign.cli import run_entry
from mmalign.errors import UserError

# ----------------------------------------------------------------------------------------------- POPE's readers

SAID = [
    *("Yes", "no", "Yes.", "Yes, there is a cat", "No, there is no cat.", "yes and no", "maybe", "**No**", "yesterday")
]


@pytest.mark.parametrize(
    ("parser", "expected"),
    [
        ("published", [True, False, True, True, False, False, True, True, True]),
        ("strict", [True, False, True, None, None, None, None, None, None]),
        ("lmms-eval", [True, False, None, None, None, None, None, None, None]),
        ("vlmevalkit", [True, False, True, True, False, None, None, None, None]),
    ],
)
def test_answers_are_read_by_the_named_rule(parser: str, expected: list[bool | None]) -> None:
    assert [pope.parser_of(parser)(answer) for answer in SAID] == expected


def test_the_published_vector() -> None:
    """TP 8, FP 2, TN 7, FN 3."""
    labels = [True] * 11 + [False] * 9
    answers = ["Yes"] * 8 + ["No"] * 3 + ["Yes"] * 2 + ["No"] * 7
    found = pope.measure(labels, answers, [str(i) for i in range(20)])
    expected = {"accuracy": 0.75, "precision": 0.8, "recall": 8 / 11, "f1": 16 / 21, "yes_ratio": 0.5, "unparsed": 0.0}
    assert {name: one.value for name, one in found.items()} == pytest.approx(expected)


def test_lmms_evals_numbers_lose_what_they_cannot_read() -> None:
    """Of four present objects one is found, one is denied and two are not read: recall 1/2 instead of 1/4."""
    labels, answers = [True] * 4 + [False] * 4, ["yes", "no", "Yes.", "perhaps", "no", "no", "no", "yes"]
    images = [str(i) for i in range(8)]
    legacy = {k: one.value for k, one in pope.measure(labels, answers, images, parser="lmms-eval").items()}
    assert legacy["recall"] == 0.5 and legacy["precision"] == 0.5 and legacy["f1"] == 0.5
    assert legacy["yes_ratio"] == 0.5 and legacy["accuracy"] == 0.5 and legacy["unparsed"] == 0.25
    kit = {k: one.value for k, one in pope.measure(labels, answers, images, parser="vlmevalkit").items()}
    assert kit["recall"] == 0.5 and kit["precision"] == pytest.approx(2 / 3) and kit["yes_ratio"] == 3 / 8


# --------------------------------------------------------------------------------------------------------- MME


def task(path: Path, rows: list[tuple[str, str, str, str]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path


def test_mme_by_hand(tmp_path: Path) -> None:
    """a: both right; b: one; c: none, once unread. Accuracy 3/6, accuracy+ 1/3, score 83.3."""
    rows = [
        ("a.jpg", "Is it red?", "Yes", "Yes, it is"),
        ("a.jpg", "Is it blue?", "No", " no."),
        ("b.jpg", "Is it red?", "Yes", "No"),
        ("b.jpg", "Is it blue?", "No", "Nope"),
        ("c.jpg", "Is it red?", "Yes", "I think yes"),
        ("c.jpg", "Is it blue?", "No", "yes"),
    ]
    task(tmp_path / "answers" / "color.txt", rows)
    found = mme.measure_files(tmp_path / "answers")
    assert found["color/accuracy"].value == 0.5 and found["color/accuracy+"].value == pytest.approx(1 / 3)
    assert found["color/score"].value == pytest.approx(100 * (0.5 + 1 / 3))
    assert found["color/unparsed"].value == pytest.approx(1 / 6) and found["color/accuracy"].images == 3
    low, high = found["color/score"].ci95 or (0, 0)
    assert low <= 83.4 <= high and "perception" not in found


def test_mme_adds_up_tasks(tmp_path: Path) -> None:
    for name in mme.COGNITION:
        rows = [("a", "?", "Yes", "yes"), ("a", "?", "No", "no"), ("b", "?", "Yes", "yes"), ("b", "?", "No", "yes")]
        task(tmp_path / "in" / f"{name}.txt", rows)
    found = mme.measure_files(tmp_path / "in")
    assert found["cognition"].value == pytest.approx(4 * (75 + 50)) and found["cognition"].n == 16


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", "?", "Yes"), "expected image, question, true answer and answer, got 3 fields"),
        (("a", "?", "Ja", "yes"), "expected Yes or No, got 'Ja'"),
        (("a", "?", "Yes", "yes"), "'a' has 1 questions instead of two"),
    ],
)
def test_mme_bad_rows_are_one_line(tmp_path: Path, row: tuple[str, ...], message: str) -> None:
    file = task(tmp_path / "x" / "count.txt", [row])  # type: ignore[list-item]  # too short on purpose
    with pytest.raises(UserError, match=message):
        mme.read_task(file)
    with pytest.raises(UserError, match=r"there is no TASK.txt"):
        mme.measure_files(tmp_path)
    task(tmp_path / "x" / "counting.txt", [])
    file.unlink()
    with pytest.raises(UserError, match="Did you mean 'count'"):
        mme.measure_files(tmp_path / "x")


# ------------------------------------------------------------------------------------------------------- MMHal


@pytest.mark.parametrize(
    ("review", "rating"),
    [
        ("Explanation ... Rating: 4", 4),
        ("rating: 0, no hallucination?", 0),
        ("Rating: 3. Or Rating: 5", None),
        ("Good answer", None),
        ("Rating: 9", None),
        ("RATING: 6", 6),
    ],
)
def test_ratings_are_read_from_reviews(review: str, rating: int | None) -> None:
    assert mmhal.rating_of(review) == rating


def test_mmhal_by_hand() -> None:
    """Ratings 6 2 3 0 and one that cannot be read, of kinds 0 1 2 3 4."""
    found = {name: one.value for name, one in mmhal.measure([6, 2, 3, 0, None]).items()}
    assert found["score"] == 11 / 4 and found["hallucination"] == 0.5 and found["informativeness"] == 0.25
    assert found["score/attribute"] == 6 and found["score/counting"] == 0 and "score/relation" not in found
    assert found["unparsed"] == 0.2
    published = {name: one.value for name, one in mmhal.measure([6, 2, 3, 0, None], rule="published").items()}
    assert published["score"] == 11 / 5 and published["hallucination"] == 3 / 5 and published["unparsed"] == 0.2


def test_any_judges_file_is_read(tmp_path: Path) -> None:
    endpoint = {"choices": [{"message": {"content": "Rating: 5"}}]}
    rows: list[Any] = [3, "Rating: 1", {"rating": 6}, {"rating": None}, {"review": "none"}, endpoint]
    file = tmp_path / "judge.json"
    file.write_text(json.dumps(rows))
    assert mmhal.read_ratings(file) == [3, 1, 6, None, None, 5]
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"image_id": index // 2} for index in range(6)]))
    assert mmhal.measure_files(file, questions)["hallucination"].images == 3
    questions.write_text(json.dumps([{"image_id": 1}]))
    with pytest.raises(UserError, match="6 judgements of 1 questions"):
        mmhal.measure_files(file, questions)


@pytest.mark.parametrize("value", [7, -1, 2.5, True, [], {"rating": 9}, {"choices": []}])
def test_a_judge_that_answers_nonsense_is_one_line(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "judge.json"
    file.write_text(json.dumps([value]))
    with pytest.raises(UserError) as caught:
        mmhal.measure_files(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no judgement has a rating"):
        mmhal.measure([None, None])


# ------------------------------------------------------------------------------------------------------- AMBER

RELATION = {"dog": ["puppy"], "bench": [], "cat": [], "person": ["man"], "sky": [], "frisbee": []}
TRUTHS = [
    {"id": 1, "type": "generative", "truth": ["dog", "bench"], "hallu": ["frisbee", "cat"]},
    {"id": 2, "type": "generative", "truth": ["person"], "hallu": ["dog"]},
    {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 4, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 5, "type": "discriminative-attribute-state", "truth": "no"},
    {"id": 6, "type": "relation", "truth": "yes"},
]


@pytest.fixture
def benchmark(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ("annotations.json", "relation.json", "safe.txt", "answers.json")}
    found["annotations.json"].write_text(json.dumps(TRUTHS))
    found["relation.json"].write_text(json.dumps(RELATION))
    found["safe.txt"].write_text("sky\n")
    answers = {
        1: "Two puppies and a cat chase a frisbee under the sky.",
        2: "A man stands there.",
        3: "No",
        4: "No, it is not.",
        5: "I cannot tell",
        6: "Yes",
    }
    found["answers.json"].write_text(json.dumps([{"id": i, "response": text} for i, text in answers.items()]))
    return found


def test_amber_by_hand(benchmark: dict[str, Path]) -> None:
    """Nouns of 1: puppy (of dog), cat, frisbee, sky (safe); of 2: man (of person)."""
    paths = [benchmark[name] for name in ("answers.json", "annotations.json", "relation.json", "safe.txt")]
    found = {name: one.value for name, one in amber.measure_files(*paths).items()}
    assert found["chair"] == 2 / 5 and found["hal"] == 1 / 2
    assert found["cover"] == 2 / 3  # dog and person of dog, bench and person
    assert found["cog"] == 2 / 3  # frisbee and cat of frisbee, cat and dog
    assert found["accuracy"] == 0.5 and found["unparsed"] == 0.25
    assert found["precision"] == 0.5 and found["recall"] == 0.5 and found["f1"] == 0.5
    assert found["accuracy/existence"] == 1 and found["accuracy/attribute"] == 0 == found["f1/state"]
    assert found["precision/relation"] is None and found["accuracy/relation"] == 1
    assert found["amber"] == pytest.approx(100 * (1 - 0.4 + 0.5) / 2)


def test_amber_takes_nouns_that_others_tagged(benchmark: dict[str, Path]) -> None:
    rows = [{"id": 1, "response": "a dog", "nouns": ["dog", "cat", "unknown"]}]
    benchmark["answers.json"].write_text(json.dumps(rows))
    paths = [benchmark[name] for name in ("answers.json", "annotations.json", "relation.json", "safe.txt")]
    assert amber.measure_files(*paths)["chair"].value == 0.5


def test_amber_clusters_questions_by_picture(benchmark: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"id": i, "image": "a.jpg" if i < 5 else "b.jpg", "query": "?"} for i in range(3, 7)]
    (tmp_path / "queries.json").write_text(json.dumps(rows))
    answers = [row for row in json.loads(benchmark["answers.json"].read_text()) if row["id"] > 2]
    benchmark["answers.json"].write_text(json.dumps(answers))
    found = amber.measure_files(
        benchmark["answers.json"], benchmark["annotations.json"], queries=tmp_path / "queries.json"
    )
    assert found["accuracy"].images == 2 and found["accuracy"].n == 4 and "amber" not in found


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 9, "response": "x"}], "no annotation has the id 9"),
        ([{"id": 3, "response": "No"}, {"id": 3, "response": "No"}], "answered twice"),
        ([{"id": 3}], "response: expected text"),
        ([], "no answers"),
        ({}, "expected a list of answers"),
        ([{"id": 1, "response": "a dog"}], "descriptions need the benchmark's words"),
    ],
)
def test_amber_bad_rows_are_one_line(benchmark: dict[str, Path], rows: Any, message: str) -> None:
    benchmark["answers.json"].write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        amber.measure_files(benchmark["answers.json"], benchmark["annotations.json"])


# ----------------------------------------------------------------------------------------------------- command


def test_the_three_splits_of_pope_and_their_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, answers = [], []
    for number, split in enumerate(("random", "popular", "adversarial")):
        rows = [
            {"question_id": i, "image": f"{i // 2}.jpg", "text": "Is there a dog?", "label": ("yes", "no")[i % 2]}
            for i in range(8)
        ]
        said = [{"question_id": i, "text": "No" if i < 2 * number else ("Yes", "No")[i % 2]} for i in range(8)]
        for name, content, list_ in ((split, rows, questions), (f"{split}-said", said, answers)):
            (tmp_path / f"{name}.json").write_text("\n".join(json.dumps(row) for row in content))
            list_.append(str(tmp_path / f"{name}.json"))
    assert main(["pope", *answers, "--questions", *questions, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[f"{split}/accuracy"]["value"] for split in ("random", "popular", "adversarial")] == [1, 7 / 8, 6 / 8]
    assert found["mean/accuracy"] == {"value": 7 / 8, "ci95": None, "n": 24, "images": 4}
    assert run_entry(main, ["pope", answers[0], "--questions", *questions]) == 2
    assert "1 files of answers for 3 of questions" in capsys.readouterr().err
    assert run_entry(main, ["pope", "--questions", questions[0]]) == 2
    assert "there are no answers" in capsys.readouterr().err


def test_the_command_measures_every_benchmark(
    benchmark: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(benchmark[name]) for name in ("relation.json", "safe.txt")]
    answers, annotations = str(benchmark["answers.json"]), str(benchmark["annotations.json"])
    assert main(["amber", answers, "--annotations", annotations, "--words", *words]) == 0
    assert "chair" in capsys.readouterr().out
    task(tmp_path / "mme" / "count.txt", [("a", "?", "Yes", "yes"), ("a", "?", "No", "no")])
    assert main(["mme", str(tmp_path / "mme")]) == 0
    assert "count/score" in capsys.readouterr().out
    (tmp_path / "judge.jsonl").write_text('{"rating": 4}\n{"rating": 2}\n')
    assert main(["mmhal", str(tmp_path / "judge.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"]["value"] == 3
