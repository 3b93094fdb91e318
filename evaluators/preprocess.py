"""Pictures to what a vision tower reads: from PIL, which is the reference, and from tensors, which differentiate.

    resize, crop or pad to size x size, / 255, (x - mean) / std

    shortest   the shorter side becomes `size`, the middle is cut out            CLIP, PickScore, ImageReward
    longest    the longer side becomes `size`, black beside the picture           HPSv2
    squash     both sides become `size`                                           SigLIP

From PIL the resize rounds to whole levels, from tensors it does not and is clipped to [0, 1], where bicubic overshoots.
On smooth pictures the two differ by less than TOLERANCE in the mean, in units of the normalised pixel, and a cosine by
less than COSINE; a picture that already has the size is the same in both.

Source: the transforms of open_clip 3 and of transformers' CLIPImageProcessor, for PIL bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from evaluators.scorer import Scorer
from mmalign.errors import UserError, reason

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOLERANCE, COSINE = 0.005, 1e-3  # between the two ways
LONGEST = 64  # times the shorter side: what is cut off is resized first, and must fit into memory

_PIL = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_NAMES: dict[int, Literal["bicubic", "bilinear"]] = {3: "bicubic", 2: "bilinear"}


@runtime_checkable
class TensorScorer(Scorer, Protocol):
    """A scorer whose main number can be followed back into the pixels."""

    def score_tensors(
        self, prompts: Sequence[str], pixels: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, " images"]:
        """The main number of each picture, fp32, differentiable.

        Args:
            pixels: RGB in [0, 1].
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """How a tower's pictures are made; see the module's docstring."""

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    fit: Literal["shortest", "longest", "squash"] = "shortest"
    resample: Literal["bicubic", "bilinear"] = "bicubic"

    def images(self, images: Sequence[Image.Image]) -> Float[Tensor, "images 3 size size"]:
        """From PIL pictures of any mode and size."""
        return torch.stack([self._image(image) for image in images])

    def tensors(self, pixels: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images 3 size size"]:
        """From RGB in [0, 1], differentiable."""
        height, width = self._resized(*pixels.shape[-2:])
        if (height, width) != tuple(pixels.shape[-2:]):
            pixels = functional.interpolate(
                pixels, size=(height, width), mode=self.resample, antialias=True, align_corners=False
            ).clamp(0, 1)
        above, left = (self.size - height) // 2, (self.size - width) // 2
        if above > 0 or left > 0:
            below, right = self.size - height - above, self.size - width - left
            pixels = functional.pad(pixels, (max(left, 0), max(right, 0), max(above, 0), max(below, 0)))
        top, start = _offset(height, self.size), _offset(width, self.size)
        return self._normalised(pixels[..., top : top + self.size, start : start + self.size])

    def _image(self, image: Image.Image) -> Float[Tensor, "3 size size"]:
        image = image.convert("RGB")
        height, width = self._resized(image.height, image.width)
        if (width, height) != image.size:
            image = image.resize((width, height), _PIL[self.resample])
        if height < self.size or width < self.size:
            page = Image.new("RGB", (max(width, self.size), max(height, self.size)))
            page.paste(image, ((page.width - width) // 2, (page.height - height) // 2))
            image = page
        left, top = _offset(width, self.size), _offset(height, self.size)
        image = image.crop((left, top, left + self.size, top + self.size))
        array = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return self._normalised(array.float() / 255)

    def _normalised(self, pixels: Float[Tensor, "*images 3 size size"]) -> Float[Tensor, "*images 3 size size"]:
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.fit == "squash":
            return self.size, self.size
        if self.fit == "longest":
            ratio = max(height, width) / self.size
            return max(1, round(height / ratio)), max(1, round(width / ratio))
        short = min(height, width)
        if max(height, width) > LONGEST * short:
            raise UserError(f"a picture of {width} x {height} is a line", fix=f"The sides may differ {LONGEST} times.")
        # the longer side is rounded down, as torchvision does
        return int(self.size * height / short), int(self.size * width / short)


def _offset(length: int, size: int) -> int:
    return max(0, round((length - size) / 2))


def of_folder(folder: Path, size: int) -> Preprocess:
    """What a model's folder says about its pictures; CLIP's habits with this size where it says nothing.

    Raises:
        UserError: a preprocessing that is none of those here.
    """
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return Preprocess(size=size)
    try:
        found = of_processor(AutoImageProcessor.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the image processor cannot be loaded: {reason(error)}", place=str(folder)) from error
    if found is None or found.size != size:
        what = "is of another kind" if found is None else f"makes {found.size} x {found.size}"
        raise UserError(f"the model reads {size} x {size} pictures, its image processor {what}", place=str(folder))
    return found


def of_processor(processor: Any) -> Preprocess | None:
    """A transformers image processor as one of these; None when it makes something else of a picture.

    Those that cut pictures into tiles or keep their aspect are something else.
    """
    resize, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    resize = {name: value for name, value in resize.items() if value is not None}
    crop = {name: value for name, value in crop.items() if value is not None}
    resample = _NAMES.get(int(processor.resample))
    cut = ("image_grid_pinpoints", "do_image_splitting", "do_pan_and_scan", "do_pad")
    if any(getattr(processor, habit, None) for habit in cut):
        return None
    whole = processor.do_resize and processor.do_rescale and processor.do_normalize
    if resample is None or not whole or not np.isclose(processor.rescale_factor, 1 / 255):
        return None
    fit: Literal["shortest", "squash"]
    if set(resize) == {"shortest_edge"} and getattr(processor, "do_center_crop", False):
        size, fit = int(resize["shortest_edge"]), "shortest"
        if crop != {"height": size, "width": size}:
            return None
    elif set(resize) == {"height", "width"} and resize["height"] == resize["width"]:
        size, fit = int(resize["height"]), "squash"
        if getattr(processor, "do_center_crop", False) and crop != resize:
            return None
    else:
        return None
    mean, std = (tuple(float(value) for value in values) for values in (processor.image_mean, processor.image_std))
    return Preprocess(
        size=size, mean=mean, std=std, fit=fit, resample="bicubic" if resample == "bicubic" else "bilinear"
    )
