"""Adding a method to the library takes one new file, one row and one golden file: here they are."""

import os
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

OPTIMIZER = '''"""Sign descent: steps of ±lr along the sign of an averaged gradient."""

import torch


class SignDescent(torch.optim.Optimizer):
    """p ← p − lr · sign(m), with m an average of gradients."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                m = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(m.sign(), alpha=group["lr"])


def momentum_bytes(w, config):
    """Bytes of m."""
    return w.nbytes
'''
ROW = """    Method(
        name="mine",
        summary="steps of the sign of the momentum",
        source="1802.04434",
        year=2018,
        parent="full-rank",
        use="half of AdamW's states for a step of one size",
        optimizer=uniform(mine.SignDescent, "momentum"),
        lr=ByWidth({64: 2.5e-3}),
        options={"momentum": Option.number(0.9, 0, 0.999999)},
        needs_full="none",
        states="mn",
        state_bytes=mine.momentum_bytes,
        colour="#123ABC",
    ),
"""
IMPORT = "from lowrank_lab.optim import mine\n"

# What a person would do with a method that is new, each line of which needs the three changes.
USE = """
import sys
import lowrank_lab as lab
from lowrank_lab import figures
from lowrank_lab.memory.formulas import by_formula
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning.simulate import measure

config = lab.RunConfig(
    model="tiny", num_layers=1, corpus=sys.argv[2], vocab_size="byte", method="mine",
    sequence_length=16, batch=4, steps=40, eval_tokens=64, test_tokens=64,
)
counted = by_formula(resolve(config))
for report in (lab.simulate_memory(config), measure(config)):
    for name in ("weights", "gradients", "optimizer_states"):
        assert getattr(report.persistent, name) == getattr(counted, name), (report.source, name)
run = lab.train(config, sys.argv[1])
loss = run.metrics["loss"]
assert loss.iloc[-5:].mean() < loss.iloc[:5].mean() - 0.5
assert run.result["optimizer_state_bytes"] == counted.optimizer_states
curves = figures.loss_curves(lab.load_runs(sys.argv[1]))
assert "#123abc" in {line.get_color().lower() for ax in curves.axes for line in ax.get_lines()}
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the library and of the tests of methods, with a method `mine` added to it."""
    root = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lowrank_lab", root / "lowrank_lab", ignore=ignored)
    shutil.copytree(ROOT / "tests" / "golden", root / "tests" / "golden")
    for path in (ROOT / "tests").glob("*.py"):
        shutil.copy(path, root / "tests")
    folder = root / "tests" / "unit" / "methods"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "unit" / "methods" / "test_methods.py", folder)
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copytree(ROOT / "data" / "study", root / "data" / "study")  # defaults are held to it
    (root / "lowrank_lab" / "optim" / "mine.py").write_text(OPTIMIZER)
    family = root / "lowrank_lab" / "methods" / "dense_rows.py"
    rows = family.read_text().replace("\nDENSE = (\n", f"\n{IMPORT}\nDENSE = (\n{ROW}")
    family.write_text(rows)
    python(root, "tests/write_golden.py", "mine")
    return root


def python(root, *arguments):
    """The output of a Python process that sees the library of this checkout."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    environment |= {"LOWRANK_LAB_DATA": str(root / "data")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(root):
    """The content of each file of the library and of its golden losses."""
    folders = (root / "lowrank_lab", root / "tests" / "golden")
    paths = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in paths
        if "__pycache__" not in p.parts
    }


def test_three_files_are_all_that_a_new_method_touches(checkout):
    before, after = files_of(ROOT), files_of(checkout)
    touched = {name for name in after if after[name] != before.get(name)}
    assert before.keys() <= after.keys()
    assert touched == {
        "lowrank_lab/optim/mine.py", "lowrank_lab/methods/dense_rows.py", "tests/golden/mine.txt",
    }  # fmt: skip


def test_a_new_method_is_listed(checkout):
    assert '"name": "mine"' in python(checkout, "-m", "lowrank_lab", "methods", "--json")


def test_a_new_method_is_counted_simulated_trained_and_drawn(checkout, tmp_path, text_corpus):
    python(checkout, "-c", USE, str(tmp_path / "run"), text_corpus)


def test_the_tests_of_all_methods_hold_for_a_new_one(checkout):
    tests = ["tests/unit/methods/test_methods.py", "-k", "mine or golden_file or colour"]
    found = python(checkout, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *tests)
    assert "test_twenty_steps_lose_what_they_lost_before[mine] PASSED" in found
