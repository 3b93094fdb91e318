"""Rows of a batch as one sequence in which equal beginnings stand once.

    rows     [image question chosen]  [image question rejected]  [other image, question, chosen]
    shared   [image question | chosen | rejected] [other image, question, chosen]
    apart    the rows below each other, padded

Rows share what comes before the answer when it is equal to the last token and image. Positions of every answer go on
from its beginning's end, so that each token is computed as in its own row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from vlm.attention import Group
from vlm.batch import ImageInput, Row, collate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """Rows ready for one forward, and where in it each answer token is predicted.

    Args:
        ids: [sequences, tokens]; one sequence when rows share.
        positions: [sequences, tokens], or [axes, sequences, tokens] of multi-axis rotary positions.
        attention: [sequences, tokens], False on padding.
        groups: what may see what in the one sequence; None for rows apart.
        images: distinct ones.
        looks: for every run of placeholders, in order, which image.
        predictors: [rows, answer]: where each answer token is predicted, counted through all sequences; 0 on padding.
        targets: [rows, answer], the answer tokens.
        completion: [rows, answer], False on padding.
    """

    ids: Int64[Tensor, "sequences tokens"]
    positions: Int64[Tensor, "*axes sequences tokens"]
    attention: Bool[Tensor, "sequences tokens"]
    groups: tuple[Group, ...] | None
    images: tuple[ImageInput, ...]
    looks: tuple[int, ...]
    predictors: Int64[Tensor, "rows answer"]
    targets: Int64[Tensor, "rows answer"]
    completion: Bool[Tensor, "rows answer"]

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> Answers:
        """The same elsewhere."""
        return replace(
            self,
            ids=self.ids.to(device),
            positions=self.positions.to(device),
            attention=self.attention.to(device),
            groups=None if self.groups is None else tuple(group.to(device) for group in self.groups),
            images=tuple(image.to(device) for image in self.images),
            predictors=self.predictors.to(device),
            targets=self.targets.to(device),
            completion=self.completion.to(device),
        )


def apart(rows: Sequence[Row], positions: Sequence[Tensor], *, pad_id: int) -> Answers:
    """Every row a sequence of its own.

    Args:
        rows: each with an answer behind a beginning.
        positions: of each row's tokens, [tokens] or [axes, tokens].
    """
    batch = collate(rows, pad_id=pad_id)
    width = batch.ids.shape[1]
    padded = [torch.nn.functional.pad(places, (0, width - places.shape[-1])) for places in positions]
    predictors = [
        number * width + torch.arange(_start(row) - 1, len(row) - 1, dtype=torch.int64)
        for number, row in enumerate(rows)
    ]
    return Answers(
        ids=batch.ids,
        positions=torch.stack(padded, dim=-2),
        attention=batch.attention,
        groups=None,
        images=batch.images,
        looks=tuple(image for look in batch.looks for image in look),
        **_answers(rows, predictors),
    )


def shared(rows: Sequence[Row], positions: Sequence[Tensor]) -> Answers:
    """All rows one sequence, equal beginnings once; arguments as for `apart`."""
    together: dict[tuple[bytes, tuple[str, ...]], list[int]] = {}
    for number, row in enumerate(rows):
        key = (row.ids[: _start(row)].numpy().tobytes(), tuple(image.key for image in row.images))
        together.setdefault(key, []).append(number)
    ids: list[Tensor] = []
    places: list[Tensor] = []
    groups: list[Group] = []
    images: dict[str, ImageInput] = {}
    looks: list[str] = []
    predictors: dict[int, Tensor] = {}
    at = 0
    for members in together.values():
        first = rows[members[0]]
        start = _start(first)
        begin, answers = at, at + start
        ids.append(first.ids[:start])
        places.append(positions[members[0]][..., :start])
        for image in first.images:
            images.setdefault(image.key, image)
            looks.append(image.key)
        at = answers
        owner: list[int] = []
        for branch, number in enumerate(members):
            row = rows[number]
            count = len(row) - start
            ids.append(row.ids[start:])
            places.append(positions[number][..., start:])
            # the first answer token is predicted at the beginning's end, every other one at the token before it
            before = torch.arange(at - 1, at + count - 1, dtype=torch.int64)
            before[0] = answers - 1
            predictors[number] = before
            owner += [branch] * count
            at += count
        mask = _mask(start, torch.tensor(owner)) if len(members) > 1 else None
        groups.append(Group(start=begin, answers=answers, stop=at, mask=mask))
    order = {key: index for index, key in enumerate(images)}
    return Answers(
        ids=torch.cat(ids)[None],
        positions=torch.cat(places, dim=-1).unsqueeze(-2),
        attention=torch.ones(1, at, dtype=torch.bool),
        groups=tuple(groups),
        images=tuple(images.values()),
        looks=tuple(order[key] for key in looks),
        **_answers(rows, [predictors[number] for number in range(len(rows))]),
    )


def _start(row: Row) -> int:
    start = len(row) - int(row.completion.sum())
    if start in (0, len(row)):
        raise ValueError(f"{row.place}: a row needs a beginning and an answer")
    return start


def _mask(start: int, owner: Int64[Tensor, " answers"]) -> Bool[Tensor, "answers tokens"]:
    """What answer tokens see: the whole beginning, and earlier tokens of the same answer."""
    count = len(owner)
    own = (owner[:, None] == owner[None]) & torch.ones(count, count, dtype=torch.bool).tril()
    return torch.cat([torch.ones(count, start, dtype=torch.bool), own], dim=1)


def _answers(rows: Sequence[Row], predictors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Predictors, targets and completion, padded to the longest answer."""
    shape = (len(rows), max(map(len, predictors)))
    where, targets = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    completion = torch.zeros(shape, dtype=torch.bool)
    for number, (row, predicted) in enumerate(zip(rows, predictors, strict=True)):
        count = len(predicted)
        where[number, :count], targets[number, :count] = predicted, row.ids[-count:]
        completion[number, :count] = True
    return {"predictors": where, "targets": targets, "completion": completion}
