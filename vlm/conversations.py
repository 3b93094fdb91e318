"""From a side of a preference to the text a model reads: chat messages, images in their places, template, answer.

The rule of every family: the template's prompt is a prefix of the template's whole conversation, and the completion
is what is left, with whatever ends an answer in that template. A template that breaks the rule is refused: cutting
by length would score the wrong tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from PIL import Image

from mmalign.errors import UserError, reason
from mmalign.media import Media
from mmalign.records import PLACEHOLDER, Preference, Side

_AROUND = re.compile(rf"\n?{PLACEHOLDER}\n?")  # the template puts its own line breaks around images
_ROLES = ("system", "user", "assistant")

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
VICUNA = (
    "{% if messages[0]['role'] != 'system' %}" + SYSTEM + " {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The conversation LLaVA-1.5 was trained on: `SYSTEM USER: <image>\\nquestion ASSISTANT: answer</s>`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What is said before the answer, the images it speaks of, and the answer.

    Args:
        messages: chat messages up to the user's last; contents are lists of `{"type": "image"}` and
            `{"type": "text", "text": ...}`.
        images: RGB, in the order of the image parts.
        answer: None to let the model answer.
        place: the row, for messages.
    """

    messages: tuple[Mapping[str, Any], ...]
    images: tuple[Image.Image, ...]
    answer: str | None
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """The template's text, cut where the model begins to speak.

    Args:
        prompt: up to and including the template's cue for the answer.
        completion: the answer and what ends it; empty without an answer.
    """

    prompt: str
    completion: str


# ----------------------------------------------------------------------------------------------------
# Records to messages


def conversations(preference: Preference) -> tuple[Conversation, Conversation]:
    """Both sides, in the order of `Preference.ordered()`: the preferred one first.

    Raises:
        UserError: see `conversation`.
    """
    first, second, _ = preference.ordered()
    names = ("chosen", "rejected") if preference.label != "tie" else ("a", "b")
    one, other = (
        conversation(side, preference.context, place=f"{preference.item_id}, {name}")
        for side, name in zip((first, second), names, strict=True)
    )
    return one, other


def conversation(side: Side, context: Mapping[str, Any] | None = None, *, place: str) -> Conversation:
    """The messages of one side.

    Args:
        context: its `messages`, where there are any, hold the turns before the prompt, and the prompt.
        place: the row, for messages.

    Raises:
        UserError: more or fewer placeholders than images, an image that is missing or damaged, an answer that is
            empty or no text, turns that are none.
    """
    if isinstance(side.response, Media):
        raise UserError("expected an answer in text, got an image", place=place, fix="Use text-to-image training")
    if side.response is not None and not side.response.strip():
        raise UserError("the answer is empty", place=place, fix="Remove the row, or give its answer")
    turns = _turns(side.prompt, (context or {}).get("messages"), place)
    return Conversation(
        messages=_with_images(turns, len(side.media), place),
        images=tuple(_open(media, index, place) for index, media in enumerate(side.media)),
        answer=side.response,
        place=place,
    )


def _turns(prompt: str, messages: Any, place: str) -> list[tuple[str, str]]:
    """(role, text with placeholders) of every turn, the prompt last."""
    if messages is None:
        return [("user", prompt)]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError("expected a list of messages", place=f"{place}, context.messages")
    turns = [_turn(message, f"{place}, context.messages[{index}]") for index, message in enumerate(messages)]
    role, text = turns[-1]
    if role != "user":
        raise UserError(
            f"the last message before the answer is of role '{role}'",
            place=f"{place}, context.messages",
            fix="It must be the user's: the prompt",
        )
    if _AROUND.sub("", text).strip() != _AROUND.sub("", prompt).strip():
        text = prompt  # of a side with a prompt of its own
    return [*turns[:-1], ("user", text)]


