"""Conversations as other projects write them -> a prompt, the turns before it, and an answer.

Two spellings, `{from: human | gpt, value}` (ShareGPT, LLaVA) and `{role: user | assistant, content}` (chat templates,
whose content is a text or parts of type text and image), become one: `{role, content}`, with `<image>` in the text
where an image stands. A record has its images first unless its text says otherwise, so placeholders that only say
"first" are dropped, and the same question reads the same in every format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from mmalign.importers.common import provenance_of, row_id, with_group
from mmalign.media import Media
from mmalign.records import PLACEHOLDER, Candidate, Record, Vote, shown
from mmalign.sources import Fault, Row

Turn: TypeAlias = dict[str, str]

PREFERRED = (Vote(a="chosen", b="rejected", label="a"),)
"""The vote of a layout that says which answer is chosen."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_FIRST = re.compile(rf"\s*(?:{PLACEHOLDER}\s*)+")


def turns_of(value: Any, field: str) -> list[Turn]:
    """The messages of a conversation in either spelling.

    Raises:
        Fault: no list, an unknown role, content that is neither text nor parts of text and image.
    """
    if not isinstance(value, list) or not value:
        raise Fault(field, "a list of messages", shown(value))
    turns = []
    for index, message in enumerate(value):
        place = f"{field}[{index}]"
        if not isinstance(message, Mapping):
            raise Fault(place, "a message", shown(message))
        key = "from" if "from" in message else "role"
        role = message.get(key)
        if not isinstance(role, str) or role not in _ROLES:
            known = "human, gpt or system" if key == "from" else "user, assistant or system"
            raise Fault(f"{place}.{key}", known, shown(role))
        turns.append({"role": _ROLES[role], "content": content_of(message, place)})
    return turns


def content_of(message: Row, field: str) -> str:
    """The text of one message, image parts as placeholders."""
    key = "value" if "value" in message else "content"
    content = message.get(key)
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Fault(f"{field}.{key}", "text, or parts of type text and image", shown(content))
    pieces = []
    for index, part in enumerate(content):
        given: Row = part if isinstance(part, Mapping) else {}
        if given.get("type") == "image":
            pieces.append(PLACEHOLDER)
        elif isinstance(given.get("text"), str):
            pieces.append(given["text"])
        else:
            raise Fault(f"{field}.{key}[{index}]", "a part of type text or image", shown(part))
    return "".join(pieces)


def answer_of(value: Any, field: str) -> str:
    """An answer: text, or one message that says it.

    Raises:
        Fault: no text, an empty one, one with an image in it.
    """
    if isinstance(value, Mapping):
        value = content_of(value, field)
    if not isinstance(value, str):
        raise Fault(field, "text or a message", shown(value))
    if not value.strip():
        raise Fault(field, "an answer that is not empty", shown(value))
    if PLACEHOLDER in value:
        raise Fault(field, f"an answer without {PLACEHOLDER}", shown(value))
    return value


def answered(value: Any, field: str) -> tuple[list[Turn], str]:
    """(turns before the answer, answer) of a conversation that ends with one."""
    turns = turns_of(value, field)
    if turns[-1]["role"] != "assistant":
        raise Fault(field, "a conversation that ends with a message of role 'assistant'", shown(value[-1]))
    return turns[:-1], answer_of(turns[-1]["content"], field)


def require_same(turns: Sequence[Turn], first: Sequence[Turn], field: str, name: str) -> None:
    """A Fault unless the rejected answer follows the same turns as the chosen one.

    Args:
        field: where `turns` are from.
        name: where `first` are from.
    """
    if list(turns) == list(first):
        return
    got = f"{len(turns)} instead of {len(first)}"
    for index, (turn, wanted) in enumerate(zip(turns, first, strict=False)):
        if turn != wanted:
            got = f"{shown(turn['content'])} as {turn['role']} in turn {index}"
            break
    raise Fault(field, f"before the answer the turns of {name}", got)


def require_places(turns: Sequence[Turn], images: int, field: str, *, exact: bool = False) -> None:
    """A Fault unless there are as many placeholders as images.

    Args:
        exact: in this layout no placeholder at all does not mean that the images come first.
    """
    if any(PLACEHOLDER in turn["content"] for turn in turns if turn["role"] != "user"):
        raise Fault(field, f"{PLACEHOLDER} in the user's messages only", "another one with it")
    places = sum(turn["content"].count(PLACEHOLDER) for turn in turns)
    if places != images and (places or exact):
        raise Fault(field, f"{images} {PLACEHOLDER}, one per image", str(places or "none"))


def asked(turns: Sequence[Turn], field: str) -> list[Turn]:
    """Turns that end with the user's, without placeholders if all of them open the first message."""
    if not turns or turns[-1]["role"] != "user":
        got = shown(turns[-1]) if turns else "nothing"
        raise Fault(field, "a conversation that ends with a message of role 'user'", got)
    places = sum(turn["content"].count(PLACEHOLDER) for turn in turns)
    made = [dict(turn) for turn in turns]
    opening = next(turn for turn in made if turn["role"] == "user")
    match = _FIRST.match(opening["content"])
    if match and match.group().count(PLACEHOLDER) == places and opening["content"][match.end() :]:
        opening["content"] = opening["content"][match.end() :]
    return made


def chat_record(
    row: Row,
    name: str,
    *,
    turns: Sequence[Turn],
    media: tuple[Media, ...],
    candidates: tuple[Candidate, ...],
    votes: tuple[Vote, ...] = PREFERRED,
    source: str,
    context: dict[str, Any],
    record_id: str | None = None,
    field: str,
) -> Record:
    """The record of one question.

    Args:
        turns: up to the user's last message, the prompt.
        record_id: by default the row's name.
        field: where `turns` are from.
    """
    turns = asked(turns, field)
    context = with_group(context, media)
    if len(turns) > 1:
        context["messages"] = list(turns)
    return Record(
        record_id=record_id or row_id(name),
        prompt=turns[-1]["content"],
        media=media,
        candidates=candidates,
        votes=votes,
        context=context,
        place=name,
        **provenance_of(row, source),
    )
