"""Pictures that people compared, as published for text-to-image: Pick-a-Pic and HPDv2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mmalign.importers.common import ImportOptions, Scan, id_of, root_of
from mmalign.importers.tables import convert_rows
from mmalign.media import Media
from mmalign.records import Candidate, Label, Record, Vote, shown
from mmalign.sources import Fault, Row, image_of, maybe_text, text_of


def pickapic(path: Path, options: ImportOptions) -> Scan:
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

    return convert_rows(path, "pickapic", convert)


def hpd(path: Path, options: ImportOptions) -> Scan:
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

    root = root_of(path, options)

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
            record_id=id_of(row, name),
            prompt=text_of(row, "prompt"),
            candidates=tuple(Candidate(candidate_id=str(i), image=image) for i, image in enumerate(images)),
            votes=tuple(votes),
            source="hpd",
            place=name,
        )

    return convert_rows(path, "hpd", convert)


def _smaller(a: float, b: float) -> Label:
    return "tie" if a == b else "a" if a < b else "b"
