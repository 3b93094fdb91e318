"""Two-tower models, CLIP's and its descendants', as unit vectors of texts and pictures in fp32.

    cosine = <text, picture>        both of length 1

`ClipTower` reads a folder of transformers' CLIPModel, `OpenClipTower` a checkpoint of open_clip. Towers may run in
half precision; lengths and products are fp32 always, for the differences that decide between two pictures are of the
size of a bf16 rounding. Texts are embedded once and remembered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional

from evaluators.preprocess import Preprocess, of_folder
from evaluators.weights import fingerprint, load_strictly, open_pretrained, read_tensors
from mmalign.errors import UserError
from mmalign.precision import Precision

BATCH = 64
REMEMBERED = 16384  # texts: 64 MB of a ViT-H's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TextCache:
    """Remembers what was made of a text; the least recently used are forgotten.

    Args:
        encode: makes one row per text; given no text twice, and no more than BATCH at once.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], capacity: int = REMEMBERED) -> None:
        self._encode, self._capacity = encode, capacity
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        distinct = dict.fromkeys(texts)
        found = {text: self._rows[text] for text in distinct if text in self._rows}
        for part in chunks([text for text in distinct if text not in found]):
            with torch.no_grad():
                found |= zip(part, self._encode(part).unbind(), strict=True)
        for text, row in found.items():
            self._rows[text] = row
            self._rows.move_to_end(text)
        while len(self._rows) > self._capacity:
            self._rows.popitem(last=False)
        return torch.stack([found[text] for text in texts])


@runtime_checkable
class Tower(Protocol):
    """A two-tower model.

    Attributes:
        scale: exp(logit_scale), what cosines were multiplied by in training.
        fingerprint: of the weights.
        preprocess: what its pictures are made by.
        texts: unit vectors of texts, remembered.
    """

    scale: float
    fingerprint: str
    preprocess: Preprocess
    device: torch.device
    texts: TextCache

    def pictures(self, pixels: Float[Tensor, "images 3 size size"]) -> Float[Tensor, "images width"]:
        """Unit vectors of preprocessed pictures, differentiable, fp32."""
        ...


class ClipTower:
    """A transformers CLIPModel.

    Attributes:
        width: of its unit vectors.

    Raises:
        UserError: no such model in the folder, partial weights, or a tokenizer that is not the model's.
    """

    def __init__(self, folder: Path, device: str | None = None, precision: Precision = "fp32") -> None:
        from transformers import CLIPModel

        model: Any = open_pretrained(CLIPModel, folder, dtype=torch.float32)
        self.fingerprint = fingerprint(model)
        self.scale, self.width = float(model.logit_scale.exp()), int(model.config.projection_dim)
        self.device, self._dtype = choose_device(device), DTYPES[precision]
        self._tokens = clip_tokens(folder, model.config.text_config)
        self.preprocess = of_folder(folder, model.config.vision_config.image_size)
        self._model = model.to(self.device, self._dtype)
        self.texts = TextCache(self._text)

    def pictures(self, pixels: Float[Tensor, "images 3 size size"]) -> Float[Tensor, "images width"]:
        pooled = self._model.vision_model(pixel_values=pixels.to(self.device, self._dtype)).pooler_output
        return unit(self._model.visual_projection(pooled))

    def _text(self, texts: list[str]) -> Float[Tensor, "texts width"]:
        pooled = self._model.text_model(input_ids=self._tokens(texts).to(self.device)).pooler_output
        return unit(self._model.text_projection(pooled))


class OpenClipTower:
    """A checkpoint of open_clip, of an architecture that it knows by name.

    Args:
        fit: how pictures become square; HPSv2's are letterboxed.

    Raises:
        UserError: no such architecture, or another model's weights.
    """

    def __init__(
        self,
        file: Path,
        architecture: str,
        *,
        fit: Literal["shortest", "longest", "squash"],
        device: str | None = None,
        precision: Precision = "fp32",
    ) -> None:
        import open_clip

        if open_clip.get_model_config(architecture) is None:
            raise UserError(f"open_clip has no architecture '{architecture}'", fix="HPSv2 is a ViT-H-14.")
        state = read_tensors(file)
        model = open_clip.create_model(architecture, load_weights=False)
        # causal masks are made anew; checkpoints of older versions have them
        load_strictly(model, state, place=str(file), ignored={"attn_mask"} - model.state_dict().keys())
        model.eval().requires_grad_(False)
        self.fingerprint = fingerprint(model)
        self.scale = float(model.logit_scale.exp())
        self.device, self._dtype = choose_device(device), DTYPES[precision]
        self._tokenizer = open_clip.get_tokenizer(architecture)
        self.preprocess = Preprocess(size=_side(model.visual.image_size), fit=fit)
        self._model = model.to(self.device, self._dtype)
        self.texts = TextCache(self._text)

    def pictures(self, pixels: Float[Tensor, "images 3 size size"]) -> Float[Tensor, "images width"]:
        return unit(self._model.encode_image(pixels.to(self.device, self._dtype)))

    def _text(self, texts: list[str]) -> Float[Tensor, "texts width"]:
        return unit(self._model.encode_text(self._tokenizer(texts).to(self.device)))


