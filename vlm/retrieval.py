"""Pictures that look alike to the model: its own image tokens, averaged, compared by cosine.

    v(image) = mean over its image tokens / norm          similarity = v(a) . v(b)

Brute force over all pictures: a hundred thousand of them are searched in milliseconds each. What is equally similar
stands in the order of the index. Vectors are kept in a safetensors file under the images' content, so that a picture is
never encoded twice, whatever it is called.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmalign.errors import UserError
from mmalign.media import Media
from mmalign.progress import Progress
from vlm.batch import ImageInput
from vlm.conversations import Conversation
from vlm.models import VisionLanguageModel

Encode: TypeAlias = Callable[[Sequence[Media]], ndarray]
"""Images -> float vectors [images, width], each independent of what it is encoded with."""

_DIGITS = 6  # of a similarity: below, sums in another order differ, and equal pictures must stay equal
_GROUP = 64  # images between two updates of the bar


class ImageIndex:
    """Vectors of distinct images.

    Attributes:
        digests: SHA-256 of each image, in the order in which they were first given.
        vectors: of length 1, in the same order.
    """

    def __init__(self, digests: Sequence[str], vectors: Float[ndarray, "images width"]) -> None:
        self.digests = tuple(digests)
        self.vectors = vectors
        self._rows = {digest: row for row, digest in enumerate(self.digests)}

    def __len__(self) -> int:
        return len(self.digests)

    @classmethod
    def build(
        cls, images: Sequence[Media], encode: Encode, *, file: Path | None = None, encoder: str = ""
    ) -> ImageIndex:
        """The index of some images; the same image twice is one.

        Args:
            file: where vectors are kept; those that it has are not made again, and new ones are added.
            encoder: names what `encode` does. A file of another encoder's vectors is replaced.

        Raises:
            UserError: no image, an image that does not open, or a file that is no such index.
        """
        distinct = {image.sha256(): image for image in images}
        if not distinct:
            raise UserError("there are no images to search among")
        known = {} if file is None else _load(file, encoder)
        new = [digest for digest in distinct if digest not in known]
        if new:
            with Progress(len(new), "encode images", unit="image") as bar:
                for start in range(0, len(new), _GROUP):
                    some = new[start : start + _GROUP]
                    vectors = np.asarray(encode([distinct[digest] for digest in some]), dtype=np.float32)
                    known |= dict(zip(some, _normalised(vectors), strict=True))
                    bar.update(len(some))
            if file is not None:
                _save(file, known, encoder)
        return cls(list(distinct), np.stack([known[digest] for digest in distinct]))

    def vector(self, digest: str) -> Float[ndarray, " width"]:
        """The vector of an image of the index."""
        found: ndarray = self.vectors[self._rows[digest]]
        return found

    def search(
        self, vector: Float[ndarray, " width"], k: int, exclude: Collection[str] = ()
    ) -> list[tuple[str, float]]:
        """(digest, cosine) of the `k` most similar images, the most similar first; ties in the index's order.

        Args:
            exclude: digests of images that are not wanted: the picture itself.
        """
        scores = np.round(self.vectors @ _normalised(vector[None])[0], _DIGITS)
        scores[[self._rows[digest] for digest in exclude if digest in self._rows]] = -np.inf
        order = np.argsort(-scores, kind="stable")[:k]
        return [(self.digests[row], float(scores[row])) for row in order if np.isfinite(scores[row])]


def vision_encoder(model: VisionLanguageModel) -> Encode:
    """Means of the model's own image tokens, as its vision tower and projector make them."""

    def one(image: Media) -> ImageInput:
        talk = Conversation(
            messages=({"role": "user", "content": [{"type": "image"}]},), images=(image.open(),), answer=None, place=""
        )
        return model.encode(talk).images[0]

    @torch.no_grad()
    def encode(images: Sequence[Media]) -> ndarray:
        # One by one: what a picture comes to must not depend on the pictures beside it.
        rows = []
        for image in images:
            features = model.encode_images([one(image)])
            assert features is not None  # of one image
            rows.append(features.pooled[0].float().mean(dim=0).cpu().numpy())
        return np.stack(rows)

    return encode


def _normalised(vectors: Float[ndarray, "images width"]) -> Float[ndarray, "images width"]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: ndarray = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    return unit


def _load(file: Path, encoder: str) -> dict[str, ndarray]:
    if not file.exists():
        return {}
    try:
        with safe_open(file, framework="np") as opened:
            about = opened.metadata() or {}
            digests, vectors = json.loads(about["digests"]), opened.get_tensor("vectors")
        if about["encoder"] != encoder:
            return {}
        return dict(zip(digests, vectors, strict=True))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"no index of images: {error}", place=str(file), fix="Delete it; it is made again") from error


def _save(file: Path, known: dict[str, ndarray], encoder: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    about = {"encoder": encoder, "digests": json.dumps(list(known))}
    save_file({"vectors": np.stack(list(known.values()))}, partial, metadata=about)
    os.replace(partial, file)
