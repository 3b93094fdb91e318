"""What a model answers, so that an answer is the same whoever is asked beside it.

Rows that begin alike and look at the same pictures, many questions about one picture, share that beginning: it is
computed once and its keys and values are given to all of them. The rest of each row follows, padded on the left, at
its own positions; then a token at a time, until every row has said its end token. Rows that have are dropped.

    temperature 0:  token = argmax logits
    else:           token = argmax (logits / temperature + g),  g = -log(-log u)

The second is a draw from softmax(logits / temperature) with the row's own generator; two models asked with the same
seed share their luck.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import DynamicCache

from mmalign.progress import Progress
from vlm.batch import ImageInput, Row
from vlm.conversations import Conversation
from vlm.models import ImageFeatures, VisionLanguageModel


@torch.no_grad()
def answer(
    model: VisionLanguageModel,
    conversations: Sequence[Conversation],
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    progress_title: str | None = None,
) -> list[str]:
    """The model's answers, special tokens and surrounding space taken off.

    Args:
        conversations: what they are asked; an answer that one holds already is not read. Questions about one picture
            are cheapest side by side.
        batch_size: answers made at once; changes nothing in them but rounding.
        max_new_tokens: an answer is cut here, or where the model's longest row ends.
        temperature: 0 for the likeliest token at every place.
        seeds: of every answer, for a temperature above 0.
        progress_title: shows a bar of that name.

    Raises:
        UserError: see `VisionLanguageModel.encode`.
        ValueError: a temperature without as many seeds.
    """
    if temperature > 0 and (seeds is None or len(seeds) != len(conversations)):
        raise ValueError("a temperature needs a seed for every conversation")
    training = model.network.training
    model.network.eval()
    said: list[str] = []
    known = _Features(model)
    with Progress(len(conversations), progress_title or "", unit="answer", enabled=progress_title is not None) as bar:
        for start in range(0, len(conversations), batch_size):
            some = conversations[start : start + batch_size]
            rows = [model.encode(replace(conversation, answer=None)) for conversation in some]
            own = None if temperature <= 0 or seeds is None else seeds[start : start + batch_size]
            tokens = _complete(model, rows, known, max_new_tokens, _Choice(temperature, own))
            said += [model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
            bar.update(len(some))
    model.network.train(training)
    return said


class _Choice:
    """The next token of every row.

    Args:
        seeds: of every row; None for the likeliest token.
    """

    def __init__(self, temperature: float, seeds: Sequence[int] | None) -> None:
        self._temperature = temperature
        self._generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Float[Tensor, "rows vocabulary"], rows: Sequence[int]) -> Int64[Tensor, " rows"]:
        """Args: rows: which rows these are, of those at the start."""
        logits = logits.float()
        if self._generators is not None:
            noise = torch.stack([torch.rand(logits.shape[1], generator=self._generators[row]) for row in rows])
            logits = logits / self._temperature - torch.log(-torch.log(noise.clamp(min=1e-20))).to(logits.device)
        return logits.argmax(dim=1)


class _Features:
    """Features of the images of a batch, those of the batch before kept: questions about a picture may be cut."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self._known: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def __call__(self, images: Sequence[ImageInput]) -> ImageFeatures | None:
        new = [image for image in images if image.key not in self._known]
        found = self._model.encode_images(new)
        made = {}
        if found is not None:
            made = {
                image.key: (found.pooled[i], tuple(level[i] for level in found.deep)) for i, image in enumerate(new)
            }
        self._known = {image.key: self._known.get(image.key) or made[image.key] for image in images}
        if not images:
            return None
        pooled, deep = zip(*self._known.values(), strict=True)
        return ImageFeatures(pooled=pooled, deep=tuple(zip(*deep, strict=True)))


# ------------------------------------------------------------------------------------------------ shared beginnings


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beginning:
    """Rows of a batch that begin with the same tokens and look at the same pictures.

    Args:
        members: which rows.
        tokens: how many they share; every one of them has at least one more.
    """

    members: tuple[int, ...]
    tokens: int


def beginnings(rows: Sequence[Row], image_token: int) -> Iterator[_Beginning]:
    """What rows share that look at the same pictures: all image tokens at least, else each row is alone."""
    together: dict[tuple[str, ...], list[int]] = {}
    for index, row in enumerate(rows):
        together.setdefault(tuple(image.key for image in row.images), []).append(index)
    for members in together.values():
        shortest = min(len(rows[i]) for i in members) - 1
        heads = torch.stack([rows[i].ids[:shortest] for i in members])
        differs = (heads != heads[0]).any(dim=0).nonzero()
        shared = int(differs[0]) if len(differs) else shortest
        if shared and not any((rows[i].ids[shared:] == image_token).any() for i in members):
            yield _Beginning(members=tuple(members), tokens=shared)
        else:
            yield from (_Beginning(members=(i,), tokens=len(rows[i]) - 1) for i in members)


