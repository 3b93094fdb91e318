"""What the importers share: their options, what every row may say about itself, and where its pictures are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mmalign.errors import UserError
from mmalign.media import Media
from mmalign.records import Problem, Record, shown
from mmalign.sources import Fault, Row, images_of, maybe_text

Scan: TypeAlias = Iterator[Record | Problem]

DESIRABLE = "desirable"  # the score that a label of a single answer becomes


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What the source does not say itself.

    Args:
        root: folder that image paths are relative to; by default the source's own.
        prompt: for pictures that come without one.
        split: put every record there; by default what the record or a Pick-a-Pic file name says, or "train".
        licence: for records that name none.
        group_regex: searched in the record id; its first group (or the match) becomes `context["group"]`,
            which keeps crops of one photograph in one split.
    """

    root: str | None = None
    prompt: str | None = None
    split: str | None = None
    licence: str | None = None
    group_regex: str | None = None


def root_of(path: Path, options: ImportOptions) -> Path:
    """The folder that image paths are relative to and may not leave."""
    root = Path(options.root) if options.root else path if path.is_dir() else path.parent
    if not root.is_dir():
        raise UserError("the image folder does not exist", place=str(root))
    return root


def row_id(name: str) -> str:
    """A record id from a row's name, `file.json row 3` -> `file.json-3`: where rows have no ids, or repeated ones."""
    return name.replace(" row ", "-")


def id_of(row: Row, name: str) -> str:
    """The column `id`, else by the row's name."""
    return row_id(name) if row.get("id") is None else str(row["id"])


def provenance_of(row: Row, source: str) -> dict[str, Any]:
    """split, licence and source of a record, as far as its row names them."""
    return {
        "split": maybe_text(row, "split") or "train",
        "licence": maybe_text(row, "licence") or maybe_text(row, "license"),
        "source": maybe_text(row, "source") or source,
    }


def inputs_of(root: Path, row: Row, name: str) -> tuple[Media, ...]:
    """The pictures that belong to a row's prompt: its column `images` or `image`, a list or a single one."""
    field = "images" if row.get("images") is not None else "image"
    return images_of(root, row.get(field), field, name)


def with_group(context: dict[str, Any], media: tuple[Media, ...]) -> dict[str, Any]:
    """`context` with the first picture's path as the group, unless it has one: questions about one photograph belong in
    one split."""
    path = media[0].path if media else None
    return context if path is None else {"group": path, **context}


def desirable(row: Row) -> dict[str, float]:
    """The score that the column `label`, true or false, stands for."""
    label = row.get("label")
    if label not in (0, 1):  # True and False are
        raise Fault("label", "true or false", shown(label))
    return {DESIRABLE: float(label)}
