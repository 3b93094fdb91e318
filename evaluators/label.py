"""`mmalign label SOURCE --scorer NAME ...`: scores into a preference store, to make pairs from.

    mmalign label store --scorer pickscore                        every candidate of a store gets its scores
    mmalign label shards/ --scorer hpsv2 --out store                pictures of the same prompt become candidates
    mmalign data pair store --score pickscore/pickscore --strategy best_worst --out pairs.jsonl

Scores are called `scorer/number`, and the store keeps who gave them (`id@version#hash`). Scoring is that of
`mmalign score`, in shards beside the store: a run that was killed goes on, and several processes share the work; the
store is written by the first one when all are done. A picture that cannot be opened or scored stays without a score in
a store that has it, and is left out of a new one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from evaluators.score import (
    Place,
    part_rows,
    require_positive,
    score_source,
    scoring_options,
    wait_for_parts,
)
from mmalign.cli import Parser
from mmalign.errors import UserError

if TYPE_CHECKING:
    from evaluators.samples import Sample, Source
    from evaluators.scorefile import Row
    from mmalign.preferences import Store
    from mmalign.records import Record


def add_labels(store: Store, scores: Mapping[str, Row], identities: Mapping[str, str], out: Path | None) -> Store:
    """A store's records with scores added to their candidates, in its place or written anew at `out`."""
    from mmalign.preferences import Store

    def labelled(record: Record) -> Record:
        candidates = []
        for candidate in record.candidates:
            row = scores.get(f"{record.record_id}/{candidate.candidate_id}")
            numbers = {**candidate.scores, **row.scores} if row else candidate.scores
            candidates.append(replace(candidate, scores=numbers))
        return replace(record, candidates=tuple(candidates))

    if out is None:
        return store.rewrite(labelled, scorers=identities)
    return Store.write(map(labelled, store.records()), out, scorers={**store.scorers, **identities})


def new_store(
    source: Source, scores: Mapping[str, Row], identities: Mapping[str, str], out: Path, licence: str | None
) -> Store:
    """A store with a record per prompt; its candidates are the pictures of that prompt that were scored."""
    from mmalign.preferences import Store

    groups: dict[str, list[Sample]] = {}
    for shard in source.shards:
        for sample in shard.read():
            if sample.media is not None and scores[sample.id].scores:
                groups.setdefault(sample.prompt, []).append(sample)
    if not groups:
        raise UserError("no picture could be scored", place=str(source.path))
    return Store.write(_records(source, groups, scores, licence), out, scorers=identities)


def _records(
    source: Source, groups: Mapping[str, Sequence[Sample]], scores: Mapping[str, Row], licence: str | None
) -> Iterator[Record]:
    from mmalign.records import Candidate, Record

    for number, (prompt, samples) in enumerate(groups.items()):
        yield Record(
            record_id=f"{number:08d}",
            prompt=prompt,
            candidates=tuple(
                Candidate(
                    candidate_id=sample.id,
                    image=sample.media,
                    scores=scores[sample.id].scores,
                    seed=sample.seed,
                    model=source.about.get("model"),
                )
                for sample in samples
            ),
            licence=licence,
            source=source.path.name,
        )


def _require_free_names(store: Store, identities: Mapping[str, str]) -> None:
    for name, identity in identities.items():
        owner = store.scorers.get(name, identity)
        if owner != identity:
            raise UserError(
                f"score '{name}' was given by {owner}, not by {identity}",
                place=str(store.path),
                fix="Write a new store with --out from one without these scores.",
            )


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign label SOURCE --scorer NAME [--out STORE]`."""
    parser = Parser(prog="mmalign label", description=__doc__)
    scoring_options(parser)
    parser.add_argument("--out", type=Path, help="the new store; without it, a store gets its labels in place")
    parser.add_argument("--licence", help="of pictures that come from no store")
    parser.add_argument("--json", action="store_true", help="print counts and seconds as JSON")
    said = parser.parse_args(argv)
    require_positive(said)

    from evaluators.samples import find
    from evaluators.scorefile import Header, described, scorers_of

    place = Place.of_environment()
    source = find(said.source, said.shard_rows)
    if source.store is None and said.out is None:
        raise UserError("the labels need a store to be written to", fix="Name a new one with --out.")
    out = said.out or source.path
    if said.out is not None and out.exists():
        raise UserError("something is here already", place=str(out), fix="Choose another name or delete it first.")
    scorers = scorers_of(said.scorer)
    header = Header(model="", protocol={"label": str(out.name)}, scorers=described(scorers))
    identities = {number: header.identity(number) for number in header.numbers}
    if source.store is not None:
        _require_free_names(source.store, identities)

    work = out.with_name(f".{out.name}.scores")
    timing = score_source(source, scorers, work, header, batch_size=said.batch_size, threads=said.threads, place=place)
    if said.json:
        print(json.dumps({"rank": place.rank, **timing.as_json()}), flush=True)
    else:
        print(timing, flush=True)
    if place.rank != 0:
        return 0
    wait_for_parts(work, len(source.shards))
    scores = {row.id: row for row in part_rows(work, len(source.shards))}
    given = sorted({name for row in scores.values() for name in row.scores})
    if not given:
        reason = next((row.error for row in scores.values() if row.error), "there are none")
        raise UserError(f"no picture could be scored: {reason}", place=str(source.path))
    if source.store is not None:
        store = add_labels(source.store, scores, {name: identities[name] for name in given}, said.out)
    else:
        store = new_store(source, scores, identities, out, said.licence)
    shutil.rmtree(work)
    if not said.json:
        print(f"{store.path}: {len(store)} records with {', '.join(given)}")
    return 0
