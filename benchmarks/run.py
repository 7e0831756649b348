"""Run all comparisons in turn; write results.json, the table and the figures."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, in_fresh_process, machine
from lowrank_lab.config import InputError

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE.parent / "docs" / "results" / "speed.md"
PEERS = ("galore_torch", "fira", "apollo_torch", "pytorch_optimizer", "transformers")
TABLE = "<!-- benchmarks -->", "<!-- /benchmarks -->"
SUITES = (
    "imports", "study_growth", "corpora", "recording", "layers", "subspaces", "optimizers",
    "training", "steps", "growth", "many_matrices",
)  # fmt: skip


def run(names: tuple[str, ...], quick: bool, report: Callable[[Row], None]) -> dict[str, Any]:
    """The rows of the named suites (all by default), with facts about the machine.

    Unless `quick`, they are written to results.json, the book's table and the figures. Rows of
    other suites stay if they come from the same machine and packages.
    """
    for peer in PEERS:
        if find_spec(peer) is None:
            raise InputError("bench", peer, "isn't installed: pip install -e '.[peers]'")
    rows: list[dict[str, Any]] = []
    for name in names or SUITES:
        for row in in_fresh_process(_rows, name, quick):
            report(row)
            rows.append(row.as_dict())
    kept = {"machine": machine(quick), "rows": rows}
    if not quick and (not names or (old := _kept_before(kept["machine"]))):
        if names:
            new = {row["name"] + row["peer_name"]: row for row in rows}
            rows = [new.pop(row["name"] + row["peer_name"], row) for row in old] + [*new.values()]
        RESULTS.write_text(json.dumps({**kept, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
        write_table(rows)
        draw(rows)
    return kept


def _rows(name: str, quick: bool) -> list[Row]:
    found: list[Row] = importlib.import_module(f"benchmarks.{name}").rows(quick)
    return found


def _kept_before(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in results.json, if machine and packages are the same (except for GEMM rates)."""
    if not RESULTS.exists():
        return []
    old = json.loads(RESULTS.read_text())
    same = all(old["machine"].get(k) == v for k, v in facts.items() if k != "gemm_gflops")
    rows: list[dict[str, Any]] = old["rows"] if same else []
    return rows


def line(row: Row) -> str:
    """One row for the terminal."""
    parts = [f"{row.name}: {_number(row.ours)} {row.unit}"]
    if row.peer is not None:
        parts.append(f"{row.peer_name} {_number(row.peer)}")
    if row.floor is not None:
        parts.append(f"floor {_number(row.floor)}")
    parts.append(f"ratio {row.ratio:.2f}")
    if row.target:
        parts.append(f"target {row.target}: {'met' if row.met else 'NOT met'}")
    return ", ".join(parts) + (f" ({row.note})" if row.note else "")


def write_table(rows: list[dict[str, Any]]) -> None:
    """The rows with a target, and why some miss it, between the two marks in the book's page."""
    head = ("", "ours", "against", "theirs", "floor", "ratio", "target", "")
    cells = [head, ("---",) * len(head)]
    for row in rows:
        if row["target"]:
            peer, floor = (_number(row[key]) for key in ("peer", "floor"))
            ours, met = f"{_number(row['ours'])} {row['unit']}", "met" if row["met"] else "not met"
            ratio = f"{row['ratio']:.2f}"
            cells.append(
                (row["name"], ours, row["peer_name"], peer, floor, ratio, row["target"], met)
            )
    lines = [f"| {' | '.join(line)} |" for line in cells]
    text = PAGE.read_text()
    if all(mark in text for mark in TABLE):
        before, rest = text.split(TABLE[0], 1)
        after = rest.split(TABLE[1], 1)[1]
        table = "\n".join([*lines, *shortfalls(rows)])
        PAGE.write_text(f"{before}{TABLE[0]}\n{table}\n{TABLE[1]}{after}")


def shortfalls(rows: list[dict[str, Any]]) -> list[str]:
    """For each row that misses its target: the ratio at its floor, and where its time goes."""
    missed = [row for row in rows if row["met"] is False]
    lines = [f"* {row['name']}, against {row['peer_name']}: {_why(row)}." for row in missed]
    return ["", "What is not met, and where the time goes:", "", *lines] if lines else []


def _why(row: dict[str, Any]) -> str:
    peer, floor, where = row["peer"], row["floor"], row["note"].rpartition("our time: ")[2]
    if peer is None or not floor:
        return where
    most = floor / peer if row["unit"] == "tokens/s" else peer / floor
    return f"at its floor it would be {most:.2f}; of our time {where}"


def draw(rows: list[dict[str, Any]]) -> None:
    """Ratios against their targets, and growth: build/benchmarks/*.png; figures/ has growth."""
    from benchmarks.pictures import growth, ratios
    from lowrank_lab.figures import refresh

    folder = HERE.parent / "build" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in {"ratios": ratios, "growth": growth}.items():
        figure = picture(rows)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=140)
    refresh(HERE.parent / "figures" / "benchmarks", folder)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
