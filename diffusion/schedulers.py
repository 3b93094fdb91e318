"""Which scheduler draws pictures, and at which timesteps a few-step model was distilled.

A model distilled for n steps knows n timesteps of the T it was trained with: k T / n - 1 for k = n ... 1. SDXL-Turbo
and DMD2 have n = 4: 999, 749, 499, 249. A latent consistency model has n = 50, of which a few, evenly spaced, are
visited: in four steps 999, 759, 499, 259. Schedulers reach that grid in one of two ways:

    LCMScheduler            original_inference_steps = n: visits a part of the grid, and nothing else
    the others              timestep_spacing = trailing: visits the grid when sampling takes n steps

Both are settings of the scheduler's own configuration, so an exported pipeline samples alike in plain diffusers.
"""

from __future__ import annotations

import copy
from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler

from mmalign.errors import UserError

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "lcm": LCMScheduler,
}
CLASSES = {kind.__name__: kind for kind in SCHEDULERS.values()}
UNCLIPPED = ("ddim", "ddpm")  # they clip the picture to [-1, 1] unless told otherwise, and latents are wider


def choose_scheduler(
    own: Any, *, name: str | None = None, prediction_type: str | None = None, distilled_steps: int | None = None
) -> Any:
    """The scheduler to draw with: the pipeline's own, or another kind with the same noise levels.

    Args:
        own: the pipeline's.
        name: one of `SCHEDULERS`; None keeps the kind.
        prediction_type: what the UNet predicts; None: as `own` says.
        distilled_steps: n, see the module's docstring; None leaves the timesteps as they are.

    Raises:
        UserError: n does not divide the timesteps, or this kind of scheduler cannot visit them.
    """
    kind: Any = type(own) if name is None else SCHEDULERS[name]
    changes: dict[str, Any] = {}
    if prediction_type is not None:
        changes["prediction_type"] = prediction_type
    if name in UNCLIPPED:
        changes["clip_sample"] = False
    if distilled_steps is not None:
        place = "model.distilled_steps"
        total = int(own.config["num_train_timesteps"])
        if total % distilled_steps:
            raise UserError(f"{distilled_steps} does not divide the {total} timesteps of training", place=place)
        if kind is LCMScheduler:
            changes["original_inference_steps"] = distilled_steps
        elif "timestep_spacing" in own.config or name is not None:
            changes["timestep_spacing"] = "trailing"
        else:
            cause = f"a {kind.__name__} cannot be told which timesteps to visit"
            raise UserError(cause, place=place, fix="Choose model.scheduler: lcm or euler_ancestral")
    if name is None and not changes:
        return own
    return kind.from_config(own.config, **changes)


def distilled_steps(scheduler: Any, said: int | None) -> int | None:
    """n: as the recipe says, or as a latent consistency scheduler does; None where nothing says so."""
    if said is None and isinstance(scheduler, LCMScheduler):
        return int(scheduler.config["original_inference_steps"])
    return said


def visited_timesteps(scheduler: Any, steps: int) -> tuple[int, ...]:
    """The timesteps that sampling in `steps` steps tells the UNet, from noise to clean. Leaves the scheduler alone."""
    used = copy.copy(scheduler)  # setting timesteps replaces its tables, it does not write into them
    used.set_timesteps(steps)
    return tuple(round(float(t)) for t in used.timesteps)
