"""`mmalign doctor`: what is installed, what runs here, and whether another distribution is in the way."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import warnings
from pathlib import Path

from mmalign import __version__

HOME = Path(__file__).resolve().parent.parent  # the folder that holds our four packages
PACKAGES = ("mmalign", "evaluators", "diffusion", "vlm")
LIBRARIES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "open-clip-torch",
    "numpy",
    "pyarrow",
    "pillow",
    "safetensors",
)
EXTRAS = {  # module -> the extra that brings it; DeepSpeed builds against the local CUDA, so none does
    "xformers": "xformers",
    "wandb": "wandb",
    "bitsandbytes": "bitsandbytes",
    "gradio": "arena",
    "deepspeed": "",
}


def shadows() -> dict[str, str]:
    """Our import packages that another distribution or folder provides: name -> a sentence on who does.

    `diffusion`, `vlm` and `evaluators` are also names of other projects; whichever stands first on the path,
    or was installed last, wins without a word. Empty when every package is ours.
    """
    claims = importlib.metadata.packages_distributions()
    found = {}
    for package in PACKAGES:
        others = sorted(set(claims.get(package, ())) - {"mmalign"})
        spec = importlib.util.find_spec(package)
        if others:
            found[package] = f"another distribution provides '{package}': {', '.join(others)}"
        elif spec is None:
            found[package] = f"'{package}' is missing beside '{HOME / 'mmalign'}'"
        elif HOME / package not in [Path(place).resolve() for place in spec.submodule_search_locations or ()]:
            found[package] = f"'{package}' is taken from '{spec.origin}', which stands before ours on the path"
    return found


def version(distribution: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def extra_state(module: str, extra: str) -> str:
    """Whether an optional package can be used: its version, or why not."""
    if importlib.util.find_spec(module) is None:
        return f"not installed (pip install -e '.[{extra}]')" if extra else "not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a report on whether it loads; what it warns of shows when it is used
            importlib.import_module(module)
    except Exception as error:  # a foreign package's import may raise anything; that is the answer
        return f"{version(module)}, does not load: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return f"{version(module)}, loads"


def devices() -> list[str]:
    """The processors training could use, one line each."""
    import torch

    lines = [f"CPU, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        lines.append(f"cuda:{index} {card.name}, {card.total_memory / 2**30:.0f} GiB, {bf16}")
    if torch.backends.mps.is_available():
        lines.append("mps (Apple)")
    return lines


def main(argv: list[str]) -> int:
    """Print the report. Exit code 1 when one of our packages is not ours."""
    from mmalign.cli import Parser

    Parser(prog="mmalign doctor", description=__doc__).parse_args(argv)
    rows = [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("mmalign", f"{__version__} ({HOME})"),
    ]
    rows += [(name, version(name)) for name in LIBRARIES]
    rows += [("device", line) for line in devices()]
    rows += [(name, extra_state(name, extra)) for name, extra in EXTRAS.items()]
    problems = shadows()
    if "evaluators" not in problems:
        # by name: what judges stands on the core, which may not import it
        rows.append(("scorers", importlib.import_module("evaluators.listing").summary()))
    rows += [(name, problems.get(name, "ours")) for name in PACKAGES]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    if problems:
        print("\nUninstall the other distribution, then install mmalign again: it may have lost files.")
    return 1 if problems else 0
