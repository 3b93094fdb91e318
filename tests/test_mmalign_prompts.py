"""Prompt lists: from text, JSON lines and the embedded world, with the wrong line named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmalign.errors import UserError
from mmalign.prompts import COMPOSED_FILE, is_list, read_prompts
from mmalign.shapes import scenes


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return str(folder / name)


def test_text_and_json_lines_are_read_in_their_order(tmp_path: Path) -> None:
    text = write(tmp_path, "a.txt", "a fox \n ein Fuchs\nлиса\n")
    assert read_prompts(text) == ["a fox", "ein Fuchs", "лиса"]
    rows = write(tmp_path, "a.jsonl", '{"prompt": "one"}\n{"caption": "two", "id": 2}\n{"text": " three "}\n')
    assert read_prompts(rows) == ["one", "two", "three"]
    rows = write(tmp_path, "b.jsonl", '{"prompt": "one\u2028more"}\r\n{"prompt": "two\x85"}')
    assert read_prompts(rows) == ["one\u2028more", "two"]


def test_lists_are_read_as_benchmarks_publish_them(tmp_path: Path) -> None:
    parti = 'Prompt\tCategory\tChallenge\tNote\n"STOP" on a sign\tVehicles\tBasic\t\na "fox, a hare\tAnimals\tBasic\t\n'
    assert read_prompts(write(tmp_path, "PartiPrompts.tsv", parti)) == ['"STOP" on a sign', 'a "fox, a hare']
    drawbench = '\ufeffCategory,Prompts\r\nText,"a sign that says ""STOP"", red"\r\nColors,a red fox\r\n'
    assert read_prompts(write(tmp_path, "drawbench.csv", drawbench)) == ['a sign that says "STOP", red', "a red fox"]
    assert read_prompts(write(tmp_path, "anime.json", '["one", {"prompt": "two"}]')) == ["one", "two"]
    geneval = '{"tag": "counting", "include": [{"class": "fox", "count": 2}], "prompt": "two foxes"}\n'
    assert read_prompts(write(tmp_path, "evaluation_metadata.jsonl", geneval)) == ["two foxes"]


def test_a_list_is_told_from_a_text() -> None:
    assert all(map(is_list, ("shapes:heldout", "PartiPrompts.tsv", "a.txt", "a.json", "b.jsonl", "c.csv")))
    assert not any(map(is_list, ("a fox", "shapes", "a.png")))


def test_some_of_them_are_drawn_by_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\n".join(f"prompt {n}" for n in range(50)))
    drawn = read_prompts(path, 10, seed=1)
    assert len(set(drawn)) == 10
    assert drawn == read_prompts(path, 10, seed=1) != read_prompts(path, 10, seed=2)
    assert drawn[:4] == read_prompts(path, 4, seed=1)  # more prompts begin with the fewer
    with pytest.raises(UserError, match=r"51 prompts asked for, there are 50 \(.*a.txt\)"):
        read_prompts(path, 51)


def test_the_embedded_world_splits_without_overlap() -> None:
    train, heldout = read_prompts("shapes:train"), read_prompts("shapes:heldout")
    assert not set(train) & set(heldout)
    assert len(set(train + heldout)) == len(train) + len(heldout) == len(scenes.every_scene())
    assert all(scenes.parse(prompt) for prompt in read_prompts("shapes:heldout", 5, seed=3))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "fox\n\nhare\n", r"empty prompt \(.*a.txt:2\)\. Remove it\."),
        ("a.txt", "fox\nhare\nfox \n", r"the prompt of a.txt:1 again \(.*a.txt:3\)"),
        ("a.txt", "", r"no prompts \(.*a.txt\)"),
        ("a.txt", "fo\udcffx\n", r"cannot read prompts: .*utf-8.*\(.*a.txt\)"),
        ("a.jsonl", '{"prompt": "fox"}\nfox\n', r"not JSON: .*\(.*a.jsonl:2\)"),
        ("a.jsonl", '{"prompt": 3}\n', r"a row needs a text field prompt or caption or text \(.*a.jsonl:1\)"),
        ("a.jsonl", '{"words": "fox"}\n', r"a row needs a text field"),
        ("a.jsonl", '["prompt"]\n', r"a row needs a text field"),
        ("a.jsonl", '{"prompt": "  "}\n', r"empty prompt \(.*a.jsonl:1\)"),
        ("a.json", '["fox", {"words": "hare"}]', r"a row needs a text field .*\(.*a.json:2\)"),
        ("a.json", '{"prompt": "fox"}', r"expected a list of prompts \(.*a.json\)"),
        ("a.json", '["fox"', r"not JSON: .*\(.*a.json\)"),
        ("a.json", "[" * 100_000, r"not JSON: .*recursion.*\(.*a.json\)"),
        ("a.json", '["fox", "\\ud800"]', r"not valid Unicode: surrogates not allowed \(.*a.json:2\)"),
        (
            "a.tsv",
            "Name\tCategory\nfox\tAnimals\n",
            r"no column prompt .*\(.*a.tsv:1\)\. The first line names columns\.",
        ),
        ("a.tsv", "", r"no column prompt"),
        ("a.tsv", "Category\tPrompt\nAnimals\n", r"empty prompt \(.*a.tsv:2\)"),
        ("a.csv", 'Prompts\n"fox\n', r"not a table: .*\(.*a.csv:2\)"),
        ("a.csv", "Prompts\nfox\nfox\n", r"the prompt of a.csv:2 again \(.*a.csv:3\)"),
    ],
)
def test_the_wrong_line_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read prompts: .*No such file"):
        read_prompts(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match=r"no prompt list 'parti'\. Known: composed, .* Or give a file\."):
        read_prompts("parti")
    with pytest.raises(UserError, match=r"no prompt list 'shapes:trian'\. Did you mean 'shapes:train'\?"):
        read_prompts("shapes:trian")


def test_endings_may_shout(tmp_path: Path) -> None:
    shouted = write(tmp_path, "PARTI.TSV", 'Prompt\tCategory\na "fox"\tAnimals\n')
    assert is_list(shouted) and read_prompts(shouted) == ['a "fox"']


def test_the_bundled_list_is_what_genevals_rules_read(tmp_path: Path) -> None:
    from evaluators.geneval import read_pictures

    rows = [json.loads(line) for line in COMPOSED_FILE.read_text(encoding="utf-8").splitlines()]
    every = read_prompts("composed")
    assert len(set(every)) == len(every) == 300 and every == [row["prompt"] for row in rows]
    counting = read_prompts("composed:counting")
    assert (
        len(counting) == 50 and set(counting) < set(every) and read_prompts("composed:counting", 5, 1) != counting[:5]
    )
    assert is_list("composed") and is_list("composed:colors") and not is_list("composed by nobody")
    file = tmp_path / "detections.jsonl"
    file.write_text("".join(json.dumps({**row, "detections": []}) + "\n" for row in rows))
    pictures = list(read_pictures(file))
    assert len(pictures) == 300 and {picture.tag for picture in pictures} == {row["tag"] for row in rows}
    for picture in pictures:
        for wanted in picture.include:
            assert wanted.name.split()[-1][:2] in picture.prompt  # "knives", "mice": the beginning at least
            assert wanted.color is None or wanted.color in picture.prompt
    with pytest.raises(UserError, match=r"no task 'countin'.*counting"):
        read_prompts("composed:countin")
