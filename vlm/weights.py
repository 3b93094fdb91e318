"""Trained weights in the layouts that other programs open as they are.

LoRA    adapter_config.json, adapter_model.safetensors     PeftModel.from_pretrained(network, folder),
                                                           network.load_adapter(folder)
full    a folder of transformers                           AutoModelForImageTextToText.from_pretrained(folder)

Read back, equal bit for bit. An adapter is fp32; a fully trained model is written as it was trained, in fp32.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mmalign.errors import UserError, reason
from mmalign.fingerprints import module_fingerprint
from mmalign.weightfiles import check_adapter, read_tensors
from vlm.adapters import lora_layers
from vlm.models import VisionLanguageModel

ADAPTER = Path("adapter_model.safetensors")
ADAPTER_CONFIG = Path("adapter_config.json")
FULL = Path("model.safetensors")
PREFIX = "base_model.model."


def save_weights(model: VisionLanguageModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter, or the whole model with its processor when it has none.

    Args:
        folder: an existing one.
        state: the policy's whole state dict where its weights are sharded over processes; None: its own.
    """
    network = model.network
    named = network.state_dict() if state is None else {k.removeprefix("network."): v for k, v in state.items()}
    if not lora_layers(network):
        network.save_pretrained(folder, state_dict=dict(named), max_shard_size="1000GB")  # one file: FULL
        model.processor.save_pretrained(folder)
        return
    config = copy.copy(network.peft_config["default"])
    config.save_pretrained(folder)
    adapter = {
        PREFIX + name.replace(".default.", "."): tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in named.items()
        if ".lora_" in name
    }
    save_file(adapter, folder / ADAPTER, metadata={"format": "pt"})


def load_weights(model: VisionLanguageModel, folder: Path) -> None:
    """Read back what `save_weights` wrote, bit for bit, into a model of the same kind.

    Raises:
        UserError: there is nothing of this kind, or it has another rank or other layers.
    """
    network = model.network
    adapted = bool(lora_layers(network))
    file = folder / (ADAPTER if adapted else FULL)
    if not file.is_file():
        other = "the whole model" if (folder / FULL).is_file() else "an adapter" if (folder / ADAPTER).is_file() else ""
        raise UserError(
            f"expected {'an adapter' if adapted else 'the whole model'}, found {other or 'no weights'}",
            place=str(folder),
            fix="Resume with the recipe that wrote it" if other else "Give a folder of saved weights",
        )
    tensors = read_tensors(file) if adapted else _whole(network, folder)
    if adapted:
        _check_adapter(network, folder)
        tensors = {
            name.removeprefix(PREFIX).replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): t
            for name, t in tensors.items()
        }
    expected = {name: t for name, t in network.state_dict().items() if ".lora_" in name or not adapted}
    wrong = sorted(set(expected) ^ set(tensors)) or [
        name for name, tensor in tensors.items() if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise UserError(
            f"the weights belong to another model: {len(wrong)} of {len(expected)} differ, first {wrong[0]}",
            place=str(file),
            fix="Use the model and the adapter settings that they were saved with",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            expected[name].copy_(tensor)


def open_weights(model: VisionLanguageModel, folder: Path) -> None:
    """Put saved weights on a freshly opened model, adapter or whole, whichever the folder holds.

    Args:
        folder: of the weights, or a checkpoint with the weights in its `model`.

    Raises:
        UserError: no weights there, or they do not fit, as those of another family do not.
    """
    if not folder.is_dir():
        raise UserError("no such folder of weights", place=str(folder), fix="Give a checkpoint or weights from one")
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not (folder / ADAPTER).is_file():
        load_weights(model, folder)
        return
    config = _adapter_config(folder)
    wanted = {
        name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in read_tensors(folder / ADAPTER) if ".lora_" in name
    }
    missing = sorted(wanted - {name for name, _ in model.network.named_modules()})
    if missing:
        raise UserError(
            f"the adapter belongs to another model: it changes {missing[0]}, which this one has not",
            place=str(folder / ADAPTER),
            fix="Use the model that it was trained on",
        )
    model.network.requires_grad_(False)
    with torch.random.fork_rng():
        model.network.add_adapter(config)
    for name, parameter in model.network.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(False)
    model.network.eval()  # as it was opened: an adapter's new layers begin in training mode, with its dropout
    load_weights(model, folder)


def start_from(model: VisionLanguageModel, folder: Path) -> None:
    """Make saved weights the base of a new run: an adapter is merged in, the reference starts there too.

    The model's identity becomes theirs, so that nothing kept for the original is taken for this one.
    """
    open_weights(model, folder)
    if lora_layers(model.network):
        _merge(model.network)
    model.identity = f"{model.identity.partition('@')[0]}@{module_fingerprint(model.network)[:12]}"


def _merge(network: Any) -> None:
    """Fold the adapter into the weights and take it off."""
    for name, module in list(network.named_modules()):
        if not hasattr(module, "get_base_layer"):
            continue
        module.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, module.get_base_layer())
    del network.peft_config
    network._hf_peft_config_loaded = False


def _whole(network: Any, folder: Path) -> dict[str, Tensor]:
    """Weights of a folder by the network's own names: files have those of older layouts, transformers knows both."""
    try:
        other, report = type(network).from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the weights cannot be read: {reason(error)}", place=str(folder)) from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{len(missing)} weights are missing, first {missing[0]}", place=str(folder))
    return dict(other.state_dict())


def _adapter_config(folder: Path) -> LoraConfig:
    place = str(folder / ADAPTER_CONFIG)
    try:
        settings: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if settings.get("peft_type") != "LORA":
            raise UserError(f"an adapter of type {settings.get('peft_type')} is not supported", place=place)
        config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the adapter's configuration: {error}", place=place) from error
    return config


def _check_adapter(network: Any, folder: Path) -> None:
    saved, own = _adapter_config(folder), network.peft_config["default"]
    pairs = [("rank", saved.r, own.r), ("alpha", saved.lora_alpha, own.lora_alpha)]
    check_adapter(folder / ADAPTER_CONFIG, pairs)
