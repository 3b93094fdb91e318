"""Trains a text-to-image UNet on preferences.

mmalign train diffusion/dpo_shapes optim.lr=1e-5
accelerate launch -m diffusion.train configs/diffusion/dpo_shapes.yaml optim.lr=1e-5
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion import adapters, cache, models, weights
from diffusion.cache import PairData
from diffusion.candidates import make_store
from diffusion.models import DiffusionModel
from diffusion.parts import PairBatch, Parts
from diffusion.recipe import TrainConfig
from mmalign import config as configuration
from mmalign import method as methods
from mmalign.cli import Parser, run_entry
from mmalign.errors import UserError
from mmalign.loop import Hooks, Loop, check_machine, processes, trainable, weights_layout
from mmalign.memory import peak_gb
from mmalign.order import Order, share
from mmalign.pairing import PairingSummary, make_pairs
from mmalign.preferences import Store
from mmalign.randomness import key_seed
from mmalign.records import Preference
from mmalign.reference import AdaptersOff, Cached, FrozenCopy, Reference


def train(config: TrainConfig) -> int:
    """Run a recipe from the store to the last checkpoint. Returns the exit code."""
    module = methods.load("diffusion", config.method.name)
    options = configuration.parse_section(module.Options, config.method, "method")
    check_machine(config.loop)
    model = models.load_model(config.model, train_full=config.adapter is None)
    if config.loop.init_from:
        weights.start_from(model, Path(config.loop.init_from))
    adapters.set_attention(model.unet, config.loop.attention)
    model.to(processes().device)
    ensure_store(config, model)
    pairs, pairing_note = read_pairs(config)
    # what is cached depends on frozen encoders alone, so it is made before anything is prepared for training
    samples = bool(config.loop.sample_every and config.validation.prompts)
    data = cache.prepare(model, pairs, config.data, release_texts=not samples)
    if not samples:
        model.release_encoders()

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
    reference, save_cache = make_reference(config, loop, model, data, unet, original)
    parts = Parts(
        module=loop.module,
        predict=model.predict,
        schedule=model.schedule.to(loop.accelerator.device),
        reference=reference,
        elements=data.elements,
    )
    method = module.build(options, parts)

    def started() -> None:
        announce(config, loop, parts, data, {"data": pairing_note, **method.describe()})

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
        saved=save_cache,
        summary={
            "base": model.identity,
            "adapter": f"LoRA of rank {config.adapter.rank}" if config.adapter else "none, the whole UNet",
            "seed": config.loop.seed,
            "pairs": data.key,
        },
        config=config.model_dump(mode="json"),
    )
    return loop.run(method, config.method.name, batch_source(config, loop, data), hooks)


def ensure_store(config: TrainConfig, model: DiffusionModel) -> None:
    """Make the preference store from candidates when the recipe says how and it is not there yet."""
    if config.data.path.exists() or config.candidates is None:
        return
    with processes().main_process_first():
        if not config.data.path.exists():
            model.to(processes().device)
            make_store(model, config.candidates, config.data.path)


def make_reference(
    config: TrainConfig,
    loop: Loop,
    model: DiffusionModel,
    data: PairData,
    unet: nn.Module,
    original: nn.Module | None,
) -> tuple[Reference, Any]:
    """The reference that fits what is trained, cached if asked for; and what saves that cache."""
    reference: Reference
    if original is None:
        reference = AdaptersOff(loop.module, lambda: adapters.adapters_disabled(unet))
    else:
        copy = original.to(memory_format=weights_layout())
        reference = FrozenCopy(copy, loop.accelerator.autocast)
    if config.reference.cache is None:
        return reference, None
    # what a reference error depends on: the base, the pairs and their draws, and what the method draws and compares
    key = configuration.digest(
        {
            "base": model.identity,
            "pairs": data.key,
            "seed": config.loop.seed,
            "precision": config.loop.precision,
            "prompt_dropout": config.data.prompt_dropout,
            "method": config.method.model_dump(),
        }
    )
    place, accelerator = config.reference.cache / key[:16], loop.accelerator
    cached = Cached(reference, place, device=accelerator.device, rank=accelerator.process_index)
    return cached, cached.save


def read_pairs(config: TrainConfig) -> tuple[list[Preference], str]:
    """The pairs that the recipe's data section describes, and a line about how they were made."""
    if not config.data.path.exists():
        raise UserError(
            "no preference store here",
            place=f"data.path={config.data.path}",
            fix="Make one with 'mmalign data import', or add a candidates section to the recipe.",
        )
    store = Store.open(config.data.path)
    summary = PairingSummary()
    pairs = list(make_pairs(store.records(split=config.data.split), config.data.pairing.build(), summary))
    if config.data.shuffle_labels:
        coin = [key_seed("shuffled label", config.loop.seed, pair.item_id) & 1 for pair in pairs]
        pairs = [pair.flip() if heads else pair for pair, heads in zip(pairs, coin, strict=True)]
    return pairs, str(summary)


