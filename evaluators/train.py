"""Trains a scorer of pictures on preferences: a CLIP that says which of two pictures of a prompt is preferred.

mmalign train evaluators/pickscore_shapes data.path=store optim.lr=1e-4
accelerate launch -m evaluators.train configs/evaluators/pickscore_shapes.yaml data.path=store
mmalign score pictures/ --scorer trained,path=runs/scorer/style
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from evaluators.recipe import TrainConfig
from evaluators.training.data import PictureFeed, divided
from evaluators.training.heldout import HeldOut, Judgement, judged, margins, report
from evaluators.training.model import PreferenceModel
from evaluators.training.parts import Parts
from mmalign import config as configuration
from mmalign import method as methods
from mmalign import runs
from mmalign.announce import announce, forward_seconds
from mmalign.cli import run_entry
from mmalign.errors import UserError
from mmalign.launch import train_recipe
from mmalign.loop import Hooks, Loop, check_machine, processes, shards_weights
from mmalign.memory import recompute_activations
from mmalign.tracking import METRICS

PASSES = 3.0  # of a turn in forwards: the model and its backward


def train(config: TrainConfig) -> int:
    """Run a recipe from its data to the last checkpoint, and judge what came out. Returns the exit code."""
    config = config.model_copy(update={"loop": runs.pinned(config.loop)})
    module = methods.load("evaluators", config.method.name)
    options = configuration.parse_section(module.Options, config.method, "method")
    check_machine(config.loop)
    if config.loop.attention == "xformers":
        raise UserError("xformers is for UNets", place="loop.attention", fix="Leave it out.")
    if shards_weights():
        raise UserError(
            "a CLIP is whole on every process: its scale is a single number, which cannot be sharded",
            place="--accelerate",
            fix="Use ddp; model.text_layers and model.vision_layers say how little is trained.",
        )
    pairs, held_pairs, note = divided(config)
    model = PreferenceModel(config.model, seed=config.loop.seed)
    if config.loop.init_from:
        start = Path(config.loop.init_from)
        model.load(start / "model" if (start / "model").is_dir() else start)
    if config.loop.gradient_checkpointing:
        recompute_activations(model.clip)
    model.to(processes().device)
    held = HeldOut.of(held_pairs) if held_pairs else None
    feed = PictureFeed(config, pairs, held.items if held else (), model.preprocess, model.tokens)
    ties = any(pair.label == "tie" for pair in pairs)
    del pairs, held_pairs  # a million are gigabytes, and the feed has what it needs of them
    loop = Loop(model, config.loop, config.optim)
    parts = Parts(module=loop.module, head=model.head is not None, ties=ties, mean_weight=feed.mean_weight)
    method = module.build(options, parts)

    def judge() -> Judgement | None:
        if held is None:
            return None
        average: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if loop.average is not None:  # it is what becomes the scorer
            average = loop.average.swapped_in(loop.parameters)
        with loop.undisturbed(), average:
            return judged(margins(model, feed, held, loop.accelerator.device), held)

    def forward() -> None:
        batch = feed.example(loop.accelerator.device)
        loop.module(batch.tokens, batch.pixels, batch.owner)[0].sum().item()

    def started() -> None:
        announce(
            config,
            loop,
            config.optim,
            method=config.method.name,
            model=config.model.path,
            trained=f"layers {config.model.layers}",
            size=feed.size,
            notes={"data": note, **method.describe()},
            seconds=PASSES * forward_seconds(loop, forward) * config.loop.steps * config.loop.accumulation,
        )

    hooks = Hooks(
        save_model=model.save,
        load_model=model.load,
        started=started,
        look=watch(config, loop, judge),
        summary={
            "base": model.base,
            "head": config.model.head or "none",
            "layers": config.model.layers,
            "seed": config.loop.seed,
            "data": feed.key,
        },
        config=config.model_dump(mode="json"),
    )
    before = judge()
    code = loop.run(method, config.method.name, feed.source(loop), hooks)
    after = judge() if code == 0 else None
    if before is not None and after is not None and loop.accelerator.is_main_process:
        print("\n".join(report(before, after, config.loop.output_dir)), flush=True)
    loop.accelerator.wait_for_everyone()
    return code


def watch(config: TrainConfig, loop: Loop, judge: Callable[[], Judgement | None]) -> Callable[[int], str | None] | None:
    """What looks at held-out pairs during training, on all processes, and on the first says when it is time to end."""
    held = config.held_out
    if held is None or not held.every:
        return None

    def look(step: int) -> str | None:
        if step == 0 or step % held.every:
            return None
        found = judge()
        if found is None or not loop.accelerator.is_main_process:
            return None
        losses = _log_losses(config.loop.output_dir / METRICS)
        if step not in losses:  # a resumed run begins where it has looked already
            loop.tracker.log(step, found.metrics())
            losses[step] = found.calibration.log_loss
        best = min(losses, key=lambda at: losses[at])
        since = sum(at > best for at in losses)
        if held.patience is None or since < held.patience:
            return None
        return (
            f"the held-out log loss was lowest after update {best}, {losses[best]:.4f}, and is {losses[step]:.4f} now"
        )

    return look


def _log_losses(file: Path) -> dict[int, float]:
    """Of every look so far, a resumed run's earlier ones included."""
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["held_out/log_loss"] for line in lines if "held_out/log_loss" in line}


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m evaluators.train RECIPE [key=value ...]`."""
    return train_recipe(TrainConfig, train, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(run_entry(main, sys.argv[1:]))