def _cut(row: Row, tokens: slice) -> Row:
    return replace(row, ids=row.ids[tokens], completion=row.completion[tokens])


# -------------------------------------------------------------------------------------------------- token by token


class _State:
    """Keys and values of what was read, and where each row stands.

    Attributes:
        rows: which of the rows at the start are still there.
        attention: [rows, read], False on padding.
        position: [rows], of the next token; the same on every axis of a position with several.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model, self._cache = model, DynamicCache()
        self.rows: list[int] = []
        self.attention: Bool[Tensor, "rows read"] = torch.zeros(0, 0, dtype=torch.bool)
        self.position: Int64[Tensor, " rows"] = torch.zeros(0, dtype=torch.int64)

    def begin(self, rows: Sequence[Row], known: _Features) -> None:
        """Read the beginnings, images and all."""
        batch = self._model.collate(rows, side="left").to(self._model.device)
        arguments = self._model.inputs(batch, known(batch.images))
        if "image_grid_thw" in arguments:
            asked = {name: arguments[name] for name in ("mm_token_type_ids", "image_grid_thw", "attention_mask")}
            positions = self._model.network.model.get_rope_index(batch.ids, **asked)[0]  # [axes, rows, tokens]
        else:
            positions = (batch.attention.long().cumsum(dim=1) - 1).clamp(min=0)[None]
        arguments["position_ids"] = positions if len(positions) > 1 else positions[0]
        self._model.network.model(**arguments, past_key_values=self._cache, use_cache=True)
        self.attention, self.position = batch.attention, positions.amax(dim=(0, 2)) + 1
        self.rows = list(range(len(rows)))

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows of those that are there, perhaps several times each."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.attention.device)
        self._cache.batch_select_indices(index)
        self.attention, self.position = self.attention[index], self.position[index]
        self.rows = [self.rows[row] for row in rows]

    def read(
        self, ids: Int64[Tensor, "rows new"], attention: Bool[Tensor, "rows new"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Read more text, padded on the left; the logits of what follows it."""
        steps = attention.long().cumsum(dim=1)
        self.attention = torch.cat([self.attention, attention], dim=1)
        positions = self.position[:, None] + (steps - 1).clamp(min=0)
        hidden = self._model.network.model(
            input_ids=ids,
            attention_mask=self.attention.long(),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self.position = self.position + steps[:, -1]
        logits: Tensor = self._model.network.get_output_embeddings()(hidden[:, -1])
        return logits


def _complete(
    model: VisionLanguageModel, rows: Sequence[Row], known: _Features, most: int, choose: _Choice
) -> list[list[int]]:
    """Tokens that follow each row, the end token left out."""
    ends = end_tokens(model)
    said: list[list[int]] = [[] for _ in rows]
    room = [min(most, model.max_tokens - len(row)) for row in rows]
    shared = list(beginnings(rows, model.image_token_id))
    state = _State(model)
    state.begin([_cut(rows[one.members[0]], slice(one.tokens)) for one in shared], known)
    state.select([index for index, one in enumerate(shared) for _ in one.members])
    state.rows = [member for one in shared for member in one.members]
    rest = [_cut(rows[member], slice(one.tokens, None)) for one in shared for member in one.members]
    batch = model.collate([replace(row, images=()) for row in rest], side="left").to(model.device)
    ids, attention = batch.ids, batch.attention
    while True:
        chosen = choose(state.read(ids, attention), state.rows)
        going = []
        for index, (row, token) in enumerate(zip(state.rows, chosen.tolist(), strict=True)):
            if token not in ends and room[row] > 0:
                said[row].append(token)
                if len(said[row]) < room[row]:
                    going.append(index)
        if not going:
            return said
        if len(going) < len(state.rows):
            state.select(going)
        ids = chosen[torch.tensor(going, device=chosen.device)][:, None]
        attention = torch.ones_like(ids, dtype=torch.bool)


def end_tokens(model: VisionLanguageModel) -> set[int]:
    """What an answer ends with: the tokenizer's end, and the model's own."""
    configured: Any = model.network.generation_config.eos_token_id
    own = configured if isinstance(configured, list) else [configured]
    return {int(token) for token in (*own, model.processor.tokenizer.eos_token_id) if token is not None}
