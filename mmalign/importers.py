"""Published formats and folders of one's own pictures -> records.

    store         a folder written by `mmalign data import`
    pickapic      Parquet with caption, jpg_0, jpg_1, label_0 (Pick-a-Pic v1, v2 and their copies)
    hpd           JSON with prompt, image_path or file_path, human_preference or rank (HPDv2 and the like)
    trl           JSON, JSONL or Parquet with prompt, chosen, rejected (+ images, rejected_images)
    unpaired      the same with prompt, completion (or image) and label, true or false: TRL's for KTO
    records       JSON or JSONL rows with prompt, candidates, votes; or a folder with one such JSON per record
    pairs_folder  pictures named NAME_w.png (preferred) and NAME_l.png
    pictures      pictures with captions: NAME.txt beside NAME.png, or metadata.jsonl (+ label, true or false)

A label becomes the score `desirable`, 1 or 0. `scan` yields a `Problem` where a row cannot be read, so that a check
can list them all; `read` stops at the first one, or hands it to `on_problem` and goes on. Nothing is fetched and no
path leaves its folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from mmalign.errors import UserError, nearest
from mmalign.media import Media, path_fault
from mmalign.preferences import MANIFEST, Store, open_parquet
from mmalign.records import LABELS, Candidate, Label, Problem, Record, Vote, check_record, is_number, shown
from mmalign.sources import (
    Fault,
    Row,
    context_of,
    files_below,
    image_of,
    images_of,
    is_image,
    maybe_text,
    parse_json,
    read_text,
    require_safe,
    rows_of,
    table_files,
    text_of,
)

Scan: TypeAlias = Iterator[Record | Problem]

# Column groups of the tabular formats: each group needs one of its names.
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "pickapic": (("caption",), ("jpg_0",), ("jpg_1",), ("label_0",)),
    "hpd": (("prompt",), ("image_path", "file_path"), ("human_preference", "rank")),
    "records": (("prompt",), ("candidates",)),
    "trl": (("chosen",), ("rejected",)),
    "unpaired": (("prompt",), ("completion", "image"), ("label",)),
}
DESIRABLE = "desirable"  # the score that a label of a single answer becomes
_SIDE = re.compile(r"(?P<name>.+)_(?P<side>[wl])")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What the source does not say itself.

    Args:
        root: folder that image paths are relative to; by default the source's own.
        prompt: for pictures that come without one.
        split: put every record there; by default what the record or a Pick-a-Pic file name says, or "train".
        licence: for records that name none.
        group_regex: searched in the record id; its first group (or the match) becomes `context["group"]`,
            which keeps crops of one photograph in one split.
    """

    root: str | None = None
    prompt: str | None = None
    split: str | None = None
    licence: str | None = None
    group_regex: str | None = None


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
        return _detect_columns(path)
    if (path / MANIFEST).exists():
        return "store"
    files = files_below(path)
    tables = table_files(path)
    if tables and tables[0].suffix in (".parquet", ".jsonl"):
        return _detect_columns(tables[0])
    if any(is_image(name) and _SIDE.fullmatch(Path(name).stem) for name in files):
        return "pairs_folder"
    if tables:  # one list of rows, or one object per record
        rows = parse_json(tables[0].read_bytes(), str(tables[0]))
        return _detect_columns(tables[0]) if isinstance(rows, list) else "records"
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


# --- tables ------------------------------------------------------------------------------------------------


def _table(path: Path, format: str) -> Iterator[tuple[str, Row | Problem]]:
    """(row's name, row) of Parquet files, a JSON list or JSON lines, after a look at the columns."""
    found = False
    for file in table_files(path):
        for number, row in enumerate(rows_of(file)):
            found = True
            name = f"{file.name} row {number}"
            if isinstance(row, Problem):
                yield name, row
                continue
            if not isinstance(row, Mapping):
                yield name, Problem(row=name, field="row", expected="an object", got=shown(row))
                continue
            missing = [group for group in COLUMNS[format] if not any(key in row for key in group)]
            if missing and number == 0:
                raise _column_error(missing[0], row, str(file), format)
            if missing:
                got = f"only {', '.join(sorted(map(str, row)))}"
                yield name, Problem(row=name, field=missing[0][0], expected="the column", got=got)
                continue
            yield name, row
    if not found:
        raise UserError("the source holds no rows", place=str(path), fix="Give a source with data in it")


