"""Votes: kept through a kill, never changed, never twice; what they say; what they import as."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import tiny_arena

from evaluators.arena.standings import agreement, lines_of, standings
from evaluators.arena.trials import read_programme
from evaluators.arena.votes import Answer, Judgement, VoteStore
from mmalign import data, importers
from mmalign.errors import UserError
from mmalign.pairing import Pairing, make_pairs
from mmalign.preferences import Store


@pytest.fixture
def store(tmp_path: Path) -> VoteStore:
    folders = tiny_arena.draw(tmp_path, ("base", "tuned"), seeds=(0, 1))
    programme = read_programme(tiny_arena.sources(tmp_path, folders))
    store = VoteStore.open(tmp_path / "votes.sqlite")
    store.add(programme.trials)
    return store


def trials(store: VoteStore) -> list[str]:
    with sqlite3.connect(store.path) as connection:
        return [trial for (trial,) in connection.execute("SELECT trial FROM trials ORDER BY trial")]


# --------------------------------------------------------------------------------------------------- the store


VOTER = """
import sys
from pathlib import Path
from evaluators.arena.votes import VoteStore

store = VoteStore.open(Path(sys.argv[1]))
trial = sys.argv[2]
for number in range(100_000):
    shown = store.show(f"rater {number}", trial, "a")
    print(store.vote(shown, ("left", "right", "tie", "bad", "skip")[number % 5], number), flush=True)
