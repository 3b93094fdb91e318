"""TDPO (Zeng et al., ICML 2024, 2404.11999): DPO that also watches how far the policy drifts at every token.

    r(y) = beta (log p(y | m, x) - log p_ref(y | m, x))
    K(y) = sum over positions t of KL(p_ref(. | m, x, y_<t) || p(. | m, x, y_<t))          over the whole vocabulary

    TDPO1   loss = -log sigmoid(r(y_w) - r(y_l) - beta (K(y_l) - K(y_w)))
    TDPO2   loss = -log sigmoid(r(y_w) - r(y_l) - alpha beta (K(y_l) - sg K(y_w)))         sg: no gradient

Under DPO, the paper finds, K grows faster along rejected answers than along chosen ones. TDPO1 evens that out from both
ends, TDPO2 by holding the rejected end alone. With alpha = 0 TDPO2 is DPO. K is 0, and so is its gradient, where both
models agree: a first step is DPO's.

The reference's distributions are made anew in every update: numbers of the vocabulary's size per token are not cached.
The logged rewards are r, as of every method here; the authors' code (Vance0124/Token-level-Direct-Preference-
Optimization) logs r + beta K.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from mmalign.config import Settings
from mmalign.losses import tdpo1, tdpo2
from mmalign.method import Metrics, OneLoss
from vlm.comparison import metrics
from vlm.conversations import Conversation
from vlm.parts import Pair, PairBatch, Parts
from vlm.scores import Scores, no_cache


class Options(Settings):
    """Keys of the recipe's `method` section."""

    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference, per log-probability")
    form: Literal["tdpo1", "tdpo2"] = Field("tdpo2", description="see the module")
    alpha: float = Field(0.5, ge=0, description="of tdpo2: weight of the difference in divergence")


class TDPO(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        no_cache(parts)
        self._options, self._parts = options, parts

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        options = self._options
        weight = f", alpha {options.alpha:g}" if options.form == "tdpo2" else ""
        return {"loss": f"{options.form}; beta {options.beta:g}{weight}; KL over the vocabulary at every answer token"}

    def views(self, pair: Pair) -> Mapping[str, Conversation]:
        return {"chosen": pair.chosen, "rejected": pair.rejected}

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        options = self._options
        scores = Scores(self._parts, batch, ("chosen", "rejected"))
        policy, reference, kl = (tokens.sum(2) for tokens in scores.compared())
        rewards = options.beta * (policy - reference)
        margin = rewards[0] - rewards[1]
        if options.form == "tdpo1":
            losses = tdpo1(margin, kl[0], kl[1], options.beta)
        else:
            losses = tdpo2(margin, kl[0], kl[1], options.beta, alpha=options.alpha)
        drift = {"kl/chosen": kl[0].detach().mean(), "kl/rejected": kl[1].detach().mean()}
        yield losses.mean(), {**metrics(rewards, policy, reference), **drift}


def build(options: Options, parts: Parts) -> TDPO:
    """The method, from its options and the trainer's parts."""
    return TDPO(options, parts)
