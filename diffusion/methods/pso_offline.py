"""Offline PSO (Miao et al., ICLR 2025, 2410.03190): preference pairs for few-step models, at their own timesteps.

    loss = -log sigmoid(-k [(e_w - e_l) - (e_w_ref - e_l_ref)])          k = beta on mean errors (`mean`)

That is Diffusion-DPO with pictures noised to nothing but the timesteps that the model was distilled to, so that it is
compared where it is used. They must be given, as the values that the UNet is told: 249, 499, 749, 999 for SDXL-Turbo,
DMD2 and the embedded four-step model.

The losers are the rejected pictures of any store, or, to teach a style or a concept, the model's own samples beside
target pictures: `candidates.targets` makes such a store.

`compat: authors` is the released code (train_pso_sdxl_turbo_dreambooth.py), k = beta, 5 in all its scripts:

    pso       -log sigmoid(-k [d - d_ref]) + p e_l      d = e_w - f e_l, with f = 0.1 and p = 0.5
    pso_db    max(0, 1 + k d) + p e_l                   no reference; what all the scripts use

With their k f = p the loser's error cancels out of pso_db wherever the hinge is active, which it always is for errors
below 2: 1 + 5 e_w is left, fine-tuning on the targets. Here losers count as much as winners. Their timesteps are places
in a falling list, so that 249, 499, 749, 999 select 750, 500, 250 and 0: for their training, give those.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffusion.comparison import ComparisonOptions
from diffusion.methods import dpo
from diffusion.parts import PairBatch, Parts, draw_timesteps, pair_metrics
from diffusion.schedule import timestep_choices
from mmalign.errors import UserError
from mmalign.losses import equivalents, hinge, implicit_rewards, logit_scale, mean_over_pairs, sigmoid
from mmalign.method import Metrics, OneLoss

FEED = "pairs"
AUTHORS_BETA = 5.0


class Options(ComparisonOptions):
    """Keys of the recipe's `method` section."""

    beta: float = Field(2500.0, gt=0, description="strength of the pull to the reference; with compat 5 unless given")
    convention: Literal["mean_half", "mean", "sum"] = Field(
        "mean", description="mean: the authors' code; mean_half: Diffusion-DPO's; sum: papers"
    )
    shared_noise: bool = Field(True, description="the same noise on both sides of a pair")
    timesteps: tuple[int, ...] | None = Field(None, description="that the model was distilled to; must be given")
    compat: Literal["authors"] | None = Field(None, description="authors: the released code's losses")
    formula: Literal["pso", "pso_db"] = Field("pso_db", description="of compat: the released code's loss_type")
    negative_factor: float = Field(0.1, ge=0, description="of compat: f, how much the loser counts in d")
    prior_weight: float = Field(0.5, ge=0, description="of compat: p, of the loser's own error")

    @model_validator(mode="after")
    def _fits_compat(self) -> Options:
        of_compat = {"formula", "negative_factor", "prior_weight"} & self.model_fields_set
        if self.compat is None and of_compat:
            raise ValueError(f"{', '.join(sorted(of_compat))}: only with compat=authors")
        if self.compat is not None and "loss" in self.model_fields_set:
            raise ValueError("compat=authors has losses of its own; leave out loss")
        return self

    @property
    def strength(self) -> float:
        """beta, or the authors' where compat is asked for and no other is given."""
        return AUTHORS_BETA if self.compat and "beta" not in self.model_fields_set else self.beta


