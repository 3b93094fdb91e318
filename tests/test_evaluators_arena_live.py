"""Pairs drawn while people vote: as far ahead as is needed, nothing twice, and a fault is told to who waits."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from tiny_live import Gate, sources, wait

from evaluators.arena.live import AHEAD, Live, Unit, _append, units_of
from evaluators.arena.server import Arena
from evaluators.arena.trials import read_programme
from mmalign.errors import UserError

UNITS: list[Unit] = [(f"prompt {number}", number) for number in range(AHEAD + 4)]


def arena_of(live: Live) -> Arena:
    return Arena(sources(live), live.root / "votes.sqlite", live=live)


def pairs(live: Live) -> int:
    """Units that are in every folder's index."""
    return min(len((folder / "index.jsonl").read_text().splitlines()) for folder in live.folders)


def test_drawing_stays_ahead_of_who_looks_and_pauses_when_nobody_does(tmp_path: Path) -> None:
    gate = Gate()
    with Live(tmp_path, gate.painters(), UNITS) as live, arena_of(live) as arena:
        wait(lambda: pairs(live) == AHEAD)
        assert arena.total == live.total == len(UNITS) and live.drawing
        reply = arena.next("Ada")
        for seen in range(1, len(UNITS) + 1):
            wait(lambda seen=seen: pairs(live) == min(AHEAD + seen, len(UNITS)))  # type: ignore[misc]
            assert reply["total"] == len(UNITS) and reply["trouble"] is None
            reply = arena.vote("Ada", reply["pair"]["token"], "left", 5)
        assert reply["pair"] is None and not reply["drawing"] and reply["done"] == len(UNITS)
    assert [unit for name, unit in gate.drawn if name == "base"] == UNITS


def test_votes_on_what_was_drawn_meanwhile_are_votes_like_all(tmp_path: Path) -> None:
    with Live(tmp_path, Gate().painters(("base", "dpo", "kto")), UNITS[:2]) as live, arena_of(live) as arena:
        reply = arena.next("Ada")
        while reply["pair"] is not None or reply["drawing"]:
            if reply["pair"] is None:
                reply = arena.next("Ada")
                continue
            reply = arena.vote("Ada", reply["pair"]["token"], "left", 5)
        voted = {judgement.trial for judgement in arena.store.judgements()}
        place = sources(live)
    prepared = read_programme(place)
    assert {trial.trial_id for trial in prepared.trials} == voted and len(voted) == 2 * 3
    with Arena(place, tmp_path / "votes.sqlite") as later:  # the same folders without anybody who draws
        assert later.next("Ada")["pair"] is None and later.next("Ada")["done"] == 6


def test_who_is_faster_than_the_models_waits_for_the_next_pair(tmp_path: Path) -> None:
    gate = Gate(2)
    with Live(tmp_path, gate.painters(), UNITS[:2]) as live, arena_of(live) as arena:
        reply = arena.vote("Ada", arena.next("Ada")["pair"]["token"], "left", 5)
        assert reply["pair"] is None and reply["drawing"] and (reply["done"], reply["total"]) == (1, 2)
        gate.let(1)  # half a pair
        wait(lambda: len(gate.drawn) == 3)
        assert arena.next("Ada")["drawing"]
        gate.let(1)
        wait(lambda: arena.next("Ada")["pair"] is not None)
        assert arena.undo("Ada", reply["last"]["token"])["pair"]["prompt"] == "prompt 0"


def test_a_fault_is_told_without_names_and_what_was_drawn_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Live(tmp_path, Gate().painters(), [*UNITS[:2], ("broken", 2), UNITS[3]]) as live, arena_of(live) as arena:
        wait(lambda: live.trouble is not None)
        reply = arena.next("Ada")
        assert "No more pairs can be drawn (RuntimeError)" in reply["trouble"] and "base" not in reply["trouble"]
        for _ in range(2):
            reply = arena.vote("Ada", reply["pair"]["token"], "tie", 5)
        assert reply["pair"] is None and not reply["drawing"] and reply["trouble"]
    assert "base is out of memory" in capsys.readouterr().err


