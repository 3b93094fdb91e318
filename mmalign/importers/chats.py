"""Rows of the training libraries: TRL, ms-swift and LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmalign.importers.common import ImportOptions, Scan, desirable, id_of, inputs_of, root_of
from mmalign.importers.dialogue import (
    Turn,
    answer_of,
    answered,
    asked,
    chat_record,
    require_places,
    require_same,
    turns_of,
)
from mmalign.importers.tables import convert_rows
from mmalign.media import Media
from mmalign.records import Candidate, Record, shown
from mmalign.sources import Fault, Row, context_of, image_of, images_of, is_image, text_of


def trl(path: Path, options: ImportOptions) -> Scan:
    """TRL's preference columns: prompt, chosen and rejected as strings or as conversations, `images` of the prompt, and
    here `rejected_images` of the rejected side; or, text-to-image, chosen and rejected as images. Conversations may
    begin with the prompt."""
    root = root_of(path, options)

    def convert(row: Row, name: str) -> Record:
        media = inputs_of(root, row, name)
        before, chosen = _response(root, row["chosen"], "chosen", name)
        other, rejected = _response(root, row["rejected"], "rejected", name)
        require_same(other, before, "rejected", "chosen")
        turns = _prompt_turns(row.get("prompt"), before, "chosen", options)
        second = _rejected_images(root, row, name)
        if chosen.text is not None:
            require_places(turns, len(media), "prompt")
            require_places(turns, len(media if second is None else second), "rejected_images")
        return chat_record(
            row,
            name,
            turns=turns,
            media=media,
            candidates=(chosen, replace(rejected, media=second)),
            source="trl",
            context=context_of(row),
            record_id=id_of(row, name),
            field="prompt",
        )

    return convert_rows(path, "trl", convert)


def unpaired(path: Path, options: ImportOptions) -> Scan:
    """TRL's columns for KTO: prompt, one completion (text, conversation or image) and whether it is a good one.
    Pictures made from a prompt may be called image; beside a completion, image and images belong to the prompt."""
    root = root_of(path, options)

    def convert(row: Row, name: str) -> Record:
        media: tuple[Media, ...] = ()
        before: list[Turn] = []
        if row.get("completion") is None:
            candidate = Candidate(candidate_id="image", image=image_of(root, row.get("image"), "image", name))
        else:
            media = inputs_of(root, row, name)
            before, candidate = _response(root, row["completion"], "completion", name)
        turns = _prompt_turns(row.get("prompt"), before, "completion", options)
        if candidate.text is not None:
            require_places(turns, len(media), "prompt")
        return chat_record(
            row,
            name,
            turns=turns,
            media=media,
            candidates=(replace(candidate, scores=desirable(row)),),
            votes=(),
            source="unpaired",
            context=context_of(row),
            record_id=id_of(row, name),
            field="prompt",
        )

    return convert_rows(path, "unpaired", convert)


def swift(path: Path, options: ImportOptions) -> Scan:
    """ms-swift's rows: `messages`, whose last one is the chosen answer, about `images`. What is rejected is a text
    (`rejected_response`), a whole conversation (`rejected_messages`, which may ask another last question), the same
    answer about other images (`rejected_images`), or a text and images."""
    root = root_of(path, options)

    def convert(row: Row, name: str) -> Record:
        media = inputs_of(root, row, name)
        turns, chosen = answered(row["messages"], "messages")
        second = _rejected_images(root, row, name)
        others, rejected = turns, chosen
        if row.get("rejected_messages") is not None:
            others, rejected = answered(row["rejected_messages"], "rejected_messages")
        elif row.get("rejected_response") is not None:
            rejected = answer_of(row["rejected_response"], "rejected_response")
        if (others, rejected) == (turns, chosen) and second is None:
            raise Fault("rejected_response", "an answer that differs from the chosen one", shown(rejected))
        require_places(turns, len(media), "messages")
        require_places(others, len(media if second is None else second), "rejected_images")
        turns, others = asked(turns, "messages"), asked(others, "rejected_messages")
        require_same(others[:-1], turns[:-1], "rejected_messages", "messages")
        prompt = others[-1]["content"]
        return chat_record(
            row,
            name,
            turns=turns,
            media=media,
            candidates=(
                Candidate(candidate_id="chosen", text=chosen),
                Candidate(
                    candidate_id="rejected",
                    text=rejected,
                    prompt=None if prompt == turns[-1]["content"] else prompt,
                    media=second,
                ),
            ),
            source="swift",
            context=context_of(row),
            record_id=id_of(row, name),
            field="messages",
        )

    return convert_rows(path, "swift", convert)


def sharegpt(path: Path, options: ImportOptions) -> Scan:
    """LLaMA-Factory's ranking data in ShareGPT spelling: `conversations` that end with the question, `chosen` and
    `rejected` as {from, value}, `images` with one <image> each, perhaps `system`."""
    root = root_of(path, options)

    def convert(row: Row, name: str) -> Record:
        media = inputs_of(root, row, name)
        turns = turns_of(row["conversations"], "conversations")
        if row.get("system"):
            turns = [{"role": "system", "content": text_of(row, "system")}, *turns]
        require_places(turns, len(media), "conversations", exact=True)
        return chat_record(
            row,
            name,
            turns=turns,
            media=media,
            candidates=tuple(
                Candidate(candidate_id=side, text=answer_of(row[side], side)) for side in ("chosen", "rejected")
            ),
            source="sharegpt",
            context=context_of(row),
            record_id=id_of(row, name),
            field="conversations",
        )

    return convert_rows(path, "sharegpt", convert)


def _prompt_turns(value: Any, before: list[Turn], field: str, options: ImportOptions) -> list[Turn]:
    """The turns of a prompt, which is a string, a conversation, or what the answers' conversations begin with."""
    if isinstance(value, list):
        if before:
            raise Fault(field, "the answer alone, beside a prompt of its own", f"{len(before) + 1} messages")
        return turns_of(value, "prompt")
    if before:
        return before
    text = text_of({"prompt": options.prompt if value is None else value}, "prompt")
    return [{"role": "user", "content": text}]


def _response(root: Path, value: Any, field: str, name: str) -> tuple[list[Turn], Candidate]:
    """(turns before the answer, answer); an answer that is an image path or an image struct is a picture."""
    if isinstance(value, list):
        before, text = answered(value, field)
        return before, Candidate(candidate_id=field, text=text)
    looks_like_path = isinstance(value, str) and is_image(value) and "\n" not in value
    if isinstance(value, Mapping) or looks_like_path:
        return [], Candidate(candidate_id=field, image=image_of(root, value, field, name))
    if not isinstance(value, str):
        raise Fault(field, "text, a conversation or an image", shown(value))
    return [], Candidate(candidate_id=field, text=answer_of(value, field))


def _rejected_images(root: Path, row: Row, name: str) -> tuple[Media, ...] | None:
    """None where the rejected side has the chosen one's; so does an empty list, which is how Parquet writes nothing."""
    return images_of(root, row.get("rejected_images"), "rejected_images", name) or None
