"""The preference store: a folder of Parquet shards that loses nothing and is never half written.

    store/
      store.json            version, counts, licences, sources, scorers, shards (the commit point)
      data-00000.parquet    one row per record; images inside as bytes, in a column of their own
      images/ab/abcd….png   instead of bytes inside, with embed_images=False

Reading streams row groups and leaves the image column alone: a record's `Media` are addresses that load on
demand. Any Parquet reader opens the shards (`datasets.load_dataset("parquet", data_files=...)` gives
pictures). Writing goes to a hidden sibling folder that is renamed when complete; rewriting adds new shards
and then replaces store.json, so a kill at any moment leaves the old store or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.errors import UserError, nearest
from mmalign.media import Cell, Media, path_fault
from mmalign.records import (
    LABELS,
    Candidate,
    Label,
    Preference,
    Problem,
    Record,
    Side,
    Vote,
    check_record,
    validate,
)

__all__ = [
    "Candidate",
    "Label",
    "Media",
    "Preference",
    "Problem",
    "Record",
    "Side",
    "Store",
    "Vote",
    "validate",
]

VERSION = 1
MANIFEST = "store.json"
_GROUP_BYTES = 4 * 2**20  # what one random image costs to read
_GROUP_ROWS = 512
_SHARD_BYTES = 512 * 2**20
_EXTENSIONS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}


def _schema() -> Any:
    indices = pa.list_(pa.int32())
    scores = pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))
    candidate = pa.struct(
        [
            ("candidate_id", pa.string()),
            ("image", pa.int32()),  # index into the row's images, as in media
            ("text", pa.string()),
            ("prompt", pa.string()),
            ("media", indices),
            ("model", pa.string()),
            ("seed", pa.int64()),
            ("scores", scores),
        ]
    )
    vote = pa.struct(
        [
            ("a", pa.string()),
            ("b", pa.string()),
            ("label", pa.string()),
            ("rater", pa.string()),
            ("confidence", pa.float64()),
            ("milliseconds", pa.int64()),
        ]
    )
    fields = [
        ("record_id", pa.string()),
        ("prompt", pa.string()),
        ("split", pa.string()),
        ("licence", pa.string()),
        ("source", pa.string()),
        ("context", pa.string()),  # JSON
        ("media", indices),
        ("candidates", pa.list_(candidate)),
        ("votes", pa.list_(vote)),
        ("image_sha256", pa.list_(pa.string())),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ]
    # Tells the `datasets` library that the column holds pictures; the list form is read by all its versions.
    pictures = {"info": {"features": {"images": [{"_type": "Image"}]}}}
    return pa.schema(fields, metadata={"huggingface": json.dumps(pictures)})


class Store:
    """A preference store on disk, opened by `Store.open` or made by `Store.write`.

    Attributes:
        path: the folder.
        info: the content of store.json.
    """

    def __init__(self, path: Path, info: Mapping[str, Any]) -> None:
        self.path, self.info = path, info

    def __len__(self) -> int:
        return int(self.info["records"])

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {len(self)} records)"

    @property
    def shards(self) -> list[Path]:
        """The Parquet files that belong to the store, in order."""
        return [self.path / shard["file"] for shard in self.info["shards"]]

    @property
    def splits(self) -> dict[str, int]:
        """Records by split."""
        return dict(self.info["splits"])

    @property
    def scorers(self) -> dict[str, str]:
        """Score name to `scorer_id@version`; "unknown" where the source did not say."""
        return dict(self.info["scorers"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every record in order, images by their hashes: equal content, equal fingerprint."""
        return str(self.info["fingerprint"])

    @staticmethod
    def open(path: str | Path) -> Store:
        """Open a store.

        Raises:
            UserError: no store there, another version, or a shard is missing or cut short.
        """
        path = Path(path)
        manifest = path / MANIFEST
        try:
            info = json.loads(manifest.read_text(encoding="utf-8"))
            version = info["version"]
            if version != VERSION:
                raise UserError(
                    f"the store has version {version}, this mmalign reads {VERSION}",
                    place=str(manifest),
                    fix="Import the source again",
                )
            for shard in info["shards"]:
                _check_shard(path, shard["file"], shard["bytes"])
            _ = {key: info[key] for key in ("records", "splits", "scorers", "fingerprint", "licences")}
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                "there is no preference store here",
                place=str(path),
                fix="Make one with `mmalign data import SOURCE --out STORE`",
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"store.json is damaged: {type(error).__name__} {error}",
                place=str(manifest),
                fix="Import the source again",
            ) from error
        return Store(path, info)

    def records(self, split: str | None = None) -> Iterator[Record]:
        """Stream the records in order, images left on disk.

        Args:
            split: only this split; None for all.

        Raises:
            UserError: no such split, or a shard is damaged.
        """
        if split is not None and split not in self.splits:
            raise UserError(f"the store has no split '{split}'", place=str(self.path), fix=nearest(split, self.splits))
        return self._stream(split)

    def _stream(self, split: str | None) -> Iterator[Record]:
        for shard, group in self.groups():
            for record in self.read_group(shard, group):
                if split is None or record.split == split:
                    yield record

    def groups(self) -> Iterator[tuple[Path, int]]:
        """(shard, row group) of all records, in order: pieces of a few MiB for whoever shares out work."""
        for shard in self.shards:
            with open_parquet(shard) as file:
                _check_columns(shard, file)
                count = file.metadata.num_row_groups
            for group in range(count):
                yield shard, group

    def read_group(self, shard: Path, group: int) -> Iterator[Record]:
        """The records of one row group."""
        names = [name for name in _schema().names if name != "images"]
        with open_parquet(shard) as file, damage(shard):
            row = sum(file.metadata.row_group(before).num_rows for before in range(group))
            rows = file.read_row_group(group, columns=names).to_pylist()
        for offset, values in enumerate(rows):
            yield _record(values, str(shard), row + offset, group, offset)

    @staticmethod
    def write(
        records: Iterable[Record],
        path: str | Path,
        *,
        shard_rows: int = 10_000,
        embed_images: bool = True,
        scorers: Mapping[str, str] | None = None,
    ) -> Store:
        """Write a store; it appears under `path` only when it is complete.

        Args:
            records: streamed; each is checked, images are read but not decoded.
            path: must not exist yet, or be an empty folder.
            shard_rows: records per Parquet file at most (a file also ends at 512 MiB of images).
            embed_images: images inside the shards; else as files named by their hash below `images/`.
            scorers: score name to `scorer_id@version`, for scores that the records carry already.

        Raises:
            UserError: `path` is taken, a record is wrong, an id comes twice, there are no records, or the
                disk is full. Nothing is left under `path`.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError("something is here already", place=str(path), fix="Choose another name or delete it first")
        partial = path.parent / f".{path.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
            partial.mkdir(parents=True)
            writer = _Writer(partial, "data", shard_rows, embed_images)
            for record in records:
                writer.add(record)
            _save(partial / MANIFEST, writer.finish(scorers or {}))
            _sync(partial)
            os.rename(partial, path)
            _sync(path.parent)
        except OSError as error:
            raise _disk_error(path, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Store.open(path)

    def rewrite(self, transform: Callable[[Record], Record], *, scorers: Mapping[str, str] | None = None) -> Store:
        """Replace every record by `transform(record)`: add scores or votes, correct a split, ...

        Written beside the old shards and committed by replacing store.json. Costs one copy of the images.

        Args:
            scorers: added to (or replacing, by name) the known ones.

        Returns:
            The new store; this object's shards are gone.
        """
        revision = int(self.info.get("revision", 0)) + 1
        rows = max(int(self.info.get("shard_rows", 10_000)), 1)
        writer = _Writer(self.path, f"data-r{revision}", rows, bool(self.info.get("embedded", True)))
        try:
            for record in self.records():
                writer.add(transform(record))
            info = writer.finish({**self.scorers, **(scorers or {})})
            _save(self.path / MANIFEST, {**info, "revision": revision})
            _sync(self.path)
        except OSError as error:
            writer.discard()
            raise _disk_error(self.path, error) from error
        except BaseException:
            writer.discard()
            raise
        store = Store.open(self.path)
        for stale in set(self.path.glob("data-*.parquet")) - set(store.shards):
            stale.unlink()
        return store

    def add_scores(self, name: str, score: Callable[[Record], Mapping[str, float]], *, scorer: str) -> Store:
        """Score every record's candidates and keep who did it.

        Args:
            name: the score's name in the candidates.
            score: record to {candidate_id: value}; candidates it leaves out stay without the score.
            scorer: `scorer_id@version`.

        Raises:
            UserError: another scorer has filled this name already, or a value is not finite.
        """
        owner = self.scorers.get(name, scorer)
        if owner != scorer:
            raise UserError(
                f"score '{name}' was given by {owner}, not by {scorer}",
                place=str(self.path),
                fix="Use another score name, so that the old one stays comparable",
            )

        def scored(record: Record) -> Record:
            values = score(record)
            unknown = set(values) - {candidate.candidate_id for candidate in record.candidates}
            if unknown:
                raise ValueError(f"scorer {scorer} scored unknown candidates {sorted(unknown)}")
            candidates = tuple(
                replace(candidate, scores={**candidate.scores, name: float(values[candidate.candidate_id])})
                if candidate.candidate_id in values
                else candidate
                for candidate in record.candidates
            )
            return replace(record, candidates=candidates)

        return self.rewrite(scored, scorers={name: scorer})


class _Writer:
    """Rows in, complete shards and their manifest out. One Parquet row group per flush."""

    def __init__(self, folder: Path, stem: str, shard_rows: int, embed: bool) -> None:
        if shard_rows < 1:
            raise ValueError("shard_rows must be at least 1")
        self.folder, self.stem, self.shard_rows, self.embed = folder, stem, shard_rows, embed
        self.rows: list[dict[str, Any]] = []
        self.row_bytes = 0
        self.file: Any = None
        self.file_rows = self.file_bytes = 0
        self.shards: list[dict[str, Any]] = []
        self.seen: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()
        self.licences: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.scores: set[str] = set()
        self.hash = hashlib.sha256()

    def add(self, record: Record) -> None:
        for problem in check_record(record):
            raise problem.error()
        if record.record_id in self.seen:
            raise Problem(
                row=record.where,
                field="record_id",
                expected="an id used once",
                got=f"'{record.record_id}', already at {self.seen[record.record_id]}",
            ).error()
        self.seen[record.record_id] = record.where
        row = self._row(record)
        self.rows.append(row)
        self.row_bytes += sum(len(image["bytes"] or b"") for image in row["images"])
        self.counts.update(
            records=1, candidates=len(record.candidates), votes=len(record.votes), images=len(row["images"])
        )
        self.splits[record.split] += 1
        self.licences[record.licence or "unknown"] += 1
        self.sources[record.source or "unknown"] += 1
        self.scores.update(name for candidate in record.candidates for name in candidate.scores)
        full = self.file_rows + len(self.rows) >= self.shard_rows
        if full or self.row_bytes >= _GROUP_BYTES or len(self.rows) >= _GROUP_ROWS:
            self._flush()
            if full or self.file_bytes >= _SHARD_BYTES:
                self._close()

    def _row(self, record: Record) -> dict[str, Any]:
        images: list[dict[str, Any]] = []
        digests: list[str] = []

        def keep(media: Media | None) -> int | None:
            if media is None:
                return None
            data = media.read()
            digest = hashlib.sha256(data).hexdigest()
            if digest not in digests:
                digests.append(digest)
                images.append(self._image(data, digest))
            return digests.index(digest)

        candidates = [
            {
                "candidate_id": candidate.candidate_id,
                "image": keep(candidate.image),
                "text": candidate.text,
                "prompt": candidate.prompt,
                "media": None if candidate.media is None else [keep(media) for media in candidate.media],
                "model": candidate.model,
                "seed": candidate.seed,
                "scores": [{"name": name, "value": value} for name, value in candidate.scores.items()],
            }
            for candidate in record.candidates
        ]
        votes = [
            {key: getattr(vote, key) for key in ("a", "b", "label", "rater", "confidence", "milliseconds")}
            for vote in record.votes
        ]
        row = {
            "record_id": record.record_id,
            "prompt": record.prompt,
            "split": record.split,
            "licence": record.licence,
            "source": record.source,
            "context": json.dumps(dict(record.context), sort_keys=True, ensure_ascii=False),
            "media": [keep(media) for media in record.media],
            "candidates": candidates,
            "votes": votes,
            "image_sha256": digests,
        }
        self.hash.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        return {**row, "images": images}

    def _image(self, data: bytes, digest: str) -> dict[str, Any]:
        known = (kind for magic, kind in _EXTENSIONS.items() if data.startswith(magic))
        name = f"{digest}.{next(known, 'img')}"
        if self.embed:
            return {"bytes": data, "path": name}
        relative = f"images/{digest[:2]}/{name}"
        target = self.folder / relative
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".partial")
            partial.write_bytes(data)
            os.replace(partial, target)
        return {"bytes": None, "path": relative}

    def _flush(self) -> None:
        if not self.rows:
            return
        if self.file is None:
            file = f"{self.stem}-{len(self.shards):05d}.parquet"
            self.shards.append({"file": file, "rows": 0, "bytes": 0})
            self.file = pq.ParquetWriter(
                str(self.folder / file),
                _schema(),
                compression="snappy",
                use_dictionary=["split", "licence", "source"],
                write_statistics=["record_id", "split"],  # statistics of image bytes would be image bytes
                write_page_checksum=True,
            )
        self.file.write_table(pa.Table.from_pylist(self.rows, schema=_schema()), row_group_size=len(self.rows))
        self.file_rows += len(self.rows)
        self.file_bytes += self.row_bytes
        self.rows, self.row_bytes = [], 0

    def _close(self) -> None:
        if self.file is None:
            return
        self.file.close()
        shard = self.folder / self.shards[-1]["file"]
        _sync(shard)
        self.shards[-1].update(rows=self.file_rows, bytes=shard.stat().st_size)
        self.file, self.file_rows, self.file_bytes = None, 0, 0

    def finish(self, scorers: Mapping[str, str]) -> dict[str, Any]:
        self._flush()
        self._close()
        if not self.shards:
            raise UserError("there are no records to write", fix="Check that the source holds some")
        return {
            "version": VERSION,
            "revision": 0,
            **self.counts,
            "splits": dict(self.splits),
            "licences": dict(self.licences),
            "sources": dict(self.sources),
            "scorers": {name: scorers.get(name, "unknown") for name in sorted(self.scores)},
            "embedded": self.embed,
            "shard_rows": self.shard_rows,
            "fingerprint": self.hash.hexdigest(),
            "shards": self.shards,
        }

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which is what just failed on a full disk
            if self.file is not None:
                self.file.close()
        for shard in self.shards:
            (self.folder / shard["file"]).unlink(missing_ok=True)


def _record(row: dict[str, Any], shard: str, number: int, group: int, offset: int) -> Record:
    def media(index: int | None) -> Media | None:
        if index is None:
            return None
        cell = Cell(shard=shard, row=number, group=group, offset=offset, index=index)
        return Media(cell=cell, digest=row["image_sha256"][index])

    def several(indices: Iterable[int] | None) -> tuple[Media, ...]:
        return tuple(item for item in map(media, indices or ()) if item is not None)

    place = f"{Path(shard).name} row {number}"
    try:
        for name in ("record_id", "prompt", "split"):
            if row[name] is None:
                raise ValueError(f"{name} is null")
        for vote in row["votes"] or ():
            if vote["label"] not in LABELS:
                raise ValueError(f"a vote says {vote['label']!r}")
        return Record(
            record_id=row["record_id"],
            prompt=row["prompt"],
            media=several(row["media"]),
            candidates=tuple(
                Candidate(
                    candidate_id=item["candidate_id"],
                    image=media(item["image"]),
                    text=item["text"],
                    scores={score["name"]: score["value"] for score in item["scores"] or ()},
                    model=item["model"],
                    seed=item["seed"],
                    prompt=item["prompt"],
                    media=None if item["media"] is None else several(item["media"]),
                )
                for item in row["candidates"] or ()
            ),
            votes=tuple(Vote(**vote) for vote in row["votes"] or ()),
            split=row["split"],
            licence=row["licence"],
            source=row["source"],
            context=json.loads(row["context"] or "{}"),
            place=place,
        )
    except (IndexError, TypeError, ValueError) as error:
        raise UserError(f"the row is not a record: {error}", place=place, fix="Import the source again") from error


def _check_shard(folder: Path, name: str, size: int) -> None:
    fault = path_fault(folder, name)
    if fault:
        raise UserError(
            f"expected a shard in the store's folder, got {fault}",
            place=str(folder / MANIFEST),
            fix="Copy the store again as a whole or import the source again",
        )
    actual = (folder / name).stat().st_size
    if actual != size:
        raise UserError(
            f"the shard has {actual} bytes instead of {size}: it was cut short or changed",
            place=str(folder / name),
            fix="Copy the store again or import the source again",
        )


def open_parquet(path: Path) -> Any:
    """A ParquetFile, page checksums verified; a damaged file is a UserError."""
    with damage(path):
        return pq.ParquetFile(str(path), page_checksum_verification=True)


@contextlib.contextmanager
def damage(path: Path) -> Iterator[None]:
    """pyarrow's errors about a file, as one line about that file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise UserError(
            f"the Parquet file is damaged: {reason}",
            place=str(path),
            fix="Copy it again or import the source again",
        ) from error


def _check_columns(shard: Path, file: Any) -> None:
    names = list(file.schema_arrow.names)
    for name in _schema().names:
        if name not in names:
            raise UserError(f"the shard has no column '{name}'", place=str(shard), fix=nearest(name, names))


def _save(path: Path, info: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(info, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_error(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write the store: {error.strerror or error}",
        place=str(path),
        fix="Free some space or choose another place; what was there before is untouched",
    )
