"""Scoring at scale: every kind of source, errors as rows, resume after a kill, several processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_runs import write_store

from evaluators import score
from evaluators.samples import Source, find
from evaluators.score import Place, finish, main, score_source
from evaluators.scorefile import Header, Row, described, read_scores, scorers_of
from mmalign.cli import run_entry
from mmalign.errors import UserError

ROOT = Path(__file__).parent.parent
PROMPTS = ("a red circle", "two blue squares", "a green triangle")


class Mean:
    """Mean brightness, the length of the prompt, and an opinion on blue: a scorer whose truth is known."""

    identity, main, numbers = "mean@1", "mean", ("mean", "words")

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        self.sizes.append(len(images))
        if any("refused" in prompt for prompt in prompts):
            raise UserError("this prompt is refused")
        return [
            {"mean": float(np.asarray(image).mean()), "words": float(len(prompt.split()))}
            for prompt, image in zip(prompts, images, strict=True)
        ]


def picture(number: int) -> bytes:
    packed = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, 7)).save(packed, format="PNG")
    return packed.getvalue()


def brightness(number: int) -> float:
    return float(np.float64(number % 256 + number // 256 % 256 + 7) / 3)


def folder(path: Path, count: int) -> Path:
    path.mkdir(parents=True)
    for number in range(count):
        (path / f"{number:05d}.png").write_bytes(picture(number))
        (path / f"{number:05d}.txt").write_text(PROMPTS[number % 3])
    return path


def index(path: Path, count: int) -> Path:
    folder(path, count)
    rows = [
        {"file": f"{n:05d}.png", "prompt": PROMPTS[n % 3], "seed": n, "model": "m@1", "steps": 4, "guidance_scale": 1.0}
        for n in range(count)
    ]
    (path / "index.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def table(path: Path, count: int, kind: str = "struct") -> Path:
    path.mkdir(parents=True)
    bytes_of = [picture(number) for number in range(count)]
    images = [{"bytes": data, "path": None} for data in bytes_of] if kind == "struct" else bytes_of
    rows = pa.table({"image": images, "caption": [PROMPTS[n % 3] for n in range(count)], "seed": list(range(count))})
    pq.write_table(rows, path / "data.parquet", row_group_size=4)
    return path


def shards(path: Path, count: int) -> Path:
    path.mkdir(parents=True)
    for half in range(2):
        with tarfile.open(path / f"{half:03d}.tar", "w") as tar:
            for number in range(half, count, 2):
                text = PROMPTS[number % 3].encode()
                meta = json.dumps({"caption": PROMPTS[number % 3], "seed": number}).encode()
                part = ("txt", text) if number % 4 < 2 else ("json", meta)
                for suffix, data in (("png", picture(number)), part):
                    member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path


def scored(source: Source, out: Path, scorer: Mean | None = None, **options: object) -> list[Row]:
    scorers = {"mean": scorer or Mean()}
    header = Header(model="m", protocol={}, scorers=described(scorers))
    score_source(source, scorers, out, header, **options)  # type: ignore[arg-type]  # batch_size and the like
    return list(read_scores(finish(source, out, header)).rows.values())


# ----------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("make", [folder, index, table, shards])
def test_every_source_gives_every_picture_its_own_score(tmp_path: Path, make: object) -> None:
    source = find(make(tmp_path / "in", 11), rows=4)  # type: ignore[operator]  # one of four functions
    assert len(source.shards) == (2 if make is shards else 3)
    rows = scored(source, tmp_path / "out", batch_size=3)
    assert len(rows) == len({row.id for row in rows}) == 11
    values = sorted((row.scores["mean/mean"], row.scores["mean/words"]) for row in rows)
    expected = sorted((brightness(n), float(len(PROMPTS[n % 3].split()))) for n in range(11))
    assert np.array(values) == pytest.approx(np.array(expected))
    assert all(row.error is None for row in rows)
    if make in (index, table):
        assert [row.seed for row in rows] == list(range(11))


def test_a_column_of_bytes_is_a_picture_as_well(tmp_path: Path) -> None:
    rows = scored(find(table(tmp_path / "in", 5, "bytes")), tmp_path / "out")
    assert [row.scores["mean/mean"] for row in rows] == pytest.approx([brightness(n) for n in range(5)])


def test_a_store_gives_its_candidates(tmp_path: Path) -> None:
    rows = scored(find(write_store(tmp_path / "store", 5)), tmp_path / "out")
    assert [row.id for row in rows] == [f"{n:02d}/{side}" for n in range(5) for side in (0, 1)]


def test_an_index_says_how_pictures_were_drawn(tmp_path: Path) -> None:
    about = find(index(tmp_path / "in", 3)).about
    sampled = {"sampler": "mmalign sample", "steps": 4, "guidance_scale": 1.0}
    assert about == {"model": "m@1", "protocol": sampled}


def test_each_picture_is_decoded_once_for_all_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    decode = score._decode
    monkeypatch.setattr(score, "_decode", lambda sample: (opened.append(sample.id), decode(sample))[1])
    source = find(folder(tmp_path / "in", 9), rows=4)
    scorers = {"mean": Mean(), "again": Mean()}
    header = Header(model="m", protocol={}, scorers=described(scorers))
    timing = score_source(source, scorers, tmp_path / "out", header, batch_size=4)
    assert len(opened) == len(set(opened)) == 9
    assert scorers["mean"].sizes == scorers["again"].sizes == [4, 4, 1]
    said = timing.as_json()
    assert said["pictures"] == 9 and said["errors"] == 0 and set(said["computing_seconds"]) == {"mean", "again"}
    assert 0 < sum(said["shares"].values()) <= 1 and said["decoding_thread_seconds"] > 0
    rows = read_scores(finish(source, tmp_path / "out", header)).rows.values()
    assert all(row.scores["mean/mean"] == row.scores["again/mean"] for row in rows)


# ------------------------------------------------------------------------------------------------------ errors


def test_what_is_wrong_becomes_a_row_with_an_error(tmp_path: Path) -> None:
    path = index(tmp_path / "in", 6)
    (path / "00001.png").write_bytes(b"not a picture")
    (path / "00002.png").unlink()
    lines = (path / "index.jsonl").read_text().splitlines()
    lines[3] = json.dumps({"prompt": "no picture"})
    lines[4] = "{broken"
    lines[5] = json.dumps({"image": "../../etc/passwd", "prompt": "outside"})
    lines += [json.dumps({"image": "00000.png", "prompt": "this one is refused"}), json.dumps({"image": "00000.png"})]
    (path / "index.jsonl").write_text("\n".join(lines))
    rows = scored(find(path), tmp_path / "out")
    assert [row.error is None for row in rows] == [True] + [False] * 7
    assert rows[0].scores and not any(row.scores for row in rows[1:])
    for row, reason in zip(
        rows[1:],
        (
            "cannot decode",
            "does not exist",
            "a row without an image",
            "not JSON",
            "leaves the data folder",
            "mean: this prompt is refused",
            "needs a text field",
        ),
        strict=True,
    ):
        assert row.error is not None and reason in row.error and "\n" not in row.error


def test_sources_that_are_none_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b nothing")
    (tmp_path / "x.zip").write_bytes(b"")
    (tmp_path / "x.jsonl").write_text("\n")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    for name, message in (
        ("none", "nothing here"),
        ("empty", "no pictures here"),
        ("x.zip", "cannot take pictures from a '.zip' file"),
        ("x.jsonl", "no rows"),
        ("x.parquet", "no column image or"),
    ):
        with pytest.raises(UserError, match=message):
            find(tmp_path / name)
    with pytest.raises(UserError, match="damaged or compressed"):
        scored(find(tmp_path / "x.tar"), tmp_path / "out")


def test_an_id_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = index(tmp_path / "in", 2)
    row = json.dumps({"id": "same", "image": "00000.png", "prompt": "a"})
    (path / "index.jsonl").write_text(f"{row}\n{row}")
    with pytest.raises(UserError, match="two pictures have the id 'same'"):
        scored(find(path), tmp_path / "out")


def test_a_bug_in_a_scorer_is_not_hidden(tmp_path: Path) -> None:
    class Broken(Mean):
        def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        scored(find(folder(tmp_path / "in", 300)), tmp_path / "out", Broken(), batch_size=2)


# ------------------------------------------------------------------------------------------------------ resume


def test_only_missing_shards_are_scored_again(tmp_path: Path) -> None:
    source = find(folder(tmp_path / "in", 12), rows=3)
    first = scored(source, tmp_path / "out")
    (tmp_path / "out" / "parts" / "000001.jsonl").unlink()
    (tmp_path / "out" / "parts" / ".000001.jsonl.tmp-9").write_text("half a row")
    scorer = Mean()
    assert scored(source, tmp_path / "out", scorer) == first
    assert scorer.sizes == [3]
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 4


def test_a_folder_of_other_scores_is_refused(tmp_path: Path) -> None:
    scored(find(folder(tmp_path / "in", 4)), tmp_path / "out")
    with pytest.raises(UserError, match="scores of another source"):
        scored(find(folder(tmp_path / "more", 5)), tmp_path / "out")
    with pytest.raises(UserError, match="something else is here"):
        scored(find(tmp_path / "in"), tmp_path / "more")


def test_processes_share_the_shards_and_give_one_table(tmp_path: Path) -> None:
    source = find(folder(tmp_path / "in", 13), rows=2)
    whole = scored(source, tmp_path / "one")
    header = Header(model="m", protocol={}, scorers=described({"mean": Mean()}))
    sizes = []
    for rank in (1, 0, 2):
        scorer = Mean()
        score_source(source, {"mean": scorer}, tmp_path / "three", header, place=Place(rank=rank, world=3))
        sizes.append(sum(scorer.sizes))
    assert sorted(sizes) == [4, 4, 5]
    finish(source, tmp_path / "three", header)
    assert (tmp_path / "three" / "scores.jsonl").read_bytes() == (tmp_path / "one" / "scores.jsonl").read_bytes()
    assert len(whole) == 13


def test_a_place_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Place.of_environment() == Place(rank=2, world=4)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(UserError, match="rank 4 of 4"):
        Place.of_environment()
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UserError, match="not a number"):
        Place.of_environment()


# ----------------------------------------------------------------------------------------------------- command


def command(source: Path, out: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "mmalign", "score", str(source), "--scorer", "shapes", "--out", str(out), *more]
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_kill_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    """Thousands of pictures, killed without warning once some shards are there and others are not, then run again."""
    count, rows = 3000, 60
    source, out = folder(tmp_path / "in", count), tmp_path / "out"
    process = command(source, out, "--shard-rows", str(rows))
    deadline = time.monotonic() + 120
    while len(list((out / "parts").glob("0*.jsonl"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = len(list((out / "parts").glob("0*.jsonl")))
    assert process.returncode == -signal.SIGKILL and 3 <= there < count // rows
    assert not (out / "scores.jsonl").exists()

    again = command(source, out, "--shard-rows", str(rows), "--json")
    said, complaint = again.communicate()
    assert again.returncode == 0, complaint
    assert json.loads(said)["pictures"] == count - there * rows
    found = read_scores(out).rows
    assert list(found) == [f"{number:05d}.png" for number in range(count)]
    whole = scored(find(source, rows), tmp_path / "whole")
    assert [row.prompt for row in found.values()] == [row.prompt for row in whole]
    assert all(row.error is None and "shapes/style" in row.scores for row in found.values())


def test_two_processes_of_a_launcher_give_one_table(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 40)
    both = [
        command(source, tmp_path / "two", "--shard-rows", "7", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        for rank in (0, 1)
    ]
    for process in both:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint
    assert (
        run_entry(main, [str(source), "--scorer", "shapes", "--out", str(tmp_path / "one"), "--shard-rows", "7"]) == 0
    )
    one, two = (tmp_path / name / "scores.jsonl" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_the_command_says_where_the_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = index(tmp_path / "in", 4)
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text("sampler: ddim\nsteps: 20\n")
    words = [str(source), "--scorer", "shapes,main=style", "--out", str(tmp_path / "out"), "--model", "base"]
    assert run_entry(main, [*words, "--protocol", str(protocol)]) == 0
    said = capsys.readouterr().out
    assert "4 pictures in" in said and "waiting" in said and "computing" in said and "decoding" in said
    header = read_scores(tmp_path / "out").header
    assert header.model == "base" and header.protocol == {"sampler": "ddim", "steps": 20}
    assert header.mains == ["shapes/style"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scorer", "shape"], "no scorer 'shape'. Did you mean 'shapes'"),
        (["--scorer", "shapes,style"], "'style' is no option=value"),
        (["--scorer", "shapes,kind=1"], "does not take these options"),
        (["--scorer", "shapes", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--scorer", "shapes", "--protocol", "none.yaml"], "cannot read the protocol"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run_entry(main, [str(folder(tmp_path / "in", 1)), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_scorers_of_the_same_name_have_labels_of_their_own() -> None:
    found = scorers_of(["shapes", "shapes,main=style"])
    assert list(found) == ["shapes", "shapes-2"] and found["shapes-2"].main == "style"
    with pytest.raises(UserError, match="nothing to score with"):
        scorers_of([])
