"""Preference data of vision-language models, in the layouts it is published in, down to the messages a model reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_sources import jsonl, labels, parquet, pictures, png, problems, refusal, turn, write_json

from mmalign import data
from mmalign.importers import IMPORTERS, ImportOptions, detect, read
from mmalign.importers.tables import COLUMNS
from mmalign.media import Media
from mmalign.pairing import Pairing, PairingSummary, make_pairs
from mmalign.preferences import Store
from mmalign.records import Record
from vlm.conversations import Conversation, conversations

CAT, DOG = 0, 1  # the reds of cat.png and dog.png
QUESTION = "What is it?"


def say(speaker: str, value: str) -> dict[str, str]:
    """A message in ShareGPT spelling."""
    return {"from": speaker, "value": value}


def llava(*answers: str, **more: Any) -> dict[str, Any]:
    """A LLaVA row: the question, and `And now?` before each further answer."""
    turns = []
    for index, answer in enumerate(answers):
        turns += [say("human", f"<image>\n{QUESTION}" if index == 0 else "And now?"), say("gpt", answer)]
    return {"id": "000000033471", "image": "cat.png", "conversations": turns, **more}


def chat(*answers: str, question: str = QUESTION) -> list[dict[str, object]]:
    """The same as chat messages."""
    turns: list[dict[str, object]] = []
    for index, answer in enumerate(answers):
        turns += [turn("user", question if index == 0 else "And now?"), turn("assistant", answer)]
    return turns


# One good row of each layout, as published: the same question, "A cat." before "A dog." where something is preferred.
ROWS: dict[str, dict[str, Any]] = {
    "llava": llava("A cat."),
    "povid": llava("A cat.", rejected_conversations=llava("A dog.")["conversations"]),
    "realign": {
        "image": "cat.png",
        "retrieved_image": "dog.png",
        "chosen": chat("A cat.", question=f"<image>\n{QUESTION}"),
        "rejected": chat("A dog.", question=f"<image>\n{QUESTION}"),
    },
    "llava_rlhf": llava(
        "An animal.",
        output_1=say("llava", "A dog."),
        output_2=say("llava", "A cat."),
        hallucination=True,
        preference=2,
    ),
    "rlaifv": {
        "ds_name": "RLAIF-V",
        "image": {"bytes": png(CAT), "path": None},
        "question": QUESTION,
        "chosen": "A cat.",
        "rejected": "A dog.",
        "origin_dataset": "LCS-558K",
        "origin_split": '{"model": "llava15"}',
        "idx": 7,
        "image_path": "a/b.jpg",
    },
    "sharegpt": {
        "conversations": [say("human", f"<image>{QUESTION}")],
        "chosen": say("gpt", "A cat."),
        "rejected": say("gpt", "A dog."),
        "images": ["cat.png"],
    },
    "swift": {
        "messages": chat("A cat.", question=f"<image>{QUESTION}"),
        "images": ["cat.png"],
        "rejected_response": "A dog.",
    },
    "trl": {
        "images": ["cat.png"],
        "prompt": [turn("user", [{"type": "image"}, {"type": "text", "text": QUESTION}])],
        "chosen": [turn("assistant", [{"type": "text", "text": "A cat."}])],
        "rejected": [turn("assistant", [{"type": "text", "text": "A dog."}])],
    },
}


def source(folder: Path, format: str, *rows: dict[str, Any]) -> Path:
    """A file as the format is published, its pictures beside it."""
    pictures(folder, "cat.png", "dog.png")
    if format == "rlaifv":
        return parquet(folder / "rows.parquet", list(rows))
    if format in ("swift", "trl"):
        return jsonl(folder / "rows.jsonl", list(rows))
    return write_json(folder / "rows.json", list(rows))


def only(folder: Path, format: str, row: dict[str, Any]) -> Record:
    """The record of one row, through the store."""
    file = source(folder, format, row)
    assert detect(file) == format
    read_now = list(read(file, decode=True))
    store = Store.write(read_now, folder / "store")
    assert list(store.records()) == read_now
    (record,) = read_now
    return record


def sides(record: Record) -> tuple[Conversation, Conversation]:
    """What a model reads of the record's only pair."""
    (pair,) = make_pairs([record], Pairing(), PairingSummary())
    return conversations(pair)


