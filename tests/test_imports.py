"""Imports go one way through the house, and importing the library stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_lab
from lowrank_lab.provenance import TRAINING_ROOMS

PACKAGE = Path(lowrank_lab.__file__).parent
# A module may import only modules before it.
ORDER = (
    "config distributed products sources tokens shards corpus layers attention llama optim "
    "techniques schedule options allocator builders catalogue methods sharded step tracing "
    "formulas ranks memory budget spectra checkpoint provenance runs watch train needs sample "
    "export stats tables one_matrix grid figures slider panel one_matrix_view grid_view report "
    "widgets explorer merge jobs runner selection cluster pages publish study study_view "
    "budget_view cli __main__"
).split()
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
HEAVY = (
    "matplotlib pandas papermill tokenizers seaborn transformers datasets dask distributed"
).split()


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def room_of(path):
    """The module or subpackage of the library that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(tree, path):
    """Modules of the library that a syntax tree imports, at any depth and under any condition."""
    rooms = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = path.relative_to(PACKAGE.parent).parts[: -node.level]
                source = ".".join([*parts, *([source] if source else [])])
            # from lowrank_lab import x: x is a module, or a name that __init__ took from one
            names = [source] if source != "lowrank_lab" else []
            names += [f"{source}.{alias.name}" for alias in node.names if not names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("lowrank_lab.")}
        assert "lowrank_lab" not in names, f"{path.name} imports the whole package"
    return rooms


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_has_a_place_in_the_order(path):
    assert room_of(path) in ORDER


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_imports_only_modules_before_it(path):
    room = room_of(path)
    allowed = {*ORDER[: ORDER.index(room)], *([room] if path.parent != PACKAGE else [])}
    assert imported_rooms(ast.parse(path.read_text()), path) <= allowed


def test_the_rooms_that_decide_a_run_are_those_that_training_uses():
    records = {
        "allocator",
        "tracing",
        "formulas",
        "ranks",
        "memory",
        "spectra",
        "checkpoint",
        "provenance",
        "runs",
        "watch",
    }  # written or kept, not computed with
    reached, todo = set(), {"train"}
    while todo:
        room = todo.pop()
        reached.add(room)
        files = [p for p in FILES if room_of(p) == room]
        found = set().union(*(imported_rooms(ast.parse(p.read_text()), p) for p in files))
        todo |= found - reached
    assert {name.removesuffix(".py") for name in TRAINING_ROOMS} == reached - records


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_library_prints_nothing(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [call.func.id for call in calls if isinstance(call.func, ast.Name)]
    assert "print" not in names


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import lowrank_lab.train as t", {"train"}),
        ("from lowrank_lab import memory, checkpoint", {"memory", "checkpoint"}),
        ("from lowrank_lab.optim.base import averages", {"optim"}),
        ("from .projection import sides", {"optim"}),
        ("from ..corpus import prepare", {"corpus"}),
        ("from .. import runs", {"runs"}),
        ("if TYPE_CHECKING:\n    from lowrank_lab.llama import Llama", {"llama"}),
        ("def f():\n    from lowrank_lab import study", {"study"}),
        ("import torch.optim\nfrom torch import nn", set()),
    ],
)
def test_every_way_to_import_is_seen(source, rooms):
    assert imported_rooms(ast.parse(source), PACKAGE / "optim" / "galore.py") == rooms


def test_importing_the_library_loads_nothing_it_may_not_need():
    program = f"import sys, lowrank_lab; sys.exit(' '.join({set(HEAVY)} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_public_name_is_there():
    assert sorted(lowrank_lab.__all__) == list(dict.fromkeys(sorted(lowrank_lab.__all__)))
    assert all(hasattr(lowrank_lab, name) for name in lowrank_lab.__all__)
