"""YAML without its surprises: safe, no anchors, no key twice, 1e-4 a number, every key's line kept."""

from __future__ import annotations

import re
from typing import Any

import yaml

from mmalign.errors import UserError


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, and 16:9, 010 and 2024-01-01 are text."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as the same value."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Unusual line breaks in double quotes, where they are escaped: bare ones would be read back as spaces."""
        style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)

_NUMBERS = [
    ("tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:(?:0|[1-9][0-9_]*)?\.[0-9]+|(?:0|[1-9][0-9_]*)\.)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?(?:0|[1-9][0-9_]*)[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+.0123456789",
    ),
]
for _yaml in (_Loader, _Dumper):
    # YAML 1.1 reads 1e-4 as text, 16:9 as 969 and 010 as 8: its rules for numbers, dates and merging go.
    _yaml.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag.rpartition(":")[2] in ("bool", "null")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _tag, _rule, _first in _NUMBERS:
        _yaml.add_implicit_resolver(_tag, _rule, list(_first))

_SUPPORTED_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}


def parse(text: str, source: str, *, lines: bool = True) -> tuple[Any, dict[str, str]]:
    """The value of a YAML text, and where each dotted key stands: {"optim.lr": "dpo.yaml:12"}."""
    places: dict[str, str] = {}
    seen: set[int] = set()

    def at(mark: yaml.Mark | None) -> str:
        return f"{source}:{mark.line + 1}" if lines and mark is not None else source

    def check(node: yaml.Node, path: str) -> None:
        # An alias is the same node met again; a nest of them could grow without bound.
        if id(node) in seen:
            raise UserError(
                "anchors and aliases are not supported", place=at(node.start_mark), fix="Write the value out."
            )
        seen.add(id(node))
        if node.tag not in _SUPPORTED_TAGS:
            raise UserError(f"YAML tag '{node.tag}' is not supported", place=at(node.start_mark), fix="Remove it.")
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.tag != "tag:yaml.org,2002:str":
                    shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                    raise UserError(f"key {shown} is not text", place=at(key.start_mark), fix="Put the key in quotes.")
                dotted = f"{path}.{key.value}" if path else str(key.value)
                if dotted in places:
                    raise UserError(
                        f"key '{dotted}' is given twice, first at {places[dotted]}",
                        place=at(key.start_mark),
                        fix="Remove one.",
                    )
                places[dotted] = at(key.start_mark)
                check(value, dotted)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                check(value, f"{path}[{index}]")

    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, places
        check(node, "")
        return loader.construct_document(node), places
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"not valid YAML: {error.problem or error.context}", place=at(mark)) from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"not valid YAML: {error}", place=source) from error
    except RecursionError as error:
        raise UserError("not valid YAML: nested too deeply", place=source) from error


def write(data: Any) -> str:
    """YAML text that `parse` reads back to the same values."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text
