"""`mmalign data`: what a person sees from a folder of pictures to a list of pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mmalign.cli import run_entry
from mmalign.data import main
from mmalign.media import Media
from mmalign.pairing import read_pairs
from mmalign.preferences import Candidate, Record, Store, Vote


def photos(folder: Path, groups: int = 4, crops: int = 3) -> Path:
    folder.mkdir()
    for group in range(groups):
        for crop in range(crops):
            for side, shade in (("w", 200), ("l", 100)):
                image = Image.new("RGB", (8, 8), (shade, 20 * group, 20 * crop))
                image.save(folder / f"photo{group}-{crop}_{side}.png")
    return folder


HALF = ["--split-fraction", "heldout=0.5"]
OWN = ["--prompt", "a photograph", "--group-regex", r"^(photo\d+)-"]


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = run_entry(main, [str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_own_pictures_from_check_to_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = photos(tmp_path / "photos")
    assert run(capsys, "check", source, *OWN) == (
        0,
        f"{source}: 12 records with 24 images, no problems\n",
        "",
    )
    out = tmp_path / "store"
    code, text, _ = run(
        capsys,
        "import",
        source,
        "--out",
        out,
        "--licence",
        "CC0-1.0",
        *HALF,
        *OWN,
    )
    assert code == 0
    store = Store.open(out)
    splits = ", ".join(f"{name} {count}" for name, count in sorted(store.splits.items()))
    assert text == f"{out}: 12 records from pairs_folder ({splits}), 24 images\n"
    assert set(store.splits) == {"train", "heldout"}
    groups = {split: {r.context["group"] for r in store.records(split)} for split in store.splits}
    assert not groups["train"] & groups["heldout"]  # crops of one photograph never part
    assert store.info["licences"] == {"CC0-1.0": 12}

    assert run(capsys, "check", out)[0] == 0
    pairs = tmp_path / "pairs.jsonl"
    code, text, _ = run(capsys, "pair", out, "--out", pairs, "--split", "train")
    count = store.splits["train"]
    assert (code, text) == (0, f"{pairs}: {count} pairs from {count} records\n")
    made = list(read_pairs(pairs, store.records()))
    assert len(made) == count
    image = made[0].chosen.response
    assert isinstance(image, Media)
    assert image.open().getpixel((0, 0))[0] == 200  # type: ignore[index]  # RGB


def test_the_split_is_by_hash_and_stays_when_data_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held: list[set[str]] = []
    for name, groups in (("few", 6), ("many", 9)):
        source, out = photos(tmp_path / name, groups, 1), tmp_path / f"{name}-store"
        assert run(capsys, "import", source, "--out", out, "--split-fraction", "heldout=0.4", *OWN)[0] == 0
        held.append({record.record_id for record in Store.open(out).records("heldout")})
    assert held[0] == {name for name in held[1] if name < "photo6"}


def test_a_split_that_takes_everything_or_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = photos(tmp_path / "photos")
    common = ["import", source, "--out", tmp_path / "store", "--prompt", "p"]
    code, _, error = run(capsys, *common, "--split-fraction", "heldout=0.0001")
    assert (code, error) == (
        2,
        "mmalign: error: no record went to split 'heldout': the data has 1 group (--split-fraction). "
        "Give groups by --group-regex or metadata, or another share\n",
    )
    assert not (tmp_path / "store").exists()
    code, _, error = run(capsys, *common, "--split-fraction", "heldout=2")
    assert (code, error) == (
        2,
        "mmalign: error: 'heldout=2' is not NAME=SHARE with a share between 0 and 1 (--split-fraction). "
        "For example heldout=0.1\n",
    )


def test_check_prints_problems_up_to_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = photos(tmp_path / "photos")
    for name in ("photo0-0_w.png", "photo1-1_l.png", "photo2-0_w.png"):
        (source / name).write_bytes(b"broken")
    line = (
        "{}: candidates[{}].image: expected an image that opens, "
        "got 'cannot decode the image: cannot identify image file'\n"
    )
    code, text, _ = run(capsys, "check", source, *OWN, "--limit", 2)
    assert (code, text) == (
        2,
        line.format("photo0-0", 0)
        + line.format("photo1-1", 1)
        + f"{source}: 3 problems in 12 records with 24 images, 1 not shown (--limit 0 shows all)\n",
    )
    assert run(capsys, "check", source, *OWN, "--limit", 0)[1].count("photo") == 3 + 1
    assert run(capsys, "check", source, *OWN, "--skip-images")[0] == 0


def test_import_stops_at_a_bad_row_or_leaves_a_few_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "store"
    (source / "photo0-0_w.png").write_bytes(b"broken")
    code, _, error = run(capsys, "import", source, "--out", out, *OWN)
    assert (code, error) == (
        2,
        "mmalign: error: candidates[0].image: expected an image that opens, "
        "got 'cannot decode the image: cannot identify image file' (photo0-0). "
        "`mmalign data check` lists every such row\n",
    )
    assert not out.exists()
    code, text, error = run(capsys, "import", source, "--out", out, *OWN, "--max-bad", 1)
    assert (code, text) == (
        0,
        f"{out}: 11 records from pairs_folder (train 11), 22 images; 1 wrong rows left out\n",
    )
    assert error.startswith("left out: photo0-0: candidates[0].image")


def test_bad_sources_are_one_line_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "check", tmp_path / "none") == (
        2,
        "",
        f"mmalign: error: there is no such file or folder ({tmp_path / 'none'})\n",
    )
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    for verb in (["check", empty], ["stats", empty], ["import", empty, "--out", tmp_path / "s"]):
        assert run(capsys, *verb) == (
            2,
            "",
            f"mmalign: error: the source holds no rows ({empty}). Give a source with data in it\n",
        )
    tied = tmp_path / "tied.jsonl"
    candidates = [{"id": "x", "text": "1"}, {"id": "y", "text": "2"}]
    row = {"prompt": "p", "candidates": candidates, "votes": [{"a": "x", "b": "y", "label": "tie"}]}
    tied.write_text(json.dumps(row))
    assert run(capsys, "check", tied)[:2] == (
        2,
        "all rows: votes and scores: expected at least one that prefers a candidate, got 1 ties\n"
        f"{tied}: 1 problem in 1 records with 0 images\n",
    )
    assert run(capsys, "pair", tied, "--out", tmp_path / "p.jsonl") == (
        2,
        "",
        "mmalign: error: all 1 comparisons are ties. "
        "Nothing can be learned from them: collect votes or scores that tell candidates apart\n",
    )
    code, _, error = run(capsys, "chek")
    assert code == 2
    assert error == "mmalign: error: mmalign data: unknown 'chek'. Did you mean 'check'?\n"


def test_stats_count_ties_gaps_duplicates_and_leaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def image(shade: int) -> Media:
        return Media.from_image(Image.new("RGB", (4, 4), (shade, 0, 0)))

    def record(name: str, prompt: str, shades: tuple[int, int], split: str, label: str) -> Record:
        return Record(
            record_id=name,
            prompt=prompt,
            candidates=tuple(
                Candidate(candidate_id=str(i), image=image(shade), scores={"red": float(shade)}, model="m")
                for i, shade in enumerate(shades)
            ),
            votes=(
                Vote(a="0", b="1", label=label, rater="ann"),  # type: ignore[arg-type]  # a, b or tie
                Vote(a="0", b="1", label="b", rater=name),
            ),
            split=split,
            context={"group": "g"},
            licence="CC0-1.0",
        )

    records = [
        record("r", "p", (1, 5), "train", "b"),
        record("s", "p", (1, 1), "test", "a"),
        record("t", "q", (7, 9), "train", "tie"),
    ]
    Store.write(records, tmp_path / "s")
    code, text, _ = run(capsys, "stats", tmp_path / "s", "--json")
    assert code == 0
    assert json.loads(text) == {
        "records": 3,
        "candidates": 6,
        "votes": 6,
        "images": 6,
        "splits": {"train": 2, "test": 1},
        "licences": {"CC0-1.0": 3},
        "sources": {"unknown": 3},
        "models": {"m": 6},
        "labels": {"a": 1, "b": 4, "tie": 1},
        "raters": {
            "count": 4,
            "votes_per_rater": {"min": 1.0, "q25": 1.0, "median": 1.0, "q75": 1.5, "max": 3.0},
        },
        "gaps": {
            "red": {
                "compared": 3,
                "ties": 1,
                "quantiles": {"min": 0.0, "q25": 1.0, "median": 2.0, "q75": 3.0, "max": 4.0},
            },
            "votes": {
                "compared": 3,
                "ties": 1,
                "quantiles": {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0},
            },
        },
        "unpaired": {
            "red": {"desirable": 3, "undesirable": 3, "threshold": 3.0},
            "votes": {"desirable": 3, "undesirable": 2},
        },
        "duplicates": {"prompts": 1, "images": 2},
        "shared_between_splits": {"prompts": 1, "groups": 1, "images": 1},
    }
    code, text, _ = run(capsys, "stats", tmp_path / "s")
    assert code == 0
    assert "shared between splits     prompts 1, groups 1, images 1" in text.splitlines()
