"""Images at rest: where the encoded file is, read and decoded only when somebody asks.

A `Media` is a few hundred bytes whatever the picture weighs, so a million pairs can be listed, shuffled
and sharded before a single image is touched. Everything here treats its input as hostile: a path may not
leave its folder, only a few formats are decoded, and the pixel count is known before any pixel is.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol, runtime_checkable

from PIL import Image, ImageOps

from mmalign.errors import UserError

MAX_PIXELS = 64 * 2**20  # 8192 x 8192; larger headers are refused before decoding
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # decoders an untrusted file may reach
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def path_fault(root: str | Path, relative: str) -> str | None:
    """Why `relative` may not be read below `root`, in words; None when it may.

    Absolute paths, `..`, drive letters and symbolic links that lead out are refused; so are things that
    are not plain files (a FIFO would block for ever).
    """
    if not relative or "\0" in relative:
        return "an empty path" if not relative else "a path with a NUL character"
    try:
        os.fsencode(relative)
    except UnicodeEncodeError:  # a lone surrogate, which JSON can carry and no file name can
        return "a path that is not valid Unicode"
    if PurePosixPath(relative).is_absolute() or PureWindowsPath(relative).drive or relative.startswith("\\"):
        return f"the absolute path '{relative}'"
    if ".." in re.split(r"[/\\]", relative):
        return f"'{relative}', which leaves the data folder"
    target = Path(root, relative)
    try:
        inside = target.resolve().is_relative_to(Path(root).resolve())
    except (OSError, RuntimeError):  # a loop of links
        inside = False
    if not inside:
        return f"'{relative}', a link that leads out of the data folder"
    try:
        mode = target.stat().st_mode
    except OSError:
        return f"'{relative}', which does not exist"
    return None if stat.S_ISREG(mode) else f"'{relative}', which is not a file"


def resolve_inside(root: str | Path, relative: str, *, place: str) -> Path:
    """The file `relative` below `root`.

    Raises:
        UserError: the path is unsafe or there is no such file.
    """
    fault = path_fault(root, relative)
    if fault:
        raise UserError(
            f"expected a file inside the data folder, got {fault}",
            place=place,
            fix="Use paths relative to the data folder, and keep the files in it",
        )
    return Path(root, relative)


@runtime_checkable
@runtime_checkable
class Address(Protocol):
    """Where an image lies inside a larger file: `shard` and `row` name it, `load` fetches it."""

    @property
    def shard(self) -> str: ...

    @property
    def row(self) -> int: ...

    def load(self) -> tuple[bytes | None, str | None]:
        """(encoded bytes or None, path relative to the shard's folder or None)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One image in a Parquet shard of a store.

    Args:
        shard: the shard's file.
        row: row number in the shard, for messages.
        group: row group.
        offset: row number in the row group.
        index: which of the row's images.
    """

    shard: str
    row: int
    group: int
    offset: int
    index: int

    def load(self) -> tuple[bytes | None, str | None]:
        """(encoded bytes or None, path relative to the shard's folder or None)."""
        try:
            version = os.stat(self.shard).st_mtime_ns
            images = _images(self.shard, self.group, version)
            # One cell as Arrow; only this image becomes a Python object.
            item = images[self.offset].values[self.index].as_py()
        except (OSError, ValueError, IndexError) as error:
            raise UserError(
                f"cannot read an image from the shard: {error}",
                place=f"{self.shard} row {self.row}",
                fix="Open the store again; if it was not rewritten meanwhile, run `mmalign data check` on it",
            ) from error
        return item["bytes"], item["path"]


@functools.lru_cache(maxsize=8)
def _images(shard: str, group: int, version: int) -> Any:
    """The `images` column of one row group (a few MiB by the writer's choice).

    `version` is the file's change time, so that a rewritten shard is never served from the cache.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard, page_checksum_verification=True) as file:
        return file.read_row_group(group, columns=["images"]).column("images").combine_chunks()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Media:
    """An image: exactly one of bytes, a path below a root, or a place in a larger file.

    Two media are equal when their encoded bytes are.

    Args:
        data: the encoded file itself.
        path: path relative to `root`.
        root: the folder that `path` may not leave.
        cell: a place in a store's shard, or in another file of many images.
        digest: SHA-256 of the encoded bytes where it is known already.
        place: how to name it in a message.
    """

    data: bytes | None = None
    path: str | None = None
    root: str | None = None
    cell: Address | None = None
    digest: str | None = None
    place: str = ""

    def __post_init__(self) -> None:
        if (self.data is not None) + (self.path is not None) + (self.cell is not None) != 1:
            raise ValueError("Media needs exactly one of data, path and cell")
        if self.path is not None and self.root is None:
            raise ValueError("Media with a path needs the root that the path may not leave")

    @classmethod
    def from_image(cls, image: Image.Image, *, format: str = "PNG", place: str = "") -> Media:
        """An image made here, encoded without loss by default."""
        buffer = io.BytesIO()
        image.save(buffer, format=format)
        return cls(data=buffer.getvalue(), place=place)

    @property
    def where(self) -> str:
        """File and row, for messages."""
        if self.place:
            return self.place
        if self.cell:
            return f"{Path(self.cell.shard).name} row {self.cell.row}"
        return self.path or "image in memory"

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            UserError: the file is missing, outside its folder or unreadable, or the shard is damaged.
        """
        data, path, root = self.data, self.path, self.root
        if self.cell is not None:
            data, path = self.cell.load()
            root = str(Path(self.cell.shard).parent)
        if data is None:
            if path is None or root is None:
                raise UserError("the image has neither bytes nor a path", place=self.where)
            file = resolve_inside(root, path, place=self.where)
            try:
                data = file.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read '{path}': {error.strerror}", place=self.where) from error
        return data

    def sha256(self) -> str:
        """Hex SHA-256 of the encoded bytes; free for images of a store."""
        return self.digest or hashlib.sha256(self.read()).hexdigest()

    def loaded(self) -> Media:
        """The same image with its bytes and digest in memory."""
        data = self.read()
        digest = hashlib.sha256(data).hexdigest()
        return replace(self, data=data, path=None, root=None, cell=None, digest=digest, place=self.where)

    def open(self) -> Image.Image:
        """Decode to 8-bit RGB, upright by its EXIF orientation, transparency laid on white.

        Raises:
            UserError: not an image of a known format, damaged, or more than `MAX_PIXELS` pixels.
        """
        data = self.read()
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise self._too_large(f"{image.width} x {image.height}")
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
        except UserError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise self._too_large("too many") from error
        except Exception as error:  # damaged files raise nearly anything from inside the decoders
            # "cannot identify image file <_io.BytesIO object at 0x7f..>": the address helps nobody
            reason = str(error).split(" <", 1)[0] or type(error).__name__
            raise UserError(
                f"cannot decode the image: {reason}", place=self.where, fix="Replace or remove the file"
            ) from error

    def _too_large(self, size: str) -> UserError:
        return UserError(
            f"the image has {size} pixels, the limit is {MAX_PIXELS}",
            place=self.where,
            fix="Scale it down before importing it",
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Media) and self.sha256() == other.sha256()

    def __hash__(self) -> int:
        return hash(self.sha256())


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I"):  # 16-bit grey: keep the upper byte, where a plain convert would clip
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.mode == "F":
        raise UserError("floating-point images have no agreed range", fix="Save it with 8 or 16 bits")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, image).convert("RGB")
    return image.convert("RGB")
