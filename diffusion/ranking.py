"""`mmalign eval preference`: who ranks held-out pairs as people did, models by their implicit rewards and scorers.

    mmalign eval preference runs/photos/dpo --store runs/photos/store --split heldout --scorer pickscore --scorer clip

The implicit reward of a tuned model is how much better than its base it predicts a picture's noise;
`diffusion.implicit` says how it is measured, `evaluators.agreement` how scorers are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mmalign.cli import Parser
from mmalign.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign eval preference [RUN ...] --store STORE [--split NAME] [--scorer NAME ...]`."""
    parser = Parser(prog="mmalign eval preference", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folders of training runs")
    parser.add_argument("--store", type=Path, required=True, help="a preference store")
    parser.add_argument("--split", default="heldout", help="of the store (default: %(default)s)")
    parser.add_argument("--score", help="of the store, where pairs come from scores (default: the only one)")
    parser.add_argument("--scorer", action="append", default=[], metavar="NAME[,option=value]", help="again for more")
    parser.add_argument("--draws", type=int, default=10, help="(timestep, noise) draws per pair (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per forward (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    said = parser.parse_args(argv)
    if said.draws < 1 or said.batch_size < 1:
        raise UserError("--draws and --batch-size must be at least 1")
    if not said.runs and not said.scorer:
        raise UserError("there is nobody to ask", fix="Give the folder of a run, or --scorer NAME.")

    from evaluators.agreement import Agreement, scorer_agreement
    from evaluators.scorefile import scorers_of
    from mmalign.pairdata import PairDataSettings, PairingSettings, read_pairs

    settings = PairDataSettings(path=said.store, split=said.split, pairing=PairingSettings(score=said.score))
    pairs, _ = read_pairs(settings, said.seed)
    found = []
    for run in said.runs:
        from diffusion.implicit import held_out_accuracy

        result = held_out_accuracy(
            run, said.store, said.split, draws=said.draws, batch_size=said.batch_size, seed=said.seed
        )
        low, high = result["ci95"]
        found.append(
            Agreement(
                judge=f"{run} (implicit reward)",
                accuracy=result["accuracy"],
                ci95=(low, high),
                pairs=result["pairs"],
                groups=result["groups"],
                ties=0,
                failed=0,
            )
        )
    for name, scorer in (scorers_of(said.scorer) if said.scorer else {}).items():
        found.append(scorer_agreement(name, scorer, pairs, batch_size=said.batch_size))
    if said.json:
        print(json.dumps([one.as_json() for one in found]))
        return 0
    width = max(len(one.judge) for one in found)
    for one in found:
        interval = "" if one.ci95 is None else f" [{one.ci95[0]:.3f}, {one.ci95[1]:.3f}]"
        rest = f"{one.pairs} pairs of {one.groups} groups" + (f", {one.failed} failed" if one.failed else "")
        print(f"{one.judge:<{width}}  {one.accuracy:.3f}{interval}  {rest}")
    return 0
