"""The preference item and the store: nothing is lost, nothing is half written, nothing is decoded unasked."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign import media as media_module
from mmalign.errors import UserError
from mmalign.media import Media
from mmalign.preferences import Candidate, Preference, Problem, Record, Side, Store, Vote, validate


def png(seed: int, size: tuple[int, int] = (8, 6)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def record(number: int, split: str = "train") -> Record:
    return Record(
        record_id=f"r{number}",
        prompt=f"a red square, número {number}",
        candidates=tuple(
            Candidate(
                candidate_id=str(index),
                image=Media(data=png(10 * number + index)),
                scores={"clip": 0.1 * index, "size": -float(number)},
                model="base",
                seed=index,
            )
            for index in range(3)
        ),
        votes=(
            Vote(a="0", b="1", label="a", rater="u1", confidence=0.8, milliseconds=900),
            Vote(a="1", b="2", label="tie"),
        ),
        split=split,
        licence="CC-BY-4.0",
        source="unit",
        context={"group": f"g{number % 2}", "nested": {"values": [1, 2.5, None]}},
    )


def vlm_record() -> Record:
    shared = Media(data=png(900))
    return Record(
        record_id="vlm",
        prompt="What is on the table?",
        media=(shared, Media(data=png(901))),
        candidates=(
            Candidate(candidate_id="c", text="A cup."),
            Candidate(candidate_id="r", text="A cup.", media=(Media(data=png(902)),), prompt="What?"),
            Candidate(candidate_id="n", text="Nothing.", media=()),
        ),
        votes=(Vote(a="c", b="r", label="a"),),
        split="test",
    )


def cause(error: pytest.ExceptionInfo[UserError]) -> str:
    return str(error.value)


# --- the item ----------------------------------------------------------------------------------------------


def pair(label: str = "a", confidence: float | None = None) -> Preference:
    return Preference(
        item_id="i",
        a=Side(prompt="p", response="first"),
        b=Side(prompt="p", response="second"),
        label=label,  # type: ignore[arg-type]  # parametrised below
        confidence=confidence,
    )


def test_chosen_follows_the_label_and_survives_a_swap() -> None:
    for label, winner in (("a", "first"), ("b", "second")):
        item = pair(label)
        assert item.chosen.response == winner
        assert item.rejected.response != winner
        assert item.swap().chosen == item.chosen
        assert item.swap().label != item.label
        assert item.swap().swap() == item


def test_flip_turns_the_preference_and_nothing_else() -> None:
    for label in ("a", "b"):
        item = pair(label)
        assert (item.flip().chosen, item.flip().rejected) == (item.rejected, item.chosen)
        assert (item.flip().a, item.flip().b, item.flip().flip()) == (item.a, item.b, item)
    assert pair("tie").flip() == pair("tie")


def test_a_tie_has_no_chosen_side() -> None:
    with pytest.raises(ValueError, match="i is a tie"):
        _ = pair("tie").chosen
    with pytest.raises(ValueError, match="without a confidence"):
        pair("tie").ordered()
    assert pair("tie", 0.5).ordered() == (pair().a, pair().b, 0.5)
    assert pair("tie").swap().label == "tie"


def test_ordered_gives_the_probability_of_the_first_side() -> None:
    assert pair("b", 0.7).ordered() == (pair().b, pair().a, 0.7)
    assert pair("a").ordered()[2] == 1.0


# --- images ------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> Media:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return Media(data=buffer.getvalue(), place="file.x row 3")


def test_open_turns_upright_by_exif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to display
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    upright = encoded(image, "PNG", exif=exif).open()
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 200 * 256, (200, 200, 200)),
    ],
)
def test_every_mode_becomes_rgb_on_white(mode: str, colour: object, expected: tuple[int, ...]) -> None:
    image = encoded(Image.new(mode, (3, 2), colour)).open()  # type: ignore[arg-type]  # a colour of the mode
    assert image.mode == "RGB"
    assert image.getpixel((1, 1)) == expected


def test_palette_transparency_is_white_too() -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    opened = encoded(image, "PNG", transparency=b"\x00\xff").open()
    assert opened.getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_jpeg_and_one_pixel() -> None:
    assert encoded(Image.new("CMYK", (4, 4)), "JPEG").open().mode == "RGB"
    assert encoded(Image.new("RGB", (1, 1), "red")).open().getpixel((0, 0)) == (255, 0, 0)


def test_a_corrupt_image_names_its_row() -> None:
    with pytest.raises(UserError) as error:
        Media(data=b"not an image", place="train.parquet row 12 jpg_0").open()
    assert cause(error) == (
        "cannot decode the image: cannot identify image file (train.parquet row 12 jpg_0). Replace or remove the file"
    )


def test_a_truncated_image_names_its_row() -> None:
    whole = png(1, (64, 64))
    with pytest.raises(UserError, match=r"cannot decode the image: .*\(cat_w.png\)"):
        Media(data=whole[: len(whole) // 2], place="cat_w.png").open()


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_module, "MAX_PIXELS", 47)
    with pytest.raises(UserError) as error:
        Media(data=png(1), place="big.png").open()
    assert cause(error) == ("the image has 8 x 6 pixels, the limit is 47 (big.png). Scale it down before importing it")


@pytest.mark.parametrize("limit", [20, 40])  # Pillow raises an error above twice its limit, warns below
def test_pillows_own_bomb_check_is_a_user_error_too(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match="the image has too many pixels"):
        Media(data=png(1), place="big.png").open()


def test_only_listed_formats_reach_a_decoder() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PPM")
    with pytest.raises(UserError, match="cannot decode the image"):
        Media(data=buffer.getvalue()).open()


@pytest.mark.parametrize(
    ("path", "got"),
    [
        ("/etc/passwd", "the absolute path '/etc/passwd'"),
        ("C:\\secret.png", "the absolute path 'C:\\secret.png'"),
        ("\\\\host\\share.png", "the absolute path '\\\\host\\share.png'"),
        ("../secret.png", "'../secret.png', which leaves the data folder"),
        ("a/../../secret.png", "'a/../../secret.png', which leaves the data folder"),
        ("a\\..\\secret.png", "'a\\..\\secret.png', which leaves the data folder"),
        ("link.png", "'link.png', a link that leads out of the data folder"),
        ("linked/secret.png", "'linked/secret.png', a link that leads out of the data folder"),
        ("loop.png", "'loop.png', a link that leads out of the data folder|'loop.png', which does not exist"),
        ("none.png", "'none.png', which does not exist"),
        ("pipe", "'pipe', which is not a file"),
        ("", "an empty path"),
        ("a\0b", "a path with a NUL character"),
    ],
)
def test_a_path_may_not_leave_its_folder(tmp_path: Path, path: str, got: str) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe")
    with pytest.raises(UserError) as error:
        Media(path=path, root=str(root), place="row 1").read()
    assert cause(error) in {
        f"expected a file inside the data folder, got {choice} (row 1). "
        "Use paths relative to the data folder, and keep the files in it"
        for choice in got.split("|")
    }


def test_a_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").symlink_to("a.png")
    assert Media(path="b.png", root=str(tmp_path)) == Media(data=png(1))


# --- the store ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embed", [True, False])
def test_round_trip_keeps_everything(tmp_path: Path, embed: bool) -> None:
    records = [record(0), record(1, "test"), vlm_record(), record(2)]
    store = Store.write(iter(records), tmp_path / "s", shard_rows=2, embed_images=embed)
    assert [path.name for path in store.shards] == ["data-00000.parquet", "data-00001.parquet"]
    assert len(store) == 4
    assert store.splits == {"train": 2, "test": 2}
    assert list(Store.open(tmp_path / "s").records()) == records
    assert [item.record_id for item in store.records("test")] == ["r1", "vlm"]
    assert store.info["images"] == 3 * 3 + 3
    assert (tmp_path / "s" / "images").exists() is not embed
    assert Store.open(tmp_path / "s").fingerprint == store.fingerprint


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one = Store.write([record(0), record(1)], tmp_path / "a")
    same = Store.write([record(0), record(1)], tmp_path / "b", shard_rows=1, embed_images=False)
    other = Store.write([record(1), record(0)], tmp_path / "c")
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_listing_records_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.write([record(0), record(1)], tmp_path / "s")

    def forbidden(*_: object) -> None:
        raise AssertionError("an image was read")

    with monkeypatch.context() as patch:
        patch.setattr(media_module, "_images", forbidden)
        listed = list(store.records())
        image = listed[1].candidates[2].image
        assert image is not None
        assert image.data is None
        assert image.sha256() == Media(data=png(12)).sha256()  # known without reading
        assert len(pickle.dumps(image)) < 600  # what a data-loader worker is sent
    assert image.open().size == (8, 6)
    assert np.array_equal(np.asarray(image.open()), np.asarray(Image.open(io.BytesIO(png(12)))))


def test_row_groups_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.preferences._GROUP_BYTES", 2000)
    store = Store.write([record(number) for number in range(12)], tmp_path / "s")
    groups = pq.ParquetFile(store.shards[0]).metadata.num_row_groups
    assert groups == 3  # 12 records of three 200-byte images, in groups of at least 2000 bytes
    assert list(store.records()) == [record(number) for number in range(12)]


def test_the_datasets_library_reads_it(tmp_path: Path) -> None:
    import datasets

    store = Store.write([record(0), vlm_record()], tmp_path / "s")
    loaded = datasets.load_dataset(
        "parquet", data_files=[str(path) for path in store.shards], cache_dir=str(tmp_path / "cache")
    )["train"]
    assert loaded["record_id"] == ["r0", "vlm"]
    assert loaded[0]["votes"][0]["label"] == "a"
    assert loaded[0]["candidates"][1]["scores"][0] == {"name": "clip", "value": 0.1}
    pictures = loaded[0]["images"]
    assert np.array_equal(np.asarray(pictures[2]), np.asarray(Image.open(io.BytesIO(png(2)))))


def test_scores_are_added_with_their_scorer(tmp_path: Path) -> None:
    store = Store.write([record(0), vlm_record()], tmp_path / "s", scorers={"clip": "clip@1"})
    assert store.scorers == {"clip": "clip@1", "size": "unknown"}
    old = set(store.shards)

    def length(item: Record) -> dict[str, float]:
        return {c.candidate_id: float(len(c.text)) for c in item.candidates if c.text is not None}

    scored = store.add_scores("length", length, scorer="length@2")
    assert scored.scorers == {"clip": "clip@1", "size": "unknown", "length": "length@2"}
    first, second = scored.records()
    assert first == record(0)
    assert [candidate.scores for candidate in second.candidates] == [
        {"length": 6.0},
        {"length": 6.0},
        {"length": 8.0},
    ]
    assert set(tmp_path.joinpath("s").glob("*.parquet")) == set(scored.shards)
    assert not old & set(scored.shards)
    with pytest.raises(UserError) as error:
        scored.add_scores("length", length, scorer="other@1")
    assert cause(error) == (
        f"score 'length' was given by length@2, not by other@1 ({tmp_path / 's'}). "
        "Use another score name, so that the old one stays comparable"
    )


def test_rewriting_a_store_with_images_as_files_keeps_them(tmp_path: Path) -> None:
    store = Store.write([record(0)], tmp_path / "s", embed_images=False)
    store = store.rewrite(lambda item: dataclasses.replace(item, split="test"))
    assert list(store.records("test")) == [record(0, "test")]
    assert not store.info["embedded"]


def test_a_failing_rewrite_changes_nothing(tmp_path: Path) -> None:
    store = Store.write([record(0), record(1)], tmp_path / "s", shard_rows=1)
    before = sorted(path.name for path in (tmp_path / "s").iterdir())
    with pytest.raises(UserError, match=r"scores.bad: expected a finite number, got nan"):
        store.add_scores("bad", lambda item: {"0": float("nan") if item.record_id == "r1" else 1.0}, scorer="b@1")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == before
    assert list(Store.open(tmp_path / "s").records()) == [record(0), record(1)]


KILLED = """
    import os, signal, sys
    from PIL import Image
    from mmalign.media import Media
    from mmalign.preferences import Candidate, Record, Store

    def records(deadly):
        for number in range(6):
            if deadly and number == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            image = Media.from_image(Image.new("RGB", (8, 8), (number, 0, 0)))
            candidate = Candidate(candidate_id="0", image=image)
            yield Record(record_id=str(number), prompt="p", candidates=(candidate,))

    if sys.argv[1] == "write":
        Store.write(records(True), sys.argv[2], shard_rows=2)
    store = Store.write(records(False), sys.argv[2], shard_rows=2)
    order = records(True)
    next(order)
    store.rewrite(lambda record: (next(order), record)[1])
