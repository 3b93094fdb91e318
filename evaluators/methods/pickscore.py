"""PickScore's objective (Kirstain et al., NeurIPS 2023, 2305.01569): which of two pictures a prompt's author picked.

    s_i = exp(tau) <text, picture_i>
    loss of a pair = KL(label || softmax(s_1, s_2))                  a tie is (1/2, 1/2) and costs nothing when met
    loss = sum of w loss / items,  w = 1 / n / mean weight           n pairs of the data have the pair's prompt

`in_batch_negatives` averages with finding each picture's own text among those of the batch over all processes, labels
weighting the pictures; texts that say the same are no negatives of one another.

compat `pickscore`, as in the authors' code (trainer/criterions/clip_criterion.py): weights are divided by their sum in
every batch over all processes instead of over the data, which makes a prompt's weight depend on its company; and equal
texts are negatives. There the penalty is on by an option too, off by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from evaluators.training.data import PictureBatch
from evaluators.training.objectives import among_texts, gather, picked
from evaluators.training.parts import Parts, Scores
from mmalign.config import Settings
from mmalign.method import Metrics, OneLoss


class Options(Settings):
    """Keys of the recipe's `method` section."""

    prompt_weights: bool = Field(True, description="every prompt counts the same, however many pairs it has")
    in_batch_negatives: bool = Field(False, description="and its own text must be found among the batch's")
    compat: Literal["none", "pickscore"] = Field("none", description="pickscore: weights as in the authors' code")


class PickScore(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        self._options, self._parts = options, parts

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        said = ["every prompt counts the same" if self._options.prompt_weights else "every pair counts the same"]
        if self._options.in_batch_negatives:
            said.append("other texts of the batch are negatives")
        if self._options.compat != "none":
            said.append(f"compat {self._options.compat}")
        return {"objective": "; ".join(said)}

    def losses(self, batch: PictureBatch) -> Iterator[tuple[Tensor, Metrics]]:
        scores = self._parts.score(batch)
        loss = picked(scores.margin, batch.confidence)
        if self._options.in_batch_negatives:
            loss = (loss + self._negatives(batch, scores)) / 2
        yield self._reduced(batch, loss), scores.metrics(batch)

    def _negatives(self, batch: PictureBatch, scores: Scores) -> Float[Tensor, " pairs"]:
        texts = gather(scores.texts)
        own = batch.owner + _rank() * batch.items
        same = None
        if self._options.compat == "none":
            tokens = gather(batch.tokens)
            same = (tokens[:, None] == tokens[None]).all(-1)
        found = among_texts(scores.pictures, texts, scores.scale, own, same)
        first, second = found[batch.pairs[:, 0]], found[batch.pairs[:, 1]]
        return batch.confidence * first + (1 - batch.confidence) * second

    def _reduced(self, batch: PictureBatch, loss: Float[Tensor, " pairs"]) -> Float[Tensor, ""]:
        if self._options.compat == "none":
            return (self._parts.pair_weights(batch, self._options.prompt_weights) * loss).sum() / batch.items
        weights = 1 / batch.counts if self._options.prompt_weights else torch.ones_like(batch.counts)
        total, world = weights.sum(), 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
            world = dist.get_world_size()  # gradients are averaged over processes, and this is a sum
        return world * (weights * loss).sum() / total


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def build(options: Options, parts: Parts) -> PickScore:
    """The method, from its options and the trainer's parts."""
    return PickScore(options, parts)
