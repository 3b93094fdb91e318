"""LoRA on a vision-language model, on the language model alone unless told more, and its reference with it off."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mmalign.reference import layers_disabled
from vlm.families import Family
from vlm.settings import VlmLoraSettings

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def lora_layers(network: nn.Module) -> list[Any]:
    """The layers that carry an adapter, also inside a wrapper."""
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def target_pattern(network: nn.Module, family: Family, settings: VlmLoraSettings) -> str:
    """A pattern of the full paths of the layers to adapt.

    Names alone will not do: vision towers have a q_proj too, and peft's "all-linear" takes every linear layer.
    """
    names = ATTENTION + (FEED_FORWARD if settings.targets == "all" else ())
    patterns = [rf"model\.{family.language}\..*\.({'|'.join(names)})"]
    for wanted, part in ((settings.projector, family.projector), (settings.vision, family.vision)):
        if wanted:
            within = re.compile(rf"model\.({part})\.(?:.*\.)?(\w+)")
            found = [
                match
                for name, module in network.named_modules()
                if isinstance(module, nn.Linear) and (match := within.fullmatch(name))
            ]
            leaves = sorted({match.groups()[-1] for match in found})
            patterns.append(rf"model\.({part})\.(.*\.)?({'|'.join(leaves)})")
    return "|".join(f"({pattern})" for pattern in patterns)


def add_lora(network: Any, family: Family, settings: VlmLoraSettings) -> None:
    """Put an fp32 adapter on the network and make it all that is trainable.

    A is drawn from N(0, 1 / rank^2) on the CPU, layer by layer, so that a seed means the same adapter on every
    machine; B is 0. Global generators are left alone.

    Raises:
        ValueError: the network has an adapter already.
    """
    if lora_layers(network):
        raise ValueError("the network has an adapter already")
    alpha = float(settings.rank if settings.alpha is None else settings.alpha)
    network.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        target_modules=target_pattern(network, family, settings),
        lora_dropout=settings.dropout,
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng():
        network.add_adapter(config)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            if ".lora_" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
            if ".lora_A." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / settings.rank)


def train_fully(network: Any, family: Family) -> None:
    """Make the language model and the projector all that is trainable, in fp32 masters; the vision tower stays.

    Embeddings and head are the language model's.
    """
    network.requires_grad_(False)
    wanted = re.compile(rf"(model\.({family.language}|{family.projector})|lm_head)\..*")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(wanted.fullmatch(name) is not None)


def adapters_disabled(network: nn.Module) -> AbstractContextManager[None]:
    """The base model inside the block; see `mmalign.reference.layers_disabled`."""
    return layers_disabled(lora_layers(network))
