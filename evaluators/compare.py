"""`mmalign compare BASE TUNED ...`: is the difference between score files real, and how large is it?

    mmalign compare scores/base scores/dpo                   two models, each scorer's main number
    mmalign compare a.jsonl b.jsonl c.jsonl --out report     three or more: each against the first, and a ranking

For each number: win rate with ties, mean difference, their 95 % intervals, sign and permutation tests, both with Holm's
correction over all that is compared, Cohen's d, and the smallest difference that would have been seen. Pictures of one
prompt are a cluster throughout. Higher is better. Files whose protocols differ are refused: steps, guidance or prompts
move scores more than alignment does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.cli import Parser
from mmalign.errors import UserError, nearest

if TYPE_CHECKING:
    from evaluators.scorefile import ScoreFile
    from mmalign.ranking import Ranking
    from mmalign.statistics import Interval, PairedReport

UNKNOWN = "unknown"  # a protocol's `sampler` where pictures were scored as they came


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One number of one model."""

    mean: float
    ci95: Interval
    median: float
    deviation: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A model against the first one, by one number.

    Attributes:
        report: win rate, mean difference, sign test over prompts.
        sign_holm: the sign test's p, corrected for all comparisons made.
        permutation_p: of the mean difference, prompts flipped; permutation_holm: corrected.
        effect: Cohen's d, mean difference / deviation per prompt; None when all prompts moved alike.
        smallest: the mean difference that is found with 80 % power at this spread and number of prompts.
        failed: samples left out because one of the two has no such number.
    """

    number: str
    model: str
    report: PairedReport
    sign_holm: float
    permutation_p: float
    permutation_holm: float
    effect: float | None
    smallest: float
    failed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All that was found.

    Attributes:
        models: names, the one that the others are compared with first.
        summaries: number -> model -> summary, over the samples that all models have.
        rankings: number -> Bradley-Terry strengths in the order of `models`, with three models or more.
        differences: (number, model) -> tuned minus base of every sample, for a histogram.
        pictures: prompt -> a picture's file of each model, in the order of `models`.
    """

    models: list[str]
    protocol: dict[str, Any]
    digest: str
    samples: int
    prompts: int
    identities: dict[str, str]
    summaries: dict[str, dict[str, Summary]]
    compared: list[Compared]
    rankings: dict[str, Ranking] = field(default_factory=dict)
    differences: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    pictures: dict[str, list[Path]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values: all but the pictures and the single differences."""
        return {
            "models": self.models,
            "protocol": self.protocol,
            "protocol_digest": self.digest,
            "samples": self.samples,
            "prompts": self.prompts,
            "scorers": self.identities,
            "numbers": {
                number: {model: asdict(one) for model, one in found.items()} for number, found in self.summaries.items()
            },
            "compared": [asdict(one) for one in self.compared],
            "rankings": {
                number: {
                    model: {
                        "strength": ranking.strengths[index],
                        "ci95": list(ranking.intervals[index]),
                        "elo": ranking.elo[index],
                        "elo_ci95": list(ranking.elo_intervals[index]),
                    }
                    for index, model in enumerate(self.models)
                }
                for number, ranking in self.rankings.items()
            },
            "notes": self.notes,
        }


# ------------------------------------------------------------------------------------------------- comparing


def compare(
    files: Sequence[ScoreFile],
    names: Sequence[str] | None = None,
    *,
    numbers: Sequence[str] | None = None,
    tolerance: float = 0.0,
    common: bool = False,
    resamples: int = 10_000,
    seed: int = 0,
    shown: int = 12,
) -> Comparison:
    """Compare every file with the first.

    Args:
        names: of the models; by default what the headers say.
        numbers: `scorer/number`; by default each scorer's main number.
        tolerance: differences up to this size are ties.
        common: compare the samples that all files have, instead of refusing files that differ in them.
        resamples, seed: of bootstrap and permutations.
        shown: prompts whose pictures are listed.

    Raises:
        UserError: fewer than two files, protocols, scorers or samples that differ, a number that some rows lack without
            an error, or nothing in common.
    """
    from mmalign.statistics import (
        bootstrap_interval,
        cluster_deviation,
        effect_size,
        holm,
        minimum_detectable_difference,
        paired_report,
        permutation_test,
    )

    if len(files) < 2:
        raise UserError("one file of scores has nothing to be compared with", fix="Give two or more.")
    models = _names(files, names)
    _require_same_protocol(files)
    chosen = _numbers(files, numbers)
    ids, notes = _common_ids(files, common)
    _require_same_samples(files, ids)
    first = files[0]
    if first.header.protocol.get("sampler") == UNKNOWN:
        notes.append(
            "How these pictures were drawn is not known: they were scored as they came. "
            "Differences in steps, guidance or seeds would show as differences between the models."
        )

    found: list[dict[str, Any]] = []
    summaries: dict[str, dict[str, Summary]] = {}
    rankings, differences = {}, {}
    for number in chosen:
        columns, kept, failed = _columns(files, ids, number)
        prompts = [first.rows[name].prompt for name in kept]
        if failed:
            notes.append(f"{number}: {failed} of {len(ids)} samples have an error in some file and are left out.")
        summaries[number] = {
            model: _summary(values, bootstrap_interval(values, prompts, resamples=resamples, seed=seed))
            for model, values in zip(models, columns, strict=True)
        }
        for model, values in zip(models[1:], columns[1:], strict=True):
            moved = [after - before for before, after in zip(columns[0], values, strict=True)]
            differences[number, model] = moved
            found.append(
                {
                    "number": number,
                    "model": model,
                    "report": paired_report(
                        columns[0], values, prompts, tolerance=tolerance, resamples=resamples, seed=seed
                    ),
                    "permutation_p": permutation_test(moved, prompts, resamples=resamples, seed=seed),
                    "effect": effect_size(moved, prompts),
                    "smallest": minimum_detectable_difference(cluster_deviation(moved, prompts), len(set(prompts))),
                    "failed": failed,
                }
            )
        if len(files) > 2:
            rankings[number] = _rank(columns, prompts, tolerance, models)
    signs = holm([one["report"].p_value for one in found])
    permutations = holm([one["permutation_p"] for one in found])
    return Comparison(
        models=models,
        protocol=dict(first.header.protocol),
        digest=first.header.digest,
        samples=len(ids),
        prompts=len({first.rows[name].prompt for name in ids}),
        identities={number: first.header.identity(number) for number in chosen},
        summaries=summaries,
        compared=[
            Compared(**one, sign_holm=sign, permutation_holm=permutation)
            for one, sign, permutation in zip(found, signs, permutations, strict=True)
        ],
        rankings=rankings,
        differences=differences,
        pictures=_pictures(files, ids, shown),
        notes=notes,
    )


def _names(files: Sequence[ScoreFile], names: Sequence[str] | None) -> list[str]:
    if names is None:
        names = [file.header.model for file in files]
        if len(set(names)) < len(names):  # the same model scored twice: told apart by where the files are
            names = [str(file.path) for file in files]
    if len(names) != len(files):
        raise UserError(f"{len(names)} names for {len(files)} files", place="--names")
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise UserError(f"two files are called '{twice[0]}'", fix="Tell them apart with --names.")
    return list(names)


def _require_same_protocol(files: Sequence[ScoreFile]) -> None:
    first = files[0].header
    for other in files[1:]:
        if other.header.digest == first.digest:
            continue
        keys = sorted(first.protocol.keys() | other.header.protocol.keys())
        differ = [key for key in keys if first.protocol.get(key) != other.header.protocol.get(key)]
        said = "; ".join(f"{key}: {first.protocol.get(key)} and {other.header.protocol.get(key)}" for key in differ[:3])
        raise UserError(
            f"the protocols differ in {said}"[:400],
            place=f"{files[0].path} and {other.path}",
            fix="Draw and score both models by the same protocol.",
        )


def _numbers(files: Sequence[ScoreFile], asked: Sequence[str] | None) -> list[str]:
    first = files[0].header
    everywhere = [number for number in first.numbers if all(number in file.header.numbers for file in files)]
    if not everywhere:
        raise UserError(
            "the files have no scorer in common",
            place=" and ".join(str(file.path) for file in files),
            fix="Score them with the same scorers.",
        )
    chosen = list(dict.fromkeys(asked)) if asked else [number for number in everywhere if number in first.mains]
    for number in chosen or everywhere:
        if number not in everywhere:
            raise UserError(f"not every file has '{number}'", place="--numbers", fix=nearest(number, everywhere))
        identities = {file.header.identity(number) for file in files}
        if len(identities) > 1:
            raise UserError(
                f"'{number}' was measured by different scorers: {', '.join(sorted(identities))}",
                fix="Score all pictures with the same version.",
            )
    return chosen or everywhere


def _common_ids(files: Sequence[ScoreFile], common: bool) -> tuple[list[str], list[str]]:
    shared = set(files[0].rows).intersection(*(file.rows for file in files[1:]))
    if not shared:
        raise UserError(
            "the files have no sample in common",
            place=f"ids such as '{next(iter(files[0].rows))}' and '{next(iter(files[1].rows))}'",
            fix="Score the same prompts and seeds of every model.",
        )
    ids = [name for name in files[0].rows if name in shared]
    notes = []
    for file in files:
        lone = len(file.rows) - len(shared)
        if lone and not common:
            strange = next(name for name in file.rows if name not in shared)
            raise UserError(
                f"{lone} of {len(file.rows)} samples are not in every file, the first is '{strange}'",
                place=str(file.path),
                fix="Score the rest, or compare what they share with --common.",
            )
        if lone:
            notes.append(f"{file.header.model}: {lone} of {len(file.rows)} samples are not in every file.")
    return ids, notes


def _require_same_samples(files: Sequence[ScoreFile], ids: Sequence[str]) -> None:
    first = files[0]
    for other in files[1:]:
        for name in ids:
            here, there = first.rows[name], other.rows[name]
            for what in ("prompt", "seed"):
                if getattr(here, what) != getattr(there, what):
                    raise UserError(
                        f"sample '{name}' has another {what}: {getattr(here, what)!r} and {getattr(there, what)!r}",
                        place=f"{first.path} and {other.path}",
                        fix="Score the same prompts and seeds of every model.",
                    )


def _columns(files: Sequence[ScoreFile], ids: Sequence[str], number: str) -> tuple[list[list[float]], list[str], int]:
    """(scores of each file, ids of their rows, ids left out because of an error)."""
    kept, failed, absent = [], 0, 0
    for name in ids:
        rows = [file.rows[name] for file in files]
        have = [number in row.scores for row in rows]
        if all(have):
            kept.append(name)
        elif any(row.error is not None for row in rows):
            failed += 1
        elif any(have):
            at = next(file for file, has in zip(files, have, strict=True) if not has)
            raise UserError(
                f"sample '{name}' has no '{number}' and no error that says why",
                place=str(at.path),
                fix="Score these pictures again.",
            )
        else:
            absent += 1  # a number that the prompt does not ask for
    if not kept:
        raise UserError(f"no sample has '{number}' in every file", fix="See the errors in the score files.")
    return [[file.rows[name].scores[number] for name in kept] for file in files], kept, failed


def _summary(values: Sequence[float], interval: Interval) -> Summary:
    import numpy as np

    data = np.asarray(values)
    deviation = float(data.std(ddof=1)) if len(data) > 1 else 0.0
    return Summary(mean=float(data.mean()), ci95=interval, median=float(np.median(data)), deviation=deviation)


def _rank(
    columns: Sequence[Sequence[float]], prompts: Sequence[str], tolerance: float, models: Sequence[str]
) -> Ranking:
    """Bradley-Terry over every pair of models on every sample, clustered by prompt."""
    import numpy as np

    from mmalign.ranking import bradley_terry

    index = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    member = np.array([index[prompt] for prompt in prompts])
    scores = np.array(columns)
    wins = np.zeros((len(index), len(scores), len(scores)))
    ties = np.zeros_like(wins)
    for i in range(len(scores)):
        for j in range(len(scores)):
            if i != j:
                gap = scores[i] - scores[j]
                wins[:, i, j] = np.bincount(member, gap > tolerance, minlength=len(index))
                ties[:, i, j] = np.bincount(member, np.abs(gap) <= tolerance, minlength=len(index))
    return bradley_terry(wins, ties, names=models)


def _pictures(files: Sequence[ScoreFile], ids: Sequence[str], shown: int) -> dict[str, list[Path]]:
    """The first picture of each of the first prompts, where every file has it beside it."""
    from mmalign.media import path_fault

    found: dict[str, list[Path]] = {}
    for name in ids:
        rows = [file.rows[name] for file in files]
        if len(found) == shown:
            break
        if rows[0].prompt in found:
            continue
        paths = [
            file.path.parent / row.image
            for file, row in zip(files, rows, strict=True)
            if row.image is not None and path_fault(file.path.parent, row.image) is None
        ]
        if len(paths) == len(files):
            found[rows[0].prompt] = paths
    return found


# --------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign compare BASE TUNED ... [--numbers ...] [--out FOLDER]`."""
    parser = Parser(prog="mmalign compare", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="score files, or folders that `mmalign score` wrote")
    parser.add_argument("--names", nargs="+", help="of the models (default: what the files say)")
    parser.add_argument("--numbers", nargs="+", metavar="SCORER/NUMBER", help="default: each scorer's main number")
    parser.add_argument("--tolerance", type=float, default=0.0, help="differences up to this are ties (default: 0)")
    parser.add_argument("--common", action="store_true", help="compare the samples that all files have")
    parser.add_argument("--out", type=Path, help="write comparison.json, .md and .html into this folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    said = parser.parse_args(argv)
    if not said.tolerance >= 0:
        raise UserError(f"--tolerance must be 0 or more, got {said.tolerance}")

    from evaluators.compare_report import markdown, write_comparison
    from evaluators.scorefile import read_scores

    files = [read_scores(path) for path in said.files]
    found = compare(files, said.names, numbers=said.numbers, tolerance=said.tolerance, common=said.common)
    print(json.dumps(found.as_json(), allow_nan=False) if said.json else markdown(found))
    if said.out is not None:
        page = write_comparison(said.out, found)
        if not said.json:
            print(f"\nreport: {page}")
    return 0
