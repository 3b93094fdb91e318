"""Trains a vision-language model on preferences.

mmalign train vlm/povid_shapes optim.lr=1e-5
accelerate launch -m vlm.train configs/vlm/povid_shapes.yaml optim.lr=1e-5
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mmalign import config as configuration
from mmalign import method as methods
from mmalign import runs
from mmalign.announce import announce, forward_seconds
from mmalign.cli import run_entry
from mmalign.errors import UserError
from mmalign.launch import train_recipe
from mmalign.loop import Hooks, Loop, check_machine, processes
from mmalign.losses import require_fairness_to_ties
from mmalign.memory import recompute_activations
from mmalign.pairdata import read_pairs
from mmalign.reference import AdaptersOff, Cached, FrozenCopy, Reference
from vlm import adapters, weights
from vlm.feeds import PairFeed
from vlm.making import ensure_store
from vlm.models import Policy, VisionLanguageModel, open_model
from vlm.parts import Parts
from vlm.recipe import TrainConfig
from vlm.scores import Scores

PASSES = 4.0  # of a turn in forwards: policy, its backward, and the reference


def train(config: TrainConfig) -> int:
    """Run a recipe from its data to the last checkpoint. Returns the exit code."""
    config = config.model_copy(update={"loop": runs.pinned(config.loop)})
    module = methods.load("vlm", config.method.name)
    options = configuration.parse_section(module.Options, config.method, "method")
    if config.data.pairing.ties == "soft":
        require_fairness_to_ties(getattr(options, "loss", None))
    check_machine(config.loop)
    ensure_store(config, lambda: open_model(config.model).to(processes().device))
    pairs, note = read_pairs(config.data, config.loop.seed)
    model = open_model(config.model, train_full=config.adapter is None)
    if config.loop.init_from:
        weights.start_from(model, Path(config.loop.init_from))
    model.to(processes().device)
    needs_reference = getattr(module, "REFERENCE", True)
    loop, reference, save_cache = assemble(config, model, needs_reference=needs_reference)
    parts = Parts(
        module=loop.module, model=model, reference=reference, exact_reference=not isinstance(reference, Cached)
    )
    method = module.build(options, parts)
    feed = PairFeed(config, model, method, pairs, note, main=loop.accelerator.is_main_process)
    trained = f"LoRA of rank {config.adapter.rank}" if config.adapter else "the language model and the projector"

    def forward() -> None:
        batch = feed.example()
        Scores(parts, batch, tuple(batch.views)).policy().sum().item()

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
            seconds=(PASSES if needs_reference else PASSES - 1)
            * forward_seconds(loop, forward)
            * config.loop.steps
            * config.loop.accumulation,
        )

    hooks = Hooks(
        save_model=lambda folder, state: weights.save_weights(model, folder, state=state),
        load_model=lambda folder: weights.load_weights(model, folder),
        started=started,
        saved=save_cache,
        summary={"base": model.identity, "adapter": trained, "seed": config.loop.seed, feed.unit: feed.key},
        config=config.model_dump(mode="json"),
    )
    return loop.run(method, config.method.name, feed.source(loop), hooks)


def assemble(
    config: TrainConfig, model: VisionLanguageModel, *, needs_reference: bool
) -> tuple[Loop, Reference, Callable[[], None] | None]:
    """The policy ready for training and its reference; also what saves the reference's cache, if any."""
    network: Any = model.network
    if config.loop.attention == "xformers":
        raise UserError("xformers is for UNets", place="loop.attention", fix="Leave it out; see model.attention")
    original = None
    if config.adapter:
        adapters.add_lora(network, model.family, config.adapter)
    else:
        original = copy.deepcopy(network) if needs_reference else None
        adapters.train_fully(network, model.family)
    if config.loop.gradient_checkpointing:
        recompute_activations(network)
    loop = Loop(Policy(model), config.loop, config.optim)
    plain = plain_reference(loop, model, original)
    if config.reference.cache is None or not needs_reference:
        return loop, plain, None
    # rows name themselves by content: what is left is who scores them, how they are read, and how sums are taken
    key = configuration.digest(
        {
            "base": model.identity,
            "model": config.model.model_dump(mode="json", exclude={"path", "revision", "offline", "max_tokens"}),
            "precision": config.loop.precision,
        }
    )
    accelerator = loop.accelerator
    cached = Cached(plain, config.reference.cache / key[:16], device=accelerator.device, rank=accelerator.process_index)
    return loop, cached, cached.save


def plain_reference(loop: Loop, model: VisionLanguageModel, original: nn.Module | None) -> Reference:
    """The reference that fits what is trained: the adapter switched off, or a copy of what the model was."""
    if original is None:
        return AdaptersOff(loop.module, lambda: adapters.adapters_disabled(model.network))
    frozen = VisionLanguageModel(original, model.processor, model.family, model.settings)
    return FrozenCopy(Policy(frozen), loop.accelerator.autocast)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m vlm.train RECIPE [key=value ...]`."""
    return train_recipe(TrainConfig, train, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(run_entry(main, sys.argv[1:]))