"""


def test_a_kill_loses_no_vote_that_was_acknowledged(store: VoteStore) -> None:
    trial = trials(store)[0]
    store.close()
    for round in range(2):
        command = [sys.executable, "-c", VOTER.replace("rater {", f"rater {round}-{{"), str(store.path), trial]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(20 + 7 * round)]
        process.send_signal(signal.SIGKILL)  # in the middle of the next vote, wherever that is
        acknowledged += [int(line) for line in process.communicate()[0].splitlines()]
        again = VoteStore.open(store.path)  # rolls back what was half written
        with sqlite3.connect(store.path) as connection:
            votes = [vote for (vote,) in connection.execute("SELECT vote FROM votes ORDER BY vote")]
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        again.close()
        kept = [vote for vote in votes if vote >= acknowledged[0]]
        # what was written between the last commit and its acknowledgement is there, and nothing else is
        assert kept[: len(acknowledged)] == acknowledged and len(kept) - len(acknowledged) in (0, 1)


def test_a_vote_is_on_the_disk_before_it_is_acknowledged(store: VoteStore) -> None:
    assert store._connection.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA
    assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    store.vote(store.show("Ada", trials(store)[0], "b"), "left", 10)
    with sqlite3.connect(store.path) as other:
        assert other.execute("SELECT rater, left, answer, milliseconds, turn FROM votes").fetchall() == [
            ("Ada", "b", "left", 10, 0)
        ]


def test_nothing_is_ever_changed_or_taken_away(store: VoteStore) -> None:
    shown = store.show("Ada", trials(store)[0], "a")
    store.vote(shown, "left", 10)
    with sqlite3.connect(store.path) as connection:
        for statement in ("UPDATE votes SET answer = 'right'", "DELETE FROM votes", "DELETE FROM trials"):
            with pytest.raises(sqlite3.IntegrityError, match="only grows"):
                connection.execute(statement)


def test_one_vote_for_a_rater_and_a_pair_until_it_is_undone(store: VoteStore) -> None:
    shown = store.show("Ada", trials(store)[0], "a")
    store.vote(shown, "left", 10)
    with pytest.raises(UserError, match="you have voted on this pair"):
        store.vote(shown, "right", 10)
    last = store.last("Ada")
    assert last is not None
    store.retract(last)
    assert store.last("Ada") is None and store.judgements() == []
    store.vote(shown, "right", 20)
    assert [(vote.verdict, vote.milliseconds) for vote in store.judgements()] == [("b", 20)]
    store.vote(store.show("Ben", shown.trial, "b"), "right", 30)
    assert [vote.verdict for vote in store.judgements()] == ["b", "a"]
    with sqlite3.connect(store.path) as connection:  # nothing is lost: three votes and a retraction
        assert connection.execute("SELECT turn, answer FROM votes").fetchall() == [
            (0, "left"),
            (1, "right"),
            (0, "right"),
        ]
        assert connection.execute("SELECT vote FROM retractions").fetchall() == [(1,)]


def test_a_vote_whose_models_were_revealed_stands(store: VoteStore) -> None:
    store.vote(store.show("Ada", trials(store)[0], "a"), "left", 10)
    last = store.last("Ada")
    assert last is not None and not last.revealed
    store.reveal(last)
    with pytest.raises(UserError, match="have been shown"):
        store.retract(last)
    again = store.last("Ada")
    assert again is not None and again.revealed


def test_another_file_is_not_taken_for_votes(tmp_path: Path) -> None:
    text = tmp_path / "votes.sqlite"
    text.write_text("dear diary")
    with pytest.raises(UserError, match="not a file of votes"):
        VoteStore.open(text)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE votes (vote)")
    with pytest.raises(UserError, match="holds no votes"):
        VoteStore.open(other)
    with pytest.raises(UserError, match="cannot be read or written"):
        VoteStore.open(tmp_path / "nowhere" / "votes.sqlite")


def test_a_later_format_is_said_to_be_one(store: VoteStore) -> None:
    with sqlite3.connect(store.path) as connection:
        connection.execute("PRAGMA user_version=9")
    with pytest.raises(UserError, match="version 9 of the format"):
        VoteStore.open(store.path)


# ----------------------------------------------------------------------------------------------- the standings


def judged(*votes: tuple[str, str, str, str], a: str = "base", b: str = "tuned") -> list[Judgement]:
    """Votes from (prompt, verdict, left, rater)."""
    return [
        Judgement(
            trial=f"{prompt}:{a}:{b}",
            prompt=prompt,
            a=a,
            b=b,
            verdict=verdict,
            left=left,
            rater=rater,
            milliseconds=1000 * (n + 1),
        )  # type: ignore[arg-type]
        for n, (prompt, verdict, left, rater) in enumerate(votes)
    ]


def test_win_rate_and_sides_by_hand() -> None:
    found = standings(
        judged(
            ("p", "b", "b", "x"),
            ("p", "b", "a", "y"),
            ("q", "a", "a", "x"),
            ("q", "tie", "b", "y"),
            ("r", "bad", "a", "y"),
        ),
        ("base", "tuned"),
    )
    (match,) = found.matches
    assert (match.first, match.second) == ("tuned", "base")  # a later one against the first
    assert (match.wins, match.losses, match.ties, match.bad, match.votes, match.prompts) == (2, 1, 1, 1, 5, 3)
    assert match.rate == pytest.approx((2 + 0.5 + 0.5) / 5)
    assert match.interval is not None and match.interval[0] < match.rate < match.interval[1]
    assert match.p_value == 1.0  # by prompts: one won, one lost (1 against 1/2), one tied
    assert found.left is not None and found.left[0] == pytest.approx(2 / 3) and found.left[2] == 3
    assert found.seconds == 3.0 and found.raters == (("y", 3), ("x", 2))
    # p: b and b; q: a and neither. Of 4 values 2 disagree, and (16 - 4 - 1 - 1) / 3 are expected to.
    assert found.ranking is None and found.agreement == pytest.approx((1 - 2 / (10 / 3), 1 / 2)) and found.shared == 2
    assert lines_of(found)[0] == "5 votes by 2 raters"
    assert standings([]).matches == () and lines_of(standings([])) == ["0 votes by 0 raters"]


def test_votes_on_one_prompt_have_no_interval() -> None:
    (match,) = standings(judged(("p", "b", "b", "x"), ("p", "b", "a", "y"))).matches
    assert match.rate == 1.0 and match.interval is None


def test_a_habit_of_choosing_left_is_seen() -> None:
    votes = judged(*((f"p{n}", side, side, "x") for n, side in enumerate("ab" * 20)))
    found = standings(votes)
    assert found.left is not None and found.left[0] == 1.0 and found.left[1] is not None and found.left[1][0] > 0.9
    assert found.matches[0].rate == 0.5  # and it does not move the win rate


def test_agreement_is_krippendorffs_alpha() -> None:
    # Three pairs of votes: aa, bb, ab. Coincidences aa 2, bb 2, ab + ba 2 of 6 values, three a and three b:
    # D_o = 2, D_e = (36 - 18) / 5, alpha = 1 - 2 / 3.6.
    votes = judged(
        *(
            (p, v, "a", r)
            for p, pair in (("p", "aa"), ("q", "bb"), ("r", "ab"))
            for r, v in zip("xy", pair, strict=True)
        )
    )
    found = agreement(votes)
    assert found is not None
    assert found == pytest.approx((1 - 2 / 3.6, 2 / 3))
    same = agreement(judged(("p", "tie", "a", "x"), ("p", "bad", "b", "y")))  # both say that neither is better
    assert same == (1.0, 1.0)
    assert agreement(judged(("p", "a", "a", "x"), ("q", "a", "a", "y"))) is None


def test_agreement_weighs_a_pair_by_its_votes() -> None:
    # A pair with three votes a, a, b: coincidences divided by 3 - 1; single votes do not count.
    votes = judged(
        ("p", "a", "a", "x"), ("p", "a", "a", "y"), ("p", "b", "a", "z"), ("q", "b", "a", "x"), ("q", "b", "a", "y")
    )
    found = agreement([*votes, *judged(("s", "a", "a", "x"))])
    observed, expected = 2.0, (25 - 4 - 9) / 4
    assert found is not None and found[0] == pytest.approx(1 - observed / expected)
    assert found[1] == pytest.approx((2 + 2) / (6 + 2))


def test_three_models_are_ranked_and_the_unconnected_are_not() -> None:
    names = ("base", "dpo", "sft")
    votes = []
    for n in range(30):
        winner = "b" if n % 3 else "a"
        votes += judged((f"p{n}", winner, "a", "x"), a="base", b="dpo")
        votes += judged((f"p{n}", "tie" if n % 2 else "b", "a", "x"), a="base", b="sft")
        votes += judged((f"p{n}", "tie" if n % 2 else "a", "a", "x"), a="dpo", b="sft")
    found = standings(votes, names)
    assert found.ranking is not None and found.contestants[found.ranking.order[-1]] == "base"
    assert [(match.first, match.second) for match in found.matches] == [
        ("dpo", "base"),
        ("sft", "base"),
        ("sft", "dpo"),
    ]
    assert sum("Elo" in line for line in lines_of(found)) == 3
    alone = standings(judged(("p", "a", "a", "x")), ("base", "tuned", "late"))
    assert alone.ranking is None and alone.unranked is not None and "late" in alone.unranked


# --------------------------------------------------------------------------------------------------- the import


def test_votes_become_preferences_with_their_provenance(store: VoteStore, tmp_path: Path) -> None:
    ids = trials(store)
    answers = ("left", "right", "tie", "bad", "skip", "left")
    for number, (trial, answer) in enumerate(zip(ids, answers, strict=True)):
        store.vote(store.show("Ada", trial, "a" if number % 2 else "b"), answer, 100 + number)  # type: ignore[arg-type]
    store.vote(store.show("Ben", ids[0], "a"), "left", 99)
    undone = store.show("Ben", ids[1], "a")
    store.vote(undone, "left", 1)
    last = store.last("Ben")
    assert last is not None
    store.retract(last)

    assert importers.detect(store.path) == "votes"
    records = list(importers.read(store.path, decode=True))
    assert len(records) == 5  # the skipped one is none
    votes = [vote for record in records for vote in record.votes]
    assert len(votes) == 6 and {vote.rater for vote in votes} == {"Ada", "Ben"}
    assert sum(vote.label == "tie" for vote in votes) == 2
    assert sum("both_bad" in record.context for record in records) == 1
    for record in records:
        assert record.source == "arena" and record.prompt in tiny_arena.PROMPTS
        assert [
            (one.candidate_id, one.model) for one in sorted(record.candidates, key=lambda one: one.candidate_id)
        ] == [
            ("base", "base@123"),
            ("tuned", "tuned@123"),
        ]
        assert all(candidate.seed in (0, 1) for candidate in record.candidates)

    out = tmp_path / "store"
    assert data.main(["import", str(store.path), "--out", str(out)]) == 0
    pairs = list(make_pairs(Store.open(out).records(), Pairing()))
    assert len(pairs) == 2  # of five units two are ties, and one has a vote for each side
    said = {pair.chosen.prompt + str(pair.provenance["seeds"]) for pair in pairs}
    assert len(said) == 2 and all(pair.provenance["source"] == "arena" for pair in pairs)


@pytest.mark.parametrize(
    ("answer", "left", "winner"),
    [
        ("left", "a", "a"),
        ("left", "b", "b"),
        ("right", "a", "b"),
        ("right", "b", "a"),
        ("tie", "a", None),
        ("bad", "b", None),
    ],
)
def test_the_winner_is_the_one_that_was_on_its_side(
    store: VoteStore, answer: Answer, left: Literal["a", "b"], winner: str | None
) -> None:
    trial = trials(store)[0]
    store.vote(store.show("Ada", trial, left), answer, 5)
    (record,) = importers.read(store.path)
    with sqlite3.connect(store.path) as connection:
        names = connection.execute(
            "SELECT a.contestant, b.contestant FROM trials "
            "JOIN candidates a ON a.candidate = trials.a JOIN candidates b ON b.candidate = trials.b WHERE trial = ?",
            (trial,),
        ).fetchone()
    (vote,) = record.votes
    chosen = {"a": vote.a, "b": vote.b, "tie": None}[vote.label]
    assert chosen == (None if winner is None else names["ab".index(winner)])
    assert [vote.verdict for vote in store.judgements()] == [winner or answer]


def test_a_picture_that_changed_after_the_vote_is_a_problem(store: VoteStore, tmp_path: Path) -> None:
    store.vote(store.show("Ada", trials(store)[0], "a"), "left", 5)
    for file in (tmp_path / "tuned").glob("*.png"):
        file.write_bytes((tmp_path / "base" / file.name).read_bytes())
    with pytest.raises(UserError, match="expected the picture that was voted on"):
        list(importers.read(store.path))


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "base/../../secret.png"])
def test_a_foreign_file_of_votes_reads_nothing_outside_its_folder(store: VoteStore, tmp_path: Path, path: str) -> None:
    (tmp_path.parent / "secret.png").write_bytes((tmp_path / "base" / "00000.png").read_bytes())
    store.vote(store.show("Ada", trials(store)[0], "a"), "left", 5)
    store.close()
    with sqlite3.connect(store.path) as connection:
        connection.execute("DROP TRIGGER candidates_keeps_update")
        connection.execute("UPDATE candidates SET image = ?", (path,))
    with pytest.raises(UserError, match="expected a file inside the data folder"):
        list(importers.read(store.path))


def test_votes_that_say_nonsense_are_problems(store: VoteStore) -> None:
    store.vote(store.show("Ada", trials(store)[0], "a"), "left", 5)
    store.close()
    with sqlite3.connect(store.path) as connection:
        connection.execute("PRAGMA ignore_check_constraints=1")
        connection.execute("DROP TRIGGER votes_keeps_update")
        connection.execute("UPDATE votes SET answer = 'middle'")
    with pytest.raises(UserError, match="expected left, right, tie or bad"):
        list(importers.read(store.path))


def test_no_votes_is_said(store: VoteStore) -> None:
    with pytest.raises(UserError, match="nobody has voted yet"):
        list(importers.read(store.path))


def test_answers_about_pictures_import_with_their_picture(tmp_path: Path) -> None:
    files = tiny_arena.answer(tmp_path / "vlm", {"base": ["a dog", "a cat"], "dpo": ["a wolf", "a lynx"]})
    root = tmp_path / "vlm"
    store = VoteStore.open(root / "votes.sqlite")
    store.add(read_programme(tiny_arena.sources(root, answers=files)).trials)
    for trial in trials(store):
        store.vote(store.show("Ada", trial, "a"), "right", 5)
    records = list(importers.read(store.path, decode=True))
    assert {(candidate.candidate_id, candidate.text) for record in records for candidate in record.candidates} == {
        ("base", "a dog"),
        ("base", "a cat"),
        ("dpo", "a wolf"),
        ("dpo", "a lynx"),
    }
    assert all(len(record.media) == 1 and record.context["group"] == record.media[0].path for record in records)
    pairs = list(make_pairs(records, Pairing()))
    assert [pair.chosen.response for pair in pairs] and all(pair.chosen.media for pair in pairs)
