"""Online methods: rounds of rollouts, and updates on their steps with one step's graph alive at a time.

    round r:  prompts -> B pictures each -> rewards                          (policy as it is at the round's start)
    updates:  for every update its share of the prompts, for every trained step of their pictures a forward and backward

A method's loss depends on the policy through the steps' log-ratios rho_it = log pi - log pi_ref alone. Where it is a
sum over steps each step's part is backpropagated by itself. Where it is not (PRDP squares a mean over steps), its value
and G_it = d loss / d rho_it come first, without a graph, and then sum_i G_it rho_it step by step: the gradient is
exactly that of the whole graph, and memory does not grow with the number of steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from diffusion.conditioning import Conditioning
from diffusion.kernels import Kernel
from diffusion.parts import Parts
from diffusion.rollout import Guided, Trajectories, step_scores
from mmalign.method import Metrics


@dataclass(frozen=True, slots=True)
class Turn:
    """Whose turn it is: forward number `forward` of update number `update`."""

    update: int
    forward: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Some prompts of a round with their pictures: `images` rows per prompt, prompt by prompt.

    Attributes:
        trajectories: of all rows.
        conditioning: one row per prompt.
        rewards: what the method is taught.
        parts: single rewards, a column each, for comparisons that need all of them.
        advantages: rewards against their prompt's, for policy gradients.
    """

    trajectories: Trajectories
    conditioning: Conditioning
    rewards: Float[Tensor, "prompts images"]
    parts: Float[Tensor, "prompts images terms"]
    advantages: Float[Tensor, "prompts images"]

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def images(self) -> int:
        return self.rewards.shape[1]

    def select(self, prompts: Tensor) -> Groups:
        """Some prompts."""
        rows = (prompts[:, None] * self.images + torch.arange(self.images, device=prompts.device)).flatten()
        return Groups(
            trajectories=self.trajectories.select(rows),
            conditioning=self.conditioning.select(prompts),
            rewards=self.rewards[prompts],
            parts=self.parts[prompts],
            advantages=self.advantages[prompts],
        )

    def pictures(self, of: Int64[Tensor, "prompts kept"]) -> Groups:
        """Some pictures of each prompt."""
        rows = (torch.arange(len(self), device=of.device)[:, None] * self.images + of).flatten()
        return Groups(
            trajectories=self.trajectories.select(rows),
            conditioning=self.conditioning,
            rewards=self.rewards.gather(1, of),
            parts=self.parts.gather(1, of[..., None].expand(-1, -1, self.parts.shape[-1])),
            advantages=self.advantages.gather(1, of),
        )

    def to(self, device: torch.device | str) -> Groups:
        """On a device."""
        return Groups(
            trajectories=self.trajectories.to(device),
            conditioning=self.conditioning.to(device),
            rewards=self.rewards.to(device),
            parts=self.parts.to(device),
            advantages=self.advantages.to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Groups to train on in one forward turn.

    Attributes:
        unmoved: the policy is still the one that drew them, so that its scores are known.
        news: of the round, logged with its first batch and repeated with the others.
    """

    groups: Groups
    unmoved: bool
    news: Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineParts(Parts):
    """What the trainer offers an online method besides.

    Attributes:
        guided: the UNet's answer as it was sampled.
        kernel: the chain's steps.
        rounds: the round of a turn, drawn when its first turn comes.
    """

    guided: Guided
    kernel: Kernel
    rounds: Any


class TrajectoryMethod(ABC):
    """The part of the protocol that is the same for every method that trains on its own rollouts."""

    joint = False  # whether the loss of a prompt is no sum over steps

    def __init__(self, parts: OnlineParts) -> None:
        self._parts = parts

    def describe(self) -> dict[str, str]:
        return dict(self._parts.rounds.describe())

    def batches(self, source: Iterable[Turn]) -> Iterator[Batch]:
        return (self._parts.rounds.batch(turn, self.advantages) for turn in source)

    def passes(self, batch: Batch) -> int:
        return self._parts.kernel.trained

    def state_dict(self) -> dict[str, Any]:
        return dict(self._parts.rounds.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._parts.rounds.load_state_dict(state)

    def losses(self, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
        groups = self.chosen_pictures(batch.groups)
        return self._jointly(groups, batch) if self.joint else self._separately(groups, batch)

    def chosen_pictures(self, groups: Groups) -> Groups:
        """The pictures that are trained on: all of them, unless a method says otherwise."""
        return groups

    def advantages(
        self, rewards: Float[Tensor, "prompts images"], prompts: Sequence[str]
    ) -> Float[Tensor, "prompts images"]:
        """What a method makes of a whole round's rewards, of all processes."""
        return torch.zeros_like(rewards)

    @abstractmethod
    def loss(
        self,
        log_ratios: Float[Tensor, "prompts images steps"],
        old: Float[Tensor, "prompts images steps"],
        groups: Groups,
    ) -> tuple[Float[Tensor, " prompts"], Metrics]:
        """The loss of each prompt, a mean over the given steps.

        Args:
            log_ratios: log pi - log pi_ref; without a reference log pi - log pi_old.
            old: the same under the policy that drew the pictures; without a reference 0.
        """

    # ------------------------------------------------------------------------------------------- step by step

    def _separately(self, groups: Groups, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
        steps = self._parts.kernel.trained
        base, old = self._base(groups), self._old(groups)
        for step in range(steps):
            ratios = self._grouped(base[:, step] - self._now(groups, step), groups)
            loss, metrics = self.loss(ratios[..., None], old[..., step : step + 1], groups)
            yield loss.mean() / steps, {name: value / steps for name, value in {**metrics, **batch.news}.items()}

    def _jointly(self, groups: Groups, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
        steps = self._parts.kernel.trained
        base, old = self._base(groups), self._old(groups)
        ratios = old if batch.unmoved else self._ratios_without_graph(groups, base)
        with torch.enable_grad():
            leaf = ratios.detach().requires_grad_()
            loss, metrics = self.loss(leaf, old, groups)
            value = loss.mean()
            (slope,) = torch.autograd.grad(value, leaf)
        for step in range(steps):
            here = self._grouped(base[:, step] - self._now(groups, step), groups)
            part = (slope[..., step] * here).sum()
            # its value is the loss, its gradient this step's share of the loss's
            yield (
                part - part.detach() + value.detach() / steps,
                {name: number / steps for name, number in {**metrics, **batch.news}.items()},
            )

    def _ratios_without_graph(
        self, groups: Groups, base: Float64[Tensor, "rows steps"]
    ) -> Float[Tensor, "prompts images steps"]:
        with torch.no_grad():
            scores = [base[:, step] - self._now(groups, step) for step in range(self._parts.kernel.trained)]
        return self._grouped(torch.stack(scores, -1), groups)

    def _now(self, groups: Groups, step: int) -> Float64[Tensor, " rows"]:
        parts, rows = self._parts, len(groups.trajectories)
        steps = torch.full((rows,), step, dtype=torch.int64, device=groups.rewards.device)
        repeated = torch.arange(len(groups), device=steps.device).repeat_interleave(groups.images)
        conditioning = groups.conditioning.select(repeated)
        return step_scores(parts.module, parts.guided, parts.kernel, groups.trajectories.states, steps, conditioning)

    def _base(self, groups: Groups) -> Float64[Tensor, "rows steps"]:
        """What the policy's scores are taken from: the reference's, or those of the policy that drew the pictures."""
        ref = groups.trajectories.ref
        return groups.trajectories.old if ref is None else ref

    def _old(self, groups: Groups) -> Float[Tensor, "prompts images steps"]:
        return self._grouped(self._base(groups) - groups.trajectories.old, groups)

    def _grouped(self, rows: Tensor, groups: Groups) -> Tensor:
        return rows.float().view(len(groups), groups.images, *rows.shape[1:])
