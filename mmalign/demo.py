"""`mmalign demo`: align an embedded model and show what changed, in minutes on a laptop.

    mmalign demo                                       pictures in a style: unmistakable in a few minutes
    mmalign demo diffusion/dpo_shapes_faithful         pictures that show what the caption says
    mmalign demo --method povid                        descriptions without what is not there: vlm/povid_shapes
    mmalign demo RECIPE key=value ...                  any recipe with an `evaluation` section

Make the recipe's preferences; train every arm; judge base and arms on held-out prompts or pictures; write
`report.json` and `report.html`. What a stage left in the run's folder is used again, so an interrupted demo goes on
where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmalign.cli import Parser, resolve
from mmalign.errors import UserError, nearest
from mmalign.launch import package_of
from mmalign.recipes import find, shipped

DEFAULT = "diffusion/dpo_shapes"
STAGES = {"diffusion": "diffusion.stages:demo", "vlm": "vlm.stages:demo"}
_SUFFIX = "_shapes"


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign demo [RECIPE | --method NAME] [key=value ...]`."""
    parser = Parser(prog="mmalign demo", description=__doc__)
    parser.add_argument("--method", metavar="NAME", help=f"the recipe NAME{_SUFFIX} of either package")
    parser.add_argument("words", nargs="*", metavar="RECIPE key=value", help=f"default recipe: {DEFAULT}")
    said = parser.parse_intermixed_args(argv)
    named = bool(said.words) and "=" not in said.words[0]
    if said.method and named:
        raise UserError(f"both a recipe, {said.words[0]}, and --method {said.method}", fix="Give one of them.")
    recipe = recipe_of(said.method) if said.method else said.words[0] if named else DEFAULT
    stages: Any = resolve(STAGES[package_of(find(recipe))])
    code: int = stages(recipe, said.words[1:] if named else said.words)
    return code


def recipe_of(method: str) -> str:
    """The short name of a method's recipe on an embedded model.

    Raises:
        UserError: there is none.
    """
    known = {
        leaf.removesuffix(_SUFFIX): name
        for name in shipped()
        for folder, _, leaf in [name.partition("/")]
        if folder in STAGES and leaf.endswith(_SUFFIX)
    }
    if method not in known:
        raise UserError(f"no recipe for the method '{method}'", place="--method", fix=nearest(method, known))
    return known[method]