def batch_source(config: TrainConfig, loop: Loop, data: PairData) -> Any:
    """A function from an update's number to the batches of this process from there on."""
    settings, accelerator = config.loop, loop.accelerator
    order = Order(list(data.buckets.values()), loop.pairs_per_update, settings.seed)
    cycle = config.reference.draws if config.reference.cache else None

    def batches(start: int) -> Iterator[PairBatch]:
        update = start
        while True:
            picks = order.update(update)
            for forward in range(settings.accumulation):
                mine = share(
                    picks,
                    forward=forward,
                    rank=accelerator.process_index,
                    world=accelerator.num_processes,
                    batch_size=settings.batch_size,
                )
                visits = [pick.visit if cycle is None else pick.visit % cycle for pick in mine]
                yield data.batch([pick.item for pick in mine], visits, seed=settings.seed, device=accelerator.device)
            update += 1

    return batches


def announce(config: TrainConfig, loop: Loop, parts: Parts, data: PairData, notes: dict[str, str]) -> None:
    """The block that says what is effective, and the same as a file: config.yaml."""
    settings = config.loop
    seconds = estimate_seconds(config, loop, parts, data)  # by every process: sharded modules run together
    if not loop.accelerator.is_main_process:
        return
    (settings.output_dir / "config.yaml").write_text(configuration.dump(config), encoding="utf-8")
    schedule = config.optim.schedule + (
        f", {n} updates of warm-up" if (n := config.optim.warmup(settings.steps)) else ""
    )
    block = {
        "method": config.method.name,
        **notes,
        "model": config.model.path,
        "trained": f"{trainable(loop.parameters):,} numbers, "
        + (f"LoRA of rank {config.adapter.rank}" if config.adapter else "the whole UNet"),
        "learning rate": f"{config.optim.lr:g} ({schedule}), {config.optim.name}",
        "pairs per update": f"{loop.pairs_per_update} = {settings.batch_size} per forward x {settings.accumulation} "
        f"accumulated x {loop.accelerator.num_processes} processes",
        "updates": f"{settings.steps} = {settings.steps * loop.pairs_per_update / len(data):.1f} epochs",
        "precision": f"{settings.precision}, attention {settings.attention}",
        "expected": f"about {duration(seconds)}, from one forward; {peak_gb():.1f} GB in use before training",
        "output": str(settings.output_dir),
    }
    width = max(map(len, block))
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in block.items()), flush=True)


def estimate_seconds(config: TrainConfig, loop: Loop, parts: Parts, data: PairData) -> float:
    """Expected time of the updates: one forward measured, times 4 (reference, policy, and a backward of twice that)."""
    size = min(config.loop.batch_size, len(data))
    batch = data.batch(
        list(next(iter(data.buckets.values())))[:size], [0] * size, seed=0, device=loop.accelerator.device
    )
    t = torch.zeros(len(batch.latents), dtype=torch.long, device=batch.latents.device)
    times = []
    with loop.undisturbed():
        for _ in range(2):  # the first also warms up
            start = time.perf_counter()
            parts.predict(loop.module, batch.latents, t, batch.conditioning).sum().item()
            times.append(time.perf_counter() - start)
    return 4 * min(times) * config.loop.steps * config.loop.accumulation


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m diffusion.train RECIPE [key=value ...]`."""
    parser = Parser(prog="mmalign train", description=__doc__)
    parser.add_argument("recipe", help="a YAML file, or the short name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    arguments = parser.parse_args(argv)
    return train(configuration.load(TrainConfig, arguments.recipe, arguments.overrides))


if __name__ == "__main__":
    raise SystemExit(run_entry(main, sys.argv[1:]))
