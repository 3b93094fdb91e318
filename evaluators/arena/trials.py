"""What is compared: everything that two or more models made of the same prompt, seed and input picture.

    pictures    folders as `mmalign sample` writes them: index.jsonl with lines {file, prompt, seed, model}
    answers     JSON lines {prompt, answer} as `mmalign generate` writes them, with image where a picture is asked about

A folder or file is a contestant under its own name, unless its lines name several models: then each of them is one. All
paths are relative to one folder, that of the votes, and may not leave it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmalign.errors import UserError
from mmalign.media import Media, path_fault
from mmalign.records import Problem, shown
from mmalign.sources import rows_of

INDEX = "index.jsonl"
LONGEST_PROMPT, LONGEST_ANSWER, LONGEST_NAME = 10_000, 50_000, 200  # characters
LARGEST_FILE = 64 * 2**20  # bytes of a picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What all contestants were asked.

    Attributes:
        media: the picture a question is about; None for pictures made from a prompt.
    """

    unit_id: str
    prompt: str
    seed: int | None
    media: Media | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What one contestant made of it: a picture or a text.

    Attributes:
        contestant: its name here.
        model: the model's own name, as its file says.
        digest: SHA-256 of the picture's file or of the text.
    """

    entry_id: str
    contestant: str
    model: str | None
    image: Media | None
    text: str | None
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Two contestants' entries for one unit, by their names; which one stands on the left is another matter."""

    trial_id: str
    unit: Unit
    a: Entry
    b: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Programme:
    """All that there is to vote on.

    Attributes:
        trials: in the order in which they are given out.
        contestants: in the order of their folders and files, so that the base may be given first.
    """

    trials: tuple[Trial, ...]
    contestants: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where trials come from.

    Attributes:
        folders, answers: as given on the command line.
        root: the folder that every path is relative to.
    """

    root: Path
    folders: tuple[Path, ...] = ()
    answers: tuple[Path, ...] = ()

    @property
    def indexes(self) -> tuple[Path, ...]:
        """The files that say what there is."""
        return (*(folder / INDEX for folder in self.folders), *self.answers)

    def stamp(self) -> tuple[int, ...]:
        """Sizes of the indexes: they change when something was added."""
        return tuple(path.stat().st_size if path.is_file() else -1 for path in self.indexes)


def find_root(paths: Sequence[Path]) -> Path:
    """The nearest folder that all sources are in.

    Raises:
        UserError: there is none but the root of the file system, or a source is missing.
    """
    for path in paths:
        if not path.exists():
            raise UserError("there is no such file or folder", place=str(path))
    common = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    if common == Path(common.anchor):
        raise UserError(
            "the sources have no folder in common to keep the votes in",
            place=", ".join(map(str, paths)),
            fix="Put them into one folder.",
        )
    return common


def read_programme(sources: Sources, *, seed: int = 0) -> Programme:
    """Every pair of contestants that made something of the same unit, in an order drawn by the seed.

    Raises:
        UserError: a source is missing, has a line that is wrong or twice the same, or nothing can be compared.
    """
    entries: dict[str, tuple[Unit, dict[str, Entry]]] = {}
    places: dict[tuple[str, str], str] = {}
    names: dict[str, None] = {}
    for unit, entry, place in _entries(sources):
        known = entries.setdefault(unit.unit_id, (unit, {}))[1]
        first = places.setdefault((unit.unit_id, entry.contestant), place)
        if first != place:
            raise UserError(
                f"'{entry.contestant}' has the same prompt and seed twice", place=place, fix=f"The first is {first}."
            )
        known[entry.contestant] = entry
        names[entry.contestant] = None
    trials = []
    for unit, known in entries.values():
        for first, second in itertools.combinations(sorted(known), 2):
            a, b = known[first], known[second]
            trials.append(Trial(trial_id=_hash(unit.unit_id, a.entry_id, b.entry_id), unit=unit, a=a, b=b))
    if not trials:
        raise UserError(
            f"nothing can be compared: {', '.join(names) or 'no model'} share no prompt and seed",
            place=", ".join(map(str, sources.indexes)),
            fix="Draw with each model from the same --prompts and --seed.",
        )
    trials.sort(key=lambda trial: _hash(seed, trial.trial_id))
    return Programme(trials=tuple(trials), contestants=tuple(names))


def left_of(trial: str, rater: str, seed: int) -> Literal["a", "b"]:
    """Which entry a rater sees on the left: a coin that falls the same way every time for one rater and trial."""
    return "a" if int(_hash("side", seed, rater, trial), 16) % 2 else "b"


def choose(trials: Sequence[Trial], done: set[str], work: Mapping[str, int]) -> Trial | None:
    """The next trial of a rater: of those not `done`, the first with the least `work` of others on it."""
    return min(
        (trial for trial in trials if trial.trial_id not in done), key=lambda t: work.get(t.trial_id, 0), default=None
    )


# --------------------------------------------------------------------------------------------- reading sources


def _entries(sources: Sources) -> Iterator[tuple[Unit, Entry, str]]:
    names = _names(sources)
    for folder in sources.folders:
        if not (folder / INDEX).is_file():
            raise UserError(
                f"there is no {INDEX}, which says what the pictures show",
                place=str(folder),
                fix="Give folders written by `mmalign sample`.",
            )
    for number, path in enumerate(sources.indexes):
        rows = list(_rows(path))
        several = len({json.dumps(row.get("model")) for _, row in rows}) > 1
        for place, row in rows:
            model = _text(row, "model", place, LONGEST_NAME, needed=several)
            contestant = names[number] if model is None or not several else model
            unit, image, text, digest = _content(sources.root, path, row, place, pictures=number < len(sources.folders))
            key = _hash(unit.unit_id, contestant, digest)
            entry = Entry(entry_id=key, contestant=contestant, model=model, image=image, text=text, digest=digest)
            yield unit, entry, place


def _names(sources: Sources) -> list[str]:
    """A name for each index: its folder's or its own; with the folder above where two would be called the same."""
    own = [folder.resolve() for folder in sources.folders]
    own += [file.resolve().with_suffix("") for file in sources.answers]
    short = Counter(place.name for place in own)
    names = [place.name if short[place.name] == 1 else f"{place.parent.name}/{place.name}" for place in own]
    if len(set(names)) < len(names):
        raise UserError("two of the sources have the same name", place=", ".join(names), fix="Rename one.")
    return names


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        for number, row in enumerate(rows_of(path), start=1):
            place = f"{path} line {number}"
            if isinstance(row, Problem):
                raise row.error()
            if not isinstance(row, Mapping):
                raise UserError(f"expected an object, got {shown(row)}", place=place)
            yield place, row
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", place=str(path)) from error