def said(made: Conversation) -> list[str]:
    """Role and content of every message, images as `#`."""
    return [
        f"{message['role']}: "
        + "".join("#" if part["type"] == "image" else part["text"] for part in message["content"])
        for message in made.messages
    ]


def reds(made: Conversation) -> list[int]:
    """Which pictures a side has."""
    return [image.getpixel((0, 0))[0] for image in made.images]  # type: ignore[index]  # RGB


# --- every layout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [name for name in ROWS if name != "llava"])
def test_a_pair_of_every_layout_reaches_the_model(tmp_path: Path, format: str) -> None:
    record = only(tmp_path, format, ROWS[format])
    assert record.prompt == QUESTION  # the same question reads the same, wherever it is from
    assert "messages" not in record.context
    assert record.source == format
    chosen, rejected = sides(record)
    assert (chosen.answer, rejected.answer) == ("A cat.", "A dog.")
    assert said(chosen) == said(rejected) == [f"user: #{QUESTION}"]
    assert reds(chosen) == [CAT]
    assert reds(rejected) == [DOG if format == "realign" else CAT]


@pytest.mark.parametrize("format", COLUMNS)
def test_the_columns_say_the_format(tmp_path: Path, format: str) -> None:
    for names in itertools.product(*COLUMNS[format]):
        assert detect(jsonl(tmp_path / "a.jsonl", [dict.fromkeys(names, "x")])) == format


@pytest.mark.parametrize("format", ROWS)
def test_published_rows_say_their_format_in_any_file(tmp_path: Path, format: str) -> None:
    row = {**ROWS[format], "split": "train", "score": 0.5}
    assert detect(parquet(tmp_path / "a.parquet", [row])) == format
    if format != "rlaifv":  # its bytes are no JSON
        assert detect(jsonl(tmp_path / "a.jsonl", [row])) == detect(write_json(tmp_path / "a.json", [row])) == format


def test_every_tabular_format_can_be_named() -> None:
    assert set(ROWS) <= set(COLUMNS) <= set(IMPORTERS)


def test_columns_of_no_format(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"alpha": 1, "beta": 2}])
    assert refusal(file).startswith(f"the columns alpha, beta are of no known format ({file}). Rename them to those of")
    file = jsonl(tmp_path / "a.jsonl", [{"conversations": [], "rejected_conversation": []}])
    assert refusal(file, "povid") == (
        "there is no column 'rejected_conversations', which the format 'povid' needs "
        f"({file}). Did you mean 'rejected_conversation'?"
    )