"""


@pytest.mark.parametrize("verb", ["write", "rewrite"])
def test_sigkill_leaves_no_half_store(tmp_path: Path, verb: str) -> None:
    path = tmp_path / "s"
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), verb, str(path)], check=False)
    assert run.returncode == -signal.SIGKILL
    if verb == "write":
        assert not path.exists()
        Store.write([record(0)], path)
        assert [item.name for item in tmp_path.iterdir()] == ["s"]  # the killed run's remains are gone
        return
    store = Store.open(path)
    assert [item.record_id for item in store.records()] == list("012345")
    assert len(list(path.glob("*.parquet"))) > len(store.shards)  # what the killed rewrite left
    store = store.rewrite(lambda item: item)
    assert set(path.glob("*.parquet")) == set(store.shards)


def test_an_error_in_the_source_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[Record]:
        yield record(0)
        raise RuntimeError("scorer died")

    with pytest.raises(RuntimeError, match="scorer died"):
        Store.write(failing(), tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmalign.preferences._sync", full)
    with pytest.raises(UserError) as error:
        Store.write([record(0)], tmp_path / "s")
    assert cause(error) == (
        f"cannot write the store: No space left on device ({tmp_path / 's'}). "
        "Free some space or choose another place; what was there before is untouched"
    )
    assert list(tmp_path.iterdir()) == []


# --- bad stores --------------------------------------------------------------------------------------------


def test_write_refuses_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    Store.write([record(0)], tmp_path / "s")  # an empty folder is fine
    with pytest.raises(UserError) as error:
        Store.write([record(0)], tmp_path / "s")
    assert cause(error) == f"something is here already ({tmp_path / 's'}). Choose another name or delete it first"


def test_write_refuses_duplicate_ids_and_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Store.write([record(0), record(0)], tmp_path / "s")
    assert cause(error) == (
        "record_id: expected an id used once, got 'r0', already at record 'r0' (record 'r0'). "
        "`mmalign data check` lists every such row"
    )
    with pytest.raises(UserError) as error:
        Store.write([], tmp_path / "s")
    assert cause(error) == "there are no records to write. Check that the source holds some"
    assert list(tmp_path.iterdir()) == []


def test_open_where_there_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Store.open(tmp_path / "none")
    assert cause(error) == (
        f"there is no preference store here ({tmp_path / 'none'}). "
        "Make one with `mmalign data import SOURCE --out STORE`"
    )


def test_a_truncated_shard_is_found_at_open(tmp_path: Path) -> None:
    store = Store.write([record(0)], tmp_path / "s")
    shard = store.shards[0]
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError) as error:
        Store.open(tmp_path / "s")
    assert cause(error) == (
        f"the shard has {size - 100} bytes instead of {size}: it was cut short or changed ({shard}). "
        "Copy the store again or import the source again"
    )


def test_flipped_bytes_are_found_by_the_page_checksums(tmp_path: Path) -> None:
    store = Store.write([record(0)], tmp_path / "s")
    shard = store.shards[0]
    data = bytearray(shard.read_bytes())
    image, prompt = data.find(b"IDAT"), data.find("número".encode())
    assert image > 0 < prompt
    kept = list(store.records())  # read before the damage: addresses only
    data[image + 10] ^= 0xFF
    shard.write_bytes(bytes(data))
    first = kept[0].candidates[0].image
    assert first is not None
    with pytest.raises(UserError, match=r"cannot read an image from the shard: .*data-00000.parquet row 0"):
        first.read()
    data[prompt] ^= 0xFF
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"the Parquet file is damaged: .*data-00000.parquet"):
        list(Store.open(tmp_path / "s").records())


def test_a_tampered_manifest(tmp_path: Path) -> None:
    Store.write([record(0)], tmp_path / "s")
    manifest = tmp_path / "s" / "store.json"
    info = json.loads(manifest.read_text())

    def message(content: str) -> str:
        manifest.write_text(content)
        with pytest.raises(UserError) as error:
            Store.open(tmp_path / "s")
        return cause(error)

    assert message("{").startswith("store.json is damaged: JSONDecodeError")
    assert message("[]").startswith("store.json is damaged: TypeError")
    assert message(json.dumps({**info, "version": 9})) == (
        f"the store has version 9, this mmalign reads 1 ({manifest}). Import the source again"
    )
    (tmp_path / "elsewhere.parquet").write_bytes(b"")
    escaped = {**info, "shards": [{"file": "../elsewhere.parquet", "rows": 1, "bytes": 0}]}
    assert message(json.dumps(escaped)).startswith(
        "expected a shard in the store's folder, got '../elsewhere.parquet', which leaves the data folder"
    )


def test_an_unknown_split_names_the_nearest(tmp_path: Path) -> None:
    store = Store.write([record(0), record(1, "heldout")], tmp_path / "s")
    with pytest.raises(UserError) as error:
        store.records("held_out")
    assert cause(error) == f"the store has no split 'held_out' ({tmp_path / 's'}). Did you mean 'heldout'?"


# --- validation --------------------------------------------------------------------------------------------


def problems(*records: Record, decode: bool = True) -> list[str]:
    return [str(problem) for problem in validate(records, decode=decode)]


def test_good_records_have_no_problems() -> None:
    assert problems(record(0), record(1), vlm_record()) == []


def test_each_wrong_field_is_named_with_its_row() -> None:
    good = record(0)
    image = good.candidates[0].image
    first = dataclasses.replace(good.candidates[0], scores={"clip": float("inf")}, seed=2**64)
    bad = dataclasses.replace(
        good,
        prompt=" ",
        place="x.jsonl row 4",
        candidates=(
            first,
            dataclasses.replace(good.candidates[1], candidate_id="0"),
            Candidate(candidate_id="2"),
            Candidate(candidate_id="3", image=image, text="both"),
        ),
        votes=(Vote(a="0", b="1", label="a"), Vote(a="0", b="0", label="b", confidence=0.3)),
        context={"path": Path("x")},
    )
    assert problems(bad) == [
        "x.jsonl row 4: prompt: expected text that is not empty, got ' '",
        "x.jsonl row 4: context: expected plain JSON values, got Object of type PosixPath is not JSON serializable",
        "x.jsonl row 4: candidates[0].seed: expected a whole number of at most 64 bits, got 18446744073709551616 (int)",
        "x.jsonl row 4: candidates[0].scores.clip: expected a finite number, got inf (float)",
        "x.jsonl row 4: candidates[1].candidate_id: expected an id used once in the record, got '0'",
        "x.jsonl row 4: candidates[2]: expected an image or a text, got neither",
        "x.jsonl row 4: candidates[3]: expected an image or a text, got both",
        "x.jsonl row 4: votes[0].b: expected the id of a candidate, got '1'",
        "x.jsonl row 4: votes[1].b: expected another candidate than a, got '0'",
        "x.jsonl row 4: votes[1].confidence: expected a probability from 0.5 to 1, got 0.3 (float)",
    ]


def test_values_of_the_wrong_type_from_untyped_code() -> None:
    bad = record(0)
    object.__setattr__(bad, "prompt", ["a", "list"])  # past the type checks, as an untyped caller would
    assert problems(bad) == ["record 'r0': prompt: expected text, got ['a', 'list'] (list)"]


def test_a_lone_surrogate_is_not_text() -> None:
    bad = dataclasses.replace(record(0), prompt="caf\ud800")
    assert problems(bad) == ["record 'r0': prompt: expected valid Unicode, got 'caf\\ud800'"]


def test_a_corrupt_image_is_found_only_when_decoding() -> None:
    broken = dataclasses.replace(record(0).candidates[0], image=Media(data=b"\x89PNG broken"))
    bad = dataclasses.replace(record(0), candidates=(broken, *record(0).candidates[1:]), place="row 7")
    assert problems(bad) == [
        "row 7: candidates[0].image: expected an image that opens, "
        "got 'cannot decode the image: cannot identify image file'"
    ]
    assert problems(bad, decode=False) == []


def test_duplicates_emptiness_and_ties_are_found_as_a_whole() -> None:
    again = dataclasses.replace(record(0), place="row 9")
    assert problems(record(0), again) == [
        "row 9: record_id: expected an id used once, got 'r0', already at record 'r0'"
    ]
    assert problems() == ["all rows: records: expected at least one, got none"]
    tied = Record(
        record_id="t",
        prompt="p",
        candidates=(Candidate(candidate_id="a", text="x"), Candidate(candidate_id="b", text="y")),
        votes=(Vote(a="a", b="b", label="tie"),),
    )
    assert problems(tied) == ["all rows: votes and scores: expected at least one that prefers a candidate, got 1 ties"]


def test_a_problem_as_an_error_has_cause_place_and_fix() -> None:
    problem = Problem(row="a.parquet row 3", field="caption", expected="text", got="nothing")
    assert str(problem.error()) == (
        "caption: expected text, got nothing (a.parquet row 3). `mmalign data check` lists every such row"
    )
