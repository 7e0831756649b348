"""Run all comparisons in turn; write results.json, the table and the figures."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, in_fresh_process, machine, machine_kind
from lowrank_lab.config import InputError

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE.parent / "docs" / "results" / "speed.md"
PEERS = ("galore_torch", "fira", "apollo_torch", "pytorch_optimizer", "transformers")
TABLE = "<!-- benchmarks -->", "<!-- /benchmarks -->"
KINDS = "<!-- machines -->", "<!-- /machines -->"
SUITES = (
    "imports", "widgets", "study_growth", "corpora", "recording", "layers", "subspaces",
    "optimizers", "training", "cpu_training", "steps", "steps_60m", "growth", "many_matrices",
)  # fmt: skip


def run(names: tuple[str, ...], quick: bool, report: Callable[[Row], None]) -> dict[str, Any]:
    """The rows of the named suites (all by default), with facts about the machine.

    Unless `quick`, they are written to results.json, the book's tables and the figures. A run of
    all suites replaces what is there. Rows of single suites join those from the same machine and
    packages; from another machine they are kept under its kind, beside the others.
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
    if not quick:
        _keep(kept, part=bool(names))
    return kept


def _keep(new: dict[str, Any], part: bool) -> None:
    """Write results.json and all that shows it."""
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else new
    kinds: dict[str, Any] = old.pop("machines", {})
    if not part:
        old = new
    elif _same(old["machine"], new["machine"]):
        old = {"machine": new["machine"], "rows": _joined(old["rows"], new["rows"])}
    else:
        kind = machine_kind(new["machine"])
        before = kinds.get(kind)
        if before and _same(before["machine"], new["machine"]):
            new = {"machine": new["machine"], "rows": _joined(before["rows"], new["rows"])}
        kinds[kind] = new
    kept = {**old, **({"machines": kinds} if kinds else {})}
    RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    write_table(old["rows"])
    write_kinds(kinds)
    draw(old["rows"])


def _same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether machine and packages are the same, but for GEMM rates and the system's release."""
    return all(old.get(k) == v for k, v in new.items() if k not in ("gemm_gflops", "system"))


def _joined(old: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    new = {row["name"] + row["peer_name"]: row for row in rows}
    return [new.pop(row["name"] + row["peer_name"], row) for row in old] + [*new.values()]


def _rows(name: str, quick: bool) -> list[Row]:
    found: list[Row] = importlib.import_module(f"benchmarks.{name}").rows(quick)
    return found


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
    _between(TABLE, [*table(rows), *shortfalls(rows)])


def write_kinds(kinds: dict[str, Any]) -> None:
    """A table for each further kind of machine."""
    lines = []
    for kind, kept in kinds.items():
        facts = kept["machine"]["lscpu"]
        hidden = " ".join(f"{k}={v}" for k, v in facts.get("emulated", {}).items())
        told = f"{kept['machine']['cores']} cores, L2 {facts.get('L2 cache')}"
        lines += [
            "",
            f"**{kind}**, {told}" + (f"; instructions hidden by `{hidden}`" if hidden else ""),
        ]
        lines += ["", *table(kept["rows"], every=True)]
    _between(KINDS, lines[1:])


def _between(marks: tuple[str, str], lines: list[str]) -> None:
    text = PAGE.read_text()
    if all(mark in text for mark in marks):
        before, rest = text.split(marks[0], 1)
        after = rest.split(marks[1], 1)[1]
        PAGE.write_text("\n".join([before + marks[0], *lines, marks[1] + after]))


def table(rows: list[dict[str, Any]], every: bool = False) -> list[str]:
    """The rows with a target, or every row, in Markdown."""
    head = ("", "ours", "against", "theirs", "floor", "ratio", "target", "")
    cells = [head, ("---",) * len(head)]
    for row in rows:
        if row["target"] or every:
            peer, floor = (_number(row[key]) for key in ("peer", "floor"))
            ours, ratio = f"{_number(row['ours'])} {row['unit']}", f"{row['ratio']:.2f}"
            met = ("met" if row["met"] else "not met") if row["target"] else ""
            target = row["target"] or "–"
            cells.append((row["name"], ours, row["peer_name"], peer, floor, ratio, target, met))
    return [f"| {' | '.join(line)} |" for line in cells]


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
