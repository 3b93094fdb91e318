"""ImageReward v1.0: a BLIP that reads the prompt while it looks at the picture, and a head on its first token.

    imagereward = (head(h) - 0.16717) / 1.03334        about N(0, 1) on what it was trained on; usually -2.3 to 2

Our port: transformers' BLIP with the published weights (`evaluators.blip`), the head folded to one affine map
(`evaluators.heads`). Prompts are cut behind 35 tokens, as in training.

Source: Xu et al. 2304.05977.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from evaluators.blip import Blip
from evaluators.heads import fold
from evaluators.preprocess import Preprocess
from evaluators.scorer import Card
from evaluators.towers import DTYPES, choose_device, chunks
from evaluators.weights import Weights, find, fingerprint, read_tensors
from mmalign.errors import UserError
from mmalign.precision import Precision

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the training set
TOKENS = 35
WEIGHTS = Weights(
    name="imagereward", repo="THUDM/ImageReward", file="ImageReward.pt", gigabytes=1.8, licence="Apache-2.0"
)
VOCABULARY = Weights(
    name="bert-base-uncased",
    repo="google-bert/bert-base-uncased",
    file="vocab.txt",
    gigabytes=0.0002,
    licence="Apache-2.0",
)
CARD = Card(unit="standardised, usually -2.3 to 2", licence="Apache-2.0", weights=(WEIGHTS, VOCABULARY))


class ImageReward:
    """See the module's docstring."""

    main = "imagereward"
    numbers = ("imagereward",)

    def __init__(self, file: Path, vocabulary: Path, device: str | None = None, precision: Precision = "fp32") -> None:
        from transformers import BertTokenizer

        state = read_tensors(file)
        place = str(file)
        stray = sorted(name for name in state if not name.startswith(("blip.", "mlp.")))
        if stray:
            raise UserError(f"wrong weights: '{stray[0]}' is no part of ImageReward", place=place)
        blip = Blip(_below(state, "blip."), place=place)
        self._head = fold(_below(state, "mlp."), width=blip.width, place=place)
        self._tokenizer: Any = BertTokenizer(str(vocabulary), do_lower_case=True)
        words, rows = len(self._tokenizer), blip.text_encoder.config.vocab_size
        if words > rows:
            raise UserError(f"the vocabulary has {words} words, the model {rows}", place=str(vocabulary))
        self.preprocess = Preprocess(size=blip.size)
        words_hash = hashlib.sha256(vocabulary.read_bytes()).hexdigest()
        own = fingerprint(blip, self._head.weight, self._head.bias, words_hash)
        half = "" if precision == "fp32" else f"-{precision}"
        self.identity = f"imagereward@1.0{half}#{own}"
        self._device, self._dtype = choose_device(device), DTYPES[precision]
        self._blip = blip.to(self._device, self._dtype)

    @torch.no_grad()
    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """See `Scorer`."""
        values: list[float] = []
        for part in chunks(list(zip(prompts, images, strict=True))):
            texts, pictures = [text for text, _ in part], [picture for _, picture in part]
            values += self._values(texts, self.preprocess.images(pictures)).tolist()
        return [{self.main: value} for value in values]

    def score_tensors(
        self, prompts: Sequence[str], pixels: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, " images"]:
        """See `TensorScorer`."""
        return self._values(list(prompts), self.preprocess.tensors(pixels))

    def _values(self, prompts: list[str], pixels: Float[Tensor, "images 3 size size"]) -> Float[Tensor, " images"]:
        # padded to full length, as in training: a row is the same whatever it is batched with
        said = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self._device)
        features = self._blip(said.input_ids, said.attention_mask, pixels.to(self._device, self._dtype))
        return (self._head(features) - MEAN) / STD


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def build(
    path: str | None = None,
    vocabulary: str | None = None,
    device: str | None = None,
    precision: Precision = "fp32",
    download: bool = False,
) -> ImageReward:
    """ImageReward; `path` is its checkpoint, `vocabulary` the vocab.txt of bert-base-uncased."""
    file, words = find(WEIGHTS, path, download=download), find(VOCABULARY, vocabulary, download=download)
    return ImageReward(file, words, device, precision)