@pytest.mark.parametrize(
    "format, broken",
    [
        ("llava", lambda path: {"image": path}),
        ("povid", lambda path: {"image": path}),
        ("realign", lambda path: {"image": path}),
        ("realign", lambda path: {"retrieved_image": path}),
        ("llava_rlhf", lambda path: {"image": path}),
        ("rlaifv", lambda path: {"image": path}),
        ("sharegpt", lambda path: {"images": [path]}),
        ("swift", lambda path: {"images": [path]}),
        ("swift", lambda path: {"rejected_images": [{"path": path}]}),
        ("trl", lambda path: {"images": [path]}),
        ("trl", lambda path: {"rejected_images": path}),
    ],
)
def test_pictures_that_are_not_there_or_elsewhere(
    tmp_path: Path, format: str, broken: Callable[[str], dict[str, Any]]
) -> None:
    root = tmp_path / "data"
    pictures(tmp_path, "secret.png")
    pictures(root, "cat.png", "dog.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "bad.png").write_bytes(b"\x89PNG broken")
    expected = "expected a file inside the data folder, got"
    for path, got in {
        "none.png": f"{expected} 'none.png', which does not exist",
        "../secret.png": f"{expected} '../secret.png', which leaves the data folder",
        "/etc/passwd": f"{expected} the absolute path '/etc/passwd'",
        "\ud800.png": f"{expected} a path that is not valid Unicode",
        "link.png": f"{expected} 'link.png', a link that leads out of the data folder",
        "https://a.org/x.png": f"{expected} the address 'https://a.org/x.png', and nothing is fetched",
        "bad.png": "expected an image that opens, got 'cannot decode the image: cannot identify image file'",
    }.items():
        changes = broken(path)
        file = jsonl(root / "rows.jsonl", [{**ROWS[format], **changes}])
        (problem,) = problems(file)
        row, field, rest = problem.split(": ", 2)
        assert (row, rest) == (f"{file.name} row 0", got)
        assert path == "bad.png" or field.split("[")[0] == next(iter(changes))


# --- LLaVA and what is built on it --------------------------------------------------------------------------


def test_llava_answers_are_candidates_without_a_vote(tmp_path: Path) -> None:
    rows = [
        llava("A cat."),
        llava("A cat.", "Still a cat.", image="cat.png"),
        {"id": "text", "conversations": [say("human", "Hi?"), say("gpt", "Hello.")]},
        llava("A cat."),  # ids repeat: several conversations about one photograph
    ]
    rows[3]["conversations"][0]["value"] = f"{QUESTION}\n<image>"
    file = source(tmp_path, "llava", *rows)
    assert detect(file) == "llava" and problems(file) == []
    first, second, third, fourth = read(file, decode=True)
    assert [record.record_id for record in (first, second, third, fourth)] == [f"rows.json-{i}" for i in range(4)]
    assert first.candidates[0].text == "A cat." and not first.votes
    assert first.media == (Media(data=png(CAT)),) and first.context == {"group": "cat.png", "id": "000000033471"}
    assert second.candidates[0].text == "Still a cat." and second.prompt == "And now?"
    assert second.context["messages"] == [
        turn("user", QUESTION),
        turn("assistant", "A cat."),
        turn("user", "And now?"),
    ]
    assert (third.prompt, third.media, third.context) == ("Hi?", (), {"id": "text"})
    assert fourth.prompt == QUESTION  # LLaVA's loader moves the image to the front
    assert Store.write([first, second, third], tmp_path / "store").splits == {"train": 3}


def test_llava_rows_that_are_wrong(tmp_path: Path) -> None:
    file = source(
        tmp_path,
        "llava",
        llava("A cat.", image=["cat.png", "dog.png"]),
        {**llava("A cat."), "image": None},
        {"image": "cat.png", "conversations": [say("human", QUESTION), say("gpt", "A cat.")]},
        {"image": "cat.png", "conversations": [say("human", "<image>")]},
        {"image": "cat.png", "conversations": [say("gpt", "A cat.")]},
        {"image": "cat.png", "conversations": [say("bot", "<image>"), say("gpt", "A cat.")]},
        {"image": "cat.png", "conversations": "A cat."},
        {"image": "cat.png", "conversations": [say("human", "<image>"), "A cat."]},
        {"image": "cat.png", "conversations": [say("human", "<image>"), {"from": "gpt", "value": 3}]},
        llava(" "),
        llava("A <image>."),
        llava("A <image>.", "A cat."),
        {"image": 5, "conversations": []},
        llava("caf\ud800"),
        llava("A cat.", id="caf\ud800"),
    )
    assert problems(file) == [
        "rows.json row 0: conversations: expected 2 <image>, one per image, got 1",
        "rows.json row 1: conversations: expected 0 <image>, one per image, got 1",
        "rows.json row 2: conversations: expected 1 <image>, one per image, got none",
        "rows.json row 3: conversations: expected a conversation that ends with a message of role 'assistant', "
        "got {'from': 'human', 'value': '<image>'} (dict)",
        "rows.json row 4: conversations: expected 1 <image>, one per image, got none",
        "rows.json row 5: conversations[0].from: expected human, gpt or system, got 'bot'",
        "rows.json row 6: conversations: expected a list of messages, got 'A cat.'",
        "rows.json row 7: conversations[1]: expected a message, got 'A cat.'",
        "rows.json row 8: conversations[1].value: expected text, or parts of type text and image, got 3 (int)",
        "rows.json row 9: conversations: expected an answer that is not empty, got ' '",
        "rows.json row 10: conversations: expected an answer without <image>, got 'A <image>.'",
        "rows.json row 11: conversations: expected <image> in the user's messages only, got another one with it",
        "rows.json row 12: image: expected the path or the bytes of an image, got 5 (int)",
        "rows.json row 13: candidates[0].text: expected valid Unicode, got 'caf\\ud800'",
        "rows.json row 14: context: expected plain JSON values, got 'utf-8' codec can't encode character '\\ud800' in "
        "position 31: surrogates not allowed",
    ]


def test_povid_conversations_of_several_turns(tmp_path: Path) -> None:
    row = llava("A cat.", "It sleeps.", rejected_conversations=llava("A cat.", "It eats a fish.")["conversations"])
    record = only(tmp_path, "povid", row)
    chosen, rejected = sides(record)
    assert (chosen.answer, rejected.answer) == ("It sleeps.", "It eats a fish.")
    assert said(chosen) == said(rejected) == [f"user: #{QUESTION}", "assistant: A cat.", "user: And now?"]
    assert labels(record) == [("chosen", "rejected", "a")]
    assert record.context["id"] == "000000033471" and record.context["group"] == "cat.png"


def test_povid_rows_that_are_wrong(tmp_path: Path) -> None:
    other = llava("A dog.")["conversations"]
    asked = [say("human", "<image>\nWhere?"), say("gpt", "Here.")]
    file = source(
        tmp_path,
        "povid",
        {**llava("A cat.", rejected_conversations=other), "image": None},
        llava("A cat.", rejected_conversations=other[:1]),
        llava("A cat.", rejected_conversations=asked),
        llava("A cat.", "Yes.", rejected_conversations=other),
        llava("A cat.", "Yes.", rejected_conversations=llava("A dog.", "No.")["conversations"]),
        llava("A cat."),
        {"image": "cat.png", "conversations": other[1:], "rejected_conversations": other[1:]},
    )
    assert problems(file) == [
        "rows.json row 0: image: expected the path or the bytes of an image, got nothing",
        "rows.json row 1: rejected_conversations: expected a conversation that ends with a message of role "
        "'assistant', got {'from': 'human', 'value': '<image>\\nWhat is it?'} (dict)",
        "rows.json row 2: rejected_conversations: expected before the answer the turns of conversations, "
        "got '<image>\\nWhere?' as user in turn 0",
        "rows.json row 3: rejected_conversations: expected before the answer the turns of conversations, "
        "got 1 instead of 3",
        "rows.json row 4: rejected_conversations: expected before the answer the turns of conversations, "
        "got 'A dog.' as assistant in turn 1",
        "rows.json row 5: rejected_conversations: expected the column, got only conversations, id, image",
        "rows.json row 6: conversations: expected 1 <image>, one per image, got none",
    ]


def test_realign_has_the_retrieved_picture_on_the_rejected_side(tmp_path: Path) -> None:
    row = {**ROWS["realign"], "chosen": chat("A cat.", "Two."), "rejected": chat("A cat.", "Three.")}
    record = only(tmp_path, "realign", row)
    assert record.media == (Media(data=png(CAT)),)
    assert [candidate.media for candidate in record.candidates] == [None, (Media(data=png(DOG)),)]
    chosen, rejected = sides(record)
    assert said(chosen) == said(rejected) == [f"user: #{QUESTION}", "assistant: A cat.", "user: And now?"]
    assert (reds(chosen), reds(rejected)) == ([CAT], [DOG])


def test_realign_rows_that_are_wrong(tmp_path: Path) -> None:
    def row(**changes: Any) -> dict[str, Any]:
        return {**ROWS["realign"], **changes}

    file = source(
        tmp_path,
        "realign",
        row(image=None),
        row(retrieved_image=None),
        row(rejected=chat("A dog.", question="Where?")),
        row(chosen=chat("A cat.", question="<image><image>"), rejected=chat("A dog.", question="<image><image>")),
        row(chosen="A cat."),
        row(chosen=[turn("assistant", "A cat.")], rejected=[turn("assistant", "A dog.")]),
    )
    assert problems(file) == [
        "rows.json row 0: image: expected the path or the bytes of an image, got nothing",
        "rows.json row 1: retrieved_image: expected the path or the bytes of an image, got nothing",
        "rows.json row 2: rejected: expected before the answer the turns of chosen, got 'Where?' as user in turn 0",
        "rows.json row 3: chosen: expected 1 <image>, one per image, got 2",
        "rows.json row 4: chosen: expected a list of messages, got 'A cat.'",
        "rows.json row 5: chosen: expected a conversation that ends with a message of role 'user', got nothing",
    ]


def test_llava_rlhf_votes_for_the_numbered_output(tmp_path: Path) -> None:
    record = only(tmp_path, "llava_rlhf", ROWS["llava_rlhf"])
    assert labels(record) == [("1", "2", "b")]
    assert record.context == {"group": "cat.png", "id": "000000033471", "hallucination": True}
    bare = {**ROWS["llava_rlhf"], "conversations": llava("A cat.", "Yes.")["conversations"][:3], "preference": 1}
    (record,) = read(source(tmp_path / "bare", "llava_rlhf", bare))
    assert labels(record) == [("1", "2", "a")]
    chosen, _ = sides(record)
    assert said(chosen) == [f"user: #{QUESTION}", "assistant: A cat.", "user: And now?"]
    wrong = [{**ROWS["llava_rlhf"], **change} for change in ({"preference": 0}, {"preference": True}, {"output_2": ""})]
    assert problems(source(tmp_path / "wrong", "llava_rlhf", *wrong)) == [
        "rows.json row 0: preference: expected 1 or 2, got 0 (int)",
        "rows.json row 1: preference: expected 1 or 2, got True (bool)",
        "rows.json row 2: output_2: expected an answer that is not empty, got ''",
    ]


def test_rlaifv_keeps_where_a_row_is_from(tmp_path: Path) -> None:
    record = only(tmp_path, "rlaifv", ROWS["rlaifv"])
    assert record.record_id == "rows.parquet-0"
    assert record.context == {
        "group": "a/b.jpg",
        "idx": 7,
        "image_path": "a/b.jpg",
        "ds_name": "RLAIF-V",
        "origin_dataset": "LCS-558K",
        "origin_split": '{"model": "llava15"}',
    }
    bare = {**ROWS["rlaifv"], "image": png(DOG)}  # bytes instead of the struct
    (record,) = read(source(tmp_path / "bare", "rlaifv", bare), decode=True)
    assert record.media == (Media(data=png(DOG)),)


def test_rlaifv_rows_that_are_wrong(tmp_path: Path) -> None:
    def row(**changes: Any) -> dict[str, Any]:
        return {**ROWS["rlaifv"], **changes}

    file = source(
        tmp_path,
        "rlaifv",
        row(),
        row(question=None),
        row(image=None),
        row(image={"bytes": b"broken", "path": None}),
        row(chosen=None),
        row(rejected=" "),
        row(question="<image><image> both?"),
        row(question=" "),
    )
    assert problems(file) == [
        "rows.parquet row 1: question: expected text, got nothing",
        "rows.parquet row 2: image: expected the path or the bytes of an image, got nothing",
        "rows.parquet row 3: media[0]: expected an image that opens, "
        "got 'cannot decode the image: cannot identify image file'",
        "rows.parquet row 4: chosen: expected text or a message, got nothing",
        "rows.parquet row 5: rejected: expected an answer that is not empty, got ' '",
        "rows.parquet row 6: question: expected 1 <image>, one per image, got 2",
        "rows.parquet row 7: prompt: expected text that is not empty, got ' '",
    ]


# --- the training libraries --------------------------------------------------------------------------------


def test_sharegpt_with_a_system_prompt_and_images_in_their_places(tmp_path: Path) -> None:
    row = {
        **ROWS["sharegpt"],
        "conversations": [
            say("human", "<image> or <image>?"),
            say("gpt", "The first."),
            say("human", "Why?"),
        ],
        "system": "Be short.",
        "images": ["cat.png", "dog.png"],
    }
    chosen, _ = sides(only(tmp_path, "sharegpt", row))
    assert said(chosen) == ["system: Be short.", "user: # or #?", "assistant: The first.", "user: Why?"]
    assert reds(chosen) == [CAT, DOG]


def test_sharegpt_rows_that_are_wrong(tmp_path: Path) -> None:
    def row(**changes: Any) -> dict[str, Any]:
        return {**ROWS["sharegpt"], **changes}

    file = source(
        tmp_path,
        "sharegpt",
        row(images=["cat.png", "dog.png"]),
        row(images=None),
        row(conversations=[say("human", QUESTION)]),
        row(conversations=llava("A cat.")["conversations"]),
        row(conversations=[say("observation", "x")]),
        row(chosen=3),
        row(rejected={"from": "gpt"}),
        row(system=3),
    )
    assert problems(file) == [
        "rows.json row 0: conversations: expected 2 <image>, one per image, got 1",
        "rows.json row 1: conversations: expected 0 <image>, one per image, got 1",
        "rows.json row 2: conversations: expected 1 <image>, one per image, got none",
        "rows.json row 3: conversations: expected a conversation that ends with a message of role 'user', "
        "got {'role': 'assistant', 'content': 'A cat.'} (dict)",
        "rows.json row 4: conversations[0].from: expected human, gpt or system, got 'observation'",
        "rows.json row 5: chosen: expected text or a message, got 3 (int)",
        "rows.json row 6: rejected.content: expected text, or parts of type text and image, got nothing",
        "rows.json row 7: system: expected text, got 3 (int)",
    ]


@pytest.mark.parametrize(
    "changes, answer, images, asked",
    [
        ({"rejected_response": "A dog."}, "A dog.", [CAT], QUESTION),
        ({"rejected_images": ["dog.png"]}, "A cat.", [DOG], QUESTION),
        ({"rejected_images": "dog.png", "rejected_response": None}, "A cat.", [DOG], QUESTION),
        ({"rejected_images": ["dog.png"], "rejected_response": "A dog."}, "A dog.", [DOG], QUESTION),
        ({"rejected_images": [], "rejected_response": "A dog."}, "A dog.", [CAT], QUESTION),
        (
            {"rejected_messages": chat("A dog.", question="<image>Who?"), "rejected_images": ["dog.png"]},
            "A dog.",
            [DOG],
            "Who?",
        ),
        ({"rejected_messages": chat("A dog.", question=f"<image>{QUESTION}")}, "A dog.", [CAT], QUESTION),
        (
            {
                "rejected_messages": chat("A dog.", question="<image><image>Who?"),
                "rejected_images": ["dog.png", "cat.png"],
            },
            "A dog.",
            [DOG, CAT],
            "Who?",
        ),
    ],
)
def test_swift_rejects_a_text_images_or_both(
    tmp_path: Path, changes: dict[str, Any], answer: str, images: list[int], asked: str
) -> None:
    row = {"messages": ROWS["swift"]["messages"], "images": ["cat.png"], **changes}
    chosen, rejected = sides(only(tmp_path, "swift", row))
    assert (chosen.answer, said(chosen), reds(chosen)) == ("A cat.", [f"user: #{QUESTION}"], [CAT])
    assert (rejected.answer, reds(rejected)) == (answer, images)
    assert said(rejected) == [f"user: {'#' * len(images)}{asked}"]


def test_swift_from_parquet_with_bytes_and_earlier_turns(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [turn("system", "Be short."), *chat("A cat.", "It sleeps.", question=f"{QUESTION}<image>")],
            "images": [{"bytes": png(CAT), "path": None}],
            "rejected_response": "It eats.",
            "rejected_images": [{"bytes": png(DOG), "path": None}],
        },
        {
            "messages": chat("A cat."),
            "images": [{"bytes": None, "path": "cat.png"}],
            "rejected_response": "A dog.",
            "rejected_images": None,
        },
    ]
    pictures(tmp_path, "cat.png")
    first, second = read(parquet(tmp_path / "rows.parquet", rows), decode=True)
    chosen, rejected = sides(first)
    turns = ["system: Be short.", f"user: {QUESTION}#", "assistant: A cat.", "user: And now?"]
    assert said(chosen) == said(rejected) == turns
    assert (reds(chosen), reds(rejected)) == ([CAT], [DOG])
    assert second.prompt == QUESTION and second.candidates[1].media is None


