"""Memory reports as facts for JSON, as text for the terminal and as tables for notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.memory.breakdown import CATEGORIES, NAMES, PARTS
from lowrank_lab.memory.formulas import by_formula
from lowrank_lab.memory.trace import Trace
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning import fit
from lowrank_lab.planning.fit import GB
from lowrank_lab.planning.fsdp import check_world_size, per_rank
from lowrank_lab.planning.memory_report import MemoryReport
from lowrank_lab.planning.simulate import measure, simulate

MOST_OWNERS = 8
NEVER_PERSISTENT = ("temporaries", "workspaces", "gathered")


def facts(
    config: RunConfig,
    capacity: int | None,
    device: str = "cuda",
    measured: bool = False,
    world_size: int | None = None,
) -> dict[str, Any]:
    """Everything about one configuration's memory, in bytes.

    At the top level the persistent categories (weights, gradients and states), activations as the
    backward pass begins, and the peak. With `world_size` all numbers are of the process with the
    most bytes, and `states_per_rank` has the fewest and the most bytes of states per process.
    """
    config = resolve(config)
    report = simulate(config, device, world_size=world_size)
    found = report_facts(report)
    try:
        reports = [by_formula(config)] if world_size is None else per_rank(config, world_size)
        found["formula"] = reports[report.rank].as_dict()
        states = [each.optimizer_states for each in reports]
    except InputError:
        found["formula"], states = None, [found["optimizer_states"]]
    if world_size is not None:
        found["states_per_rank"] = [min(states), max(states)]
    if measured:
        here, real = report if device == "cpu" else simulate(config), measure(config)
        found["measured"] = report_facts(real) | {
            "allocated": real.allocated,
            "simulated_over_allocated": {
                kind: round(trace.peak.total / real.allocated[kind], 4)
                for kind, trace in here.steps.items()
            },
        }
    if capacity is not None:
        found["capacity"] = capacity
        found["fits"] = report.peak.total <= capacity
        tried = [] if found["fits"] else fit.suggestions(config, capacity, device, world_size)
        found["suggestions"] = [
            {"flags": a.flags, "peak": a.peak, "simulated": a.report is not None, "fits": a.fits}
            for a in tried
        ]
    return found


def report_facts(report: MemoryReport) -> dict[str, Any]:
    config, step = report.config, report.steps[report.peak_step]
    assert config is not None
    kept = report.steps.get("next", step).kept
    rest = report.persistent.as_dict() | {"activations": kept.activations, "logits": kept.logits}
    shared = report.world_size > 0
    process = {"world_size": report.world_size, "process": report.rank} if shared else {}
    owners = list(step.by_owner().items())[:MOST_OWNERS]
    return {
        "method": config.method, "model": config.model, "rank": config.rank,
        "batch": config.batch, "sequence_length": config.sequence_length,
        "precision": config.precision, "source": report.source,
        **process,
        **{name: rest[name] for name in NAMES if name not in NEVER_PERSISTENT},
        "peak": report.peak.total,
        "peak_step": report.peak_step,
        "peak_phase": step.phase_of(step.peak_event),
        "at_the_peak": report.peak.as_dict(),
        "peak_of_steps": {name: trace.peak.total for name, trace in report.steps.items()},
        "largest_at_the_peak": [
            {"category": kind, "owner": owner, "bytes": size} for (kind, owner), size in owners
        ],
        "excluded": report.excluded,
        "seconds": round(report.seconds, 2),
    }  # fmt: skip


def comparison(
    config: RunConfig,
    capacity: int | None,
    device: str = "cuda",
    measured: bool = False,
    world_size: int | None = None,
) -> Iterator[dict[str, Any]]:
    """The facts of every method; with a capacity, the changes that make it fit as well.

    A method that refuses this configuration is a row with `refused`.

    Raises:
        InputError: a world size that no method could share the run by.
    """
    if world_size is not None:
        check_world_size(resolve(fit.of_method(config, "full-rank")), world_size)
    for method in METHODS:
        try:
            changed = resolve(fit.of_method(config, method))
            yield facts(changed, capacity, device, measured, world_size)
        except InputError as error:
            yield {"method": method, "refused": str(error), "seconds": 0.0}


def text(found: dict[str, Any]) -> str:
    """The facts of one configuration, as text for the terminal."""
    rank = f", rank {found['rank']}" if found["rank"] else ""
    lines = [_process_line(found)] if "world_size" in found else []
    lines += [
        f"{found['method']}, {found['model']}{rank}, {found['precision']}, batch {found['batch']} "
        f"× {found['sequence_length']} tokens; simulated in {found['seconds']:.1f} s",
        f"{'in GB':<20}{'between':>8}{'at the peak':>14}",
    ]
    counted = ("weights", "frozen", "indices", "gradients", "optimizer_states", "projections")
    for name in NAMES:
        rest, peak = found.get(name), found["at_the_peak"][name]
        if name in PARTS and not rest and not peak:
            continue
        title = ("  of them " if name in PARTS else "") + name.replace("_", " ")
        shown = "" if rest is None else f"{rest / GB:.3f}"
        lines.append(f"{title:<20}{shown:>8}{peak / GB:>14.3f}")
    lines.append(f"{'peak':<20}{'':>8}{found['peak'] / GB:>14.3f}")
    steps = ", ".join(f"{name} {size / GB:.3f}" for name, size in found["peak_of_steps"].items())
    lines += [
        "",
        "(between two steps: weights, gradients and states; activations and logits as the backward "
        "pass begins)",
        f"the peak is in the {found['peak_phase']} phase of a step of the kind "
        f"'{found['peak_step']}'; peaks by kind: {steps}",
        "largest at the peak: "
        + ", ".join(
            f"{row['owner']} ({row['category'].replace('_', ' ')}) {row['bytes'] / GB:.3f}"
            for row in found["largest_at_the_peak"]
        ),
    ]
    if found.get("formula"):
        same = all(found["formula"][name] == found[name] for name in counted)
        lines.append(
            "weights, gradients and states by formula: "
            + ("the same, to the byte" if same else f"DIFFERENT: {found['formula']}")
        )
    if found.get("measured"):
        real = found["measured"]
        lines.append(
            f"measured on this machine's CPU: peak {real['peak'] / GB:.3f} by live storages, "
            f"{max(real['allocated'].values()) / GB:.3f} by the allocator; simulated over "
            "allocated: "
            + ", ".join(f"{k} {v:.4f}" for k, v in real["simulated_over_allocated"].items())
        )
    lines += [f"left out: {what}" for what in found["excluded"]]
    if "fits" in found:
        lines += ["", _verdict(found)]
    return "\n".join(lines)


def _process_line(found: dict[str, Any]) -> str:
    """The rank and world size of the process, and its share of the batch."""
    least, most = (size / GB for size in found["states_per_rank"])
    batch, world_size = found["batch"], found["world_size"]
    return (
        f"rank {found['process']} of world size {world_size} by FSDP2, the largest (states: "
        f"{least:.3f} to {most:.3f} GB per process); {batch // world_size} of {batch} sequences "
        "per process"
    )


def _verdict(found: dict[str, Any]) -> str:
    capacity, spare = found["capacity"], (found["capacity"] - found["peak"]) / GB
    if found["fits"]:
        return f"fits in {capacity / GB:.4g} GB, with {spare:.3f} GB to spare"
    lines = [f"does not fit in {capacity / GB:.4g} GB: {-spare:.3f} GB too much"]
    for way in found["suggestions"]:
        peak = (
            f"{way['peak'] / GB:.3f} GB" if way["simulated"] else f"over {way['peak'] / GB:.3f} GB"
        )
        lines.append(f"  {'fits' if way['fits'] else 'not '}  {peak:>14}  with {way['flags']}")
    if not any(way["fits"] for way in found["suggestions"]):
        lines.append("  nothing that was tried fits: a smaller model, a lower rank, another method")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """One line per method."""
    with_fits = any("fits" in row for row in rows)
    with_measures = any("measured" in row for row in rows)
    head = ["GB", "weights", "gradients", "states", "activations", "peak", "weights+states"]
    shared = next((row for row in rows if "world_size" in row), None)
    lines = []
    if shared is not None:
        head += ["gathered", "least states"]
        count = shared["world_size"]
        lines = [
            f"one process of {count} by FSDP2, that which holds most; {shared['batch'] // count} "
            f"of {shared['batch']} sequences a process; gathered: whole weights of the block at "
            "work and what travels, at the peak; least states: of the process that holds fewest"
        ]
    lines += [
        "".join(f"{name:>16}" if i else f"{name:<14}" for i, name in enumerate(head))
        + ("   simulated / allocated, by kind of step" if with_measures else "")
        + ("   fits" if with_fits else "")
    ]
    for row in rows:
        if "refused" in row:
            lines.append(f"{row['method']:<14}{row['refused']}")
            continue
        values = [
            row["weights"], row["gradients"], row["optimizer_states"], row["activations"],
            row["peak"], row["weights"] + row["optimizer_states"],
        ]  # fmt: skip
        if "world_size" in row:
            values += [row["at_the_peak"]["gathered"], row["states_per_rank"][0]]
        line = f"{row['method']:<14}" + "".join(f"{value / GB:>16.3f}" for value in values)
        if "measured" in row:
            found = row["measured"]["simulated_over_allocated"]
            line += "   " + ", ".join(f"{kind} {value:.4f}" for kind, value in found.items())
        if with_fits:
            way = next((way for way in row["suggestions"] if way["fits"]), None)
            line += (
                "   yes"
                if row["fits"]
                else (f"   {way['peak'] / GB:.2f} with {way['flags']}" if way else "   no")
            )
        lines.append(line)
    return "\n".join(lines)


def peaks(report: MemoryReport) -> pd.DataFrame:
    """One row per kind of step: peak in GB, its phase, and its largest categories."""
    rows = []
    for kind, trace in report.steps.items():
        peak = trace.peak
        largest = sorted(CATEGORIES, key=lambda name: -getattr(peak, name))[:2]
        rows.append(
            {
                "step": kind,
                "peak (GB)": round(peak.total / GB, 4),
                "phase": trace.phase_of(trace.peak_event),
                "largest": ", ".join(
                    f"{name.replace('_', ' ')} {getattr(peak, name) / peak.total:.0%}"
                    for name in largest
                ),
            }
        )
    return pd.DataFrame(rows)


def largest(trace: Trace, rows: int = 12) -> pd.DataFrame:
    """MB at the peak by category and module, the largest first."""
    found = [(c, owner, round(size / 1e6, 2)) for (c, owner), size in trace.by_owner().items()]
    return pd.DataFrame(found[:rows], columns=["category", "module or weight", "MB"])


def checked(config: RunConfig) -> pd.DataFrame:
    """Formula, simulation and measurement of a configuration side by side, in bytes."""
    counted, simulated, real = by_formula(resolve(config)), simulate(config), measure(config)
    rows: list[tuple[str, Any, int, int, int | None]] = [
        (
            name.replace("_", " "), getattr(counted, name), getattr(simulated.persistent, name),
            getattr(real.persistent, name), None,
        )
        for name in ("weights", "gradients", "optimizer_states")
    ]  # fmt: skip
    for kind, trace in simulated.steps.items():
        measured = real.steps[kind].peak.total
        rows.append((f"peak: {kind}", None, trace.peak.total, measured, real.allocated[kind]))
    names = ["bytes", "formula", "simulated", "measured", "by the allocator"]
    table = pd.DataFrame(rows, columns=names).astype(dict.fromkeys(names[1:], "Int64"))
    witness = table["by the allocator"].fillna(table["measured"]).astype(float)
    table["simulated / measured"] = (table["simulated"].astype(float) / witness).round(4)
    return table


def compared(reports: Mapping[str, MemoryReport]) -> pd.DataFrame:
    """Bytes by category at the peak of each report, and the seconds of its simulation."""
    return pd.DataFrame(
        {
            "label": label, **report.peak.as_dict(), "peak": report.peak.total,
            "weights + states": report.persistent.weights + report.persistent.optimizer_states,
            "seconds": report.seconds,
        }
        for label, report in reports.items()
    )  # fmt: skip


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A `compared` table in GB, the smallest peak first."""
    shown = table.sort_values("peak", ignore_index=True)
    sizes = shown.columns.difference(["label", "seconds"])
    shown[sizes] = (shown[sizes] / GB).round(3)
    return shown.round({"seconds": 1})


