"""vlm.conversations: images in their places, templates that only append, and one line for everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
from PIL import Image

from mmalign.errors import UserError
from mmalign.media import Media
from mmalign.records import Preference, Side
from vlm.conversations import SYSTEM, VICUNA, Conversation, choose_template, conversation, conversations, render


class Processor:
    """Renders as transformers does: trimmed blocks, the special tokens by name."""

    chat_template: Any = None

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(chat_template=None)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str,
        add_generation_prompt: bool,
        tokenize: bool,
    ) -> str:
        assert not tokenize
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(chat_template)
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt, eos_token="</s>")


def image(value: int) -> Media:
    return Media.from_image(Image.new("RGB", (4, 3), (value, 0, 0)), place=f"rows.jsonl row {value}")


def side(prompt: str = "is there a cat?", images: int = 1, answer: str | Media | None = "yes") -> Side:
    return Side(prompt=prompt, media=tuple(image(index) for index in range(images)), response=answer)


def parts(made: Conversation) -> list[str]:
    """The last message, images as `#`."""
    return ["#" if part["type"] == "image" else part["text"] for part in made.messages[-1]["content"]]


def fails(cause: str, *args: Any, **named: Any) -> UserError:
    with pytest.raises(UserError, match=cause) as caught:
        conversation(*args, **{"place": "row 7", **named})
    assert "row 7" in str(caught.value) and "\n" not in str(caught.value)
    return caught.value


# ----------------------------------------------------------------------------------------------------
# Records to messages


def test_images_come_first_or_where_they_are_put() -> None:
    assert parts(conversation(side(images=0), place="row")) == ["is there a cat?"]
    assert parts(conversation(side(images=2), place="row")) == ["#", "#", "is there a cat?"]
    put = conversation(side("<image>\nis this <image> like that?", images=2), place="row")
    assert parts(put) == ["#", "is this ", "#", " like that?"]
    assert [picture.getpixel((0, 0)) for picture in put.images] == [(0, 0, 0), (1, 0, 0)]
    assert put.answer == "yes"


def test_earlier_turns() -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "is it red?"},
    ]
    made = conversation(side("is it red?"), {"messages": turns}, place="row")
    assert [message["role"] for message in made.messages] == ["system", "user", "assistant", "user"]
    assert made.messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    # Without placeholders, images go to the first thing the user says.
    plain = [{"role": m["role"], "content": "what?" if m["role"] == "user" else "so"} for m in turns]
    made = conversation(side("what?"), {"messages": plain}, place="row")
    assert [len(message["content"]) for message in made.messages] == [1, 2, 1, 1]
    # A side with a prompt of its own says that, not what its record says.
    assert parts(conversation(side("is it blue?"), {"messages": turns}, place="row")) == ["is it blue?"]


def test_a_prompt_kept_as_parts_keeps_its_images_places() -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "see "}, {"type": "image"}]}]
    assert parts(conversation(side("see"), {"messages": turns}, place="row")) == ["see ", "#"]


def test_both_sides_in_order() -> None:
    good, bad = side(answer="yes"), side(answer="no", images=2)
    preference = Preference(item_id="7/a~b", a=bad, b=good, label="b")
    chosen, rejected = conversations(preference)
    assert (chosen.answer, rejected.answer) == ("yes", "no")
    assert (len(chosen.images), len(rejected.images)) == (1, 2)
    assert (chosen.place, rejected.place) == ("7/a~b, chosen", "7/a~b, rejected")


@pytest.mark.parametrize("images", [0, 1, 3])
def test_as_many_placeholders_as_images(images: int) -> None:
    error = fails(f"2 <image> in the text and {images} image", side("<image> or <image>?", images=images))
    assert "one <image> per image" in str(error)


def test_placeholders_belong_to_the_user() -> None:
    turns = [{"role": "assistant", "content": "<image>"}, {"role": "user", "content": "and?"}]
    fails("outside the user's", side("and?"), {"messages": turns})


def test_missing_and_corrupt_images(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG and then nothing")
    for name, cause in (("gone.png", "does not exist"), ("bad.png", "cannot decode"), ("../up.png", "leaves the data")):
        media = (image(0), Media(path=name, root=str(tmp_path)))
        error = fails(cause, Side(prompt="?", media=media, response="yes"))
        assert "image 1" in str(error)


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_empty_answers(answer: str) -> None:
    fails("answer is empty", side(answer=answer))


def test_answers_are_text() -> None:
    fails("expected an answer in text", side(answer=image(0)))


@pytest.mark.parametrize(
    ("messages", "cause"),
    [
        ("hello", "list of messages"),
        ([], "list of messages"),
        (["hello"], "message of role"),
        ([{"role": "tool", "content": "x"}], "'tool'"),
        ([{"role": "user", "content": [{"type": "video"}]}], "parts of type text and image"),
        ([{"role": "user", "content": None}], "parts of type text and image"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "last message"),
    ],
)
def test_turns_that_are_none(messages: Any, cause: str) -> None:
    fails(cause, side(), {"messages": messages})


# ----------------------------------------------------------------------------------------------------
# Messages to text


def test_vicuna() -> None:
    made = render(conversation(side(), place="row"), Processor(), VICUNA)
    assert made.prompt == f"{SYSTEM} USER: <image>\nis there a cat? ASSISTANT:"
    assert made.completion == " yes</s>"
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "what is it?"},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "red?"},
    ]
    made = render(conversation(side("red?"), {"messages": turns}, place="row"), Processor(), VICUNA)
    assert made.prompt == "Be brief. USER: <image>\nwhat is it? ASSISTANT: a cat</s>USER: red? ASSISTANT:"


def test_without_an_answer_there_is_only_the_prompt() -> None:
    made = render(conversation(side(answer=None), place="row"), Processor(), VICUNA)
    assert made.prompt.endswith("ASSISTANT:") and made.completion == ""


TALK = "{% for m in messages %}{{ m['role'] }}{% for c in m['content'] %}{{ c['text'] }}{% endfor %};{% endfor %}"


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        (TALK + "{% if add_generation_prompt %}answer:{% endif %}", "not a prefix"),
        ("{{ messages | length }}", "not a prefix"),
        ("{% for m in messages %}{{ m['role'] }}:{% endfor %}", "empty after the chat template"),
        ("{{ raise_exception('no') }}", "template fails"),
        ("{% for m in messages %}", "template fails"),
        ("{{ 'USER: ' + messages[0]['content'] }}", "template fails"),
    ],
)
def test_templates_that_will_not_do(template: str, cause: str) -> None:
    with pytest.raises(UserError, match=cause) as caught:
        render(conversation(side(), place="row 7"), Processor(), template)
    assert "row 7" in str(caught.value) and "\n" not in str(caught.value)


def test_which_template() -> None:
    processor = Processor()

    def choose(wanted: str | None = None, family: str = "qwen_vl") -> str:
        return choose_template(processor, wanted=wanted, family=family, place="model.path: x")

    with pytest.raises(UserError, match=r"no chat template.*model.path"):
        choose()
    assert choose(family="llava") == VICUNA and choose(wanted="vicuna") == VICUNA
    processor.tokenizer.chat_template = {"default": "of the tokenizer", "tools": "another"}
    assert choose() == "of the tokenizer"
    processor.chat_template = "its own"
    assert choose() == choose(family="llava") == "its own"
