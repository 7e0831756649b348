"""Tables → figures. Nothing here sees a model: every figure is made from saved runs.

Each function takes a table and returns a `Figure` of matplotlib; `save` writes it as PNG and SVG
with the table behind it as CSV. A method has the same colour everywhere; its techniques change the
line.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox, offset_copy

from lowrank_lab.config import InputError
from lowrank_lab.spectra import effective_rank, middle_layers, stable_rank
from lowrank_lab.stats import mean_interval

if TYPE_CHECKING:
    from lowrank_lab.runs import Run

# Okabe and Ito's colours, which colour-blind readers can tell apart and which survive print.
COLOURS = {
    "full-rank": "#000000",
    "low-rank": "#0072B2",
    "galore": "#D55E00",
    "fira": "#009E73",
}
OTHER_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
STYLE: Any = {
    "axes.spines.right": False, "axes.spines.top": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.axisbelow": True, "axes.titlesize": 10, "axes.labelsize": 9.5, "font.size": 9,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "svg.hashsalt": "lowrank_lab",
    "figure.dpi": 110, "savefig.dpi": 160,
}  # fmt: skip
CATEGORIES = {
    "weights": "#4D4D4D", "gradients": "#999999", "optimizer_states": "#0072B2",
    "projections": "#56B4E9", "activations": "#E69F00",
}  # fmt: skip
OF_A_STEP = CATEGORIES | {"logits": "#CC79A7", "temporaries": "#009E73"}
MIB = 2**20


class Drawing(Figure):
    """A figure that a notebook shows as it is, outside pyplot's registry: nothing to close."""

    def _repr_png_(self) -> bytes:
        return png(self)

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """No picture of its own, only the words that go with the PNG above."""
        return {}, {"image/png": {"alt": described(self)}}


def png(figure: Figure, **options: Any) -> bytes:
    """A figure as PNG, in the style of all figures; by default without empty margins.

    Args:
        options: of `savefig`, instead of `bbox_inches="tight"`.
    """
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", **(options or {"bbox_inches": "tight"}))
    return buffer.getvalue()


def described(figure: Figure) -> str:
    """What a figure shows, in words: its titles, its axes, and every text written into it."""
    panels, names = [], []
    for ax in figure.axes:
        title = ax.get_title() or ax.get_title(loc="left")
        axes = " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
        panels.append(": ".join(filter(None, (title, axes))))
        legend = ax.get_legend()
        names += [t.get_text() for t in ax.get_yticklabels() if t.get_text()[:1].isalpha()]
        names += [t.get_text() for t in [*ax.texts, *(legend.get_texts() if legend else [])]]
    shared = " against ".join(filter(None, (figure.get_supylabel(), figure.get_supxlabel())))
    parts = [figure.get_suptitle(), shared, *panels, ", ".join(dict.fromkeys(filter(None, names)))]
    return " ".join("; ".join(filter(None, parts)).split())


