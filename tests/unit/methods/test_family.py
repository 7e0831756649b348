"""The family tree of the methods."""

from dataclasses import replace

from lowrank_lab.methods.family import family_tree
from lowrank_lab.methods.registry import METHODS, ROWS


def test_every_method_stands_once_below_its_parent():
    rows = list(family_tree(ROWS))
    assert sorted(m.name for _, m in rows) == sorted(METHODS)
    depth = {m.name: len(branches) for branches, m in rows}
    for _, m in rows:
        assert depth[m.name] == (0 if m.parent is None else depth[m.parent] + 3)


def test_branches_end_at_the_last_child_and_a_missing_parent_makes_a_root():
    parents = {"a": None, "b": "a", "c": "b", "d": "a", "e": "gone"}
    rows = [replace(ROWS[0], name=name, parent=parent) for name, parent in parents.items()]
    drawn = [branches + m.name for branches, m in family_tree(rows)]
    assert drawn == ["a", "├─ b", "│  └─ c", "└─ d", "e"]
