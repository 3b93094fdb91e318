"""Prompt lists: a text file, a JSON-lines file, or the captions of the embedded world."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mmalign.errors import UserError, nearest
from mmalign.shapes import scenes

WORLD = {"shapes:train": "train", "shapes:heldout": "heldout"}
FIELDS = ("prompt", "caption", "text")


def read_prompts(source: str, count: int | None = None, seed: int = 0) -> list[str]:
    """Different prompts from a source, in an order drawn by the seed when only `count` of them are wanted.

    Args:
        source: `shapes:train`, `shapes:heldout`, a `.txt` file with a prompt a line, or a `.jsonl` file whose rows
            have a `prompt` (or `caption` or `text`).
        count: how many; null for all.
        seed: which ones.

    Raises:
        UserError: no such source, an empty or repeated prompt, too few of them.
    """
    if source in WORLD:
        split = WORLD[source]
        every = [scene.caption for scene in scenes.every_scene() if scene.split == split]
    else:
        every = _read(Path(source))
    if count is None:
        return every
    if count > len(every):
        raise UserError(f"{count} prompts asked for, there are {len(every)}", place=source)
    order = np.random.default_rng([seed, 7]).permutation(len(every))
    return [every[index] for index in order[:count]]


def _read(path: Path) -> list[str]:
    if str(path).startswith("shapes:"):
        raise UserError(f"no prompt list '{path}'", fix=nearest(str(path), WORLD))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts: {error}", place=str(path)) from error
    prompts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        prompt = _row(line, f"{path}:{number}") if path.suffix == ".jsonl" else line.strip()
        if not prompt:
            raise UserError("empty prompt", place=f"{path}:{number}", fix="Remove the line.")
        if prompt in prompts:
            raise UserError(f"the prompt of line {prompts[prompt]} again", place=f"{path}:{number}")
        prompts[prompt] = number
    if not prompts:
        raise UserError("no prompts", place=str(path))
    return list(prompts)


def _row(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"not JSON: {error}", place=place) from error
    found = [row[field] for field in FIELDS if isinstance(row, dict) and field in row]
    if not found or not isinstance(found[0], str):
        raise UserError(f"a row needs a text field {' or '.join(FIELDS)}", place=place)
    return found[0].strip()
