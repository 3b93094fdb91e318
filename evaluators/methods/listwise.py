"""Plackett and Luce's model on a scorer: the best of a prompt's pictures is taken first, then the best of the rest.

    loss of a prompt = mean over its pictures that beat others of  log sum e^s over itself and those it beat - s
    loss = mean over prompts

With `data.items: prompts` and `data.pairing.strategy: all` a prompt's scored pictures are one ranking. Ties do not
compete; of two pictures it is Bradley and Terry's loss. Source: ListMLE, Xia et al., ICML 2008.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from evaluators.training.data import PictureBatch
from evaluators.training.objectives import plackett_luce
from evaluators.training.parts import Parts
from mmalign.config import Settings
from mmalign.method import Metrics, OneLoss


class Options(Settings):
    """Keys of the recipe's `method` section: none."""


class Listwise(OneLoss):
    """See the module's docstring."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def losses(self, batch: PictureBatch) -> Iterator[tuple[Tensor, Metrics]]:
        scores = self._parts.score(batch)
        sure = batch.confidence > 0.5
        taken = plackett_luce(scores.scores, batch.pairs, sure)
        beats = torch.zeros_like(taken).index_put((batch.pairs[sure, 0],), torch.ones_like(taken[:1]))
        of_prompt = torch.zeros(2, batch.items, device=taken.device).index_add(
            1, batch.owner, torch.stack([beats * taken, beats])
        )
        yield (of_prompt[0] / of_prompt[1].clamp(min=1)).mean(), scores.metrics(batch)


def build(options: Options, parts: Parts) -> Listwise:
    """The method, from its options and the trainer's parts."""
    return Listwise(parts)
