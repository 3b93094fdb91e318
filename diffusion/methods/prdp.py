"""PRDP (Deng et al. 2024, arXiv 2402.08714): the policy's log-ratios are regressed onto differences of rewards.

    rho_it = log pi(x_t-1 | x_t) - log pi_ref(x_t-1 | x_t), mean over C, H, W;   a_i = mean_t rho_it
    loss   = mean over pairs r_i > r_j of max((a_i - a_j - g_ij)^2, (c_i - c_j - g_ij)^2),   g_ij = (r_i - r_j) / beta

with c the same from steps clipped to within `clip` of the policy that drew the pictures; see
`mmalign.losses.proximal_reward_difference`. The square of a mean over steps is no sum over steps: its value and its
derivative by every rho come first, without a graph, and then each step's forward and backward (`trajectories`).

The paper writes a sum over steps (Eq. 19-21) and computes a mean (appendix G); its Table 4 has the betas of the mean.
There is no code by the authors. At those betas the target, 10^2 to 10^3, dwarfs every log-ratio, and the gradient is
that of rewards against each other; only a far larger beta makes the squared distance to the optimum matter.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from diffusion.trajectories import Groups, OnlineParts, TrajectoryMethod
from mmalign.config import Settings
from mmalign.losses import proximal_reward_difference
from mmalign.method import Metrics

FEED = "rollouts"


class Options(Settings):
    """Keys of the recipe's `method` section."""

    beta: float = Field(3e-6, gt=0, description="reward per unit of the reduced log-ratio")
    clip: float = Field(1e-4, gt=0, description="how far a step's log-ratio may move in a round; .inf: no limit")
    over_steps: Literal["mean", "sum"] = Field(
        "mean", description="how steps are reduced: mean as in the paper's code and Table 4, sum as in its equations"
    )


class ProximalRewardDifference(TrajectoryMethod):
    """See the module's docstring."""

    joint = True

    def __init__(self, options: Options, parts: OnlineParts) -> None:
        super().__init__(parts)
        self._options = options

    def loss(
        self,
        log_ratios: Float[Tensor, "prompts images steps"],
        old: Float[Tensor, "prompts images steps"],
        groups: Groups,
    ) -> tuple[Float[Tensor, " prompts"], Metrics]:
        options = self._options
        loss = proximal_reward_difference(
            log_ratios,
            old,
            groups.rewards,
            temperature=options.beta,
            clip=options.clip,
            over_steps=options.over_steps,
        )
        ratios = log_ratios.detach()
        return loss, {
            "ratio/mean_abs": ratios.abs().mean(),
            "ratio/clipped": (ratios - old).abs().gt(options.clip).float().mean(),
            "reward/ratio_correlation": _correlation(ratios.mean(2), groups.rewards),
        }


def _correlation(values: Float[Tensor, "prompts images"], rewards: Float[Tensor, "prompts images"]) -> Tensor:
    """Of log-ratios with rewards inside prompts: 1 would be the optimum at some beta."""
    a, b = values - values.mean(1, keepdim=True), rewards - rewards.mean(1, keepdim=True)
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return (a * b).sum() / scale.clamp(min=1e-30)


def build(options: Options, parts: OnlineParts) -> ProximalRewardDifference:
    """The method, from its options and the trainer's parts."""
    return ProximalRewardDifference(options, parts)