def save(figure: Figure, table: pd.DataFrame, stem: Path | str) -> list[Path]:
    """Write `stem`.png, .svg and, with the numbers that were drawn, .csv."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg", "csv")]
    with mpl.rc_context(STYLE), _laid_out(figure) as box:
        figure.savefig(paths[0], bbox_inches=box, metadata={"Software": None})
        figure.savefig(paths[1], bbox_inches=box, metadata={"Date": None})
    table.to_csv(paths[2], index=False)
    return paths


@contextmanager
def _laid_out(figure: Figure) -> Iterator[Bbox]:
    """The tight box around a figure (inches), whose layout is found once and kept in this block.

    Left to itself, each `savefig` finds both again, which takes longer than to draw the figure.
    """
    canvas, engine, dpi = FigureCanvasAgg(figure), figure.get_layout_engine(), figure.dpi
    try:
        figure.dpi = mpl.rcParams["savefig.dpi"]
        if engine is not None:
            engine.execute(figure)
            figure.set_layout_engine("none")
        box = figure.get_tightbbox(canvas.get_renderer())  # type: ignore[no-untyped-call]
        figure.dpi = dpi
        yield box.padded(mpl.rcParams["savefig.pad_inches"])
    finally:
        figure.dpi = dpi
        figure.set_layout_engine(engine)


def look(label: str, labels: Sequence[str]) -> tuple[str, str, str]:
    """Colour, line and marker of a run: the method decides the colour, its variant the others."""
    method = label.split(" ")[0]
    methods = list(dict.fromkeys(other.split(" ")[0] for other in labels))
    unknown = [m for m in methods if m not in COLOURS]
    if method in COLOURS:
        colour = COLOURS[method]
    else:
        colour = OTHER_COLOURS[unknown.index(method) % len(OTHER_COLOURS)]
    variants = [other for other in labels if other.split(" ")[0] == method]
    variants.sort(key=lambda other: other != method)  # the plain method has the plain line
    index = variants.index(label) % 4
    return colour, ("-", "--", ":", "-.")[index], "os^D"[index]


def curve_table(
    runs: pd.DataFrame, x: str = "tokens_seen", y: str = "validation_loss"
) -> pd.DataFrame:
    """Mean of y over the seeds of each label at each step: label, step, x, mean, half_width, n.

    Raises:
        InputError: a column that isn't there, or seeds that weren't recorded at the same steps.
    """
    for name, column in (("x", x), ("y", y)):
        if column not in runs:
            raise InputError(name, column, f"the table has {', '.join(map(str, runs.columns))}")
    recorded = runs.dropna(subset=[y])
    seeds = runs.groupby("label")["run"].nunique()
    grouped = recorded.groupby(["label", "step"], sort=False)
    middles = grouped[x].mean().tolist()
    rows = []
    for (key, values), middle in zip(grouped[y], middles, strict=True):
        label, step = cast(tuple[str, int], key)
        if len(values) != seeds[label]:
            raise InputError(
                "runs", label, f"at step {step} {len(values)} of {seeds[label]} seeds are there"
            )
        rows.append((label, step, middle, *mean_interval(values.tolist())))
    return pd.DataFrame(rows, columns=["label", "step", x, "mean", "half_width", "n"])


def loss_curves(runs: pd.DataFrame, x: str = "tokens_seen", y: str = "validation_loss") -> Figure:
    """Loss against tokens or seconds, a line a label, 95 % intervals where there are seeds."""
    table = curve_table(runs, x, y)
    labels = list(dict.fromkeys(table["label"]))
    figure, ax = _figure(6.4, 3.9)
    ends: list[tuple[float, str, str]] = []
    for label in labels:
        part = table[table["label"] == label].sort_values("step")
        colour, line, _ = look(label, labels)
        ax.plot(part[x], part["mean"], line, color=colour, lw=1.6)
        low, high = part["mean"] - part["half_width"], part["mean"] + part["half_width"]
        ax.fill_between(part[x], low, high, color=colour, alpha=0.15, lw=0)
        ends.append((float(part["mean"].iloc[-1]), label, colour))
    # What matters is where the curves end: leave the first, steep part out of the picture.
    last = table.groupby("label")["mean"].last()
    spread = max(last.max() - last.min(), 0.05)
    ax.set_ylim(last.min() - 0.15 * spread, min(table["mean"].max(), last.max() + 3 * spread))
    ax.set_xlabel("training tokens" if x == "tokens_seen" else "training time (s)")
    ax.set_ylabel(f"{y.replace('_', ' ')} (nats a token)")
    if x == "tokens_seen":
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    ax.set_title(_seeds(table["n"]), loc="right", color="0.4", fontsize=8)
    _label_ends(ax, ends)
    return figure


def training_table(runs: pd.DataFrame, points: int = 400) -> pd.DataFrame:
    """Training loss and learning rate of each run at about `points` of its steps."""
    columns = ["label", "run", "step", "tokens_seen", "loss", "lr_now"]
    table = runs[columns]
    every = max(1, int(table["step"].max()) // points)
    return table[(table["step"] % every == 0) | (table["step"] == 1)]


def training_curves(runs: pd.DataFrame) -> Figure:
    """Loss of every recorded training batch above the learning rate, a line a run."""
    table = training_table(runs)
    labels = list(dict.fromkeys(table["label"]))
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(6.4, 4.4), layout="constrained")
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    ends = []
    for (label, _), part in table.groupby(["label", "run"], sort=False):
        colour, line, _ = look(str(label), labels)
        loss.plot(part["step"], part["loss"], line, color=colour, lw=0.8)
        rate.plot(part["step"], part["lr_now"], line, color=colour, lw=1.2)
        ends.append((float(part["loss"].tail(10).mean()), str(label), colour))
    loss.set_ylabel("training loss (nats a token)")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    _label_ends(loss, ends)
    return figure


def effective_rank_table(spectra: pd.DataFrame) -> pd.DataFrame:
    """Effective rank of each layer at each recorded step: step, layer, kind, effective_rank."""
    rows = []
    for (step, layer), part in spectra.groupby(["step", "layer"], sort=False):
        values = torch.tensor(part.sort_values("index")["singular_value"].to_numpy())
        kind = str(layer).rsplit(".", 1)[-1]
        rows.append((step, layer, kind, float(effective_rank(values))))
    return pd.DataFrame(rows, columns=["step", "layer", "kind", "effective_rank"])


def effective_rank_curves(spectra: pd.DataFrame) -> Figure:
    """Effective rank over training, a line a kind of layer (mean over the recorded layers)."""
    mean = (
        effective_rank_table(spectra).groupby(["kind", "step"], sort=False)["effective_rank"].mean()
    )
    figure, ax = _figure(6.4, 3.4)
    ends = []
    palette = sns.color_palette("colorblind", mean.index.get_level_values(0).nunique())
    for colour, (kind, part) in zip(palette, mean.groupby(level=0, sort=False), strict=True):
        steps = part.index.get_level_values("step")
        ax.plot(steps, part.to_numpy(), "o-", ms=3, lw=1.4, color=colour)
        ends.append((float(part.iloc[-1]), str(kind), colour))
    ax.set_xlabel("step")
    ax.set_ylabel("effective rank")
    ax.set_ylim(bottom=0)
    _label_ends(ax, ends, digits=1)
    return figure


def tradeoff_table(finals: pd.DataFrame) -> pd.DataFrame:
    """A row a label: bytes of weights + optimizer states, and test perplexity over its seeds."""
    rows = []
    for label, group in finals.groupby("label", sort=False):
        size = group["weight_bytes"] + group["optimizer_state_bytes"]
        perplexity = mean_interval(group["test_perplexity"].tolist())
        rows.append((label, float(size.mean()) / MIB, *perplexity))
    return pd.DataFrame(
        rows, columns=["label", "weights_and_states_mib", "mean", "half_width", "n"]
    )


def tradeoff(finals: pd.DataFrame) -> Figure:
    """Test perplexity against bytes of weights + optimizer states: the paper's picture."""
    table = tradeoff_table(finals)
    labels = table["label"].tolist()
    figure, ax = _figure(6.4, 3.9)
    sizes = table["weights_and_states_mib"]
    leftmost = sizes <= sizes.min() * 1.01
    for row, shift in zip(_rows(table), _dodged(sizes.tolist()), strict=True):
        colour, _, marker = look(row.label, labels)
        aside = offset_copy(ax.transData, figure, x=shift, units="points")
        ax.errorbar(
            row.weights_and_states_mib, row.mean, yerr=None if row.n == 1 else row.half_width,
            fmt=marker, ms=7, color=colour, capsize=3, transform=aside,
        )  # fmt: skip
        error = 0.0 if row.n == 1 else row.half_width
        ax.update_datalim([(row.weights_and_states_mib, row.mean + s * error) for s in (-1, 1)])
    width = max(sizes.max() - sizes.min(), 0.1 * sizes.max())
    sides = ("left" if first and not leftmost.all() else "right" for first in leftmost)
    table["side"] = list(sides)
    shares = [_text_share(table.loc[table["side"] == s, "label"]) for s in ("left", "right")]
    scale = width / (1 - min(0.8, sum(shares)))
    ax.set_xlim(sizes.min() - shares[0] * scale, sizes.max() + shares[1] * scale)
    ax.autoscale_view(scalex=False)
    ax.margins(y=0.12)
    for side, part in table.groupby("side"):
        _label_points(ax, part, labels, str(side))
    ax.set_xlabel("weights + optimizer states (MiB)")
    ax.set_ylabel("test perplexity (lower is better)")
    ax.set_title(_seeds(table["n"]), loc="right", color="0.4", fontsize=8)
    return figure