def _content(
    root: Path, index: Path, row: Mapping[str, Any], place: str, *, pictures: bool
) -> tuple[Unit, Media | None, str | None, str]:
    """(what was asked, the picture or the text that was made of it, SHA-256)."""
    prompt = _text(row, "prompt", place, LONGEST_PROMPT) or ""
    seed = row.get("seed")
    whole = isinstance(seed, int) and not isinstance(seed, bool) and -(2**63) <= seed < 2**63
    if not whole and (pictures or seed is not None):
        raise UserError(f"seed: expected a whole number, got {shown(seed)}", place=place)
    media = image = text = None
    if pictures:
        image = _image(root, index.parent, row.get("file"), "file", place)
    else:
        text = (
            "" if row.get("answer") == "" else _text(row, "answer", place, LONGEST_ANSWER) or ""
        )  # silence is one too
        asked = row.get("image") or []
        listed = asked if isinstance(asked, list) else [asked]
        if len(listed) > 1:
            raise UserError(f"image: expected one picture, got {len(listed)}", place=place)
        media = _image(root, index.parent, listed[0], "image", place) if listed else None
    digest = hashlib.sha256((text or "").encode()).hexdigest() if image is None else image.sha256()
    key = _hash(prompt, seed, media.digest if media else None)
    return Unit(unit_id=key, prompt=prompt, seed=seed, media=media), image, text, digest


def check_prompt(prompt: str, place: str) -> None:
    """Refuse a prompt that the page could not show.

    Raises:
        UserError: an empty or an endless one.
    """
    _text({"prompt": prompt}, "prompt", place, LONGEST_PROMPT)


def _text(row: Mapping[str, Any], name: str, place: str, most: int, *, needed: bool = True) -> str | None:
    value = row.get(name)
    if value is None and not needed:
        return None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name}: expected text, got {shown(value)}", place=place)
    if len(value) > most:
        raise UserError(f"{name}: {len(value)} characters, the limit is {most}", place=place)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can carry and nothing else can
        raise UserError(f"{name}: expected valid Unicode, got {shown(value)}", place=place) from error
    return value


def _image(root: Path, folder: Path, value: Any, field: str, place: str) -> Media:
    if not isinstance(value, str):
        raise UserError(f"{field}: expected the path of a picture, got {shown(value)}", place=place)
    fault = path_fault(folder, value)
    if fault:
        raise UserError(f"{field}: expected a file in the folder, got {fault}", place=place)
    file = folder.resolve() / value
    if not file.is_relative_to(root):
        raise UserError("the picture is not below the folder of the votes", place=place, fix="Give another --votes.")
    state = file.stat()
    if state.st_size > LARGEST_FILE:
        raise UserError(f"{field}: the file has more than {LARGEST_FILE // 2**20} MiB", place=place)
    digest = _digest(file, state.st_mtime_ns, state.st_size)
    return Media(path=file.relative_to(root).as_posix(), root=str(root), digest=digest, place=place)


@functools.lru_cache(maxsize=2**17)
def _digest(file: Path, changed: int, size: int) -> str:
    """SHA-256 of a file; read once, as long as it stays what it was."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
