"""What the UNet is told about each picture: text embeddings and, for SDXL, pooled text and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """One row per picture.

    Args:
        embeds: token embeddings.
        pooled: SDXL's text embedding of the whole prompt; None for SD.
        time_ids: SDXL's (height, width, top, left, target height, target width) in pixels, always fp32, since
            bf16 rounds 1023 to 1024; None for SD.
    """

    embeds: Float[Tensor, "rows tokens width"]
    pooled: Float[Tensor, "rows pooled"] | None = None
    time_ids: Float[Tensor, "rows 6"] | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, in order."""

        def joined(tensors: list[Tensor | None]) -> Tensor | None:
            present = [tensor for tensor in tensors if tensor is not None]
            if len(present) not in (0, len(tensors)):
                raise ValueError("some parts have pooled text or time ids and some do not")
            return torch.cat(present) if present else None

        return Conditioning(
            embeds=torch.cat([part.embeds for part in parts]),
            pooled=joined([part.pooled for part in parts]),
            time_ids=joined([part.time_ids for part in parts]),
        )

    def select(self, rows: Tensor | slice) -> Conditioning:
        """Some rows, by index tensor, mask or slice."""
        return Conditioning(
            embeds=self.embeds[rows],
            pooled=None if self.pooled is None else self.pooled[rows],
            time_ids=None if self.time_ids is None else self.time_ids[rows],
        )

    def repeat(self, times: int) -> Conditioning:
        """All rows, then all rows again, ..."""
        return Conditioning.cat([self] * times)

    def with_time_ids(self, time_ids: Float[Tensor, "rows 6"] | None) -> Conditioning:
        """The same text with other sizes."""
        return replace(self, time_ids=time_ids)

    def replace_text(self, mask: Bool[Tensor, " rows"], other: Conditioning) -> Conditioning:
        """The text of one-row `other` where `mask` is true. Sizes stay: guidance, too, keeps them."""
        if len(other) != 1 or (self.pooled is None) != (other.pooled is None):
            raise ValueError("expected one row of text of the same kind")
        pooled = self.pooled
        if pooled is not None and other.pooled is not None:
            pooled = torch.where(mask[:, None], other.pooled.to(pooled), pooled)
        embeds = torch.where(mask[:, None, None], other.embeds.to(self.embeds), self.embeds)
        return replace(self, embeds=embeds, pooled=pooled)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """On a device, text in a dtype; time ids stay fp32."""
        return Conditioning(
            embeds=self.embeds.to(device, dtype),
            pooled=None if self.pooled is None else self.pooled.to(device, dtype),
            time_ids=None if self.time_ids is None else self.time_ids.to(device),
        )
