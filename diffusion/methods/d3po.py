"""D3PO (Yang et al. 2023, arXiv 2311.13231): PSO's loss on a many-step sampler, both pictures from the same noise.

The differences to `pso` are settings: DDIM with eta 1 and guidance, `rollout.shared_start`, and a smaller beta. With
beta 0.1 and clip 0.1 the largest margin is 0.1 (log 1.1 - log 0.9) = 0.02, so the loss stays near log 2 whatever is
learned: watch the reward. The authors' code clips and weighs as here; ties (their h = 0) have no gradient.
"""

from __future__ import annotations

from pydantic import Field

from diffusion.methods import pso
from diffusion.trajectories import OnlineParts

FEED = "rollouts"


class Options(pso.Options):
    """Keys of the recipe's `method` section."""

    beta: float = Field(0.1, gt=0, description="on log-ratios per element")


def build(options: Options, parts: OnlineParts) -> pso.PairwiseSampleOptimisation:
    """The method, from its options and the trainer's parts."""
    return pso.PairwiseSampleOptimisation(options, parts)
