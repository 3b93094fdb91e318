"""Rows of Parquet, JSON and JSON-lines files: which format their columns say, and their faults as problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmalign.errors import UserError, nearest
from mmalign.importers.common import Scan
from mmalign.preferences import open_parquet
from mmalign.records import Problem, Record, shown
from mmalign.sources import Fault, Row, rows_of, table_files

# Column groups of the tabular formats: each group needs one of its names. The first format whose groups are all there
# is the one, so a format stands before those that need only a part of its columns.
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "pickapic": (("caption",), ("jpg_0",), ("jpg_1",), ("label_0",)),
    "hpd": (("prompt",), ("image_path", "file_path"), ("human_preference", "rank")),
    "records": (("prompt",), ("candidates",)),
    "realign": (("retrieved_image",), ("chosen",), ("rejected",)),
    "rlaifv": (("image",), ("question",), ("chosen",), ("rejected",)),
    "sharegpt": (("conversations",), ("chosen",), ("rejected",)),
    "povid": (("conversations",), ("rejected_conversations",)),
    "llava_rlhf": (("conversations",), ("output_1",), ("output_2",), ("preference",)),
    "swift": (("messages",), ("rejected_response", "rejected_messages", "rejected_images")),
    "trl": (("chosen",), ("rejected",)),
    "unpaired": (("prompt",), ("completion", "image"), ("label",)),
    "llava": (("conversations",),),
}


def detect_columns(file: Path) -> str:
    """The format of a table by the names of its columns.

    Raises:
        UserError: no rows, or columns of no known format; then the message names the closest one.
    """
    first: Any
    if file.suffix == ".parquet":
        with open_parquet(file) as table:
            first = dict.fromkeys(table.schema_arrow.names)
    else:
        first = next(rows_of(file), None)
    if first is None:
        raise UserError("the source holds no rows", place=str(file), fix="Give a source with data in it")
    if isinstance(first, Problem):
        raise first.error()
    if not isinstance(first, Mapping):
        raise UserError(f"expected rows that are objects, got {shown(first)}", place=f"{file} row 0")
    best, best_share = "", -1.0
    best_missing: tuple[str, ...] = ()
    for name, groups in COLUMNS.items():
        missing = [group for group in groups if not any(key in first for key in group)]
        if not missing:
            return name
        # A near miss in spelling counts half, so that 'captions' still points to Pick-a-Pic.
        close = sum("Did you mean" in nearest(group[0], map(str, first)) for group in missing)
        share = (len(groups) - len(missing) + 0.5 * close) / len(groups)
        if share > best_share:
            best, best_share, best_missing = name, share, missing[0]
    if best_share == 0:
        raise UserError(
            f"the columns {', '.join(map(str, first)) or '(none)'} are of no known format",
            place=str(file),
            fix=f"Rename them to those of one of {', '.join(COLUMNS)}",
        )
    raise _column_error(best_missing, first, str(file), best)


def convert_rows(path: Path, format: str, convert: Callable[[Row, str], Record]) -> Scan:
    """Rows of a table through `convert`, which gets the row and its name; faults as problems."""
    for name, row in _rows(path, format):
        if isinstance(row, Problem):
            yield row
            continue
        try:
            yield convert(row, name)
        except Fault as fault:
            yield Problem(row=name, field=fault.name, expected=fault.expected, got=fault.got)


def _rows(path: Path, format: str) -> Iterator[tuple[str, Row | Problem]]:
    """(row's name, row) of Parquet files, a JSON list or JSON lines, after a look at the columns."""
    found = False
    for file in table_files(path):
        for number, row in enumerate(rows_of(file)):
            found = True
            name = f"{file.name} row {number}"
            if isinstance(row, Problem):
                yield name, row
                continue
            if not isinstance(row, Mapping):
                yield name, Problem(row=name, field="row", expected="an object", got=shown(row))
                continue
            missing = [group for group in COLUMNS[format] if not any(key in row for key in group)]
            if missing and number == 0:
                raise _column_error(missing[0], row, str(file), format)
            if missing:
                got = f"only {', '.join(sorted(map(str, row)))}"
                yield name, Problem(row=name, field=missing[0][0], expected="the column", got=got)
                continue
            yield name, row
    if not found:
        raise UserError("the source holds no rows", place=str(path), fix="Give a source with data in it")


def _column_error(group: tuple[str, ...], row: Iterable[Any], place: str, format: str) -> UserError:
    names = [str(name) for name in row]
    wanted = " or ".join(f"'{name}'" for name in group)
    return UserError(
        f"there is no column {wanted}, which the format '{format}' needs",
        place=place,
        fix=nearest(group[0], names),
    )
