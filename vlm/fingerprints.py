"""What a model is, whatever its folder is called: files made with one are not taken for another's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vlm.models import VisionLanguageModel

_SAMPLES = 64  # values per tensor: training changes every tensor nearly everywhere


def model_identity(model: VisionLanguageModel) -> str:
    """ "name@fingerprint" of the weights as they are, the adapter's included, the chat template and picture sizes."""
    digest = hashlib.sha256(f"{model.template} {model.processor.image_processor.to_json_string()}".encode())
    for name, tensor in sorted(model.network.state_dict().items()):
        values = tensor.flatten()
        few = values[:: max(values.numel() // _SAMPLES, 1)].to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + few.numpy().tobytes())
    return f"{Path(model.settings.path).name}@{digest.hexdigest()[:12]}"
