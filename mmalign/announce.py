"""The block that says at the start of a run what is effective, and the same as a file: config.yaml."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from mmalign import config as configuration
from mmalign.config import LoopSettings, OptimSettings, Settings
from mmalign.loop import Loop, trainable
from mmalign.memory import peak_gb


def announce(
    config: Settings,
    loop: Loop,
    optim: OptimSettings,
    *,
    method: str,
    model: str,
    trained: str,
    size: int,
    notes: Mapping[str, str],
    seconds: float,
) -> None:
    """Print the block and write the effective configuration, on the first process.

    Args:
        config: the whole recipe.
        trained: what of the model is.
        size: pairs or prompts in an epoch.
        notes: what feed and method have to say.
        seconds: that the updates are expected to take.
    """
    if not loop.accelerator.is_main_process:
        return
    settings: LoopSettings = loop.settings
    (settings.output_dir / "config.yaml").write_text(configuration.dump(config), encoding="utf-8")
    schedule = optim.schedule + (f", {n} updates of warm-up" if (n := optim.warmup(settings.steps)) else "")
    block = {
        "method": method,
        **notes,
        "model": model,
        "trained": f"{trainable(loop.parameters):,} numbers, {trained}",
        "learning rate": f"{optim.lr:g} ({schedule}), {optim.name}",
        "pairs per update": f"{loop.pairs_per_update} = {settings.batch_size} per forward x {settings.accumulation} "
        f"accumulated x {loop.accelerator.num_processes} processes",
        "updates": f"{settings.steps} = {settings.steps * loop.pairs_per_update / size:.1f} epochs",
        "precision": f"{settings.precision}, attention {settings.attention}",
        "expected": f"about {duration(seconds)}, from one forward; {peak_gb():.1f} GB in use before training",
        "output": str(settings.output_dir),
    }
    width = max(map(len, block))
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in block.items()), flush=True)


def forward_seconds(loop: Loop, forward: Callable[[], object]) -> float:
    """How long a forward takes, by every process: sharded modules run together."""
    times = []
    with loop.undisturbed():
        for _ in range(2):  # the first also warms up
            start = time.perf_counter()
            forward()
            times.append(time.perf_counter() - start)
    return min(times)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