def test_swift_rows_that_are_wrong(tmp_path: Path) -> None:
    def row(**changes: Any) -> dict[str, Any]:
        return {**ROWS["swift"], **changes}

    file = source(
        tmp_path,
        "swift",
        row(rejected_response="A cat."),
        row(rejected_response=None),
        row(messages=chat("A cat.")[:1]),
        row(messages=chat("A cat.", question="<image><image>")),
        row(rejected_images=["cat.png", "dog.png"]),
        row(rejected_messages=chat("A dog.", "No.")),
        row(rejected_messages=[turn("assistant", "A dog.")]),
        row(messages=[turn("tool", "x"), *chat("A cat.")]),
        {"messages": chat("A cat."), "images": ["cat.png"]},
        row(rejected_response=["A dog."]),
    )
    assert problems(file) == [
        "rows.jsonl row 0: rejected_response: expected an answer that differs from the chosen one, got 'A cat.'",
        "rows.jsonl row 1: rejected_response: expected an answer that differs from the chosen one, got 'A cat.'",
        "rows.jsonl row 2: messages: expected a conversation that ends with a message of role 'assistant', "
        "got {'role': 'user', 'content': 'What is it?'} (dict)",
        "rows.jsonl row 3: messages: expected 1 <image>, one per image, got 2",
        "rows.jsonl row 4: rejected_images: expected 2 <image>, one per image, got 1",
        "rows.jsonl row 5: rejected_messages: expected before the answer the turns of messages, got 2 instead of 0",
        "rows.jsonl row 6: rejected_messages: expected a conversation that ends with a message of role 'user', "
        "got nothing",
        "rows.jsonl row 7: messages[0].role: expected user, assistant or system, got 'tool'",
        "rows.jsonl row 8: rejected_response: expected the column, got only images, messages",
        "rows.jsonl row 9: rejected_response: expected text or a message, got ['A dog.'] (list)",
    ]


