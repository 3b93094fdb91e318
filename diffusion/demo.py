"""`mmalign demo`: align the embedded model with a preference and show what changed, in minutes on a laptop.

    mmalign demo                                       style: unmistakable in a few minutes
    mmalign demo diffusion/dpo_shapes_faithful         faithfulness: what the caption says
    mmalign demo RECIPE key=value ...                  any recipe with an `evaluation` section

Sample candidates on training prompts and label them with a scorer; train every arm of the recipe; draw held-out
prompts with the same noise from the base and from every arm; judge; write `report.json` and `report.html`. What a
stage left in the run's folder is used again, so an interrupted demo goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.cli import Parser

DEFAULT = "diffusion/dpo_shapes"


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign demo [RECIPE] [key=value ...]`."""
    parser = Parser(prog="mmalign demo", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="RECIPE key=value", help=f"default recipe: {DEFAULT}")
    words = parser.parse_args(argv).words
    named = bool(words) and "=" not in words[0]
    from diffusion.stages import demo

    return demo(words[0] if named else DEFAULT, words[1:] if named else words)
