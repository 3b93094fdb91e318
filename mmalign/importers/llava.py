"""LLaVA's layout, and the preference data that is written in it or beside it.

LLaVA's files are JSON lists of `id`, `image` (a path below --root) and `conversations`, `[{from: human, value:
"<image>\\n..."}, {from: gpt, value}, ...]`. Its loader moves the image to the front of its message, wherever it stands,
and so do these importers. Ids are those of photographs and repeat, so a record is named by its row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmalign.importers.common import ImportOptions, Scan, inputs_of, root_of
from mmalign.importers.dialogue import Turn, answer_of, answered, chat_record, require_places, require_same, turns_of
from mmalign.importers.tables import convert_rows
from mmalign.media import Media
from mmalign.records import PLACEHOLDER, Candidate, Record, Vote, shown
from mmalign.sources import Fault, Row, image_of, text_of


def llava(path: Path, options: ImportOptions) -> Scan:
    """LLaVA-Instruct (haotian-liu/LLaVA): the last answer as the one candidate, without a vote. Rows without an image
    are texts only."""
    root = root_of(path, options)

    def convert(row: Row, name: str) -> Record:
        media = inputs_of(root, row, name)
        turns, answer = answered(row["conversations"], "conversations")
        return chat_record(
            row,
            name,
            turns=_fronted(turns, media, "conversations"),
            media=media,
            candidates=(Candidate(candidate_id="answer", text=answer),),
            votes=(),
            source="llava",
            context=_kept(row, "id"),
            field="conversations",
        )

    return convert_rows(path, "llava", convert)


def povid(path: Path, options: ImportOptions) -> Scan:
    """POVID's POVID_preference_data_for_VLLMs: LLaVA rows with `rejected_conversations`, the same turns with
    another last answer."""
    root = root_of(path, options)

    def convert(row: Row, name: str) -> Record:
        media = (image_of(root, row.get("image"), "image", name),)
        turns, chosen = answered(row["conversations"], "conversations")
        other, rejected = answered(row["rejected_conversations"], "rejected_conversations")
        require_same(other, turns, "rejected_conversations", "conversations")
        return chat_record(
            row,
            name,
            turns=_fronted(turns, media, "conversations"),
            media=media,
            candidates=(
                Candidate(candidate_id="chosen", text=chosen),
                Candidate(candidate_id="rejected", text=rejected),
            ),
            source="povid",
            context=_kept(row, "id"),
            field="conversations",
        )

    return convert_rows(path, "povid", convert)


def realign(path: Path, options: ImportOptions) -> Scan:
    """Re-Align's pref_data.json: `chosen` and `rejected` conversations of {role, content} about `image`; the rejected
    answer was written looking at `retrieved_image`, which is its side's image here."""
    root = root_of(path, options)

    def convert(row: Row, name: str) -> Record:
        image = image_of(root, row.get("image"), "image", name)
        retrieved = image_of(root, row["retrieved_image"], "retrieved_image", name)
        turns, chosen = answered(row["chosen"], "chosen")
        other, rejected = answered(row["rejected"], "rejected")
        require_same(other, turns, "rejected", "chosen")
        require_places(turns, 1, "chosen")
        return chat_record(
            row,
            name,
            turns=[_front(turn) for turn in turns],
            media=(image,),
            candidates=(
                Candidate(candidate_id="chosen", text=chosen),
                Candidate(candidate_id="rejected", text=rejected, media=(retrieved,)),
            ),
            source="realign",
            context=_kept(row, "id"),
            field="chosen",
        )

    return convert_rows(path, "realign", convert)


def llava_rlhf(path: Path, options: ImportOptions) -> Scan:
    """LLaVA-RLHF's LLaVA-Human-Preference-10K: LLaVA rows with `output_1` and `output_2`, {from, value}, of which
    people preferred number `preference`. A last gpt turn of `conversations` is what the outputs stand in for."""
    root = root_of(path, options)

    def convert(row: Row, name: str) -> Record:
        media = inputs_of(root, row, name)
        turns = turns_of(row["conversations"], "conversations")
        if turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        preferred = row["preference"]
        if preferred not in (1, 2) or isinstance(preferred, bool):
            raise Fault("preference", "1 or 2", shown(preferred))
        return chat_record(
            row,
            name,
            turns=_fronted(turns, media, "conversations"),
            media=media,
            candidates=tuple(
                Candidate(candidate_id=number, text=answer_of(row[f"output_{number}"], f"output_{number}"))
                for number in "12"
            ),
            votes=(Vote(a="1", b="2", label="a" if preferred == 1 else "b"),),
            source="llava_rlhf",
            context=_kept(row, "id", "hallucination"),
            field="conversations",
        )

    return convert_rows(path, "llava_rlhf", convert)


def rlaifv(path: Path, options: ImportOptions) -> Scan:
    """openbmb/RLAIF-V-Dataset: Parquet of `image` (bytes, {bytes, path} or a path), `question`, `chosen`, `rejected`
    and where they are from. Several pairs are about one photograph: `image_path` is the group."""
    root = root_of(path, options)

    def convert(row: Row, name: str) -> Record:
        media = (image_of(root, row["image"], "image", name),)
        turns = [{"role": "user", "content": text_of(row, "question")}]
        require_places(turns, 1, "question")
        kept = _kept(row, "idx", "image_path", "ds_name", "origin_dataset", "origin_split")
        return chat_record(
            row,
            name,
            turns=turns,
            media=media,
            candidates=tuple(
                Candidate(candidate_id=side, text=answer_of(row[side], side)) for side in ("chosen", "rejected")
            ),
            source="rlaifv",
            context={"group": kept["image_path"], **kept} if "image_path" in kept else kept,
            field="question",
        )

    return convert_rows(path, "rlaifv", convert)


def _fronted(turns: list[Turn], media: tuple[Media, ...], field: str) -> list[Turn]:
    """The turns as LLaVA's loader reads them; one placeholder per image, since without it LLaVA sees no image."""
    require_places(turns, len(media), field, exact=True)
    return [_front(turn) for turn in turns]


def _front(turn: Turn) -> Turn:
    if turn["content"].count(PLACEHOLDER) != 1:  # none, or several whose places mean something
        return turn
    return {**turn, "content": f"{PLACEHOLDER}\n{turn['content'].replace(PLACEHOLDER, '').strip()}"}


def _kept(row: Row, *names: str) -> dict[str, Any]:
    """Plain values of a row that a record's context keeps."""
    return {name: row[name] for name in names if isinstance(row.get(name), str | int)}
