"""Records -> pairs, as a step of its own that can be written out, looked at and edited.

Strategies:
    votes       one pair per two candidates that somebody compared; the majority wins, its share is the
                confidence, the vote margin |n_a - n_b| / n is the gap
    best_worst  one pair per record: highest against lowest score, the difference is the gap
    all         every two candidates of a record by their scores
    unpaired    desirable candidates beside undesirable ones, perhaps of different prompts, for methods that look at
                each by itself: see `mmalign.unpaired`
    auto        votes where a record has some and no score is named, else best_worst

Ties are never trained as wins: they are dropped, kept with label "tie" for methods that know what to do
with them, or softened (label "tie", confidence 0.5) for soft-label losses.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmalign.errors import UserError, nearest
from mmalign.records import LABELS, Candidate, Label, Preference, Record, Side, shown
from mmalign.unpaired import Item, Items, check_vote, side_by_side

Strategy = Literal["auto", "votes", "best_worst", "all", "unpaired"]
Ties = Literal["drop", "keep", "soft"]
FORMAT = "mmalign-pairs/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """How pairs are made.

    Args:
        strategy: see the module.
        score: the score to compare by; None takes the only one there is.
        min_gap: pairs with a smaller gap are left out (unit of the score, or share of votes).
        max_gap: pairs with a larger gap are left out; None for no limit.
        ties: "drop", "keep" or "soft".
        spread: how far apart scores must be for a label to be sure: pairs made by scores get the confidence
            sigmoid(gap / spread), that of Bradley and Terry's model of raters; None leaves it unsaid.
        max_pairs_per_prompt: at most so many pairs per prompt text; from a record with more, a seeded draw.
        seed: of that draw, and of which unpaired candidates meet.
        threshold: unpaired candidates are desirable from this score on; None for the middle, see `mmalign.unpaired`.
    """

    strategy: Strategy = "auto"
    score: str | None = None
    min_gap: float = 0.0
    max_gap: float | None = None
    ties: Ties = "drop"
    spread: float | None = None
    max_pairs_per_prompt: int | None = None
    seed: int = 0
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min_gap) and self.min_gap >= 0):
            raise UserError(f"min_gap is {self.min_gap}", place="pairing.min_gap", fix="Use 0 or more")
        if self.max_gap is not None and not self.max_gap >= self.min_gap:
            raise UserError(f"max_gap {self.max_gap} is below min_gap {self.min_gap}", place="pairing.max_gap")
        if self.spread is not None and not (math.isfinite(self.spread) and self.spread > 0):
            raise UserError(f"spread is {self.spread}", place="pairing.spread", fix="Use a number above 0")
        if self.strategy == "votes" and self.spread is not None:
            raise UserError(
                "pairs made by votes have their share as confidence, not one from scores",
                place="pairing.spread",
                fix="Leave it out or use best_worst or all",
            )
        if self.max_pairs_per_prompt is not None and self.max_pairs_per_prompt < 1:
            raise UserError(
                f"max_pairs_per_prompt is {self.max_pairs_per_prompt}",
                place="pairing.max_pairs_per_prompt",
                fix="Use 1 or more, or leave it out",
            )
        if self.strategy == "votes" and self.score is not None:
            raise UserError(
                f"the strategy 'votes' compares by votes, not by the score '{self.score}'",
                place="pairing.score",
                fix="Leave the score out or use best_worst or all",
            )
        if self.strategy == "unpaired":
            self._check_unpaired()
        elif self.threshold is not None:
            raise UserError(
                "a threshold labels unpaired candidates",
                place="pairing.threshold",
                fix="Leave it out, or use the strategy 'unpaired'",
            )

    def _check_unpaired(self) -> None:
        given = {
            "min_gap": self.min_gap > 0,
            "max_gap": self.max_gap is not None,
            "ties": self.ties != "drop",
            "spread": self.spread is not None,
            "max_pairs_per_prompt": self.max_pairs_per_prompt is not None,
        }
        for name in [name for name, used in given.items() if used]:
            raise UserError(
                f"the strategy 'unpaired' compares nothing and has no use for {name}",
                place=f"pairing.{name}",
                fix="Leave it out",
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UserError(f"threshold is {self.threshold}", place="pairing.threshold", fix="Use a finite number")


@dataclass(slots=True, kw_only=True)
class PairingSummary:
    """What became of the records; filled while `make_pairs` runs.

    Attributes:
        unjudged: records with nothing to compare (no votes; fewer than two scored candidates).
        ties: comparisons that were ties, whatever was done with them.
        over_limit: pairs left out by max_pairs_per_prompt.
        desirable, undesirable: labelled candidates of the strategy `unpaired`; for it, `compared` counts them and
            those in ties alone, `ties` the latter.
    """

    records: int = 0
    unjudged: int = 0
    compared: int = 0
    ties: int = 0
    ties_dropped: int = 0
    below_gap: int = 0
    above_gap: int = 0
    over_limit: int = 0
    pairs: int = 0
    desirable: int = 0
    undesirable: int = 0

    def __str__(self) -> str:
        left_out = [
            f"{count} {name}"
            for name, count in [
                ("ties", self.ties_dropped),
                ("below min_gap", self.below_gap),
                ("above max_gap", self.above_gap),
                ("over the limit per prompt", self.over_limit),
            ]
            if count
        ]
        text = f"{self.pairs} pairs from {self.records} records"
        if self.desirable or self.undesirable:
            text += f", {self.desirable} desirable and {self.undesirable} undesirable"
        text += f", {self.unjudged} records without a comparison" if self.unjudged else ""
        return text + (f"; left out: {', '.join(left_out)}" if left_out else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two candidates of a record, the earlier one as `a`, and what scores or votes say about them."""

    a: Candidate
    b: Candidate
    label: Label
    gap: float
    confidence: float | None = None
    scorer: str


