"""From votes to a better model: the commands, as they are to be typed where the server was started."""

from __future__ import annotations

import shlex
from pathlib import Path

from evaluators.arena.trials import Programme, Sources

EMBEDDED = ("shapes", "shapes-4step", "shapes-vlm")
_VLM = {"shapes": "vlm/dpo_shapes", "smolvlm": "vlm/dpo_smolvlm"}  # a part of the model's name -> its recipe


def steps(votes: Path, sources: Sources, programme: Programme) -> list[tuple[str, str]]:
    """(what it does, the command or commands): import, train, before and after, vote again."""

    def beside(ending: str) -> Path:
        return votes.parent / f"{votes.stem}-{ending}"

    store, run, again = beside("preferences"), beside("run"), beside("again.sqlite")
    base = _base(programme)
    settings = [f"data.path={store}", f"loop.output_dir={run}", *([] if base in EMBEDDED else [f"model.path={base}"])]
    if sources.answers:
        recipe = next((name for part, name in _VLM.items() if part in base.lower()), "vlm/dpo_qwen25_vl_3b")
        before, after = beside("before.jsonl"), beside("after.jsonl")
        made = [
            _line("mmalign", "generate", model, "--file", "heldout.jsonl", "--out", out)
            for model, out in ((base, before), (run, after))
        ]
        kind = "--answers"
    else:
        recipe, kind = "diffusion/dpo_own", "--images"
        before, after = beside("before"), beside("after")
        prompts = ("shapes:heldout", "--count", "50") if base in EMBEDDED else ("heldout.txt",)
        made = [
            _line("mmalign", "sample", *model, "--prompts", *prompts, "--out", out)
            for model, out in ((("--model", base), before), ((run,), after))
        ]
    return [
        ("the votes as preferences", _line("mmalign", "data", "import", votes, "--out", store)),
        ("training on them", _line("mmalign", "train", recipe, *settings)),
        ("before and after, on what was not voted on", "\n".join(made)),
        ("a blind test of the result", _line("mmalign", "arena", kind, before, after, "--votes", again)),
    ]


def _base(programme: Programme) -> str:
    """The base model's name, as far as the pictures say: `name@fingerprint + what was trained`."""
    first = programme.contestants[0]
    models = (entry.model for trial in programme.trials for entry in (trial.a, trial.b) if entry.contestant == first)
    return (next(models, None) or "MODEL").partition(" + ")[0].partition("@")[0]


def _line(*words: str | Path) -> str:
    return shlex.join(str(word) for word in words)
