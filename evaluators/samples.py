"""Pictures with prompts from where they lie, cut into shards: the unit of work and of resume.

    store          a preference store: its candidates that are pictures; a shard is a row group
    .jsonl         rows with an image's path and a prompt (also the index.jsonl of `mmalign sample`)
    .parquet       a file or a folder of them, with a picture column and a prompt column; a shard is a row group
    .tar           a file or a folder of them, as WebDataset has them: KEY.png beside KEY.txt or KEY.json
    folder         pictures with NAME.txt beside, or with metadata.jsonl or index.jsonl

Shards are found the same way by every process and at every start. Nothing is decoded here, and a sample holds the
address of its picture, not the picture.
"""

from __future__ import annotations

import functools
import os
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluators.scorefile import digest
from mmalign.errors import UserError
from mmalign.media import Media, path_fault
from mmalign.preferences import MANIFEST, Store, damage, open_parquet
from mmalign.sources import files_below, is_image, parse_json, read_text, table_files

PROMPTS = ("prompt", "caption", "text")
IMAGES = ("image", "file", "file_name", "image_path", "path", "jpg", "png")
INDEXES = ("index.jsonl", "metadata.jsonl")
ROWS = 1000  # of a shard, where the source has no shards of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A picture and the prompt it was drawn from, or why there is none.

    Attributes:
        id: unique in the source.
        record, candidate: of a store; None elsewhere.
        error: what is wrong with the row; there is then no media.
    """

    id: str
    prompt: str
    media: Media | None = None
    seed: int | None = None
    record: str | None = None
    candidate: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Samples that are worked on together.

    Attributes:
        name: for messages.
        read: gives the samples, the same ones in the same order every time.
        size: how many; None where that is not known beforehand.
    """

    name: str
    read: Callable[[], Iterator[Sample]]
    size: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """All shards.

    Attributes:
        fingerprint: of names and sizes: another one is another source.
        about: what the source itself says of model and protocol, where it does.
        store: the preference store that it is; None for others.
    """

    path: Path
    shards: list[Shard]
    fingerprint: str
    about: Mapping[str, Any]
    store: Store | None = None


def find(path: Path, rows: int = ROWS) -> Source:
    """The shards of a source.

    Args:
        rows: of a shard, where the source has no shards of its own.

    Raises:
        UserError: nothing there, or nothing that has pictures.
    """
    if not path.exists():
        raise UserError("there is nothing here", place=str(path))
    if (path / MANIFEST).is_file():
        store = Store.open(path)
        shards = [_store_shard(store, shard, group) for shard, group in store.groups()]
        return Source(path=path, shards=shards, fingerprint=store.fingerprint[:16], about={}, store=store)
    if path.is_file():
        if path.suffix == ".jsonl":
            return _from_index(path, path.parent, rows)
        found = {".parquet": _parquet_shards, ".tar": _tar_shards}.get(path.suffix)
        if found is None:
            raise UserError(
                f"cannot take pictures from a '{path.suffix}' file",
                place=str(path),
                fix="Known: a preference store, .jsonl, .parquet, an uncompressed .tar, a folder.",
            )
        return _source(path, found(path), [path])
    for name in INDEXES:
        if (path / name).is_file():
            return replace(_from_index(path / name, path, rows), path=path)
    names = files_below(path)
    tars = [path / name for name in names if name.endswith(".tar")]
    if tars:
        return _source(path, [shard for tar in tars for shard in _tar_shards(tar)], tars)
    if any(name.endswith(".parquet") for name in names):
        tables = table_files(path)
        return _source(path, [shard for table in tables for shard in _parquet_shards(table)], tables)
    return _from_folder(path, names, rows)


def _source(path: Path, shards: list[Shard], files: Sequence[Path]) -> Source:
    if not shards:
        raise UserError("there are no pictures here", place=str(path))
    sizes = [[file.name, file.stat().st_size] for file in files]
    return Source(path=path, shards=shards, fingerprint=digest([sizes, len(shards)]), about={})


# ---------------------------------------------------------------------------------------------------- a store


def _store_shard(store: Store, shard: Path, group: int) -> Shard:
    def read() -> Iterator[Sample]:
        for record in store.read_group(shard, group):
            for candidate in record.candidates:
                if candidate.image is not None:
                    yield Sample(
                        id=f"{record.record_id}/{candidate.candidate_id}",
                        prompt=record.prompt if candidate.prompt is None else candidate.prompt,
                        media=candidate.image,
                        seed=candidate.seed,
                        record=record.record_id,
                        candidate=candidate.candidate_id,
                    )

    return Shard(name=f"{shard.name} group {group}", read=read, size=None)


# ------------------------------------------------------------------------------------------------ JSON lines


