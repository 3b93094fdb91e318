"""Pairs that are drawn while people vote: a thread keeps a few ahead of them.

It draws unit after unit (a prompt and a seed) with every contestant, into a folder for each as `mmalign sample` writes
them; a picture's line is in the index after its file is whole. The arena reads the folders like any others, so votes,
replays and imports know no difference, and what was drawn before is not drawn again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image

from evaluators.arena.trials import INDEX, check_prompt
from mmalign.errors import UserError
from mmalign.pictures import save
from mmalign.sources import rows_of

AHEAD = 8  # pairs that nobody has looked at yet, before drawing pauses
LOCK = ".drawing.lock"

Unit = tuple[str, int]  # a prompt and the seed of its noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Painter:
    """A contestant that can draw.

    Attributes:
        name: of its folder.
        about: what decides its pictures beside prompt and seed; in every line of its index, and the same in all.
        draw: a picture for a prompt and a seed. Called in the thread alone, but for the first unit.
    """

    name: str
    about: Mapping[str, Any]
    draw: Callable[[str, int], Image.Image]


def units_of(prompts: Sequence[str], seed: int) -> list[Unit]:
    """What to draw: each prompt from a seed of its own.

    Raises:
        UserError: a prompt that the page could not show.
    """
    for number, prompt in enumerate(prompts, start=1):
        check_prompt(prompt, f"prompt {number}")
    return [(prompt, seed + number) for number, prompt in enumerate(prompts)]


class Live:
    """The pairs of some painters, drawn ahead of those who look at them.

    Args:
        root: the folder of the painters' folders.
        units: what to draw, in this order.
    """

    def __init__(self, root: Path, painters: Sequence[Painter], units: Sequence[Unit]) -> None:
        self.root, self.painters = root, tuple(painters)
        self.folders = tuple(root / painter.name for painter in painters)
        self._drawn: dict[str, set[Unit]] = {}
        self._left, self._count = deque(units), 0
        self._looked_at = 0
        self._trouble: str | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="drawing")
        self._alone = contextlib.ExitStack()

    def __enter__(self) -> Live:
        """Draw the first unit, so that there is something to show and a fault is seen at once; then go on beside.

        Raises:
            UserError: a folder has pictures of another model or of other settings, or cannot be written; or somebody
                else draws into it.
        """
        with contextlib.ExitStack() as alone:
            alone.enter_context(_held(self.root))
            self._drawn = {painter.name: _begun(self.root / painter.name, painter) for painter in self.painters}
            every = set.intersection(*self._drawn.values())
            self._left, self._count = deque(unit for unit in self._left if unit not in every), len(every)
            if not self._count and self._left:
                print("drawing the first pair", file=sys.stderr, flush=True)
                self._draw(self._left[0])
                self._next()
            self._alone = alone.pop_all()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()  # for as long as the picture at hand takes
        self._alone.close()

    @property
    def total(self) -> int:
        """Pairs, those that are still to be drawn among them."""
        with self._changed:
            return (self._count + len(self._left)) * self._pairs

    @property
    def drawing(self) -> bool:
        """Whether there are pairs to come."""
        return bool(self._left) and self._trouble is None

    @property
    def trouble(self) -> str | None:
        """Why there are no more, in a sentence for raters: it names no model, file or place."""
        return self._trouble

    def looked_at(self, pairs: int) -> None:
        """Say how many pairs anybody has looked at so far."""
        with self._changed:
            self._looked_at = pairs
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------------ the thread

    @property
    def _pairs(self) -> int:
        """Of a unit."""
        return math.comb(len(self.painters), 2)

    def _next(self) -> None:
        with self._changed:
            self._left.popleft()
            self._count += 1

    def _work(self) -> None:
        while self._left:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._count * self._pairs - self._looked_at < AHEAD)
            if self._stopped:
                return
            try:
                self._draw(self._left[0])
            except Exception as error:  # whatever a model may raise: the page says so, and the pairs drawn stay
                self._trouble = (
                    f"No more pairs can be drawn ({type(error).__name__}); the terminal of the server says why. "
                    "Those that were drawn can be voted on."
                )
                if isinstance(error, UserError):
                    print(f"drawing has stopped: {error}", file=sys.stderr, flush=True)
                else:
                    traceback.print_exc()
                return
            if not self._stopped:
                self._next()

    def _draw(self, unit: Unit) -> None:
        prompt, seed = unit
        for painter, folder in zip(self.painters, self.folders, strict=True):
            drawn = self._drawn[painter.name]
            if unit in drawn:
                continue
            if self._stopped:
                return
            file = f"{len(drawn):05d}.png"
            save(painter.draw(prompt, seed), folder / file)
            row = {"file": file, "prompt": prompt, "seed": seed, **painter.about}
            _append(folder / INDEX, json.dumps(row, ensure_ascii=False) + "\n")
            drawn.add(unit)


@contextlib.contextmanager
def _held(root: Path) -> Iterator[None]:
    """The right to draw into a folder, for one process at a time; a killed one loses it."""
    lock = FileLock(root / LOCK, timeout=0)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError("another server draws into this folder", place=str(root), fix="Vote there.") from error
    except OSError as error:
        raise UserError(f"cannot be used: {error.strerror}", place=str(root)) from error
    try:
        yield
    finally:
        lock.release()


def _append(index: Path, line: str) -> None:
    """Add a line that is whole or not there: a part of one would make the others unreadable while people vote."""
    data = line.encode()
    try:
        with open(index, "ab", buffering=0) as file:
            before = file.tell()
            if file.write(data) < len(data):
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", place=str(index), fix="Free some space.") from error


def _begun(folder: Path, painter: Painter) -> set[Unit]:
    """What a painter's folder has already; the folder is made if there is none."""
    index = folder / INDEX
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not index.exists():
            if any(folder.iterdir()):
                raise UserError("has something in it that was not drawn here", place=str(folder))
            index.touch()
        written = index.read_bytes()
        if not written.endswith(b"\n"):  # a line that a kill cut short: its picture is drawn again
            with open(index, "r+b") as file:
                file.truncate(written.rfind(b"\n") + 1)
        rows = list(rows_of(index))
    except OSError as error:
        raise UserError(f"cannot be used: {error.strerror}", place=str(folder)) from error
    for row in rows:
        same = isinstance(row, Mapping) and {name: row.get(name) for name in painter.about} == painter.about
        if not same or not isinstance(row.get("prompt"), str) or not isinstance(row.get("seed"), int):
            raise UserError(
                "has pictures of another model or of other settings", place=str(index), fix="Give a new folder."
            )
    return {(row["prompt"], row["seed"]) for row in rows}
