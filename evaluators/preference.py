"""`mmalign eval preference`: who ranks held-out pairs as people did, models by their implicit rewards and scorers.

    mmalign eval preference runs/photos/dpo --store runs/photos/store --split heldout --scorer pickscore --scorer clip
    mmalign eval preference runs/povid/povid --store runs/povid/store --out ranked
    mmalign eval preference --store pickapic --split test --scorer pickscore --ties        as in PickScore's table

The implicit reward of a tuned model says how much better than its base it predicts a picture's noise, or how much
likelier it finds an answer: a run's own package measures it (`diffusion.implicit`, `vlm.implicit`). How margins become
an accuracy, of runs and scorers alike, is said in `evaluators.agreement`.

With --out there are preference.json, preference.md, and pairs.jsonl with everybody's margin on every pair.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.cli import Parser, resolve
from mmalign.errors import UserError

if TYPE_CHECKING:
    from evaluators.agreement import Agreement, Effort
    from mmalign.records import Preference

RUNS = {"diffusion": "diffusion.implicit:agreements", "vlm": "vlm.implicit:agreements"}


def of_run(run: Path, pairs: Sequence[Preference], effort: Effort) -> list[Agreement]:
    """What a tuned model learned, asked by the package that trained it.

    Raises:
        UserError: no run there, one without implicit rewards, or pairs that its model cannot read.
    """
    from mmalign import runs

    package = runs.package(run)
    if package not in RUNS:
        raise UserError(f"a run of {package} has no base", place=str(run), fix="A trained scorer is a --scorer.")
    ask: Any = resolve(RUNS[package])
    found: list[Agreement] = ask(run, pairs, effort)
    return found


def markdown(found: Sequence[Agreement]) -> str:
    """The table, and what its numbers mean."""
    from evaluators.compare_report import pipe_table

    rows = [
        [
            one.judge,
            f"{one.accuracy:.3f}",
            "" if one.ci95 is None else f"{one.ci95[0]:.3f} to {one.ci95[1]:.3f}",
            f"{one.margin_mean:.4g}",
            str(one.ties),
            str(one.pairs),
            str(one.groups),
            str(one.failed),
        ]
        for one in found
    ]
    others = [
        [
            one.judge,
            str(one.published.strict),
            str(one.published.rank),
            f"{one.published.pickscore} (threshold {one.published.threshold:.2f})",
        ]
        for one in found
    ]
    head = ["judge", "accuracy", "95 % interval", "mean margin", "ties", "pairs", "groups", "left out"]
    told = (
        "Accuracy: share of pairs with the chosen side ahead, ties counted half. Its interval keeps the pairs of a "
        "group (named, or of one picture, or of one prompt) together. A margin is in its judge's own unit."
    )
    definitions = ["as papers define it", "strict (ImageReward)", "mean over prompts (HPDv2)", "with ties (PickScore)"]
    return f"{pipe_table(head, rows)}\n\n{told}\n\n{pipe_table(definitions, others)}"


def lines(found: Sequence[Agreement], pairs: Sequence[Preference]) -> Iterator[str]:
    """Everybody's margin on every pair; null where a pair was left out."""
    from evaluators.agreement import groups_of

    for index, (pair, group) in enumerate(zip(pairs, groups_of(pairs), strict=True)):
        row = {"pair": pair.item_id, "group": group, "margins": {one.judge: one.margins[index] for one in found}}
        yield json.dumps(row, ensure_ascii=False) + "\n"


def write(folder: Path, found: Sequence[Agreement], pairs: Sequence[Preference], about: dict[str, Any]) -> None:
    """Write the three files, each whole or not at all.

    Args:
        about: what was asked.

    Raises:
        UserError: the folder cannot be written.
    """
    from evaluators.scorefile import write_whole

    content = {**about, "judges": [one.as_json() for one in found]}
    write_whole(folder / "preference.json", [json.dumps(content, allow_nan=False, indent=1) + "\n"])
    write_whole(folder / "preference.md", [markdown(found) + "\n"])
    write_whole(folder / "pairs.jsonl", lines(found, pairs))


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign eval preference [RUN ...] --store STORE [--split NAME] [--scorer NAME ...] [--out FOLDER]`."""
    parser = Parser(prog="mmalign eval preference", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folders of training runs, or checkpoints")
    parser.add_argument("--store", type=Path, required=True, help="a preference store")
    parser.add_argument("--split", default="heldout", help="of the store (default: %(default)s)")
    parser.add_argument("--score", help="of the store, where pairs come from scores (default: the only one)")
    parser.add_argument(
        "--ties", action="store_true", help="ask scorers about pairs that labels call ties, which PickScore counts"
    )
    parser.add_argument("--scorer", action="append", default=[], metavar="NAME[,option=value]", help="again for more")
    parser.add_argument(
        "--draws", type=int, default=10, help="(timestep, noise) draws a picture (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per forward (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the three files")
    parser.add_argument("--json", action="store_true", help="print JSON")
    said = parser.parse_args(argv)
    if said.draws < 1 or said.batch_size < 1:
        raise UserError("--draws and --batch-size must be at least 1")
    if not said.runs and not said.scorer:
        raise UserError("there is nobody to ask", fix="Give the folder of a run, or --scorer NAME.")
    if said.runs and said.ties:
        raise UserError("runs are asked about pairs with a preferred side", place="--ties", fix="Ask scorers alone.")

    from evaluators.agreement import Effort, scorer_agreement
    from evaluators.scorefile import scorers_of
    from mmalign.pairdata import PairDataSettings, PairingSettings, read_pairs

    pairing = PairingSettings(score=said.score, ties="soft" if said.ties else "drop")
    settings = PairDataSettings(path=said.store, split=said.split, pairing=pairing)
    pairs, note = read_pairs(settings, said.seed)
    effort = Effort(batch_size=said.batch_size, draws=said.draws, seed=said.seed)
    found = [one for run in said.runs for one in of_run(run, pairs, effort)]
    for name, scorer in (scorers_of(said.scorer) if said.scorer else {}).items():
        found.append(scorer_agreement(name, scorer, pairs, batch_size=said.batch_size))
    if said.out is not None:
        about = {"store": str(said.store), "split": said.split, "pairing": note, "draws": said.draws, "seed": said.seed}
        write(said.out, found, pairs, about)
    print(json.dumps([one.as_json() for one in found]) if said.json else markdown(found))
    return 0