def _from_index(file: Path, root: Path, rows: int) -> Source:
    """Shards of so many lines; only where they begin is kept."""
    starts: list[tuple[int, int]] = []  # (byte, line number)
    count = 0
    about: dict[str, Any] = {}
    with open(file, "rb") as lines:
        offset = 0
        for number, line in enumerate(lines, start=1):
            if line.strip():
                if count == 0:
                    about = _about(line)
                if count % rows == 0:
                    starts.append((offset, number))
                count += 1
            offset += len(line)
    if not starts:
        raise UserError("the file has no rows", place=str(file))

    def shard(index: int) -> Shard:
        begin, first = starts[index]
        size = min(rows, count - index * rows)
        read = functools.partial(_read_lines, file, root, begin, first, index * rows, size)
        return Shard(name=f"{file.name} line {first}", read=read, size=size)

    fingerprint = digest([file.name, file.stat().st_size, count, rows])
    return Source(path=file, shards=[shard(i) for i in range(len(starts))], fingerprint=fingerprint, about=about)


def _about(line: bytes) -> dict[str, Any]:
    """Model and sampler, from a row of `mmalign sample`'s index."""
    try:
        row = parse_json(line, "")
    except UserError:
        return {}  # reading the row says what is wrong with it
    if not isinstance(row, Mapping) or not {"model", "steps", "guidance_scale"} <= set(row):
        return {}
    sampled = {"sampler": "mmalign sample", "steps": row["steps"], "guidance_scale": row["guidance_scale"]}
    return {"model": str(row["model"]), "protocol": sampled}


def _read_lines(file: Path, root: Path, begin: int, first: int, index: int, size: int) -> Iterator[Sample]:
    with open(file, "rb") as lines:
        lines.seek(begin)
        number, done = first - 1, 0
        for line in lines:
            number += 1
            if not line.strip():
                continue
            yield _row_sample(line, f"{file.name} line {number}", f"{index + done:06d}", root)
            done += 1
            if done == size:
                return


def _row_sample(line: bytes, place: str, name: str, root: Path) -> Sample:
    try:
        row = parse_json(line, place)
    except UserError as error:
        return Sample(id=name, prompt="", error=str(error))
    if not isinstance(row, Mapping):
        return Sample(id=name, prompt="", error=f"{place}: expected an object")
    given = row.get("id")
    name = str(given) if isinstance(given, str | int) and not isinstance(given, bool) else name
    prompt = _first(row, PROMPTS)
    image = _first(row, IMAGES)
    if not isinstance(prompt, str):
        return Sample(id=name, prompt="", error=f"{place}: a row needs a text field {' or '.join(PROMPTS)}")
    if not isinstance(image, str):
        return Sample(id=name, prompt=prompt, error=f"{place}: a row without an image")
    fault = path_fault(root, image)
    if fault:
        return Sample(id=name, prompt=prompt, error=f"{place}: expected a file inside the data folder, got {fault}")
    return Sample(
        id=name, prompt=prompt, media=Media(path=image, root=str(root), place=image), seed=_seed(row.get("seed"))
    )


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _seed(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# ---------------------------------------------------------------------------------------------------- Parquet


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetField:
    """One picture in a column of somebody's Parquet file: bytes, a path, or {bytes, path}."""

    shard: str
    row: int
    group: int
    offset: int
    column: str

    def load(self) -> tuple[bytes | None, str | None]:
        with _LOCK:  # of threads that decode, one reads the row group and the others find it read
            values = _column(self.shard, self.group, self.column, os.stat(self.shard).st_mtime_ns)
        value = values[self.offset].as_py()
        if isinstance(value, Mapping):
            return value.get("bytes"), value.get("path")
        return (value, None) if isinstance(value, bytes) else (None, value)


_LOCK = threading.Lock()


@functools.lru_cache(maxsize=2)
def _column(path: str, group: int, column: str, version: int) -> Any:
    with open_parquet(Path(path)) as table, damage(Path(path)):
        return table.read_row_group(group, columns=[column]).column(column).combine_chunks()


def _parquet_shards(path: Path) -> list[Shard]:
    with open_parquet(path) as table:
        names = set(table.schema_arrow.names)
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups)]
    image, prompt = (next((name for name in wanted if name in names), None) for wanted in (IMAGES, PROMPTS))
    if image is None or prompt is None:
        wanted = IMAGES if image is None else PROMPTS
        raise UserError(f"no column {' or '.join(wanted)}", place=str(path), fix=f"It has {', '.join(sorted(names))}.")
    columns = [prompt, *(name for name in ("id", "seed") if name in names)]

    def read(group: int) -> Iterator[Sample]:
        with open_parquet(path) as table, damage(path):
            rows = table.read_row_group(group, columns=columns).to_pylist()
        first = sum(sizes[:group])
        for offset, row in enumerate(rows):
            name = str(row["id"]) if row.get("id") is not None else f"{path.stem}:{first + offset}"
            if not isinstance(row[prompt], str):
                yield Sample(id=name, prompt="", error=f"{path.name} row {first + offset}: no {prompt}")
                continue
            field = ParquetField(shard=str(path), row=first + offset, group=group, offset=offset, column=image)
            yield Sample(id=name, prompt=row[prompt], media=Media(cell=field), seed=_seed(row.get("seed")))

    return [
        Shard(name=f"{path.name} group {group}", read=functools.partial(read, group), size=size)
        for group, size in enumerate(sizes)
        if size
    ]


