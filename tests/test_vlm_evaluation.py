"""mmalign eval vlm with a model: questions asked, answers in the published formats, measured at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_vlms

from mmalign.cli import run_entry
from vlm import evaluation


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava") / "llava"
    tiny_vlms.write("llava", folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(2):
        tiny_vlms.picture(number).save(folder / f"COCO_val2014_00000000000{number}.jpg")
    return folder


def ask(measure: str, model: Path, images: Path, out: Path, *more: str) -> int:
    words = [measure, "--model", str(model), "--images", str(images), "--out", str(out), "--max-new-tokens", "3"]
    return run_entry(evaluation.main, [*words, *more, "--json"])


def name(number: int) -> str:
    return f"COCO_val2014_00000000000{number}.jpg"


def test_pope_is_asked_and_measured(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"question_id": i, "image": name(i // 2), "text": "Is there a dog?", "label": ("yes", "no")[i % 2]}
        for i in range(4)
    ]
    questions = tmp_path / "random.json"
    questions.write_text("\n".join(json.dumps(row) for row in rows))
    out = tmp_path / "answers"
    assert ask("pope", model, images, out, "--questions", str(questions)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"]["n"] == 4 and found["accuracy"]["images"] == 2
    answers = [json.loads(line) for line in (out / "random.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in answers] == ["0", "1", "2", "3"] and all("text" in row for row in answers)

    monkeypatch.setattr("vlm.generate.open_any", lambda *given: pytest.fail("answers are there already"))
    assert ask("pope", model, images, out, "--questions", str(questions)) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_the_other_benchmarks_are_asked_in_their_formats(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "queries.json").write_text(json.dumps([{"id": 1, "image": name(0), "query": "Is it red?"}]))
    (tmp_path / "truth.json").write_text(json.dumps([{"id": 1, "type": "relation", "truth": "yes"}]))
    more = ["--queries", str(tmp_path / "queries.json"), "--annotations", str(tmp_path / "truth.json")]
    assert ask("amber", model, images, tmp_path / "out", *more) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"]["n"] == 1

    (tmp_path / "coco.json").write_text(
        json.dumps({"images": [{"id": 0}, {"id": 1}], "categories": [], "annotations": []})
    )
    (tmp_path / "synonyms.txt").write_text("dog, puppy\n")
    more = ["--annotations", str(tmp_path / "coco.json"), "--synonyms", str(tmp_path / "synonyms.txt")]
    assert ask("chair", model, images, tmp_path / "out", *more) == 0
    assert json.loads(capsys.readouterr().out)["chair_s"]["n"] == 2
    captions = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in captions] == [0, 1]

    mme = tmp_path / "mme"
    (mme / "count").mkdir(parents=True)
    tiny_vlms.picture(0).save(mme / "count" / "a.jpg")
    (mme / "count.txt").write_text("a.jpg\tIs it red?\tYes\na.jpg\tIs it blue?\tNo\n")
    assert ask("mme", model, mme, tmp_path / "out") == 0
    assert json.loads(capsys.readouterr().out)["count/accuracy"]["n"] == 2

    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps([{"question": "What is it?", "image_src": f"https://x/{name(1)}", "image_id": "1"}]))
    assert ask("mmhal", model, images, tmp_path / "out", "--questions", str(bench)) == 0
    assert "answers to be judged" in capsys.readouterr().out
    assert "model_answer" in json.loads((tmp_path / "out" / "mmhal.jsonl").read_text())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pope", "--questions", "none.json"], "there are no answers"),
        (["pope", "x.jsonl", "--questions", "none.json", "--model", "m"], "answers are there already"),
        (["pope", "--questions", "none.json", "--model", "m"], "needs pictures and a place"),
        (["mme", "--model", "m", "--images", "none", "--out", "o"], "there is no TASK.txt"),
        (["amber", "--annotations", "a", "--model", "m", "--images", "i", "--out", "o"], "query file"),
        (["mmhal", "--model", "m", "--images", "i", "--out", "o"], "benchmark's questions"),
        (["popes"], "unknown 'popes'"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry(evaluation.main, words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
