"""Implicit rewards of a run on pictures: what `mmalign accuracy` and `mmalign eval preference` say of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from tiny_runs import Tiny
from tiny_talks import records

from diffusion import accuracy
from mmalign.cli import run_entry
from mmalign.evaluation import main
from mmalign.preferences import Store

# Euler schedulers of diffusers hand tensors to numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    yield Tiny(tmp_path_factory.mktemp("tiny"))
    AcceleratorState._reset_state(reset_partial_state=True)


def ask(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    assert run_entry(main, ["preference", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_one_run_by_both_commands(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.train(tmp_path / "run", loop={"steps": 20, "batch_size": 7}) == 0
    capsys.readouterr()
    asked = [tmp_path / "run", "--store", tiny.store, "--split", "train", "--draws", 4]
    (found,) = ask(capsys, *asked, "--out", tmp_path / "out")
    assert (found["pairs"], found["groups"], found["failed"]) == (7, 3, 0) and found["margin_mean"] != 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    margins = [row["margins"][found["judge"]] for row in rows]
    assert sum(margin > 0 for margin in margins) / 7 == found["accuracy"]
    assert sum(margins) / 7 == pytest.approx(found["margin_mean"])
    (again,) = ask(capsys, *asked, "--batch-size", 2, "--score", "taste")
    assert again["margin_mean"] == pytest.approx(found["margin_mean"], rel=1e-3)

    assert run_entry(accuracy.main, [*map(str, asked), "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert all(other[name] == found[name] for name in ("accuracy", "pairs", "groups"))
    assert other["margin_mean"] == pytest.approx(found["margin_mean"])


def test_pairs_of_answers_are_one_line(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.train(tmp_path / "run") == 0
    Store.write(records(), tmp_path / "answers")
    capsys.readouterr()
    words = ["preference", str(tmp_path / "run"), "--store", str(tmp_path / "answers"), "--split", "train"]
    assert run_entry(main, words) == 2
    error = capsys.readouterr().err
    assert "prefers texts, not pictures" in error.splitlines()[-1]
