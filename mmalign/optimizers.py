"""Optimizers by name, the learning rate as a function of the update, and an average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mmalign.config import OptimSettings
from mmalign.errors import UserError


def make_optimizer(parameters: Sequence[nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    """AdamW (fused), 8-bit AdamW of bitsandbytes, or Adafactor with a fixed learning rate."""
    if settings.name == "adafactor":
        return torch.optim.Adafactor(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    adamw: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **adamw)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "8-bit AdamW needs bitsandbytes",
            place="optim.name",
            fix="pip install 'mmalign[bitsandbytes]', or use adamw.",
        ) from error
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **adamw)
    return optimizer


def rate(step: int, steps: int, settings: OptimSettings) -> float:
    """Learning rate of update `step` (from 0) of `steps`. Linear warm-up reaches the peak after its last update."""
    warmup = settings.warmup(steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if settings.schedule == "linear":
        return settings.lr * (1 - done)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * done))
    return settings.lr


class Average:
    """Exponential moving average of the trained parameters in fp32.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._decay = decay
        self._values = [p.detach().float().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._values, [p.detach().float() for p in parameters], 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """The average in place of the weights; the weights come back bit for bit."""
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, self._values, strict=True):
                parameter.copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"values": [full(value) for value in self._values]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for mine, value in zip(self._values, state["values"], strict=True):
                if isinstance(mine, DTensor):
                    value = distribute_tensor(value.to(mine.device), mine.device_mesh, mine.placements)
                mine.copy_(value)


def full(value: Tensor) -> Tensor:
    """A sharded tensor put together; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value
