"""From votes to a better model: the commands, as they are to be typed where the server was started."""

from __future__ import annotations

import shlex
from pathlib import Path

from evaluators.arena.trials import Programme, Sources

EMBEDDED = ("shapes", "shapes-4step")


def steps(votes: Path, sources: Sources, programme: Programme) -> list[tuple[str, str]]:
    """(what it does, the command): import, train, draw again, vote again."""
    place = votes.parent
    store, run = place / f"{votes.stem}-preferences", place / f"{votes.stem}-run"
    base = _base(programme)
    imported = ("the votes as preferences", _line("mmalign", "data", "import", votes, "--out", store))
    if sources.answers:
        recipe = _line(
            "mmalign", "train", "vlm/dpo", f"data.path={store}", f"loop.output_dir={run}", f"model.path={base}"
        )
        return [imported, ("training on them", recipe)]
    named = [] if base in EMBEDDED else [f"model.path={base}"]
    recipe = _line("mmalign", "train", "diffusion/dpo_own", f"data.path={store}", f"loop.output_dir={run}", *named)
    base_drawn, tuned_drawn = place / f"{votes.stem}-before", place / f"{votes.stem}-after"
    prompts = ("--prompts", "shapes:heldout", "--count", "50") if base in EMBEDDED else ("--prompts", "heldout.txt")
    drawn = "\n".join(
        [
            _line("mmalign", "sample", "--model", base, *prompts, "--out", base_drawn),
            _line("mmalign", "sample", run, *prompts, "--out", tuned_drawn),
        ]
    )
    again = _line(
        "mmalign", "arena", "--images", base_drawn, tuned_drawn, "--votes", place / f"{votes.stem}-again.sqlite"
    )
    return [
        imported,
        ("training on them", recipe),
        ("before and after, on prompts that were not voted on", drawn),
        ("a blind test of the result", again),
    ]


def _base(programme: Programme) -> str:
    """The base model's name, as far as the pictures say: `name@fingerprint + what was trained`."""
    first = programme.contestants[0]
    models = (entry.model for trial in programme.trials for entry in (trial.a, trial.b) if entry.contestant == first)
    return (next(models, None) or "MODEL").partition(" + ")[0].partition("@")[0]


def _line(*words: str | Path) -> str:
    return shlex.join(str(word) for word in words)
