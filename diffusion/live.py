"""Votes between models that draw while people vote.

    mmalign arena live runs/demo/dpo --prompts shapes:heldout --out votes/live           a run against its base
    mmalign arena live runs/dpo runs/kto --prompts PartiPrompts.tsv --out votes/live     two runs and their base

A few pairs are drawn ahead, so that a vote does not wait as long as people are slower than the models. The pictures
are folders in --out, as `mmalign sample` writes them, beside the votes; the same command goes on where it was.
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
    from evaluators.arena.live import Painter


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign arena live MODEL ... --prompts TEXT|FILE --out FOLDER`."""
    from diffusion.evaluation import require_base
    from diffusion.sample import add_sampling, check_least
    from evaluators.arena.command import add_page, hold, opened, require_page

    parser = Parser(prog="mmalign arena live", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="runs, checkpoints or pipelines")
    parser.add_argument("--base", metavar="PATH", help="a pipeline (default: the base of the first run)")
    parser.add_argument("--names", nargs="+", help="of the models (default: of their folders)")
    parser.add_argument("--out", type=Path, required=True, help="a folder for pictures and votes")
    add_sampling(parser)
    add_page(parser)
    said = parser.parse_args(argv)
    check_least(said)
    require_base(said.models, said.base)
    require_page()
    votes: Path = said.votes or said.out / "votes.sqlite"
    if not said.out.resolve().is_relative_to(votes.parent.resolve()):
        raise UserError(f"{said.out} is not below the folder of the votes", place="--votes", fix="Leave --votes out.")

    from diffusion.sampling import gather_prompts
    from evaluators.arena.live import Live, units_of
    from evaluators.arena.trials import Sources

    with opened(said) as bound:
        units = units_of(gather_prompts(said.prompts, said.count, said.seed), said.seed)
        live = Live(said.out, painters(said), units)
        sources = Sources(root=votes.parent.resolve(), folders=live.folders)
        with live:
            hold(bound, sources, votes, said, live)
    return 0


def painters(said: Any) -> list[Painter]:
    """The base and the models, opened, all with the sampler that suits the base.

    Raises:
        UserError: a model cannot be opened, or has fewer steps than are asked for.
    """
    import torch

    from diffusion.evaluation import line_up
    from diffusion.sample import sampler_of

    found: list[Painter] = []
    sampler: SamplerSettings | None = None
    for name, contestant in line_up(said.models, said.base, said.names, None).items():
        model = contestant.open()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        sampler = sampler or sampler_of(model, said.steps, said.guidance_scale)
        model.require_steps(sampler.steps, "--steps")
        trained = contestant.identity.partition("+")[2]
        found.append(painter(name, model, " + ".join(filter(None, (model.identity, trained))), sampler))
    return found


def painter(name: str, model: DiffusionModel, identity: str, sampler: SamplerSettings) -> Painter:
    """A model as the arena draws with it."""
    from evaluators.arena.live import Painter

    settings: dict[str, Any] = {"steps": sampler.steps, "guidance_scale": sampler.guidance_scale}
    return Painter(
        name=name,
        about={"model": identity, **settings},
        draw=lambda prompt, seed: model.sample([prompt], seeds=[seed], **settings)[0],
    )
