"""Published formats and folders of one's own pictures -> records.

    store         a folder written by `mmalign data import`
    pickapic      Parquet with caption, jpg_0, jpg_1, label_0 (Pick-a-Pic v1, v2 and their copies)
    hpd           JSON with prompt, image_path or file_path, human_preference or rank (HPDv2 and the like)
    trl           prompt, chosen, rejected (+ images, rejected_images) as TRL has them; texts, conversations or images
    unpaired      the same with prompt, completion (or image) and label, true or false: TRL's for KTO
    swift         ms-swift: messages, images and rejected_response, rejected_messages or rejected_images
    sharegpt      LLaMA-Factory's ranking data: conversations, chosen, rejected, images
    povid         POVID: LLaVA's image and conversations, and rejected_conversations
    realign       Re-Align: image, retrieved_image, chosen, rejected
    llava_rlhf    LLaVA-RLHF: LLaVA's image and conversations, output_1, output_2, preference
    rlaifv        RLAIF-V's Parquet: image, question, chosen, rejected
    llava         LLaVA-Instruct: image, conversations; true answers, nothing preferred
    records       JSON or JSONL rows with prompt, candidates, votes; or a folder with one such JSON per record
    pairs_folder  pictures named NAME_w.png (preferred) and NAME_l.png
    pictures      pictures with captions: NAME.txt beside NAME.png, or metadata.jsonl (+ label, true or false)
    votes         the SQLite file of `mmalign arena`, beside the pictures that were voted on

Any table may be JSON, JSONL or Parquet. A label becomes the score `desirable`, 1 or 0. `scan` yields a `Problem` where
a row cannot be read, so that a check can list them all; `read` stops at the first one, or hands it to `on_problem` and
goes on. Nothing is fetched and no path leaves its folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from mmalign.errors import UserError, nearest
from mmalign.importers import chats, folders, llava, native, rankings, votes
from mmalign.importers.common import ImportOptions, Scan
from mmalign.importers.folders import SIDE
from mmalign.importers.tables import detect_columns
from mmalign.preferences import MANIFEST
from mmalign.records import Problem, Record, check_record, shown
from mmalign.sources import files_below, is_image, parse_json, table_files

__all__ = ["IMPORTERS", "ImportOptions", "detect", "read", "scan"]

IMPORTERS: dict[str, Callable[[Path, ImportOptions], Scan]] = {
    "store": native.store,
    "pickapic": rankings.pickapic,
    "hpd": rankings.hpd,
    "trl": chats.trl,
    "unpaired": chats.unpaired,
    "swift": chats.swift,
    "sharegpt": chats.sharegpt,
    "povid": llava.povid,
    "realign": llava.realign,
    "llava_rlhf": llava.llava_rlhf,
    "rlaifv": llava.rlaifv,
    "llava": llava.llava,
    "records": native.records,
    "pairs_folder": folders.pairs_folder,
    "pictures": folders.pictures,
    "votes": votes.votes,
}


def detect(path: str | Path) -> str:
    """The format of a source, from its files and column names.

    Raises:
        UserError: nothing there, or nothing that looks like a known format; then the message names the
            closest format and the column it misses.
    """
    path = Path(path)
    if not path.exists():
        raise UserError("there is no such file or folder", place=str(path))
    if path.is_file():
        return "votes" if votes.is_votes(path) else detect_columns(path)
    if (path / MANIFEST).exists():
        return "store"
    files = files_below(path)
    tables = table_files(path)
    if tables and tables[0].suffix in (".parquet", ".jsonl"):
        return detect_columns(tables[0])
    if any(is_image(name) and SIDE.fullmatch(Path(name).stem) for name in files):
        return "pairs_folder"
    if tables:  # one list of rows, or one object per record
        rows = parse_json(tables[0].read_bytes(), str(tables[0]))
        return detect_columns(tables[0]) if isinstance(rows, list) else "records"
    if any(is_image(name) for name in files):
        captions = {"metadata.jsonl", *(f"{os.path.splitext(name)[0]}.txt" for name in files if is_image(name))}
        if captions.intersection(files):
            return "pictures"
        raise UserError(
            "the folder has pictures, but none is named NAME_w or NAME_l",
            place=str(path),
            fix="Name each preferred picture NAME_w.png and the other one NAME_l.png",
        )
    raise UserError(
        "the folder holds no preference data",
        place=str(path),
        fix="Give a store, Parquet or JSON files, or pictures named NAME_w.png and NAME_l.png",
    )


def scan(path: str | Path, format: str = "auto", options: ImportOptions | None = None) -> Scan:
    """Records of a source, and a Problem for every row that cannot be made into one.

    Args:
        path: file or folder.
        format: a name from the module's table, or "auto".
        options: what the source does not say itself.

    Raises:
        UserError: what concerns the source as a whole (missing, wrong columns, damaged file).
    """
    choice = options or ImportOptions()
    pattern = None
    if choice.group_regex is not None:
        try:
            pattern = re.compile(choice.group_regex)
        except re.error as error:
            raise UserError(f"the group regex does not compile: {error}", place=choice.group_regex) from error
    path = Path(path)
    name = detect(path) if format == "auto" else format
    if name not in IMPORTERS:
        raise UserError(f"unknown data format '{name}'", place="format", fix=nearest(name, IMPORTERS))
    if not path.exists():
        raise UserError("there is no such file or folder", place=str(path))
    return _finish(IMPORTERS[name](path, choice), choice, pattern)


def read(
    path: str | Path,
    format: str = "auto",
    options: ImportOptions | None = None,
    *,
    decode: bool = False,
    on_problem: Callable[[Problem], None] | None = None,
) -> Iterator[Record]:
    """Records of a source, each checked.

    Args:
        decode: open every image too.
        on_problem: called for a row that is wrong, which is then left out; None stops at the first.

    Raises:
        UserError: as `scan`; and at a wrong row unless `on_problem` is given.
    """
    for item in scan(path, format, options):
        problems = [item] if isinstance(item, Problem) else list(check_record(item, decode=decode))
        for problem in problems:
            if on_problem is None:
                raise problem.error()
            on_problem(problem)
        if isinstance(item, Record) and not problems:
            yield item


def _finish(items: Scan, options: ImportOptions, pattern: re.Pattern[str] | None) -> Scan:
    for item in items:
        if isinstance(item, Record):
            if options.split:
                item = replace(item, split=options.split)
            if options.licence and item.licence is None:
                item = replace(item, licence=options.licence)
            if pattern is not None:
                match = pattern.search(item.record_id)
                if match is None:
                    yield Problem(
                        row=item.where,
                        field="record_id",
                        expected=f"a match of the group regex '{pattern.pattern}'",
                        got=shown(item.record_id),
                    )
                    continue
                group = match.group(1) if pattern.groups else match.group()
                item = replace(item, context={**item.context, "group": group})
        yield item
