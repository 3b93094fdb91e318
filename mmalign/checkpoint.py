"""Checkpoints: atomic, hashed, free of pickle, and exact.

    run/
      checkpoint-00000100/
        manifest.json        format, step, method, summary, and size and SHA-256 of every other file
        state.json           everything that is not a tensor (`mmalign.statetree`)
        state.safetensors    every tensor of the state, by its place in the tree
        model/ ...           whatever the caller's writers put there: the peft or diffusers layout

A checkpoint is written to a hidden folder beside its place, flushed to the disk file by file, and renamed:
under its own name there is a whole checkpoint or none. It is read only if every size and hash agrees and no
file was added. In a run of several processes the first alone calls `save`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from mmalign import manifest, statetree
from mmalign.errors import UserError
from mmalign.manifest import Manifest

STATE, TENSORS = "state.json", "state.safetensors"

_NAME = re.compile(r"checkpoint-(\d{8,})")
_HIDDEN = re.compile(r"\.(checkpoint-\d{8,})\.(tmp|old)-(\d+)")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCheckpoint:
    """A verified checkpoint with its state in memory, tensors on the CPU."""

    step: int
    state: Any
    path: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The newest good checkpoint of a folder, and a line for each newer one that is not good."""

    path: Path | None
    warnings: list[str] = field(default_factory=list)


# ----------------------------------------------------------------------------------------------------
# Writing


def save(
    directory: Path,
    step: int,
    state: Mapping[str, Any],
    *,
    keep: int,
    method: str,
    summary: Mapping[str, Any] | None = None,
    writers: Mapping[str, Callable[[Path], None]] | None = None,
) -> Path:
    """Writes `directory/checkpoint-<step>` and removes all but the newest `keep` good ones.

    Args:
        directory: folder of the run; made if need be.
        step: optimizer updates done.
        state: a tree as `mmalign.statetree` takes it.
        keep: how many good checkpoints stay, this one included; at least 1.
        method: name of the method; only a run of the same method resumes from it.
        summary: JSON values for the manifest, such as rank and base model.
        writers: for each name, a function that fills the folder of that name: `{"model": save_pretrained}`.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the disk is full, or the folder cannot be written. What was there before is untouched.
        TypeError: the state holds something else than plain values and tensors.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"keep must be at least 1 and step at least 0, got keep={keep}, step={step}")
    final = directory / f"checkpoint-{step:08d}"
    temporary = directory / f".{final.name}.tmp-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _recover(directory)
        _write(temporary, step, state, method, dict(summary or {}), writers or {})
        _put(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_full_disk(error):
            raise UserError(
                f"disk full while saving {final.name}; {_intact(directory)}",
                place=str(directory),
                fix="Free some space, or point loop.output_dir elsewhere, and run the same command to go on.",
            ) from error
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            raise UserError(
                f"cannot save {final.name}: {error.strerror}", place=str(error.filename or directory)
            ) from error
        raise
    _prune(directory, keep, trusted=final)
    return final


def _write(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    method: str,
    summary: dict[str, Any],
    writers: Mapping[str, Callable[[Path], None]],
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    values, tensors = statetree.encode(state)
    safetensors.torch.save_file(tensors, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(values, allow_nan=False), encoding="ascii")
    for name, write in writers.items():
        (folder / name).mkdir()
        write(folder / name)
    manifest.seal(folder, step=step, method=method, summary=summary)


def _put(temporary: Path, final: Path) -> None:
    """Renames; a checkpoint of the same step makes way, and comes back (`_recover`) should we die between."""
    old = temporary.with_name(temporary.name.replace(".tmp-", ".old-"))
    if final.exists():
        final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    manifest.flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _recover(directory: Path) -> None:
    """Clears what processes that are gone left half done."""
    for path in directory.glob(".checkpoint-*"):
        match = _HIDDEN.fullmatch(path.name)
        if match is None or _is_alive(int(match[3])):
            continue
        if match[2] == "old" and not (directory / match[1]).exists():
            with contextlib.suppress(FileNotFoundError, PermissionError):  # another rank was faster; read-only
                path.rename(directory / match[1])
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():  # from an earlier life of this number: whoever asks is not saving
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_full_disk(error: BaseException) -> bool:
    """Also for a library that wraps the operating system's error in its own."""
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return True
    if re.search(rf"os error ({'|'.join(map(str, _FULL_DISK))})\b", str(error)):
        return True
    below = error.__cause__ or error.__context__
    return below is not None and _is_full_disk(below)


def _intact(directory: Path) -> str:
    previous = latest(directory).path
    return f"the previous checkpoint {previous.name} is intact" if previous else "there was none before"


