"""ORPO (Hong et al., EMNLP 2024, 2403.07691): fine-tuning with an odds ratio beside it; no reference model.

    loss = NLL(chosen) + beta * -log sigmoid(log odds(chosen) - log odds(rejected))
    odds of p = exp(lp / N), the probability per token; NLL per answer token

TRL and the authors take the NLL over the prompt's tokens too. Here a prompt is not learnt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import Field
from torch import Tensor

from mmalign.config import Settings
from mmalign.losses import accuracy, odds_ratio
from mmalign.method import Metrics, OneLoss
from vlm.conversations import Conversation
from vlm.parts import Pair, PairBatch, Parts
from vlm.scores import Scores, averaged

REFERENCE = False


class Options(Settings):
    """Keys of the recipe's `method` section."""

    beta: float = Field(0.1, gt=0, description="weight of the odds ratio beside the NLL (lambda in the paper)")


class ORPO(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        self._options, self._parts = options, parts

    def views(self, pair: Pair) -> Mapping[str, Conversation]:
        return {"chosen": pair.chosen, "rejected": pair.rejected}

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        scores = Scores(self._parts, batch, ("chosen", "rejected"))
        policy = scores.policy()[0]
        chosen, rejected = averaged(policy, scores.counts)
        losses = -chosen + self._options.beta * odds_ratio(chosen, rejected)
        yield (
            losses.mean(),
            {
                "rewards/chosen": self._options.beta * chosen.detach().mean(),
                "rewards/rejected": self._options.beta * rejected.detach().mean(),
                "rewards/margins": self._options.beta * (chosen - rejected).detach().mean(),
                "rewards/accuracies": accuracy(chosen - rejected).mean(),
                "logps/chosen": policy[0].detach().mean(),
                "logps/rejected": policy[1].detach().mean(),
            },
        )


def build(options: Options, parts: Parts) -> ORPO:
    """The method, from its options and the trainer's parts."""
    return ORPO(options, parts)
