"""What a checkpoint says about itself: the size and SHA-256 of every file, and a seal on that list.

This finds what was cut short, changed or slipped in by accident or by a tool. It is no signature: whoever can
write the files can write a manifest that agrees with them, and so nothing here or after it unpickles.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT = 1
NAME = "manifest.json"
PICKLES = {
    ".bin",
    ".ckpt",
    ".joblib",
    ".npy",
    ".npz",
    ".pickle",
    ".pkl",
    ".pt",
    ".pth",
}  # .npy may hold objects
_MAX_BYTES = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The list, and what one wants to know before reading the rest."""

    step: int  # optimizer updates done
    method: str
    created: str  # UTC, ISO 8601
    summary: Mapping[str, Any]  # what must agree to resume or is good to know: rank, base model, ...
    files: Mapping[str, Mapping[str, Any]]  # relative POSIX path -> {"bytes": int, "sha256": hex}
    format: int = FORMAT


def seal(folder: Path, *, step: int, method: str, summary: Mapping[str, Any]) -> None:
    """Lists and hashes everything in a folder, writes the manifest, and flushes all of it to the disk.

    Raises:
        ValueError: there is a file that may hold a pickle.
    """
    files = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if path.suffix in PICKLES:
            raise ValueError(f"a checkpoint holds no pickles, but its writer made {name}")
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        flush(path)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    manifest = asdict(Manifest(step=step, method=method, created=created, summary=as_json(summary), files=files))
    manifest["sha256"] = _digest(manifest)
    (folder / NAME).write_text(json.dumps(manifest, indent=1), encoding="ascii")
    flush(folder / NAME)
    for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        flush(inner)
    flush(folder)


def read(folder: Path) -> Manifest:
    """The manifest itself, its own hash checked, the files not.

    Raises:
        ValueError: it is missing or damaged, in words for the user.
    """
    file = folder / NAME
    if not file.is_file():
        raise ValueError(f"no {NAME}: not a checkpoint, or one that was cut short")
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        data = json.loads(file.read_text(encoding="ascii"))
        digest, version = data.pop("sha256"), data["format"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{NAME} is damaged") from error
    if version != FORMAT:
        raise ValueError(f"checkpoint format {version}, but this mmalign reads format {FORMAT}")
    if digest != _digest(data):
        raise ValueError(f"{NAME} was changed: it does not agree with its own hash")
    try:
        manifest = Manifest(**data)
        well_formed = (
            isinstance(manifest.step, int)
            and isinstance(manifest.method, str)
            and isinstance(manifest.summary, dict)
            and all({"bytes", "sha256"} == set(said) for said in manifest.files.values())
        )
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{NAME} is damaged") from error
    if not well_formed:
        raise ValueError(f"{NAME} is damaged")
    return manifest


def problem(folder: Path, *, hashes: bool = True) -> str | None:
    """Why a checkpoint cannot be trusted, in words for the user; None if it can.

    Args:
        folder: the checkpoint.
        hashes: whether to read every file; otherwise names and sizes only.
    """
    if not folder.is_dir():
        return "no such checkpoint"
    try:
        listed = read(folder).files
        present = {path.relative_to(folder).as_posix() for path in _files(folder)}
        for name in sorted(present - set(listed)):
            kind = "a file that may hold a pickle" if PurePosixPath(name).suffix in PICKLES else "a file"
            return f"{name} is {kind} that was not written with the checkpoint; move it out"
        for name, said in listed.items():
            if name not in present or not (folder / name).is_file():
                return f"{name} is missing"
            size = (folder / name).stat().st_size
            if size != said["bytes"]:
                return f"{name} has {size} bytes of {said['bytes']}"
        for name, said in listed.items() if hashes else ():
            if _sha256(folder / name) != said["sha256"]:
                return f"{name} was changed: its hash differs"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def as_json(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary as it is read back: tuples are lists, keys are text."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(summary), allow_nan=False))
    return plain


def flush(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if not path.is_dir() and path != folder / NAME]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