# ----------------------------------------------------------------------------------------------------
# Reading


def load(path: Path, *, expect_method: str | None = None, expect: Mapping[str, Any] | None = None) -> LoadedCheckpoint:
    """Verifies and reads a checkpoint.

    Args:
        path: its folder.
        expect_method: the method of this run.
        expect: entries of the summary that must agree with this run's, such as `{"rank": 8}`.

    Raises:
        UserError: it is not there, truncated, tampered with, or of another method or summary.
    """
    problem = manifest.problem(path)
    if problem is not None:
        raise UserError(problem, place=str(path), fix=_way_out(path))
    said = manifest.read(path)
    if expect_method is not None and said.method != expect_method:
        raise UserError(
            f"a checkpoint of method '{said.method}', but this run is '{expect_method}'",
            place=str(path),
            fix="Give another loop.output_dir, or start from its weights with loop.init_from.",
        )
    for key, value in manifest.as_json(expect or {}).items():
        if said.summary.get(key) != value:
            raise UserError(
                f"the checkpoint has {key} {said.summary.get(key)}, but this run has {key} {value}",
                place=str(path),
                fix=f"Set {key} as it was, or give another loop.output_dir.",
            )
    try:
        values = json.loads((path / STATE).read_text(encoding="ascii"))
        state = statetree.decode(values, _tensors(path / TENSORS))
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise UserError(f"the state is malformed: {error}", place=str(path), fix=_way_out(path)) from error
    return LoadedCheckpoint(step=said.step, state=state, path=path, manifest=said)


def latest(directory: Path) -> Found:
    """The newest checkpoint of a run that verifies, with a warning for each newer one that does not."""
    warnings: list[str] = []
    for path in _checkpoints(directory):
        problem = manifest.problem(path)
        if problem is None:
            return Found(path=path, warnings=warnings)
        warnings.append(f"skipped {path.name}: {problem}")
    return Found(path=None, warnings=warnings)


def choose(resume: str, directory: Path) -> Found:
    """What `loop.resume` stands for: "auto", "none", or the path of a checkpoint or of a run.

    Raises:
        UserError: the path has no good checkpoint; or "auto" finds checkpoints and none of them is good: to
            start afresh without a word would be worse.
    """
    if resume == "none":
        return Found(path=None)
    if resume != "auto":
        path = Path(resume)
        if not path.is_dir():
            raise UserError("no such checkpoint", place=f"loop.resume={resume}", fix="Give auto, none or a folder.")
        if _NAME.fullmatch(path.name) or (path / manifest.NAME).is_file():
            return Found(path=path)
        directory = path
    elif directory.is_dir():
        _recover(directory)
    found = latest(directory)
    if found.path is None and (found.warnings or resume != "auto"):
        why = "; ".join(found.warnings) or "there is none"
        raise UserError(f"no good checkpoint: {why}", place=str(directory), fix="Start afresh with loop.resume=none.")
    return found


def prune(directory: Path, keep: int) -> None:
    """Removes all but the newest `keep` good checkpoints, and what dead processes left half done.

    What is not good does not count towards `keep`: the last good checkpoint stays whatever stands above it.
    """
    _recover(directory)
    _prune(directory, keep, trusted=None)


def set_aside(directory: Path, after: int) -> list[Path]:
    """Renames the checkpoints of steps later than `after`, lest a run that goes on from there resume them."""
    moved = []
    for path in _checkpoints(directory):
        if _step(path) > after:
            number = 1
            while (aside := path.with_name(f"{path.name}.aside-{number}")).exists():
                number += 1
            moved.append(path.rename(aside))
    return moved


def _prune(directory: Path, keep: int, trusted: Path | None) -> None:
    """Good means hashed for the newest (or just written: `trusted`), and complete in size for the others."""
    good = 0
    for path in _checkpoints(directory):
        if good >= keep and path != trusted:
            gone = directory / f".{path.name}.tmp-{os.getpid()}"
            path.rename(gone)  # at once, so that no half of it is ever met
            shutil.rmtree(gone, ignore_errors=True)
        elif path == trusted or manifest.problem(path, hashes=good == 0) is None:
            good += 1


def _checkpoints(directory: Path) -> list[Path]:
    """Newest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _way_out(path: Path) -> str:
    for other in _checkpoints(path.parent):
        if other.name != path.name and manifest.problem(other) is None:
            return f"Resume from {other.name} with loop.resume={other}, or start afresh with loop.resume=none."
    return "Start afresh with loop.resume=none."


def _tensors(path: Path) -> dict[str, Tensor]:
    # Clones, so that nothing hangs on the file and memory is aligned as in the run that was interrupted.
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # not a mapping
