"""What people said, in one SQLite file to which rows are added and from which none is ever taken.

A vote is a row; undoing it is a row too (`retractions`), and so is having been told which model was which (`reveals`):
from then on the vote stands. Triggers refuse every change of what is there. Each vote is one transaction under
`synchronous=EXTRA`, so a vote that was acknowledged is on the disk whatever is killed next. `shown` says what a rater
was given to look at: its random token is all that a browser ever holds of a pair, and a vote without one is refused.

Paths of pictures are relative to the file's folder, which may be moved; `mmalign data import` reads it as it is.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from evaluators.arena.trials import Trial
from mmalign.errors import UserError
from mmalign.importers.votes import APPLICATION_ID, VERSION, opened

Answer = Literal["left", "right", "tie", "bad", "skip"]
ANSWERS: tuple[Answer, ...] = ("left", "right", "tie", "bad", "skip")
LONGEST = 24 * 3600 * 1000  # milliseconds; nobody looks at a pair for longer than a day
LEASE = 600.0  # seconds for which a pair that somebody is looking at counts as voted on
RATER = re.compile(r"[^\s\x00-\x1f\x7f](?:[^\x00-\x1f\x7f]{0,38}[^\s\x00-\x1f\x7f])?")

_TABLES = """
CREATE TABLE units (
  unit TEXT PRIMARY KEY, prompt TEXT NOT NULL, seed INTEGER, media TEXT, media_sha256 TEXT);
CREATE TABLE candidates (
  candidate TEXT PRIMARY KEY, unit TEXT NOT NULL REFERENCES units, contestant TEXT NOT NULL, model TEXT,
  image TEXT, text TEXT, sha256 TEXT NOT NULL);
CREATE TABLE trials (
  trial TEXT PRIMARY KEY, unit TEXT NOT NULL REFERENCES units,
  a TEXT NOT NULL REFERENCES candidates, b TEXT NOT NULL REFERENCES candidates);
CREATE TABLE shown (
  token TEXT PRIMARY KEY, trial TEXT NOT NULL REFERENCES trials, rater TEXT NOT NULL,
  left TEXT NOT NULL CHECK (left IN ('a', 'b')), at REAL NOT NULL, UNIQUE (rater, trial));
CREATE TABLE votes (
  vote INTEGER PRIMARY KEY AUTOINCREMENT, trial TEXT NOT NULL REFERENCES trials, rater TEXT NOT NULL,
  turn INTEGER NOT NULL, left TEXT NOT NULL CHECK (left IN ('a', 'b')),
  answer TEXT NOT NULL CHECK (answer IN ('left', 'right', 'tie', 'bad', 'skip')),
  milliseconds INTEGER NOT NULL, at TEXT NOT NULL, UNIQUE (rater, trial, turn));
