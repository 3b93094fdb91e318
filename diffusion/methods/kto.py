"""Diffusion-KTO (Li et al., NeurIPS 2024, 2404.04465): pictures that are desirable or not, without pairs.

    e(x0) = mean over C, H, W of (target - prediction(x_t, t, prompt))^2          fp32
    r(x0) = -k (e_policy - e_reference)                                           implicit reward
    loss  = mean of w (1 - U(s (r - z))),  s = 1 if desirable, else -1;  U = sigmoid

Every row of the batch is an item of its own, with its own timestep and noise: the chosen sides are the desirable ones,
the rejected sides the undesirable ones. Data: `data.pairing.strategy: unpaired`.

The authors draw a desirable picture with probability gamma. Here both kinds fill half of every batch, with weights
w = 2 gamma and 2 (1 - gamma): mean(w l) = gamma mean(l of desirable) + (1 - gamma) mean(l of undesirable), which is the
expectation of the sampled loss, with less noise. In z, too, the kinds count as gamma to 1 - gamma.

The baseline z = max(0, mean r) over the items of all processes estimates the KL to the reference, and has no gradient:

    mismatched  r of the same noised pictures with unrelated prompts, as the paper says: that of the pair's other side,
                so that z does not depend on how batches are split. Two more forwards without gradient. Rows whose
                unrelated prompt is the same text, by chance or since both are dropped, do not count
    batch       r of the batch itself, as the authors' code does by default: it pulls the loss towards mean r = 0

z is made anew in every forward: with accumulation it is the mean of one forward, not of the update.

Where else this differs from the authors' code (train_kto_sd_v1.5.py): policy and reference are two models, or one with
its adapter on and off. Theirs swaps the reference's weights into the trained model between its forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from diffusion.conditioning import Conditioning
from diffusion.parts import PairBatch, Parts, draw_timesteps, pair_metrics
from diffusion.schedule import timestep_choices
from mmalign.config import Settings
from mmalign.errors import UserError
from mmalign.losses import (
    equivalents,
    implicit_rewards,
    kto,
    kto_baseline,
    logit_scale,
    mean_across_ranks,
    mean_over_pairs,
)
from mmalign.method import Metrics, OneLoss

FEED = "pairs"
FORWARDS = 6.0  # policy and reference are asked about other prompts too


class Options(Settings):
    """Keys of the recipe's `method` section."""

    beta: float = Field(5000.0, gt=0, description="strength of the pull to the reference, in `convention`")
    convention: Literal["mean_half", "mean", "sum"] = Field(
        "mean", description="mean: the authors' code; mean_half: Diffusion-DPO's; sum: papers"
    )
    desirable_share: float = Field(0.8, gt=0, lt=1, description="gamma: how much of the loss is about desirable items")
    baseline: Literal["mismatched", "batch"] = Field(
        "mismatched", description="z from unrelated prompts as in the paper, or from the batch as in the authors' code"
    )
    utility: Literal["kto", "loss_averse", "risk_seeking"] = Field(
        "kto", description="U; the others are the paper's comparisons"
    )
    error_space: Literal["native", "epsilon", "x0", "v"] = Field(
        "native", description="what is compared; native is what the model predicts"
    )
    timesteps: tuple[int, ...] | None = Field(None, description="the only timesteps to train at; null: all")


class DiffusionKTO(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        if options.baseline == "mismatched" and parts.data is not None and not parts.data.unrelated:
            raise UserError(
                "the two sides of every pair have the same prompt: there are no unrelated ones for the baseline",
                place="data.pairing.strategy",
                fix="Use unpaired, or method.baseline=batch",
            )
        self._choices = timestep_choices(
            parts.schedule, options.timesteps, shared_noise=False, space=options.error_space
        )
        self._options, self._parts = options, parts
        self._scale = logit_scale(options.beta, options.convention, parts.elements)
        self._weights = (2 * options.desirable_share, 2 * (1 - options.desirable_share))

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        same = ", ".join(f"{name} {beta:g}" for name, beta in equivalents(self._scale, self._parts.elements).items())
        good, bad = self._weights
        return {
            "logit scale": f"{self._scale:g} on mean errors (beta: {same})",
            "items": f"2 per pair, weighted {good:g} (desirable) and {bad:g}; baseline {self._options.baseline}",
        }

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        parts, options = self._parts, self._options
        draws = batch.draws("noise")
        t = torch.cat([draw_timesteps(draws, self._choices) for _ in range(2)])  # [rows]
        noise = torch.cat([draws.normal(batch.latents.shape[1:]) for _ in range(2)])
        noisy = parts.schedule.add_noise(batch.latents, noise, t)
        target = parts.schedule.target(batch.latents, noise, t)

        def errors(module: nn.Module, conditioning: Conditioning) -> Tensor:  # [rows]
            prediction = parts.predict(module, noisy, t, conditioning)
            return parts.schedule.errors(prediction, target, t, space=options.error_space)

        own = partial(errors, conditioning=batch.conditioning)
        reference = parts.reference.score(batch.row_keys, own)  # first: no graph is alive while adapters are off
        pairs = len(batch.keys)
        desirable = torch.arange(2 * pairs, device=t.device) < pairs
        good, bad = self._weights
        counts = torch.where(desirable, good, bad)

        if options.baseline == "mismatched":
            prompts, differs = other_prompts(batch.conditioning)
            unrelated = partial(errors, conditioning=prompts)
            keys = [f"{key}:other prompt" for key in batch.row_keys]
            reference_unrelated = parts.reference.score(keys, unrelated)
            with torch.no_grad():
                strayed = implicit_rewards(unrelated(parts.module), reference_unrelated, self._scale)
            baseline = kto_baseline(strayed, partial(mean_across_ranks, weights=counts * differs))
            policy = own(parts.module)
            rewards = implicit_rewards(policy, reference, self._scale)
        else:
            policy = own(parts.module)
            rewards = implicit_rewards(policy, reference, self._scale)
            baseline = kto_baseline(rewards, partial(mean_across_ranks, weights=counts))

        loss = kto(
            rewards,
            desirable,
            baseline,
            desirable_weight=good,
            undesirable_weight=bad,
            utility=options.utility,
        )
        weights = None if batch.weights is None else batch.weights.repeat(2)
        metrics = {**pair_metrics(rewards, policy, reference), "rewards/baseline": baseline}
        yield mean_over_pairs(loss, weights), metrics


def other_prompts(conditioning: Conditioning) -> tuple[Conditioning, Float[Tensor, " rows"]]:
    """Every row with the prompt of its pair's other side, and 1 where that is another text, else 0.

    Sizes stay: they belong to the picture.
    """
    rows = len(conditioning)
    turned = torch.arange(rows, device=conditioning.embeds.device).roll(rows // 2)
    other = conditioning.select(turned).with_time_ids(conditioning.time_ids)
    differs = (other.embeds != conditioning.embeds).flatten(1).any(1)
    return other, differs.float()


def build(options: Options, parts: Parts) -> DiffusionKTO:
    """The method, from its options and the trainer's parts."""
    return DiffusionKTO(options, parts)
