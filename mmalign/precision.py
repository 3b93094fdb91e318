"""The number formats of weights and forwards, as recipes and commands name them. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal, TypeAlias

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
