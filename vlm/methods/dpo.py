"""DPO (Rafailov et al., NeurIPS 2023, 2305.18290) on answers to pictures.

    r(y) = beta (log p(y | m, x) - log p_ref(y | m, x))           sums over the answer's tokens
    loss = -log sigmoid(r(chosen) - r(rejected))                  Eq. 7, or any loss of the core

Every side is scored under its own pictures, so "this answer for this picture rather than that one" can be said;
`images: chosen` scores both under those of the chosen side, to compare the words of such data alone.

`loss` names the core's: {sigmoid: 1, sft: 1} is RPO's anchored form, {robust: {flip_rate: 0.1}} the provably robust
DPO, {ipo: {tau: 0.1}} with `lengths: mean` TRL's ipo, {length: {alpha: 0.05}} R-DPO.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from mmalign.method import Metrics, OneLoss
from vlm.comparison import Comparison, ComparisonOptions, metrics
from vlm.conversations import Conversation
from vlm.parts import Pair, PairBatch, Parts, under
from vlm.scores import Scores


class Options(ComparisonOptions):
    """Keys of the recipe's `method` section."""

    images: Literal["own", "chosen"] = Field(
        "own", description="the rejected answer beside its own pictures, or beside those of the chosen one"
    )


class DPO(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        self._options, self._parts = options, parts
        self._comparison = Comparison(options)

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        return self._comparison.describe()

    def views(self, pair: Pair) -> Mapping[str, Conversation]:
        rejected = pair.rejected
        if self._options.images == "chosen":
            rejected = under(rejected, pair.chosen.images, "beside the chosen pictures")
        return {"chosen": pair.chosen, "rejected": rejected}

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        scores = Scores(self._parts, batch, ("chosen", "rejected"))
        reference = scores.reference()  # first: no graph is alive while adapters are off
        policy = scores.policy()[0]
        rewards = self._comparison.rewards(policy, reference, scores.counts)
        losses = self._comparison.loss(batch, rewards[0], rewards[1], policy, scores.counts)
        yield losses.mean(), metrics(rewards, policy, reference)


def build(options: Options, parts: Parts) -> DPO:
    """The method, from its options and the trainer's parts."""
    return DPO(options, parts)
