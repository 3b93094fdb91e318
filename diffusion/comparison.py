"""What methods share that compare the denoising errors of two pictures: Diffusion-DPO, and InPO with other noise.

    e(x0) = mean over C, H, W of (target - prediction(x_t, t, prompt))^2          fp32
    r(x0) = -k (e_policy - e_reference)                                           implicit reward
    loss  = -log sigmoid(r(chosen) - r(rejected))                  2311.12908, Eq. 14; or any loss of the core

The method says with which noise and at which timesteps; both sides go through the UNet in one forward.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from diffusion.parts import PairBatch, Parts, pair_metrics
from mmalign.config import Settings
from mmalign.losses import PairTerms, equivalents, implicit_rewards, logit_scale, mean_over_pairs, weighted_sum
from mmalign.method import Metrics


class ComparisonOptions(Settings):
    """The keys that such methods have in common."""

    beta: float = Field(5000.0, gt=0, description="strength of the pull to the reference, in `convention`")
    convention: Literal["mean_half", "mean", "sum"] = Field(
        "mean_half", description="mean_half: the authors' code; mean: diffusers' SD1.5 script; sum: papers"
    )
    loss: dict[str, float | dict[str, float]] = Field(
        {"sigmoid": 1.0}, description="losses of the core and their weights"
    )
    error_space: Literal["native", "epsilon", "x0", "v"] = Field(
        "native", description="what is compared; native is what the model predicts"
    )


class Comparison:
    """From noise to loss; see the module's docstring.

    Raises:
        UserError: a loss or beta that does not exist; in use, a loss that asks for what the pairs do not have.
    """

    def __init__(self, options: ComparisonOptions, parts: Parts) -> None:
        self._options, self._parts = options, parts
        self._scale = logit_scale(options.beta, options.convention, parts.elements)
        self._pair_loss = weighted_sum(options.loss, place="method.loss")

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        same = ", ".join(f"{name} {beta:g}" for name, beta in equivalents(self._scale, self._parts.elements).items())
        return {"logit scale": f"{self._scale:g} on mean errors (beta: {same})"}

    def loss(
        self, batch: PairBatch, noise: Float[Tensor, "rows c h w"], t: Int64[Tensor, " rows"]
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The mean loss of the pairs and its metrics.

        Args:
            noise: what takes each row's latents to x_t.
            t: timestep of each row.
        """
        parts = self._parts
        noisy = parts.schedule.add_noise(batch.latents, noise, t)
        target = parts.schedule.target(batch.latents, noise, t)

        def errors(module: nn.Module) -> Tensor:  # [rows]
            prediction = parts.predict(module, noisy, t, batch.conditioning)
            return parts.schedule.errors(prediction, target, t, space=self._options.error_space)

        reference = parts.reference.score(batch.row_keys, errors)  # first: no graph is alive while adapters are off
        policy = errors(parts.module)
        rewards = implicit_rewards(policy, reference, self._scale)
        chosen, rejected = rewards.chunk(2)
        terms = PairTerms(
            margin=chosen - rejected,
            scale=self._scale,
            confidence=batch.confidence,
            gap=batch.gap,
            chosen_errors=policy.chunk(2)[0],
        )
        loss = mean_over_pairs(self._pair_loss(terms), batch.weights)
        return loss, pair_metrics(rewards, policy, reference)
