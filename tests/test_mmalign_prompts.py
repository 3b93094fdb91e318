"""Prompt lists: from text, JSON lines and the embedded world, with the wrong line named."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmalign.errors import UserError
from mmalign.prompts import read_prompts
from mmalign.shapes import scenes


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return str(folder / name)


def test_text_and_json_lines_are_read_in_their_order(tmp_path: Path) -> None:
    text = write(tmp_path, "a.txt", "a fox \n ein Fuchs\nлиса\n")
    assert read_prompts(text) == ["a fox", "ein Fuchs", "лиса"]
    rows = write(tmp_path, "a.jsonl", '{"prompt": "one"}\n{"caption": "two", "id": 2}\n{"text": " three "}\n')
    assert read_prompts(rows) == ["one", "two", "three"]


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
        ("a.txt", "fox\n\nhare\n", r"empty prompt \(.*a.txt:2\)\. Remove the line\."),
        ("a.txt", "fox\nhare\nfox \n", r"the prompt of line 1 again \(.*a.txt:3\)"),
        ("a.txt", "", r"no prompts \(.*a.txt\)"),
        ("a.txt", "fo\udcffx\n", r"cannot read prompts: .*utf-8.*\(.*a.txt\)"),
        ("a.jsonl", '{"prompt": "fox"}\nfox\n', r"not JSON: .*\(.*a.jsonl:2\)"),
        ("a.jsonl", '{"prompt": 3}\n', r"a row needs a text field prompt or caption or text \(.*a.jsonl:1\)"),
        ("a.jsonl", '{"words": "fox"}\n', r"a row needs a text field"),
        ("a.jsonl", '["prompt"]\n', r"a row needs a text field"),
        ("a.jsonl", '{"prompt": "  "}\n', r"empty prompt \(.*a.jsonl:1\)"),
    ],
)
def test_the_wrong_line_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read prompts: .*No such file"):
        read_prompts(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match=r"no prompt list 'shapes:trian'\. Did you mean 'shapes:train'\?"):
        read_prompts("shapes:trian")
