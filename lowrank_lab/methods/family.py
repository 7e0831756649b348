"""The methods as a tree: which grew out of which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lowrank_lab.methods.method import Method


def family_tree(methods: Iterable[Method]) -> Iterator[tuple[str, Method]]:
    """(branches drawn before a name, method) of each method, children after their parent.

    A method without a parent among `methods` is a root: methods of one's own stand at the end.
    """
    rows = list(methods)
    names = {method.name for method in rows}
    roots = [method for method in rows if method.parent not in names]
    for root in roots:
        yield "", root
        yield from _below(root, "", rows)


def _below(parent: Method, branches: str, rows: list[Method]) -> Iterator[tuple[str, Method]]:
    children = [method for method in rows if method.parent == parent.name]
    for child in children:
        last = child is children[-1]
        yield branches + ("└─ " if last else "├─ "), child
        yield from _below(child, branches + ("   " if last else "│  "), rows)