def _detect_columns(file: Path) -> str:
    first: Any
    if file.suffix == ".parquet":
        with open_parquet(file) as table:
            first = dict.fromkeys(table.schema_arrow.names)
    else:
        first = next(rows_of(file), None)
    if first is None:
        raise UserError("the source holds no rows", place=str(file), fix="Give a source with data in it")
    if isinstance(first, Problem):
        raise first.error()
    if not isinstance(first, Mapping):
        raise UserError(f"expected rows that are objects, got {shown(first)}", place=f"{file} row 0")
    best, best_share = "", -1.0
    best_missing: tuple[str, ...] = ()
    for name, groups in COLUMNS.items():
        missing = [group for group in groups if not any(key in first for key in group)]
        if not missing:
            return name
        # A near miss in spelling counts half, so that 'captions' still points to Pick-a-Pic.
        close = sum("Did you mean" in nearest(group[0], map(str, first)) for group in missing)
        share = (len(groups) - len(missing) + 0.5 * close) / len(groups)
        if share > best_share:
            best, best_share, best_missing = name, share, missing[0]
    raise _column_error(best_missing, first, str(file), best)


def _column_error(group: tuple[str, ...], row: Iterable[Any], place: str, format: str) -> UserError:
    names = [str(name) for name in row]
    wanted = " or ".join(f"'{name}'" for name in group)
    return UserError(
        f"there is no column {wanted}, which the format '{format}' needs",
        place=place,
        fix=nearest(group[0], names),
    )


def _guarded(path: Path, format: str, convert: Callable[[Row, str], Record]) -> Scan:
    """Rows of a table through `convert`, faults as problems."""
    for name, row in _table(path, format):
        if isinstance(row, Problem):
            yield row
            continue
        try:
            yield convert(row, name)
        except Fault as fault:
            yield Problem(row=name, field=fault.name, expected=fault.expected, got=fault.got)


def _root(path: Path, options: ImportOptions) -> Path:
    root = Path(options.root) if options.root else path if path.is_dir() else path.parent
    if not root.is_dir():
        raise UserError("the image folder does not exist", place=str(root))
    return root


def _store(path: Path, options: ImportOptions) -> Scan:
    yield from Store.open(path).records()


def _pickapic(path: Path, options: ImportOptions) -> Scan:
    """label_0 is 1, 0 or 0.5 (a tie). Rows without a label are kept without a vote."""

    def convert(row: Row, name: str) -> Record:
        file, _, number = name.partition(".parquet row ")
        candidates = []
        for side in (0, 1):
            data = row[f"jpg_{side}"]
            if isinstance(data, Mapping):  # the `datasets` image struct
                data = data.get("bytes")
            if not isinstance(data, bytes) or not data:
                raise Fault(f"jpg_{side}", "the bytes of an image", shown(data))
            candidates.append(
                Candidate(
                    candidate_id=str(side),
                    image=Media(data=data, place=f"{name} jpg_{side}"),
                    model=maybe_text(row, f"model_{side}"),
                )
            )
        label = row["label_0"]
        votes = []
        if row.get("has_label", True) and label is not None:
            if label not in (0, 0.5, 1):
                raise Fault("label_0", "0, 0.5 or 1", shown(label))
            other = row.get("label_1")
            if other is not None and other != 1 - label:
                raise Fault("label_1", f"1 - label_0 = {1 - label:g}", shown(other))
            user = row.get("user_id")
            word: Label = "tie" if label == 0.5 else "a" if label == 1 else "b"
            votes.append(Vote(a="0", b="1", label=word, rater=None if user is None else str(user)))
        kept = ("ranking_id", "user_id", "image_0_uid", "image_1_uid", "are_different")
        named = re.match(r"(train|validation|test)\w*(?=-\d)", file)
        return Record(
            record_id=f"{file}-{number}",  # ranking ids are not promised to be unique; a row is
            prompt=text_of(row, "caption"),
            candidates=tuple(candidates),
            votes=tuple(votes),
            split=named.group(1) if named else "train",
            source="pickapic",
            context={key: row[key] for key in kept if row.get(key) is not None},
            place=name,
        )

    return _guarded(path, "pickapic", convert)


