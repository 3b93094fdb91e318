"""What `mmalign data` does: each verb with its own command line."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar, get_args

from tqdm import tqdm

from mmalign.cli import Parser
from mmalign.data_statistics import print_statistics, statistics_of
from mmalign.errors import UserError
from mmalign.importers import IMPORTERS, ImportOptions, detect, read, scan
from mmalign.pairing import Pairing, PairingSummary, Strategy, Ties, make_pairs, write_pairs
from mmalign.preferences import Store
from mmalign.records import Problem, Record, validate

T = TypeVar("T")


def _parser(verb: str, source: str, what: str | None = None) -> Parser:
    """What every verb understands."""
    parser = Parser(prog=f"mmalign data {verb}")
    parser.add_argument(source, help=what)
    parser.add_argument("--format", default="auto", choices=["auto", *IMPORTERS], help="default: look and see")
    parser.add_argument("--root", help="folder that image paths are relative to (default: the source's)")
    parser.add_argument("--prompt", help="prompt for pictures that come without one")
    parser.add_argument("--group-regex", help="first group of a match in the record id names the group")
    return parser


def _progress(items: Iterable[T], doing: str) -> Iterator[T]:
    """A bar on stderr when a person watches."""
    yield from tqdm(items, desc=doing, unit=" records", disable=None, file=sys.stderr, leave=False)


def _source_options(arguments: argparse.Namespace) -> ImportOptions:
    return ImportOptions(root=arguments.root, prompt=arguments.prompt, group_regex=arguments.group_regex)


def check(argv: Sequence[str]) -> int:
    """List what is wrong, row by row; 2 when something is."""
    parser = _parser("check", "path")
    parser.add_argument("--limit", type=int, default=20, help="problems to print (default 20; 0 for all)")
    parser.add_argument("--skip-images", action="store_true", help="do not decode the images (fast)")
    arguments = parser.parse_args(argv)
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


def import_(argv: Sequence[str]) -> int:
    """Make a store of a source."""
    parser = _parser("import", "source")
    parser.add_argument("--out", required=True, help="the new store's folder")
    parser.add_argument("--licence", help="for records that name none")
    parser.add_argument("--split", help="put every record into this split")
    parser.add_argument(
        "--split-fraction",
        metavar="NAME=SHARE",
        help="put about this share of the groups (or prompts, without groups) into split NAME, "
        "chosen by hash: the same ones every time, however the data grows",
    )
    parser.add_argument("--link-images", action="store_true", help="images as files, not inside the shards")
    parser.add_argument("--max-bad", type=int, default=0, help="wrong rows to leave out (default 0: stop)")
    arguments = parser.parse_args(argv)
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


def pair(argv: Sequence[str]) -> int:
    """Write down the pairs that training would see."""
    parser = _parser("pair", "store", "a store, or any source that `check` accepts")
    parser.add_argument("--out", required=True, help="pairs.jsonl")
    parser.add_argument("--split", help="only this split (default: all)")
    parser.add_argument("--strategy", default="auto", choices=get_args(Strategy))
    parser.add_argument("--score", help="score to compare by (default: the only one)")
    parser.add_argument("--min-gap", type=float, default=0.0)
    parser.add_argument("--max-gap", type=float)
    parser.add_argument("--ties", default="drop", choices=get_args(Ties))
    parser.add_argument("--max-pairs-per-prompt", type=int)
    parser.add_argument("--threshold", type=float, help="unpaired: desirable from this score on (default: the middle)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
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


def stats(argv: Sequence[str]) -> int:
    """Counts, ties, gaps, duplicates and leaks."""
    parser = _parser("stats", "path")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    arguments = parser.parse_args(argv)
    records = read(arguments.path, arguments.format, _source_options(arguments))
    numbers = statistics_of(_progress(records, "reading"))
    if arguments.json:
        print(json.dumps(numbers, indent=2, ensure_ascii=False))
    else:
        print_statistics(numbers)
    return 0