def _text_share(labels: pd.Series[str]) -> float:
    """The share of a plot's width that names beside its points take, with room to breathe."""
    return 0.05 + 0.0115 * (labels.str.len().max() + 7) if len(labels) else 0.08


def _dodged(values: list[float]) -> list[float]:
    """Shifts in points that part markers whose values are (nearly) the same."""
    groups = [[i for i, v in enumerate(values) if abs(v - w) <= 0.01 * w] for w in values]
    return [7.0 * (g.index(i) - (len(g) - 1) / 2) for i, g in enumerate(groups)]


def memory_table(memory: pd.DataFrame) -> pd.DataFrame:
    """Bytes by category → a row a label and category, in MiB; projections apart."""
    table = memory.copy()
    table["optimizer_states"] = table["optimizer_states"] - table["projections"]
    mean = table.groupby("label", sort=False)[list(CATEGORIES)].mean() / MIB
    return mean.reset_index().melt("label", var_name="category", value_name="mib")


def memory_bars(memory: pd.DataFrame, activations: bool = False) -> Figure:
    """Stacked bytes of weights, gradients and optimizer states (and activations), a bar a label."""
    table = memory_table(memory)
    labels = list(dict.fromkeys(table["label"]))
    figure, ax = _figure(6.4, 0.7 + 0.42 * len(labels))
    left = np.zeros(len(labels))
    for category, colour in CATEGORIES.items():
        if category == "activations" and not activations:
            continue
        widths = table[table["category"] == category].set_index("label")["mib"].loc[labels]
        widths = widths.fillna(0.0)  # not measured
        if widths.sum() > 0:
            name = category.replace("_", " ").replace("projections", "stored projections")
            ax.barh(labels, widths, left=left, color=colour, label=name, height=0.65)
        left += widths.to_numpy()
    for y, total in enumerate(left):
        ax.text(total, y, f" {total:.2f}", va="center", fontsize=8.5)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("MiB (measured)")
    figure.legend(ncols=5, frameon=False, loc="outside upper center", fontsize=8.5)
    return figure


