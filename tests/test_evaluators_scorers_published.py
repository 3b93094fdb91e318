"""The published weights themselves, where somebody has them: MMALIGN_TEST_WEIGHTS names the folder of weights.

Nothing is downloaded. A scorer whose weights are not in the folder is skipped, and says so.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from evaluators import weights
from evaluators.preprocess import TensorScorer
from evaluators.scorer import card, load, main_scores

FOLDER = os.environ.get("MMALIGN_TEST_WEIGHTS")
PROMPTS = ["a photograph of an astronaut", "a cup of coffee", "a photograph of an astronaut", "a cup of coffee"]
# what published tables and cards say of natural pictures, with room on either side
RANGES = {
    "clipscore": (0.2, 1.1),
    "pickscore": (14, 26),
    "hpsv2": (0.1, 0.4),
    "imagereward": (-3, 2.5),
    "aesthetic": (3, 8),
    "vqascore": (0, 1),
    "rating": (1, 5),
}


def pictures() -> list[Image.Image]:
    data = pytest.importorskip("skimage.data", reason="scikit-image has the photographs")
    one, other = Image.fromarray(data.astronaut()), Image.fromarray(data.coffee())
    return [one, other, other, one]


@pytest.mark.parametrize("name", RANGES)
def test_published_weights_give_published_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not FOLDER:
        pytest.skip("MMALIGN_TEST_WEIGHTS names no folder of published weights")
    monkeypatch.setenv("MMALIGN_WEIGHTS", FOLDER)
    missing = [one.described for one in card(name).weights if weights.local(one) is None]
    if missing:
        pytest.skip(f"not in {Path(FOLDER).name}: {'; '.join(missing)}")
    scorer, images = load(name), pictures()
    values = main_scores(scorer, PROMPTS, images)
    low, high = RANGES[name]
    assert all(low <= value <= high for value in values)
    if name != "aesthetic":  # which reads no prompt
        assert values[0] > values[2] and values[1] > values[3]
    assert isinstance(scorer, TensorScorer)
