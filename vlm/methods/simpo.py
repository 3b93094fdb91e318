"""SimPO (Meng et al., NeurIPS 2024, 2405.14734) and CPO (Xu et al., ICML 2024, 2401.08417): no reference model.

    SimPO   loss = -log sigmoid(beta (lp(chosen) / N_chosen - lp(rejected) / N_rejected) - gamma)
    CPO     loss = -log sigmoid(beta (lp(chosen) - lp(rejected))) + NLL of the chosen answer, per token
            `lengths: sum, margin: 0, sft: 1`, and beta as in DPO

`margin` is gamma / beta as in the authors' code (princeton-nlp/SimPO, `gamma_beta_ratio`), a difference of log-probs
per token; TRL's `simpo_gamma` is margin * beta.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import Field
from torch import Tensor

from mmalign.config import Settings
from mmalign.losses import accuracy, sigmoid
from mmalign.method import Metrics, OneLoss
from vlm.comparison import Lengths
from vlm.conversations import Conversation
from vlm.parts import Pair, PairBatch, Parts
from vlm.scores import Scores, averaged

REFERENCE = False


class Options(Settings):
    """Keys of the recipe's `method` section."""

    beta: float = Field(2.0, gt=0, description="scale of the log-probs: 2 to 10 per token, 0.1 for sums")
    margin: float = Field(0.5, ge=0, description="how far the chosen answer must be ahead, in the log-probs' unit")
    lengths: Lengths = Field("mean", description="log-probs averaged over an answer's tokens (SimPO), or summed (CPO)")
    sft: float = Field(0.0, ge=0, description="weight of the chosen answer's NLL per token")


class SimPO(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        self._options, self._parts = options, parts

    def views(self, pair: Pair) -> Mapping[str, Conversation]:
        return {"chosen": pair.chosen, "rejected": pair.rejected}

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        options = self._options
        scores = Scores(self._parts, batch, ("chosen", "rejected"))
        policy = scores.policy()[0]
        means = averaged(policy, scores.counts)
        chosen, rejected = options.beta * (means if options.lengths == "mean" else policy)
        losses = sigmoid(chosen - rejected - options.beta * options.margin)
        if options.sft:
            losses = losses - options.sft * means[0]
        ahead = (chosen - rejected).detach()
        yield (
            losses.mean(),
            {
                "rewards/chosen": chosen.detach().mean(),
                "rewards/rejected": rejected.detach().mean(),
                "rewards/margins": ahead.mean(),
                "rewards/accuracies": accuracy(ahead).mean(),
                "logps/chosen": policy[0].detach().mean(),
                "logps/rejected": policy[1].detach().mean(),
            },
        )


def build(options: Options, parts: Parts) -> SimPO:
    """The method, from its options and the trainer's parts."""
    return SimPO(options, parts)
