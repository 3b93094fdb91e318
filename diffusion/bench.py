"""`mmalign bench methods`: every method on the embedded world at equal budget, with intervals.

    mmalign bench methods                              all arms of configs/bench/methods.yaml, three seeds
    mmalign bench methods --only style/pso style/dpo   some of them
    mmalign bench methods --jobs 2                     two runs at a time

Each run gets as many updates as its budget of UNet rows pays for: a picture through the UNet is one row, its backward
two, with guidance twice as many; what sampling, candidates, inversions and references cost is counted. Base and tuned
models then draw the same held-out prompts with the same noise. What is finished is not done again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmalign.cli import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign bench methods [--suite FILE] [--out FOLDER] [--only PREFERENCE/ARM ...] [--jobs N]`."""
    parser = Parser(prog="mmalign bench", description=__doc__)
    parser.add_argument("what", choices=["methods"], help="methods: compare all methods")
    parser.add_argument("--suite", default="bench/methods", help="a YAML file, or the name of one that ships")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the runs and the table")
    parser.add_argument("--only", nargs="*", default=[], metavar="PREFERENCE/ARM", help="leave the other arms out")
    parser.add_argument("--seeds", nargs="*", type=int, help="instead of the suite's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    said = parser.parse_args(argv)
    from diffusion.tournament import tournament

    return tournament(said.suite, said.out, only=said.only, seeds=said.seeds, jobs=said.jobs)
