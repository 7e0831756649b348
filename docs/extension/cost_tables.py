"""Tables of kept studies at equal cost, as lines of Markdown."""

from __future__ import annotations

import json
import math

import pandas as pd
from hypotheses import KEPT, ROOT
from kept_tables import finals_of, with_interval
from markdown_tables import markdown_table

from lowrank_lab.analysis.costs import at_equal_cost, costs_of
from lowrank_lab.analysis.ladder import REFERENCE

BENCHMARKS = ROOT / "benchmarks" / "results.json"


def equal_costs(*names: str) -> list[str]:
    """Each row against a dense model of the same bytes, FLOPs and time.

    Time is the steps of a run times what `lowrank-lab bench steps` measured; rows that it has not
    measured have none. At the smallest size there is no smaller dense model: its rows are left out.
    """
    costs = costs_of([KEPT / name for name in names])
    sizes = dict(zip(costs["parameters"].unique(), names, strict=True))
    taken = step_times()
    costs["time"] = costs["steps"] * [
        taken.get(f"step at {sizes[size].rpartition('_')[2].upper()}, {label}", math.nan)
        for label, size in zip(costs["label"], costs["parameters"], strict=True)
    ]
    both = costs[["parameters", "label"]].drop_duplicates()
    both = both[both["parameters"] > min(sizes)]
    head = ["parameters at full rank", "row"]
    for cost, title in (("bytes", "bytes"), ("flops", "FLOPs"), ("time", "time")):
        table = at_equal_cost(costs.dropna(subset=[cost]), cost)
        shown = {
            f"share of {title}": table["share"].map("{:.0%}".format),
            f"A − dense, equal {title}": list(map(with_interval, table["A − dense"], table["±"])),
        }
        head += shown
        found = table[["label", "parameters"]].assign(**shown)
        both = both.merge(found, on=["label", "parameters"], how="left")
    both = both.dropna(subset=head[2:], how="all").fillna("")
    both["parameters"] = both["parameters"].map("{:,}".format)
    return markdown_table(head, both[["parameters", "label", *head[2:]]].to_numpy().tolist())


def equal_bytes(*names: str) -> list[str]:
    """The table of `at_equal_bytes`."""
    found = at_equal_bytes(*names).to_dict("records")
    found.sort(key=lambda row: (row["label"].partition(",")[0], row["share"]))
    shown = [
        (row["label"], f"{row['share']:.0%}", with_interval(row["A − dense"], row["±"]), row["n"])
        for row in found
    ]
    return markdown_table(("row", "share of full rank's bytes", "A − dense", "n"), shown)


def at_equal_bytes(*names: str) -> pd.DataFrame:
    """Each row minus a dense model of the same bytes of weights and states, on the same tokens.

    The dense models are those of the last study, of several widths; between two of them the loss is
    read from a straight line over the logarithm of the bytes. Rows are those of the other studies,
    or of the only one.
    """
    dense = finals_of(names[-1])
    dense = dense[dense["method"] == REFERENCE]
    rows = pd.concat(map(finals_of, names[:-1] or names))
    rows = rows[rows["method"] != REFERENCE].drop_duplicates(["label", "seed"])
    rows = rows.assign(parameters=dense["parameters"].max())
    costs = pd.concat([dense.assign(label=REFERENCE), rows]).rename(columns={"test_loss": "loss"})
    costs["bytes"] = costs["weight_bytes"] + costs["optimizer_state_bytes"]
    return at_equal_cost(costs, "bytes")


def step_times() -> dict[str, float]:
    """Milliseconds by row of the benchmark `steps`, of the kind of machine that has them.

    Full rank's are the mean over the rounds that it took beside other rows.
    """
    kept = json.loads(BENCHMARKS.read_text())
    found: dict[str, list[float]] = {}
    for kind in (kept, *kept.get("machines", {}).values()):
        for row in kind["rows"]:
            if row["name"].startswith("step at S"):
                title, _, _ = row["name"].partition(", ")
                found.setdefault(row["name"], []).append(row["ours"])
                found.setdefault(f"{title}, full-rank", []).append(row["peer"])
        if found:
            break
    return {name: sum(taken) / len(taken) for name, taken in found.items()}
