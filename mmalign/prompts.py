"""Prompt lists: a file as benchmarks publish theirs, the captions of the embedded world, or the list that comes along.

composed      300 of our own about everyday things, fifty for each of GenEval's six tasks; `composed:counting` are those
              of one. The file, promptlists/composed.jsonl, has what each demands in GenEval's form. Apache-2.0.

.txt          a prompt a line
.jsonl        an object a line with a `prompt`, `caption` or `text`: GenEval's evaluation_metadata.jsonl
.json         a list of such objects or of texts: HPSv2's benchmark files
.tsv, .csv    a table whose header names such a column, or `Prompts`, in any case: PartiPrompts.tsv, DrawBench.csv
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmalign.errors import UserError, nearest
from mmalign.shapes import scenes

WORLD = {"shapes:train": "train", "shapes:heldout": "heldout"}
COMPOSED, COMPOSED_FILE = "composed", Path(__file__).parent / "promptlists" / "composed.jsonl"
FIELDS = ("prompt", "caption", "text")
COLUMNS = (*FIELDS, "prompts")


def is_list(source: str) -> bool:
    """Whether this names a list of prompts rather than being one prompt's text."""
    return source in WORLD or _is_composed(source) or source.lower().endswith((".txt", *READERS))


def read_prompts(source: str, count: int | None = None, seed: int = 0) -> list[str]:
    """Different prompts from a source, in an order drawn by the seed when only `count` of them are wanted.

    Args:
        source: `shapes:train`, `shapes:heldout`, `composed`, `composed:TASK`, or a file of the kinds above (of any
            other ending: a prompt a line).
        count: how many; null for all.
        seed: which ones.

    Raises:
        UserError: no such source, an empty or repeated prompt, too few of them.
    """
    if source in WORLD:
        split = WORLD[source]
        every = [scene.caption for scene in scenes.every_scene() if scene.split == split]
    elif _is_composed(source):
        every = _composed(source.partition(":")[2])
    else:
        every = _read(Path(source))
    if count is None:
        return every
    if count > len(every):
        raise UserError(f"{count} prompts asked for, there are {len(every)}", place=source)
    order = np.random.default_rng([seed, 7]).permutation(len(every))
    return [every[index] for index in order[:count]]


def _is_composed(source: str) -> bool:
    return source == COMPOSED or source.startswith(f"{COMPOSED}:")


def _composed(task: str) -> list[str]:
    rows = [json.loads(line) for line in COMPOSED_FILE.read_text(encoding="utf-8").splitlines()]
    tasks = list(dict.fromkeys(row["tag"] for row in rows))
    if task and task not in tasks:
        raise UserError(f"the list '{COMPOSED}' has no task '{task}'", fix=nearest(task, tasks))
    return [row["prompt"] for row in rows if task in ("", row["tag"])]


def _read(path: Path) -> list[str]:
    if not path.suffix and not path.exists():
        raise UserError(f"no prompt list '{path}'", fix=f"{nearest(str(path), [*WORLD, COMPOSED])} Or give a file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts: {error}", place=str(path)) from error
    prompts: dict[str, int] = {}
    for number, found in READERS.get(path.suffix.lower(), _lines)(text, path):
        prompt, place = found.strip(), f"{path}:{number}"
        if not prompt:
            raise UserError("empty prompt", place=place, fix="Remove it.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON can carry and no file of ours can
            raise UserError(f"not valid Unicode: {error.reason}", place=place, fix="Correct it.") from error
        if prompt in prompts:
            raise UserError(f"the prompt of {path.name}:{prompts[prompt]} again", place=place)
        prompts[prompt] = number
    if not prompts:
        raise UserError("no prompts", place=str(path))
    return list(prompts)


# ------------------------------------------------------- kinds of files: (number of the line or entry, its prompt)


def _lines(text: str, path: Path) -> Iterator[tuple[int, str]]:
    yield from enumerate(io.StringIO(text), start=1)  # of line ends alone: U+2028 may stand in a prompt


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, str]]:
    for number, line in _lines(text, path):
        yield number, _said(_json(line, f"{path}:{number}"), f"{path}:{number}")


def _json_list(text: str, path: Path) -> Iterator[tuple[int, str]]:
    rows = _json(text, str(path))
    if not isinstance(rows, list):
        raise UserError("expected a list of prompts", place=str(path))
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, str) else _said(row, f"{path}:{number}")


def _table(text: str, path: Path) -> Iterator[tuple[int, str]]:
    tabs = path.suffix.lower() == ".tsv"  # in which a quotation mark is a character like any other
    quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", quoting=quoting, strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        column = next((header.index(name) for name in COLUMNS if name in header), None)
        if column is None:
            raise UserError(f"no column {' or '.join(COLUMNS)}", place=f"{path}:1", fix="The first line names columns.")
        for row in rows:
            yield rows.line_num, row[column] if column < len(row) else ""
    except csv.Error as error:
        raise UserError(f"not a table: {error}", place=f"{path}:{rows.line_num}") from error


READERS = {".jsonl": _json_lines, ".json": _json_list, ".tsv": _table, ".csv": _table}


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}", place=place) from error


def _said(row: Any, place: str) -> str:
    found = [row[field] for field in FIELDS if isinstance(row, dict) and field in row]
    if not found or not isinstance(found[0], str):
        raise UserError(f"a row needs a text field {' or '.join(FIELDS)}", place=place)
    return found[0]
