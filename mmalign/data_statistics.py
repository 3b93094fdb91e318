"""What preference data holds, in numbers: `mmalign data stats`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mmalign.pairing import compare_votes
from mmalign.records import Record
from mmalign.unpaired import Items


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


def print_statistics(numbers: dict[str, Any], indent: str = "") -> None:
    """The same as people read it."""
    for name, value in numbers.items():
        label = f"{indent}{name.replace('_', ' ')}"
        if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            print(label)
            print_statistics(value, indent + "  ")
        elif isinstance(value, dict):
            shown = sorted(value.items(), key=lambda item: -item[1]) if name == "models" else value.items()
            print(f"{label:<26}" + (", ".join(f"{key} {number:g}" for key, number in shown) or "none"))
        else:
            print(f"{label:<26}{value}")
