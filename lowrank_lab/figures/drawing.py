"""The style of all figures: a colour per method, alt texts, labels at the ends of lines."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox, offset_copy
from PIL import Image

from lowrank_lab.methods.registry import METHODS
from lowrank_lab.runs.files import replacing

PALETTE = (  # Okabe and Ito's, for what is no method
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000",
)  # fmt: skip
OTHER_COLOURS = ("#DDCC77", "#88CCEE", "#66AA55", "#B0B0B0")  # of methods of one's own
KINDS = ("png", "svg", "csv")
STYLE: Any = {
    "axes.spines.right": False, "axes.spines.top": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.axisbelow": True, "axes.titlesize": 10, "axes.labelsize": 9.5, "font.size": 9,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "svg.hashsalt": "lowrank_lab",
    "figure.dpi": 110, "savefig.dpi": 160,
}  # fmt: skip


class Drawing(Figure):
    """A figure outside pyplot's registry, which a notebook displays and never has to close."""

    alt = ""  # in place of the alt text that is made of the figure's own texts

    def _repr_png_(self) -> bytes:
        return png(self)

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The alt text of the PNG; the picture itself is `_repr_png_`."""
        return {}, {"image/png": {"alt": alt_text(self)}}


def png(figure: Figure, **options: Any) -> bytes:
    """A figure as PNG, cropped to its content unless there are `options` for `savefig`."""
    return _saved(figure, "png", **(options or {"bbox_inches": "tight"}))


def svg(figure: Figure) -> bytes:
    """A figure as SVG, cropped to its content."""
    return _saved(figure, "svg", bbox_inches="tight", metadata={"Date": None})


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def alt_text(figure: Figure) -> str:
    """Alt text of a figure: its own, or its titles, axis labels, and every text in it."""
    panels, names = [], []
    for ax in figure.axes:
        title = ax.get_title() or ax.get_title(loc="left")
        axes = " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
        panels.append(": ".join(filter(None, (title, axes))))
        legend = ax.get_legend()
        names += [t.get_text() for t in ax.get_yticklabels() if t.get_text()[:1].isalpha()]
        names += [t.get_text() for t in [*ax.texts, *(legend.get_texts() if legend else [])]]
    texts = [*figure.texts, *(t for legend in figure.legends for t in legend.get_texts())]
    names += [t.get_text() for t in texts]
    shared = " against ".join(filter(None, (figure.get_supylabel(), figure.get_supxlabel())))
    parts = [figure.get_suptitle(), shared, *panels, ", ".join(dict.fromkeys(filter(None, names)))]
    return getattr(figure, "alt", "") or " ".join("; ".join(filter(None, parts)).split())


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """A picture as a `data:` URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def save(figure: Figure, table: pd.DataFrame, stem: Path | str) -> list[Path]:
    """Write `stem`.png, `stem`.svg, and the numbers as `stem`.csv."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, svg, csv = paths = [stem.with_name(f"{stem.name}.{kind}") for kind in KINDS]
    with mpl.rc_context(STYLE), _laid_out(figure) as box:
        with replacing(png) as to:
            figure.savefig(to, format="png", bbox_inches=box, metadata={"Software": None})
        with replacing(svg) as to:
            figure.savefig(to, format="svg", bbox_inches=box, metadata={"Date": None})
    with replacing(csv) as to:
        table.to_csv(to, index=False)
    return paths


def refresh(shown: Path | str, made: Path | str) -> list[Path]:
    """Replace each PNG in the folder `shown` by the picture of the same name in `made`.

    Returns:
        The pictures that were replaced; those that `made` lacks stay as they are.
    """
    replaced = []
    for path in sorted(Path(shown).glob("*.png")):
        if (new := Path(made) / path.name).exists():
            save_small(new.read_bytes(), path)
            replaced.append(path)
    return replaced


def save_small(content: bytes, path: Path) -> None:
    """Write a PNG with 256 colours (`small`)."""
    with replacing(path) as to:
        to.write_bytes(small(content))


def small(content: bytes) -> bytes:
    """A PNG with 256 colours, which lines and text need no more of: a third of the bytes."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(content)) as picture:
        colours = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        colours.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


