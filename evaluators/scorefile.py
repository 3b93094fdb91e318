"""Scores at rest: JSON lines, a header and then a row per picture.

    {"format": "mmalign-scores", "version": 1, "model": "base", "protocol": {...}, "protocol_digest": "...",
     "scorers": {"clip": {"identity": "clip@1#ab12", "main": "clip", "numbers": ["clip"]}}}
    {"id": "00001-0", "prompt": "a red circle", "seed": 7, "image": "images/00001-0.png", "scores": {"clip/clip": 0.31}}
    {"id": "00002-0", "prompt": "a blue square", "seed": 8, "scores": {}, "error": "clip: cannot decode the image"}

A number is called `scorer/number`. Equal ids in two files are the same sample, drawn from another model. The protocol
is everything that moves scores besides the model: prompts, seeds, sampler, steps, guidance, size. Two files are
comparable when the digests of their protocols are equal.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evaluators.scorer import Scorer, load
from mmalign.errors import UserError
from mmalign.records import is_number, shown
from mmalign.sources import parse_json

FORMAT, VERSION = "mmalign-scores", 1
FILE = "scores.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What the rows of a file have in common.

    Attributes:
        model: whose pictures they are.
        protocol: plain JSON.
        scorers: label -> {identity, main, numbers}.
    """

    model: str
    protocol: Mapping[str, Any]
    scorers: Mapping[str, Mapping[str, Any]]

    @property
    def digest(self) -> str:
        """Of the protocol."""
        return digest(self.protocol)

    @property
    def numbers(self) -> list[str]:
        """Every number that a row may have."""
        return [f"{label}/{number}" for label, one in self.scorers.items() for number in one["numbers"]]

    @property
    def mains(self) -> list[str]:
        """The number of each scorer that is its score."""
        return [f"{label}/{one['main']}" for label, one in self.scorers.items()]

    def identity(self, number: str) -> str:
        """Who measured a number."""
        return str(self.scorers[number.partition("/")[0]]["identity"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One picture.

    Attributes:
        error: why numbers are missing; None when none are.
        image: where the picture is, relative to the file; None when it is not kept beside it.
    """

    id: str
    prompt: str
    scores: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None
    error: str | None = None
    image: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreFile:
    """A file, read."""

    path: Path
    header: Header
    rows: dict[str, Row]


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a JSON value, keys in order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------- scorers


def scorers_of(words: Iterable[str]) -> dict[str, Scorer]:
    """Scorers by label, from `NAME` or `NAME,option=value,...` as the command line has them.

    A second one of the same name is called `NAME-2`. Values are YAML: `clip,path=/models/clip`, `shapes,main=style`.

    Raises:
        UserError: no such scorer or option.
    """
    found: dict[str, Scorer] = {}
    counts: dict[str, int] = {}
    for word in words:
        name, *given = word.split(",")
        options = {}
        for part in given:
            key, equals, value = part.partition("=")
            if not equals or not key:
                raise UserError(f"'{part}' is no option=value", place=f"--scorer {word}")
            try:
                options[key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UserError(f"'{value}' cannot be read", place=f"--scorer {word}") from error
        counts[name] = counts.get(name, 0) + 1
        found[name if counts[name] == 1 else f"{name}-{counts[name]}"] = load(name, options)
    if not found:
        raise UserError("nothing to score with", fix="Give --scorer NAME; `mmalign scorers` lists them.")
    return found


def described(scorers: Mapping[str, Scorer]) -> dict[str, dict[str, Any]]:
    """What a header says of scorers."""
    return {
        label: {"identity": one.identity, "main": one.main, "numbers": list(one.numbers)}
        for label, one in scorers.items()
    }


# ---------------------------------------------------------------------------------------------------- writing


def head_line(header: Header) -> str:
    """The first line of a file."""
    said = {
        "format": FORMAT,
        "version": VERSION,
        "model": header.model,
        "protocol": dict(header.protocol),
        "protocol_digest": header.digest,
        "scorers": {label: dict(one) for label, one in header.scorers.items()},
    }
    return json.dumps(said, ensure_ascii=False, allow_nan=False) + "\n"


def row_line(row: Row) -> str:
    """A row's line; fields that say nothing are left out."""
    said: dict[str, Any] = {"id": row.id, "prompt": row.prompt}
    said |= {name: value for name in ("seed", "image") if (value := getattr(row, name)) is not None}
    said["scores"] = dict(row.scores)
    if row.error is not None:
        said["error"] = row.error
    return json.dumps(said, ensure_ascii=False, allow_nan=False) + "\n"


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Write a text file that appears only when it is complete.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", place=str(path), fix="Free some space.") from error
    finally:
        partial.unlink(missing_ok=True)


def write_scores(path: Path, header: Header, rows: Iterable[Row]) -> None:
    """A file from its rows, whole or not at all."""

    def lines() -> Iterable[str]:
        yield head_line(header)
        yield from map(row_line, rows)

    write_whole(path, lines())


# ---------------------------------------------------------------------------------------------------- reading


def read_scores(path: Path) -> ScoreFile:
    """A score file, or the one in a folder that `mmalign score` wrote.

    Raises:
        UserError: there is none, it is unfinished or damaged, or an id comes twice; with the line.
    """
    if path.is_dir():
        if not (path / FILE).is_file():
            raise UserError(
                f"there is no {FILE} in this folder", place=str(path), fix="Finish `mmalign score` into it first."
            )
        path = path / FILE
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read scores: {error.strerror}", place=str(path)) from error
    if not lines:
        raise UserError("the file is empty", place=str(path))
    header = read_header(lines[0], f"{path} line 1")
    known, rows = set(header.numbers), {}
    for number, line in enumerate(lines[1:], start=2):
        place = f"{path} line {number}"
        row = read_row(line, place)
        if row.id in rows:
            raise UserError(f"the id '{row.id}' again", place=place)
        if strange := sorted(set(row.scores) - known):
            raise UserError(f"'{strange[0]}' is of no scorer in the header", place=place)
        rows[row.id] = row
    if not rows:
        raise UserError("the file has a header and no rows", place=str(path))
    return ScoreFile(path=path, header=header, rows=rows)


def read_header(line: bytes, place: str) -> Header:
    """The header of a file's first line."""
    value = parse_json(line, place)
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        raise UserError("not a file of scores: its first line is no header", place=place, fix="See `mmalign score`.")
    if value.get("version") != VERSION:
        raise UserError(f"scores of version {value.get('version')}, this mmalign reads {VERSION}", place=place)
    model, scorers, protocol = value.get("model"), value.get("scorers"), value.get("protocol")
    if not (isinstance(model, str) and isinstance(scorers, Mapping) and isinstance(protocol, Mapping)):
        raise UserError("the header lacks model, protocol or scorers", place=place)
    for label, one in scorers.items():
        if not isinstance(one, Mapping) or not {"identity", "main", "numbers"} <= set(one):
            raise UserError(f"the header lacks identity, main or numbers of scorer '{label}'", place=place)
    header = Header(model=model, protocol=protocol, scorers=scorers)
    if header.digest != value.get("protocol_digest"):
        raise UserError(
            "the header's protocol does not match its digest: somebody changed one of them",
            place=place,
            fix="Score the pictures again.",
        )
    return header


def read_row(line: bytes, place: str) -> Row:
    """The row of a line."""
    value = parse_json(line, place)
    if not isinstance(value, Mapping):
        raise UserError(f"expected an object, got {shown(value)}", place=place)
    for name in ("id", "prompt"):
        if not isinstance(value.get(name), str):
            raise UserError(f"{name}: expected text, got {shown(value.get(name))}", place=place)
    scores = value.get("scores")
    if not isinstance(scores, Mapping):
        raise UserError(f"scores: expected an object, got {shown(scores)}", place=place)
    for name, number in scores.items():
        if not is_number(number):
            raise UserError(f"scores.{name}: expected a finite number, got {shown(number)}", place=place)
    seed = value.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise UserError(f"seed: expected a whole number, got {shown(seed)}", place=place)
    for name in ("error", "image"):
        if not isinstance(value.get(name), str | None):
            raise UserError(f"{name}: expected text, got {shown(value[name])}", place=place)
    return Row(
        id=value["id"],
        prompt=value["prompt"],
        scores={name: float(number) for name, number in scores.items()},
        seed=seed,
        error=value.get("error"),
        image=value.get("image"),
    )