def memory_timeline(table: pd.DataFrame, title: str = "") -> Figure:
    """Bytes in the course of one step, stacked by category; phases and the peak are marked.

    Args:
        table: `tracing.Trace.table`.
    """
    table = table.copy()
    table["optimizer_states"] = table["optimizer_states"] - table["projections"]
    names = [name for name in OF_A_STEP if table[name].any()]
    total = table[names].sum(axis=1)
    size, unit = unit_of(total.max())
    figure, ax = _figure(7.4, 3.4)
    ax.stackplot(
        table["event"], *(table[name] / size for name in names),
        colors=[OF_A_STEP[name] for name in names], step="post", lw=0,
        labels=[name.replace("_", " ").replace("projections", "stored projections")
                for name in names],
    )  # fmt: skip
    starts = table.groupby((table["phase"] != table["phase"].shift()).cumsum()).first()
    width = table["event"].max()
    ends = [*starts["event"].iloc[1:], width]
    labelled, low = -width, False
    for event, phase, end in zip(starts["event"], starts["phase"], ends, strict=True):
        if phase in ("start", "between") or end - event < 0.01 * width:
            continue
        low = event - labelled < 0.11 * width and not low  # beside a neighbour's: a line lower
        labelled = event
        ax.axvline(event, color="0.35", lw=0.6, ls=":")
        ax.annotate(phase, (event, 1), xycoords=("data", "axes fraction"), va="top", fontsize=7.5,
                    xytext=(3, -14 if low else -3), textcoords="offset points")  # fmt: skip
    peak_event = table["event"].iloc[int(total.to_numpy().argmax())]
    ax.plot(peak_event, total.max() / size, "v", color="black", ms=4)
    ax.annotate(f"peak {total.max() / size:.2f} {unit}", (peak_event, total.max() / size),
                xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    ax.set_xlim(0, table["event"].max())
    ax.set_ylim(0, 1.25 * total.max() / size)
    ax.set_xlabel("allocations and releases, in order")
    ax.set_ylabel(unit)
    if title:
        ax.set_title(title)
    handles, texts = ax.get_legend_handles_labels()
    figure.legend(handles[::-1], texts[::-1], frameon=False, fontsize=8, loc="outside right upper")
    return figure


def unit_of(size: float) -> tuple[float, str]:
    """The bytes in the unit that suits so many of them, and its name."""
    return next(
        ((u, name) for u, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u),
        (1.0, "bytes"),
    )


def memory_course_table(runs: pd.DataFrame) -> pd.DataFrame:
    """label, step, peak and held (weights + states) in bytes: the first run of each label."""
    first: pd.DataFrame = runs[runs["run"].isin(runs.drop_duplicates("label")["run"])]
    held = first["weight_bytes"] + first["optimizer_state_bytes"]
    table = first[["label", "step", "peak_memory_bytes"]].assign(held=held)
    return table.rename(columns={"peak_memory_bytes": "peak"})


def memory_course(runs: pd.DataFrame) -> Figure:
    """Peak memory of each step of training, above what is held between steps (dotted).

    Args:
        runs: of `load_runs`; one run of each label is drawn.
    """
    table = memory_course_table(runs).dropna(subset="peak")
    labels = list(dict.fromkeys(table["label"]))
    size, unit = unit_of(table["peak"].max() if len(table) else 0)
    figure, ax = _figure(6.4, 3.4)
    ends = []
    for label, run in table.groupby("label", sort=False):
        colour, line, _ = look(str(label), labels)
        ax.plot(run["step"], run["peak"] / size, color=colour, ls=line, lw=1.2,
                drawstyle="steps-mid")  # fmt: skip
        ax.plot(run["step"], run["held"] / size, color=colour, ls=":", lw=1)
        ends.append((run["peak"].iloc[-1] / size, str(label), colour))
    ax.set_ylim(0)
    ax.set_xlabel("step")
    ax.set_ylabel(f"peak of the step ({unit})")
    ax.set_title("dotted: weights and optimizer states, held between steps", fontsize=8, loc="left")
    _label_ends(ax, ends)
    return figure


def compared_memory(accounts: pd.DataFrame) -> Figure:
    """What there is at the peak of a step, a bar a method, stacked by category.

    Args:
        accounts: label and the categories at the peak, in bytes.
    """
    table = accounts.set_index("label")
    table["optimizer_states"] = table["optimizer_states"] - table["projections"]
    size, unit = unit_of(table[list(OF_A_STEP)].sum(axis=1).max())
    figure, ax = _figure(6.8, 0.9 + 0.27 * len(table))
    left = np.zeros(len(table))
    for name, colour in OF_A_STEP.items():
        text = name.replace("_", " ").replace("projections", "stored projections")
        ax.barh(table.index, table[name] / size, left=left, color=colour, label=text, height=0.7)
        left += table[name].to_numpy() / size
    for y, total in enumerate(left):
        ax.text(total, y, f" {total:.2f}", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.1)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"{unit} at the peak of a step")
    figure.legend(ncols=4, frameon=False, loc="outside upper center", fontsize=8)
    return figure


