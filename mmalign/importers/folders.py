"""Folders of pictures: pairs by file name, or single ones with captions."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign.errors import UserError
from mmalign.importers.common import ImportOptions, Scan, desirable, provenance_of
from mmalign.media import path_fault
from mmalign.records import Candidate, Problem, Record, Vote, shown
from mmalign.sources import (
    Fault,
    Row,
    files_below,
    image_of,
    is_image,
    parse_json,
    read_text,
    require_safe,
    rows_of,
    text_of,
)

SIDE = re.compile(r"(?P<name>.+)_(?P<side>[wl])")
"""The stem of a picture of a pair."""


def pairs_folder(path: Path, options: ImportOptions) -> Scan:
    """NAME_w and NAME_l beside each other; the prompt (and group, split, licence, label) beside them too."""
    if not path.is_dir():
        raise UserError("the format 'pairs_folder' needs a folder", place=str(path))
    pairs: dict[str, dict[str, list[str]]] = {}
    for name in files_below(path):
        if not is_image(name):
            continue
        match = SIDE.fullmatch(Path(name).stem)
        if match is None:
            yield Problem(row=name, field="name", expected="a name that ends in _w or _l", got=Path(name).name)
            continue
        key = (Path(name).parent / match["name"]).as_posix()
        pairs.setdefault(key, {}).setdefault(match["side"], []).append(name)
    lines = _metadata(path)
    for key, sides in pairs.items():
        try:
            yield _folder_pair(path, key, sides, lines, options)
        except Fault as fault:
            yield Problem(row=key, field=fault.name, expected=fault.expected, got=fault.got)


def _folder_pair(
    root: Path, key: str, sides: dict[str, list[str]], lines: dict[str, Row], options: ImportOptions
) -> Record:
    images = {}
    for side in "wl":
        files = sides.get(side, [])
        if len(files) != 1:
            wanted = f"one {Path(key).name}_{side} picture"
            raise Fault("files", wanted, ", ".join(Path(file).name for file in files) or "none")
        images[side] = image_of(root, files[0], f"_{side}", files[0])
    about: dict[str, Any] = {}
    for name in (key, sides["w"][0], sides["l"][0]):
        about.update(lines.get(name, {}))
    for stem in (key, f"{key}_w"):
        caption = _caption(root, stem)
        if caption is not None:
            about.setdefault("prompt", caption)
    sidecar = root / f"{key}.json"
    if sidecar.exists():
        require_safe(root, f"{key}.json", "sidecar")
        try:
            value = parse_json(sidecar.read_bytes(), f"{key}.json")
        except UserError as error:
            raise Fault(f"{key}.json", "JSON", error.cause) from error
        if not isinstance(value, Mapping):
            raise Fault(f"{key}.json", "an object", shown(value))
        about.update(value)
    about.setdefault("prompt", options.prompt)
    if about["prompt"] is None:
        raise Fault("prompt", f"{key}.txt, {key}.json, a line of metadata.jsonl or --prompt", "none of them")
    label = about.get("label", "w")
    if label not in ("w", "tie"):
        raise Fault("label", "w or tie", shown(label))
    return Record(
        record_id=key,
        prompt=text_of(about, "prompt"),
        candidates=tuple(Candidate(candidate_id=side, image=images[side]) for side in "wl"),
        votes=(Vote(a="w", b="l", label="a" if label == "w" else "tie"),),
        **provenance_of(about, "pairs_folder"),
        context={"group": about["group"]} if "group" in about else {},
        place=key,
    )


def pictures(path: Path, options: ImportOptions) -> Scan:
    """Every picture of a folder with its caption."""
    if not path.is_dir():
        raise UserError("the format 'pictures' needs a folder", place=str(path))
    names = [name for name in files_below(path) if is_image(name)]
    if not names:
        raise UserError("the folder has no pictures", place=str(path))
    lines = _metadata(path)
    for name in names:
        about = dict(lines.get(name, {}))
        try:
            caption = _caption(path, os.path.splitext(name)[0])
            texts = (about.get("prompt"), about.get("text"), about.get("caption"), caption, options.prompt)
            prompt = next((text for text in texts if text is not None), None)
            if prompt is None:
                stem = os.path.splitext(name)[0]
                raise Fault("prompt", f"{stem}.txt, a line of metadata.jsonl or --prompt", "none of them")
            scores = desirable(about) if "label" in about else {}
            yield Record(
                record_id=name,
                prompt=text_of({"prompt": prompt}, "prompt"),
                candidates=(
                    Candidate(candidate_id="picture", image=image_of(path, name, "picture", name), scores=scores),
                ),
                **provenance_of(about, "pictures"),
                context={"group": about["group"]} if "group" in about else {},
                place=name,
            )
        except Fault as fault:
            yield Problem(row=name, field=fault.name, expected=fault.expected, got=fault.got)


def _caption(root: Path, stem: str) -> str | None:
    """The text of the file `stem`.txt, None without one."""
    if not (root / f"{stem}.txt").exists():
        return None
    require_safe(root, f"{stem}.txt", "prompt")
    try:
        return read_text(root / f"{stem}.txt").strip()
    except UserError as error:
        raise Fault("prompt", "UTF-8 text", f"'{error.cause}'") from error


def _metadata(root: Path) -> dict[str, Row]:
    """metadata.jsonl: one object per line, its `file_name` a picture or the common NAME."""
    if not (root / "metadata.jsonl").exists():
        return {}
    fault = path_fault(root, "metadata.jsonl")
    if fault:
        raise UserError(f"expected a file inside the data folder, got {fault}", place=str(root))
    lines = {}
    for number, row in enumerate(rows_of(root / "metadata.jsonl"), start=1):
        if isinstance(row, Problem):
            raise row.error()
        if not isinstance(row, Mapping) or not isinstance(row.get("file_name"), str):
            raise UserError("expected an object with 'file_name'", place=f"metadata.jsonl line {number}")
        lines[row["file_name"]] = row
    return lines
