"""How alike two texts are: shared words, or the cosine of a sentence encoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from mmalign.errors import UserError, reason

Similarity: TypeAlias = Callable[[Sequence[str], Sequence[str]], list[float]]
"""(texts, texts) -> a number from 0 to 1 for each two; 1 for equal ones."""

_WORD = re.compile(r"[^\W_]+")
_BATCH = 64


def similarity(encoder: str | None) -> Similarity:
    """Shared words without an encoder, else the cosine of its vectors.

    Args:
        encoder: a folder of transformers or a hub id, of an encoder whose sentence vector is the mean over its tokens.

    Raises:
        UserError: it does not open.
    """
    return shared_words if encoder is None else _Encoder(encoder)


def shared_words(texts: Sequence[str], others: Sequence[str]) -> list[float]:
    """|A and B| / |A or B| of the sets of words, in small letters; 1 for two texts without any."""
    found = []
    for text, other in zip(texts, others, strict=True):
        a, b = ({word.lower() for word in _WORD.findall(one)} for one in (text, other))
        found.append(len(a & b) / len(a | b) if a | b else 1.0)
    return found


class _Encoder:
    def __init__(self, path: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            self._network: Any = AutoModel.from_pretrained(path, use_safetensors=True).eval()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"the sentence encoder does not open: {reason(error)}", place=f"make.encoder: {path}"
            ) from error

    def __call__(self, texts: Sequence[str], others: Sequence[str]) -> list[float]:
        every = list(dict.fromkeys([*texts, *others]))
        vectors: dict[str, torch.Tensor] = {}
        for start in range(0, len(every), _BATCH):
            some = every[start : start + _BATCH]
            vectors |= dict(zip(some, self._vectors(some), strict=True))
        return [float(vectors[a] @ vectors[b]) for a, b in zip(texts, others, strict=True)]

    @torch.no_grad()
    def _vectors(self, texts: list[str]) -> torch.Tensor:
        tokens = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        hidden = self._network(**tokens).last_hidden_state.float()
        seen = tokens["attention_mask"][:, :, None]
        return functional.normalize((hidden * seen).sum(dim=1) / seen.sum(dim=1).clamp(min=1), dim=1)