def spectrum_curves(spectra: pd.DataFrame, layers: Sequence[str] | None = None) -> Figure:
    """Singular values by index, a panel a layer, a line a recorded step from light to dark.

    Args:
        spectra: step, layer, index, singular_value (`Run.spectra`).
        layers: which; by default one of each projection, from the middle of the model.
    """
    names = list(layers) if layers is not None else middle_layers(spectra["layer"])
    missing = set(names) - set(spectra["layer"])
    if missing or not names:
        raise InputError(
            "layers", sorted(missing), f"recorded: {', '.join(spectra['layer'].unique())}"
        )
    figure, axes = _panels(names)
    steps = np.sort(spectra["step"].unique())
    palette = sns.color_palette("crest", len(steps))
    for ax, name in zip(axes.flat, names, strict=False):
        part = spectra[spectra["layer"] == name]
        for colour, step in zip(palette, steps, strict=True):
            _spectrum(ax, part[part["step"] == step], color=colour)
    _label_panels(figure, axes)
    norm = mpl.colors.Normalize(steps.min(), max(steps.max(), 1))
    shades = mpl.cm.ScalarMappable(norm, sns.color_palette("crest", as_cmap=True))
    figure.colorbar(shades, ax=axes, label="step", pad=0.01)
    return figure


def last_spectra(spectra: pd.DataFrame) -> pd.DataFrame:
    """The last recorded spectra of each label, of one layer of each kind: what is compared.

    Args:
        spectra: label, step, layer, index, singular_value.
    """
    last = spectra.groupby("label")["step"].transform("max")
    middle = spectra["layer"].isin(middle_layers(spectra["layer"]))
    return spectra[(spectra["step"] == last) & middle].reset_index(drop=True)


