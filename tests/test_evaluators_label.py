"""Labels into the preference store: in place, into a new one, from shards; with provenance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_evaluators_score import folder, index, picture, shards

from evaluators.label import main
from mmalign.cli import run_entry
from mmalign.pairing import Pairing, make_pairs
from mmalign.preferences import Media, Store
from mmalign.records import Candidate, Record

CAPTIONS = ("a red circle", "two blue squares")


def store(path: Path, *, broken: bool = False) -> Store:
    def media(number: int, k: int) -> Media:
        return Media(data=b"junk" if broken and number == k == 0 else picture(number * 9 + k * 60))

    def records() -> list[Record]:
        return [
            Record(
                record_id=f"r{number}",
                prompt=CAPTIONS[number % 2],
                candidates=tuple(
                    Candidate(candidate_id=str(k), image=media(number, k), scores={"mine": float(k)}) for k in range(3)
                ),
                licence="CC0",
            )
            for number in range(4)
        ]

    return Store.write(records(), path, scorers={"mine": "me@1"})


def label(*words: str) -> int:
    return run_entry(main, [*words, "--scorer", "shapes,main=style"])


def test_a_store_gets_its_labels_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(store(tmp_path / "store").records())
    assert label(str(tmp_path / "store")) == 0
    after = Store.open(tmp_path / "store")
    assert after.scorers["shapes/style"].startswith("shapes@1") and after.scorers["mine"] == "me@1"
    for old, new in zip(before, after.records(), strict=True):
        assert new.record_id == old.record_id and new.licence == "CC0"
        for one, other in zip(old.candidates, new.candidates, strict=True):
            assert other.image == one.image and other.scores["mine"] == one.scores["mine"]
            assert "shapes/style" in other.scores and "shapes/reward" in other.scores
    assert list(make_pairs(after.records(), Pairing(score="shapes/style")))
    assert "4 records with" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_out_leaves_the_old_store_as_it_was(tmp_path: Path) -> None:
    fingerprint = store(tmp_path / "store").fingerprint
    assert label(str(tmp_path / "store"), "--out", str(tmp_path / "new")) == 0
    assert Store.open(tmp_path / "store").fingerprint == fingerprint
    assert "shapes/style" in Store.open(tmp_path / "new").scorers


def test_a_picture_that_cannot_be_opened_stays_without_a_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store(tmp_path / "store", broken=True)
    assert label(str(tmp_path / "store"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["errors"] == 1
    first, *others = next(Store.open(tmp_path / "store").records()).candidates
    assert set(first.scores) == {"mine"} and all("shapes/style" in one.scores for one in others)


@pytest.mark.parametrize("make", [folder, index, shards])
def test_pictures_of_one_prompt_become_candidates(tmp_path: Path, make: object) -> None:
    make(tmp_path / "in", 7)  # type: ignore[operator]  # one of three functions
    assert label(str(tmp_path / "in"), "--out", str(tmp_path / "store"), "--licence", "CC0", "--shard-rows", "2") == 0
    found = Store.open(tmp_path / "store")
    records = {record.prompt: record for record in found.records()}
    assert sorted(len(record.candidates) for record in records.values()) == [2, 2, 3]
    pictures = {one.image.read() for record in records.values() for one in record.candidates if one.image}
    assert pictures == {picture(number) for number in range(7)}
    assert all(record.licence == "CC0" and record.source == "in" for record in records.values())
    if make is index:
        assert [one.seed for one in records["a red circle"].candidates] == [0, 3, 6]
        assert records["a red circle"].candidates[0].model == "m@1"


def test_labels_of_another_scorer_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = store(tmp_path / "store")
    given.add_scores("shapes/style", lambda record: {"0": 0.5}, scorer="human@1")
    assert label(str(tmp_path / "store")) == 2
    error = capsys.readouterr().err
    assert "'shapes/style' was given by human@1" in error and error.count("\n") == 1


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path / "in", 2)
    for words, message in (
        ([str(tmp_path / "in")], "need a store to be written to"),
        ([str(tmp_path / "in"), "--out", str(tmp_path / "in")], "something is here already"),
        ([str(tmp_path / "none"), "--out", str(tmp_path / "x")], "there is nothing here"),
    ):
        assert label(*words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"x")
    (tmp_path / "bad" / "a.txt").write_text("a red circle")
    assert label(str(tmp_path / "bad"), "--out", str(tmp_path / "y")) == 2
    assert "no picture could be scored: " in capsys.readouterr().err
