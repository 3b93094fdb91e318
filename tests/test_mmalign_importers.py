"""Published formats and folders of pictures become records; what is wrong is named with row and field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_sources import jsonl, labels, parquet, pictures, png, problems, refusal, turn, write_json

from mmalign.importers import ImportOptions, detect, read
from mmalign.media import Media
from mmalign.preferences import Store
from mmalign.records import Problem

# --- Pick-a-Pic --------------------------------------------------------------------------------------------


def pick(row: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "caption": f"prompt {row}",
        "jpg_0": png(row),
        "jpg_1": png(100 + row),
        "label_0": 1.0,
        "label_1": 0.0,
        "has_label": True,
        "are_different": True,
        "image_0_uid": f"x{row}",
        "image_1_uid": f"y{row}",
        "ranking_id": 7,
        "user_id": 42,
        "model_0": "dreamlike",
        "model_1": "sdxl",
    }
    return {**values, **changes}


def test_pickapic_labels_ties_and_unlabelled_rows(tmp_path: Path) -> None:
    rows = [
        pick(0),
        pick(1, label_0=0.0, label_1=1.0),
        pick(2, label_0=0.5, label_1=0.5),
        pick(3, has_label=False),
    ]
    file = parquet(tmp_path / "validation_unique-00000-of-00001-ab12.parquet", rows)
    assert detect(file) == detect(tmp_path) == "pickapic"
    records = list(read(file, decode=True))
    assert [labels(record) for record in records] == [
        [("0", "1", "a")],
        [("0", "1", "b")],
        [("0", "1", "tie")],
        [],
    ]
    first = records[0]
    assert first.record_id == "validation_unique-00000-of-00001-ab12-0"
    assert first.split == "validation"
    assert first.prompt == "prompt 0"
    assert first.votes[0].rater == "42"
    assert [candidate.model for candidate in first.candidates] == ["dreamlike", "sdxl"]
    assert [candidate.image for candidate in first.candidates] == [Media(data=png(0)), Media(data=png(100))]
    assert first.context["ranking_id"] == 7
    assert first.context["user_id"] == 42


def test_pickapic_with_image_structs_and_few_columns(tmp_path: Path) -> None:
    row = {
        "caption": "p",
        "jpg_0": {"bytes": png(1), "path": None},
        "jpg_1": {"bytes": png(2), "path": None},
        "label_0": 0,
    }
    (record,) = read(parquet(tmp_path / "a.parquet", [row]))
    assert labels(record) == [("0", "1", "b")]
    assert record.split == "train"


def test_pickapic_rows_that_are_wrong_are_all_listed(tmp_path: Path) -> None:
    rows = [
        pick(0, caption=None),
        pick(1, jpg_1=b"broken"),
        pick(2, jpg_0=None),
        pick(3, label_0=0.7),
        pick(4, label_1=1.0),
        pick(5),
    ]
    file = parquet(tmp_path / "train.parquet", rows)
    assert problems(file) == [
        "train.parquet row 0: caption: expected text, got nothing",
        "train.parquet row 1: candidates[1].image: expected an image that opens, "
        "got 'cannot decode the image: cannot identify image file'",
        "train.parquet row 2: jpg_0: expected the bytes of an image, got nothing",
        "train.parquet row 3: label_0: expected 0, 0.5 or 1, got 0.7 (float)",
        "train.parquet row 4: label_1: expected 1 - label_0 = 0, got 1.0 (float)",
    ]
    assert refusal(file) == (
        "caption: expected text, got nothing (train.parquet row 0). `mmalign data check` lists every such row"
    )
    left_out: list[Problem] = []
    kept = list(read(file, decode=True, on_problem=left_out.append))
    assert [record.prompt for record in kept] == ["prompt 5"]
    assert len(left_out) == 5


def test_wrong_columns_name_the_nearest(tmp_path: Path) -> None:
    row = pick(0)
    row["captions"] = row.pop("caption")
    file = parquet(tmp_path / "a.parquet", [row])
    expected = f"there is no column 'caption', which the format 'pickapic' needs ({file}). Did you mean 'captions'?"
    assert refusal(file) == expected
    assert refusal(file, "pickapic") == expected


def test_a_prompt_column_of_the_wrong_type(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", [pick(0, caption=12)])
    assert problems(file) == ["a.parquet row 0: caption: expected text, got 12 (int)"]


def test_a_truncated_parquet_source(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", [pick(0)])
    file.write_bytes(file.read_bytes()[:-50])
    message = refusal(file)
    assert message.startswith("the Parquet file is damaged: Parquet magic bytes not found in footer")
    assert message.endswith(f"({file}). Copy it again or import the source again")


# --- HPDv2 -------------------------------------------------------------------------------------------------


def test_hpd_preferences_ranks_and_annotations(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "0.jpg", "1.jpg", "2.jpg")
    rows: list[Mapping[str, Any]] = [
        {"prompt": "p", "file_path": ["0.jpg", "1.jpg"], "human_preference": [0, 1]},
        {"prompt": "q", "image_path": ["0.jpg", "1.jpg", "2.jpg"], "rank": [2, 1, 2]},
        {
            "prompt": "r",
            "image_path": ["0.jpg", "1.jpg"],
            "rank": [1, 2],
            "raw_annotations": [{"rank": [1, 2], "user_hash": "u"}, {"rank": [2, 1], "user_hash": "v"}],
        },
    ]
    file = write_json(tmp_path / "train.json", rows)
    assert detect(file) == detect(tmp_path) == "hpd"
    records = list(read(file, options=ImportOptions(root=str(tmp_path / "images"))))
    assert labels(records[0]) == [("0", "1", "b")]
    assert labels(records[1]) == [("0", "1", "b"), ("0", "2", "tie"), ("1", "2", "a")]
    assert labels(records[2]) == [("0", "1", "a"), ("0", "1", "b")]
    assert [vote.rater for vote in records[2].votes] == ["u", "v"]
    assert [record.record_id for record in records] == ["train.json-0", "train.json-1", "train.json-2"]


def test_hpd_rows_that_are_wrong(tmp_path: Path) -> None:
    root = tmp_path / "data"
    pictures(root, "0.jpg", "1.jpg")
    pictures(tmp_path, "secret.jpg")
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    good = ["0.jpg", "1.jpg"]
    rows: list[Any] = [
        {"prompt": "p", "image_path": good, "human_preference": [1]},
        {"prompt": "p", "image_path": "0.jpg", "human_preference": [1]},
        {"prompt": ["p"], "image_path": good, "human_preference": [1, 0]},
        {"prompt": "p", "image_path": ["0.jpg", "../secret.jpg"], "human_preference": [1, 0]},
        {"prompt": "p", "image_path": ["0.jpg", "/etc/passwd"], "human_preference": [1, 0]},
        {"prompt": "p", "image_path": ["0.jpg", "link.jpg"], "human_preference": [1, 0]},
        {"prompt": "p", "image_path": ["0.jpg", "none.jpg"], "human_preference": [1, 0]},
        {"prompt": "p", "image_path": good},
        "not an object",
        {"prompt": "p", "image_path": good, "human_preference": ["a", "b"]},
    ]
    assert problems(write_json(root / "a.json", rows)) == [
        "a.json row 0: human_preference: expected 2 numbers, one per image, got [1] (list)",
        "a.json row 1: image_path: expected a list of at least two paths, got '0.jpg'",
        "a.json row 2: prompt: expected text, got ['p'] (list)",
        "a.json row 3: image_path[1]: expected a file inside the data folder, "
        "got '../secret.jpg', which leaves the data folder",
        "a.json row 4: image_path[1]: expected a file inside the data folder, got the absolute path '/etc/passwd'",
        "a.json row 5: image_path[1]: expected a file inside the data folder, "
        "got 'link.jpg', a link that leads out of the data folder",
        "a.json row 6: image_path[1]: expected a file inside the data folder, got 'none.jpg', which does not exist",
        "a.json row 7: human_preference: expected the column, got only image_path, prompt",
        "a.json row 8: row: expected an object, got 'not an object'",
        "a.json row 9: human_preference: expected numbers, got ['a', 'b'] (list)",
    ]


# --- TRL ---------------------------------------------------------------------------------------------------


def test_trl_strings_conversations_and_images_on_either_side(tmp_path: Path) -> None:
    pictures(tmp_path, "cat.png", "dog.png")
    system, question = turn("system", "Be short."), turn("user", "What is it?")
    parts = turn("user", [{"type": "image"}, {"type": "text", "text": "What is it?"}])
    rows = [
        {"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog.", "images": ["cat.png"]},
        {
            "prompt": [parts],
            "chosen": [turn("assistant", "A cat.")],
            "rejected": [turn("assistant", "No.")],
            "images": ["cat.png"],
        },
        {
            "chosen": [system, question, turn("assistant", "A cat.")],
            "rejected": [system, question, turn("assistant", "A dog.")],
            "images": "cat.png",
        },
        {
            "prompt": "What is it?",
            "chosen": "A cat.",
            "rejected": "A cat.",
            "images": ["cat.png"],
            "rejected_images": ["dog.png"],
        },
        {"prompt": "a cat", "chosen": "cat.png", "rejected": "dog.png", "split": "test", "group": "g"},
    ]
    file = jsonl(tmp_path / "a.jsonl", rows)
    assert detect(file) == detect(tmp_path) == "trl"
    records = list(read(file, decode=True))
    cat, dog = Media(data=png(0)), Media(data=png(1))
    assert {record.prompt for record in records[:4]} == {"What is it?"}
    assert [candidate.text for candidate in records[1].candidates] == ["A cat.", "No."]
    assert [candidate.text for candidate in records[2].candidates] == ["A cat.", "A dog."]
    assert records[2].context["messages"] == [system, question]
    assert records[2].media == records[0].media == (cat,)  # a lone path is one image
    assert records[3].candidates[1].media == (dog,)
    assert [candidate.image for candidate in records[4].candidates] == [cat, dog]
    assert records[4].split == "test"
    assert records[4].context == {"group": "g"}
    assert all(labels(record) == [("chosen", "rejected", "a")] for record in records)


def test_trl_from_parquet_with_image_structs(tmp_path: Path) -> None:
    row = {
        "prompt": "p",
        "chosen": "yes",
        "rejected": "no",
        "images": [{"bytes": png(3), "path": "x.png"}],
    }
    (record,) = read(parquet(tmp_path / "a.parquet", [row]))
    assert record.media == (Media(data=png(3)),)


def test_trl_rows_that_are_wrong(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "a.jsonl",
        [
            {"prompt": 3, "chosen": "x", "rejected": "y"},
            {"prompt": "p", "chosen": 1, "rejected": "y"},
            {"prompt": "p", "chosen": [turn("user", "x")], "rejected": "y"},
            {"prompt": "p", "chosen": "x", "rejected": "y", "images": [5]},
            {"prompt": "p", "chosen": "x", "rejected": "y", "context": "c"},
            {"chosen": "x", "rejected": "y", "id": "same"},
            {"prompt": "p", "chosen": "x", "rejected": "y", "id": "same"},
            {"prompt": "p", "chosen": "x", "rejected": "y", "id": "same"},
        ],
    )
    with file.open("a") as lines:
        lines.write('{"prompt": "p", "cho\n')
    assert problems(file) == [
        "a.jsonl row 0: prompt: expected text, got 3 (int)",
        "a.jsonl row 1: chosen: expected text, a conversation or an image, got 1 (int)",
        "a.jsonl row 2: chosen: expected a conversation that ends with a message of role 'assistant', "
        "got {'role': 'user', 'content': 'x'} (dict)",
        "a.jsonl row 3: images[0]: expected the path or the bytes of an image, got 5 (int)",
        "a.jsonl row 4: context: expected an object, got 'c'",
        "a.jsonl row 5: prompt: expected text, got nothing",
        "a.jsonl row 7: record_id: expected an id used once, got 'same', already at a.jsonl row 6",
        "a.jsonl line 9: line: expected JSON, got 'this is not JSON: Unterminated string starting at: "
        "line 1 column 17 (char 16)'",
    ]


# --- unpaired ----------------------------------------------------------------------------------------------


def test_unpaired_texts_conversations_and_pictures_keep_their_labels(tmp_path: Path) -> None:
    pictures(tmp_path, "cat.png", "dog.png")
    rows = [
        {"prompt": "What is it?", "completion": "A cat.", "label": True, "images": ["cat.png"]},
        {"prompt": [turn("user", "What?")], "completion": [turn("assistant", "A dog.")], "label": False},
        {"prompt": "a cat", "completion": "cat.png", "label": 1},
        {"prompt": "a cat", "image": "dog.png", "label": 0, "split": "test", "group": "g"},
        {"prompt": [turn("system", "Short."), turn("user", "What?")], "completion": "It.", "label": True},
    ]
    file = jsonl(tmp_path / "a.jsonl", rows)
    assert detect(file) == detect(tmp_path) == "unpaired"
    records = list(read(file, decode=True))
    cat, dog = Media(data=png(0)), Media(data=png(1))
    assert [record.candidates[0].scores for record in records] == [{"desirable": float(row["label"])} for row in rows]  # type: ignore[arg-type]  # mixed
    assert [len(record.candidates) for record in records] == [1] * 5
    assert [record.prompt for record in records] == ["What is it?", "What?", "a cat", "a cat", "What?"]
    assert [record.candidates[0].text for record in records] == ["A cat.", "A dog.", None, None, "It."]
    assert [record.candidates[0].image for record in records] == [None, None, cat, dog, None]
    assert records[0].media == (cat,) and not any(record.media for record in records[1:])
    assert (records[3].split, records[3].context) == ("test", {"group": "g"})
    assert len(records[4].context["messages"]) == 2
    (struct,) = read(
        parquet(tmp_path / "b.parquet", [{"prompt": "p", "image": {"bytes": png(3), "path": None}, "label": True}])
    )
    assert struct.candidates[0].image == Media(data=png(3))


def test_unpaired_rows_that_are_wrong(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "a.jsonl",
        [
            {"prompt": "p", "completion": "x", "label": "good"},
            {"prompt": "p", "completion": "x", "label": None},
            {"prompt": "p", "completion": None, "image": None, "label": True},
            {"prompt": 4, "completion": "x", "label": True},
            {"prompt": "p", "image": "../x.png", "label": True},
        ],
    )
    assert problems(file) == [
        "a.jsonl row 0: label: expected true or false, got 'good'",
        "a.jsonl row 1: label: expected true or false, got nothing",
        "a.jsonl row 2: image: expected the path or the bytes of an image, got nothing",
        "a.jsonl row 3: prompt: expected text, got 4 (int)",
        "a.jsonl row 4: image: expected a file inside the data folder, got '../x.png', which leaves the data folder",
    ]


# --- this project's own JSON -------------------------------------------------------------------------------


def native() -> dict[str, Any]:
    return {
        "prompt": "a cat",
        "candidates": [
            {"id": "x", "image": "0.png", "scores": {"clip": 0.5}, "model": "m", "seed": 3},
            {"id": "y", "image": "1.png", "scores": {"clip": 1}},
        ],
        "votes": [{"a": "y", "b": "x", "label": "tie", "rater": "u", "confidence": 0.9, "milliseconds": 5}],
        "split": "test",
        "licence": "CC0-1.0",
        "group": "g",
    }


def test_native_rows_and_a_folder_with_one_json_per_record(tmp_path: Path) -> None:
    pictures(tmp_path / "many" / "sub", "0.png", "1.png")
    write_json(tmp_path / "many" / "sub" / "cat.json", native())
    pair = {"prompt": "p", "chosen": "0.png", "rejected": "1.png"}
    write_json(tmp_path / "many" / "sub" / "pair.json", pair)
    assert detect(tmp_path / "many") == "records"
    cat, short = read(tmp_path / "many", decode=True)
    assert cat.record_id == "sub/cat"
    assert cat.candidates[0].scores == {"clip": 0.5}
    assert (cat.candidates[0].model, cat.candidates[0].seed) == ("m", 3)
    assert cat.candidates[1].image == Media(data=png(1))
    assert (cat.votes[0].label, cat.votes[0].rater, cat.votes[0].confidence) == ("tie", "u", 0.9)
    assert (cat.split, cat.licence, cat.context) == ("test", "CC0-1.0", {"group": "g"})
    assert labels(short) == [("chosen", "rejected", "a")]

    pictures(tmp_path / "one", "0.png", "1.png")
    file = jsonl(tmp_path / "one" / "rows.jsonl", [{**native(), "id": "n"}])
    assert detect(file) == "records"
    (row,) = read(file)
    assert row.record_id == "n"
    assert row.candidates == cat.candidates


def test_native_rows_that_are_wrong(tmp_path: Path) -> None:
    pictures(tmp_path, "0.png", "1.png")

    def changed(**changes: Any) -> dict[str, Any]:
        return {**native(), **changes}

    first = native()["candidates"][0]
    rows = [
        changed(candidates="x"),
        changed(candidates=[{**first, "scores": {"clip": "high"}}]),
        changed(candidates=[{**first, "seed": 1.5}]),
        changed(votes=[{"a": "x", "b": "y"}]),
        changed(votes=[{"a": "x", "b": "y", "label": "left"}]),
        changed(votes=[{"a": "x", "b": "z", "label": "a"}]),
        changed(votes=[{"a": "x", "b": "y", "label": "a", "confidence": "sure"}]),
        changed(votes=[{"a": "x", "b": "y", "label": "a", "milliseconds": 1.5}]),
        changed(prompt=None),
        changed(split=3),
    ]
    keys = "a, b, label and perhaps a, b, confidence, label, milliseconds, rater"
    assert problems(jsonl(tmp_path / "a.jsonl", rows)) == [
        "a.jsonl row 0: candidates: expected a list of objects, got 'x'",
        "a.jsonl row 1: candidates[0].scores: expected an object of finite numbers, got {'clip': 'high'} (dict)",
        "a.jsonl row 2: candidates[0].seed: expected a whole number, got 1.5 (float)",
        f"a.jsonl row 3: votes[0]: expected the keys {keys}, got ['a', 'b'] (list)",
        "a.jsonl row 4: votes[0].label: expected a, b or tie, got 'left'",
        "a.jsonl row 5: votes[0].b: expected the id of a candidate, got 'z'",
        "a.jsonl row 6: votes[0].confidence: expected a probability from 0.5 to 1, got 'sure'",
        "a.jsonl row 7: votes[0].milliseconds: expected a whole number, got 1.5 (float)",
        "a.jsonl row 8: prompt: expected text, got nothing",
        "a.jsonl row 9: split: expected text, got 3 (int)",
    ]


def test_sidecars_that_are_wrong(tmp_path: Path) -> None:
    pictures(tmp_path / "d" / "sub", "0.png", "1.png")
    pictures(tmp_path, "secret.png")
    write_json(tmp_path / "d" / "a.json", {})
    (tmp_path / "d" / "b.json").write_text("{")
    write_json(tmp_path / "d" / "sub" / "c.json", {"prompt": "p", "chosen": "0.png", "rejected": "../../secret.png"})
    (tmp_path / "d" / "d.json").write_bytes(b'{"prompt": "caf\xe9"}')
    assert problems(tmp_path / "d") == [
        "a.json: candidates: expected a list of objects, got nothing",
        "b.json: file: expected JSON, got this is not JSON: Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1)",
        "d.json: file: expected JSON, got this is not UTF-8 text: byte 15 is 0xe9",
        "sub/c.json: rejected: expected a file inside the data folder, "
        "got '../secret.png', which leaves the data folder",
    ]


# --- _w and _l ---------------------------------------------------------------------------------------------


def test_a_folder_of_pairs_with_every_kind_of_prompt(tmp_path: Path) -> None:
    pictures(
        tmp_path,
        "a_w.png",
        "a_l.jpg",
        "b_w.png",
        "b_l.png",
        "c_w.png",
        "c_l.png",
        "sub/d_w.png",
        "sub/d_l.png",
    )
    (tmp_path / "a.txt").write_text("from the text file\n", encoding="utf-8")
    write_json(tmp_path / "b.json", {"prompt": "from the sidecar", "group": "photo", "label": "tie"})
    jsonl(
        tmp_path / "metadata.jsonl",
        [{"file_name": "c_w.png", "prompt": "from the metadata", "split": "test"}],
    )
    assert detect(tmp_path) == "pairs_folder"
    options = ImportOptions(prompt="the default", licence="CC0-1.0")
    records = {record.record_id: record for record in read(tmp_path, options=options, decode=True)}
    assert {name: record.prompt for name, record in records.items()} == {
        "a": "from the text file",
        "b": "from the sidecar",
        "c": "from the metadata",
        "sub/d": "the default",
    }
    assert labels(records["a"]) == [("w", "l", "a")]
    assert labels(records["b"]) == [("w", "l", "tie")]
    assert records["b"].context == {"group": "photo"}
    assert records["c"].split == "test"
    assert records["a"].licence == "CC0-1.0"
    assert records["a"].candidates[0].image == Media(data=png(0))
    assert records["a"].candidates[1].image == Media(data=png(1))


def test_the_group_regex_names_the_photograph(tmp_path: Path) -> None:
    pictures(tmp_path, "cat-00_w.png", "cat-00_l.png", "cat-01_w.png", "cat-01_l.png")
    options = ImportOptions(prompt="p", group_regex=r"^(.*)-\d+$")
    assert [record.context["group"] for record in read(tmp_path, options=options)] == ["cat", "cat"]
    assert (
        problems(tmp_path, prompt="p", group_regex="^dog")
        == [
            f"{name}: record_id: expected a match of the group regex '^dog', got '{name}'"
            for name in ("cat-00", "cat-01")
        ]
        + []
    )
    assert refusal(tmp_path, group_regex="(") == (
        "the group regex does not compile: missing ), unterminated subpattern at position 0 (()"
    )


def test_a_folder_of_pairs_that_is_wrong(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    pictures(root, "a_w.png", "b_w.png", "b_w.jpg", "b_l.png", "c.png", "d_w.png", "d_l.png", "e_w.png", "e_l.png")
    pictures(root, "f_w.png", "g_w.png", "g_l.png", "h_w.png", "h_l.png")
    pictures(tmp_path, "secret.png")
    (root / "f_l.png").symlink_to(tmp_path / "secret.png")
    (root / "e_l.png").write_bytes(b"\x89PNG broken")
    (root / "g.json").write_text("[1]")
    (root / "h.txt").write_bytes(b"caf\xe9")
    for name in "abef":
        (root / f"{name}.txt").write_text("p")
    assert problems(root) == [
        "c.png: name: expected a name that ends in _w or _l, got c.png",
        "a: files: expected one a_l picture, got none",
        "b: files: expected one b_w picture, got b_w.jpg, b_w.png",
        "d: prompt: expected d.txt, d.json, a line of metadata.jsonl or --prompt, got none of them",
        "e: candidates[1].image: expected an image that opens, "
        "got 'cannot decode the image: cannot identify image file'",
        "f: _l: expected a file inside the data folder, got 'f_l.png', a link that leads out of the data folder",
        "g: g.json: expected an object, got [1] (list)",
        "h: prompt: expected UTF-8 text, got 'this is not UTF-8 text: byte 3 is 0xe9'",
    ]


def test_folders_behind_links_are_not_entered(tmp_path: Path) -> None:
    pictures(tmp_path / "outside", "x_w.png", "x_l.png")
    pictures(tmp_path / "photos", "a_w.png", "a_l.png")
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "outside")
    assert [record.record_id for record in read(tmp_path / "photos", options=ImportOptions(prompt="p"))] == ["a"]


# --- pictures with captions --------------------------------------------------------------------------------


def test_a_folder_of_captioned_pictures(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "sub/b.jpg", "c.png")
    (tmp_path / "a.txt").write_text("from the text file\n", encoding="utf-8")
    assert detect(tmp_path) == "pictures"
    jsonl(
        tmp_path / "metadata.jsonl",
        [
            {"file_name": "sub/b.jpg", "text": "from the metadata", "label": False, "split": "test", "group": "g"},
            {"file_name": "c.png", "caption": "another", "label": True, "license": "MIT"},
        ],
    )
    records = {record.record_id: record for record in read(tmp_path, decode=True)}
    assert {name: record.prompt for name, record in records.items()} == {
        "a.png": "from the text file",
        "c.png": "another",
        "sub/b.jpg": "from the metadata",
    }
    assert [dict(record.candidates[0].scores) for record in records.values()] == [
        {},
        {"desirable": 1.0},
        {"desirable": 0.0},
    ]
    assert (records["sub/b.jpg"].split, records["sub/b.jpg"].context) == ("test", {"group": "g"})
    assert records["c.png"].licence == "MIT"
    assert records["a.png"].candidates[0].image == Media(data=png(0))


def test_a_folder_of_captioned_pictures_that_is_wrong(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    pictures(root, "a.png", "b.png", "c.png", "d.png")
    pictures(tmp_path, "secret.png")
    (root / "b.txt").write_bytes(b"caf\xe9")
    (root / "c.txt").symlink_to(tmp_path / "secret.png")
    (root / "d.txt").write_text("p")
    (root / "d.png").write_bytes(b"\x89PNG broken")
    assert problems(root) == [
        "a.png: prompt: expected a.txt, a line of metadata.jsonl or --prompt, got none of them",
        "b.png: prompt: expected UTF-8 text, got 'this is not UTF-8 text: byte 3 is 0xe9'",
        "c.png: prompt: expected a file inside the data folder, got 'c.txt', a link that leads out of the data folder",
        "d.png: candidates[0].image: expected an image that opens, "
        "got 'cannot decode the image: cannot identify image file'",
    ]
    assert refusal(root / "d.png", "pictures") == f"the format 'pictures' needs a folder ({root / 'd.png'})"
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty", "pictures") == f"the folder has no pictures ({tmp_path / 'empty'})"


# --- the source as a whole ---------------------------------------------------------------------------------


def test_what_is_no_source(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"there is no such file or folder ({tmp_path / 'none'})"
    assert refusal(tmp_path / "none", "trl") == f"there is no such file or folder ({tmp_path / 'none'})"
    assert refusal(tmp_path, "pickpic") == "unknown data format 'pickpic' (format). Did you mean 'pickapic'?"
    assert refusal(tmp_path) == (
        f"the folder holds no preference data ({tmp_path}). "
        "Give a store, Parquet or JSON files, or pictures named NAME_w.png and NAME_l.png"
    )
    pictures(tmp_path, "a.png")
    assert refusal(tmp_path) == (
        f"the folder has pictures, but none is named NAME_w or NAME_l ({tmp_path}). "
        "Name each preferred picture NAME_w.png and the other one NAME_l.png"
    )
    (tmp_path / "a.csv").write_text("x")
    assert refusal(tmp_path / "a.csv") == (
        f"cannot read a '.csv' file ({tmp_path / 'a.csv'}). Known: .parquet, .json, .jsonl"
    )


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_an_empty_source(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([pick(0)]).slice(0, 0), file)
        place = "pickapic"
    else:
        file.write_text("[]" if name.endswith(".json") else "\n")
        place = "auto"
    assert refusal(file, place) == f"the source holds no rows ({file}). Give a source with data in it"


def test_options_override_and_a_store_is_a_source_too(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "y", "split": "test"}])
    store = Store.write(read(source, options=ImportOptions(split="mine")), tmp_path / "s")
    assert detect(tmp_path / "s") == "store"
    (record,) = read(tmp_path / "s")
    assert record.split == "mine"
    assert [record] == list(store.records())