def make_pairs(
    records: Iterable[Record], pairing: Pairing | None = None, summary: PairingSummary | None = None
) -> Iterator[Preference]:
    """Pairs, in the order of the records; the same records and pairing give the same pairs.

    Sides keep the order of the candidates, so position says nothing about preference; of unpaired items `a` is the
    desirable one.

    Args:
        records: streamed.
        pairing: the default one if None.
        summary: filled on the way, complete when the iterator ends.

    Raises:
        UserError: no such score; a score that is constant over all records; and at the end, if every
            comparison was a tie or no pair was made, with the counts that say why.
    """
    pairing = pairing or Pairing()
    summary = summary if summary is not None else PairingSummary()
    ranges: dict[str, tuple[float, float, int]] = {}  # score: lowest, highest, number of values
    names: set[str] = set()

    def counted() -> Iterator[Record]:
        for record in records:
            summary.records += 1
            names.update(name for candidate in record.candidates for name in candidate.scores)
            yield record

    make = _unpaired if pairing.strategy == "unpaired" else _paired
    for pair in make(counted(), pairing, summary, ranges):
        summary.pairs += 1
        yield pair
    if summary.records and pairing.score is not None and pairing.score not in ranges:
        fix = nearest(pairing.score, names) if names else "The data has no scores: add them or pair by votes"
        raise UserError(f"no candidate has the score '{pairing.score}'", place="pairing.score", fix=fix)
    _refuse_useless(pairing, summary, ranges)


def _paired(
    records: Iterable[Record], pairing: Pairing, summary: PairingSummary, ranges: dict[str, tuple[float, float, int]]
) -> Iterator[Preference]:
    """Pairs of candidates of one record."""
    per_prompt: Counter[str] = Counter()
    for record in records:
        comparisons = _compare(record, pairing, ranges)
        summary.compared += len(comparisons)
        summary.unjudged += not comparisons
        kept = []
        for item in comparisons:
            if item.label == "tie":
                summary.ties += 1
                if pairing.ties == "drop":
                    summary.ties_dropped += 1
                else:
                    kept.append(item)  # a tie has no gap to filter by
            elif item.gap < pairing.min_gap:
                summary.below_gap += 1
            elif pairing.max_gap is not None and item.gap > pairing.max_gap:
                summary.above_gap += 1
            else:
                kept.append(item)
        if pairing.max_pairs_per_prompt is not None:
            room = pairing.max_pairs_per_prompt - per_prompt[record.prompt]
            if len(kept) > room:
                summary.over_limit += len(kept) - room
                drawn = random.Random(f"{pairing.seed}:{record.record_id}").sample(range(len(kept)), room)
                kept = [kept[index] for index in sorted(drawn)]
            per_prompt[record.prompt] += len(kept)
        for item in kept:
            yield _preference(record, item, pairing.ties)


