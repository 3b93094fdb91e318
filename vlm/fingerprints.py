"""What answers depend on besides the question: files made with one model are not taken for another's."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm.models import VisionLanguageModel


def model_identity(model: VisionLanguageModel) -> str:
    """The identity of the weights, and a fingerprint of chat template and picture sizes."""
    words = f"{model.template} {model.processor.image_processor.to_json_string()}"
    return f"{model.identity}/{hashlib.sha256(words.encode()).hexdigest()[:8]}"
