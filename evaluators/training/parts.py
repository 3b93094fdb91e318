"""What the trainer offers a scorer's method: the model behind its wrapper, and the weights of pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from evaluators.training.data import PictureBatch
from mmalign.method import reward_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Of a batch.

    Attributes:
        scores: of each picture for its prompt, in nats.
        texts, pictures: unit vectors.
        scale: exp(logit_scale).
        margin: of each pair, the preferred picture's score minus the other's.
    """

    scores: Float[Tensor, " pictures"]
    texts: Float[Tensor, "items width"]
    pictures: Float[Tensor, "pictures width"]
    scale: Float[Tensor, ""]
    margin: Float[Tensor, " pairs"]

    def metrics(self, batch: PictureBatch) -> dict[str, Tensor]:
        """Under the field's names; the margins of a scorer need not start at zero, as those of a policy do."""
        first, second = self.scores[batch.pairs[:, 0]], self.scores[batch.pairs[:, 1]]
        named = reward_metrics(first, second)
        return {**{name: named[name] for name in named if name != "rewards/margins_abs"}, "scale": self.scale.detach()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """See the module's docstring.

    Attributes:
        module: the model, prepared for training.
        head: whether the model has one.
        ties: whether there are pairs without a preferred side.
        mean_weight: see `PictureFeed.mean_weight`.
    """

    module: nn.Module
    head: bool
    ties: bool
    mean_weight: Callable[[bool], float]

    def score(self, batch: PictureBatch) -> Scores:
        """The model's scores of a batch."""
        scores, texts, pictures, scale = self.module(batch.tokens, batch.pixels, batch.owner)
        margin = scores[batch.pairs[:, 0]] - scores[batch.pairs[:, 1]]
        return Scores(scores=scores, texts=texts, pictures=pictures, scale=scale, margin=margin)

    def pair_weights(self, batch: PictureBatch, prompt_weights: bool) -> Float[Tensor, " pairs"]:
        """Weights whose sum over a batch is, on average over the data, the number of its items."""
        raw = 1 / batch.counts if prompt_weights else torch.ones_like(batch.counts)
        return raw / self.mean_weight(prompt_weights)