def compared_spectra(spectra: pd.DataFrame) -> Figure:
    """Singular values by index at the end of training, a panel a kind of layer, a line a label.

    Args:
        spectra: `last_spectra`.
    """
    names, labels = middle_layers(spectra["layer"]), list(dict.fromkeys(spectra["label"]))
    figure, axes = _panels(names)
    for ax, name in zip(axes.flat, names, strict=False):
        for label, part in spectra[spectra["layer"] == name].groupby("label", sort=False):
            colour, line, _ = look(str(label), labels)
            _spectrum(ax, part, color=colour, ls=line, label=label)
    _label_panels(figure, axes)
    lines, texts = axes.flat[0].get_legend_handles_labels()
    spare = len(axes.flat) - len(names)
    if spare and len(labels) <= 8:  # there is an empty panel for it
        figure.legend(
            lines, texts, frameon=False, fontsize=7.5, loc="lower right", borderaxespad=1.5
        )
    else:
        columns = 3 if len(labels) > 4 else len(labels)
        figure.legend(lines, texts, frameon=False, fontsize=7.5, loc="outside upper center",
                      ncols=columns)  # fmt: skip
    return figure


FACTS = {
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "update_rank": "effective rank of W − W₀",
    "captured_energy": "gradient energy in the projection",
    "overlap": "overlap with the next subspace",
    "condition": "condition number of the factors",
    "imbalance": "imbalance of the factors",
}


