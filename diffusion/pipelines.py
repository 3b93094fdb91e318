"""Opens Stable Diffusion and SDXL pipelines from a folder or the hub, and refuses anything else in one line.

What is opened is looked at before a weight is read or downloaded: the pipeline's class, and that every part
comes from diffusers or transformers themselves. Weights are safetensors only; no code of a model is ever run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, TypeAlias

import diffusers
import huggingface_hub
import torch
import transformers
from huggingface_hub import errors as hub
from safetensors import SafetensorError

from diffusion.settings import ModelSettings
from mmalign import shapes
from mmalign.errors import UserError

Family: TypeAlias = Literal["sd", "sdxl"]

FAMILIES: dict[str, Family] = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS: dict[Family, tuple[str, ...]] = {
    "sd": ("vae", "unet", "text_encoder", "tokenizer", "scheduler"),
    "sdxl": ("vae", "unet", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"),
}
CLASSES = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
LIBRARIES = {None, "diffusers", "transformers", "stable_diffusion"}
INDEX = "model_index.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def open_pipeline(settings: ModelSettings, *, unet_dtype: torch.dtype) -> Any:
    """The pipeline that `settings` names, on the CPU, in eval mode and with nothing trainable.

    Raises:
        UserError: no such folder or hub model, not in the local cache while offline, not a pipeline, a kind
            that is not supported, parts missing, or weights that are not safetensors.
    """
    source = str(shapes.model_folder("t2i")) if settings.path == "shapes" else settings.path
    place = f"model.path: {settings.path}"
    offline = settings.offline or huggingface_hub.constants.HF_HUB_OFFLINE
    index = _read_index(source, settings.revision, offline, place)
    family = _check_index(index, place)
    if Path(source).is_dir():
        _check_weights(Path(source), family, place)

    _no_noise()
    dtype = DTYPES[settings.dtype]
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": offline}
    parts: dict[str, Any] = {}
    if settings.vae is not None:
        parts["vae"] = _open_vae(settings.vae, options)
    unused = ["image_encoder", "feature_extractor"] + (["safety_checker"] if family == "sd" else [])
    extra = {"requires_safety_checker": False} if family == "sd" else {"add_watermarker": False}
    try:
        pipeline: Any = getattr(diffusers, index["_class_name"]).from_pretrained(
            source,
            revision=settings.revision,
            variant=settings.variant,
            dtype={"default": dtype, "unet": unet_dtype},
            **options,
            **parts,
            **dict.fromkeys(unused),
            **extra,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, hub.HfHubHTTPError) as error:
        raise UserError(
            f"cannot load the pipeline: {_reason(error)}", place=place, fix="Its weights must be safetensors"
        ) from error
    _check_parts(pipeline, place)
    # SDXL's own VAE overflows in fp16 and says so in its configuration: it runs in fp32, as in the pipeline.
    keep = family == "sdxl" and dtype == torch.float16 and pipeline.vae.config.force_upcast
    pipeline.vae.to(torch.float32 if keep else dtype)
    if settings.prediction_type is not None:
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, prediction_type=settings.prediction_type
        )
    for name in PARTS[family]:
        module = getattr(pipeline, name)
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _no_noise() -> None:
    """No bar for every file that is opened, no advice about classes the user never named; downloads keep their bars."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def _read_index(source: str, revision: str | None, offline: bool, place: str) -> dict[str, Any]:
    """The content of model_index.json, of a folder or a hub model."""
    folder = Path(source)
    if folder.is_dir():
        file = folder / INDEX
    elif folder.is_file():
        raise UserError("this is a file, not a pipeline folder", place=place, fix="Convert it with diffusers first")
    elif not HUB_ID.fullmatch(source):
        raise UserError("there is no such folder", place=place, fix="Give a diffusers folder or a hub id owner/name")
    else:
        file = Path(_download_index(source, revision, offline, place))
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"not a diffusers pipeline: the folder has no {INDEX}",
            place=place,
            fix="Give the pipeline's top folder",
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{INDEX} cannot be read: {error}", place=place) from error
    if not isinstance(index, dict):
        raise UserError(f"{INDEX} is not an object", place=place)
    return index