def _hpd(path: Path, options: ImportOptions) -> Scan:
    """human_preference: 1 for the preferred image. rank: smaller is better, per image; equal is a tie."""

    def ranks_of(row: Row, count: int) -> list[tuple[str | None, list[float]]]:
        raw = row.get("raw_annotations")
        if isinstance(raw, list) and raw and all(isinstance(item, Mapping) for item in raw):
            named = [("raw_annotations.rank", item.get("rank"), item.get("user_hash")) for item in raw]
        elif "rank" in row:
            named = [("rank", row["rank"], row.get("user_hash"))]
        else:
            named = [("human_preference", row["human_preference"], row.get("user_hash"))]
        found = []
        for name, values, rater in named:
            if not isinstance(values, list) or len(values) != count:
                raise Fault(name, f"{count} numbers, one per image", shown(values))
            if not all(isinstance(value, (int, float)) for value in values):
                raise Fault(name, "numbers", shown(values))
            sign = -1 if name == "human_preference" else 1
            found.append((None if rater is None else str(rater), [sign * float(value) for value in values]))
        return found

    root = _root(path, options)

    def convert(row: Row, name: str) -> Record:
        field = "image_path" if "image_path" in row else "file_path"
        paths = row[field]
        if not isinstance(paths, list) or len(paths) < 2:
            raise Fault(field, "a list of at least two paths", shown(paths))
        images = [image_of(root, value, f"{field}[{i}]", name) for i, value in enumerate(paths)]
        votes = [
            Vote(a=str(i), b=str(j), label=_smaller(ranks[i], ranks[j]), rater=rater)
            for rater, ranks in ranks_of(row, len(paths))
            for i in range(len(paths))
            for j in range(i + 1, len(paths))
        ]
        return Record(
            record_id=str(row.get("id", name.replace(" row ", "-"))),
            prompt=text_of(row, "prompt"),
            candidates=tuple(Candidate(candidate_id=str(i), image=image) for i, image in enumerate(images)),
            votes=tuple(votes),
            source="hpd",
            place=name,
        )

    return _guarded(path, "hpd", convert)


def _smaller(a: float, b: float) -> Label:
    return "tie" if a == b else "a" if a < b else "b"


def _trl(path: Path, options: ImportOptions) -> Scan:
    """prompt, chosen and rejected as strings, as conversations, or (chosen, rejected) as images."""
    root = _root(path, options)

    def convert(row: Row, name: str) -> Record:
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        context = context_of(row)
        if prompt is None and isinstance(chosen, list) and isinstance(rejected, list):
            shared = 0  # the prompt is what both conversations begin with
            while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
                shared += 1
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        prompt = _prompt(prompt, context, options)
        images = row.get("images", row.get("image"))
        return Record(
            record_id=str(row.get("id", name.replace(" row ", "-"))),
            prompt=prompt,
            media=images_of(root, images, "images", name),
            candidates=(
                _response(root, chosen, "chosen", name),
                _response(root, rejected, "rejected", name, media=row.get("rejected_images")),
            ),
            votes=(Vote(a="chosen", b="rejected", label="a"),),
            split=maybe_text(row, "split") or "train",
            licence=maybe_text(row, "licence") or maybe_text(row, "license"),
            source=maybe_text(row, "source") or "trl",
            context=context,
            place=name,
        )

    return _guarded(path, "trl", convert)


def _unpaired(path: Path, options: ImportOptions) -> Scan:
    """prompt, one completion (text, conversation or image) and whether it is a good one. Pictures made from a prompt
    may be called image; beside a completion, image and images belong to the prompt."""
    root = _root(path, options)

    def convert(row: Row, name: str) -> Record:
        context = context_of(row)
        field = "completion" if row.get("completion") is not None else "image"
        media = row.get("images", row.get("image")) if field == "completion" else None
        answer = image_of(root, row.get(field), field, name) if field == "image" else None
        candidate = (
            _response(root, row[field], field, name) if answer is None else Candidate(candidate_id=field, image=answer)
        )
        return Record(
            record_id=str(row.get("id", name.replace(" row ", "-"))),
            prompt=_prompt(row.get("prompt"), context, options),
            media=images_of(root, media, "images", name),
            candidates=(replace(candidate, scores=_desirable(row)),),
            split=maybe_text(row, "split") or "train",
            licence=maybe_text(row, "licence") or maybe_text(row, "license"),
            source=maybe_text(row, "source") or "unpaired",
            context=context,
            place=name,
        )

    return _guarded(path, "unpaired", convert)