CREATE TABLE retractions (vote INTEGER PRIMARY KEY REFERENCES votes, at TEXT NOT NULL);
CREATE TABLE reveals (vote INTEGER PRIMARY KEY REFERENCES votes, at TEXT NOT NULL);
"""
_KEPT = ("units", "candidates", "trials", "votes", "retractions", "reveals")
_LIVE = "FROM votes LEFT JOIN retractions USING (vote) WHERE retractions.vote IS NULL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a token stands for: this rater was given this trial, with this candidate on the left."""

    token: str
    trial: str
    rater: str
    left: Literal["a", "b"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """A vote that was not taken back.

    Attributes:
        vote: its number in the file.
        answer: by sides, as it was given.
        revealed: whether its rater has been told which model was which.
    """

    vote: int
    shown: Shown
    answer: Answer
    milliseconds: int
    revealed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A vote as the standings need it, skipped pairs left out.

    Attributes:
        prompt: what pairs of one prompt have in common: the unit that is resampled.
        a, b: the contestants.
        verdict: the better one, or "tie", or "bad" for both.
        left: who stood on the left.
    """

    trial: str
    prompt: str
    a: str
    b: str
    verdict: Literal["a", "b", "tie", "bad"]
    left: Literal["a", "b"]
    rater: str
    milliseconds: int


class VoteStore:
    """A file of votes, opened by `VoteStore.open`. Its methods may be called from several threads; several processes
    may have it open."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection, self._lock = connection, threading.RLock()

    @classmethod
    def open(cls, path: Path) -> VoteStore:
        """The store at `path`, made if there is none.

        Raises:
            UserError: another file is there, or nothing can be written there.
        """
        if path.exists():
            opened(path).close()  # complains of what is none of ours
        try:
            connection = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
            connection.executescript("PRAGMA foreign_keys=ON; PRAGMA journal_mode=DELETE; PRAGMA synchronous=EXTRA;")
            store = cls(path, connection)
            with store._writing():
                if not connection.execute("PRAGMA user_version").fetchone()[0]:
                    for statement in _TABLES.split(";\n"):
                        connection.execute(statement)
                    for table in _KEPT:
                        for change in ("UPDATE", "DELETE"):
                            connection.execute(
                                f"CREATE TRIGGER {table}_keeps_{change.lower()} BEFORE {change} ON {table} "
                                f"BEGIN SELECT RAISE(ABORT, '{table} only grows'); END"
                            )
                    connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
                    connection.execute(f"PRAGMA user_version={VERSION}")
        except sqlite3.Error as error:
            raise _failed(error, path) from error
        return store

    def close(self) -> None:
        """Close the file; nothing is waiting to be written."""
        with self._lock:
            self._connection.close()

    def add(self, trials: Iterable[Trial]) -> None:
        """Write down what can be voted on; what is known already is left as it is."""
        with self._writing() as connection:
            for trial in trials:
                unit = trial.unit
                media = (unit.media.path, unit.media.digest) if unit.media else (None, None)
                connection.execute(
                    "INSERT OR IGNORE INTO units VALUES (?, ?, ?, ?, ?)", (unit.unit_id, unit.prompt, unit.seed, *media)
                )
                for item in (trial.a, trial.b):
                    path = item.image.path if item.image else None
                    row = (item.entry_id, unit.unit_id, item.contestant, item.model, path, item.text, item.digest)
                    connection.execute("INSERT OR IGNORE INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?)", row)
                pair = (trial.trial_id, unit.unit_id, trial.a.entry_id, trial.b.entry_id)
                connection.execute("INSERT OR IGNORE INTO trials VALUES (?, ?, ?, ?)", pair)

    # ---------------------------------------------------------------------------------- what a rater looks at

    def show(self, rater: str, trial: str, left: Literal["a", "b"]) -> Shown:
        """Give a rater a trial to look at, from now on. The same trial keeps its token and its sides."""
        with self._writing() as connection:
            connection.execute(
                "INSERT INTO shown VALUES (?, ?, ?, ?, ?) ON CONFLICT (rater, trial) DO UPDATE SET at = excluded.at",
                (secrets.token_urlsafe(18), trial, rater, left, time.time()),
            )
            return self._shown("rater = ? AND trial = ?", (rater, trial))[0]

    def shown(self, token: str, rater: str) -> Shown | None:
        """What the token stands for; None where it is not one of this rater's."""
        found = self._shown("token = ? AND rater = ?", (token, rater))
        return found[0] if found else None

    def looking_at(self, rater: str) -> list[str]:
        """Trials that were shown to a rater, the latest first."""
        return [shown.trial for shown in self._shown("rater = ? ORDER BY at DESC", (rater,))]

    def looked_at(self) -> set[str]:
        """Trials that were shown to anybody."""
        return {trial for (trial,) in self._read("SELECT DISTINCT trial FROM shown")}

    def _shown(self, where: str, values: tuple[Any, ...]) -> list[Shown]:
        rows = self._read(f"SELECT token, trial, rater, left FROM shown WHERE {where}", values)
        return [Shown(token=token, trial=trial, rater=rater, left=left) for token, trial, rater, left in rows]

    def done_by(self, rater: str) -> set[str]:
        """Trials that a rater has answered or skipped."""
        return {trial for (trial,) in self._read(f"SELECT trial {_LIVE} AND rater = ?", (rater,))}

    def work_on(self, rater: str) -> Mapping[str, int]:
        """trial -> votes on it, and other raters who are looking at it now."""
        counts = dict(self._read(f"SELECT trial, count(*) {_LIVE} AND answer != 'skip' GROUP BY 1"))
        rows = self._read(
            "SELECT trial FROM shown WHERE rater != ? AND at > ? "
            f"AND (rater, trial) NOT IN (SELECT rater, trial {_LIVE})",
            (rater, time.time() - LEASE),
        )
        for (trial,) in rows:
            counts[trial] = counts.get(trial, 0) + 1
        return counts

    def voted_on(self) -> set[str]:
        """Trials with a vote of anybody, skipped ones left out."""
        return {trial for (trial,) in self._read(f"SELECT DISTINCT trial {_LIVE} AND answer != 'skip'")}

    # ------------------------------------------------------------------------------------------------- votes

    def vote(self, shown: Shown, answer: Answer, milliseconds: int) -> int:
        """Write a vote down. When this returns, the vote is on the disk.

        Returns:
            The vote's number.

        Raises:
            UserError: there is a vote of this rater on this pair, or it cannot be written.
        """
        key = (shown.rater, shown.trial)
        with self._writing() as connection:
            cast, back = connection.execute(
                "SELECT count(*), count(retractions.vote) FROM votes LEFT JOIN retractions USING (vote) "
                "WHERE rater = ? AND trial = ?",
                key,
            ).fetchone()
            if cast > back:
                raise UserError("you have voted on this pair", fix="Undo that vote first.")
            row = (shown.trial, shown.rater, back, shown.left, answer, milliseconds, _now())
            written = connection.execute(
                "INSERT INTO votes (trial, rater, turn, left, answer, milliseconds, at) VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            return int(written.lastrowid or 0)

    def last(self, rater: str) -> Cast | None:
        """A rater's latest vote that was not taken back."""
        rows = self._cast("AND rater = ? ORDER BY vote DESC LIMIT 1", (rater,))
        return rows[0] if rows else None

    def cast(self, shown: Shown) -> Cast | None:
        """The vote on what was shown, unless there is none or it was taken back."""
        rows = self._cast("AND rater = ? AND trial = ?", (shown.rater, shown.trial))
        return rows[0] if rows else None

    def _cast(self, where: str, values: tuple[Any, ...]) -> list[Cast]:
        rows = self._read(
            "SELECT vote, trial, rater, votes.left, answer, milliseconds, "
            "(SELECT token FROM shown WHERE shown.rater = votes.rater AND shown.trial = votes.trial), "
            f"EXISTS (SELECT 1 FROM reveals WHERE reveals.vote = votes.vote) {_LIVE} {where}",
            values,
        )
        return [
            Cast(
                vote=vote,
                shown=Shown(token=token, trial=trial, rater=rater, left=left),
                answer=answer,
                milliseconds=milliseconds,
                revealed=bool(revealed),
            )
            for vote, trial, rater, left, answer, milliseconds, token, revealed in rows
        ]

    def retract(self, cast: Cast) -> None:
        """Take a vote back.

        Raises:
            UserError: its rater knows which model was which, so that another vote would not be blind.
        """
        with self._writing() as connection:
            if connection.execute("SELECT 1 FROM reveals WHERE vote = ?", (cast.vote,)).fetchone():
                raise UserError("its models have been shown to you", fix="That vote stands.")
            connection.execute("INSERT OR IGNORE INTO retractions VALUES (?, ?)", (cast.vote, _now()))

    def reveal(self, cast: Cast) -> None:
        """Write down that a vote's rater is told which model is which."""
        with self._writing() as connection:
            if connection.execute("SELECT 1 FROM retractions WHERE vote = ?", (cast.vote,)).fetchone():
                raise UserError("this vote was taken back", fix="Vote first.")
            connection.execute("INSERT OR IGNORE INTO reveals VALUES (?, ?)", (cast.vote, _now()))

    def judgements(self) -> list[Judgement]:
        """Every vote that was not taken back, in order, skipped pairs left out."""
        rows = self._read(
            "SELECT votes.trial, units.prompt, a.contestant, b.contestant, answer, votes.left, rater, milliseconds "
            "FROM votes JOIN trials USING (trial) JOIN units USING (unit) "
            "JOIN candidates a ON a.candidate = trials.a JOIN candidates b ON b.candidate = trials.b "
            "WHERE answer != 'skip' AND vote NOT IN (SELECT vote FROM retractions) ORDER BY vote"
        )
        return [
            Judgement(
                trial=trial,
                prompt=prompt,
                a=a,
                b=b,
                verdict=verdict_of(answer, left),
                left=left,
                rater=rater,
                milliseconds=milliseconds,
            )
            for trial, prompt, a, b, answer, left, rater, milliseconds in rows
        ]

    # ----------------------------------------------------------------------------------------------- plumbing

    def _read(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._connection.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                raise _failed(error, self.path) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: on the disk when this is left, or nothing of it."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise _failed(error, self.path) from error


def verdict_of(answer: Literal["left", "right", "tie", "bad"], left: Literal["a", "b"]) -> Any:
    """An answer by sides as an answer by candidates."""
    if answer in ("tie", "bad"):
        return answer
    return left if answer == "left" else "b" if left == "a" else "a"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _failed(error: sqlite3.Error, path: Path) -> UserError:
    return UserError(f"the votes cannot be read or written: {error}", place=str(path))
