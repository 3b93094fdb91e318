"""Trains a text-to-image UNet on preferences.

mmalign train diffusion/dpo_shapes optim.lr=1e-5
accelerate launch -m diffusion.train configs/diffusion/dpo_shapes.yaml optim.lr=1e-5
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from diffusion import adapters, models, weights
from diffusion.feeds import Feed, make_feed
from diffusion.models import DiffusionModel
from diffusion.parts import Parts
from diffusion.recipe import TrainConfig
from mmalign import config as configuration
from mmalign import method as methods
from mmalign import runs
from mmalign.announce import announce, forward_seconds
from mmalign.cli import run_entry
from mmalign.launch import train_recipe
from mmalign.loop import Hooks, Loop, check_machine, processes, weights_layout
from mmalign.losses import require_fairness_to_ties
from mmalign.reference import AdaptersOff, FrozenCopy, Reference


def train(config: TrainConfig) -> int:
    """Run a recipe from its data or prompts to the last checkpoint. Returns the exit code."""
    config = config.model_copy(update={"loop": runs.pinned(config.loop)})
    module = methods.load("diffusion", config.method.name)
    options = configuration.parse_section(module.Options, config.method, "method")
    if config.data is not None and config.data.pairing.ties == "soft":
        require_fairness_to_ties(getattr(options, "loss", None))
    check_machine(config.loop)
    model = models.load_model(config.model, train_full=config.adapter is None)
    # Before anything is trained: pictures that cannot be drawn would be noticed hours later.
    if config.loop.sample_every and config.validation.prompts:
        model.require_steps(config.validation.sampler.steps, "validation.sampler.steps")
    if config.evaluation is not None:
        model.require_steps(config.evaluation.sampler.steps, "evaluation.sampler.steps")
    if config.loop.init_from:
        weights.start_from(model, Path(config.loop.init_from))
    adapters.set_attention(model.unet, config.loop.attention)
    model.to(processes().device)
    # what a feed encodes depends on frozen weights alone, so it is made before anything is prepared for training
    feed = make_feed(module, config, model)
    loop, parts, save_cache = assemble(config, model, feed)
    unet = model.unet
    method = module.build(options, parts)
    trained = f"LoRA of rank {config.adapter.rank}" if config.adapter else "the whole UNet"

    def started() -> None:
        announce(
            config,
            loop,
            config.optim,
            method=config.method.name,
            model=config.model.path,
            trained=trained,
            size=feed.size,
            notes={**feed.notes(), **method.describe()},
            seconds=estimate_seconds(config, loop, parts, feed),
        )

    def sample(step: int) -> None:
        drawn = config.validation
        images = model.sample(
            list(drawn.prompts),
            seeds=[drawn.seed + index for index in range(len(drawn.prompts))],
            steps=drawn.sampler.steps,
            guidance_scale=drawn.sampler.guidance_scale,
            batch_size=drawn.sampler.batch_size,
            unet=unet,
        )
        loop.tracker.images(step, "validation", images, list(drawn.prompts))

    hooks = Hooks(
        save_model=lambda folder, state: weights.save_weights(unet, folder, state=state),
        load_model=lambda folder: weights.load_weights(unet, folder),
        started=started,
        sample=sample if config.validation.prompts else None,
        look=feed.watch(loop, parts),
        saved=save_cache,
        summary={
            "base": model.identity,
            "adapter": trained if config.adapter else "none, the whole UNet",
            "seed": config.loop.seed,
            feed.unit: feed.key,
        },
        config=config.model_dump(mode="json"),
    )
    return loop.run(method, config.method.name, feed.source(loop), hooks)


def assemble(config: TrainConfig, model: DiffusionModel, feed: Feed) -> tuple[Loop, Parts, Callable[[], None] | None]:
    """The UNet ready for training, and what a method is built from; also what saves the reference's cache, if any."""
    unet = model.unet
    original = None if config.adapter else adapters.frozen_copy(unet)
    if config.adapter:
        adapters.add_lora(unet, config.adapter)
    else:
        unet.requires_grad_(True)
    unet.to(memory_format=weights_layout())
    if config.loop.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    loop = Loop(unet, config.loop, config.optim)
    reference, save_cache = feed.reference(loop, plain_reference(loop, unet, original))
    return loop, feed.parts(loop, reference), save_cache


def plain_reference(loop: Loop, unet: nn.Module, original: nn.Module | None) -> Reference:
    """The reference that fits what is trained: the adapter switched off, or a copy of what the UNet was."""
    if original is None:
        return AdaptersOff(loop.module, lambda: adapters.adapters_disabled(unet))
    return FrozenCopy(original.to(memory_format=weights_layout()), loop.accelerator.autocast)


def estimate_seconds(config: TrainConfig, loop: Loop, parts: Parts, feed: Feed) -> float:
    """Expected time of the updates: one forward measured, times what an update of this feed comes to."""
    latents, conditioning = feed.example(loop.accelerator.device, config.loop.batch_size)
    t = torch.zeros(len(latents), dtype=torch.long, device=latents.device)
    seconds = forward_seconds(loop, lambda: parts.predict(loop.module, latents, t, conditioning).sum().item())
    return feed.forwards() * seconds * config.loop.steps * config.loop.accumulation


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m diffusion.train RECIPE [key=value ...]`."""
    return train_recipe(TrainConfig, train, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(run_entry(main, sys.argv[1:]))