def test_prompts_that_cannot_be_shown_are_refused_before_anything_is_drawn() -> None:
    assert units_of(["a fox", "a cat"], 7) == [("a fox", 7), ("a cat", 8)]
    for prompt in ("  ", "long " * 2001):
        with pytest.raises(UserError, match=r"\(prompt 2\)"):
            units_of(["a fox", prompt], 0)


def test_a_full_disk_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = Gate(2)
    with Live(tmp_path, gate.painters(), UNITS[:2]) as live:
        (tmp_path / "tuned" / "00001.png").mkdir()  # nothing can be written there
        gate.let(2)
        wait(lambda: live.trouble is not None)
        assert "(UserError)" in str(live.trouble)
    said = capsys.readouterr().err
    assert "drawing has stopped: cannot write a picture" in said and "Traceback" not in said


def test_a_fault_with_the_first_pair_ends_the_command(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), Live(tmp_path, Gate().painters(), [("broken", 0)]):
        pass


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    first = Gate()
    with Live(tmp_path, first.painters(), UNITS[:3]) as live:
        wait(lambda: not live.drawing)
    index = tmp_path / "tuned" / "index.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote
    second = Gate()
    with Live(tmp_path, second.painters(), UNITS[:4]) as live, arena_of(live) as arena:
        wait(lambda: not live.drawing)
        assert arena.total == 4
    assert second.drawn == [("tuned", UNITS[2]), ("base", UNITS[3]), ("tuned", UNITS[3])]
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    assert [(row["file"], row["prompt"]) for row in rows] == [(f"{n:05d}.png", f"prompt {n}") for n in range(4)]


def test_ending_does_not_wait_for_the_rest(tmp_path: Path) -> None:
    gate = Gate(3)
    with Live(tmp_path, gate.painters(), UNITS) as live:
        wait(lambda: len(gate.drawn) == 3)
        live._stopped = True
        gate.let(100)
    assert len(gate.drawn) <= 4 and not live._thread.is_alive()


def test_pictures_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    with Live(tmp_path, Gate().painters(), UNITS[:1]):
        pass
    with (
        pytest.raises(UserError, match=r"pictures of another model or of other settings \(.*base"),
        Live(tmp_path, Gate().painters(steps=5), UNITS),
    ):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with (
        pytest.raises(UserError, match=r"not drawn here \(.*other\)"),
        Live(tmp_path, Gate().painters(("base", "other")), UNITS),
    ):
        pass
    for line in ("{}\n", "7\n", "[]\n", "{\n"):
        (tmp_path / "base" / "index.jsonl").write_text(line)
        with pytest.raises(UserError, match="of another model"), Live(tmp_path, Gate().painters(), UNITS):
            pass


def test_two_servers_do_not_draw_into_one_folder(tmp_path: Path) -> None:
    with Live(tmp_path, Gate().painters(), UNITS[:2]) as live:
        with (
            pytest.raises(UserError, match=r"another server draws into this folder \(.*\)\. Vote there\."),
            Live(tmp_path, Gate().painters(), UNITS[:2]),
        ):
            pass
        wait(lambda: not live.drawing)
    with Live(tmp_path, Gate().painters(), UNITS[:2]) as live:  # the first one has ended
        assert not live.drawing


def test_a_line_is_whole_or_not_there_when_the_disk_is_full(tmp_path: Path) -> None:
    index = tmp_path / "index.jsonl"
    index.write_text("first\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (index.stat().st_size + 3, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write: No space left"):
            _append(index, "second\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert index.read_text() == "first\n"
    _append(index, "secönd\n")
    assert index.read_text("utf-8") == "first\nsecönd\n"


def test_votes_on_other_models_in_the_same_file_do_not_make_it_hurry(tmp_path: Path) -> None:
    with Live(tmp_path, Gate().painters(("base", "dpo")), UNITS) as live, arena_of(live) as arena:
        for _ in UNITS:
            arena.next("Ada")
            wait(lambda: arena.next("Ada")["pair"] is not None)
            arena.vote("Ada", arena.next("Ada")["pair"]["token"], "left", 5)
    with Live(tmp_path, Gate().painters(("base", "kto")), UNITS) as live, arena_of(live) as arena:
        arena.next("Ada")
        wait(lambda: pairs(live) == AHEAD + 1)
        live._thread.join(0.2)
        assert pairs(live) == AHEAD + 1 < len(UNITS) and live.drawing
