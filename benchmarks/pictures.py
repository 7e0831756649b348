"""The benchmarks as figures."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lowrank_lab.figures import STYLE

GROWTH = re.compile(r"growth (\S+) (\S+) r(\d+) t(\d+)")
NOTE = re.compile(r"peak (\d+) MiB; (\d+) parameters")


def ratios(rows: list[dict[str, Any]]) -> Figure | None:
    """How far each row is beyond its target (1 is the target itself)."""
    import matplotlib as mpl

    shown = [r for r in rows if r["target"]]
    if not shown:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 0.8 + 0.28 * len(shown)), layout="constrained")
        ax = figure.subplots()
        for y, row in enumerate(shown):
            sign, limit = row["target"].split()
            reached = row["ratio"] / float(limit) if sign == "≥" else float(limit) / row["ratio"]
            colour = sns.color_palette("colorblind")[2 if row["met"] else 3]
            ax.barh(y, reached, color=colour, height=0.65)
            ax.text(
                reached,
                y,
                f" {row['ratio']:.2f} (target {row['target']})",
                va="center",
                fontsize=7.5,
            )
        ax.axvline(1, color="0.3", lw=1)
        ax.set_yticks(
            range(len(shown)), [f"{r['name']} / {r['peer_name']}" for r in shown], fontsize=7.5
        )
        ax.invert_yaxis()
        ax.margins(x=0.25)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("reached / target")
    return figure


def growth_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """model, method, rank, tokens, seconds, floor, mib, parameters: a row a measured point."""
    found = []
    for row in rows:
        match, facts = GROWTH.fullmatch(row["name"]), NOTE.match(row["note"])
        if match and facts:
            model, method, rank, tokens = match.groups()
            found.append(
                (model, method, int(rank), int(tokens), row["ours"], row["floor"],
                 int(facts[1]), int(facts[2]))
            )  # fmt: skip
    names = ["model", "method", "rank", "tokens", "seconds", "floor", "mib", "parameters"]
    return pd.DataFrame(found, columns=names)


def growth(rows: list[dict[str, Any]]) -> Figure | None:
    """Step time above peak memory, against model size, rank and tokens, a line a method."""
    import matplotlib as mpl

    table = growth_table(rows)
    if table.empty:
        return None
    base = table.groupby("model", sort=False).first()
    by_size = table[(table["tokens"] == 512) & (table["rank"] == table["model"].map(base["rank"]))]
    small = table[table["model"] == "9m"]
    by_rank = small[(small["tokens"] == 512) & (small["method"] != "full-rank")]
    by_tokens = small[small["rank"] == base.loc["9m", "rank"]] if "9m" in base.index else small
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.8), layout="constrained")
        axes = figure.subplots(2, 3)
        panels = (("parameters", by_size), ("rank", by_rank), ("tokens", by_tokens))
        for column, (x, part) in enumerate(panels):
            for method, line in part.groupby("method", sort=False):
                line = line.sort_values(x)
                axes[0, column].plot(line[x], line["seconds"], "o-", ms=3, lw=1.3, label=method)
                axes[1, column].plot(line[x], line["mib"], "o-", ms=3, lw=1.3, label=method)
            if x == "parameters":
                floor = part.groupby(x)["floor"].max()
                axes[0, 0].plot(floor.index, floor, "k:", lw=1, label="FLOPs alone")
            for ax in axes[:, column]:
                ax.set_xscale("log")
                ax.set_yscale("log")
                ax.set_xlabel(x + (" (9m)" if x != "parameters" else ""))
        axes[0, 0].set_ylabel("seconds a step")
        axes[1, 0].set_ylabel("peak above the state (MiB)")
        axes[0, 0].legend(fontsize=7, frameon=False)
    return figure
