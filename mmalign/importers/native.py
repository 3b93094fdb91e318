"""This project's own forms: a store, and JSON rows or files with prompt, candidates and votes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mmalign.errors import UserError
from mmalign.importers.common import ImportOptions, Scan, provenance_of, root_of, row_id
from mmalign.importers.tables import convert_rows
from mmalign.media import Media, path_fault
from mmalign.preferences import Store
from mmalign.records import LABELS, Candidate, Problem, Record, Vote, is_number, shown
from mmalign.sources import Fault, Row, context_of, files_below, image_of, maybe_text, parse_json, text_of


def store(path: Path, options: ImportOptions) -> Scan:
    """A folder written by `mmalign data import`."""
    yield from Store.open(path).records()


def records(path: Path, options: ImportOptions) -> Scan:
    """Rows in this project's own JSON form, in one file or as one file per record."""
    if path.is_dir():
        sidecars = [name for name in files_below(path) if name.endswith(".json")]
        if not sidecars:
            raise UserError("the folder holds no JSON files", place=str(path))
        for name in sidecars:
            unsafe = path_fault(path, name)
            if unsafe:
                yield Problem(row=name, field="file", expected="a file inside the data folder", got=unsafe)
                continue
            try:
                row = parse_json((path / name).read_bytes(), name)
                yield _native(row, name, (path / name).parent, path, options, name.removesuffix(".json"))
            except UserError as error:
                yield Problem(row=name, field="file", expected="JSON", got=error.cause)
            except Fault as fault:
                yield Problem(row=name, field=fault.name, expected=fault.expected, got=fault.got)
        return
    root = root_of(path, options)
    yield from convert_rows(
        path,
        "records",
        lambda row, name: _native(row, name, root, root, options, row_id(name)),
    )


def _native(row: Any, name: str, folder: Path, root: Path, options: ImportOptions, default: str) -> Record:
    """A record from JSON; image paths are relative to `folder` and may not leave `root`."""
    if not isinstance(row, Mapping):
        raise Fault("row", "an object", shown(row))
    prefix = folder.relative_to(root).as_posix() if folder != root else ""

    def image(value: Any, field: str) -> Media | None:
        if value is None:
            return None
        joined = os.path.normpath(f"{prefix}/{value}") if prefix and isinstance(value, str) else value
        return image_of(root, joined, field, name)

    listed = row.get("candidates")
    votes = row.get("votes") or []
    names = None
    if listed is None and "chosen" in row and "rejected" in row:
        names = ["chosen", "rejected"]
        listed = [{"id": name, "image": row[name]} for name in names]
        votes = [{"a": "chosen", "b": "rejected", "label": row.get("label", "a")}]
    if not isinstance(listed, list) or not all(isinstance(item, Mapping) for item in listed):
        raise Fault("candidates", "a list of objects", shown(listed))
    if not isinstance(votes, list) or not all(isinstance(vote, Mapping) for vote in votes):
        raise Fault("votes", "a list of objects", shown(votes))
    candidates = []
    for index, item in enumerate(listed):
        field = f"candidates[{index}]"
        scores = item.get("scores") or {}
        if not isinstance(scores, Mapping) or not all(map(is_number, scores.values())):
            raise Fault(f"{field}.scores", "an object of finite numbers", shown(scores))
        seed = item.get("seed")
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise Fault(f"{field}.seed", "a whole number", shown(seed))
        candidates.append(
            Candidate(
                candidate_id=str(item.get("id", item.get("candidate_id", index))),
                image=image(item.get("image"), names[index] if names else f"{field}.image"),
                text=maybe_text(item, "text", f"{field}.text"),
                scores={str(name): float(value) for name, value in scores.items()},
                model=maybe_text(item, "model", f"{field}.model"),
                seed=seed,
                prompt=maybe_text(item, "prompt", f"{field}.prompt"),
            )
        )
    media = row.get("media", row.get("images")) or []
    return Record(
        record_id=str(row.get("id", row.get("record_id", default))),
        prompt=text_of({"prompt": options.prompt, **row}, "prompt"),
        media=tuple(
            item
            for i, value in enumerate(media if isinstance(media, list) else [media])
            if (item := image(value, f"media[{i}]")) is not None
        ),
        candidates=tuple(candidates),
        votes=tuple(_vote(vote, f"votes[{index}]") for index, vote in enumerate(votes)),
        **provenance_of(row, "records"),
        context=context_of(row),
        place=name,
    )


def _vote(row: Row, field: str) -> Vote:
    known = {item.name for item in fields(Vote)}
    if not {"a", "b", "label"} <= set(row) <= known:
        raise Fault(field, f"the keys a, b, label and perhaps {', '.join(sorted(known))}", shown(sorted(row)))
    if row["label"] not in LABELS:
        raise Fault(f"{field}.label", "a, b or tie", shown(row["label"]))
    sure, time = row.get("confidence"), row.get("milliseconds")
    if sure is not None and not is_number(sure):
        raise Fault(f"{field}.confidence", "a probability from 0.5 to 1", shown(sure))
    if time is not None and (not isinstance(time, int) or isinstance(time, bool)):
        raise Fault(f"{field}.milliseconds", "a whole number", shown(time))
    return Vote(
        a=str(row["a"]),
        b=str(row["b"]),
        label=row["label"],
        rater=maybe_text(row, "rater", f"{field}.rater"),
        confidence=None if sure is None else float(sure),
        milliseconds=time,
    )
