"""The image index: cosines by hand, stable order, equal pictures once, nothing encoded twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_vlms
from numpy import ndarray
from PIL import Image

from mmalign.errors import UserError
from mmalign.media import Media
from vlm.models import open_model
from vlm.retrieval import ImageIndex, vision_encoder
from vlm.settings import VlmModelSettings


def picture(*values: int) -> Media:
    """A picture of one column of greys."""
    return Media.from_image(Image.fromarray(np.array([[[v, v, v]] for v in values], dtype=np.uint8)))


class Greys:
    """Encodes a picture as its greys, and counts."""

    def __init__(self) -> None:
        self.encoded: list[int] = []

    def __call__(self, images: Sequence[Media]) -> ndarray:
        self.encoded.append(len(images))
        return np.stack([np.asarray(image.open())[:, 0, 0].astype(np.float32) for image in images])


def test_search_is_cosine_and_ties_stand_in_order() -> None:
    images = [picture(3, 4), picture(4, 3), picture(6, 8), picture(0, 5), picture(3, 4), picture(30, 40)]
    encode = Greys()
    index = ImageIndex.build(images, encode)
    assert len(index) == 5 and encode.encoded == [5]  # the same file twice is one
    digests = [image.sha256() for image in images]
    found = index.search(np.array([3.0, 4.0], dtype=np.float32), 4)
    assert [digest for digest, _ in found] == [digests[0], digests[2], digests[5], digests[1]]
    assert [score for _, score in found] == pytest.approx([1.0, 1.0, 1.0, 0.96], abs=1e-6)
    own = index.search(index.vector(digests[2]), 10, exclude={digests[2], "unknown"})
    assert [digest for digest, _ in own] == [digests[0], digests[5], digests[1], digests[3]]


def test_equal_vectors_stay_in_order_wherever_they_stand() -> None:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(400, 37)).astype(np.float32)
    rows[[3, 57, 211, 399]] = rows[3]
    rows[[57, 399]] *= 2  # normalised, they differ in the last bit at most
    index = ImageIndex([str(i) for i in range(400)], rows / np.linalg.norm(rows, axis=1, keepdims=True))
    for probe in (rows[3], rows[3] + 0.1 * generator.normal(size=37).astype(np.float32)):
        assert [digest for digest, _ in index.search(probe, 4)] == ["3", "57", "211", "399"]
    scores = index.vectors @ (rows[5] / np.linalg.norm(rows[5]))
    brute = sorted(range(400), key=lambda i: (-round(float(scores[i]), 6), i))[:50]
    assert [digest for digest, _ in index.search(rows[5], 50)] == [str(i) for i in brute]


def test_vectors_are_kept_by_content_and_encoder(tmp_path: Path) -> None:
    file, encode = tmp_path / "index" / "v.safetensors", Greys()
    first = ImageIndex.build([picture(1, 2), picture(3, 4)], encode, file=file, encoder="greys")
    again = ImageIndex.build([picture(3, 4), picture(5, 6), picture(1, 2)], encode, file=file, encoder="greys")
    assert encode.encoded == [2, 1]
    assert np.array_equal(again.vector(picture(3, 4).sha256()), first.vector(picture(3, 4).sha256()))
    assert again.digests == tuple(picture(*v).sha256() for v in ((3, 4), (5, 6), (1, 2)))
    ImageIndex.build([picture(3, 4)], encode, file=file, encoder="another")
    assert encode.encoded == [2, 1, 1]
    assert not list(file.parent.glob(".*"))
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="no index of images"):
        ImageIndex.build([picture(3, 4)], encode, file=file, encoder="another")
    with pytest.raises(UserError, match="no images"):
        ImageIndex.build([], encode)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "smolvlm"])
def test_the_models_own_tower_encodes_each_picture_alone(name: str, tmp_path: Path) -> None:
    model = open_model(VlmModelSettings(path=str(tiny_vlms.write(name, tmp_path / name))))
    images = [
        Media.from_image(tiny_vlms.picture(seed, width, 40)) for seed, width in ((1, 48), (2, 64), (1, 48), (3, 40))
    ]
    encode = vision_encoder(model)
    together = encode(images)
    assert together.shape == (4, 48)
    assert np.array_equal(together[0], together[2]) and not np.allclose(together[0], together[1])
    assert np.array_equal(encode(images[1:2])[0], together[1])
