"""Memory: how much this process used, and how a model gets by with less."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch


def resident_gb() -> float:
    """Peak resident memory of this program so far, in GiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # of this program alone: getrusage goes on counting from the process that started it
        high = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(high.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def peak_gb(device: torch.device | None = None) -> float:
    """Peak memory of this process so far where the work is done, in GiB: on the GPU if there is one, else resident."""
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    return torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else resident_gb()


def recompute_activations(model: Any) -> None:
    """Keep fewer activations of a transformers model: the backward pass computes them again."""
    # transformers 5.23 renamed it
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
