"""Rollouts: pictures drawn step by step from the policy, with all that training on those steps needs.

Of each step a trajectory keeps where it went and two numbers per picture, both free while sampling:

    old_t = mean over C, H, W of (x_{t-1} - mu_old)^2 / (2 std^2)        under the policy that drew it
    ref_t = the same under the reference policy

so that log pi_old - log pi_ref = ref_t - old_t, and once the policy has moved log pi - log pi_ref = ref_t - now_t: a
training step needs the policy's forward alone. Sums are accumulated in fp64, since their difference is what counts.

Picture k of a prompt has a generator of its own: neither batch size nor the number of processes changes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from diffusion.conditioning import Conditioning
from diffusion.kernels import Kernel, half_squares
from diffusion.parts import Predict
from mmalign.randomness import Draws, key_seed
from mmalign.reference import Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Guided:
    """What a UNet answers with classifier-free guidance, both branches in one forward.

    Args:
        predict: (module, x, timesteps, conditioning) -> prediction.
        empty: the one row of the branch without a prompt.
        guidance_scale: 1 or less is without guidance.
    """

    predict: Predict
    empty: Conditioning
    guidance_scale: float

    @property
    def rows(self) -> int:
        """UNet rows per picture and step."""
        return 2 if self.guidance_scale > 1 else 1

    def __call__(
        self,
        module: nn.Module,
        x: Float[Tensor, "rows c h w"],
        t: Int64[Tensor, " rows"],
        conditioning: Conditioning,
    ) -> Float[Tensor, "rows c h w"]:
        if self.rows == 1:
            return self.predict(module, x, t, conditioning)
        without = conditioning.replace_text(torch.ones(len(x), dtype=torch.bool, device=x.device), self.empty)
        both = Conditioning.cat([without, conditioning])
        plain, prompted = self.predict(module, x.repeat(2, 1, 1, 1), t.repeat(2), both).float().chunk(2)
        return plain + self.guidance_scale * (prompted - plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """Sampled chains, a row per picture.

    Attributes:
        states: x from noise (first) to clean latents (last), fp32.
        old: old_t of the trained steps; see the module's docstring.
        ref: ref_t of the same, None for methods without a reference.
    """

    states: Float[Tensor, "rows states c h w"]
    old: Float64[Tensor, "rows steps"]
    ref: Float64[Tensor, "rows steps"] | None

    def __len__(self) -> int:
        return len(self.states)

    def log_ratios(self) -> Float[Tensor, "rows steps"]:
        """log pi_old - log pi_ref of each step, mean over elements."""
        if self.ref is None:
            raise ValueError("these trajectories have no reference")
        return (self.ref - self.old).float()

    @staticmethod
    def cat(parts: Sequence[Trajectories]) -> Trajectories:
        """The rows of all parts."""
        refs = [part.ref for part in parts if part.ref is not None]
        return Trajectories(
            states=torch.cat([part.states for part in parts]),
            old=torch.cat([part.old for part in parts]),
            ref=torch.cat(refs) if refs else None,
        )

    def select(self, rows: Tensor) -> Trajectories:
        """Some rows."""
        return Trajectories(
            states=self.states[rows], old=self.old[rows], ref=None if self.ref is None else self.ref[rows]
        )

    def to(self, device: torch.device | str) -> Trajectories:
        """On a device."""
        ref = None if self.ref is None else self.ref.to(device)
        return Trajectories(states=self.states.to(device), old=self.old.to(device), ref=ref)


def step_scores(
    module: nn.Module,
    guided: Guided,
    kernel: Kernel,
    states: Float[Tensor, "rows states c h w"],
    steps: Int64[Tensor, " rows"],
    conditioning: Conditioning,
) -> Float64[Tensor, " rows"]:
    """now_t: the half squares of one step of each row under a module; with a graph where gradients are on.

    Args:
        steps: which step of each row, below `kernel.trained`.
        conditioning: of the rows.
    """
    rows = torch.arange(len(states), device=states.device)
    x = states[rows, steps]
    prediction = guided(module, kernel.model_input(x, steps), kernel.timesteps[steps], conditioning)
    mean, deviation = kernel.transition(x, prediction, steps)
    return half_squares(states[rows, steps + 1], mean, deviation)


def draw_noise(keys: Sequence[str], seed: int, device: torch.device | str) -> Draws:
    """The generators of some pictures."""
    return Draws([key_seed("rollout", seed, key) for key in keys], device)


@torch.no_grad()
def roll_out(
    module: nn.Module,
    guided: Guided,
    kernel: Kernel,
    conditioning: Conditioning,
    *,
    keys: Sequence[str],
    starts: Sequence[str],
    seed: int,
    shape: Sequence[int],
    reference: Reference | None,
    sample_reference: bool = False,
) -> Trajectories:
    """Draw a batch of pictures.

    Args:
        module: the policy, in eval mode.
        keys: one per picture: names its step noises.
        starts: names its initial noise; equal names start alike.
        shape: (c, h, w) of the latents.
        reference: whose scores to keep; None keeps none.
        sample_reference: the reference draws, and `old` is its score; for fixed sets of trajectories.
    """
    device = conditioning.embeds.device
    x = kernel.initial_scale * draw_noise([f"start:{name}" for name in starts], seed, device).normal(shape)
    noise = draw_noise(keys, seed, device)
    states, old, ref = [x], [], []

    def predict(at: nn.Module) -> Tensor:
        return guided(at, kernel.model_input(x, step), kernel.timesteps[step], conditioning).float()

    for number in range(len(kernel.timesteps)):
        step = torch.full((len(x),), number, dtype=torch.int64, device=device)
        theirs = None
        if reference is not None and (sample_reference or number < kernel.trained):
            theirs = reference.run(predict)
        own = theirs if sample_reference and theirs is not None else predict(module)
        mean, deviation = kernel.transition(x, own, step)
        after = mean
        if number < kernel.trained:
            after = mean + deviation.view(-1, 1, 1, 1) * noise.normal(shape)
            old.append(half_squares(after, mean, deviation))
            if theirs is not None:
                ref.append(half_squares(after, kernel.transition(x, theirs, step)[0], deviation))
        x = after
        states.append(x)
    return Trajectories(
        states=torch.stack(states, 1), old=torch.stack(old, 1), ref=torch.stack(ref, 1) if ref else None
    )


def in_batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cover `count` rows."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
