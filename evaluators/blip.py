"""BLIP with text that looks at the picture, as ImageReward's checkpoint has it, on transformers' own BLIP parts.

    h = text(tokens, picture(pixels))[first token]

The checkpoint's names are those of the authors' code; `vision_name` says what transformers calls them. Sizes are
read off the tensors, and only what is no tensor is set here: heads are 64 wide, and the picture's layer norms have an
eps of 1e-6 (transformers' default is 1e-5, which is not the same numbers).

Source: Li et al. 2201.12086; Xu et al. 2304.05977.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from evaluators.weights import load_strictly
from mmalign.errors import UserError

HEAD_WIDTH = 64
VISION_EPS = 1e-6
# projections that the contrastive training used, and a buffer 0, 1, 2, ...
UNUSED = re.compile(r"(vision_proj|text_proj)\.(weight|bias)|text_encoder\.embeddings\.position_ids")
_VISION = (
    ("blocks.", "encoder.layers."),
    (".attn.", ".self_attn."),
    (".self_attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("pos_embed", "embeddings.position_embedding"),
    ("cls_token", "embeddings.class_embedding"),
)


class Blip(nn.Module):
    """Picture and text encoder.

    Args:
        state: tensors named "visual_encoder.*" and "text_encoder.*".
        place: of the file, for messages.

    Attributes:
        size: side of its pictures, in pixels.
        width: of what it gives.

    Raises:
        UserError: a tensor is missing, of nothing in the model, or of another shape.
    """

    def __init__(self, state: Mapping[str, Tensor], *, place: str) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        used = {name: value for name, value in state.items() if not UNUSED.fullmatch(name)}
        vision, text = _configs(used, place=place)
        self.size, self.width = int(vision.image_size), int(text.hidden_size)
        self.visual_encoder = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        named = {
            f"visual_encoder.{vision_name(name)}"
            if (name := full.removeprefix("visual_encoder.")) != full
            else full: tensor
            for full, tensor in used.items()
        }
        load_strictly(self, named, place=place)
        self.eval().requires_grad_(False)

    def forward(
        self,
        ids: Int[Tensor, "rows tokens"],
        mask: Int[Tensor, "rows tokens"],
        pixels: Float[Tensor, "rows 3 size size"],
    ) -> Float[Tensor, "rows width"]:
        """What the first token of each text has become, having looked at its picture."""
        seen = self.visual_encoder(pixel_values=pixels).last_hidden_state
        everything = torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device)
        out: Any = self.text_encoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=everything,
            return_dict=True,
        )
        first: Tensor = out.last_hidden_state[:, 0]
        return first


def vision_name(name: str) -> str:
    """What transformers calls a tensor of the authors' vision transformer."""
    if name.startswith("norm."):
        return f"post_layernorm.{name.removeprefix('norm.')}"
    for theirs, ours in _VISION:
        name = name.replace(theirs, ours)
    return name


def _configs(state: Mapping[str, Tensor], *, place: str) -> tuple[Any, Any]:
    """Both configurations, from the shapes."""
    from transformers import BlipTextConfig, BlipVisionConfig

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise UserError(f"wrong or partial weights: '{name}' is missing", place=place)
        return state[name].shape

    def layers(pattern: str) -> int:
        found = {int(match[1]) for name in state if (match := re.match(pattern, name))}
        return max(found, default=-1) + 1

    patches = shape("visual_encoder.pos_embed")
    kernel = shape("visual_encoder.patch_embed.proj.weight")
    words = shape("text_encoder.embeddings.word_embeddings.weight")
    inside = "text_encoder.encoder.layer.0.intermediate.dense.weight"
    side = round((patches[1] - 1) ** 0.5)
    vision = BlipVisionConfig(
        hidden_size=patches[2],
        intermediate_size=shape("visual_encoder.blocks.0.mlp.fc1.weight")[0],
        num_hidden_layers=layers(r"visual_encoder\.blocks\.(\d+)\."),
        num_attention_heads=patches[2] // HEAD_WIDTH,
        image_size=side * kernel[-1],
        patch_size=kernel[-1],
        layer_norm_eps=VISION_EPS,
    )
    text = BlipTextConfig(  # a "decoder" only in that it has the layers that look at the picture
        vocab_size=words[0],
        hidden_size=words[1],
        encoder_hidden_size=patches[2],
        intermediate_size=shape(inside)[0],
        num_hidden_layers=layers(r"text_encoder\.encoder\.layer\.(\d+)\."),
        num_attention_heads=words[1] // HEAD_WIDTH,
        max_position_embeddings=shape("text_encoder.embeddings.position_embeddings.weight")[0],
    )
    return vision, text
