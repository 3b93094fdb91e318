"""Opens a vision-language model and its processor from a folder or the hub, and refuses anything else in one line.

The configuration is looked at before a weight is read or downloaded. Weights are safetensors only; no code of a
model is ever run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from mmalign import hub
from mmalign.errors import UserError, reason
from mmalign.shapes import TALKING, model_folder
from vlm.families import FAMILIES, Family, configure
from vlm.settings import VlmModelSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_network(settings: VlmModelSettings, *, dtype: torch.dtype) -> tuple[Any, Any, Family]:
    """(network, processor, family), on the CPU, in eval mode and with nothing trainable.

    Raises:
        UserError: no such folder or hub model, not in the local cache while offline, a kind that is not supported,
            weights missing or not safetensors, or a processor that does not belong to the model.
    """
    source, place = located(settings.path), f"model.path: {settings.path}"
    family = FAMILIES[_model_type(settings, place)]
    if Path(source).is_dir():
        _check_weights(Path(source), place)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options: dict[str, Any] = {
        "revision": settings.revision,
        "local_files_only": hub.is_offline(settings.offline),
        "trust_remote_code": False,
    }
    try:
        processor: Any = transformers.AutoProcessor.from_pretrained(source, **options)
    except hub.LOADING as error:
        raise UserError(f"cannot open the processor: {reason(error)}", place=place) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise UserError("the model has no image processor beside its tokenizer", place=place)
    try:
        network, report = transformers.AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=settings.attention,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except hub.LOADING as error:
        raise UserError(f"cannot open the model: {reason(error)}", place=place) from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{len(missing)} weights are missing and would be random, first {missing[0]}",
            place=place,
            fix="Use a complete checkpoint",
        )
    _check_tokens(network, processor, place)
    configure(processor, network.config, family, settings)
    network.requires_grad_(False).eval()
    return network, processor, family


def located(path: str) -> str:
    """Folder or hub id behind `model.path`: models that come along have a name."""
    return str(model_folder(TALKING[path])) if path in TALKING else path


def _model_type(settings: VlmModelSettings, place: str) -> str:
    """The model type that config.json names, if it is one we know."""
    source = located(settings.path)
    if Path(source).is_file():
        raise UserError("this is a file, not a model's folder", place=place)
    if not Path(source).is_dir() and not hub.HUB_ID.fullmatch(source):
        raise UserError("there is no such folder", place=place, fix="Give a folder or a hub id owner/name")
    config = hub.read_json(
        source,
        "config.json",
        revision=settings.revision,
        offline=hub.is_offline(settings.offline),
        place=place,
        missing="not a model's folder: it has no config.json",
    )
    found = config.get("model_type")
    if found not in FAMILIES:
        raise UserError(f"a model of type {found} is not supported", place=place, fix=f"Known: {', '.join(FAMILIES)}")
    return str(found)


def _check_weights(folder: Path, place: str) -> None:
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")):
        raise UserError(
            "the folder has only pickled weights (.bin), which can run code when they are read",
            place=place,
            fix="Use a model with .safetensors, or convert it where you trust it",
        )
    raise UserError("the folder has no weights (*.safetensors)", place=place, fix="Copy or download the model again")


def _check_tokens(network: Any, processor: Any, place: str) -> None:
    """The placeholder is one token, the same for both."""
    theirs = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    own = network.config.image_token_id
    if theirs != own:
        raise UserError(
            f"the tokenizer's {processor.image_token} is token {theirs}, the model's placeholder is {own}",
            place=place,
            fix="The processor belongs to another model",
        )
