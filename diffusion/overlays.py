"""What few-step models are shipped as: other UNet weights over a base, and LoRAs to be fused into it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion.adapters import lora_layers
from mmalign import hub
from mmalign.errors import UserError, reason

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' own name
SAME = ("in_channels", "out_channels", "cross_attention_dim", "projection_class_embeddings_input_dim")
ORIGINAL = "model.diffusion_model."  # how keys of unconverted checkpoints begin
FITTING = "Give a LoRA that was made for this base"


def open_unet(source: str, base: Mapping[str, Any], *, dtype: torch.dtype, offline: bool) -> Any:
    """A UNet for the pipeline whose own UNet has the configuration `base`.

    Args:
        source: a UNet's folder or hub id, or a pipeline's; or a file of its weights alone, for `base` as it is.

    Raises:
        UserError: not there, pickled, of another architecture, or with other names or shapes.
    """
    place = f"model.unet: {source}"
    file = hub.single_file(source, offline=offline, place=place)
    if file is not None:
        return _from_file(file, base, place).to(dtype)
    inside = _subfolder(source, offline, place)
    missing = "not a diffusers UNet: it has no config.json"
    config = hub.read_json(source, f"{inside}config.json", offline=offline, place=place, missing=missing)
    _check_config(config, base, place)
    try:
        unet, info = diffusers.UNet2DConditionModel.from_pretrained(
            source,
            subfolder=inside.rstrip("/") or None,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=offline,
            output_loading_info=True,
        )
    except hub.LOADING as error:
        fix = "Its weights must be safetensors of this architecture"
        raise UserError(f"cannot load the UNet: {reason(error)}", place=place, fix=fix) from error
    _refuse(info["missing_keys"], info["unexpected_keys"], [str(key) for key, *_ in info["mismatched_keys"]], place)
    return unet


def fuse_lora(pipeline: Any, source: str, *, offline: bool) -> str:
    """Fold a LoRA into the pipeline, which then has no adapter.

    Args:
        pipeline: on the CPU.
        source: a file in any layout that diffusers reads; or a folder or a hub id with one.

    Returns:
        SHA-256 (hex) of the file.

    Raises:
        UserError: not there, pickled, not a LoRA, or one for another model.
    """
    place = f"model.lora: {source}"
    file = _lora_file(source, offline, place)
    try:
        with _silence():
            tensors = pipeline.lora_state_dict(
                str(file.parent), weight_name=file.name, unet_config=pipeline.unet.config
            )[0]
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    except hub.LOADING as error:
        raise UserError(f"cannot load the LoRA: {reason(error)}", place=place, fix=FITTING) from error
    # What has no place in the UNet is no error of diffusers.
    given = sum(name.startswith("unet.") and name.endswith(".weight") for name in tensors)
    used = sum(".lora_" in name and name.endswith(".weight") for name in pipeline.unet.state_dict())
    if not lora_layers(pipeline.unet) or used < given:
        cause = f"{given - used} of the {given} matrices" if given else "nothing"
        has = "have no place in this UNet" if given else "in it is for a UNet"
        raise UserError(f"{cause} {has}", place=place, fix=FITTING)
    trained = [name for name in ("unet", "text_encoder", "text_encoder_2") if getattr(pipeline, name, None) is not None]
    try:
        pipeline.fuse_lora(components=trained, safe_fusing=True)
    except ValueError as error:
        raise UserError(f"the fused weights are not finite: {reason(error)}", place=place) from error
    pipeline.unload_lora_weights()
    for name in trained:
        getattr(pipeline, name).requires_grad_(False).eval()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What the libraries log and warn of here comes back as an error of ours, in one line."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            yield
    finally:
        diffusers.utils.logging.set_verbosity(before)


def _from_file(file: Path, base: Mapping[str, Any], place: str) -> Any:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except hub.LOADING as error:
        raise UserError(f"the weights cannot be read: {reason(error)}", place=place) from error
    if any(name.startswith(ORIGINAL) for name in tensors):
        cause, fix = "a checkpoint in the original layout, not diffusers'", "Convert it with diffusers first"
        raise UserError(cause, place=place, fix=fix)
    with torch.device("meta"):  # its random start would take minutes, and is not needed
        unet: Any = diffusers.UNet2DConditionModel.from_config(base)
    own: dict[str, Tensor] = unet.state_dict()
    shapes = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    _refuse(own.keys() - tensors.keys(), tensors.keys() - own.keys(), shapes, place)
    unet.load_state_dict(tensors, assign=True)
    return unet


def _subfolder(source: str, offline: bool, place: str) -> str:
    """Where in a folder or a hub model the UNet is: a whole pipeline will do as well."""
    folder = Path(source)
    if not folder.is_dir():
        return "unet/" if hub.has_file(source, "unet/config.json", offline=offline) else ""
    inside = "unet/" if (folder / "unet" / "config.json").is_file() else ""
    if any((folder / inside).glob("*.bin")) and not any((folder / inside).glob("*.safetensors")):
        raise UserError(
            "has only pickled weights (.bin), which can run code when they are read", place=place, fix=hub.CONVERT
        )
    return inside


def _check_config(config: Mapping[str, Any], base: Mapping[str, Any], place: str) -> None:
    kind = config.get("_class_name")
    if kind != "UNet2DConditionModel":
        raise UserError(f"a {kind}, not a UNet2DConditionModel", place=place)
    for key in SAME:
        if key in config and config[key] != base.get(key, config[key]):
            cause = f"another architecture: its {key} is {config[key]}, the base's {base[key]}"
            raise UserError(cause, place=place, fix="Give a UNet for this base, or another model.path")


def _refuse(missing: Collection[str], unexpected: Collection[str], shapes: Collection[str], place: str) -> None:
    """One line about weights that are not the UNet's."""
    found = {"missing": missing, "unknown": unexpected, "of another shape": shapes}
    said = [
        f"{len(names)} {how} ({min(names)}{', ...' if len(names) > 1 else ''})" for how, names in found.items() if names
    ]
    if said:
        fix = "Give weights of the base's architecture"
        raise UserError(f"the weights are of another UNet: {', '.join(said)}", place=place, fix=fix)


def _lora_file(source: str, offline: bool, place: str) -> Path:
    file = hub.single_file(source, offline=offline, place=place)
    if file is not None:
        return file
    folder = Path(source)
    if not folder.is_dir():
        missing = f"the model has no {LORA_FILE}; say which file: {source}/FILE.safetensors"
        return hub.download(source, LORA_FILE, offline=offline, place=place, missing=missing)
    if (folder / LORA_FILE).is_file():
        return folder / LORA_FILE
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        cause = f"{len(found)} .safetensors files in the folder"
        raise UserError(cause, place=place, fix="Give the LoRA's file itself")
    return found[0]
