"""Draws pictures from a model, or from what a run made of it.

    mmalign sample runs/demo/dpo --prompts "two red circles" "a blue square" --out pictures
    mmalign sample --model shapes --prompts shapes:heldout --count 16 --out base
    mmalign sample --model shapes --prompts captions.txt --per-prompt 4 --out candidates      for `mmalign label`

Picture i is drawn from the noise of seed + i, so that two models asked the same can be compared side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.cli import Parser
from mmalign.errors import UserError

if TYPE_CHECKING:
    from diffusion.models import DiffusionModel
    from diffusion.recipe import SamplerSettings

STEPS, GUIDANCE = 30, 7.5
FEW_STEPS = 4


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign sample [CHECKPOINT] [--model PATH] --prompts TEXT|FILE ... --out FOLDER`."""
    parser = Parser(prog="mmalign sample", description=__doc__)
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="a run's folder (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument(
        "--model", metavar="PATH", help="a pipeline to draw from as it is; beside a checkpoint: its base"
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    add_sampling(parser)
    parser.add_argument("--per-prompt", type=int, default=1, help="pictures of each (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures per forward (default: %(default)s)")
    said = parser.parse_args(argv)
    if said.checkpoint is None and said.model is None:
        raise UserError("nothing to draw from", fix="Give a checkpoint or --model PATH.")
    check_least(said)

    import torch

    from diffusion.models import load_model
    from diffusion.sampling import draw, gather_prompts
    from diffusion.settings import ModelSettings
    from diffusion.tuned import find_tuned, open_tuned

    wanted = gather_prompts(said.prompts, said.count, said.seed)
    prompts = [prompt for prompt in wanted for _ in range(said.per_prompt)]
    if said.checkpoint is None:
        model = load_model(ModelSettings(path=said.model))
        name = model.identity
    else:
        tuned = find_tuned(said.checkpoint, base=said.model)
        model = open_tuned(tuned)
        name = f"{model.identity} + {tuned.checkpoint.parent.name}/{tuned.checkpoint.name}/{tuned.weights.name}"
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    sampler = sampler_of(model, said.steps, said.guidance_scale)
    model.require_steps(sampler.steps, "--steps")
    draw(model, name, prompts, said.out, seed=said.seed, sampler=sampler, batch_size=said.batch_size)
    print(f"{len(prompts)} pictures of {name} in {said.out}")
    return 0


def add_sampling(parser: Parser) -> None:
    """Add what to draw and how."""
    parser.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="TEXT|FILE",
        help="texts, lists (.txt, .tsv, .json ...), shapes:heldout",
    )
    parser.add_argument("--count", type=int, help="prompts drawn from each file (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="noise of the first prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, help=f"denoising steps (default: {STEPS}; few-step models {FEW_STEPS})")
    parser.add_argument(
        "--guidance-scale", type=float, help=f"1 or less: none (default: {GUIDANCE:g}; few-step models none)"
    )


def check_least(said: Any) -> None:
    """Refuse numbers that are too small.

    Raises:
        UserError: one is.
    """
    leasts = {"count": 1, "per_prompt": 1, "seed": 0, "steps": 1, "guidance_scale": 0, "batch_size": 1}
    for name, least in leasts.items():
        value = getattr(said, name, None)
        if value is not None and not value >= least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def sampler_of(model: DiffusionModel, steps: int | None, guidance_scale: float | None) -> SamplerSettings:
    """How to draw from a model; what is not said is what suits it."""
    from diffusion.recipe import SamplerSettings

    few = model.distilled_steps
    if guidance_scale is None:
        guidance_scale = GUIDANCE if few is None else 0.0
    return SamplerSettings(
        steps=steps or (STEPS if few is None else min(few, FEW_STEPS)), guidance_scale=guidance_scale
    )
