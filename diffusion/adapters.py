"""LoRA on a UNet, its reference with the adapters off, and which attention kernel runs."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diffusion.settings import LoraSettings
from mmalign.errors import UserError
from mmalign.reference import layers_disabled

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
RESNETS = ("proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj")
TARGETS = {
    "attention": ATTENTION,
    "attention+ff": ATTENTION + FEED_FORWARD,
    "all": ATTENTION + FEED_FORWARD + RESNETS,
}


def lora_layers(unet: nn.Module) -> list[Any]:
    """The layers that carry an adapter, also inside a wrapper."""
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


def add_lora(unet: Any, settings: LoraSettings) -> None:
    """Put an fp32 adapter on the UNet and make it all that is trainable.

    A is drawn from N(0, 1 / rank^2) on the CPU, layer by layer, so that a seed means the same adapter on
    every machine; B is 0. Global generators are left alone.

    Raises:
        ValueError: the UNet has an adapter already.
    """
    if lora_layers(unet):
        raise ValueError("the UNet has an adapter already")
    alpha = float(settings.rank if settings.alpha is None else settings.alpha)
    attach(unet, settings.rank, alpha, list(TARGETS[settings.targets]), settings.dropout)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in sorted(unet.named_parameters()):
            if ".lora_A." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / settings.rank)


def attach(unet: Any, rank: int, alpha: float, targets: list[str], dropout: float = 0.0) -> None:
    """An adapter of this shape, with B = 0 and A as peft leaves it, fp32 and alone trainable."""
    unet.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        target_modules=targets,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng():
        unet.add_adapter(config)
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def adapters_disabled(unet: nn.Module) -> AbstractContextManager[None]:
    """The base model inside the block; see `mmalign.reference.layers_disabled`."""
    return layers_disabled(lora_layers(unet))


def frozen_copy(unet: Any) -> Any:
    """A second UNet with the same weights that never changes: the reference of full fine-tuning."""
    return copy.deepcopy(unet).requires_grad_(False).eval()


def merge_lora(unet: Any) -> None:
    """Fold the adapter into the base weights, which then have no adapter any more."""
    if not lora_layers(unet):
        raise ValueError("the UNet has no adapter to merge")
    unet.fuse_lora()
    unet.unload_lora()


def set_attention(unet: Any, name: str) -> None:
    """Run attention with torch's `sdpa` or with `xformers`.

    Raises:
        UserError: xformers is not installed, or there is no GPU for it.
    """
    if name == "sdpa":
        from diffusers.models.attention_processor import AttnProcessor2_0

        unet.set_attn_processor(AttnProcessor2_0())
        return
    from diffusers.utils.import_utils import is_xformers_available

    place, fix = "loop.attention", "Use loop.attention=sdpa, which is as fast on recent GPUs"
    if not is_xformers_available():
        raise UserError("xformers is not installed", place=place, fix=f"pip install 'mmalign[xformers]'. {fix}")
    if not torch.cuda.is_available():
        raise UserError("xformers needs a GPU and there is none", place=place, fix=fix)
    unet.enable_xformers_memory_efficient_attention()
