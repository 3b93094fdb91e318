"""What a diffusion method is built from and what it is fed: the seam between the trainer and the methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from diffusion.conditioning import Conditioning
from diffusion.schedule import NoiseSchedule
from diffusion.settings import LatentSettings
from mmalign.method import reward_metrics
from mmalign.randomness import Draws, key_seed
from mmalign.reference import Reference

Predict = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Which encodings some rows are, for methods that keep something per picture and prompt.

    Attributes:
        size: (width, height) in pixels.
        pictures: rows of that size's latents.
        prompts: rows of the text embeddings, -1 for the empty prompt.
    """

    size: tuple[int, int]
    pictures: tuple[int, ...]
    prompts: tuple[int, ...]


@runtime_checkable
class Encodings(Protocol):
    """The encoded pairs that batches are cut from: `diffusion.cache.PairData`.

    Attributes:
        settings: how they were encoded, and where they are kept.
        inputs_key: equal keys mean equal latents and conditioning, however the pairs are labelled.
        unrelated: share of the pairs whose sides have different prompts.
    """

    settings: LatentSettings
    inputs_key: str
    unrelated: float

    def origins(self) -> list[Origin]:
        """Every picture under every prompt that a batch can have it with, one list for each size."""
        ...

    def rows(self, origin: Origin) -> tuple[Tensor, Conditioning]:
        """(latents, conditioning) of some rows, on the CPU."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PairBatch:
    """Pairs of pictures ready for the UNet: chosen rows first, then the rejected ones.

    Attributes:
        latents: scaled latents, fp32.
        conditioning: of the same rows; a prompt is dropped on both sides of a pair or on none. Both have the same one,
            unless the data are unpaired.
        keys: one per pair: names the item and the draw. Equal keys draw equal numbers.
        seed: of the run.
        confidence, gap: as labelled, where the pairs have them.
        weights: of the pairs, with mean 1 over the data set.
        origin: which encodings the rows are.
    """

    latents: Float[Tensor, "rows c h w"]
    conditioning: Conditioning
    keys: tuple[str, ...]
    seed: int
    confidence: Float[Tensor, " pairs"] | None = None
    gap: Float[Tensor, " pairs"] | None = None
    weights: Float[Tensor, " pairs"] | None = None
    origin: Origin | None = None

    def draws(self, purpose: str, device: torch.device | str | None = None) -> Draws:
        """Random numbers for one purpose, a row per pair; on the latents' device unless told otherwise."""
        seeds = [key_seed(purpose, self.seed, key) for key in self.keys]
        return Draws(seeds, self.latents.device if device is None else device)

    @property
    def row_keys(self) -> list[str]:
        """Names of the rows, for cached reference scores."""
        return [f"{key}:{side}" for side in ("chosen", "rejected") for key in self.keys]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the trainer offers a method.

    Attributes:
        module: the UNet being trained, as prepared for this machine.
        predict: (module, x_t, timesteps, conditioning) -> prediction.
        schedule: noise levels, on the device of the latents.
        reference: where the reference's scores come from.
        elements: numbers in the latents of one picture.
        data: what the batches are cut from.
        base: names all that the reference's answers depend on besides their inputs: weights and precision.
    """

    module: nn.Module
    predict: Predict
    schedule: NoiseSchedule
    reference: Reference
    elements: int
    data: Encodings | None = None
    base: str = ""


def draw_timesteps(draws: Draws, choices: Int64[Tensor, " choices"]) -> Int64[Tensor, " pairs"]:
    """One timestep per pair, uniform over the choices."""
    index = draws.integers(len(choices))
    return choices.to(index.device)[index]


def pair_metrics(
    rewards: Float[Tensor, " rows"], errors: Float[Tensor, " rows"], reference: Float[Tensor, " rows"]
) -> dict[str, Tensor]:
    """The logged means under the field's names; rows are chosen first, then rejected."""
    error_chosen, error_rejected = errors.detach().chunk(2)
    ref_chosen, ref_rejected = reference.chunk(2)
    return {
        **reward_metrics(*rewards.chunk(2)),
        "errors/chosen": error_chosen.mean(),
        "errors/rejected": error_rejected.mean(),
        "errors/ref_chosen": ref_chosen.mean(),
        "errors/ref_rejected": ref_rejected.mean(),
    }
