"""The heads of published scorers: a few linear layers with nothing but dropout between them are one affine map.

    h(x) = W_k (... (W_1 x + b_1) ...) + b_k = <w, x> + b

LAION's aesthetic predictor and ImageReward have such heads, of 768 inputs and five layers. In float64 the fold loses
nothing that float32 would have kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import UserError

_LAYER = re.compile(r"layers\.(\d+)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Affine:
    """<weight, x> + bias, in fp32."""

    weight: Float[Tensor, " width"]
    bias: float

    def __call__(self, features: Float[Tensor, "rows width"]) -> Float[Tensor, " rows"]:
        return (features.float() * self.weight.to(features.device)).sum(-1) + self.bias


def fold(state: Mapping[str, Tensor], *, width: int, place: str) -> Affine:
    """The layers "layers.N.weight" and "layers.N.bias", in order of N, as one.

    Args:
        width: of the input.

    Raises:
        UserError: anything else is in the state dict, or the layers do not fit one another and end in one number.
    """
    numbers = {int(found[1]) for name in state if (found := _LAYER.fullmatch(name))}
    expected = {f"layers.{number}.{part}" for number in numbers for part in ("weight", "bias")}
    if not numbers or set(state) != expected:
        wrong = min(set(state) ^ expected, default="layers.0.weight")
        raise UserError(
            f"not the head of a scorer: '{wrong}'", place=place, fix="Its tensors are layers.N.weight and bias."
        )
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for number in sorted(numbers):
        own, shift = state[f"layers.{number}.weight"].double(), state[f"layers.{number}.bias"].double()
        if own.dim() != 2 or own.shape[1] != len(bias) or shift.shape != own.shape[:1]:
            cause = f"layer {number} of the head is {tuple(own.shape)}, it is given {len(bias)} numbers"
            raise UserError(cause, place=place)
        weight, bias = own @ weight, own @ bias + shift
    if len(bias) != 1:
        raise UserError(f"the head gives {len(bias)} numbers, not one", place=place)
    return Affine(weight=weight[0].float(), bias=float(bias[0]))
