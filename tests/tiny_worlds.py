"""Tiny models with encoded pairs, and what methods on pairs are built from."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path

import tiny_models
import torch
from tiny_runs import write_store
from torch import Tensor, nn

from diffusion import adapters
from diffusion.cache import PairData, prepare
from diffusion.conditioning import Conditioning
from diffusion.models import DiffusionModel, load_model
from diffusion.parts import PairBatch, Parts
from diffusion.settings import LatentSettings, LoraSettings, ModelSettings
from mmalign.pairing import Pairing, make_pairs
from mmalign.preferences import Store
from mmalign.records import Preference
from mmalign.reference import AdaptersOff, FrozenCopy


@dataclass(frozen=True, kw_only=True)
class World:
    """A tiny model and its pairs, encoded."""

    model: DiffusionModel
    pairs: list[Preference]
    data: PairData

    def batch(self, items: list[int] | None = None, data: PairData | None = None, visit: int = 0) -> PairBatch:
        items = list(range(5)) if items is None else items
        return (data or self.data).batch(items, [visit] * len(items), seed=3)


def make_worlds(root: Path) -> dict[str, World]:
    """`sd`, `sdxl`, `v` (an sd that predicts v) and `zero-snr`."""
    pairs = list(make_pairs(Store.open(write_store(root / "store")).records(), Pairing(score="taste")))
    folders = {
        "sd": tiny_models.write(tiny_models.sd_pipeline(), root / "sd"),
        "sdxl": tiny_models.write(tiny_models.sdxl_pipeline(), root / "sdxl"),
    }
    found = {}
    for name, folder, settings in (
        ("sd", "sd", {}),
        ("sdxl", "sdxl", {}),
        ("v", "sd", {"prediction_type": "v_prediction"}),
        ("zero-snr", "sd", {"zero_terminal_snr": True}),
    ):
        model = load_model(ModelSettings(path=str(folders[folder]), **settings))  # type: ignore[arg-type]  # mixed
        found[name] = World(model=model, pairs=pairs, data=prepare(model, pairs, LatentSettings(cache=None)))
    return found


class Spy:
    """A model's predict that remembers what it was asked, under a precision."""

    def __init__(self, model: DiffusionModel, half: bool = False) -> None:
        self.model, self.half = model, half
        self.asked: list[tuple[nn.Module, Tensor, Tensor, Conditioning]] = []

    def __call__(self, unet: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.asked.append((unet, x_t, t, conditioning))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            return self.model.predict(unet, x_t, t, conditioning)


def parts(world: World, kind: str = "lora", *, perturbed: float = 0.0, half: bool = False) -> Parts:
    """Policy and reference; a policy moved away from it where `perturbed` says how far."""
    unet = copy.deepcopy(world.model.unet)
    if kind == "lora":
        adapters.add_lora(unet, LoraSettings(rank=2, targets="all"))
        reference: AdaptersOff | FrozenCopy = AdaptersOff(unet, lambda: adapters.adapters_disabled(unet))
    else:
        reference = FrozenCopy(adapters.frozen_copy(unet), contextlib.nullcontext)
        unet.requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad and perturbed:
                parameter.add_(perturbed * torch.randn(parameter.shape, generator=generator))
    return Parts(
        module=unet.train(),
        predict=Spy(world.model, half),
        schedule=world.model.schedule,
        reference=reference,
        elements=world.data.elements,
        data=world.data,
        base=f"{world.model.identity} {half}",
    )
