"""Bradley and Terry's model on a scorer: any pairwise loss of the core, whose margin is the difference of two scores.

    loss = sum of w l(s_chosen - s_rejected) / items            l = -log sigmoid by default

With `data.items: prompts` and `data.pairing.strategy: all` that is ImageReward's objective, every (better, worse) pair
of a ranking with each picture embedded once (Xu et al. 2304.05977, train/src/train.py). `loss` names the core's losses
as everywhere: {soft: 1} for unsure labels and ties, {conservative: {flip_rate: 0.1}}, {robust: {flip_rate: 0.1}}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from evaluators.training.data import PictureBatch
from evaluators.training.parts import Parts
from mmalign.config import Settings
from mmalign.losses import PairTerms, require_fairness_to_ties, weighted_sum
from mmalign.method import Metrics, OneLoss


class Options(Settings):
    """Keys of the recipe's `method` section."""

    loss: Mapping[str, Any] = Field(default={"sigmoid": 1.0}, description="losses of the core with their weights")
    prompt_weights: bool = Field(False, description="every prompt counts the same, however many pairs it has")


class BradleyTerry(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        self._options, self._parts = options, parts
        self._loss = weighted_sum(options.loss, place="method.loss")
        if parts.ties:
            require_fairness_to_ties(options.loss)

    def losses(self, batch: PictureBatch) -> Iterator[tuple[Tensor, Metrics]]:
        scores = self._parts.score(batch)
        terms = PairTerms(margin=scores.margin, scale=1.0, confidence=batch.confidence, gap=batch.gap)
        weights = self._parts.pair_weights(batch, self._options.prompt_weights)
        yield (weights * self._loss(terms)).sum() / batch.items, scores.metrics(batch)


def build(options: Options, parts: Parts) -> BradleyTerry:
    """The method, from its options and the trainer's parts."""
    return BradleyTerry(options, parts)
