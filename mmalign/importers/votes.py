"""Votes of the arena (`mmalign arena`): an SQLite file beside the pictures that were voted on.

One record per prompt, seed and input picture, with every candidate that somebody voted on, and every vote that was not
taken back. A vote for neither ("both bad") is a tie, and the record's context lists it under `both_bad`. A pair that
was skipped has no vote. The file says what each picture's bytes were, and a picture that has changed since is a
problem: it is not what people saw.

The file may come from anywhere: it is opened for queries only, its own triggers and views are never used, and its paths
may not leave its folder.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign.errors import UserError
from mmalign.importers.common import ImportOptions, Scan, root_of
from mmalign.media import Media
from mmalign.records import Candidate, Label, Problem, Record, Vote, shown
from mmalign.sources import Fault, image_of, maybe_text, text_of

MAGIC = b"SQLite format 3\0"
APPLICATION_ID = 0x6D6D6176  # "mmav"
VERSION = 1  # of the tables


def is_votes(path: Path) -> bool:
    """Whether the file is an SQLite database."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC
    return False


def opened(path: Path) -> sqlite3.Connection:
    """The file, for queries.

    Raises:
        UserError: it is not one of the arena's.
    """
    if not is_votes(path):
        raise UserError("this is not a file of votes", place=str(path), fix="`mmalign arena` writes such files")
    try:
        # Not mode=ro: a transaction that a killed server left half written is rolled back by whoever opens it next.
        connection = sqlite3.connect(path, timeout=10.0, isolation_level=None)
        connection.executescript("PRAGMA query_only=ON; PRAGMA trusted_schema=OFF;")
        (kind,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error as error:
        raise UserError(f"the votes cannot be read: {error}", place=str(path)) from error
    if (kind, version) == (APPLICATION_ID, VERSION):
        return connection
    connection.close()
    if kind == APPLICATION_ID:
        raise UserError(f"the votes are in version {version} of the format", place=str(path), fix="Update mmalign")
    raise UserError("this SQLite file holds no votes", place=str(path), fix="`mmalign arena` writes such files")


def votes(path: Path, options: ImportOptions) -> Scan:
    """Records of what was voted on."""
    root = root_of(path, options)
    connection = opened(path)
    try:
        connection.row_factory = sqlite3.Row
        live = (
            "SELECT votes.*, trials.unit, trials.a, trials.b FROM votes JOIN trials ON trials.trial = votes.trial "
            "WHERE vote NOT IN (SELECT vote FROM retractions) AND answer != 'skip' ORDER BY vote"
        )
        judged: dict[str, list[Mapping[str, Any]]] = {}
        for row in connection.execute(live):
            judged.setdefault(row["unit"], []).append(dict(row))
        if not judged:
            raise UserError("nobody has voted yet", place=str(path), fix="Vote at the page of `mmalign arena`")
        for unit, cast in judged.items():
            about = connection.execute("SELECT * FROM units WHERE unit = ?", (unit,)).fetchone()
            listed = connection.execute("SELECT * FROM candidates WHERE unit = ? ORDER BY rowid", (unit,)).fetchall()
            name = f"{path.name} unit {unit}"
            try:
                yield _record(root, dict(about or {}), [dict(row) for row in listed], cast, name)
            except Fault as fault:
                yield Problem(row=name, field=fault.name, expected=fault.expected, got=fault.got)
    except sqlite3.Error as error:
        raise UserError(f"the votes cannot be read: {error}", place=str(path)) from error
    finally:
        connection.close()


def _record(
    root: Path,
    about: Mapping[str, Any],
    listed: list[dict[str, Any]],
    cast: list[Mapping[str, Any]],
    name: str,
) -> Record:
    wanted = {side for vote in cast for side in (vote["a"], vote["b"])}
    seed = about.get("seed")
    ids: dict[str, str] = {}
    candidates = []
    for row in listed:
        if row["candidate"] not in wanted:
            continue
        label = text_of(row, "contestant")
        # A contestant whose picture was drawn again is there twice, with the votes on each.
        own = label if label not in ids.values() else f"{label}~{row['candidate'][:8]}"
        ids[row["candidate"]] = own
        image = None if row["image"] is None else _unchanged(root, row["image"], row["sha256"], "image", name)
        model = maybe_text(row, "model") or label
        candidates.append(
            Candidate(candidate_id=own, image=image, text=maybe_text(row, "text"), model=model, seed=seed)
        )
    media = about.get("media")
    context: dict[str, Any] = {}
    if media is not None:
        context["group"] = media
    both_bad = [[ids[vote["a"]], ids[vote["b"]]] for vote in cast if vote["answer"] == "bad" and wanted <= ids.keys()]
    if both_bad:
        context["both_bad"] = both_bad
    return Record(
        record_id=text_of(about, "unit"),
        prompt=text_of(about, "prompt"),
        media=() if media is None else (_unchanged(root, media, about["media_sha256"], "media", name),),
        candidates=tuple(candidates),
        votes=tuple(_vote(vote, ids, f"votes[{index}]") for index, vote in enumerate(cast)),
        source="arena",
        context=context,
        place=name,
    )


def _unchanged(root: Path, path: Any, sha256: Any, field: str, name: str) -> Media:
    media = image_of(root, path, field, name)
    if media.sha256() != sha256:
        raise Fault(field, "the picture that was voted on", f"other bytes in '{path}'")
    return media


def _vote(row: Mapping[str, Any], ids: Mapping[str, str], field: str) -> Vote:
    for side in ("a", "b"):
        if row[side] not in ids:
            raise Fault(f"{field}.{side}", "a candidate of the same prompt", shown(row[side]))
    words: dict[tuple[Any, Any], Label] = {
        ("left", "a"): "a",
        ("left", "b"): "b",
        ("right", "a"): "b",
        ("right", "b"): "a",
        ("tie", "a"): "tie",
        ("tie", "b"): "tie",
        ("bad", "a"): "tie",
        ("bad", "b"): "tie",
    }
    label = words.get((row["answer"], row["left"]))
    if label is None:
        raise Fault(f"{field}.answer", "left, right, tie or bad", shown((row["answer"], row["left"])))
    return Vote(
        a=ids[row["a"]],
        b=ids[row["b"]],
        label=label,
        rater=maybe_text(row, "rater", f"{field}.rater"),
        milliseconds=row["milliseconds"],
    )
