"""How far each optimizer is from its equations in float64, and from its published package.

`python tests/equality_errors.py [NAME…]` writes a table of all rows of optimizer_rows.py: the
largest relative error of the accumulated update over all shapes, ranks and options, after 1, 10, 20
and all steps.
"""

import sys
from dataclasses import replace

import torch
from optimizer_rows import ROWS
from optimizer_trial import Trial
from small_matrices import readable, relative

STOPS = (1, 10, 20)


def name_of(row, shape, rank, keys):
    words = [row.name, readable(shape) or "scalar", *([f"rank {rank}"] if rank else [])]
    return ", ".join([*words, *(f"{k} {v}" for k, v in keys.items())])


def run(row, shape, rank, cls=None, dtype=torch.float32, steps=None, **keys):
    """A trial after all steps, the matrix before them, and what the optimizer kept after each."""
    if cls is not None:
        row, keys = replace(row, keys={}), row.theirs(**row.keys | keys)
    trial, seen = Trial(row, shape, rank, dtype, cls, **keys), []
    before = trial.result()
    return trial.advance(row.gradients(shape, row.steps, dtype)[:steps], seen), before, seen


def by_equations(row, shape, rank, before, seen, dtype=torch.float32, **keys):
    """The matrix after as many steps as were seen."""
    if row.kind == "factors":
        fresh = Trial(row, shape, rank, dtype)
        keys["factors"] = fresh.matrices
        if hasattr(fresh.optimizer, "start_vector"):
            keys["vectors"] = [fresh.optimizer.start_vector(X) for X in fresh.matrices]
    grads = row.gradients(shape, row.steps, dtype)[: len(seen)]
    return row.equations(before, grads, seen, rank=rank, **row.keys | keys).detach()


def error(result, reference, before):
    """Relative error of the accumulated update, stricter than that of the weights."""
    return relative(result - before, reference - before)


def well_defined(row, keys):
    """At a refresh of two sides by SVD, entries off the diagonal are rounding noise to Adam."""
    return (keys.get("proj_type"), keys.get("switch", 1) > 0) != ("full", True)


def errors_of(row, shape, rank, keys):
    """The largest error against the equations, and against the package; None without one."""
    ours, theirs = [], []
    for steps in (*STOPS, None):
        trial, before, seen = run(row, shape, rank, steps=steps, **keys)
        if row.equations and well_defined(row, keys):
            exact = by_equations(row, shape, rank, before, seen, **keys)
            ours.append(error(trial.result(), exact, before))
        if row.package and row.package_is_right(shape, rank, keys):
            published, *_ = run(row, shape, rank, row.package, steps=steps, **keys)
            theirs.append(error(trial.result(), published.result(), before))
    return max(ours, default=None), max(theirs, default=None)


def table(names=()):
    """The lines of the table."""
    yield "| optimizer | cases | steps | from the equations | from the package |"
    yield "|---|---|---|---|---|"
    for row in ROWS:
        if (names and row.name not in names) or not (row.equations or row.package):
            continue
        cases = [(*size, keys) for size in row.sizes for keys in row.cases]
        found = zip(*(errors_of(row, *case) for case in cases), strict=True)
        worst = [max((e for e in errors if e is not None), default=None) for errors in found]
        cells = ["" if e is None else f"{e:.1e}" for e in worst]
        yield f"| {row.name} | {len(cases)} | {row.steps} | {' | '.join(cells)} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in table(sys.argv[1:]):
        sys.stdout.write(line + "\n")