def _turn(message: Any, place: str) -> tuple[str, str]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in _ROLES:
        raise UserError(f"expected a message of role {', '.join(_ROLES)}, got {role!r}", place=place)
    content = message.get("content")
    if isinstance(content, str):
        return role, content
    texts = []
    for part in content if isinstance(content, Sequence) else [None]:
        given: Mapping[str, Any] = part if isinstance(part, Mapping) else {}
        kind, text = given.get("type"), given.get("text")
        if kind == "image":
            texts.append(PLACEHOLDER)
        elif kind == "text" and isinstance(text, str):
            texts.append(text)
        else:
            raise UserError("expected text, or parts of type text and image", place=f"{place}.content")
    return role, "".join(texts)


def _with_images(turns: Sequence[tuple[str, str]], images: int, place: str) -> tuple[dict[str, Any], ...]:
    placeholders = sum(text.count(PLACEHOLDER) for _, text in turns)
    if any(PLACEHOLDER in text for role, text in turns if role != "user"):
        raise UserError(f"{PLACEHOLDER} outside the user's messages", place=place)
    if placeholders not in (0, images):
        raise UserError(
            f"{placeholders} {PLACEHOLDER} in the text and {images} image{'s' * (images != 1)}",
            place=place,
            fix=f"Write one {PLACEHOLDER} per image, or none to have them first",
        )
    missing = 0 if placeholders else images
    messages = []
    for role, text in turns:
        parts: list[dict[str, str]] = []
        if role == "user":
            parts += [{"type": "image"}] * missing
            missing = 0
        for index, piece in enumerate(_AROUND.split(text)):
            parts += [{"type": "image"}] if index else []
            parts += [{"type": "text", "text": piece}] if piece else []
        messages.append({"role": role, "content": parts})
    return tuple(messages)


def _open(media: Media, index: int, place: str) -> Image.Image:
    try:
        return media.open()
    except UserError as error:
        where = f"{place}, image {index}: {error.place or media.where}"
        raise UserError(error.cause, place=where, fix=error.fix) from error


# ----------------------------------------------------------------------------------------------------
# Messages to text


def choose_template(processor: Any, *, wanted: str | None, family: str, place: str) -> str:
    """The Jinja template to render with.

    Args:
        wanted: "vicuna", or None for the processor's own.
        family: a LLaVA without a template gets the one it was trained on.

    Raises:
        UserError: there is none.
    """
    if wanted == "vicuna":
        return VICUNA
    own = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        own = own.get("default")
    if isinstance(own, str):
        return own
    if family == "llava":
        return VICUNA
    raise UserError(
        "the model has no chat template",
        place=place,
        fix="Add the chat_template.jinja it was trained with, or set model.template=vicuna",
    )


def render(conversation: Conversation, processor: Any, template: str) -> Rendered:
    """Prompt and completion as text, images still one placeholder each.

    Raises:
        UserError: the template fails, its prompt is not a prefix of prompt and answer, or it drops the answer.
    """
    place = conversation.place
    prompt = _apply(conversation.messages, processor, template, place, cue=True)
    if conversation.answer is None:
        return Rendered(prompt=prompt, completion="")
    answered = {"role": "assistant", "content": [{"type": "text", "text": conversation.answer}]}
    whole = _apply((*conversation.messages, answered), processor, template, place, cue=False)
    if not whole.startswith(prompt):
        raise UserError(
            "the chat template's prompt is not a prefix of its prompt with the answer",
            place=place,
            fix="Use a template that only appends: the answer's tokens cannot be told apart otherwise",
        )
    completion = whole[len(prompt) :]
    if conversation.answer.strip() not in completion or not conversation.answer.strip():
        raise UserError(
            "the answer is empty after the chat template",
            place=place,
            fix="Check that the answer has text and that the template prints assistant messages",
        )
    return Rendered(prompt=prompt, completion=completion)


def _apply(messages: Sequence[Mapping[str, Any]], processor: Any, template: str, place: str, *, cue: bool) -> str:
    try:
        text = processor.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template,
            add_generation_prompt=cue,
            tokenize=False,
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"the chat template fails: {reason(error)}", place=place) from error
    return str(text)
