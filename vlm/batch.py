"""Rows of tokens and the images they look at, kept apart so that a batch holds every distinct image once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

PaddingSide: TypeAlias = Literal["left", "right"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageInput:
    """One image as its family's vision tower takes it.

    Args:
        key: equal for equal content; images of one key are encoded once per batch.
        tensors: by the model's argument names. The first dimension counts what the family cuts an image into
            (one picture, tiles, patches), so that images are batched by concatenation and never padded.
        tokens: placeholders that stand for it in a row.
    """

    key: str
    tensors: Mapping[str, Tensor]
    tokens: int

    def to(self, device: torch.device | str) -> ImageInput:
        """The same elsewhere."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One conversation, ready for the model.

    Args:
        ids: [tokens], placeholders expanded.
        completion: [tokens], True on the answer's tokens (with whatever ends it in the template), False elsewhere;
            all False when there is no answer.
        images: in the order of their placeholders.
        place: what to call it in a message.
    """

    ids: Int64[Tensor, " tokens"]
    completion: Bool[Tensor, " tokens"]
    images: tuple[ImageInput, ...]
    place: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def key(self) -> str:
        """Equal for rows that a model must score alike."""
        digest = hashlib.sha256(self.ids.numpy().tobytes())
        digest.update(json.dumps([int(self.completion.sum()), [image.key for image in self.images]]).encode())
        return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VlmBatch:
    """Rows padded to one length, and the distinct images they look at.

    Args:
        ids: [rows, tokens].
        attention: [rows, tokens], False on padding.
        completion: [rows, tokens], the answer's tokens.
        images: every distinct image once.
        looks: for each row, the positions of its images in `images`, in order of their placeholders.
        pad_id: what padding positions hold; never an image's placeholder.
        side: where the padding is.
    """

    ids: Int64[Tensor, "rows tokens"]
    attention: Bool[Tensor, "rows tokens"]
    completion: Bool[Tensor, "rows tokens"]
    images: tuple[ImageInput, ...]
    looks: tuple[tuple[int, ...], ...]
    pad_id: int
    side: PaddingSide = "right"

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Sequence[int] | Int64[Tensor, " picked"]) -> VlmBatch:
        """These rows in this order, with their images alone and no more padding than they need."""
        picked = [int(row) for row in rows]
        index = torch.tensor(picked, dtype=torch.int64, device=self.ids.device)
        attention = self.attention[index]
        width = max((int(n) for n in attention.sum(dim=1)), default=0)
        kept = slice(0, width) if self.side == "right" else slice(attention.shape[1] - width, None)
        images, looks = _distinct([tuple(self.images[i] for i in self.looks[row]) for row in picked])
        return replace(
            self,
            ids=self.ids[index][:, kept],
            attention=attention[:, kept],
            completion=self.completion[index][:, kept],
            images=images,
            looks=looks,
        )

    def repeat(self, times: int) -> VlmBatch:
        """The batch so many times over, one after the other; its images are still there once."""
        return replace(
            self,
            ids=self.ids.repeat(times, 1),
            attention=self.attention.repeat(times, 1),
            completion=self.completion.repeat(times, 1),
            looks=self.looks * times,
        )

    @staticmethod
    def concat(batches: Sequence[VlmBatch]) -> VlmBatch:
        """All rows, padded to the longest; images of equal key become one."""
        kinds = {(batch.side, batch.pad_id) for batch in batches}
        if len(kinds) != 1:
            raise ValueError(f"expected batches padded alike, got {sorted(kinds)}")
        side, pad_id = kinds.pop()
        width = max(batch.ids.shape[1] for batch in batches)
        images, looks = _distinct([tuple(b.images[i] for i in look) for b in batches for look in b.looks])
        return VlmBatch(
            ids=torch.cat([_padded(batch.ids, width, side, pad_id) for batch in batches]),
            attention=torch.cat([_padded(batch.attention, width, side, False) for batch in batches]),
            completion=torch.cat([_padded(batch.completion, width, side, False) for batch in batches]),
            images=images,
            looks=looks,
            pad_id=pad_id,
            side=side,
        )

    def to(self, device: torch.device | str) -> VlmBatch:
        """The same batch elsewhere."""
        return replace(
            self,
            ids=self.ids.to(device),
            attention=self.attention.to(device),
            completion=self.completion.to(device),
            images=tuple(image.to(device) for image in self.images),
        )


def collate(rows: Sequence[Row], *, pad_id: int, side: PaddingSide = "right") -> VlmBatch:
    """Rows of any lengths as one batch; images of equal key are kept once."""
    if not rows:
        raise ValueError("a batch needs a row")
    width = max(len(row) for row in rows)
    images, looks = _distinct([row.images for row in rows])
    return VlmBatch(
        ids=torch.cat([_padded(row.ids[None], width, side, pad_id) for row in rows]),
        attention=torch.cat([_padded(torch.ones(1, len(row), dtype=torch.bool), width, side, False) for row in rows]),
        completion=torch.cat([_padded(row.completion[None], width, side, False) for row in rows]),
        images=images,
        looks=looks,
        pad_id=pad_id,
        side=side,
    )


def _distinct(
    rows: Iterable[tuple[ImageInput, ...]],
) -> tuple[tuple[ImageInput, ...], tuple[tuple[int, ...], ...]]:
    """(images once each, for each row where its images are)."""
    images: dict[str, ImageInput] = {}
    order: dict[str, int] = {}
    looks = []
    for row in rows:
        for image in row:
            images.setdefault(image.key, image)
            order.setdefault(image.key, len(order))
        looks.append(tuple(order[image.key] for image in row))
    return tuple(images.values()), tuple(looks)


def _padded(values: Tensor, width: int, side: PaddingSide, filler: int | bool) -> Tensor:
    missing = width - values.shape[1]
    return torch.nn.functional.pad(values, (missing, 0) if side == "left" else (0, missing), value=filler)