def test_trl_images_stand_where_their_parts_do(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Is"}, {"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]
    two = [{"bytes": png(CAT), "path": None}, {"bytes": png(DOG), "path": None}]
    row = {"images": two, "prompt": [turn("user", parts)], "chosen": chat("Yes.")[1:], "rejected": chat("No.")[1:]}
    (record,) = read(parquet(tmp_path / "rows.parquet", [row]), decode=True)
    chosen, _ = sides(record)
    assert (said(chosen), reds(chosen)) == (["user: Is#or#"], [CAT, DOG])
    pictures(tmp_path, "cat.png", "dog.png")
    row = {"image": "cat.png", "rejected_images": ["dog.png"], "chosen": chat("Yes."), "rejected": chat("Yes.")}
    (record,) = read(jsonl(tmp_path / "rows.jsonl", [row]), decode=True)
    chosen, rejected = sides(record)
    assert said(chosen) == said(rejected) == [f"user: #{QUESTION}"]
    assert (reds(chosen), reds(rejected)) == ([CAT], [DOG])
    (record,) = read(jsonl(tmp_path / "rows.jsonl", [{**row, "prompt": QUESTION}]))  # beside whole conversations
    assert (record.prompt, record.context) == (QUESTION, {"group": "cat.png"})


def test_trl_vision_rows_that_are_wrong(tmp_path: Path) -> None:
    def row(**changes: Any) -> dict[str, Any]:
        return {**ROWS["trl"], **changes}

    file = source(
        tmp_path,
        "trl",
        row(images=["cat.png", "dog.png"]),
        row(images=[]),
        row(rejected_images=["cat.png", "dog.png"]),
        row(chosen=chat("A cat.")),
        row(prompt=[turn("user", [{"type": "video"}])]),
        row(prompt=[turn("user", QUESTION), turn("assistant", "A cat.")]),
        row(chosen=[turn("assistant", [{"type": "image"}])]),
        row(prompt=None, chosen=chat("A cat."), rejected=chat("A dog.", question="Where?")),
        row(chosen=""),
    )
    assert problems(file) == [
        "rows.jsonl row 0: prompt: expected 2 <image>, one per image, got 1",
        "rows.jsonl row 1: prompt: expected 0 <image>, one per image, got 1",
        "rows.jsonl row 2: rejected_images: expected 2 <image>, one per image, got 1",
        "rows.jsonl row 3: rejected: expected before the answer the turns of chosen, got 0 instead of 1",
        "rows.jsonl row 4: prompt[0].content[0]: expected a part of type text or image, got {'type': 'video'} (dict)",
        "rows.jsonl row 5: prompt: expected a conversation that ends with a message of role 'user', "
        "got {'role': 'assistant', 'content': 'A cat.'} (dict)",
        "rows.jsonl row 6: chosen: expected an answer without <image>, got '<image>'",
        "rows.jsonl row 7: rejected: expected before the answer the turns of chosen, got 'Where?' as user in turn 0",
        "rows.jsonl row 8: chosen: expected an answer that is not empty, got ''",
    ]
    both = row(chosen=chat("A cat."), rejected=chat("A dog."))
    assert problems(source(tmp_path, "trl", both)) == [
        "rows.jsonl row 0: chosen: expected the answer alone, beside a prompt of its own, got 2 messages"
    ]