def _desirable(row: Row) -> dict[str, float]:
    label = row.get("label")
    if label not in (0, 1):  # True and False are
        raise Fault("label", "true or false", shown(label))
    return {DESIRABLE: float(label)}


def _prompt(value: Any, context: dict[str, Any], options: ImportOptions) -> str:
    """The text of a prompt, which may be a conversation; a longer one is kept in `context` as messages."""
    if isinstance(value, list):
        turns = value
        value = _turn(turns, "prompt", "user")
        if len(turns) > 1:
            context["messages"] = turns
    return text_of({"prompt": options.prompt if value is None else value}, "prompt")


def _turn(turns: list[Any], name: str, role: str) -> str:
    """The text of the last message, which must have the role."""
    last = turns[-1] if turns else None
    if not isinstance(last, Mapping) or last.get("role") != role:
        raise Fault(name, f"a conversation that ends with a message of role '{role}'", shown(last))
    content = last.get("content")
    if isinstance(content, list):  # parts: text among image placeholders
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str):
        raise Fault(name, "a message whose content is text", shown(content))
    return content


def _response(root: Path, value: Any, field: str, name: str, media: Any = None) -> Candidate:
    extra = None if media is None else images_of(root, media, "rejected_images", name)
    if isinstance(value, list):
        return Candidate(candidate_id=field, text=_turn(value, field, "assistant"), media=extra)
    looks_like_path = isinstance(value, str) and is_image(value) and "\n" not in value
    if isinstance(value, Mapping) or looks_like_path:
        return Candidate(candidate_id=field, image=image_of(root, value, field, name), media=extra)
    if not isinstance(value, str):
        raise Fault(field, "text, a conversation or an image", shown(value))
    return Candidate(candidate_id=field, text=value, media=extra)


def _records(path: Path, options: ImportOptions) -> Scan:
    """Rows in this project's own JSON form, in one file or as one file per record."""
    if path.is_dir():
        sidecars = [name for name in files_below(path) if name.endswith(".json")]
        if not sidecars:
            raise UserError("the folder holds no JSON files", place=str(path))
        for name in sidecars:
            unsafe = path_fault(path, name)
            if unsafe:
                yield Problem(row=name, field="file", expected="a file inside the data folder", got=unsafe)
                continue
            try:
                row = parse_json((path / name).read_bytes(), name)
                yield _native(row, name, (path / name).parent, path, options, name.removesuffix(".json"))
            except UserError as error:
                yield Problem(row=name, field="file", expected="JSON", got=error.cause)
            except Fault as fault:
                yield Problem(row=name, field=fault.name, expected=fault.expected, got=fault.got)
        return
    root = _root(path, options)
    yield from _guarded(
        path,
        "records",
        lambda row, name: _native(row, name, root, root, options, name.replace(" row ", "-")),
    )