class OfflinePSO(dpo.DiffusionDPO):
    """Diffusion-DPO at the distilled timesteps; see the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        distilled(options, parts)
        shared = {name: getattr(options, name) for name in dpo.Options.model_fields}
        super().__init__(dpo.Options(**shared), parts)
        self._timesteps = options.timesteps

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        return {**super().describe(), **_timesteps(self._timesteps)}


class AuthorsPSO(OneLoss):
    """The released losses; see the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        self._choices = distilled(options, parts)
        self._options, self._parts = options, parts
        self._scale = logit_scale(options.strength, options.convention, parts.elements)

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        options = self._options
        same = ", ".join(f"{name} {beta:g}" for name, beta in equivalents(self._scale, self._parts.elements).items())
        return {
            "logit scale": f"{self._scale:g} on mean errors (beta: {same})",
            "compat": f"{options.formula}, loser counts {options.negative_factor:g}, prior {options.prior_weight:g}",
            **_timesteps(options.timesteps),
        }

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        parts, options = self._parts, self._options
        draws = batch.draws("noise")
        t = draw_timesteps(draws, self._choices).repeat(2)  # [rows]
        shape = batch.latents.shape[1:]
        noise = draws.normal(shape)
        noise = torch.cat([noise, noise if options.shared_noise else draws.normal(shape)])
        noisy = parts.schedule.add_noise(batch.latents, noise, t)
        target = parts.schedule.target(batch.latents, noise, t)

        def errors(module: nn.Module) -> Tensor:  # [rows]
            prediction = parts.predict(module, noisy, t, batch.conditioning)
            return parts.schedule.errors(prediction, target, t, space=options.error_space)

        reference = parts.reference.score(batch.row_keys, errors) if options.formula == "pso" else None
        policy = errors(parts.module)
        loss = authors_loss(
            policy,
            reference,
            scale=self._scale,
            negative_factor=options.negative_factor,
            prior_weight=options.prior_weight,
        )
        metrics: dict[str, Tensor] = {}
        if reference is None:
            for name, value in zip(("errors/chosen", "errors/rejected"), policy.detach().chunk(2), strict=True):
                metrics[name] = value.mean()
        else:
            chosen, rejected = implicit_rewards(policy, reference, self._scale).chunk(2)
            rewards = torch.cat([chosen, options.negative_factor * rejected])
            metrics = pair_metrics(rewards, policy, reference)
        yield mean_over_pairs(loss, batch.weights), metrics


def authors_loss(
    errors: Float[Tensor, " rows"],
    reference: Float[Tensor, " rows"] | None,
    *,
    scale: float,
    negative_factor: float,
    prior_weight: float,
) -> Float[Tensor, " pairs"]:
    """The released losses per pair: `pso`, or without a reference `pso_db`.

    Args:
        errors: mean squared errors of the policy, chosen rows first, then the rejected ones.
        reference: of the same rows by the reference.
        scale: k.
        negative_factor: f.
        prior_weight: p.
    """
    chosen, rejected = errors.chunk(2)
    if reference is None:
        loss = hinge(-scale * (chosen - negative_factor * rejected))
    else:
        chosen_reward, rejected_reward = implicit_rewards(errors, reference, scale).chunk(2)
        loss = sigmoid(chosen_reward - negative_factor * rejected_reward)
    return loss + prior_weight * rejected


def distilled(options: Options, parts: Parts) -> Int64[Tensor, " choices"]:
    """The timesteps that the model was distilled to.

    Raises:
        UserError: they are not given, do not exist, or teach nothing.
    """
    if options.timesteps is None:
        raise UserError(
            "the timesteps that this model was distilled to are not known",
            place="method.timesteps",
            fix="Give those that it samples at, say [249, 499, 749, 999] for SDXL-Turbo or DMD2 in four steps",
        )
    return timestep_choices(
        parts.schedule, options.timesteps, shared_noise=options.shared_noise, space=options.error_space
    )


def _timesteps(timesteps: tuple[int, ...] | None) -> dict[str, str]:
    return {"timesteps": ", ".join(map(str, timesteps or ()))}


def build(options: Options, parts: Parts) -> OfflinePSO | AuthorsPSO:
    """The method, from its options and the trainer's parts."""
    return OfflinePSO(options, parts) if options.compat is None else AuthorsPSO(options, parts)