# --- the command -------------------------------------------------------------------------------------------


def test_import_puts_a_photographs_questions_into_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{index}.png" for index in range(8)]
    pictures(tmp_path / "coco", *names)
    other = llava("A dog.")["conversations"]
    rows = [llava("A cat.", image=name, rejected_conversations=other) for name in names for _ in range(2)]
    file = write_json(tmp_path / "povid.json", [*rows, llava("A cat.", image="none.png", rejected_conversations=other)])
    command = ["import", str(file), "--root", str(tmp_path / "coco"), "--out", str(tmp_path / "store")]
    assert data.main([*command, "--split-fraction", "heldout=0.5", "--max-bad", "1"]) == 0
    printed = capsys.readouterr()
    assert "16 records from povid" in printed.out and "1 wrong rows left out" in printed.out
    assert "povid.json row 16: image: expected a file inside the data folder" in printed.err
    splits: dict[str, set[str]] = {}
    for record in Store.open(tmp_path / "store").records():
        splits.setdefault(str(record.context["group"]), set()).add(record.split)
    assert all(len(found) == 1 for found in splits.values()) and set().union(*splits.values()) == {"train", "heldout"}
    assert data.main(["check", str(file), "--root", str(tmp_path / "coco")]) == 2


def test_options_still_override(tmp_path: Path) -> None:
    file = source(tmp_path, "povid", ROWS["povid"])
    options = ImportOptions(split="test", licence="CC-BY-4.0", group_regex="^(rows)")
    (record,) = read(file, options=options)
    assert (record.split, record.licence, record.context["group"]) == ("test", "CC-BY-4.0", "rows")
