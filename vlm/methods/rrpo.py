"""RRPO (Sarkar & Etemad, NeurIPS 2025, 2504.12083): rewards where two answers differ, and a tether to the reference.

    d(y)  = sum over tokens of y's differing phrases of log p(token) - log p_ref(token)
    K     = sum over positions t of y_w of KL(p_ref(. | m, x, y_<t) || p(. | m, x, y_<t))    over the whole vocabulary
    loss  = -log sigmoid(beta (d(y_w) - d(y_l))) + alpha K

What both answers say is neither pushed up nor down; K keeps all of the chosen answer where the reference has it. With
every token differing and alpha = 0 it is DPO.

The data names no phrases: they are found by aligning the answers' tokens (`difflib`), and whatever is not in a block of
at least `agreement` tokens common to both belongs to a phrase. Words that only one answer has, such as an invented
thing in a list, are a phrase of that answer.

Where this differs from the authors' code (pritamqu/RRPO): for LLaVA-Video their data marks the phrases; for VideoChat2
theirs aligns tokens too, with an agreement of 1 as here, but drops phrases that only one answer has, and in answers of
200 tokens and more lets frequent tokens align with nothing. Which phrase belongs to which makes no difference: only
their sum enters.

The reference's distributions are made anew in every update: numbers of the vocabulary's size per token are not cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmalign.config import Settings
from mmalign.errors import UserError
from mmalign.losses import rrpo
from mmalign.method import Metrics, OneLoss
from vlm.comparison import metrics
from vlm.conversations import Conversation
from vlm.parts import Pair, PairBatch, Parts, under
from vlm.scores import Scores, no_cache


class Options(Settings):
    """Keys of the recipe's `method` section."""

    beta: float = Field(
        0.1, gt=0, description="scale of the differing tokens' log-ratios; the authors' runs have 0.1 to 0.5"
    )
    alpha: float = Field(0.01, ge=0, description="weight of the divergence from the reference; theirs 0.01 to 0.1")
    agreement: int = Field(1, ge=1, description="tokens in a row that both answers must have to count as the same")


class RRPO(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        no_cache(parts)
        self._options, self._parts = options, parts

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        options = self._options
        tether = f"{options.alpha:g} x KL over the vocabulary at every token of the chosen answer"
        return {"loss": f"sigmoid; beta {options.beta:g} on sums over differing answer tokens, and {tether}"}

    def views(self, pair: Pair) -> Mapping[str, Conversation]:
        if pair.chosen.answer == pair.rejected.answer:
            raise UserError(
                "both answers have the same words, and RRPO learns from words that differ",
                place=pair.chosen.place,
                fix="Leave such pairs out, or compare their pictures with method.name=dpo",
            )
        return {
            "chosen": pair.chosen,
            "rejected": under(pair.rejected, pair.chosen.images, "beside the chosen pictures"),
        }

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        options = self._options
        scores = Scores(self._parts, batch, ("chosen", "rejected"))
        policy, reference, kl = scores.compared()
        counting = differing(batch, options.agreement).to(batch.device)
        rewards = options.beta * ((policy - reference) * counting).sum(2)
        drift = kl.sum(2)[0]
        losses = rrpo(rewards[0] - rewards[1], drift, alpha=options.alpha)
        usual = metrics(rewards, policy.sum(2), reference.sum(2))
        yield losses.mean(), {**usual, "kl/chosen": drift.detach().mean()}


def differing(batch: PairBatch, agreement: int) -> Bool[Tensor, "2 pairs answer"]:
    """Which answer tokens of the chosen and of the rejected rows are in phrases that differ; False on padding."""
    said = ([row.ids[row.completion].tolist() for row in batch.views[view]] for view in ("chosen", "rejected"))
    marks = [phrases(chosen, rejected, agreement) for chosen, rejected in zip(*said, strict=True)]
    rows = [torch.tensor(marked) for side in zip(*marks, strict=True) for marked in side]
    return pad_sequence(rows, batch_first=True).view(2, len(batch), -1)


def phrases(chosen: Sequence[int], rejected: Sequence[int], agreement: int) -> tuple[list[bool], list[bool]]:
    """For every token of each answer, whether it is outside all blocks of `agreement` or more that both have in order.

    Args:
        agreement: shorter blocks do not count: between two phrases, a lone "a" belongs to them.
    """
    marks = [True] * len(chosen), [True] * len(rejected)
    for a, b, size in SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks():
        if size >= agreement:
            marks[0][a : a + size] = marks[1][b : b + size] = [False] * size
    return marks


def build(options: Options, parts: Parts) -> RRPO:
    """The method, from its options and the trainer's parts."""
    return RRPO(options, parts)
