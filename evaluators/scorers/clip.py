"""CLIP similarity of prompt and picture, by any CLIP that transformers loads: a hub id, a folder, the embedded one.

    clip = cosine(text features, image features)     [-1, 1], fp32; Hessel's CLIPScore is 2.5 * max(clip, 0)

Source: Radford et al. 2103.00020; Hessel et al. 2104.08718.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mmalign import shapes
from mmalign.errors import UserError

BATCH = 64


class ClipScorer:
    """See the module's docstring."""

    main = "clip"
    numbers = ("clip",)

    def __init__(self, path: str, device: str | None = None) -> None:
        from transformers import AutoProcessor, CLIPModel

        source = shapes.model_folder("clip") if path == "shapes" else Path(path)
        where: str | Path = source if source.exists() else path
        offline = bool(os.environ.get("HF_HUB_OFFLINE"))
        try:
            model: Any = CLIPModel.from_pretrained(where, local_files_only=offline, use_safetensors=True)
            self._processor: Any = AutoProcessor.from_pretrained(where, local_files_only=offline)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no CLIP model could be loaded: {str(error).splitlines()[0]}",
                place=path,
                fix="Give 'shapes', a folder with a transformers CLIP, or a hub id.",
            ) from error
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = model.float().eval().requires_grad_(False).to(self._device)
        self.identity = f"clip-{path}@1"

    @torch.no_grad()
    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        distinct = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        text = torch.cat([self._text(part) for part in _chunks(list(distinct))])
        image = self._images(images)
        rows = text[[distinct[prompt] for prompt in prompts]]
        return [{"clip": value} for value in (rows * image).sum(-1).tolist()]

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Float[Tensor, "images width"]:
        """Of each picture the feature vector that `clip` compares with the prompt's: length 1, fp32, on the CPU."""
        return self._images(images).cpu()

    def _images(self, images: Sequence[Image.Image]) -> Float[Tensor, "images width"]:
        return torch.cat([self._image(part) for part in _chunks(list(images))])

    def _text(self, prompts: list[str]) -> Float[Tensor, "prompts width"]:
        # padded to full length: a row is then the same number whatever it is batched with
        tokens = self._processor.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        pooled = self._model.text_model(input_ids=tokens.input_ids.to(self._device)).pooler_output
        return functional.normalize(self._model.text_projection(pooled).float(), dim=-1)

    def _image(self, images: list[Image.Image]) -> Float[Tensor, "images width"]:
        pixels = self._processor.image_processor(images, return_tensors="pt").pixel_values.to(self._device)
        pooled = self._model.vision_model(pixel_values=pixels).pooler_output
        return functional.normalize(self._model.visual_projection(pooled).float(), dim=-1)


def _chunks(items: list[Any]) -> list[list[Any]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def build(path: str = "shapes", device: str | None = None) -> ClipScorer:
    """CLIP from `path`: 'shapes' for the embedded one, a folder, or a hub id."""
    return ClipScorer(path, device)
