"""What methods share that compare the log-probabilities of two answers: rewards, margins, losses of the core, metrics.

    r(view) = beta (lp_policy(view) - lp_reference(view))            implicit reward
    h       = r(chosen) - r(rejected)                                margin
    loss    = -log sigmoid(h), or any weighted sum of the core's pairwise losses

Sums over answer tokens by default (DPO); averages per token by name (TRL's `ipo` and `sigmoid_norm`).
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from mmalign.config import Settings
from mmalign.losses import PairTerms, weighted_sum
from mmalign.method import reward_metrics
from vlm.parts import PairBatch
from vlm.scores import averaged

Lengths = Literal["sum", "mean"]


class ComparisonOptions(Settings):
    """The keys that such methods have in common."""

    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference, per log-probability")
    loss: dict[str, float | dict[str, float]] = Field(
        {"sigmoid": 1.0}, description="losses of the core and their weights; sft anchors on the chosen answer"
    )
    lengths: Lengths = Field("sum", description="log-ratios summed over an answer's tokens, or averaged")


class Comparison:
    """From log-probabilities to loss; see the module's docstring.

    Raises:
        UserError: a loss that does not exist; in use, one that asks for what the pairs do not have.
    """

    def __init__(self, options: ComparisonOptions) -> None:
        self._options = options
        self._pair_loss = weighted_sum(options.loss, place="method.loss")

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        losses = ", ".join(f"{name} {weight}" for name, weight in self._options.loss.items())
        return {"loss": f"{losses}; beta {self._options.beta:g} on {self._options.lengths}s over answer tokens"}

    def rewards(
        self,
        policy: Float[Tensor, "views pairs"],
        reference: Float[Tensor, "views pairs"],
        counts: Int64[Tensor, "views pairs"],
    ) -> Float[Tensor, "views pairs"]:
        """r of every view."""
        ratios = policy - reference
        return self._options.beta * (averaged(ratios, counts) if self._options.lengths == "mean" else ratios)

    def loss(
        self,
        batch: PairBatch,
        chosen: Float[Tensor, " pairs"],
        rejected: Float[Tensor, " pairs"],
        policy: Float[Tensor, "views pairs"],
        counts: Int64[Tensor, "views pairs"],
    ) -> Float[Tensor, " pairs"]:
        """Losses of the pairs from two rewards.

        Args:
            policy, counts: of the views, of which the first is the chosen answer and the second the rejected.
        """
        terms = PairTerms(
            margin=chosen - rejected,
            scale=self._options.beta,
            confidence=batch.confidence,
            gap=batch.gap,
            chosen_errors=-policy[0] / counts[0],
            longer=(counts[0] - counts[1]).to(policy.dtype),
        )
        return self._pair_loss(terms)


def metrics(
    rewards: Float[Tensor, "views pairs"], policy: Float[Tensor, "views pairs"], reference: Float[Tensor, "views pairs"]
) -> dict[str, Tensor]:
    """The logged means; the views begin with chosen and rejected."""
    return {
        **reward_metrics(rewards[0], rewards[1]),
        "logps/chosen": policy[0].detach().mean(),
        "logps/rejected": policy[1].detach().mean(),
        "logps/ref_chosen": reference[0].mean(),
        "logps/ref_rejected": reference[1].mean(),
    }
