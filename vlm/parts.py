"""What a vision-language method is built from and what it is fed: the seam between the trainer and the methods.

A method asks for *views* of a pair: conversations under a name, of which `chosen` and `rejected` are two, and the
chosen answer beside another picture may be a third. The trainer makes rows of them; the method compares their
log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from mmalign.randomness import key_seed
from mmalign.reference import Reference
from vlm.batch import Row
from vlm.conversations import Conversation
from vlm.models import VisionLanguageModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two conversations of which the first is preferred.

    Attributes:
        seed: of this pair's draws at this visit; unrelated for any two.
    """

    chosen: Conversation
    rejected: Conversation
    seed: int

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers for one purpose."""
        return torch.Generator().manual_seed(key_seed(purpose, self.seed))


@runtime_checkable
class Viewer(Protocol):
    """What every method of this package offers beside `mmalign.method.Method`."""

    def views(self, pair: Pair) -> Mapping[str, Conversation]:
        """The conversations that a pair's losses are made of."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairBatch:
    """Pairs ready for the model.

    Attributes:
        views: name -> a row per pair.
        device: where the model is.
        confidence, gap: as labelled, where the pairs have them.
    """

    views: Mapping[str, tuple[Row, ...]]
    device: torch.device
    confidence: Float[Tensor, " pairs"] | None = None
    gap: Float[Tensor, " pairs"] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.views.values())))


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the trainer offers a method.

    Attributes:
        module: `vlm.models.Policy` being trained, as prepared for this machine.
        model: what it is a policy of: makes answers of rows, and features of images.
        reference: where the reference's log-probs come from.
        exact_reference: whether the reference can be asked about anything, at any time: not from a cache.
    """

    module: nn.Module
    model: VisionLanguageModel
    reference: Reference
    exact_reference: bool = True


def under(conversation: Conversation, images: Sequence[Image.Image], note: str) -> Conversation:
    """The same words beside other pictures.

    Args:
        note: which pictures, for messages.
    """
    return replace(conversation, images=tuple(images), place=f"{conversation.place} {note}")
