"""Writes trained weights in other tools' layouts, and proves each file in plain diffusers before it is kept.

kohya       one safetensors file of an adapter: ComfyUI, AUTOMATIC1111, InvokeAI, kohya's scripts, diffusers
diffusers   a whole pipeline's folder with the trained UNet, an adapter merged in: `from_pretrained(folder)`

The proof: what was written, opened on the base by diffusers alone, must answer as the trained model answers, and
not as the base does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import diffusers
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion import weights
from diffusion.adapters import lora_layers, merge_lora
from diffusion.models import DiffusionModel
from diffusion.tuned import Tuned, open_base
from mmalign.errors import UserError

Format: TypeAlias = Literal["kohya", "diffusers"]
Probe: TypeAlias = Float[Tensor, "rows c h w"]

NOTHING = 1e-5  # change of the UNet's answer, relative to it, that no picture would show
ROUNDING = 2e-6  # likewise, what another order of fp32 operations may change
MISMATCH = 1e-3  # error of what was written, as a share of the change that it makes


def export(tuned: Tuned, out: Path, format: Format) -> dict[str, str]:
    """Write `out` and prove it.

    Args:
        tuned: what to export.
        out: a new file (kohya, ending in .safetensors) or a new folder (diffusers).
        format: see the module's docstring.

    Returns:
        What was written, as it stands in a kohya file's metadata.

    Raises:
        UserError: nothing is left behind at `out`. It exists, or lies in the checkpoint; the format does not fit;
            the base is another; or the export would change nothing.
    """
    _check(tuned, out, format)
    model = open_base(tuned)
    model.unet.float()  # so that the proof is about weights, not about rounding
    base = probe(model)
    weights.open_weights(model, tuned.weights)
    trained = probe(model)
    change = _distance(trained, base)
    if change <= NOTHING * _size(base):
        raise UserError(
            "the export would change nothing: these weights answer as the base does",
            place=str(tuned.weights),
            fix="Train longer or with a larger optim.lr.",
        )
    about = describe(tuned, model)
    temporary = out.with_name(f".{out.stem}.tmp-{os.getpid()}{out.suffix}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        written = {"kohya": _kohya, "diffusers": _pipeline}[format](tuned, model, temporary, about)
        error = _distance(written(), trained)
        if error > MISMATCH * change + ROUNDING * _size(base):
            raise UserError(
                f"diffusers {diffusers.__version__} reads the export as something else: "
                f"off by {error / change:.2%} of the change",
                place=str(tuned.weights),
                fix="Install the version of diffusers in constraints.txt.",
            )
        temporary.rename(out)
    finally:
        _remove(temporary)
    return {**about, "change": f"{change / _size(base):.2%} of the base's answer", "error": f"{error / change:.1e}"}


def kohya_tensors(adapter: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """An adapter's tensors under kohya's names.

    Args:
        adapter: under diffusers' names, `unet.<layer>.lora_A.weight` and `.lora_B.weight`.
        alpha: the update is scaled by alpha / rank.

    Returns:
        For each layer `lora_unet_<layer>.lora_down.weight`, `.lora_up.weight` and `.alpha`.
    """
    named: dict[str, Tensor] = convert_state_dict_to_kohya(adapter)
    # diffusers writes the rank for alpha, whatever alpha was.
    alphas = {name: torch.tensor(float(alpha)) for name in named if name.endswith(".alpha")}
    return {name: alphas.get(name, tensor).contiguous() for name, tensor in named.items()}


def describe(tuned: Tuned, model: DiffusionModel) -> dict[str, str]:
    """Where the weights are from. `ss_` names are kohya's own."""
    about = {
        "base": model.identity,
        "method": tuned.manifest.method,
        "step": str(tuned.manifest.step),
        "weights": tuned.weights.name,
    }
    if lora_layers(model.unet):
        config = model.unet.peft_config["default"]
        about |= {"rank": str(config.r), "alpha": str(config.lora_alpha)}
        about |= {"ss_network_dim": str(config.r), "ss_network_alpha": str(config.lora_alpha)}
    return about


@torch.no_grad()
def probe(model: DiffusionModel, unet: Any = None) -> Probe:
    """What a UNet answers to a few fixed inputs: small noise pictures at an early, a middle and a late step."""
    unet = model.unet if unet is None else unet
    rows = model.encode_prompts(["a red circle", "two blue squares", ""])
    side = 2 * model.multiple // model.scale
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(len(rows), unet.config.in_channels, side, side, generator=generator)
    t = torch.tensor([20, 500, 900])
    return model.predict(unet.eval(), x_t.to(model.device), t.to(model.device), rows.to(model.device)).float()


def _check(tuned: Tuned, out: Path, format: Format) -> None:
    if out.exists():
        raise UserError("exists already", place=str(out), fix="Give another --out, or remove it first.")
    if tuned.checkpoint in out.resolve().parents:
        raise UserError(
            "inside the checkpoint, which would no longer agree with its manifest",
            place=str(out),
            fix="Give an --out elsewhere.",
        )
    if format == "diffusers":
        return
    if tuned.config.adapter is None:
        raise UserError(
            "the whole UNet was trained, and kohya's layout holds adapters",
            place=str(tuned.checkpoint),
            fix="Export it with --format diffusers.",
        )
    if tuned.config.loop.init_from:
        raise UserError(
            "the adapter stands on the weights of loop.init_from and would not fit the plain base",
            place=str(tuned.checkpoint),
            fix="Export both merged, with --format diffusers.",
        )
    if out.suffix != ".safetensors":
        raise UserError("a kohya file ends in .safetensors", place=str(out), fix=f"Say {out}.safetensors.")


def _kohya(tuned: Tuned, model: DiffusionModel, out: Path, about: dict[str, str]) -> Callable[[], Probe]:
    """Write the adapter to a file. Returns what makes the answers of the base with that file."""
    adapter = load_file(tuned.weights / LORA_WEIGHT_NAME_SAFE)
    config = model.unet.peft_config["default"]
    save_file(kohya_tensors(adapter, config.lora_alpha), out, metadata=about)

    def answers() -> Probe:
        model.unet.unload_lora()
        model.pipeline.load_lora_weights(str(out.parent), weight_name=out.name)
        return probe(model)

    return answers


def _pipeline(tuned: Tuned, model: DiffusionModel, out: Path, about: dict[str, str]) -> Callable[[], Probe]:
    """Write a pipeline's folder. Returns what makes the answers of its UNet."""
    if lora_layers(model.unet):
        merge_lora(model.unet)
    model.pipeline.save_pretrained(out, safe_serialization=True)

    def answers() -> Probe:
        unet: Any = diffusers.UNet2DConditionModel.from_pretrained(out, subfolder="unet", use_safetensors=True)
        return probe(model, unet)

    return answers


def _size(answers: Probe) -> float:
    return answers.square().mean().sqrt().item()


def _distance(a: Probe, b: Probe) -> float:
    """Root mean square of the difference."""
    return _size(a - b)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
