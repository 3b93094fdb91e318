"""JSON files that others wrote: read whole, every fault one line with file, row and field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from mmalign.errors import UserError
from mmalign.records import shown
from mmalign.sources import parse_json

Row: TypeAlias = Mapping[str, Any]


def content(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise UserError("there is no such file", place=str(path))
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise UserError("this file may not be read", place=str(path)) from error


def decoded(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("this is not UTF-8 text", place=str(path), fix="Save it as UTF-8.") from error


def value_of(path: Path) -> Any:
    """The value of a JSON file."""
    return parse_json(content(path), str(path))


def rows_of(path: Path) -> list[tuple[str, Row]]:
    """(place, object) of every line of a JSON-lines file, whatever its suffix; empty lines are passed over."""
    found = []
    for number, line in enumerate(content(path).splitlines(), start=1):
        if line.strip():
            place = f"{path} line {number}"
            found.append((place, entry(parse_json(line, place), place)))
    if not found:
        raise UserError("the file has no rows", place=str(path))
    return found


def entry(value: Any, place: str) -> Row:
    """A value that must be an object."""
    if not isinstance(value, Mapping):
        raise UserError(f"expected an object, got {shown(value)}", place=place)
    return value


def text(row: Row, name: str, place: str) -> str:
    """A field that must be text."""
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(f"{name}: expected text, got {shown(value)}", place=place)
    return value


def identifier(row: Row, name: str, place: str) -> str:
    """A field that must be a number or a name; 7 and "7" are the same."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(f"{name}: expected a whole number or text, got {shown(value)}", place=place)
    return str(value)


def listed(row: Row, name: str, place: str) -> list[Any]:
    """A field that must be a list."""
    value = row.get(name)
    if not isinstance(value, list):
        raise UserError(f"{name}: expected a list, got {shown(value)}", place=place)
    return value