# -------------------------------------------------------------------------------------------------------- tar


@dataclass(frozen=True, slots=True, kw_only=True)
class TarMember:
    """One file in an uncompressed tar, read where it lies."""

    shard: str
    row: int
    offset: int
    size: int

    def load(self) -> tuple[bytes | None, str | None]:
        try:
            with open(self.shard, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size), None
        except OSError as error:
            raise UserError(f"cannot read from the tar: {error.strerror}", place=self.shard) from error


def _tar_shards(path: Path) -> list[Shard]:
    return [Shard(name=path.name, read=functools.partial(_read_tar, path), size=None)]


def _read_tar(path: Path) -> Iterator[Sample]:
    """Samples of neighbouring members with the same name up to the first dot of its last part."""
    try:
        with tarfile.open(path, "r:") as tar:  # ":" refuses compression, in which nothing could be found again
            key, row = "", 0
            parts: dict[str, tarfile.TarInfo] = {}
            for member in tar:
                if not member.isreg():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                own = f"{folder}/{stem}" if folder else stem
                if own != key:
                    if parts:
                        yield _tar_sample(path, tar, key, row, parts)
                        row += 1
                    key, parts = own, {}
                parts[suffix.lower()] = member
            if parts:
                yield _tar_sample(path, tar, key, row, parts)
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"the tar is damaged or compressed: {error}", place=str(path), fix="Copy it again, or uncompress it."
        ) from error


def _tar_sample(path: Path, tar: tarfile.TarFile, key: str, row: int, parts: Mapping[str, tarfile.TarInfo]) -> Sample:
    name = f"{path.stem}/{key}"

    def content(suffix: str) -> bytes:
        file = tar.extractfile(parts[suffix])
        return b"" if file is None else file.read()

    try:
        row_of: Mapping[str, Any] = {}
        if "json" in parts:
            value = parse_json(content("json"), f"{path.name} {key}.json")
            row_of = value if isinstance(value, Mapping) else {}
        prompt = content("txt").decode("utf-8").strip() if "txt" in parts else _first(row_of, PROMPTS)
    except (UserError, UnicodeDecodeError) as error:
        return Sample(id=name, prompt="", error=str(error))
    image = next((suffix for suffix in parts if is_image(f"x.{suffix}")), None)
    if not isinstance(prompt, str):
        return Sample(id=name, prompt="", error=f"{path.name} {key}: neither .txt nor .json has a prompt")
    if image is None:
        return Sample(id=name, prompt=prompt, error=f"{path.name} {key}: no picture")
    member = parts[image]
    address = TarMember(shard=str(path), row=row, offset=member.offset_data, size=member.size)
    return Sample(id=name, prompt=prompt, media=Media(cell=address), seed=_seed(row_of.get("seed")))


# --------------------------------------------------------------------------------------------------- a folder


def _from_folder(path: Path, names: Sequence[str], rows: int) -> Source:
    pictures = [name for name in names if is_image(name)]
    if not pictures:
        raise UserError("there are no pictures here", place=str(path))
    captions = {name for name in names if name.endswith(".txt")}

    def sample(name: str) -> Sample:
        caption = f"{os.path.splitext(name)[0]}.txt"
        if caption not in captions:
            return Sample(id=name, prompt="", error=f"{name}: no caption {caption} beside it")
        fault = path_fault(path, name) or path_fault(path, caption)
        if fault:
            return Sample(id=name, prompt="", error=f"expected a file inside the data folder, got {fault}")
        try:
            prompt = read_text(path / caption).strip()
        except (UserError, OSError) as error:
            return Sample(id=name, prompt="", error=str(error))
        return Sample(id=name, prompt=prompt, media=Media(path=name, root=str(path)))

    def read(start: int) -> Iterator[Sample]:
        yield from map(sample, pictures[start : start + rows])

    shards = [
        Shard(name=pictures[start], read=functools.partial(read, start), size=min(rows, len(pictures) - start))
        for start in range(0, len(pictures), rows)
    ]
    return Source(path=path, shards=shards, fingerprint=digest([pictures, rows]), about={})