@contextmanager
def _laid_out(figure: Figure) -> Iterator[Bbox]:
    """The tight box around a figure (inches); its layout is computed once and fixed in this block.

    Otherwise each `savefig` computes both again, which takes longer than drawing the figure.
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


def style_of(label: str, labels: Sequence[str]) -> tuple[str, str, str]:
    """Colour (by method), line style and marker (by variant) of a label."""
    method = _method_of(label)
    methods = list(dict.fromkeys(_method_of(other) for other in labels))
    unknown = [m for m in methods if colour_of(m) is None]
    colour = colour_of(method) or OTHER_COLOURS[unknown.index(method) % len(OTHER_COLOURS)]
    variants = [other for other in labels if _method_of(other) == method]
    variants.sort(key=lambda other: other != method)  # the plain method has the plain line
    index = variants.index(label) % 4
    return colour, ("-", "--", ":", "-.")[index], "os^D"[index]


def colour_of(method: str) -> str | None:
    """The colour in the row of a method; None if there is none."""
    return METHODS[method].colour if method in METHODS else None


def _method_of(label: str) -> str:
    """The method that a label names: `low-rank` for "low-rank + refactor", "low-rank, seed 1"."""
    return re.split("[ ,]", label)[0]


def unit_of(size: float) -> tuple[float, str]:
    """A unit for that many bytes: its size in bytes, and its name."""
    return next(
        ((u, name) for u, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u),
        (1.0, "bytes"),
    )


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure (inches) with one pair of axes."""
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def empty_figure(reason: str) -> Figure:
    """A one-line figure that says why there is nothing to draw."""
    with mpl.rc_context(STYLE):
        figure = Drawing(figsize=(6.4, 0.5))
    figure.text(0.01, 0.4, reason, color="0.3")
    return figure


def label_ends(
    ax: Axes, ends: Sequence[tuple[Any, ...]], digits: int = 3, gap: float = 0.062
) -> None:
    """Write names and values at the right ends of curves, moved so that they do not overlap.

    Args:
        ax: with a linear or logarithmic y axis, whose limits are final.
        ends: (last value, name, colour) of each curve, and optionally its marker or line style.
        digits: decimal places of the values.
        gap: minimum distance between two names, as a share of the axis; less if they need more
            than the axis.
    """
    if not ends:
        return
    ends, (low, high) = sorted(ends, key=lambda end: end[:2]), ax.get_ylim()
    scale = ax.yaxis.get_transform().transform
    bottom, top, *places = scale([low, high, *(max(value, low) for value, *_ in ends)])
    gap = min(gap, 0.94 / max(1, len(ends) - 1))  # from 0.03 to 0.98, with room for rounding
    heights = spread([(place - bottom) / (top - bottom) for place in places], gap)
    for i in range(len(heights)):  # clear of the x axis's labels
        heights[i] = max(heights[i], heights[i - 1] + gap if i else 0.03)
    for above, i in enumerate(reversed(range(len(heights)))):  # and below the top
        heights[i] = min(heights[i], 0.98 - above * gap)
    beside = offset_copy(ax.transAxes, ax.get_figure(root=True), x=10, units="points")
    for at, (value, label, colour, *shape) in zip(heights, ends, strict=True):
        line = shape and shape[0] in ("-", "--", ":", "-.")
        x, where = ([1.015, 1.06], ax.transAxes) if line else ([1.0], beside)
        for style in shape:
            ax.plot(x, [at] * len(x), style, ms=6, color=colour, transform=where, clip_on=False)
        ax.annotate(
            f"{label}  {value:.{digits}f}".strip(), (x[-1], at), xycoords="axes fraction",
            xytext=(18 if shape and not line else 6, 0), textcoords="offset points", color=colour,
            fontsize=8.5, va="center", annotation_clip=False,
        )  # fmt: skip


def rows_of(table: pd.DataFrame) -> Iterator[Any]:
    """Rows as named tuples typed `Any`: pandas' own type is a union of every possible entry."""
    yield from table.itertuples(index=False)


def spread(values: list[float], gap: float) -> list[float]:
    """Positions near the ascending `values`, at least `gap` apart."""
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
