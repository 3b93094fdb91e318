"""Folders of plain arrays (.npy) that appear under their name when they are complete, and are checked when opened."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from mmalign.errors import UserError

INDEX = "index.json"
Array = NDArray[Any]


class Rows:
    """An array that is filled row by row, in memory or straight into a file.

    Not a writable memory map: on a full disk that ends the process with SIGBUS instead of an error.
    """

    def __init__(self, path: Path | None, shape: Sequence[int], dtype: str) -> None:
        self._shape, self._path, self._count = tuple(shape), path, 0
        self._array = np.empty(self._shape if path is None else (0,), dtype)
        if path is not None:
            self._file = open(path, "wb")  # noqa: SIM115  # closed by finish() or abandon()
            header = {"descr": self._array.dtype.str, "fortran_order": False, "shape": self._shape}
            np.lib.format.write_array_header_2_0(self._file, header)

    def append(self, rows: Array) -> None:
        """Add rows [n, ...], cast to the array's dtype."""
        if rows.shape[1:] != self._shape[1:] or self._count + len(rows) > self._shape[0]:
            raise ValueError(f"rows of shape {rows.shape} do not fit into {self._shape} at {self._count}")
        if self._path is None:
            self._array[self._count : self._count + len(rows)] = rows
        else:
            self._file.write(np.ascontiguousarray(rows, dtype=self._array.dtype).tobytes())
        self._count += len(rows)

    def finish(self) -> Array:
        """The complete array; from a file, as a read-only memory map."""
        if self._count != self._shape[0]:
            raise ValueError(f"{self._count} of {self._shape[0]} rows were written")
        if self._path is None:
            return self._array
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return open_array(self._path)

    def abandon(self) -> None:
        """Close the file whatever is in it."""
        if self._path is not None:
            self._file.close()


class Folder:
    """Where `fill` puts its arrays: a folder that is being made, or memory."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: dict[str, Rows] = {}
        self.arrays: dict[str, Array] = {}

    def rows(self, name: str, shape: Sequence[int], dtype: str) -> Rows:
        """A new array to fill."""
        path = None if self._path is None else self._path / f"{name}.npy"
        self._rows[name] = Rows(path, shape, dtype)
        return self._rows[name]

    def add(self, name: str, array: Array) -> None:
        """A whole array at once."""
        self.rows(name, array.shape, array.dtype.str).append(array)

    def finish(self) -> None:
        self.arrays = {name: rows.finish() for name, rows in self._rows.items()}

    def abandon(self) -> None:
        for rows in self._rows.values():
            rows.abandon()


def open_array(path: Path) -> Array:
    """A read-only memory map of an .npy file; nothing in it is ever unpickled."""
    array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def in_memory(fill: Callable[[Folder], None]) -> dict[str, Array]:
    """The arrays that `fill` makes, without a disk."""
    folder = Folder(None)
    fill(folder)
    folder.finish()
    return folder.arrays


def on_disk(root: Path, key: str, fill: Callable[[Folder], None]) -> dict[str, Array]:
    """The arrays of `root/key`, made by `fill` unless they are there.

    Of several processes one fills while the others wait. What a killed one left is never mistaken for a result:
    it has another name, and the next fill removes it. A damaged result is made again, with a message.

    Raises:
        UserError: the folder cannot be written, or the disk is full; nothing is left then.
    """
    final, partial = root / key, root / f".{key}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{key}.lock"):
            if final.exists():
                with contextlib.suppress(_Damaged):
                    return _opened(final)
                shutil.rmtree(final)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            with _removed_on_failure(partial):
                folder = Folder(partial)
                try:
                    fill(folder)
                    folder.finish()
                finally:
                    folder.abandon()
                _seal(partial)
                os.rename(partial, final)
            return _opened(final)
    except OSError as error:
        raise UserError(
            f"cannot write the cache: {error.strerror or error}",
            place=str(root),
            fix="Free some space, choose another folder with data.cache, or do without: data.cache=null",
        ) from error


class _Damaged(Exception):
    """A cache that is not what its index says."""


def _seal(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.npy"))}
    with open(folder / INDEX, "w", encoding="utf-8") as file:
        json.dump({"files": sizes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _opened(folder: Path) -> dict[str, Array]:
    try:
        sizes = json.loads((folder / INDEX).read_text(encoding="utf-8"))["files"]
        for name, size in sizes.items():
            if Path(name).name != name or (folder / name).stat().st_size != size:
                raise ValueError(f"{name} does not have {size} bytes")
        return {name.removesuffix(".npy"): open_array(folder / name) for name in sizes}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"mmalign: the cache {folder} is damaged ({error}); making it again", file=sys.stderr, flush=True)
        raise _Damaged from error


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