def _download_index(name: str, revision: str | None, offline: bool, place: str) -> str:
    try:
        return str(huggingface_hub.hf_hub_download(name, INDEX, revision=revision, local_files_only=offline))
    except hub.GatedRepoError as error:
        cause, fix = (
            "the hub asks for a login and an accepted licence",
            "Accept it there and log in with `hf auth login`",
        )
        raise UserError(cause, place=place, fix=fix) from error
    except hub.RevisionNotFoundError as error:
        raise UserError(f"the model has no revision '{revision}'", place=place) from error
    except hub.RepositoryNotFoundError as error:
        cause = "neither a folder here nor a model on the hub that you may read"
        raise UserError(cause, place=place, fix="Check the spelling, or log in for a private one") from error
    except hub.LocalEntryNotFoundError as error:
        cause = "no folder here, and not in the local hub cache" + (" (offline)" if offline else "")
        raise UserError(cause, place=place, fix="Download it once while online, or give a folder") from error
    except hub.EntryNotFoundError as error:
        raise UserError(f"not a diffusers pipeline: the model has no {INDEX}", place=place) from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot ask the hub: {_reason(error)}", place=place) from error


def _check_index(index: dict[str, Any], place: str) -> Family:
    """The family, if the class is supported and every part is of diffusers or transformers themselves."""
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"a {name} is not supported",
            place=place,
            fix=f"Supported: {', '.join(FAMILIES)} (with all their weights)",
        )
    family = FAMILIES[name]
    for part, value in index.items():
        if isinstance(value, list) and (len(value) != 2 or value[0] not in LIBRARIES):
            cause = f"its part '{part}' comes with code of its own ({value[0] if value else None})"
            raise UserError(cause, place=place, fix="Only parts of diffusers and transformers are run")
    for part in PARTS[family]:
        value = index.get(part)
        if not isinstance(value, list) or value[1] is None:
            raise UserError(f"the pipeline has no {part}", place=place, fix="Give a complete pipeline")
        if part in CLASSES and value[1] != CLASSES[part]:
            raise UserError(f"its {part} is a {value[1]}", place=place, fix=f"Supported: {CLASSES[part]}")
    return family


def _check_weights(folder: Path, family: Family, place: str) -> None:
    """A clear word about the two commonest faults of a local folder, before diffusers gives a long one."""
    for part in PARTS[family]:
        if not (folder / part).is_dir():
            raise UserError(f"the folder has no '{part}'", place=place, fix="Copy or download the pipeline again")
        pickled = any((folder / part).glob("*.bin"))
        if pickled and not any((folder / part).glob("*.safetensors")):
            raise UserError(
                f"'{part}' has only pickled weights (.bin), which can run code when they are read",
                place=place,
                fix="Use a model with .safetensors, or convert it where you trust it",
            )


def _open_vae(source: str, options: dict[str, Any]) -> Any:
    place = f"model.vae: {source}"
    if not Path(source).is_dir() and not HUB_ID.fullmatch(source):
        raise UserError("there is no such folder", place=place, fix="Give a folder or a hub id owner/name")
    inside = (Path(source) / "vae" / "config.json").is_file()  # a whole pipeline's folder will do as well
    try:
        return diffusers.AutoencoderKL.from_pretrained(source, subfolder="vae" if inside else None, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, hub.HfHubHTTPError) as error:
        raise UserError(f"cannot load the VAE: {_reason(error)}", place=place) from error


def _check_parts(pipeline: Any, place: str) -> None:
    """Refuses UNets that want inputs which preference training does not have."""
    unet, vae = pipeline.unet.config, pipeline.vae.config
    if unet.in_channels != vae.latent_channels:
        raise UserError(
            f"the UNet takes {unet.in_channels} channels and the VAE makes {vae.latent_channels}",
            place=place,
            fix="Use a plain text-to-image model (none for inpainting or editing) and its own kind of VAE",
        )
    wanted = "text_time" if isinstance(pipeline, diffusers.StableDiffusionXLPipeline) else None
    if unet.addition_embed_type != wanted or unet.class_embed_type or unet.time_cond_proj_dim:
        raise UserError(
            "the UNet is conditioned on more than a prompt and a timestep",
            place=place,
            fix="Use a plain Stable Diffusion or SDXL model",
        )


def _reason(error: Exception) -> str:
    """The first line of a library's message, short enough for ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(". ")
