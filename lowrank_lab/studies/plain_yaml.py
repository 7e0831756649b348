"""YAML read as people mean it: `4e6` is a number, `no` is a word, and a key stands once.

YAML 1.1, which PyYAML reads, turns `no` into false, `010` into 8 and `1:30` into 90, takes `4e6`
for text and lets the second of two equal keys win. Here exponents are numbers, the words no, off,
on and yes and dates are text, and the rest is refused with its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lowrank_lab.config import InputError

FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)")
LEADING_ZERO = re.compile(r"[-+]?0(?:_?[0-9])+")
SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")
WORDS = {
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "null": re.compile(r"~|null|Null|NULL|"),
    "merge": re.compile(r"<<"),
}
MOST_NODES = 100_000  # aliases counted wherever they stand
DEEPEST = 50


class _Loader(yaml.SafeLoader):
    """SafeLoader with the plain scalars of this module."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (an instance variable to its type stubs)


for _tag, _pattern in {"float": FLOAT, "int": INTEGER, **WORDS}.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern.pattern})$"), None
    )


def read_yaml(path: Path, field: str) -> Any:
    """The content of a YAML file.

    Args:
        field: what an error is about, for example `study`.

    Raises:
        InputError: the file can't be read or isn't YAML, a key stands twice or is no text, or a
            number can be meant in two ways.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or f"not UTF-8: {error}"
        raise InputError(field, str(path), f"it can't be read: {reason}") from None
    try:
        return _parsed(text, path.name)
    except yaml.YAMLError as error:
        raise InputError(field, str(path), f"not YAML: {error}") from None


def read_value(text: str, field: str) -> Any:
    """The value that a person gives on the command line; text that is no YAML stays text.

    Raises:
        InputError: as `read_yaml`.
    """
    try:
        return _parsed(text, field)
    except yaml.YAMLError:
        return text
    except InputError as error:  # without the line: it has one
        raise InputError(field, error.value, error.allowed) from None


def _parsed(text: str, name: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        for count, (inner, depth) in enumerate(_nodes(node)):
            if count > MOST_NODES or depth > DEEPEST:
                raise InputError(name, "…", f"nested more than {DEEPEST} deep, or too long")
            _check(inner, name)
        return loader.construct_document(node)
    except (RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _nodes(node: yaml.Node, depth: int = 0) -> Iterator[tuple[yaml.Node, int]]:
    """A node and all nodes in it, with their depth; an alias counts wherever it stands."""
    yield node, depth
    if isinstance(node, yaml.MappingNode):
        inside = [part for pair in node.value for part in pair]
    else:
        inside = node.value if isinstance(node, yaml.SequenceNode) else []
    for part in inside if depth <= DEEPEST else ():
        yield from _nodes(part, depth + 1)


def _check(node: yaml.Node, name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, name)
    if isinstance(node, yaml.ScalarNode) and node.style is None:
        place, value = f"{name}, {_line(node)}", node.value
        if LEADING_ZERO.fullmatch(value):
            allowed = f"YAML may read it as octal: write {int(value)}"
            raise InputError(place, value, f"{allowed}, or quote it, '{value}', for text")
        if SEXAGESIMAL.fullmatch(value):
            allowed = "YAML may read it to the base of 60: write one number, or quote it"
            raise InputError(place, value, f"{allowed}, '{value}', for text")


def _check_keys(node: yaml.MappingNode, name: str) -> None:
    lines: dict[str, str] = {}
    for key, _ in node.value:
        place = f"{name}, {_line(key)}"
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(place, "…", "a key is one word or text in quotes")
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            _check(key, name)  # 010 and 1:30 have a line of their own
            raise InputError(place, key.value, f"a label is text: quote it, '{key.value}'")
        if key.value in lines:
            both = dict.fromkeys([lines[key.value], _line(key)])
            place = f"{name}, {' and '.join(both)}"
            raise InputError(place, key.value, "a key stands once in a mapping")
        lines[key.value] = _line(key)


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