class TowerScorer(ABC):
    """A scorer on a tower: its subclasses say what becomes of the two vectors.

    Attributes:
        identity: name@version#fingerprint; the version says the precision where it is not fp32.
    """

    def __init__(self, name: str, version: str, tower: Tower, precision: Precision = "fp32") -> None:
        self.tower = tower
        half = "" if precision == "fp32" else f"-{precision}"
        self.main, self.numbers = name, (name,)
        self.identity = f"{name}@{version}{half}#{self._fingerprint()}"

    @abstractmethod
    def values(self, prompts: Sequence[str], features: Float[Tensor, "images width"]) -> Float[Tensor, " images"]:
        """The number of each picture, from its unit vector."""

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """See `Scorer`."""
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts for {len(images)} pictures")
        if not images:
            return []
        with torch.no_grad():
            values = self.values(prompts, self._features(images))
        return [{self.main: value} for value in values.tolist()]

    def score_tensors(
        self, prompts: Sequence[str], pixels: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, " images"]:
        """See `TensorScorer`."""
        return self.values(prompts, self.tower.pictures(self.tower.preprocess.tensors(pixels)))

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Float[Tensor, "images width"]:
        """Of each picture its unit vector, fp32, on the CPU: a feature space for distances."""
        return self._features(images).cpu()

    def _features(self, images: Sequence[Image.Image]) -> Float[Tensor, "images width"]:
        return torch.cat([self.tower.pictures(self.tower.preprocess.images(part)) for part in chunks(list(images))])

    def _fingerprint(self) -> str:
        return self.tower.fingerprint


class CosineScorer(TowerScorer):
    """A function of the cosine of prompt and picture.

    Args:
        rule: cosines -> numbers.
        prefix: put before every prompt.
    """

    def __init__(
        self,
        name: str,
        version: str,
        tower: Tower,
        precision: Precision = "fp32",
        *,
        rule: Callable[[Tensor], Tensor] | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(name, version, tower, precision)
        self._rule, self._prefix = rule, prefix

    def values(self, prompts: Sequence[str], features: Float[Tensor, "images width"]) -> Float[Tensor, " images"]:
        cosines = (self.tower.texts([f"{self._prefix}{prompt}" for prompt in prompts]) * features).sum(-1)
        return cosines if self._rule is None else self._rule(cosines)


# ------------------------------------------------------------------------------------------------------ parts


def unit(features: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """Rows of length 1, in fp32 whatever came in."""
    return functional.normalize(features.float(), dim=-1)


def chunks(items: list[Any]) -> list[list[Any]]:
    """At most BATCH at a time."""
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def choose_device(said: str | None) -> torch.device:
    """The one that is said, a GPU where there is one, the CPU."""
    return torch.device(said or ("cuda" if torch.cuda.is_available() else "cpu"))


def clip_tokens(folder: Path, config: Any) -> Callable[[list[str]], Int[Tensor, "texts tokens"]]:
    """The tokenizer of a CLIP's folder; where it has none, CLIP's own, which open_clip brings.

    Texts are padded to full length, so that a row is the same whatever it is batched with, and cut behind the last
    token that fits, with the end token kept: its place is where the text tower is read.

    Raises:
        UserError: the tokenizer's end token is not the one that the model looks for.
    """
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        length, end = config.max_position_embeddings, tokenizer.eos_token_id

        def encode(texts: list[str]) -> Tensor:
            said = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            ids: Tensor = said.input_ids
            return ids

    else:
        import open_clip

        own = open_clip.tokenizer.SimpleTokenizer(context_length=config.max_position_embeddings)
        end, encode = own.eot_token_id, own
        if config.vocab_size != own.vocab_size:
            raise UserError("the folder has no tokenizer, and the model is not of CLIP's own", place=str(folder))
    if config.eos_token_id not in (end, 2):  # 2 is how CLIP's first configurations say "the largest token"
        raise UserError(
            f"the text tower is read at token {config.eos_token_id}, the tokenizer ends texts with {end}",
            place=str(folder),
        )
    return encode


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, (tuple, list)) else size)
