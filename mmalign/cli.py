"""`mmalign VERB ...`: a leaf that names the entry functions as strings and imports one when it is called.

So the help answers at once, and the core never imports the packages that stand on it. Every entry point,
this one and `python -m diffusion.train` alike, runs under `run_entry`, where a user's mistake is one line.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from mmalign import __version__
from mmalign.errors import UserError, nearest

Main = Callable[[list[str]], int | None]

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
OK, USER_ERROR, INTERRUPTED, BROKEN_PIPE = 0, 2, 130, 141  # the last two: 128 + SIGINT, 128 + SIGPIPE


class Verb(NamedTuple):
    target: str  # "module:function"; the function takes the arguments after the verb
    help: str


VERBS = {
    "demo": Verb("mmalign.demo:main", "align an embedded model end to end and write a report (no GPU)"),
    "data": Verb("mmalign.data:main", "check, count, import and pair preference data"),
    "train": Verb("mmalign.launch:main", "train a recipe: RECIPE [--accelerate PRESET] [key=value ...]"),
    "sample": Verb("diffusion.sample:main", "draw images from a model, with or without a trained adapter"),
    "generate": Verb("vlm.generate:main", "ask a vision-language model, with or without a trained adapter"),
    "arena": Verb("mmalign.arena:main", "vote blindly between models in a browser; votes are training data"),
    "accuracy": Verb("diffusion.accuracy:main", "how a tuned model ranks held-out pairs, with an interval"),
    "score": Verb("evaluators.score:main", "score pictures of any source, in shards that resume"),
    "label": Verb("evaluators.label:main", "scores into a preference store"),
    "eval": Verb("mmalign.evaluation:main", "t2i, preference or vlm: evaluate models, pictures and answers"),
    "compare": Verb("evaluators.compare:main", "two or more score files: win rates, intervals, tests, ranking"),
    "export": Verb("diffusion.export:main", "write weights in another tool's layout and prove that they act"),
    "bench": Verb("mmalign.bench:main", "all methods side by side on an embedded world, with intervals"),
    "build": Verb("mmalign.build:main", "rebuild the embedded models from their seeds"),
    "scorers": Verb("evaluators.listing:main", "what there is to score with, and where its weights are looked for"),
    "doctor": Verb("mmalign.doctor:main", "print versions, devices, extras and packages that are in the way"),
}


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are `UserError`s: one line like every other, rather than a page of usage.

    Descriptions are printed as they are written: example commands keep their lines.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '?(.+?)'? \(choose from (.+)\)", message)
        if choice:
            hint = nearest(choice[1], [name.strip(" '") for name in choice[2].split(",")])
            raise UserError(f"{self.prog}: unknown '{choice[1]}'", fix=hint)
        raise UserError(f"{self.prog}: {message}", fix=f"See '{self.prog} --help'.")


def resolve(target: str) -> Main:
    """The function that "module:function" names, imported now.

    Raises:
        UserError: a module of ours is hidden by another distribution, or a dependency is not installed.
    """
    module, _, name = target.partition(":")
    try:
        function: Main = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as missing:
        raise _explain(missing, module) from missing
    return function


def _explain(missing: ModuleNotFoundError, module: str) -> UserError:
    from mmalign import doctor

    name = missing.name or module
    top = name.partition(".")[0]
    if top not in doctor.PACKAGES:
        return UserError(f"the package '{top}' is not installed", place=f"needed by {module}", fix=_extra(top))
    hidden = doctor.shadows().get(top)
    if hidden:
        return UserError(f"'{top}' is not ours here: {hidden}", fix="Run 'mmalign doctor'.")
    return UserError(f"this installation has no module '{name}'", fix="Install mmalign again.")


def _extra(package: str) -> str:
    brought = {"gradio": "arena", "fastapi": "arena", "uvicorn": "arena", "rapidocr_onnxruntime": "ocr"}
    extra = (brought | {"scipy": "dev", "skimage": "dev"}).get(package, package)
    if extra in ("xformers", "wandb", "bitsandbytes", "arena", "ocr", "dev"):
        return f"Install it with: pip install -e '.[{extra}]'."
    return "Install mmalign again, with its dependencies."


def run_entry(main: Main, argv: Sequence[str] | None = None) -> int:
    """Run an entry function and turn how it ends into an exit code.

    0 done, 2 a mistake of the user's (one line on stderr), 130 interrupted. Any other exception is a bug
    of ours and keeps its traceback. Under a launcher with several processes each line names its rank, so that
    one rank's error is never lost and the same error from all of them is read as one.

    Args:
        main: takes the arguments, returns an exit code or None.
        argv: the arguments; those of the process when not given.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = main(arguments) or OK
        sys.stdout.flush()  # so that a closed pipe is met here, not while the interpreter shuts down
        return code
    except UserError as error:
        rank = os.environ.get("RANK", "0") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "0"
        who = "" if rank == "0" else f" (rank {rank})"
        print(f"mmalign: error{who}: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("\nmmalign: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`mmalign data stats ... | head`). What is buffered must not be written again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        place = f" ({error.filename})" if error.filename else ""
        print(f"mmalign: error: disk full{place}. Free some space and run the same command again.", file=sys.stderr)
        return USER_ERROR


def usage() -> str:
    """The help page."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    return (
        "usage: mmalign VERB [arguments]\n\n"
        "Preference alignment for text-to-image and vision-language models.\n\n"
        f"{verbs}\n\n"
        "'mmalign VERB --help' explains a verb; 'mmalign --version' prints the version."
    )


def _dispatch(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return OK
    if argv[0] in ("-V", "--version"):
        print(f"mmalign {__version__}")
        return OK
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        raise UserError(f"unknown verb '{verb}'", fix=nearest(verb, VERBS))
    return resolve(VERBS[verb].target)(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """The console command."""
    return run_entry(_dispatch, argv)
