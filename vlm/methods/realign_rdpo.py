"""Re-Align's retrieval-augmented DPO (Xing et al., EMNLP 2025, 2502.13146), which is not the provably robust DPO.

    loss = -log sigmoid(r(y_w | m) - r(y_l | m)) - w log sigmoid(r(y_w | m) - r(y_w | m_l))

m_l is the retrieved picture that the rejected answer was filled in from: the rejected side's picture in the data. The
first term compares words beside one picture, the second pictures under one answer: a pair whose sides differ in both
is compared slot by slot.

Where this differs from the authors' code (taco-group/Re-Align, rDPOtrainer.py), which `compat: authors` follows: theirs
scores neither y_l in the first term nor y_w in the second. Both take the model's own likeliest token that is not the
label at every position, each of policy and reference its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mmalign.errors import UserError
from mmalign.losses import sigmoid
from mmalign.method import Metrics, OneLoss
from vlm.comparison import Comparison, ComparisonOptions, metrics
from vlm.conversations import Conversation
from vlm.parts import Pair, PairBatch, Parts, under
from vlm.scores import Scores


class Options(ComparisonOptions):
    """Keys of the recipe's `method` section."""

    picture_weight: float = Field(1.0, ge=0, description="w, of the term on pictures")
    compat: Literal["authors"] | None = Field(
        None, description="authors: the released code, which scores the likeliest other tokens instead of the data's"
    )


class RetrievalDPO(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        if options.compat and not parts.exact_reference:
            raise UserError(
                "with compat=authors the reference is asked about tokens of its own, which its cache does not keep",
                place="reference.cache",
                fix="Set reference.cache=null",
            )
        self._options, self._parts = options, parts
        self._comparison = Comparison(options)

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        return self._comparison.describe()

    def views(self, pair: Pair) -> Mapping[str, Conversation]:
        mine, theirs = pair.chosen.images, pair.rejected.images
        if len(mine) != len(theirs) or not mine:
            raise UserError(
                f"{len(mine)} pictures on the chosen side and {len(theirs)} on the rejected",
                place=pair.chosen.place,
                fix="Retrieved pictures stand in for the chosen side's, one for one",
            )
        return {
            "chosen": pair.chosen,
            "rejected": under(pair.rejected, mine, "beside the chosen pictures"),
            "retrieved": under(pair.chosen, theirs, "beside the retrieved picture"),
        }

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        scores = Scores(self._parts, batch, ("chosen", "rejected", "retrieved"))
        if self._options.compat:
            reference = _with_others(scores.reference_also("strongest other"))
            policy = _with_others(scores.policy("strongest other"))
        else:
            reference, policy = scores.reference(), scores.policy()[0]
        rewards = self._comparison.rewards(policy, reference, scores.counts)
        words = self._comparison.loss(batch, rewards[0], rewards[1], policy, scores.counts)
        margin = rewards[0] - rewards[2]
        losses = words + self._options.picture_weight * sigmoid(margin)
        seen = margin.detach().mean()
        yield losses.mean(), {**metrics(rewards, policy, reference), "rewards/picture_margins": seen}


def _with_others(kinds: Tensor) -> Tensor:
    """[views, pairs]: the chosen answer's own log-probs, those of other tokens for the rest."""
    own, others = kinds
    return torch.cat([own[:1], others[1:]])


def build(options: Options, parts: Parts) -> RetrievalDPO:
    """The method, from its options and the trainer's parts."""
    return RetrievalDPO(options, parts)