# Ranks of the paper's experiments (2505.22922, Table 2), and of GaLore's for 7b.
PAPER_RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}


def of_sizes(precision: str = "bf16") -> pd.DataFrame:
    """Weights + optimizer states in GB by formula, per method and size of the paper."""
    rows = {}
    for method in METHODS:
        row = {}
        for size, rank in PAPER_RANKS.items():
            config = RunConfig(model=size, rank=rank, precision=precision, steps=fit.LONG)
            try:
                found = by_formula(resolve(fit.of_method(config, method)))
            except InputError:  # a method of one's own
                break
            row[f"{size}, r {rank}"] = round((found.weights + found.optimizer_states) / GB, 3)
        if row:
            rows[method] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def suggestions(config: RunConfig, capacity: int, device: str = "cuda") -> pd.DataFrame:
    """The configuration, and changes that could make it fit: each with its peak."""
    peak = simulate(config, device).peak.total
    rows = [("as it is", peak, peak <= capacity)]
    if peak > capacity:
        rows += [(a.words, a.peak, a.fits) for a in fit.suggestions(config, capacity, device)]
    return pd.DataFrame(
        [(what, round(peak / GB, 3), "yes" if fits else "no") for what, peak, fits in rows],
        columns=["change", "peak (GB)", f"fits in {capacity / GB:.4g} GB"],
    )
