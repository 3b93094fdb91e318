"""A user's `module:function` as a scorer: whatever goes wrong in it is one line that names theirs.

The function is called with lists of prompts and of pictures and returns a number for each. Its module is imported
from what is installed or, when there is no such module, from the current folder; it runs with all the rights of whoever
started the run.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import numbers
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.errors import UserError, nearest


class FunctionScorer:
    """A user's `module:function` as a scorer of one number.

    `identity` has the first digits of the SHA-256 of the module's file: another version is another reward.

    Raises:
        UserError: it cannot be imported or is no function; when scoring, it raised or returned something else
            than a number per picture.
    """

    main = "value"
    numbers: tuple[str, ...] = ("value",)

    def __init__(self, spec: str) -> None:
        name, _, attribute = spec.partition(":")
        here = os.getcwd()
        if here not in sys.path:
            sys.path.append(here)  # last: nothing in the folder can stand in for what is installed
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise _failed(f"'{spec}' cannot be imported", error, name) from error
            raise UserError(
                f"there is no module '{error.name}' for '{spec}'",
                fix="Install it, or start mmalign from the folder that it is in.",
            ) from error
        except (Exception, SystemExit) as error:
            raise _failed(f"'{spec}' cannot be imported", error, name) from error
        self._file = getattr(module, "__file__", None)
        place = str(self._file or name)
        if not hasattr(module, attribute):
            names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise UserError(f"there is no '{attribute}' in '{name}'", place=place, fix=nearest(attribute, names))
        self._function = getattr(module, attribute)
        if not callable(self._function):
            raise UserError(
                f"'{spec}' is {_kind(self._function)}, not a function",
                place=place,
                fix="A reward is a function of prompts and pictures.",
            )
        digest = hashlib.sha256(Path(self._file).read_bytes()).hexdigest()[:12] if self._file else "builtin"
        self._spec, self.identity = spec, f"{spec}@{digest}"

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        try:
            given = self._function(list(prompts), list(images))
            if hasattr(given, "tolist"):  # numpy and torch, on any device
                shape = tuple(given.shape)
                if shape != (len(images),):
                    raise self._refused(f"an array of shape {shape} for {len(images)} pictures")
                given = given.tolist()
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise _failed(f"'{self._spec}' failed", error, self._file) from error
        if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
            raise self._refused(_kind(given))
        if len(given) != len(images):
            raise self._refused(f"{len(given)} values for {len(images)} pictures")
        return [{"value": self._number(value, index)} for index, value in enumerate(given)]

    def _number(self, value: Any, index: int) -> float:
        if not isinstance(value, numbers.Real) and getattr(value, "shape", None) == ():
            value = value.item()  # a tensor of no dimension
        if not isinstance(value, numbers.Real):
            raise self._refused(f"{_kind(value)} as value {index}")
        try:
            return float(value)
        except OverflowError:  # a whole number beyond all floats
            return math.inf

    def _refused(self, what: str) -> UserError:
        return UserError(
            f"'{self._spec}' returned {what}",
            place=self._file,
            fix="It should return a list or one-dimensional array with a number for each picture.",
        )


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"an array of shape {tuple(shape)}"
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _failed(what: str, error: BaseException, file: str | None) -> UserError:
    """What the user's code raised, with the line of theirs that did."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename == file] or list(frames)[-1:]
    if isinstance(error, SyntaxError) and error.filename is not None:
        place: str | None = f"{error.filename}:{error.lineno}"
    else:
        place = f"{theirs[-1].filename}:{theirs[-1].lineno}" if theirs else file
    message = f"{type(error).__name__}: {str(error)[:300]}" if str(error) else type(error).__name__
    return UserError(f"{what}: {message}", place=place)
