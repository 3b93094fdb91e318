"""Attention over rows that share their beginnings: a picture and its question are computed once for all their answers.

Rows lie one behind another in a single sequence, those of a group as

    [ beginning ][ answer 1 ][ answer 2 ] ...

A token sees its group's beginning and the earlier tokens of its own answer, nothing else; positions restart where each
answer begins (see `vlm.packing`). Two kernel calls a group do that without a mask over the whole: the beginning is
plainly causal, and answers, few against many, look at a slice of their group through a small mask. Next to a block mask
over everything this never computes what is masked; next to padding nothing is padded.

Every other forward (generation, plain batches) goes to transformers' own `sdpa`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlm.families import Family

NAME = "mmalign_grouped"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Rows that begin alike, in the long sequence.

    Args:
        start, answers, stop: where the group, its first answer, and what follows the group begin.
        mask: [answer tokens, group tokens], what each answer token sees; None for a group of one row, which is
            causal throughout.
    """

    start: int
    answers: int
    stop: int
    mask: Bool[Tensor, "answers tokens"] | None

    def to(self, device: torch.device | str) -> Group:
        """The same elsewhere."""
        return self if self.mask is None else replace(self, mask=self.mask.to(device))


def grouped_attention(
    query: Float[Tensor, "1 heads tokens width"],
    key: Float[Tensor, "1 kv_heads tokens width"],
    value: Float[Tensor, "1 kv_heads tokens width"],
    groups: tuple[Group, ...],
    scale: float | None = None,
) -> Float[Tensor, "1 heads tokens width"]:
    """softmax(q k' scale) v, each token over what its group lets it see; scale 1 / sqrt(width) unless given."""
    gqa = query.shape[1] != key.shape[1]
    parts = []
    for group in groups:
        causal = group.stop if group.mask is None else group.answers
        first, whole = slice(group.start, causal), slice(group.start, group.stop)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, first], key[:, :, first], value[:, :, first], is_causal=True, scale=scale, enable_gqa=gqa
            )
        )
        if group.mask is not None:
            parts.append(
                scaled_dot_product_attention(
                    query[:, :, group.answers : group.stop],
                    key[:, :, whole],
                    value[:, :, whole],
                    attn_mask=group.mask,
                    scale=scale,
                    enable_gqa=gqa,
                )
            )
    return torch.cat(parts, dim=2)


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    groups: tuple[Group, ...] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every attention layer."""
    if groups is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return plain
    made = grouped_attention(query, key, value, groups, options.get("scaling"))
    return made.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def cannot_share(network: Any, family: Family, attention: str) -> str | None:
    """Why rows of this model cannot share their beginnings; None where they can."""
    if attention != "sdpa":
        return f"model.attention={attention}"
    text = network.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"its language model has layers of {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        return f"its language model sees the last {text.sliding_window} tokens only"
    if getattr(text, "attention_dropout", 0.0):
        return "its language model has dropout in attention"
    if family.token_types and not hasattr(network.model, "get_rope_index"):
        return "its positions cannot be asked for"
    return None


def share(network: Any) -> None:
    """Let the language model's layers take groups. The vision tower is left as it is."""
    network.set_attn_implementation({"text_config": NAME})