def _unpaired(
    records: Iterable[Record], pairing: Pairing, summary: PairingSummary, ranges: dict[str, tuple[float, float, int]]
) -> Iterator[Preference]:
    """Desirable candidates beside undesirable ones, split by split; made when all records are read."""
    items = Items()
    for record in records:
        if record.votes and pairing.score is None:
            items.add_votes(record)
        else:
            name, scored = _scored(record, pairing, ranges)
            items.add_scores(record, name, scored)
            summary.unjudged += not scored
    splits: dict[str, tuple[list[Item], list[Item]]] = {}
    for item, desirable in items.labelled(pairing.threshold):
        splits.setdefault(item.record.split, ([], []))[not desirable].append(item)
    summary.ties = summary.ties_dropped = items.undecided
    summary.desirable = sum(len(good) for good, _ in splits.values())
    summary.undesirable = sum(len(bad) for _, bad in splits.values())
    summary.compared = summary.desirable + summary.undesirable + summary.ties
    for good, bad in splits.values():
        for a, b in side_by_side(good, bad, pairing.seed):
            scorer = a.scorer if a.scorer == b.scorer else f"{a.scorer}, {b.scorer}"
            known = Comparison(a=a.candidate, b=b.candidate, label="a", gap=0.0, scorer=scorer)
            gap = None
            if a.scorer == b.scorer and a.score is not None and b.score is not None:
                gap = a.score - b.score
            yield replace(_preference(a.record, known, pairing.ties, b.record), gap=gap)


def _refuse_useless(pairing: Pairing, summary: PairingSummary, ranges: Mapping[str, tuple[float, float, int]]) -> None:
    if not summary.records:
        raise UserError("there are no records to pair", fix="Check the data path and the split")
    for name, (low, high, count) in ranges.items():
        if low == high and count > 1:
            raise UserError(
                f"scorer '{name}' gave one constant value {low:g} to all {count} candidates",
                fix="Nothing can be learned from it: check the scorer or use another score",
            )
    if summary.ties and summary.ties == summary.compared:
        raise UserError(
            f"all {summary.ties} comparisons are ties",
            fix="Nothing can be learned from them: collect votes or scores that tell candidates apart",
        )
    if not summary.pairs:
        fix = "Lower min_gap or raise max_gap" if summary.below_gap or summary.above_gap else None
        if summary.desirable or summary.undesirable:
            fix = "Both kinds are needed in a split: give another threshold, or candidates of the other kind"
        raise UserError(f"pairing gave no pairs ({summary})", fix=fix or "Add votes or scores to the records")


def _compare(record: Record, pairing: Pairing, ranges: dict[str, tuple[float, float, int]]) -> list[Comparison]:
    strategy = pairing.strategy
    if strategy == "auto":
        strategy = "votes" if record.votes and pairing.score is None else "best_worst"
    if strategy == "votes":
        return compare_votes(record)
    name, scored = _scored(record, pairing, ranges)
    if len(scored) < 2:
        return []
    pairs: Iterable[tuple[int, int]] = itertools.combinations(range(len(scored)), 2)
    if strategy == "best_worst":
        values = [value for _, value in scored]
        best, worst = values.index(max(values)), values.index(min(values))
        pairs = [(min(best, worst), max(best, worst))] if best != worst else [(0, 1)]  # all equal: one tie
    return [_by_score(*scored[i], *scored[j], name, pairing.spread) for i, j in pairs]


def _scored(
    record: Record, pairing: Pairing, ranges: dict[str, tuple[float, float, int]]
) -> tuple[str, list[tuple[Candidate, float]]]:
    """The score to go by, and the record's candidates that have it."""
    name = pairing.score if pairing.score is not None else _only_score(record)
    scored = [(candidate, candidate.scores[name]) for candidate in record.candidates if name in candidate.scores]
    for candidate, value in scored:
        if not math.isfinite(value):
            raise UserError(
                f"score '{name}' of candidate '{candidate.candidate_id}' is {value}",
                place=record.where,
                fix="Score it again or leave it without the score",
            )
        low, high, count = ranges.get(name, (value, value, 0))
        ranges[name] = (min(low, value), max(high, value), count + 1)
    return name, scored


