"""PSO, online (Miao et al. 2024, arXiv 2410.03190): pairwise sample optimisation of few-step models.

Two pictures of a prompt are drawn with the model's own stochastic few-step sampler and scored. Every stochastic step of
both trajectories is trained on, against the model as it was:

    rho_t = log pi(x_t-1 | x_t) - log pi_ref(x_t-1 | x_t), mean over C, H, W
    loss  = mean over pairs and steps of -log sigmoid(beta (log clip(e^rho_t^w) - log clip(e^rho_t^l))),  clip to 1 +- c

The model is never asked for anything but its own steps, so it stays a few-step model; noising pictures to all
timesteps, as Diffusion-DPO does, unlearns the shortcut. With several rewards the chosen picture is the one with the
larger weighted sum, or the one that is nowhere worse (`compare: dominance`). Ties have no gradient.

The authors' Turbo code trains a tie towards the second picture and compares by a reward drawn anew at every step; their
DMD2 code draws one step noise for a whole batch and takes log-probabilities in fp16. None of it is kept. With more than
two pictures per prompt the best and the worst make the pair.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from diffusion.trajectories import Groups, OnlineParts, TrajectoryMethod
from mmalign.config import Settings
from mmalign.errors import UserError
from mmalign.losses import accuracy, clipped_log_ratio, dominance, step_preference
from mmalign.method import Metrics

FEED = "rollouts"


class Options(Settings):
    """Keys of the recipe's `method` section."""

    beta: float = Field(50.0, gt=0, description="on log-ratios per element")
    clip: float = Field(0.1, gt=0, lt=1, description="a step's ratio has no gradient outside 1 +- this")
    compare: Literal["sum", "dominance"] = Field(
        "sum", description="chosen by the weighted sum of rewards, or by being nowhere worse and somewhere better"
    )


class PairwiseSampleOptimisation(TrajectoryMethod):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: OnlineParts) -> None:
        super().__init__(parts)
        self._options = options
        if options.compare == "dominance" and parts.rounds.images != 2:
            raise UserError(
                f"dominance compares two pictures, not {parts.rounds.images}",
                place="method.compare",
                fix="Set rollout.per_prompt=2 or method.compare=sum.",
            )

    def chosen_pictures(self, groups: Groups) -> Groups:
        """The pair of each prompt: best and worst, in this order."""
        worst = groups.images - 1 - groups.rewards.flip(1).argmin(1)  # the last of the worst: another one than the best
        return groups.pictures(torch.stack([groups.rewards.argmax(1), worst], dim=1))

    def loss(
        self,
        log_ratios: Float[Tensor, "prompts 2 steps"],
        old: Float[Tensor, "prompts 2 steps"],
        groups: Groups,
    ) -> tuple[Float[Tensor, " prompts"], Metrics]:
        beta, clip = self._options.beta, self._options.clip
        sign = self._preferred(groups)[:, None]  # +1, -1 where dominance says the other one, 0 for ties
        first, second = log_ratios.unbind(1)
        loss = step_preference(sign * first, sign * second, beta=beta, clip=clip)
        rewards = beta * clipped_log_ratio(log_ratios.detach(), clip)
        margin = sign * (rewards[:, 0] - rewards[:, 1])
        right = accuracy(margin.flatten()).view_as(margin).mean(1) * sign[:, 0].abs()
        return loss.mean(1), {
            "rewards/chosen": rewards[:, 0].mean(),
            "rewards/rejected": rewards[:, 1].mean(),
            "rewards/margins": margin.mean(),
            "rewards/margins_abs": margin.abs().mean(),
            "rewards/accuracies": right.sum() / sign.abs().sum().clamp(min=1),
            "ratio/clipped": (log_ratios.detach().exp() - 1).abs().gt(clip).float().mean(),
            "pairs/tied": 1 - sign.abs().mean(),
        }

    def _preferred(self, groups: Groups) -> Float[Tensor, " prompts"]:
        if self._options.compare == "dominance":
            return dominance(groups.parts[:, 0], groups.parts[:, 1])
        return torch.sign(groups.rewards[:, 0] - groups.rewards[:, 1])


def build(options: Options, parts: OnlineParts) -> PairwiseSampleOptimisation:
    """The method, from its options and the trainer's parts."""
    return PairwiseSampleOptimisation(options, parts)
