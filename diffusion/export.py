"""Writes trained weights in another tool's layout, and proves that they act before keeping the file.

mmalign export runs/demo/dpo --out style.safetensors               for ComfyUI, AUTOMATIC1111, diffusers
mmalign export runs/demo/dpo --out aligned/ --format diffusers     a whole pipeline, adapter merged in
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmalign.cli import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign export CHECKPOINT --out PATH [--format kohya|diffusers] [--model PATH]`."""
    parser = Parser(prog="mmalign export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a run's folder (its newest good checkpoint) or a checkpoint")
    parser.add_argument(
        "--out", type=Path, required=True, help="a new .safetensors file, or a new folder for diffusers"
    )
    parser.add_argument(
        "--format",
        choices=["kohya", "diffusers"],
        default="kohya",
        help="kohya: one file of adapter weights; diffusers: a pipeline's folder (default: %(default)s)",
    )
    parser.add_argument("--model", metavar="PATH", help="where the base is, if not where it was during training")
    said = parser.parse_args(argv)

    from diffusion.exporting import export
    from diffusion.tuned import find_tuned

    about = export(find_tuned(said.checkpoint, base=said.model), said.out, said.format)
    width = max(map(len, about))
    print(f"wrote {said.out}; diffusers opens it and it answers as the trained model does")
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in about.items() if not name.startswith("ss_")))
    return 0
