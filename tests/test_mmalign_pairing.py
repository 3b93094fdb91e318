"""Records become pairs: the right winner, no tie trained as a win, every left-out pair counted."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmalign.errors import UserError
from mmalign.media import Media
from mmalign.pairing import Pairing, PairingSummary, make_pairs, read_pairs, write_pairs
from mmalign.preferences import Candidate, Preference, Record, Vote


def scored(name: str, *values: float, prompt: str = "p", score: str = "clip") -> Record:
    return Record(
        record_id=name,
        prompt=prompt,
        candidates=tuple(
            Candidate(candidate_id=f"c{i}", text=f"{name}-{i}", scores={score: value}, model="m", seed=i)
            for i, value in enumerate(values)
        ),
    )


def voted(name: str, *votes: tuple[int, int, str], confidence: float | None = None) -> Record:
    return Record(
        record_id=name,
        prompt="p",
        candidates=tuple(Candidate(candidate_id=f"c{i}", text=f"{name}-{i}") for i in range(3)),
        votes=tuple(
            Vote(a=f"c{a}", b=f"c{b}", label=label, confidence=confidence)  # type: ignore[arg-type]  # a, b, tie
            for a, b, label in votes
        ),
    )


def pairs(records: Sequence[Record], summary: PairingSummary | None = None, **options: Any) -> list[Preference]:
    return list(make_pairs(records, Pairing(**options), summary))


def short(found: Sequence[Preference]) -> list[tuple[str, str, float | None]]:
    return [(pair.item_id, pair.label, pair.gap) for pair in found]


def refusal(records: Sequence[Record], **options: Any) -> str:
    with pytest.raises(UserError) as error:
        pairs(records, **options)
    return str(error.value)


# --- by scores ---------------------------------------------------------------------------------------------


def test_a_spread_turns_the_gap_into_how_sure_the_label_is() -> None:
    records = [scored("r", 0.9, 0.4), scored("s", 0.1, 0.1), scored("t", 0.0, 3.0)]
    plain = pairs(records, ties="soft")
    assert [pair.confidence for pair in plain] == [None, 0.5, None]
    soft = pairs(records, spread=0.5, ties="soft")
    assert [pair.label for pair in soft] == ["a", "tie", "b"]
    assert [pair.confidence for pair in soft] == pytest.approx([1 / (1 + math.exp(-1)), 0.5, 1 / (1 + math.exp(-6))])
    # the softmax over both scores after dividing by the spread, as SmPO has it
    assert soft[0].confidence == pytest.approx(math.exp(1.8) / (math.exp(1.8) + math.exp(0.8)))
    assert "spread is 0.0 (pairing.spread)" in refusal(records, spread=0.0)
    assert "spread is nan (pairing.spread)" in refusal(records, spread=math.nan)
    assert "not one from scores (pairing.spread)" in refusal(records, strategy="votes", spread=1.0)


def test_best_against_worst_keeps_the_candidates_order() -> None:
    found = pairs([scored("r", 0.25, 1.0, 0.0), scored("s", 0.0, 0.5)], strategy="best_worst")
    assert short(found) == [("r/c1~c2", "a", 1.0), ("s/c0~c1", "b", 0.5)]
    assert found[0].chosen.response == "r-1"
    assert found[1].chosen.response == "s-1"
    assert found[0].provenance == {
        "record": "r",
        "candidates": ("c1", "c2"),
        "models": ("m", "m"),
        "seeds": (1, 2),
        "scorer": "clip",
        "source": None,
    }


def test_all_pairs_and_both_gap_limits() -> None:
    records = [scored("r", 0.0, 1.0, 3.0)]
    assert short(pairs(records, strategy="all")) == [
        ("r/c0~c1", "b", 1.0),
        ("r/c0~c2", "b", 3.0),
        ("r/c1~c2", "b", 2.0),
    ]
    summary = PairingSummary()
    assert short(pairs(records, summary, strategy="all", min_gap=1.5, max_gap=2.5)) == [("r/c1~c2", "b", 2.0)]
    assert (summary.below_gap, summary.above_gap, summary.compared, summary.pairs) == (1, 1, 3, 1)
    assert short(pairs(records, strategy="all", min_gap=1.0, max_gap=3.0)) == short(
        pairs(records, strategy="all")
    )  # the limits themselves are inside


def test_several_scores_ask_for_a_name() -> None:
    record = scored("r", 0.0, 1.0)
    both = Record(
        record_id="r",
        prompt="p",
        candidates=tuple(
            Candidate(candidate_id=c.candidate_id, text=c.text, scores={**c.scores, "hps": -c.scores["clip"]})
            for c in record.candidates
        ),
    )
    assert refusal([both]) == (
        "the candidates have several scores: clip, hps (record 'r'). Say which one to pair by, `score=NAME`"
    )
    assert short(pairs([both], score="clip")) == [("r/c0~c1", "b", 1.0)]
    assert short(pairs([both], score="hps")) == [("r/c0~c1", "a", 1.0)]
    assert refusal([both], score="clp") == "no candidate has the score 'clp' (pairing.score). Did you mean 'clip'?"


def test_a_record_without_the_score_is_unjudged() -> None:
    summary = PairingSummary()
    bare = Record(record_id="b", prompt="p", candidates=(Candidate(candidate_id="x", text="y"),))
    assert len(pairs([bare, scored("r", 0.0, 1.0), scored("one", 5.0)], summary)) == 1
    assert (summary.records, summary.unjudged) == (3, 2)
    assert str(summary) == "1 pairs from 3 records, 2 records without a comparison"


def test_a_score_that_is_no_number_is_refused() -> None:
    assert refusal([scored("r", float("nan"), 1.0)]) == (
        "score 'clip' of candidate 'c0' is nan (record 'r'). Score it again or leave it without the score"
    )


@pytest.mark.parametrize("ties", ["drop", "keep", "soft"])
def test_a_constant_scorer_is_refused(ties: str) -> None:
    assert refusal([scored("r", 0.5, 0.5), scored("s", 0.5, 0.5)], ties=ties) == (
        "scorer 'clip' gave one constant value 0.5 to all 4 candidates. "
        "Nothing can be learned from it: check the scorer or use another score"
    )


# --- by votes ----------------------------------------------------------------------------------------------


def test_votes_are_pooled_whatever_their_order() -> None:
    record = voted("r", (0, 1, "a"), (1, 0, "b"), (0, 1, "b"), (1, 0, "b"), (2, 1, "a"))
    found = pairs([record], strategy="votes")
    assert short(found) == [("r/c0~c1", "a", 0.5), ("r/c1~c2", "b", 1.0)]
    assert [pair.confidence for pair in found] == [0.75, 1.0]


def test_tied_votes_pull_towards_one_half_and_confidence_counts() -> None:
    (pair,) = pairs([voted("r", (0, 1, "a"), (0, 1, "tie"))], strategy="votes")
    assert (pair.label, pair.confidence, pair.gap) == ("a", 0.75, 0.5)
    (unsure,) = pairs([voted("r", (0, 1, "b"), confidence=0.75)], strategy="votes")
    assert (unsure.label, unsure.confidence, unsure.gap) == ("b", 0.75, 0.5)


def test_auto_prefers_votes_then_scores() -> None:
    found = pairs([voted("v", (0, 1, "b")), scored("s", 1.0, 0.0)])
    assert [pair.provenance["scorer"] for pair in found] == ["votes", "clip"]
    assert refusal([voted("v", (0, 1, "b"))], strategy="best_worst") == (
        "the record has votes but no scores (record 'v'). Pair with the strategy 'votes'"
    )


def test_a_vote_about_nobody_is_refused() -> None:
    assert refusal([voted("r", (0, 9, "a"))]) == (
        "a vote compares 'c0' with 'c9', which are not two candidates (record 'r'). "
        "`mmalign data check` lists every such row"
    )


# --- ties --------------------------------------------------------------------------------------------------


def test_ties_are_dropped_kept_or_softened() -> None:
    records = [voted("t", (0, 1, "a"), (0, 1, "b")), voted("r", (0, 1, "b"))]
    summary = PairingSummary()
    assert [pair.label for pair in pairs(records, summary)] == ["b"]
    assert (summary.ties, summary.ties_dropped, summary.pairs) == (1, 1, 1)
    assert str(summary) == "1 pairs from 2 records; left out: 1 ties"

    kept, _ = pairs(records, ties="keep", min_gap=0.1)
    assert (kept.label, kept.confidence) == ("tie", None)
    soft, _ = pairs(records, ties="soft")
    assert soft.ordered() == (soft.a, soft.b, 0.5)
    with pytest.raises(ValueError, match="is a tie"):
        _ = soft.chosen


@pytest.mark.parametrize("ties", ["drop", "keep", "soft"])
def test_all_ties_are_refused(ties: str) -> None:
    assert refusal([voted("t", (0, 1, "tie")), voted("u", (0, 1, "tie"))], ties=ties) == (
        "all 2 comparisons are ties. "
        "Nothing can be learned from them: collect votes or scores that tell candidates apart"
    )


def test_no_pairs_and_no_records_are_refused() -> None:
    assert refusal([]) == "there are no records to pair. Check the data path and the split"
    assert refusal([scored("r", 0.0, 1.0)], min_gap=2.0) == (
        "pairing gave no pairs (0 pairs from 1 records; left out: 1 below min_gap). Lower min_gap or raise max_gap"
    )
    assert refusal([scored("r", 1.0)]) == (
        "pairing gave no pairs (0 pairs from 1 records, 1 records without a comparison). "
        "Add votes or scores to the records"
    )


# --- unpaired ----------------------------------------------------------------------------------------------


def single(name: str, score: float, *, prompt: str | None = None, **options: Any) -> Record:
    record = scored(name, score, prompt=prompt or f"prompt of {name}")
    return replace(record, **options)


def sides(found: Sequence[Preference]) -> tuple[list[str], list[str]]:
    assert all(pair.label == "a" for pair in found)
    return [str(pair.chosen.response) for pair in found], [str(pair.rejected.response) for pair in found]


def test_single_candidates_meet_across_prompts_and_the_shorter_list_is_recycled() -> None:
    records = [single(f"r{number}", float(number)) for number in range(7)]
    summary = PairingSummary()
    found = pairs(records, summary, strategy="unpaired", threshold=5.0)  # the threshold itself is desirable
    good, bad = sides(found)
    assert bad == ["r0-0", "r1-0", "r2-0", "r3-0", "r4-0"]
    assert Counter(good) in ({"r5-0": 3, "r6-0": 2}, {"r5-0": 2, "r6-0": 3})
    assert (summary.desirable, summary.undesirable, summary.pairs, summary.records) == (2, 5, 5, 7)
    assert str(summary) == "5 pairs from 7 records, 2 desirable and 5 undesirable"
    assert len({pair.item_id for pair in found}) == 5
    first = found[0]
    chosen = str(first.chosen.response).split("-")[0]
    assert first.item_id == f"{chosen}/c0~r0/c0" and first.gap == float(chosen[1:])
    assert (first.chosen.prompt, first.rejected.prompt) == (f"prompt of {chosen}", "prompt of r0")
    assert (first.provenance["record"], first.provenance["other_record"]) == (chosen, "r0")
    assert found == pairs(records, strategy="unpaired", threshold=5.0)
    assert {tuple(sides(pairs(records, strategy="unpaired", threshold=5.0, seed=seed))[0]) for seed in range(5)} > {
        tuple(good)
    }


@pytest.mark.parametrize(
    ("values", "desirable"),
    [
        ((1.0, 2.0, 3.0, 10.0), 2),  # the median is 2.5
        ((1.0, 2.0, 3.0), 2),  # the median itself is desirable
        ((0.0, 0.0, 0.0, 1.0), 1),  # nothing is below the median: the next value above it
        ((1.0, 1.0, 1.0, 0.0), 3),
    ],
)
def test_without_a_threshold_scores_are_split_in_the_middle(values: tuple[float, ...], desirable: int) -> None:
    summary = PairingSummary()
    records = [single(f"r{number}", value) for number, value in enumerate(values)]
    pairs(records, summary, strategy="unpaired")
    assert (summary.desirable, summary.undesirable) == (desirable, len(values) - desirable)


def test_candidates_that_ever_won_are_desirable_and_answers_are_told_apart_by_content() -> None:
    same = Candidate(candidate_id="again", text="r-0")  # the first candidate of "r" in another record
    other = Candidate(candidate_id="new", text="new")
    records = [
        voted("r", (0, 1, "b"), (1, 2, "a")),  # 1 won, 0 and 2 lost
        Record(
            record_id="s", prompt="p", candidates=(same, other), votes=(Vote(a="again", b="new", label="a"),)
        ),  # what lost there wins here
        voted("t", (0, 1, "tie")),
        Record(record_id="u", prompt="p", candidates=(other,)),
    ]
    summary = PairingSummary()
    good, bad = sides(pairs(records, summary, strategy="unpaired"))
    assert set(good) == {"r-0", "r-1"} and set(bad) == {"r-2", "new"}
    assert (summary.desirable, summary.undesirable, summary.ties, summary.ties_dropped) == (2, 2, 2, 2)
    assert summary.unjudged == 1
    assert "left out: 2 ties" in str(summary)


def test_unpaired_items_stay_in_their_split() -> None:
    records = [single(f"{split}{n}", float(n), split=split) for split in ("train", "test") for n in range(3)]
    for pair in pairs(records, strategy="unpaired", threshold=2.0):
        assert pair.split in str(pair.chosen.response) and pair.split in str(pair.rejected.response)
    assert refusal([replace(record, split=record.record_id) for record in records], strategy="unpaired") == (
        "pairing gave no pairs (0 pairs from 6 records, 4 desirable and 2 undesirable). "
        "Both kinds are needed in a split: give another threshold, or candidates of the other kind"
    )


def test_unpaired_sources_and_licences_of_both_sides_are_named() -> None:
    found = pairs(
        [single("g", 1.0, licence="CC0-1.0", source="x"), single("b", 0.0, licence="MIT", source="x")],
        strategy="unpaired",
    )
    assert (found[0].licence, found[0].provenance["source"]) == ("CC0-1.0, MIT", "x")


def test_labels_of_one_kind_alone_are_refused() -> None:
    records = [single("a", 1.0), single("b", 2.0)]
    assert refusal(records, strategy="unpaired", threshold=0.5) == (
        "pairing gave no pairs (0 pairs from 2 records, 2 desirable and 0 undesirable). "
        "Both kinds are needed in a split: give another threshold, or candidates of the other kind"
    )
    assert "gave one constant value 1 to all 2" in refusal([single("a", 1.0), single("b", 1.0)], strategy="unpaired")
    assert refusal([voted("t", (0, 1, "tie"))], strategy="unpaired").startswith("all 2 comparisons are ties")
    assert refusal(records, strategy="unpaired", score="hps").startswith("no candidate has the score 'hps'")
    assert refusal([voted("r", (0, 9, "a"))], strategy="unpaired").startswith("a vote compares 'c0' with 'c9'")


def test_unpaired_pairs_written_and_read_are_the_same(tmp_path: Path) -> None:
    records = [single(f"r{number}", float(number)) for number in range(5)]
    made = pairs(records, strategy="unpaired")
    path = tmp_path / "pairs.jsonl"
    write_pairs(made, path, Pairing(strategy="unpaired"))
    assert list(read_pairs(path, records)) == made
    with pytest.raises(UserError, match="the data has no record 'r"):
        list(read_pairs(path, records[3:]))
    path.write_text(path.read_text().replace('"record_b": "', '"record_b": 7, "b": "'))
    with pytest.raises(UserError, match="this is not a pair written by mmalign: record_b is 7"):
        list(read_pairs(path, records))


# --- limits, order, streaming ------------------------------------------------------------------------------


def test_the_limit_per_prompt_spans_records_and_is_seeded() -> None:
    records = [
        scored("r", 0.0, 1.0, 2.0, 3.0),
        scored("s", 0.0, 1.0, 2.0, 3.0),
        scored("q", 0.0, 1.0, prompt="other"),
    ]
    summary = PairingSummary()
    found = pairs(records, summary, strategy="all", max_pairs_per_prompt=8)
    assert [pair.item_id[0] for pair in found] == ["r"] * 6 + ["s"] * 2 + ["q"]
    assert summary.over_limit == 4
    assert found == pairs(records, strategy="all", max_pairs_per_prompt=8)
    draws = {
        tuple(pair.item_id for pair in pairs(records, strategy="all", max_pairs_per_prompt=8, seed=seed))
        for seed in range(5)
    }
    assert len(draws) > 1


def test_pairs_come_as_the_records_are_read() -> None:
    read = []

    def stream() -> Iterator[Record]:
        for number in range(1000):
            read.append(number)
            yield scored(f"r{number}", 0.0, float(number + 1))

    assert next(make_pairs(stream())).item_id == "r0/c0~c1"
    assert read == [0]


def test_sides_take_a_candidates_own_prompt_and_media() -> None:
    shown, other = Media(data=b"1"), Media(data=b"2")
    record = Record(
        record_id="r",
        prompt="p",
        media=(shown,),
        candidates=(
            Candidate(candidate_id="c", text="same"),
            Candidate(candidate_id="r", text="same", prompt="q", media=(other,)),
        ),
        votes=(Vote(a="c", b="r", label="a"),),
        context={"user": "u"},
        licence="CC0-1.0",
        split="test",
    )
    (pair,) = pairs([record])
    assert (pair.a.prompt, pair.a.media, pair.a.response) == ("p", (shown,), "same")
    assert (pair.b.prompt, pair.b.media, pair.b.response) == ("q", (other,), "same")
    assert (pair.context, pair.licence, pair.split) == ({"user": "u"}, "CC0-1.0", "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_gap": -1.0}, "min_gap is -1.0 (pairing.min_gap). Use 0 or more"),
        ({"min_gap": 2.0, "max_gap": 1.0}, "max_gap 1.0 is below min_gap 2.0 (pairing.max_gap)"),
        (
            {"max_pairs_per_prompt": 0},
            "max_pairs_per_prompt is 0 (pairing.max_pairs_per_prompt). Use 1 or more, or leave it out",
        ),
        (
            {"threshold": 0.5},
            "a threshold labels unpaired candidates (pairing.threshold). Leave it out, or use the strategy 'unpaired'",
        ),
        (
            {"strategy": "unpaired", "threshold": float("nan")},
            "threshold is nan (pairing.threshold). Use a finite number",
        ),
        *(
            (
                {"strategy": "unpaired", name: value},
                f"the strategy 'unpaired' compares nothing and has no use for {name} (pairing.{name}). Leave it out",
            )
            for name, value in [
                ("min_gap", 1.0),
                ("max_gap", 1.0),
                ("ties", "soft"),
                ("spread", 1.0),
                ("max_pairs_per_prompt", 1),
            ]
        ),
        (
            {"strategy": "votes", "score": "clip"},
            "the strategy 'votes' compares by votes, not by the score 'clip' (pairing.score). "
            "Leave the score out or use best_worst or all",
        ),
    ],
)
def test_wrong_settings_name_the_field(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Pairing(**options)
    assert str(error.value) == message


# --- on disk -----------------------------------------------------------------------------------------------


def test_pairs_written_and_read_are_the_same(tmp_path: Path) -> None:
    records = [scored("r", 0.1, 0.7, 0.3), voted("v", (0, 1, "tie"), (1, 2, "b")), voted("t", (0, 1, "a"))]
    for ties in ("drop", "keep", "soft"):
        pairing = Pairing(ties=ties)  # type: ignore[arg-type]  # one of the three
        made = list(make_pairs(records, pairing))
        path = tmp_path / f"{ties}.jsonl"
        assert write_pairs(made, path, pairing) == len(made)
        assert list(read_pairs(path, records)) == made
    header, first, *_ = path.read_text().splitlines()
    assert json.loads(header)["pairing"]["ties"] == "soft"
    assert json.loads(first)["record"] == "r"
    assert [item.name for item in sorted(tmp_path.iterdir())] == ["drop.jsonl", "keep.jsonl", "soft.jsonl"]


def test_a_failed_pairing_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="all 1 comparisons are ties"):
        write_pairs(make_pairs([voted("t", (0, 1, "tie"))], Pairing(ties="keep")), tmp_path / "pairs.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_edited_pairs_that_are_wrong(tmp_path: Path) -> None:
    records = [scored("r", 0.0, 1.0)]
    path = tmp_path / "pairs.jsonl"
    write_pairs(make_pairs(records), path)
    header, good = path.read_text().splitlines()

    def message(text: str) -> str:
        path.write_text(text)
        with pytest.raises(UserError) as error:
            list(read_pairs(path, records))
        return str(error.value)

    line = json.loads(good)
    fix = "The first line says 'mmalign-pairs/1', the others are pairs"

    def changed(**changes: Any) -> str:
        return f"{header}\n{json.dumps({**line, **changes})}\n"

    assert message(changed(record="q")) == f"the data has no record 'q' ({path} line 2). Pair the data again"
    assert message(changed(a="c9")) == f"record 'r' has no candidate 'c9' ({path} line 2). Known: c0, c1."
    assert message(changed(label="left")) == (
        f"this is not a pair written by mmalign: label is 'left' ({path} line 2). {fix}"
    )
    assert ": confidence is 0.2 (" in message(changed(confidence=0.2))
    assert ": record is 5 (int) (" in message(changed(record=5))
    assert ": could not convert string to float: 'wide' (" in message(changed(gap="wide"))
    assert message(good) == f"this is not a pair written by mmalign: 'format' ({path} line 1). {fix}"
    assert message(f"{header}\n{{").endswith(f"({path} line 2). {fix}")
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read the pairs: .*No such file"):
        list(read_pairs(path, records))
