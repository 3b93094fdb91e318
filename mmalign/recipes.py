"""Where recipes are: files of the user's, or those that come with mmalign, by short name."""

from __future__ import annotations

from pathlib import Path

from mmalign.errors import UserError


def shipped() -> dict[str, Path]:
    """The recipes that come with mmalign, by short name: `{"diffusion/dpo_shapes": path}`."""
    package = Path(__file__).resolve().parent
    root = package / "configs"  # an installed wheel; in a checkout they stand beside the packages
    if not root.is_dir() and (package.parent / "pyproject.toml").is_file():
        root = package.parent / "configs"
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find(name: str | Path) -> Path:
    """The file of a recipe given by path or by the short name of a shipped one.

    Raises:
        UserError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"'{name}' is a folder, not a recipe", fix="Give the YAML file in it.")
    known = shipped()
    short = path.as_posix().removesuffix(".yaml").removeprefix("configs/")
    if short in known:
        return known[short]
    from mmalign.explain import suggest

    raise UserError(f"no recipe '{name}'", fix=suggest(short, known, "/") if known else "Give the path of a YAML file.")
