"""DDPO (Black et al. 2023, arXiv 2305.13301): the policy gradient on denoising steps that PRDP is published against.

    r_t  = exp(log pi(x_t-1 | x_t) - log pi_old(x_t-1 | x_t)), mean over C, H, W
    loss = mean over pictures and steps of max(-A r_t, -A clip(r_t, 1 - c, 1 + c))

A is the reward against the last rewards of the same prompt where there are `min_count` of them, against the round
otherwise (the authors' statistics), or against the prompt's other pictures of this round; cut to +-`max_advantage`. The
ratio is that of per-element densities, as in the authors' code: their clip 1e-4 belongs to it. There is no reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from diffusion.trajectories import Groups, OnlineParts, TrajectoryMethod
from mmalign.config import Settings
from mmalign.losses import advantages, policy_gradient
from mmalign.method import Metrics

FEED = "rollouts"
REFERENCE = False  # its loss compares with the policy that drew the pictures


class Options(Settings):
    """Keys of the recipe's `method` section."""

    clip: float = Field(1e-4, gt=0, description="half-width of the trust region of a step's ratio")
    max_advantage: float = Field(5.0, gt=0, description="advantages are cut to this size")
    baseline: Literal["history", "group"] = Field(
        "history", description="history: the prompt's last rewards, else the round; group: the prompt's pictures now"
    )
    history: int = Field(16, gt=1, description="rewards kept per prompt")
    min_count: int = Field(16, gt=1, description="rewards a prompt needs before its own statistics are used")


class PolicyGradient(TrajectoryMethod):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: OnlineParts) -> None:
        super().__init__(parts)
        self._options = options
        self._history: dict[str, list[float]] = {}

    def advantages(
        self, rewards: Float[Tensor, "prompts images"], prompts: Sequence[str]
    ) -> Float[Tensor, "prompts images"]:
        if self._options.baseline == "group":
            return advantages(rewards)
        for prompt, row in zip(prompts, rewards.tolist(), strict=True):
            self._history[prompt] = [*self._history.get(prompt, []), *row][-self._options.history :]
        everyone = advantages(rewards.flatten()[None])[0].view_as(rewards)
        rows = []
        for prompt, row, fallback in zip(prompts, rewards, everyone, strict=True):
            past = torch.tensor(self._history[prompt])
            enough = len(past) >= self._options.min_count
            rows.append((row - past.mean()) / (past.std(correction=0) + 1e-6) if enough else fallback)
        return torch.stack(rows)

    def loss(
        self,
        log_ratios: Float[Tensor, "prompts images steps"],
        old: Float[Tensor, "prompts images steps"],
        groups: Groups,
    ) -> tuple[Float[Tensor, " prompts"], Metrics]:
        limit, clip = self._options.max_advantage, self._options.clip
        weights = groups.advantages.clamp(-limit, limit)[..., None].expand_as(log_ratios)
        loss = policy_gradient(log_ratios, weights, clip=clip).mean((1, 2))
        return loss, {
            "ratio/mean_abs": log_ratios.detach().abs().mean(),
            "ratio/clipped": (log_ratios.detach().exp() - 1).abs().gt(clip).float().mean(),
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "history": dict(self._history)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._history = {prompt: list(past) for prompt, past in state["history"].items()}


def build(options: Options, parts: OnlineParts) -> PolicyGradient:
    """The method, from its options and the trainer's parts."""
    return PolicyGradient(options, parts)
