"""What differs between families of vision-language models: how a picture becomes tensors, and where the parts are.

One picture at a time goes through the family's own image processor, so a batch is a plain concatenation of what its
distinct pictures became; nothing is cut out of a processor's batch by rows, which is wrong for patches and tiles.

| family     | tensors of one picture                                  | placeholders                 |
|------------|---------------------------------------------------------|------------------------------|
| llava      | pixel_values [1, 3, h, w]                               | (h / patch) (w / patch)      |
| llava_next | pixel_values [tiles, 3, h, w], image_sizes [1, 2]       | base + unpadded + line ends  |
| qwen_vl    | pixel_values [patches, d], image_grid_thw [1, 3]        | patches / merge^2            |
| idefics3   | pixel_values [tiles, 1, 3, h, w], pixel_attention_mask  | tiles x tokens per tile      |
| internvl   | pixel_values [tiles, 3, h, w]                           | tiles x tokens per tile      |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from mmalign.errors import UserError
from vlm.settings import VlmModelSettings

FamilyName: TypeAlias = Literal["llava", "llava_next", "qwen_vl", "idefics3", "internvl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One way of batching, shared by every model type that has it.

    Args:
        language, projector, vision: patterns of the parts' module paths below `model`, for adapters.
        tensors: the image processor's output for one picture -> the tensors of `ImageInput`.
        nested: whether the image processor wants a list of pictures per row.
        given: the embeddings of all pictures -> what the model takes them back as, instead of pictures.
        token_types: whether the model must be told which tokens are image tokens, and makes positions from that.
        options: settings of `VlmModelSettings` that change pictures here.
    """

    name: FamilyName
    language: str
    projector: str
    vision: str
    tensors: Callable[[Mapping[str, Any]], dict[str, Tensor]]
    nested: bool = False
    token_types: bool = False
    given: Callable[[list[Tensor]], Any] = list
    options: tuple[str, ...] = ()


def _llava(made: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"pixel_values": made["pixel_values"]}


def _llava_next(made: Mapping[str, Any]) -> dict[str, Tensor]:
    # Tiles of all pictures in one row of tiles: the model counts them by image_sizes.
    return {"pixel_values": made["pixel_values"][0], "image_sizes": made["image_sizes"]}


def _qwen_vl(made: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}


def _idefics3(made: Mapping[str, Any]) -> dict[str, Tensor]:
    # Every tile as a row of one: the model would fill up ragged rows with black tiles and look for them again.
    tensors = {"pixel_values": made["pixel_values"][0][:, None]}
    if "pixel_attention_mask" in made:
        tensors["pixel_attention_mask"] = made["pixel_attention_mask"][0][:, None]
    return tensors


LLAVA = Family(
    name="llava",
    language="language_model",
    projector="multi_modal_projector",
    vision="vision_tower",
    tensors=_llava,
)
LLAVA_NEXT = Family(
    name="llava_next",
    language="language_model",
    projector="multi_modal_projector",
    vision="vision_tower",
    tensors=_llava_next,
)
QWEN_VL = Family(
    name="qwen_vl",
    language="language_model",
    projector=r"visual\.(merger|deepstack_merger_list)",
    vision=r"visual\.blocks",
    tensors=_qwen_vl,
    token_types=True,
    options=("min_pixels", "max_pixels"),
)
IDEFICS3 = Family(
    name="idefics3",
    language="text_model",
    projector="connector",
    vision="vision_model",
    tensors=_idefics3,
    nested=True,
    options=("longest_edge", "tiles"),
)
INTERNVL = Family(
    name="internvl",
    language="language_model",
    projector="multi_modal_projector",
    vision="vision_tower",
    tensors=_llava,
    given=torch.cat,
)

FAMILIES: dict[str, Family] = {
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "qwen2_vl": QWEN_VL,
    "qwen2_5_vl": QWEN_VL,
    "qwen3_vl": QWEN_VL,
    "idefics3": IDEFICS3,
    "smolvlm": IDEFICS3,
    "internvl": INTERNVL,
}
"""By `model_type` of config.json."""

OPTIONS = ("min_pixels", "max_pixels", "longest_edge", "tiles")


def configure(processor: Any, config: Any, family: Family, settings: VlmModelSettings) -> None:
    """Give the processor the recipe's picture sizes, and what it must know of the model to count placeholders.

    Raises:
        UserError: a setting that this family has not.
    """
    for option in OPTIONS:
        if getattr(settings, option) is not None and option not in family.options:
            known = ", ".join(family.options) or "none of these settings"
            raise UserError(
                f"a {config.model_type} model has no {option}", place=f"model.{option}", fix=f"It has {known}"
            )
    images = processor.image_processor
    if settings.min_pixels is not None or settings.max_pixels is not None:
        smallest = settings.min_pixels or images.size["shortest_edge"]
        largest = settings.max_pixels or images.size["longest_edge"]
        if smallest > largest:
            raise UserError(f"min_pixels {smallest} is above max_pixels {largest}", place="model.min_pixels")
        images.size = {"shortest_edge": smallest, "longest_edge": largest}
    if settings.longest_edge is not None:
        images.size = {"longest_edge": settings.longest_edge}
    if settings.tiles is not None:
        images.do_image_splitting = settings.tiles
    if family in (LLAVA, LLAVA_NEXT):  # older checkpoints leave these to the model, and are then counted wrongly
        if processor.patch_size is None:
            processor.patch_size = config.vision_config.patch_size
            processor.num_additional_image_tokens = 1 if config.vision_config.model_type == "clip_vision_model" else 0
        if processor.vision_feature_select_strategy is None:
            processor.vision_feature_select_strategy = config.vision_feature_select_strategy


def process(processor: Any, family: Family, image: Image.Image) -> tuple[dict[str, Tensor], str]:
    """(tensors of one picture, text that replaces its placeholder)."""
    options = dict(getattr(processor, "images_kwargs", None) or {})
    pictures = [[image]] if family.nested else [image]
    made = processor.image_processor(pictures, return_tensors="pt", **options)
    return family.tensors(made), str(processor.replace_image_token(made, 0))
