"""`mmalign accuracy RUN --store STORE --split heldout`: does a tuned model rank pairs it never saw as people did?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mmalign.cli import Parser
from mmalign.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign accuracy RUN [--store STORE] [--split NAME]`."""
    parser = Parser(prog="mmalign accuracy", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--store", type=Path, help="a preference store; default: the run's own")
    parser.add_argument("--split", default="heldout", help="of the store (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=10, help="(timestep, noise) draws per pair (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per forward (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    said = parser.parse_args(argv)
    if said.draws < 1 or said.batch_size < 1:
        raise UserError("--draws and --batch-size must be at least 1")

    from diffusion.implicit import held_out_accuracy
    from evaluators.agreement import Effort

    effort = Effort(batch_size=said.batch_size, draws=said.draws, seed=said.seed)
    result = held_out_accuracy(said.run, said.store, said.split, effort)
    if said.json:
        print(json.dumps(result))
    else:
        low, high = result["ci95"]
        print(
            f"implicit-reward accuracy {result['accuracy']:.3f} [{low:.3f}, {high:.3f}] on {result['pairs']} pairs "
            f"of {result['groups']} groups, split '{said.split}'"
        )
    return 0
