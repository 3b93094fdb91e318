"""Whether a picture shows the words that its prompt puts into quotation marks, read by an OCR that ships its own model.

    ocr = 1 - min(edits(target, read), |target|) / |target|        0 to 1; 1 when the target is part of what is read

Target and what is read are compared in lower case and without spaces. A prompt without a quotation has no target: that
is an error of its row, not a 0, and so is a reader that fails.

Source: the text-rendering reward of Liu et al. 2505.05470 (Flow-GRPO).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from evaluators.scorer import Card
from mmalign.errors import UserError

PACKAGE = "rapidocr_onnxruntime"
CARD = Card(
    unit="1 - edit distance / length, 0 to 1",
    licence="Apache-2.0; the models in the wheel Apache-2.0 (PaddleOCR)",
    needs=(PACKAGE,),
)
_QUOTED = re.compile(r'"([^"]*)"|\u201c([^\u201d]*)\u201d')

Reader = Callable[[Image.Image], str]


class OcrScorer:
    """See the module's docstring."""

    main = "ocr"
    numbers = ("ocr",)

    def __init__(self, reader: Reader, identity: str) -> None:
        self._read, self.identity = reader, identity

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """See `Scorer`."""
        targets = [target(prompt) for prompt in prompts]
        return [{"ocr": rendered(one, self._read(image))} for one, image in zip(targets, images, strict=True)]


def target(prompt: str) -> str:
    """What the first quotation in a prompt says, folded.

    Raises:
        UserError: there is none, or nothing in it.
    """
    found = _QUOTED.search(prompt)
    text = _folded(found[1] or found[2] or "") if found else ""
    if not text:
        raise UserError(f"the prompt quotes no text: {prompt[:80]!r}", fix='It should say: a sign that reads "hello".')
    return text


def rendered(target: str, read: str) -> float:
    """The score of what was read, for a folded target."""
    read = _folded(read)
    if target in read:
        return 1.0
    return 1 - min(edits(target, read), len(target)) / len(target)


def edits(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements of a character."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (one != other))
    return row[-1]


def _folded(text: str) -> str:
    return "".join(text.lower().split())


def build() -> OcrScorer:
    """The score by RapidOCR, whose wheel has its models.

    Raises:
        UserError: the package is not installed.
    """
    import importlib.metadata

    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise UserError(f"the package '{PACKAGE}' is not installed", fix="pip install -e '.[ocr]'.") from error
    engine = RapidOCR()

    def read(image: Image.Image) -> str:
        lines, _ = engine(np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1]))  # it reads BGR
        return " ".join(str(line[1]) for line in lines or [])

    return OcrScorer(read, f"ocr@1#rapidocr-{importlib.metadata.version('rapidocr-onnxruntime')}")
