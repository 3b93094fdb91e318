"""What is wrong with a mapping that does not fit a settings class: one line, with the nearest valid key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mmalign.errors import UserError, nearest


def explain(
    failure: ValidationError,
    cls: type[BaseModel],
    *,
    prefix: str = "",
    places: Mapping[str, str] | None = None,
    default_place: str | None = None,
) -> UserError:
    """The error a user reads for what pydantic found.

    Args:
        failure: pydantic's findings.
        cls: the settings class that was to be filled.
        prefix: key of the section that `cls` describes; empty for the whole file.
        places: where each dotted key was given.
        default_place: where to look when the key was given nowhere.
    """
    errors = sorted(failure.errors(include_url=False), key=lambda error: error["type"] != "extra_forbidden")
    wrong = [_dotted(error["loc"], prefix) for error in errors]
    cause, fix = _explain_one(errors[0], wrong[0], cls, prefix)
    others = [key for key in dict.fromkeys(wrong) if key != wrong[0]]
    if others:
        cause += f"; also wrong: {', '.join(others)}"
    return UserError(cause, place=_place(wrong[0], places or {}, default_place), fix=fix)


def _dotted(loc: tuple[int | str, ...], prefix: str) -> str:
    parts = [prefix] if prefix else []
    for part in loc:
        if isinstance(part, int):
            parts[-1:] = [f"{parts[-1]}[{part}]"] if parts else [f"[{part}]"]
        else:
            parts.append(part)
    return ".".join(parts)


def _place(key: str, places: Mapping[str, str], default: str | None) -> str | None:
    """The file and line, or the override, that said the key or the nearest section around it."""
    while key:
        if key in places:
            return places[key]
        key = re.sub(r"(\.|\[)[^.\[]*$", "", key) if re.search(r"[.\[]", key) else ""
    return default


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "model_attributes_type": "a section",
    "path_type": "a path",
}


def _explain_one(error: ErrorDetails, key: str, cls: type[BaseModel], prefix: str) -> tuple[str, str | None]:
    """Cause and fix of one of pydantic's findings."""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        valid = [f"{prefix}.{name}" if prefix else name for name in keys(cls)]
        return f"unknown key '{key}'", suggest(key, valid)
    length = _length(cls, error["loc"]) if kind in ("missing", "too_long") else None
    if length is not None:
        return f"{key.partition('[')[0]}: expected {length} values", None
    if kind == "missing":
        return f"missing key '{key}'", f"Set it in the file, or give {key}=VALUE."
    if kind == "literal_error":
        choices = context["expected"]
        got = f"'{given}'" if isinstance(given, str) else _shown(given)
        return f"{key}: expected {choices}, got {got}", _literal_hint(given, choices)
    if kind == "value_error":
        return f"{key}: {context['error']}" if key else str(context["error"]), None
    if kind in _EXPECTED:
        return f"{key}: expected {_EXPECTED[kind]}, got {_shown(given)}", None
    said = error["msg"].removeprefix("Input ").removeprefix("should ").removeprefix("Value ")
    return f"{key}: should {said}, got {_shown(given)}", None


def _length(cls: type[BaseModel], loc: tuple[int | str, ...]) -> int | None:
    """How many values a field of fixed length takes, when that is what an error is about."""
    names = [part for part in loc if isinstance(part, str)]
    for name in names[:-1]:
        cls = next(_sections(cls, name), cls)
    field = cls.model_fields.get(names[-1])
    arguments = getattr(field.annotation, "__args__", ()) if field else ()
    is_tuple = field is not None and getattr(field.annotation, "__origin__", None) is tuple
    return len(arguments) if is_tuple and Ellipsis not in arguments else None


def _literal_hint(given: Any, expected: str) -> str | None:
    choices = re.findall(r"'([^']*)'", expected)
    close = difflib.get_close_matches(str(given), choices, n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'?" if close else None


def kind_of(value: Any) -> str:
    kinds: dict[type, str] = {
        dict: "a section",
        list: "a list",
        str: "text",
        bool: "true or false",
        type(None): "nothing",
    }
    return kinds.get(type(value), "a number")


def _shown(value: Any) -> str:
    """A value as one recognises it, with its type where the value alone would not say it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list, tuple)):
        return kind_of(dict(value)) if isinstance(value, dict) else "a list"
    text = str(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"'{text}' (text)" if isinstance(value, str) else text


def _sections(cls: type[BaseModel], name: str) -> Iterator[type[BaseModel]]:
    annotation = cls.model_fields[name].annotation
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            yield candidate


def keys(cls: type[BaseModel]) -> list[str]:
    """Every key of a settings class, sections included, in dotted form: `["optim", "optim.lr", ...]`."""
    found = []
    for name in cls.model_fields:
        found.append(name)
        found += [f"{name}.{below}" for section in _sections(cls, name) for below in keys(section)]
    return found


# What the flags of the diffusers and TRL training scripts are called here: people paste them.
_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "lr_warmup_steps": "optim.warmup_steps",
    "warmup_ratio": "optim.warmup_fraction",
    "adam_weight_decay": "optim.weight_decay",
    "max_train_steps": "loop.steps",
    "max_steps": "loop.steps",
    "train_batch_size": "loop.batch_size",
    "per_device_train_batch_size": "loop.batch_size",
    "gradient_accumulation_steps": "loop.accumulation",
    "mixed_precision": "loop.precision",
    "checkpointing_steps": "loop.checkpoint_every",
    "save_steps": "loop.checkpoint_every",
    "checkpoints_total_limit": "loop.keep_checkpoints",
    "save_total_limit": "loop.keep_checkpoints",
    "resume_from_checkpoint": "loop.resume",
    "logging_steps": "loop.log_every",
    "report_to": "loop.trackers",
}


def suggest(key: str, valid: Iterable[str], separator: str = ".") -> str:
    """A hint for a mistyped key: the same section first, then its name in another, then what is close."""
    known = list(valid)
    section, _, leaf = key.rpartition(separator)
    if _ELSEWHERE.get(leaf) in known:
        return f"Did you mean '{_ELSEWHERE[leaf]}'?"
    siblings = [name for name in known if name.rpartition(separator)[0] == section]
    close = difflib.get_close_matches(leaf, [name.rpartition(separator)[2] for name in siblings], n=1, cutoff=0.8)
    if close:
        return f"Did you mean '{section + separator if section else ''}{close[0]}'?"
    elsewhere = {name.rpartition(separator)[2]: name for name in reversed(known)}
    close = difflib.get_close_matches(leaf, elsewhere, n=1, cutoff=0.7)
    if close:
        return f"Did you mean '{elsewhere[close[0]]}'?"
    if siblings and section:  # by their last parts: the section they share makes any two of them look alike
        return nearest(leaf, [name.rpartition(separator)[2] for name in siblings])
    return nearest(key, siblings or known)
