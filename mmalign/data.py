"""`mmalign data VERB`: look at preference data, import it, make pairs from it.

mmalign data check PATH                 every wrong row of a store or a source; exit code 2 if there is one
mmalign data stats PATH                 counts, ties, gaps, duplicates, what leaks between splits
mmalign data import SOURCE --out STORE  any known format or a folder of pictures into a store
mmalign data pair STORE --out FILE      the pairs that training would see, as JSON lines
mmalign data make RECIPE                a vision-language recipe's store, as its `make` section says
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar, get_args

import numpy as np
from tqdm import tqdm

from mmalign.cli import Parser, resolve, run_entry
from mmalign.errors import UserError
from mmalign.importers import IMPORTERS, ImportOptions, detect, read, scan
from mmalign.pairing import Pairing, PairingSummary, Strategy, Ties, compare_votes, make_pairs, write_pairs
from mmalign.preferences import Store
from mmalign.records import Problem, Record, validate
from mmalign.unpaired import Items

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 0 when all is well, 2 when `check` found something.

    Raises:
        UserError: a mistake in the data or the command.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["make"]:  # by name: the core imports no package that stands on it
        return int(resolve("vlm.making:main")(given[1:]) or 0)
    arguments = _parser().parse_args(given)
    return int(arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mmalign data", description="Preference data in and out.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    source = Parser(add_help=False)
    source.add_argument("--format", default="auto", choices=["auto", *IMPORTERS], help="default: look and see")
    source.add_argument("--root", help="folder that image paths are relative to (default: the source's)")
    source.add_argument("--prompt", help="prompt for pictures that come without one")
    source.add_argument("--group-regex", help="first group of a match in the record id names the group")

    check = verbs.add_parser("check", parents=[source], help="list what is wrong, row by row")
    check.add_argument("path")
    check.add_argument("--limit", type=int, default=20, help="problems to print (default 20; 0 for all)")
    check.add_argument("--skip-images", action="store_true", help="do not decode the images (fast)")
    check.set_defaults(run=_check)

    stats = verbs.add_parser("stats", parents=[source], help="counts, ties, gaps, duplicates, leaks")
    stats.add_argument("path")
    stats.add_argument("--json", action="store_true", help="machine-readable")
    stats.set_defaults(run=_stats)

    imports = verbs.add_parser("import", parents=[source], help="make a store")
    imports.add_argument("source")
    imports.add_argument("--out", required=True, help="the new store's folder")
    imports.add_argument("--licence", help="for records that name none")
    imports.add_argument("--split", help="put every record into this split")
    imports.add_argument(
        "--split-fraction",
        metavar="NAME=SHARE",
        help="put about this share of the groups (or prompts, without groups) into split NAME, "
        "chosen by hash: the same ones every time, however the data grows",
    )
    imports.add_argument("--link-images", action="store_true", help="images as files, not inside the shards")
    imports.add_argument("--max-bad", type=int, default=0, help="wrong rows to leave out (default 0: stop)")
    imports.set_defaults(run=_import)

    pair = verbs.add_parser("pair", parents=[source], help="write the pairs down")
    pair.add_argument("store", help="a store, or any source that `check` accepts")
    pair.add_argument("--out", required=True, help="pairs.jsonl")
    pair.add_argument("--split", help="only this split (default: all)")
    pair.add_argument("--strategy", default="auto", choices=get_args(Strategy))
    pair.add_argument("--score", help="score to compare by (default: the only one)")
    pair.add_argument("--min-gap", type=float, default=0.0)
    pair.add_argument("--max-gap", type=float)
    pair.add_argument("--ties", default="drop", choices=get_args(Ties))
    pair.add_argument("--max-pairs-per-prompt", type=int)
    pair.add_argument("--threshold", type=float, help="unpaired: desirable from this score on (default: the middle)")
    pair.add_argument("--seed", type=int, default=0)
    pair.set_defaults(run=_pair)

    verbs.add_parser("make", help="make the store that a vision-language recipe describes")
    return parser


def _progress(items: Iterable[T], doing: str) -> Iterator[T]:
    """A bar on stderr when a person watches."""
    yield from tqdm(items, desc=doing, unit=" records", disable=None, file=sys.stderr, leave=False)


def _source_options(arguments: argparse.Namespace) -> ImportOptions:
    return ImportOptions(root=arguments.root, prompt=arguments.prompt, group_regex=arguments.group_regex)


def _check(arguments: argparse.Namespace) -> int:
    counts: Counter[str] = Counter()

    def counted() -> Iterator[Record | Problem]:
        for item in _progress(scan(arguments.path, arguments.format, _source_options(arguments)), "checking"):
            counts["rows"] += 1
            if isinstance(item, Record):
                counts["images"] += sum(1 for _ in item.images())
            yield item

    found = 0
    for problem in validate(counted(), decode=not arguments.skip_images):
        found += 1
        if found <= arguments.limit or arguments.limit == 0:
            print(problem)
    looked = f"{counts['rows']} records with {counts['images']} images"
    if not found:
        print(f"{arguments.path}: {looked}, no problems")
        return 0
    unseen = found - arguments.limit if arguments.limit else 0
    more = f", {unseen} not shown (--limit 0 shows all)" if unseen > 0 else ""
    print(f"{arguments.path}: {found} problem{'s' * (found > 1)} in {looked}{more}")
    return 2


def _import(arguments: argparse.Namespace) -> int:
    bad: dict[str, None] = {}

    def left_out(problem: Problem) -> None:
        bad[problem.row] = None
        if len(bad) > arguments.max_bad:
            raise problem.error()
        print(f"left out: {problem}", file=sys.stderr)

    options = replace(_source_options(arguments), split=arguments.split, licence=arguments.licence)
    format = detect(arguments.source) if arguments.format == "auto" else arguments.format
    records = read(arguments.source, format, options, decode=True, on_problem=left_out)
    if arguments.split_fraction:
        records = _split(records, *_fraction(arguments.split_fraction))
    scorers = Store.open(arguments.source).scorers if format == "store" else {}
    store = Store.write(
        _progress(records, "importing"),
        arguments.out,
        embed_images=not arguments.link_images,
        scorers=scorers,
    )
    splits = ", ".join(f"{name} {count}" for name, count in sorted(store.splits.items()))
    out = f"; {len(bad)} wrong rows left out" if bad else ""
    print(f"{store.path}: {len(store)} records from {format} ({splits}), {store.info['images']} images{out}")
    return 0


def _fraction(text: str) -> tuple[str, float]:
    name, _, share = text.partition("=")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not name or not 0 < value < 1:
        raise UserError(
            f"'{text}' is not NAME=SHARE with a share between 0 and 1",
            place="--split-fraction",
            fix="For example heldout=0.1",
        )
    return name, value


def _split(records: Iterable[Record], name: str, share: float) -> Iterator[Record]:
    """Move whole groups into split `name`: those whose hash, as a number in [0, 1), is below the share."""
    inside: dict[bool, set[str]] = {True: set(), False: set()}
    for record in records:
        key = str(record.context.get("group", record.prompt))
        number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        chosen = number < share
        inside[chosen].add(key)
        yield replace(record, split=name) if chosen else record
    if not inside[True] or not inside[False]:
        groups = len(inside[True]) + len(inside[False])
        where = "no" if not inside[True] else "every"
        raise UserError(
            f"{where} record went to split '{name}': the data has {groups} group{'s' * (groups != 1)}",
            place="--split-fraction",
            fix="Give groups by --group-regex or metadata, or another share",
        )


def _pair(arguments: argparse.Namespace) -> int:
    pairing = Pairing(
        strategy=arguments.strategy,
        score=arguments.score,
        min_gap=arguments.min_gap,
        max_gap=arguments.max_gap,
        ties=arguments.ties,
        max_pairs_per_prompt=arguments.max_pairs_per_prompt,
        seed=arguments.seed,
        threshold=arguments.threshold,
    )
    records: Iterable[Record] = read(arguments.store, arguments.format, _source_options(arguments))
    if arguments.split is not None:
        records = (record for record in records if record.split == arguments.split)
    summary = PairingSummary()
    write_pairs(make_pairs(_progress(records, "pairing"), pairing, summary), arguments.out, pairing)
    print(f"{arguments.out}: {summary}")
    return 0


# --- stats -------------------------------------------------------------------------------------------------


def _stats(arguments: argparse.Namespace) -> int:
    records = read(arguments.path, arguments.format, _source_options(arguments))
    numbers = statistics_of(_progress(records, "reading"))
    if arguments.json:
        print(json.dumps(numbers, indent=2, ensure_ascii=False))
    else:
        _print(numbers)
    return 0


def statistics_of(records: Iterable[Record]) -> dict[str, Any]:
    """Counts over a stream of records.

    Quantiles are of the gap between the best and the worst candidate of a record (in the score's unit) and
    of the vote margin |n_a - n_b| / n. `shared_between_splits` counts prompts, groups and images that occur
    in more than one split: leaks, if one of them is held out. `unpaired` counts what the strategy of that name
    makes of the votes and, by its default threshold, of each score.
    """
    counts: Counter[str] = Counter(records=0, candidates=0, votes=0, images=0)
    tallies: dict[str, Counter[str]] = defaultdict(Counter)
    gaps: dict[str, list[float]] = defaultdict(list)
    places: dict[str, dict[str, set[str]]] = {"prompts": {}, "groups": {}, "images": {}}  # key -> splits
    prompts: Counter[str] = Counter()
    images: Counter[str] = Counter()
    items = Items()
    for record in records:
        counts.update(records=1, candidates=len(record.candidates), votes=len(record.votes))
        tallies["splits"][record.split] += 1
        tallies["licences"][record.licence or "unknown"] += 1
        tallies["sources"][record.source or "unknown"] += 1
        tallies["models"].update(c.model for c in record.candidates if c.model is not None)
        tallies["raters"].update(vote.rater or "unknown" for vote in record.votes)
        tallies["labels"].update(vote.label for vote in record.votes)
        prompts[record.prompt] += 1
        places["prompts"].setdefault(record.prompt, set()).add(record.split)
        if "group" in record.context:
            places["groups"].setdefault(str(record.context["group"]), set()).add(record.split)
        digests = [media.sha256() for _, media in record.images()]
        counts["images"] += len(digests)
        images.update(digests)
        for digest in digests:
            places["images"].setdefault(digest, set()).add(record.split)
        for comparison in compare_votes(record):
            gaps["votes"].append(comparison.gap)
        items.add_votes(record)
        for name in {name for candidate in record.candidates for name in candidate.scores}:
            scored = [(c, c.scores[name]) for c in record.candidates if name in c.scores]
            items.add_scores(record, name, scored)
            if len(scored) > 1:
                values = [value for _, value in scored]
                gaps[name].append(max(values) - min(values))
    per_rater = list(tallies["raters"].values())
    return {
        **counts,
        "splits": dict(tallies["splits"]),
        "licences": dict(tallies["licences"]),
        "sources": dict(tallies["sources"]),
        "models": dict(tallies["models"]),
        "labels": dict(tallies["labels"]),
        "raters": {"count": len(per_rater), "votes_per_rater": _quantiles(per_rater)},
        "gaps": {
            name: {"compared": len(values), "ties": values.count(0.0), "quantiles": _quantiles(values)}
            for name, values in sorted(gaps.items())
        },
        "unpaired": _unpaired(items),
        "duplicates": {
            "prompts": sum(count - 1 for count in prompts.values()),
            "images": sum(count - 1 for count in images.values()),
        },
        "shared_between_splits": {
            name: sum(len(splits) > 1 for splits in found.values()) for name, found in places.items()
        },
    }


def _unpaired(items: Items) -> dict[str, dict[str, float]]:
    """By votes and by each score: how many candidates are desirable and undesirable, and the score's threshold."""
    thresholds = items.thresholds()
    counts = Counter((item.scorer, desirable) for item, desirable in items.labelled())
    return {
        name: {"desirable": counts[name, True], "undesirable": counts[name, False]}
        | ({"threshold": thresholds[name]} if name in thresholds else {})
        for name in sorted({name for name, _ in counts})
    }


def _quantiles(values: Sequence[int] | Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    names = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
    found = np.quantile(np.asarray(values, dtype=np.float64), list(names.values()))
    return {name: float(value) for name, value in zip(names, found, strict=True)}


def _print(numbers: dict[str, Any], indent: str = "") -> None:
    for name, value in numbers.items():
        label = f"{indent}{name.replace('_', ' ')}"
        if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            print(label)
            _print(value, indent + "  ")
        elif isinstance(value, dict):
            shown = sorted(value.items(), key=lambda item: -item[1]) if name == "models" else value.items()
            print(f"{label:<26}" + (", ".join(f"{key} {number:g}" for key, number in shown) or "none"))
        else:
            print(f"{label:<26}{value}")


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
