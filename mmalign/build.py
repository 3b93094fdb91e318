"""`mmalign build PART --out FOLDER`: rebuilds the embedded models from their seeds.

    mmalign build vae --out build/vae
    mmalign build base --out build/t2i --vae build/vae
    mmalign build 4step --out build/t2i_4step
    mmalign build clip --out build/clip
    mmalign build vlm --out build/vlm

Models of the same quality as the shipped ones, not of the same bits: thread counts and library versions change the last
digits. How long each takes says the README beside the shipped models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign import shapes
from mmalign.cli import Parser, resolve

PARTS = {
    "vae": ("diffusion.build:build_vae", 4500, 16),
    "base": ("diffusion.build:build_base", 4000, 32),
    "4step": ("diffusion.distill:build_4step", 4000, 32),
    "clip": ("evaluators.build_clip:build_clip", 2400, 32),
    "vlm": ("vlm.build:build_vlm", 1200, 32),
}
"""What builds a part, and the steps and batch that the shipped one had."""


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign build PART --out FOLDER`."""
    parser = Parser(prog="mmalign build", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    for part, (_, steps, batch) in PARTS.items():
        one = parts.add_parser(part)
        one.add_argument("--out", type=Path, required=True, help="folder to write")
        one.add_argument("--steps", type=int, default=steps)
        one.add_argument("--batch", type=int, default=batch)
        one.add_argument("--seed", type=int, default=0)
        if part == "base":
            one.add_argument("--vae", type=Path, required=True, help="folder of a built autoencoder")
        if part == "4step":
            one.add_argument("--base", type=Path, default=shapes.model_folder("t2i"), help="folder of the teacher")
            one.add_argument("--samples", type=int, default=16_000, help="teacher's answers to learn from")
    said = vars(parser.parse_args(argv))
    build: Any = resolve(PARTS[said.pop("part")][0])
    build(said.pop("out"), **said)
    return 0
