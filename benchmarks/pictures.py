"""The benchmarks as figures."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from lowrank_lab.config import SIZES
from lowrank_lab.figures import STYLE, style_of

GROWTH = re.compile(r"growth (\S+) (\S+) r(\d+) t(\d+)")
REPORT = re.compile(r"study of (\d+) runs")
NOTE = re.compile(r"peak (\d+) MiB; (\d+) parameters")


def ratios(rows: list[dict[str, Any]]) -> Figure | None:
    """Each row's ratio divided by its target: 1 is the target itself."""
    import matplotlib as mpl

    shown = [r for r in rows if r["target"]]
    if not shown:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.8 + 0.28 * len(shown)), layout="constrained")
        ax = figure.subplots()
        for y, row in enumerate(shown):
            sign, limit = row["target"].split()
            reached = row["ratio"] / float(limit) if sign == "≥" else float(limit) / row["ratio"]
            colour = sns.color_palette("colorblind")[2 if row["met"] else 3]
            ax.barh(y, reached - 1, left=1, color=colour, height=0.65)
            ax.text(
                max(reached, 1),
                y,
                f" {row['ratio']:.2f} (target {row['target']})",
                va="center",
                fontsize=7.5,
            )
        ax.axvline(1, color="0.3", lw=1)
        names = [" against ".join(filter(None, (r["name"], r["peer_name"]))) for r in shown]
        ax.set_yticks(range(len(shown)), names, fontsize=7.5)
        ax.invert_yaxis()
        ax.margins(x=0.3, y=0.01)
        ax.grid(axis="y", visible=False)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xlabel("reached / target")
    return figure


def growth_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Model, method, rank, tokens, seconds, floor, mib, parameters: one row per measured point."""
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
    """Step time above peak memory, against model size, rank and tokens; the report against runs."""
    import matplotlib as mpl

    table = growth_table(rows)
    if table.empty:
        return None
    base = table.groupby("model", sort=False).first()
    by_size = table[(table["tokens"] == 512) & (table["rank"] == table["model"].map(base["rank"]))]
    small = table[table["model"] == base.index[0]]
    by_rank = small[(small["tokens"] == 512) & (small["method"] != "full-rank")]
    by_tokens = small[small["rank"] == base["rank"].iloc[0]]
    methods = list(dict.fromkeys(table["method"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 4.8), layout="constrained")
        axes = figure.subplots(2, 4)
        for column, (x, part) in enumerate(
            (("parameters", by_size), ("rank", by_rank), ("tokens", by_tokens))
        ):
            for method, line in part.groupby("method", sort=False):
                points = line.groupby(x)[["seconds", "mib"]].mean()  # a point may be measured twice
                for ax, y in zip(axes[:, column], ("seconds", "mib"), strict=True):
                    colour = style_of(str(method), methods)[0]
                    ax.plot(points.index, points[y], "o-", ms=3, lw=1.3, c=colour, label=method)
            for ax in axes[:, column]:
                ax.set_xscale("log")
                ax.xaxis.set_minor_formatter(NullFormatter())
                if x == "parameters":
                    ax.set_yscale("log")
                    ax.set_xlabel("parameters")
                    continue
                ticks = sorted(set(part[x]))
                ax.set_xticks(ticks, [str(t) for t in ticks])
                ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
                ax.set_xlabel(f"{x} ({base.index[0]})")
        sizes = beyond(by_size)
        axes[0, 0].plot(sizes.index, sizes, "k:", lw=1, label="FLOPs alone")
        axes[0, 0].set_ylabel("seconds per step")
        axes[1, 0].set_ylabel("peak above the state (MiB)")
        axes[0, 0].legend(fontsize=7, frameon=False)
        _draw_reports(axes[0, 3], rows)
        axes[1, 3].set_visible(False)
    return figure


def beyond(by_size: pd.DataFrame) -> pd.Series[float]:
    """Seconds that the FLOPs of a step take, by parameters: measured sizes, extrapolated to 13b."""
    from lowrank_lab.models.llama import Llama

    measured = by_size.groupby("parameters")["floor"].max()
    per_parameter = (measured / measured.index).median()
    with torch.device("meta"):
        models = [Llama(SIZES[name]) for name in ("350m", "1b", "3b", "7b", "13b")]
    larger = [sum(p.numel() for p in model.parameters()) for model in models]
    return pd.concat([measured, pd.Series({n: per_parameter * n for n in larger})])


def _draw_reports(ax: Axes, rows: list[dict[str, Any]]) -> None:
    found = [(int(m[1]), r) for r in rows if (m := REPORT.match(r["name"]))]
    runs = [count for count, _ in found]
    ax.plot(runs, [r["ours"] for _, r in found], "o-", ms=3, lw=1.3, c="0.25", label="report")
    ax.plot(runs, [r["floor"] for _, r in found], "k:", lw=1, label="JSON alone")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("runs in a study")
    ax.set_ylabel("seconds")
    ax.legend(fontsize=7, frameon=False)
