"""PickScore's objective (Kirstain et al., NeurIPS 2023, 2305.01569): which of two pictures a prompt's author picked.

    s_i = exp(tau) <text, picture_i>
    loss of a pair = KL(label || softmax(s_1, s_2))                  a tie is (1/2, 1/2) and costs nothing when met
    loss = sum of w loss / items,  w = 1 / n / mean weight           n pairs of the data have the pair's prompt

With `in_batch_negatives` the text looks for the preferred picture among the pair and all pictures of other prompts in
the batch, over all processes; each picture looks for its text among theirs; and the two are averaged:

    loss of a pair = (sum over i of p_i [ce(text -> picture_i) + ce(picture_i -> text)] - entropy of p) / 2

compat `pickscore`, as in the authors' code (trainer/criterions/clip_criterion.py): weights are divided by their sum in
every batch over all processes instead of over the data, which makes a prompt's weight depend on its company; and
pictures and texts of equal prompts are negatives of one another.
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
from evaluators.training.objectives import among, gather, picked
from evaluators.training.parts import Parts, Scores
from mmalign.config import Settings
from mmalign.errors import UserError
from mmalign.method import Metrics, OneLoss


class Options(Settings):
    """Keys of the recipe's `method` section."""

    prompt_weights: bool = Field(True, description="every prompt counts the same, however many pairs it has")
    in_batch_negatives: bool = Field(False, description="other prompts of the batch count: see the file's head")
    compat: Literal["none", "pickscore"] = Field("none", description="pickscore: weights as in the authors' code")


class PickScore(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        if options.in_batch_negatives and parts.head:
            raise UserError(
                "in-batch negatives compare vectors, and a head is none of them",
                place="method.in_batch_negatives",
                fix="Leave out model.head.",
            )
        self._options, self._parts = options, parts

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        said = ["every prompt counts the same" if self._options.prompt_weights else "every pair counts the same"]
        if self._options.in_batch_negatives:
            said.append("other prompts of the batch are negatives")
        if self._options.compat != "none":
            said.append(f"compat {self._options.compat}")
        return {"objective": "; ".join(said)}

    def losses(self, batch: PictureBatch) -> Iterator[tuple[Tensor, Metrics]]:
        scores = self._parts.score(batch)
        if self._options.in_batch_negatives:
            loss = self._among_all(batch, scores)
        else:
            loss = picked(scores.margin, batch.confidence)
        yield self._reduced(batch, loss), scores.metrics(batch)

    def _among_all(self, batch: PictureBatch, scores: Scores) -> Float[Tensor, " pairs"]:
        texts, first_text = gather(scores.texts)
        pictures, first_picture = gather(scores.pictures)
        owner, pairs = batch.owner + first_text, batch.pairs + first_picture
        asked = owner[batch.pairs[:, 0]]  # the text of each pair
        other_texts = other_pictures = None
        if self._options.compat == "none":
            tokens = gather(batch.tokens)[0]
            same = (tokens[:, None] == tokens[None]).all(-1)
            other_texts = same[owner].scatter(1, owner[:, None], False)
            other_pictures = same[asked][:, gather(owner)[0]].scatter(1, pairs, False)
        of_picture = among(scores.pictures, texts, scores.scale, owner, other_texts)
        loss = torch.zeros_like(batch.confidence)
        for side, weight in ((0, batch.confidence), (1, 1 - batch.confidence)):
            of_text = among(texts[asked], pictures, scores.scale, pairs[:, side], other_pictures)
            loss = loss + weight * (of_text + of_picture[batch.pairs[:, side]]) + torch.xlogy(weight, weight)
        return loss / 2

    def _reduced(self, batch: PictureBatch, loss: Float[Tensor, " pairs"]) -> Float[Tensor, ""]:
        if self._options.compat == "none":
            return (self._parts.pair_weights(batch, self._options.prompt_weights) * loss).sum() / batch.items
        weights = 1 / batch.counts if self._options.prompt_weights else torch.ones_like(batch.counts)
        total, world = weights.sum(), 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
            world = dist.get_world_size()  # gradients are averaged over processes, and this is a sum
        return world * (weights * loss).sum() / total


def build(options: Options, parts: Parts) -> PickScore:
    """The method, from its options and the trainer's parts."""
    return PickScore(options, parts)
