"""Imports go one way, between packages and within them, and importing the library stays cheap."""

import ast
import itertools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lowrank_lab
from lowrank_lab.training.provenance import TRAINING_SOURCES

PACKAGE = Path(lowrank_lab.__file__).parent
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
HEAVY = (
    "matplotlib pandas pyarrow papermill tokenizers seaborn transformers datasets dask distributed "
    "torch._dynamo torch._inductor"
).split()
# What a run writes and keeps, but doesn't compute with.
RECORDS = {
    "cpu/malloc.py", "memory", "paths.py", "analysis/spectra.py", "analysis/spectra_recorder.py",
    "runs", "training/checkpoint.py", "training/clock.py", "training/errors.py",
    "training/monitor.py",
    "training/optimizer_state.py", "training/optimizer_trial.py", "training/outside.py",
    "training/peaks.py", "training/provenance.py", "training/random_state.py",
    "training/records.py", "training/trackers.py",
}  # fmt: skip


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def module_of(path):
    """The dotted name of a file's module within the library; a package's own is its name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported_modules(tree, path):
    """Modules of the library that a syntax tree imports, at any depth and under any condition."""
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            assert "lowrank_lab" not in names, f"{path.name} imports the whole package"
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = path.relative_to(PACKAGE.parent).parts[: -node.level]
                source = ".".join([*parts, *([source] if source else [])])
            # from a.b import c: c is a module, or a name in a.b
            names = [f"{source}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix("lowrank_lab.") in MODULES else source for n in names]
        found |= {
            name.removeprefix("lowrank_lab.")
            for name in names
            if name.split(".")[0] == "lowrank_lab"
        }
    return found - {"lowrank_lab"}


def graph_of_modules():
    return {m: imported_modules(ast.parse(p.read_text()), p) - {m} for m, p in MODULES.items()}


def package_of(module):
    return module.partition(".")[0]


def graph_of_packages(modules):
    graph = {}
    for module, imported in modules.items():
        found = {package_of(other) for other in imported} - {package_of(module)}
        graph.setdefault(package_of(module), set()).update(found)
    return graph


def order_of(graph):
    """The names, each after all that it needs; a circle is an error that names it."""
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' → '.join(reversed(error.args[1]))}")


def test_packages_import_each_other_one_way():
    graph = graph_of_packages(graph_of_modules())
    order_of(graph)
    flow = "config data models methods memory runs analysis training planning studies cli".split()
    for earlier, later in itertools.combinations(flow, 2):
        assert later not in needed_by(earlier, graph), f"{earlier} needs {later}"


def needed_by(name, graph):
    """All that a package needs, directly or through others."""
    found, todo = set(), {name}
    while todo:
        more = graph.get(todo.pop(), set()) - found
        found |= more
        todo |= more
    return found


def test_modules_of_a_package_import_each_other_one_way():
    modules = graph_of_modules()
    for package in {package_of(module) for module in modules}:
        within = {m: {o for o in found if package_of(o) == package and o != package}
                  for m, found in modules.items() if package_of(m) == package}  # fmt: skip
        order_of(within)


def test_a_circle_of_imports_would_be_found():
    graph = {"a.x": {"b.y"}, "b.y": {"c"}, "c": {"a.z"}, "a.z": set()}
    order_of(graph)  # none between modules
    with pytest.raises(pytest.fail.Exception, match=r"circle: .* → "):
        order_of(graph_of_packages(graph))


def test_few_modules_lie_beside_the_packages():
    beside = {p.name for p in PACKAGE.iterdir() if p.is_file()}
    assert len(beside - {"__init__.py", "__main__.py", "py.typed"}) <= 6


def test_every_package_says_what_it_is():
    for path in PACKAGE.glob("*/__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_training_loop_alone_changes_the_process():
    users = {
        m for m, found in graph_of_modules().items() if any(package_of(o) == "cpu" for o in found)
    }
    assert {m for m in users if package_of(m) != "cpu"} == {"training.loop"}


def test_the_sources_that_decide_a_run_are_those_that_training_uses():
    modules = graph_of_modules()
    reached, todo = set(), {"training.loop"}
    while todo:
        module = todo.pop()
        reached.add(module)
        todo |= modules[module] - reached

    def within(module, places):
        name = name_of(MODULES[module])
        return any(name == place or name.startswith(f"{place}/") for place in places)

    assert {m for m in reached if not within(m, TRAINING_SOURCES)} == {
        m for m in reached if within(m, RECORDS)
    }
    unused = [s for s in TRAINING_SOURCES if not any(within(m, [s]) for m in reached)]
    assert not unused


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_library_prints_nothing(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [call.func.id for call in calls if isinstance(call.func, ast.Name)]
    assert "print" not in names


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("import lowrank_lab.training.trainer as t", {"training.trainer"}),
        ("from lowrank_lab import distributed, config", {"distributed", "config"}),
        ("from lowrank_lab.training import step", {"training.step"}),
        ("from lowrank_lab.optim.adam import adam_moments", {"optim.adam"}),
        ("from lowrank_lab.optim import GaLore", {"optim"}),
        ("from .projection import sides", {"optim.projection"}),
        ("from ..data.corpus import prepare", {"data.corpus"}),
        ("from ..runs import run", {"runs.run"}),
        ("if TYPE_CHECKING:\n    from lowrank_lab.models.llama import Llama", {"models.llama"}),
        ("def f():\n    from lowrank_lab.studies import study", {"studies.study"}),
        ("import torch.optim\nfrom torch import nn", set()),
    ],
)
def test_every_way_to_import_is_seen(source, modules):
    assert imported_modules(ast.parse(source), PACKAGE / "optim" / "galore.py") == modules


def test_importing_the_library_loads_nothing_it_may_not_need():
    program = f"import sys, lowrank_lab; sys.exit(' '.join({set(HEAVY)} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_public_name_is_there():
    assert sorted(lowrank_lab.__all__) == list(dict.fromkeys(sorted(lowrank_lab.__all__)))
    assert set(lowrank_lab.__all__) <= set(dir(lowrank_lab))
    assert all(hasattr(lowrank_lab, name) for name in lowrank_lab.__all__)
    assert not hasattr(lowrank_lab, "no_such_name")


def test_training_and_planning_are_imported_when_they_are_asked_for():
    program = (
        "import sys, lowrank_lab as lab; late = ['lowrank_lab.training.loop', "
        "'lowrank_lab.planning.simulate']; before = [m in sys.modules for m in late]; "
        "lab.train, lab.simulate_memory; print(before, [m in sys.modules for m in late])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[False, False] [True, True]\n", "")
