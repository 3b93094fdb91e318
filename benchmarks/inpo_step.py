"""One training step of InPO beside one of Diffusion-DPO: with inversions kept, made in the step, and as released.

    python -m benchmarks.inpo_step --size 150m                 LoRA on this machine's CPU (or GPU if there is one)
    python -m benchmarks.inpo_step --size shapes --batch 16 --repeats 30

Same model, pictures, prompts, batch and precision in one process; the variants take turns, one step each, all in the
trainer's own update. One JSON object goes to stdout, progress to stderr.

    dpo            Diffusion-DPO
    inpo_cached    InPO, inversions read from a folder; they are made before the clock starts, in `inversion_seconds`
    inpo_online    InPO, inversions made in the step by the reference
    dpo_single     Diffusion-DPO on the same pairs, one per forward
    authors        InPO's released procedure (compat: authors), which takes one pair per forward

A step's timesteps decide how many forwards an inversion takes, so ratios are also given of means over all steps; and
`forward_units` counts what is needed whoever runs it: a row's forward is 1, with its backward 3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.dpo_step import RESOLUTION, WARM_UP, Case, Ours, describe, recipe, take_turns
from benchmarks.harness import log, machine, spread, versions
from diffusion.methods import dpo, inpo
from diffusion.parts import Parts
from mmalign.method import Method

STEPS = 10
METHODS: dict[str, Callable[[Parts], Method]] = {
    "dpo": lambda parts: dpo.build(dpo.Options(), parts),
    "inpo_cached": lambda parts: inpo.build(inpo.Options(steps=STEPS), parts),
    "inpo_online": lambda parts: inpo.build(inpo.Options(steps=STEPS, inversion="online"), parts),
    "dpo_single": lambda parts: dpo.build(dpo.Options(), parts),
    "authors": lambda parts: inpo.build(inpo.Options(steps=STEPS, compat="authors"), parts),
}
SINGLE = ("dpo_single", "authors")  # one pair per forward
DPO_UNITS = 4.0  # reference 1, policy 1 and its backward 2
UNITS = {
    "dpo": DPO_UNITS,
    "inpo_cached": DPO_UNITS,
    "inpo_online": DPO_UNITS + (STEPS + 1) / 2,
    "dpo_single": DPO_UNITS,
    "authors": DPO_UNITS + sum(t > 100 * step - 99 for t in range(1000) for step in range(STEPS)) / 1000,
}
RATIOS = (("inpo_cached", "dpo"), ("inpo_online", "dpo"), ("authors", "dpo_single"), ("authors", "inpo_cached"))


def build(case: Case, folder: Path, name: str) -> Ours:
    """A trainer with a method, its data and inversions on disk."""
    config = recipe(case, folder, cached=False)
    data = config.data.model_copy(update={"cache": folder / "cache"})
    loop = config.loop
    if name in SINGLE:
        loop = loop.model_copy(update={"batch_size": 1, "accumulation": case.batch})
    return Ours(case, folder, config=config.model_copy(update={"data": data, "loop": loop}), build=METHODS[name])


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """All variants: seconds in turns."""
    with tempfile.TemporaryDirectory() as folder:
        running: dict[str, Ours] = {}
        building: dict[str, float] = {}
        for name in METHODS:
            log(f"building {name}")
            start = time.perf_counter()
            running[name] = build(case, Path(folder), name)
            building[name] = time.perf_counter() - start
            for _ in range(WARM_UP):
                running[name].step()
        taken = take_turns(running, repeats, case.device)
        about = describe(running["dpo"])
        losses = {name: variant.losses for name, variant in running.items()}
    variants = {
        name: {
            "seconds_per_step": {**spread(times), "mean": statistics.fmean(times)},
            "forward_units_per_row": UNITS[name],
            "first_loss": losses[name][0],  # log 2 for all of them: policy equals reference
            "last_loss": losses[name][-1],
        }
        for name, times in taken.items()
    }
    return {
        "model": about,
        "inversion_seconds": building["inpo_cached"] - building["inpo_online"],
        "variants": variants,
        "ratios": {
            f"step: {mine} / {other}": {
                "median": round(ratio(variants, mine, other, "median"), 4),
                "mean": round(ratio(variants, mine, other, "mean"), 4),
                "forward_units": round(UNITS[mine] / UNITS[other], 4),
            }
            for mine, other in RATIOS
        },
    }


def ratio(variants: dict[str, Any], mine: str, other: str, which: str) -> float:
    """Seconds of one step over those of another."""
    found: float = variants[mine]["seconds_per_step"][which] / variants[other]["seconds_per_step"][which]
    return found


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inpo_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="150m", help="shapes, 150m, sd15, sdxl, or a pipeline's folder")
    parser.add_argument("--train", choices=["lora", "full"], default="lora")
    parser.add_argument("--repeats", type=int, default=15, help="steps measured of each variant")
    parser.add_argument("--batch", type=int, default=2, help="pairs per step")
    parser.add_argument("--resolution", type=int, help="pixels; default: 256, 512 or 1024 by size, or the model's own")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA, on attention")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    said = read_arguments(sys.argv[1:] if argv is None else argv)
    device = torch.device(said.device)
    case = Case(
        size=said.size,
        train=said.train,
        batch=said.batch,
        resolution=said.resolution or RESOLUTION.get(said.size),
        precision=said.precision,
        rank=said.rank,
        gradient_checkpointing=said.gradient_checkpointing,
        device=device,
    )
    report = {
        "benchmark": "inpo_step",
        "arguments": vars(said),
        "machine": machine(device),
        "versions": versions(),
        **measure(case, said.repeats),
    }
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
