"""Reading what others wrote: rows of files, files of a folder, and values that are not what they should be.

The importers are built from these. A `Fault` is a field that cannot be read; the importer knows the row and
makes it a `Problem`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from mmalign.errors import UserError
from mmalign.media import SUFFIXES, Media, path_fault
from mmalign.preferences import damage, open_parquet
from mmalign.records import Problem, shown

Row: TypeAlias = Mapping[str, Any]


class Fault(Exception):
    """A field of the row at hand cannot be read; becomes a Problem with the row's name."""

    def __init__(self, name: str, expected: str, got: str) -> None:
        super().__init__(name)
        self.name, self.expected, self.got = name, expected, got


def table_files(path: Path) -> list[Path]:
    """The files that hold a source's rows: itself, or a folder's Parquet, else JSONL, else JSON files."""
    if path.is_file():
        return [path]
    names = [name for name in files_below(path) if name != "metadata.jsonl"]
    for suffix in (".parquet", ".jsonl", ".json"):
        tables = [name for name in names if name.endswith(suffix)]
        if tables:
            break
    for name in tables:
        fault = path_fault(path, name)
        if fault:
            raise UserError(f"expected a file inside the data folder, got {fault}", place=str(path))
    return [path / name for name in tables]


def rows_of(file: Path) -> Iterator[Any]:
    """Rows of a Parquet, JSON or JSON-lines file; a Problem for a line that is not JSON."""
    if file.suffix == ".parquet":
        with open_parquet(file) as table, damage(file):
            for batch in table.iter_batches(batch_size=32):  # rows may hold megabytes of image
                yield from batch.to_pylist()
        return
    if file.suffix not in (".json", ".jsonl"):
        raise UserError(f"cannot read a '{file.suffix}' file", place=str(file), fix="Known: .parquet, .json, .jsonl")
    if file.suffix == ".jsonl":
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield parse_json(line.rstrip(b"\r\n"), f"{file.name} line {number}")
                    except UserError as error:
                        place = f"{file.name} line {number}"
                        yield Problem(row=place, field="line", expected="JSON", got=f"'{error.cause}'")
        return
    value = parse_json(file.read_bytes(), str(file))
    yield from value if isinstance(value, list) else [value]


def read_text(file: Path) -> str:
    """A text file's content.

    Raises:
        UserError: it is not UTF-8.
    """
    return _decode(file.read_bytes(), str(file))


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"this is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}",
            place=place,
            fix="Save it as UTF-8",
        ) from error


def parse_json(data: bytes, place: str) -> Any:
    """The value of a JSON text, as a UserError with its place when it is none."""
    try:
        return json.loads(_decode(data, place))
    except (ValueError, RecursionError) as error:
        raise UserError(f"this is not JSON: {error}", place=place, fix="Correct or remove it") from error


def files_below(root: Path) -> list[str]:
    """Every file below a folder, sorted, as relative posix paths; hidden ones and linked folders left out."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = Path(folder).relative_to(root)
        found += [(base / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of a picture."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def text_of(row: Row, name: str, field: str | None = None) -> str:
    """A value that must be text; `field` names it in the message."""
    value = row.get(name)
    if not isinstance(value, str):
        raise Fault(field or name, "text", shown(value))
    return value


def maybe_text(row: Row, name: str, field: str | None = None) -> str | None:
    """A value that may be missing and is text otherwise."""
    return None if row.get(name) is None else text_of(row, name, field)


def context_of(row: Row) -> dict[str, Any]:
    """The `context` object of a row, with its `group` beside it taken in."""
    context = row.get("context") or {}
    if not isinstance(context, Mapping):
        raise Fault("context", "an object", shown(context))
    return {**context, "group": row["group"]} if "group" in row else dict(context)


def require_safe(root: Path, relative: str, field: str) -> None:
    """A Fault unless `relative` is a file that stays below `root`."""
    fault = path_fault(root, relative)
    if fault:
        raise Fault(field, "a file inside the data folder", fault)


def image_of(root: Path, value: Any, field: str, name: str) -> Media:
    """An image from its bytes, a path below `root`, or the {bytes, path} struct of the `datasets` library."""
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(data, bytes):
        return Media(data=data, place=f"{name} {field}")
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str):
        raise Fault(field, "the path or the bytes of an image", shown(value))
    if re.match(r"[a-z]+://", path, re.IGNORECASE):
        raise Fault(field, "a file inside the data folder", f"the address '{path}', and nothing is fetched")
    require_safe(root, path, field)
    return Media(path=path, root=str(root), place=name if path == name else f"{name} {field}")


def images_of(root: Path, value: Any, field: str, name: str) -> tuple[Media, ...]:
    """A list of images, or one (a lone string is one path, never a list of characters)."""
    if value is None:
        return ()
    if not isinstance(value, list):
        return (image_of(root, value, field, name),)
    return tuple(image_of(root, item, f"{field}[{i}]", name) for i, item in enumerate(value))
