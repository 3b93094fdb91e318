"""Content fingerprints of models: caches and checkpoints know what they belong to, wherever it lies."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 1 << 20  # bytes read of each tensor: a fine-tuned model differs nearly everywhere


def _sampled(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().view(torch.uint8).flatten()
    stride = max(1, len(flat) // SAMPLE)
    return bytes(flat[::stride].cpu().numpy().tobytes())


def module_fingerprint(module: nn.Module) -> str:
    """SHA-256 (hex) of a module's configuration, names, shapes, dtypes and (sampled) weights."""
    digest = hashlib.sha256()
    settings: Any = getattr(module, "config", {})
    entries = settings.to_dict() if hasattr(settings, "to_dict") else dict(settings)
    # What starts with _ says where it was loaded from and by which version, not what it is.
    kept = {key: value for key, value in entries.items() if not str(key).startswith("_")}
    kept.pop("transformers_version", None)
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_sampled(tensor))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) of all that turns text into ids: vocabulary, merges, normalisation, length."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("truncation", None)  # of the last call, not of the tokenizer: a used one is the same one
    backend.pop("padding", None)
    text = f"{json.dumps(backend, sort_keys=True)} {tokenizer.model_max_length} {tokenizer.pad_token}"
    return hashlib.sha256(text.encode()).hexdigest()