def layer_facts(runs: Sequence[Run]) -> pd.DataFrame:
    """label, step, layer and the summaries in `FACTS`: what the recorded spectra come to.

    Args:
        runs: one of each label.
    """
    tables = []
    for run in runs:
        facts = run.layer_facts.set_index(["step", "layer"])
        facts["condition"] = facts[["condition_B", "condition_A"]].max(axis=1)
        for what, column, summary in (
            ("singular_values", "effective_rank", effective_rank),
            ("singular_values", "stable_rank", stable_rank),
            ("update", "update_rank", effective_rank),
        ):
            values = run.spectra_of(what).groupby(["step", "layer"], sort=False)["singular_value"]
            facts[column] = values.agg(partial(_summarised, summary))
        tables.append(facts.reset_index().assign(label=run.label))
    names = ["label", "step", "layer", *FACTS]
    return pd.concat(tables, ignore_index=True)[names] if tables else pd.DataFrame(columns=names)


def _summarised(summary: Callable[[torch.Tensor], torch.Tensor], values: pd.Series[float]) -> float:
    return float(summary(torch.tensor(values.to_numpy())))


def fact_curves(facts: pd.DataFrame, names: Sequence[str] | None = None) -> Figure:
    """Summaries of spectra over training, mean of the layers: a panel a summary, a line a label.

    Args:
        facts: `layer_facts`.
        names: of `FACTS`; by default all that were recorded.
    """
    shown = [n for n in names or FACTS if facts[n].notna().any()]
    if not shown:
        raise InputError("facts", list(names or FACTS), "none of these was recorded")
    labels = list(dict.fromkeys(facts["label"]))
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(2.75 * columns, 2.2 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    for ax, name in zip(axes.flat, shown, strict=False):
        means = facts.dropna(subset=name).groupby(["label", "step"], sort=False)[name].mean()
        for label, line in means.groupby("label", sort=False):
            colour, style, marker = look(str(label), labels)
            steps = line.index.get_level_values("step")
            ax.plot(steps, line.to_numpy(), color=colour, ls=style, marker=marker, ms=3, lw=1.3,
                    label=label)  # fmt: skip
        ax.set_title(FACTS[name], fontsize=8.5)
        ax.set_xlabel("step", fontsize=8.5)
        if name == "condition":
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=0)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    lines = {
        text: line
        for ax in axes.flat
        for line, text in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(lines.values(), lines.keys(), frameon=False, fontsize=8, ncols=3,
                  loc="outside upper center")  # fmt: skip
    return figure


def share_curves(shares: pd.DataFrame) -> Figure:
    """The share of L in each singular value of L + S, a panel a layer, early (light) and last.

    Args:
        shares: `Run.spectra_of("low_rank_share")`, or of several runs with labels.
    """
    steps = sorted(shares["step"].unique())
    figure = spectrum_curves(
        shares[shares["step"].isin([steps[min(1, len(steps) - 1)], steps[-1]])]
    )
    for ax in figure.axes[:-1]:
        ax.set_yscale("linear")
        ax.set_ylim(-0.1, 1.15)
        ax.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    figure.supylabel("share of the low-rank part", fontsize=9.5)
    return figure


def momentum_bars(momentum: pd.DataFrame) -> Figure:
    """How much of the direction of momentum is left after each kind of event, by label.

    Args:
        momentum: label and the columns of `Run.momentum`.
    """
    means = momentum.groupby(["label", "event"], sort=False)["momentum_cosine"]
    table = means.agg(["mean", "min", "max"]).reset_index()
    labels = list(dict.fromkeys(table["label"]))
    figure, ax = _figure(6.4, 0.9 + 0.32 * len(table))
    for y, (label, low, mean, high) in enumerate(
        zip(table["label"], table["min"], table["mean"], table["max"], strict=True)
    ):
        colour = look(str(label), labels)[0]
        ax.plot([float(low), float(high)], [y, y], color=colour, lw=3, alpha=0.35)
        ax.plot([float(mean)], [y], "o", color=colour, ms=6)
    names = [f"{label}: {event}" for label, event in zip(table["label"], table["event"],
                                                        strict=True)]  # fmt: skip
    ax.set_yticks(range(len(table)), names)
    ax.invert_yaxis()
    ax.set_xlim(-1.05, 1.05)
    ax.set_xlabel("cosine of momentum before and after (mean and range over layers and events)")
    return figure


def _panels(names: Sequence[str]) -> tuple[Figure, Any]:
    """A figure with a small panel a layer, whose y axes are shared and logarithmic."""
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(2.15 * columns + 0.6, 1.95 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for ax, name in zip(axes.flat, names, strict=False):
        ax.set_title(name.removeprefix("model."), fontsize=8, y=1)
        ax.set_yscale("log")
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    return figure, axes


def _spectrum(ax: Axes, values: pd.DataFrame, **kwargs: Any) -> None:
    """A line of one layer's singular values."""
    values = values.sort_values("index")
    # Values at rounding level are zeros of a rank-deficient layer: nothing to see there.
    shown = values[values["singular_value"] > 1e-7]
    ax.plot(shown["index"] + 1, shown["singular_value"], lw=1.3, **kwargs)


def _label_panels(figure: Figure, axes: Any) -> None:
    low, high = axes.flat[0].get_ylim()
    for ax in axes.flat:
        ax.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 200 * low else (1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
        for axis in (ax.xaxis, ax.yaxis):  # without labels: to seek room for them takes long
            axis.set_label_coords(0, 0)
    figure.supxlabel("index", fontsize=9.5)
    figure.supylabel("singular value", fontsize=9.5)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def _label_ends(ax: Axes, ends: list[tuple[float, str, Any]], digits: int = 3) -> None:
    """Names at the right end of each curve, pushed apart where they would overlap."""
    low, high = ax.get_ylim()
    gap = 0.062 * (high - low)
    heights = _apart([value for value, _, _ in sorted(ends)], gap)
    for height, (value, label, colour) in zip(heights, sorted(ends), strict=True):
        ax.annotate(
            f"{label}  {value:.{digits}f}", (1.0, height), xycoords=("axes fraction", "data"),
            xytext=(6, 0), textcoords="offset points", color=colour, fontsize=8.5, va="center",
            annotation_clip=False,
        )  # fmt: skip


def _label_points(ax: Axes, table: pd.DataFrame, labels: list[str], side: str) -> None:
    """Names beside points of the same side, pushed apart where they would overlap."""
    low, high = ax.get_ylim()
    ordered = table.sort_values("mean")
    heights = _apart(ordered["mean"].tolist(), 0.065 * (high - low))
    for height, row in zip(heights, _rows(ordered), strict=True):
        colour, *_ = look(row.label, labels)
        ax.annotate(
            f"{row.label}  {row.mean:.2f}", (row.weights_and_states_mib, height),
            xytext=(-17 if side == "left" else 17, 0), textcoords="offset points",
            ha="right" if side == "left" else "left", va="center", color=colour, fontsize=8.5,
        )  # fmt: skip


def _rows(table: pd.DataFrame) -> Iterator[Any]:
    """Rows as named tuples, typed loosely: pandas types an entry as all it could be."""
    yield from table.itertuples(index=False)


def _apart(values: list[float], gap: float) -> list[float]:
    """Ascending positions near `values`, at least `gap` from each other."""
    out = list(values)
    for _ in range(200):
        moved = False
        for i, (a, b) in enumerate(pairwise(out)):
            if b - a < gap * 0.999:
                push = (gap - (b - a)) / 2
                out[i], out[i + 1], moved = a - push, b + push, True
        if not moved:
            break
    return out


def _count(value: float) -> str:
    return f"{value / 1e6:g} M" if value >= 1e5 else f"{value / 1e3:g} k" if value else "0"


def _seeds(n: pd.Series) -> str:
    low, high = int(n.min()), int(n.max())
    if high == 1:
        return "one seed each"
    return f"mean of {low if low == high else f'{low}–{high}'} seeds, 95 % interval"