def _native(row: Any, name: str, folder: Path, root: Path, options: ImportOptions, default: str) -> Record:
    """A record from JSON; image paths are relative to `folder` and may not leave `root`."""
    if not isinstance(row, Mapping):
        raise Fault("row", "an object", shown(row))
    prefix = folder.relative_to(root).as_posix() if folder != root else ""

    def image(value: Any, field: str) -> Media | None:
        if value is None:
            return None
        joined = os.path.normpath(f"{prefix}/{value}") if prefix and isinstance(value, str) else value
        return image_of(root, joined, field, name)

    listed = row.get("candidates")
    votes = row.get("votes") or []
    names = None
    if listed is None and "chosen" in row and "rejected" in row:
        names = ["chosen", "rejected"]
        listed = [{"id": name, "image": row[name]} for name in names]
        votes = [{"a": "chosen", "b": "rejected", "label": row.get("label", "a")}]
    if not isinstance(listed, list) or not all(isinstance(item, Mapping) for item in listed):
        raise Fault("candidates", "a list of objects", shown(listed))
    if not isinstance(votes, list) or not all(isinstance(vote, Mapping) for vote in votes):
        raise Fault("votes", "a list of objects", shown(votes))
    candidates = []
    for index, item in enumerate(listed):
        field = f"candidates[{index}]"
        scores = item.get("scores") or {}
        if not isinstance(scores, Mapping) or not all(map(is_number, scores.values())):
            raise Fault(f"{field}.scores", "an object of finite numbers", shown(scores))
        seed = item.get("seed")
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise Fault(f"{field}.seed", "a whole number", shown(seed))
        candidates.append(
            Candidate(
                candidate_id=str(item.get("id", item.get("candidate_id", index))),
                image=image(item.get("image"), names[index] if names else f"{field}.image"),
                text=maybe_text(item, "text", f"{field}.text"),
                scores={str(name): float(value) for name, value in scores.items()},
                model=maybe_text(item, "model", f"{field}.model"),
                seed=seed,
                prompt=maybe_text(item, "prompt", f"{field}.prompt"),
            )
        )
    media = row.get("media", row.get("images")) or []
    return Record(
        record_id=str(row.get("id", row.get("record_id", default))),
        prompt=text_of({"prompt": options.prompt, **row}, "prompt"),
        media=tuple(
            item
            for i, value in enumerate(media if isinstance(media, list) else [media])
            if (item := image(value, f"media[{i}]")) is not None
        ),
        candidates=tuple(candidates),
        votes=tuple(_vote(vote, f"votes[{index}]") for index, vote in enumerate(votes)),
        split=maybe_text(row, "split") or "train",
        licence=maybe_text(row, "licence") or maybe_text(row, "license"),
        source=maybe_text(row, "source") or "records",
        context=context_of(row),
        place=name,
    )


def _vote(row: Row, field: str) -> Vote:
    known = {item.name for item in fields(Vote)}
    if not {"a", "b", "label"} <= set(row) <= known:
        raise Fault(field, f"the keys a, b, label and perhaps {', '.join(sorted(known))}", shown(sorted(row)))
    if row["label"] not in LABELS:
        raise Fault(f"{field}.label", "a, b or tie", shown(row["label"]))
    sure, time = row.get("confidence"), row.get("milliseconds")
    if sure is not None and not is_number(sure):
        raise Fault(f"{field}.confidence", "a probability from 0.5 to 1", shown(sure))
    if time is not None and (not isinstance(time, int) or isinstance(time, bool)):
        raise Fault(f"{field}.milliseconds", "a whole number", shown(time))
    return Vote(
        a=str(row["a"]),
        b=str(row["b"]),
        label=row["label"],
        rater=maybe_text(row, "rater", f"{field}.rater"),
        confidence=None if sure is None else float(sure),
        milliseconds=time,
    )


# --- pictures named _w and _l ------------------------------------------------------------------------------


def _pairs_folder(path: Path, options: ImportOptions) -> Scan:
    """NAME_w and NAME_l beside each other; the prompt (and group, split, licence, label) beside them too."""
    if not path.is_dir():
        raise UserError("the format 'pairs_folder' needs a folder", place=str(path))
    pairs: dict[str, dict[str, list[str]]] = {}
    for name in files_below(path):
        if not is_image(name):
            continue
        match = _SIDE.fullmatch(Path(name).stem)
        if match is None:
            yield Problem(row=name, field="name", expected="a name that ends in _w or _l", got=Path(name).name)
            continue
        key = (Path(name).parent / match["name"]).as_posix()
        pairs.setdefault(key, {}).setdefault(match["side"], []).append(name)
    lines = _metadata(path)
    for key, sides in pairs.items():
        try:
            yield _folder_pair(path, key, sides, lines, options)
        except Fault as fault:
            yield Problem(row=key, field=fault.name, expected=fault.expected, got=fault.got)


