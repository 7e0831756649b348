"""Figures of the one matrix problem, and its panels of sliders.

A panel answers a slider's move within 0.2 s. So its figures have fixed margins and few artists (an
automatic layout alone would take as long), and the next one is drawn onto the axes of the last:
most of the time goes into making axes and their ticks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor

from lowrank_lab.analysis import matrix_toy
from lowrank_lab.analysis.matrix_toy import METHODS, Fit, Settings
from lowrank_lab.analysis.spectra import singular_values
from lowrank_lab.config import InputError
from lowrank_lab.figures import COLOURS, STYLE, Drawing, alt_text, image, label_ends, png, style_of
from lowrank_lab.widgets.panel import panel
from lowrank_lab.widgets.slider import Slider, slider

LOWEST = 1e-4  # where axes of errors end
KEPT, CUT, FLOOR = COLOURS["low-rank"], "0.75", "0.45"
KNOBS = ("method", "rank", "period", "strength", "noise", "refactor", "imbalance")
CHOICES = {
    "period": (0, 5, 10, 20, 40, 80),
    "noise": (0.0, 0.1, 0.3, 1.0, 2.0),
    "imbalance": (1.0, 10.0, 100.0, 1000.0),
}
UNUSED = {  # knobs that change nothing for a method
    "full-rank": {"rank", "refactor", "imbalance"},
    "galore": {"refactor", "imbalance"},
    "fira": {"refactor", "imbalance"},
    "low-rank": set[str](),
}


def approximation(W: Tensor, rank: int, onto: Figure | None = None) -> Figure:
    """W, its best approximation of that rank, what is lost, and the spectrum it was cut from.

    Args:
        onto: an earlier figure of this kind to draw over.
    """
    best = matrix_toy.best_approximation(W, rank)
    values = matrix_toy.spectrum_table(W)["singular_value"].to_numpy()
    limit = float(W.abs().max())
    titles = "the matrix", f"best of rank {rank}", "what is lost"
    margins: Any = {"left": 0.01, "right": 0.99, "bottom": 0.2, "wspace": 0.15}
    with _drawing(9.2, 2.4, 4, onto=onto, **margins) as (figure, axes):
        for ax, X, title in zip(axes[:3], (W, best, W - best), titles, strict=True):
            ax.imshow(X.numpy(), vmin=-limit, vmax=limit, cmap="RdBu_r", interpolation="nearest")
            ax.set_title(title)
            ax.set_axis_off()
        ax = axes[3]  # areas of steps: two artists instead of a bar for each value
        edges = [i + 0.5 for i in range(len(values) + 1)]
        ax.stairs(values[:rank], edges[: rank + 1], fill=True, color=KEPT)
        ax.stairs(values[rank:], edges[rank:], fill=True, color=CUT)
        ax.set(title="singular values", xlabel="index (blue: kept)")
    return figure


def spectrum_and_tail(table: pd.DataFrame) -> Figure:
    """The singular values, and the error of the best approximation of each rank.

    Args:
        table: `one_matrix.spectrum_table`.
    """
    with _drawing(7.4, 2.8, 2, left=0.08, right=0.98, bottom=0.18, wspace=0.3) as (figure, axes):
        axes[0].plot(table["index"], table["singular_value"], "o-", ms=3, lw=1.2, color=KEPT)
        axes[0].set(xlabel="index", ylabel="singular value", ylim=(0, None))
        axes[1].plot(table["index"], table["tail"], "o-", ms=3, lw=1.2, color=FLOOR)
        axes[1].set(xlabel="rank that is kept", ylabel="share of energy lost", ylim=(0, 1))
    return figure


def floors(grid: pd.DataFrame) -> Figure:
    """The error that training reached against the best possible one, over the rank.

    Args:
        grid: `one_matrix.grid_table` over ranks.
    """
    with _drawing(5.6, 3.0, 1, left=0.12, right=0.97, bottom=0.17) as (figure, (ax,)):
        ax.plot(
            grid["rank"],
            grid["best_of_rank"],
            "-",
            color=FLOOR,
            lw=1.4,
            label="tail: best possible",
        )
        ax.plot(grid["rank"], grid["error"], "o", color=KEPT, ms=6, label="B·A, trained")
        ax.set(xlabel="rank", ylabel="share of energy missing", ylim=(0, None))
        ax.legend(frameon=False, fontsize=8.5)
    return figure


def factors(table: pd.DataFrame) -> Figure:
    """Singular values of B, of A and of their product, before and after refactorization.

    Args:
        table: `one_matrix.factors_table`.
    """
    looks: dict[str, Any] = {
        "before": {"ls": "--", "marker": "s", "color": "0.45", "ms": 5},
        "after": {"ls": "-", "marker": "o", "color": KEPT, "ms": 5},
    }
    margins: Any = {"left": 0.08, "right": 0.99, "bottom": 0.18, "wspace": 0.08}
    with _drawing(8.0, 2.7, 3, sharey=True, **margins) as (figure, axes):
        for ax, (name, part) in zip(axes, table.groupby("factor", sort=False), strict=True):
            for when, style in looks.items():
                rows = part[part["when"] == when]
                ax.plot(rows["index"], rows["singular_value"], label=when, **style)
            ax.set(title=str(name), xlabel="index", yscale="log")
            ax.set_xticks(sorted(part["index"].unique()))
        axes[0].set_ylabel("singular value")
        axes[0].legend(frameon=False, fontsize=8.5)
    return figure


def courses(
    table: pd.DataFrame, lines: Mapping[str, float] | None = None, events: Sequence[int] = ()
) -> Figure:
    """Error against the step, a line a label, with the last error beside it.

    Args:
        table: `one_matrix.curves_table`.
        lines: errors to compare with, by name: horizontal and dotted.
        events: steps to mark.
    """
    with _drawing(7.8, 3.4, 1, left=0.1, right=0.66, bottom=0.16) as (figure, (ax,)):
        _courses(ax, table, lines or {}, events)
    return figure


def _courses(
    ax: Axes, table: pd.DataFrame, lines: Mapping[str, float], events: Sequence[int]
) -> None:
    labels = list(dict.fromkeys(table["label"]))
    ends: list[tuple[float, str, str]] = []
    if ax.get_yscale() != "log":
        ax.set_yscale("log")
    for label in labels:
        error = table.loc[table["label"] == label, "error"].to_numpy()
        colour, line, _ = style_of(label, labels)
        ax.plot(error.clip(LOWEST), line, color=colour, lw=1.6)
        ends.append((float(error[-1]), label, colour))
    for name, value in lines.items():
        ax.axhline(max(value, LOWEST), color=FLOOR, lw=1, ls=(0, (1, 2)))
        ends.append((value, name, FLOOR))
    if events:
        ax.vlines(events, 0, 1, transform=ax.get_xaxis_transform(), color="0.85", lw=0.8, zorder=0)
    low = max(LOWEST, 0.7 * min(value for value, *_ in ends))
    high = 1.3 * max(1.0, table["error"].max())
    ax.set(xlim=(0, table["step"].max()), ylim=(low, high))
    ax.set(xlabel="step", ylabel="share of energy missing")
    near = high < 60 * low
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())  # as slow to draw as all the rest
    label_ends(ax, ends, digits=4, gap=0.08)


def result(
    target: Tensor, done: Fit, reference: Fit, onto: Figure | None = None
) -> tuple[Figure, str]:
    """The course of one fit and the spectrum it ended with, and the same in words.

    Args:
        reference: full-rank training with the same noise, without events.
        onto: an earlier figure of this kind to draw over.
    """
    asked = done.settings
    plain = asked.method == "full-rank"
    fits = {asked.method: done} if plain else {asked.method: done, "full-rank": reference}
    best = matrix_toy.tail(target, asked.rank)
    lines = {} if plain else {f"best of rank {asked.rank}": best}
    wanted = matrix_toy.spectrum_table(target)
    found = singular_values(done.layer).tolist()
    colour = style_of(asked.method, [asked.method])[0]
    margins: Any = {"left": 0.07, "right": 0.985, "bottom": 0.16, "wspace": 0.62}
    with _drawing(9.2, 3.0, 2, onto=onto, **margins) as (figure, (course, spectrum)):
        _courses(course, matrix_toy.curves_table(fits), lines, asked.events())
        spectrum.plot(wanted["index"], wanted["singular_value"], color=FLOOR, label="of W*")
        spectrum.plot(range(1, len(found) + 1), found, "o", ms=3.5, color=colour, label="found")
        spectrum.set(xlabel="index", ylabel="singular value", ylim=(0, None))
        spectrum.legend(frameon=False, fontsize=8.5)
    return figure, _words(done, reference, best)


def _words(done: Fit, reference: Fit, best: float) -> str:
    asked = done.settings
    knobs = [k for k in KNOBS[1:] if k not in UNUSED[asked.method]]
    said = ", ".join([asked.method, *(f"{k} = {_said(k, getattr(asked, k))}" for k in knobs)])
    compared = f" (best of rank {asked.rank}: {best:.4f}, full-rank: {reference.error:.4f})"
    compared = "" if asked.method == "full-rank" else compared
    rank = f"effective rank {done.effective_rank():.1f}"
    return f"{said}: error {done.error:.4f}{compared}, {rank}"


def _said(knob: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "never" if knob == "period" and not value else f"{value:g}"


def approximate(W: Tensor, rank: int, headless: bool = True) -> Any:
    """`approximation` with a slider for the rank; over figures drawn beforehand when headless."""

    def draw(values: Mapping[str, Any], onto: Figure | None = None) -> tuple[Figure, str]:
        error = matrix_toy.tail(W, values["rank"])
        return approximation(W, values["rank"], onto), f"rank = {values['rank']}, error {error:.4f}"

    if headless:
        return _drawn("rank", _choices("rank", rank, W), rank, draw)
    import ipywidgets as ipw

    return _show({"rank": ipw.IntSlider(rank, 1, min(W.shape))}, draw)


def explore(
    target: Tensor, settings: Settings, knobs: Sequence[str] = KNOBS, headless: bool = True
) -> Any:
    """Fit the matrix with these settings; live: with a slider for each of the knobs.

    Headless, there is one slider, for the first of the knobs, over figures drawn beforehand.

    Args:
        knobs: which settings can be changed, of KNOBS; the others stay as they are.
    """
    for knob in knobs:
        if knob not in KNOBS:
            raise InputError("knobs", knob, ", ".join(KNOBS))
    fits: dict[Settings, Fit] = {}

    def found(asked: Settings) -> Fit:
        if asked not in fits:
            fits[asked] = matrix_toy.fit(target, asked)
        return fits[asked]

    def draw(values: Mapping[str, Any], onto: Figure | None = None) -> tuple[Figure, str]:
        asked = settings.replace(**values)
        plain = Settings(noise=asked.noise, steps=asked.steps, lr=asked.lr, seed=asked.seed)
        return result(target, found(asked), found(plain), onto)

    if headless:
        first, value = knobs[0], getattr(settings, knobs[0])
        return _drawn(first, _choices(first, value, target), value, draw)
    return _show({knob: _knob(knob, settings, target) for knob in knobs}, draw)


def _drawn(
    knob: str, choices: Sequence[Any], start: Any,
    draw: Callable[[Mapping[str, Any]], tuple[Figure, str]],
) -> Slider:  # fmt: skip
    """A slider over what is drawn now, for pages without a kernel."""
    drawn = {value: draw({knob: value}) for value in choices}
    figures = {value: figure for value, (figure, _) in drawn.items()}
    return slider(
        figures, knob, lambda value: f"{drawn[value][1]}. {alt_text(figures[value])}", start,
        say=lambda value: drawn[value][1],
    )  # fmt: skip


def _choices(name: str, value: Any, target: Tensor) -> list[Any]:
    """The values of a knob that has few; of a rank, powers of two."""
    if name == "method":
        return list(METHODS)
    if name == "rank":
        powers = [2**i for i in range(min(target.shape).bit_length())]
        return sorted({*(p for p in powers if p <= min(target.shape)), value})
    if name == "strength":
        return sorted({0.0, 0.5, 1.0, value})
    if name == "refactor":
        return [False, True]
    return sorted({*CHOICES[name], value})


def _knob(name: str, settings: Settings, target: Tensor) -> Any:
    import ipywidgets as ipw

    value = getattr(settings, name)
    if name == "method":
        return ipw.Dropdown(options=METHODS, value=value)
    if name == "rank":
        return ipw.IntSlider(value, 1, min(target.shape))
    if name == "strength":
        return ipw.FloatSlider(value, min=0, max=1, step=0.1, readout_format=".1f")
    if name == "refactor":
        return ipw.Checkbox(value)
    options = [(_said(name, v), v) for v in _choices(name, value, target)]
    return ipw.SelectionSlider(options=options, value=value)


def _show(
    knobs: dict[str, Any], draw: Callable[[Mapping[str, Any], Figure | None], tuple[Figure, str]]
) -> None:
    """Display the knobs above what they change."""
    from IPython.display import display

    for name, knob in knobs.items():
        knob.description = name
        knob.style.description_width, knob.layout.width = "6em", "22em"
    kept: Figure | None = None

    def drawn(values: dict[str, Any]) -> tuple[str, str]:
        nonlocal kept
        for name, knob in knobs.items():
            knob.disabled = name in UNUSED.get(values.get("method", ""), ())
        kept, words = draw(values, kept)
        return image(kept, png(kept, dpi=100)), words  # with no search for margins

    display(panel(knobs, drawn, above=True))  # type: ignore[no-untyped-call]


@contextmanager
def _drawing(
    width: float,
    height: float,
    columns: int,
    *,
    sharey: bool = False,
    onto: Figure | None = None,
    **margins: float,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure (inches) of panels side by side, with fixed margins, to draw in this block."""
    with mpl.rc_context(STYLE):
        if onto is not None:
            for ax in onto.axes:
                for artist in (*ax.lines, *ax.collections, *ax.patches, *ax.images, *ax.texts):
                    artist.remove()
                ax.relim()
                ax.autoscale(True)
            yield onto, onto.axes
            return
        figure = Drawing(figsize=(width, height))
        axes = figure.subplots(1, columns, squeeze=False, sharey=sharey)[0]
        figure.subplots_adjust(**{"top": 0.9} | margins)
        yield figure, list(axes)
