"""Random draws that depend on what is drawn for, not on when, where or beside what it is drawn.

Every item of a batch has a key (run seed, item, how often it was visited, ...) and draws from a generator of its own.
So a resumed run, a run on more processes and a run with other batch sizes draw the same numbers, on any device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def key_seed(*key: int | str) -> int:
    """A 63-bit seed from a key: the same on every machine, unrelated for any two different keys."""
    # doubled inside a part: a separator is then the last of an odd number, whatever the parts are
    parts = (str(part).replace("\x1f", "\x1f\x1f") for part in key)
    text = "\x1f".join(f"{type(part).__name__}:{shown}" for part, shown in zip(key, parts, strict=True))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Draws:
    """One generator per item of a batch; each method draws one row per item.

    Drawn on the CPU and then moved, so that a GPU draws what a CPU draws. Methods must be called in a fixed order.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = torch.device(device)

    def __len__(self) -> int:
        return len(self._generators)

    def normal(self, shape: Sequence[int]) -> Float[Tensor, "items ..."]:
        """Standard normal fp32 numbers."""
        rows = [torch.randn(tuple(shape), generator=generator) for generator in self._generators]
        return torch.stack(rows).to(self._device, non_blocking=True)

    def uniform(self) -> Float[Tensor, " items"]:
        """Uniform numbers in [0, 1)."""
        rows = [torch.rand((), generator=generator) for generator in self._generators]
        return torch.stack(rows).to(self._device, non_blocking=True)

    def integers(self, high: int) -> Int64[Tensor, " items"]:
        """Uniform integers in [0, high)."""
        rows = [torch.randint(high, (), generator=generator) for generator in self._generators]
        return torch.stack(rows).to(self._device, non_blocking=True)