def _folder_pair(
    root: Path, key: str, sides: dict[str, list[str]], lines: dict[str, Row], options: ImportOptions
) -> Record:
    images = {}
    for side in "wl":
        files = sides.get(side, [])
        if len(files) != 1:
            wanted = f"one {Path(key).name}_{side} picture"
            raise Fault("files", wanted, ", ".join(Path(file).name for file in files) or "none")
        images[side] = image_of(root, files[0], f"_{side}", files[0])
    about: dict[str, Any] = {}
    for name in (key, sides["w"][0], sides["l"][0]):
        about.update(lines.get(name, {}))
    for stem in (key, f"{key}_w"):
        caption = _caption(root, stem)
        if caption is not None:
            about.setdefault("prompt", caption)
    sidecar = root / f"{key}.json"
    if sidecar.exists():
        require_safe(root, f"{key}.json", "sidecar")
        try:
            value = parse_json(sidecar.read_bytes(), f"{key}.json")
        except UserError as error:
            raise Fault(f"{key}.json", "JSON", error.cause) from error
        if not isinstance(value, Mapping):
            raise Fault(f"{key}.json", "an object", shown(value))
        about.update(value)
    about.setdefault("prompt", options.prompt)
    if about["prompt"] is None:
        raise Fault("prompt", f"{key}.txt, {key}.json, a line of metadata.jsonl or --prompt", "none of them")
    label = about.get("label", "w")
    if label not in ("w", "tie"):
        raise Fault("label", "w or tie", shown(label))
    return Record(
        record_id=key,
        prompt=text_of(about, "prompt"),
        candidates=tuple(Candidate(candidate_id=side, image=images[side]) for side in "wl"),
        votes=(Vote(a="w", b="l", label="a" if label == "w" else "tie"),),
        split=maybe_text(about, "split") or "train",
        licence=maybe_text(about, "licence") or maybe_text(about, "license"),
        source=maybe_text(about, "source") or "pairs_folder",
        context={"group": about["group"]} if "group" in about else {},
        place=key,
    )


def _pictures(path: Path, options: ImportOptions) -> Scan:
    """Every picture of a folder with its caption."""
    if not path.is_dir():
        raise UserError("the format 'pictures' needs a folder", place=str(path))
    names = [name for name in files_below(path) if is_image(name)]
    if not names:
        raise UserError("the folder has no pictures", place=str(path))
    lines = _metadata(path)
    for name in names:
        about = dict(lines.get(name, {}))
        try:
            caption = _caption(path, os.path.splitext(name)[0])
            texts = (about.get("prompt"), about.get("text"), about.get("caption"), caption, options.prompt)
            prompt = next((text for text in texts if text is not None), None)
            if prompt is None:
                stem = os.path.splitext(name)[0]
                raise Fault("prompt", f"{stem}.txt, a line of metadata.jsonl or --prompt", "none of them")
            scores = _desirable(about) if "label" in about else {}
            yield Record(
                record_id=name,
                prompt=text_of({"prompt": prompt}, "prompt"),
                candidates=(
                    Candidate(candidate_id="picture", image=image_of(path, name, "picture", name), scores=scores),
                ),
                split=maybe_text(about, "split") or "train",
                licence=maybe_text(about, "licence") or maybe_text(about, "license"),
                source=maybe_text(about, "source") or "pictures",
                context={"group": about["group"]} if "group" in about else {},
                place=name,
            )
        except Fault as fault:
            yield Problem(row=name, field=fault.name, expected=fault.expected, got=fault.got)


def _caption(root: Path, stem: str) -> str | None:
    """The text of the file `stem`.txt, None without one."""
    if not (root / f"{stem}.txt").exists():
        return None
    require_safe(root, f"{stem}.txt", "prompt")
    try:
        return read_text(root / f"{stem}.txt").strip()
    except UserError as error:
        raise Fault("prompt", "UTF-8 text", f"'{error.cause}'") from error


def _metadata(root: Path) -> dict[str, Row]:
    """metadata.jsonl: one object per line, its `file_name` a picture or the common NAME."""
    if not (root / "metadata.jsonl").exists():
        return {}
    fault = path_fault(root, "metadata.jsonl")
    if fault:
        raise UserError(f"expected a file inside the data folder, got {fault}", place=str(root))
    lines = {}
    for number, row in enumerate(rows_of(root / "metadata.jsonl"), start=1):
        if isinstance(row, Problem):
            raise row.error()
        if not isinstance(row, Mapping) or not isinstance(row.get("file_name"), str):
            raise UserError("expected an object with 'file_name'", place=f"metadata.jsonl line {number}")
        lines[row["file_name"]] = row
    return lines


IMPORTERS: dict[str, Callable[[Path, ImportOptions], Scan]] = {
    "store": _store,
    "pickapic": _pickapic,
    "hpd": _hpd,
    "trl": _trl,
    "unpaired": _unpaired,
    "records": _records,
    "pairs_folder": _pairs_folder,
    "pictures": _pictures,
}
