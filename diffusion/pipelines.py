"""Opens Stable Diffusion and SDXL pipelines from a folder or the hub, and refuses anything else in one line.

What is opened is looked at before a weight is read or downloaded: the pipeline's class, and that every part
comes from diffusers or transformers themselves. Weights are safetensors only; no code of a model is ever run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

import diffusers
import torch
import transformers

from diffusion.overlays import open_unet
from diffusion.schedulers import CLASSES as SCHEDULER_CLASSES
from diffusion.schedulers import choose_scheduler
from diffusion.settings import ModelSettings
from mmalign import hub, shapes
from mmalign.errors import UserError, nearest, reason

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


def open_pipeline(settings: ModelSettings, *, unet_dtype: torch.dtype) -> Any:
    """The pipeline that `settings` names, on the CPU, in eval mode and with nothing trainable; its LoRA is not in it.

    Raises:
        UserError: no such folder or hub model, not in the local cache while offline, not a pipeline, a kind
            that is not supported, parts missing, or weights that are not safetensors.
    """
    place = f"model.path: {settings.path}"
    embedded = embedded_model(settings)
    source = settings.path if embedded is None else str(shapes.model_folder(embedded.base))
    overlay = None if embedded is None or embedded.overlay is None else shapes.model_folder(embedded.overlay)
    offline = hub.is_offline(settings.offline)
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
    if settings.unet is not None or overlay is not None:
        base = hub.read_json(
            source,
            "unet/config.json",
            revision=settings.revision,
            offline=offline,
            place=place,
            missing="the pipeline's UNet has no config.json",
        )
        parts["unet"] = open_unet(settings.unet or str(overlay), base, dtype=unet_dtype, offline=offline)
    if overlay is not None:
        parts["scheduler"] = _open_scheduler(overlay / "scheduler", place)
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
    except hub.LOADING as error:
        raise UserError(
            f"cannot load the pipeline: {reason(error)}", place=place, fix="Its weights must be safetensors"
        ) from error
    _check_parts(pipeline, place)
    # SDXL's own VAE overflows in fp16 and says so in its configuration: it runs in fp32, as in the pipeline.
    keep = family == "sdxl" and dtype == torch.float16 and pipeline.vae.config.force_upcast
    pipeline.vae.to(torch.float32 if keep else dtype)
    pipeline.scheduler = choose_scheduler(
        pipeline.scheduler,
        name=settings.scheduler,
        prediction_type=settings.prediction_type,
        distilled_steps=settings.distilled_steps,
    )
    for name in PARTS[family]:
        module = getattr(pipeline, name)
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embedded_model(settings: ModelSettings) -> shapes.Embedded | None:
    """What `model.path` stands for if it is the name of a model that comes along; a folder of that name is a folder.

    Raises:
        UserError: a name like theirs that none of them has.
    """
    if not settings.path.startswith("shapes") or Path(settings.path).is_dir() or "/" in settings.path:
        return None
    if settings.path not in shapes.MODELS:
        fix = nearest(settings.path, shapes.MODELS)
        raise UserError("no model of this name comes along", place=f"model.path: {settings.path}", fix=fix)
    return shapes.MODELS[settings.path]


def _no_noise() -> None:
    """No bar for every file that is opened, no advice about classes the user never named; downloads keep their bars."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def _read_index(source: str, revision: str | None, offline: bool, place: str) -> dict[str, Any]:
    """The content of model_index.json, of a folder or a hub model."""
    folder = Path(source)
    if folder.is_file():
        raise UserError("this is a file, not a pipeline folder", place=place, fix="Convert it with diffusers first")
    if not folder.is_dir() and not hub.HUB_ID.fullmatch(source):
        raise UserError("there is no such folder", place=place, fix="Give a diffusers folder or a hub id owner/name")
    missing = f"not a diffusers pipeline: the {'folder' if folder.is_dir() else 'model'} has no {INDEX}"
    return hub.read_json(source, INDEX, revision=revision, offline=offline, place=place, missing=missing)


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
    if not Path(source).is_dir() and not hub.HUB_ID.fullmatch(source):
        raise UserError("there is no such folder", place=place, fix="Give a folder or a hub id owner/name")
    inside = (Path(source) / "vae" / "config.json").is_file()  # a whole pipeline's folder will do as well
    try:
        return diffusers.AutoencoderKL.from_pretrained(source, subfolder="vae" if inside else None, **options)
    except hub.LOADING as error:
        raise UserError(f"cannot load the VAE: {reason(error)}", place=place) from error


def _open_scheduler(folder: Path, place: str) -> Any:
    config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    return SCHEDULER_CLASSES[config["_class_name"]].from_config(config)


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