def _by_score(
    a: Candidate, value_a: float, b: Candidate, value_b: float, name: str, spread: float | None
) -> Comparison:
    label: Label = "tie" if value_a == value_b else "a" if value_a > value_b else "b"
    gap = abs(value_a - value_b)
    confidence = None if spread is None else 1 / (1 + math.exp(-gap / spread))
    return Comparison(a=a, b=b, label=label, gap=gap, confidence=confidence, scorer=name)


def _only_score(record: Record) -> str:
    names = sorted({name for candidate in record.candidates for name in candidate.scores})
    if len(names) > 1:
        raise UserError(
            f"the candidates have several scores: {', '.join(names)}",
            place=record.where,
            fix="Say which one to pair by, `score=NAME`",
        )
    if not names and record.votes:
        raise UserError("the record has votes but no scores", place=record.where, fix="Pair with the strategy 'votes'")
    return names[0] if names else ""


def compare_votes(record: Record) -> list[Comparison]:
    """Pool the votes on each two candidates: p = mean probability that the earlier one is preferred."""
    order = {candidate.candidate_id: index for index, candidate in enumerate(record.candidates)}
    pooled: dict[tuple[int, int], list[float]] = {}
    for vote in record.votes:
        check_vote(record, vote, order)
        sure = 1.0 if vote.confidence is None else vote.confidence
        p = 0.5 if vote.label == "tie" else sure if vote.label == "a" else 1.0 - sure
        i, j = order[vote.a], order[vote.b]
        pooled.setdefault((min(i, j), max(i, j)), []).append(p if i < j else 1.0 - p)
    comparisons = []
    for (i, j), shares in sorted(pooled.items()):
        p = math.fsum(shares) / len(shares)
        comparisons.append(
            Comparison(
                a=record.candidates[i],
                b=record.candidates[j],
                label="tie" if p == 0.5 else "a" if p > 0.5 else "b",
                gap=abs(2.0 * p - 1.0),
                confidence=max(p, 1.0 - p),
                scorer="votes",
            )
        )
    return comparisons


def _preference(record: Record, item: Comparison, ties: Ties, other: Record | None = None) -> Preference:
    """The comparison as a preference; `other` is the record of `item.b` where the sides are unpaired."""
    confidence = item.confidence
    if item.label == "tie":
        confidence = 0.5 if ties == "soft" else None
    second, prefix = (record, "") if other is None else (other, f"{other.record_id}/")
    return Preference(
        item_id=f"{record.record_id}/{item.a.candidate_id}~{prefix}{item.b.candidate_id}",
        a=_side(record, item.a),
        b=_side(second, item.b),
        label=item.label,
        confidence=confidence,
        gap=item.gap,
        context=record.context if other is None else {},
        provenance={
            "record": record.record_id,
            **({"other_record": other.record_id} if other else {}),
            "candidates": (item.a.candidate_id, item.b.candidate_id),
            "models": (item.a.model, item.b.model),
            "seeds": (item.a.seed, item.b.seed),
            "scorer": item.scorer,
            "source": _both(record.source, second.source),
        },
        licence=_both(record.licence, second.licence),
        split=record.split,
    )


def _both(first: str | None, second: str | None) -> str | None:
    return first if first == second else ", ".join(text for text in (first, second) if text)


def _side(record: Record, candidate: Candidate) -> Side:
    return Side(
        prompt=record.prompt if candidate.prompt is None else candidate.prompt,
        media=record.media if candidate.media is None else candidate.media,
        response=candidate.image if candidate.image is not None else candidate.text,
    )


# --- pairs on disk -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """One pair in pairs.jsonl: ids, not images."""

    record: str
    a: str
    b: str
    label: Label
    record_b: str | None = None  # of b, where it is not that of a
    confidence: float | None = None
    gap: float | None = None
    scorer: str = "unknown"
    split: str = "train"
    prompt: str = ""
    weights: dict[str, list[float]] = field(default_factory=dict)


