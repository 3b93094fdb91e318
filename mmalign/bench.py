"""`mmalign bench`: all methods side by side on an embedded world, with intervals.

    mmalign bench methods                              configs/bench/methods.yaml: models that draw, at equal budget
    mmalign bench hallucination                        configs/bench/hallucination.yaml: models that answer
    mmalign bench methods --only style/pso style/dpo   some of the arms
    mmalign bench hallucination --only povid --jobs 2  two runs at a time

methods: each run gets as many updates as its budget of UNet rows pays for: a picture through the UNet is one row, its
backward two, with guidance twice as many; what sampling, candidates, inversions and references cost is counted. Base
and tuned models then draw the same held-out prompts with the same noise.

hallucination: every arm is trained with every seed and sits the same exam as its base: descriptions of held-out
pictures, yes/no questions and POPE's. The table says how much each measure changed, by pictures drawn anew.

What is finished is not done again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign.cli import Parser, resolve
from mmalign.errors import UserError

SUITES = {"methods": "diffusion.tournament:tournament", "hallucination": "vlm.tournament:tournament"}
FOLDERS = {"methods": Path("runs/bench"), "hallucination": Path("runs/hallucination")}


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign bench WHAT [--suite FILE] [--out FOLDER] [--only ARM ...] [--seeds N ...] [--jobs N]`."""
    parser = Parser(prog="mmalign bench", description=__doc__)
    parser.add_argument("what", choices=list(SUITES), help="models that draw, or models that answer")
    parser.add_argument("--suite", help="a YAML file, or the name of one that ships (default: bench/WHAT)")
    parser.add_argument("--out", type=Path, help="folder of the runs and the table (default: runs/...)")
    parser.add_argument("--only", nargs="*", default=[], metavar="ARM", help="leave the other arms out")
    parser.add_argument("--seeds", nargs="*", type=int, help="instead of the suite's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    said = parser.parse_args(argv)
    if said.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {said.jobs}")
    tournament: Any = resolve(SUITES[said.what])
    out = said.out or FOLDERS[said.what]
    code: int = tournament(said.suite or f"bench/{said.what}", out, only=said.only, seeds=said.seeds, jobs=said.jobs)
    return code
