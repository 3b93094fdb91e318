"""Trained weights in the layouts that other programs open as they are.

LoRA    pytorch_lora_weights.safetensors     pipeline.load_lora_weights(folder)
        unet_peft/                           PeftModel.from_pretrained(unet, folder / "unet_peft")
full    unet/                                UNet2DConditionModel.from_pretrained(folder, subfolder="unet")

All of them fp32 and, read back, equal bit for bit.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion.adapters import attach, lora_layers, merge_lora
from diffusion.models import DiffusionModel
from mmalign.errors import UserError
from mmalign.fingerprints import module_fingerprint
from mmalign.weightfiles import check_adapter, read_tensors

FULL = Path("unet", "diffusion_pytorch_model.safetensors")
PEFT = Path("unet_peft", "adapter_model.safetensors")
PEFT_CONFIG = Path("unet_peft", "adapter_config.json")
PEFT_PREFIX = "base_model.model."


def save_weights(unet: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter, or the whole UNet when it has none.

    Args:
        unet: unwrapped.
        folder: an existing one.
        state: the UNet's whole state dict where its weights are sharded over processes; None: its own.
    """
    named = dict(unet.state_dict() if state is None else state)
    # Channels-last weights are not contiguous and safetensors would refuse them.
    tensors = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in named.items()}
    if not lora_layers(unet):
        (folder / FULL.parent).mkdir(exist_ok=True)
        unet.save_config(folder / FULL.parent)
        save_file(tensors, folder / FULL, metadata={"format": "pt"})
        return
    config = copy.copy(unet.peft_config["default"])
    config.target_modules = sorted(config.target_modules)  # peft keeps a set: equal runs would have unequal files
    adapter = {name.replace(".default.", "."): t for name, t in tensors.items() if ".lora_" in name}
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder, unet_lora_layers=adapter, unet_lora_adapter_metadata=config.to_dict()
    )
    (folder / PEFT.parent).mkdir(exist_ok=True)
    config.save_pretrained(folder / PEFT.parent)
    save_file({PEFT_PREFIX + k: t for k, t in adapter.items()}, folder / PEFT, metadata={"format": "pt"})


def load_weights(unet: Any, folder: Path) -> None:
    """Read back what `save_weights` wrote, bit for bit, into a UNet of the same kind.

    Raises:
        UserError: there is nothing of this kind, or it has another rank or other layers.
    """
    _assign(unet, read_weights(unet, folder))


def read_weights(unet: Any, folder: Path) -> dict[str, Tensor]:
    """The state-dict entries that `folder` holds for this UNet, checked against its names and shapes."""
    adapted = bool(lora_layers(unet))
    file = folder / (PEFT if adapted else FULL)
    if not file.is_file():
        other = "the whole UNet" if (folder / FULL).is_file() else "an adapter" if (folder / PEFT).is_file() else None
        raise UserError(
            f"expected {'an adapter' if adapted else 'the whole UNet'}, found {other or 'no weights'}",
            place=str(folder),
            fix="Resume with the recipe that wrote it" if other else "Give a folder of saved weights",
        )
    tensors = read_tensors(file)
    if adapted:
        _check_adapter(unet, folder)
        tensors = {
            name.removeprefix(PEFT_PREFIX)
            .replace(".lora_A.", ".lora_A.default.")
            .replace(".lora_B.", ".lora_B.default."): t
            for name, t in tensors.items()
        }
    expected = {name: t for name, t in unet.state_dict().items() if ".lora_" in name or not adapted}
    wrong = sorted(set(expected) ^ set(tensors)) or [n for n, t in expected.items() if t.shape != tensors[n].shape]
    if wrong:
        raise UserError(
            f"the weights belong to another model: {len(wrong)} of {len(expected)} differ, first {wrong[0]}",
            place=str(file),
            fix="Use the model and the adapter settings that they were saved with",
        )
    return tensors


def open_weights(model: DiffusionModel, folder: Path) -> None:
    """Put saved weights on a freshly opened model, adapter or whole, whichever the folder holds.

    Args:
        folder: of the weights, or a checkpoint with the weights in its `model`.

    Raises:
        UserError: no weights there, or they do not fit.
    """
    if not folder.is_dir():
        raise UserError(
            "no such folder of weights", place=str(folder), fix="Give a checkpoint or weights taken from one"
        )
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if (folder / PEFT).is_file():
        config = _adapter_config(folder)
        attach(model.unet, config["r"], float(config["lora_alpha"]), config["target_modules"])
        model.unet.requires_grad_(False)
    load_weights(model.unet, folder)


def start_from(model: DiffusionModel, folder: Path) -> None:
    """Make saved weights the base of a new run: an adapter is merged in, the reference starts there too.

    The model's identity becomes theirs, so that nothing kept for the original is taken for this one.
    """
    open_weights(model, folder)
    if lora_layers(model.unet):
        merge_lora(model.unet)
    model.identify()  # checkpoints and cached reference errors belong to this base, not to the one it came from
    model.identity = f"{model.identity.partition('@')[0]}@{module_fingerprint(model.unet)[:12]}"


def _adapter_config(folder: Path) -> dict[str, Any]:
    place = str(folder / PEFT_CONFIG)
    try:
        config: dict[str, Any] = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
        targets = config["target_modules"]
        good = config["r"] > 0 and config["lora_alpha"] > 0 and all(isinstance(name, str) for name in targets)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the adapter's configuration: {error}", place=place) from error
    if not good or isinstance(targets, str):
        raise UserError("the adapter's configuration makes no sense", place=place)
    return {**config, "target_modules": sorted(targets)}


def _check_adapter(unet: Any, folder: Path) -> None:
    saved, own = _adapter_config(folder), unet.peft_config["default"]
    pairs = [
        ("rank", saved["r"], own.r),
        ("alpha", saved["lora_alpha"], own.lora_alpha),
        ("targets", ", ".join(saved["target_modules"]), ", ".join(sorted(own.target_modules))),
    ]
    check_adapter(folder / PEFT_CONFIG, pairs)


@torch.no_grad()
def _assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the module's own storage, sharded (FSDP2) or not: optimizers stay valid."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    state = module.state_dict()
    for name, tensor in tensors.items():
        target = state[name]
        if isinstance(target, DTensor):
            tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
        target.copy_(tensor)
