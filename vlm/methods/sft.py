"""Plain fine-tuning on the chosen answers: the companion every preference result needs.

    loss = -log p(y_chosen | m, x) / N          per answer token, each pair alike

The same pairs in the same order as DPO's; the rejected side is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from mmalign.config import Settings
from mmalign.method import Metrics, OneLoss
from vlm.conversations import Conversation
from vlm.parts import Pair, PairBatch, Parts
from vlm.scores import Scores, averaged

REFERENCE = False


class Options(Settings):
    """No keys in the recipe's `method` section but the name."""


class FineTuning(OneLoss):
    """See the module's docstring."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def views(self, pair: Pair) -> Mapping[str, Conversation]:
        return {"chosen": pair.chosen}

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        scores = Scores(self._parts, batch, ("chosen",))
        policy = scores.policy()[0]
        yield -averaged(policy, scores.counts).mean(), {"logps/chosen": policy.detach().mean()}


def build(options: Options, parts: Parts) -> FineTuning:
    """The method, from the trainer's parts."""
    return FineTuning(parts)