def write_pairs(pairs: Iterable[Preference], path: str | Path, pairing: Pairing | None = None) -> int:
    """Write pairs as JSON lines that name records and candidates; the prompt is there for the reader's eyes.

    The first line says the format and how the pairs were made. The file appears when it is complete.

    Returns:
        The number of pairs.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    count = 0
    try:
        with open(partial, "w", encoding="utf-8") as file:
            header = {"format": FORMAT, "pairing": asdict(pairing) if pairing else None}
            file.write(json.dumps(header) + "\n")
            for pair in pairs:
                first, second = pair.provenance["candidates"]
                line = _Line(
                    record=pair.provenance["record"],
                    a=first,
                    b=second,
                    label=pair.label,
                    record_b=pair.provenance.get("other_record"),
                    confidence=pair.confidence,
                    gap=pair.gap,
                    scorer=pair.provenance["scorer"],
                    split=pair.split,
                    prompt=pair.a.prompt,
                    weights={name: list(values) for name, values in pair.weights.items()},
                )
                file.write(json.dumps(asdict(line), ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write the pairs: {error.strerror or error}", place=str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def read_pairs(path: str | Path, records: Iterable[Record]) -> Iterator[Preference]:
    """Pairs from `write_pairs`, perhaps edited by hand, joined with the records they name.

    In the order of the file. Of the records only the named ones are kept in memory (no images).

    Raises:
        UserError: not such a file, a line that is wrong, or a record or candidate that does not exist.
    """
    path = Path(path)
    lines = list(_lines(path))
    wanted = {name for _, line in lines for name in (line.record, line.record_b)}
    known = {record.record_id: record for record in records if record.record_id in wanted}
    for place, line in lines:
        record = _named(known, line.record, place)
        other = None if line.record_b is None else _named(known, line.record_b, place)
        item = Comparison(
            a=_candidate(record, line.a, place),
            b=_candidate(other or record, line.b, place),
            label=line.label,
            gap=0.0 if line.gap is None else line.gap,
            confidence=line.confidence,
            scorer=line.scorer,
        )
        yield _restored(_preference(record, item, "soft" if line.confidence is not None else "keep", other), line)


def _named(known: Mapping[str, Record], name: str, place: str) -> Record:
    if name not in known:
        raise UserError(f"the data has no record '{name}'", place=place, fix="Pair the data again")
    return known[name]


def _candidate(record: Record, name: str, place: str) -> Candidate:
    candidates = {candidate.candidate_id: candidate for candidate in record.candidates}
    if name not in candidates:
        raise UserError(
            f"record '{record.record_id}' has no candidate '{name}'", place=place, fix=nearest(name, candidates)
        )
    return candidates[name]


def _restored(pair: Preference, line: _Line) -> Preference:
    weights = {name: tuple(values) for name, values in line.weights.items()}
    return replace(pair, gap=line.gap, confidence=line.confidence, weights=weights, split=line.split)


def _line(value: dict[str, Any]) -> _Line:
    """A line of the file, its types checked: people edit it."""
    for name in ("record", "a", "b", "scorer", "split", "prompt"):
        if not isinstance(value.get(name, ""), str):
            raise ValueError(f"{name} is {shown(value[name])}")
    if not isinstance(value.get("record_b", ""), str | None):
        raise ValueError(f"record_b is {shown(value['record_b'])}")
    if value.get("label") not in LABELS:
        raise ValueError(f"label is {shown(value.get('label'))}")
    for name in ("confidence", "gap"):
        if value.get(name) is not None:
            value[name] = float(value[name])
    sure = value.get("confidence")
    if sure is not None and not 0.5 <= sure <= 1:
        raise ValueError(f"confidence is {sure}")
    weights = dict(value.get("weights") or {})
    return _Line(**{**value, "weights": {str(name): [float(x) for x in row] for name, row in weights.items()}})


def _lines(path: Path) -> Iterator[tuple[str, _Line]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                place = f"{path} line {number}"
                try:
                    value: Any = json.loads(text)
                    if number == 1:
                        if value["format"] != FORMAT:
                            raise ValueError(f"format {value['format']!r}")
                        continue
                    line = _line(value)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise UserError(
                        f"this is not a pair written by mmalign: {error}",
                        place=place,
                        fix=f"The first line says '{FORMAT}', the others are pairs",
                    ) from error
                yield place, line
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the pairs: {error}", place=str(path)) from error
