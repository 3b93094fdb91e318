"""Small files in published layouts, and what an importer says of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign.errors import UserError
from mmalign.importers import ImportOptions, read, scan
from mmalign.records import Record, validate


def png(shade: int) -> bytes:
    """A 6 x 4 picture of one red."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def problems(path: Path, format: str = "auto", **options: str) -> list[str]:
    """What `mmalign data check` would print."""
    return [str(item) for item in validate(scan(path, format, ImportOptions(**options)))]


def refusal(path: Path, format: str = "auto", **options: str) -> str:
    """The one line that reading the source ends with."""
    with pytest.raises(UserError) as error:
        list(read(path, format, ImportOptions(**options)))
    return str(error.value)


def labels(record: Record) -> list[tuple[str, str, str]]:
    """(a, b, label) of every vote."""
    return [(vote.a, vote.b, vote.label) for vote in record.votes]


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as Parquet."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def pictures(folder: Path, *names: str) -> None:
    """Pictures in these files, number i of red i."""
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(shade))


def write_json(path: Path, value: object) -> Path:
    """A value as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def jsonl(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turn(role: str, content: object) -> dict[str, object]:
    """A chat message."""
    return {"role": role, "content": content}
