"""Drawings of the ideas: shapes of factors, a gradient's shadow, balance, and turning averages.

Each has a variant for light and for dark pages. Colours are Okabe and Ito's, and every part has its
name beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from lowrank_lab.figures.drawing import STYLE, Drawing, png, save_small, small
from lowrank_lab.figures.page import DARK, LIGHT, image_tag

Point = tuple[float, float]
# JupyterLab and Voilà, and the book, say in these attributes which theme they have.
THEMES = ('body[data-jp-theme-light="false"]', 'html[data-theme="dark"]')
FRAMELESS = "background: none !important; padding: 0 !important"  # the book has a light frame
# JupyterLab shows images that are `hidden`, by a rule of its own.
SWITCH = ".idea-dark {display: none !important} " + "".join(
    f"{theme} .idea-light {{display: none !important}} "
    f"{theme} .idea-dark {{display: inline !important; {FRAMELESS}}} " for theme in THEMES
)  # fmt: skip


class Idea(Drawing):
    """A drawing of an idea: a notebook shows it in the variant of its page."""

    variant: Callable[[bool], Figure]

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both variants as HTML, where a page without the style shows the light one alone."""
        light, dark = (small(png(self.variant(dark))) for dark in (False, True))
        shown = image_tag(self.alt, light, 'class="idea-light only-light" ')
        other = image_tag(self.alt, dark, 'class="idea-dark only-dark" hidden ')
        html = f"<style>{SWITCH}</style>{shown}{other}"
        return {"text/html": html}, super()._repr_mimebundle_()[1]


def shapes(dark: bool = False) -> Figure:
    """W beside B·A, to scale, with their sizes."""
    with _page(shapes, dark, (7.2, 2.9), 1) as (figure, (ax,), ink):
        m, n, r = 32.0, 48.0, 4.0
        _matrix(ax, 0, 0, n, m, ink, "blue", "W")
        _matrix(ax, 66, 0, r, m, ink, "orange", "B")
        _matrix(ax, 80, 14, n, r, ink, "green", "A")
        for x, sign in ((57.0, "≈"), (75.0, "·")):
            ax.text(x, m / 2, sign, fontsize=18, ha="center", va="center", color=ink["ink"])
        small: dict[str, Any] = {"fontsize": 9, "color": ink["soft"], "ha": "center"}
        for x, y, words in (
            (-3, m / 2, "m"), (n / 2, m + 1.5, "n"), (63, m / 2, "m"), (66 + r / 2, m + 1.5, "r"),
            (104, 19.5, "n"), (131, 16, "r"),
        ):  # fmt: skip
            ax.text(x, y, words, va="center" if words in "mr" and y < m else "bottom", **small)
        ax.text(n / 2, -3, "m · n = 1536 entries", va="top", **small)
        ax.text(97, -3, "r · (m + n) = 320 entries", va="top", **small)
        ax.set(xlim=(-6, 134), ylim=(-8, 37), aspect="equal")
        figure.alt = (
            "A wide matrix W with m rows and n columns beside a thin matrix B with m rows and r "
            "columns times a flat matrix A with r rows and n columns: 1536 entries against 320."
        )
    return figure


def shadow(dark: bool = False) -> Figure:
    """A gradient, its projection onto the subspace, and the residual between them."""
    with _page(shadow, dark, (6.4, 3.5), 1) as (figure, (ax,), ink):
        plane = [(0, 0), (6.2, 0), (8.2, 2.4), (2.0, 2.4)]
        ax.add_patch(Polygon(plane, facecolor=ink["soft"], alpha=0.16, edgecolor="none"))
        ax.add_patch(Polygon(plane, fill=False, edgecolor=ink["soft"], lw=0.8))
        start, foot, top = (1.9, 0.7), (5.3, 1.5), (5.3, 4.2)
        _arrow(ax, start, foot, ink["blue"])
        _arrow(ax, foot, top, ink["orange"], dashed=True)
        _arrow(ax, start, top, ink["ink"])
        ax.plot([5.0, 5.0, 5.3], [1.43, 1.73, 1.8], color=ink["soft"], lw=0.9)
        for x, y, words, colour in (
            (3.2, 2.75, "G, the gradient", "ink"),
            (3.4, 0.58, "P Pᵀ G, its shadow: all\nthat GaLore's Adam sees", "blue"),
            (5.5, 3.2, "G − P Pᵀ G, the residual:\nGaLore discards it, Fira adds it, scaled",
             "orange"),
            (0.55, 0.15, "subspace of P, r dimensions", "soft"),
        ):  # fmt: skip
            ha = "right" if colour == "ink" else "left"
            ax.text(x, y, words, color=ink[colour], fontsize=9, ha=ha, va="center")
        ax.set(xlim=(-0.2, 10.6), ylim=(-0.2, 4.5), aspect="equal")
        figure.alt = (
            "An arrow, the gradient G, rises out of a plane, the subspace of P. Its shadow P Pᵀ G "
            "lies in the plane: all that GaLore's Adam sees. The residual leads from the shadow to "
            "the gradient: GaLore discards it, Fira adds it."
        )
    return figure


def balance(dark: bool = False) -> Figure:
    """Lengths of the columns of B and the rows of A, before and after refactorization."""
    B, A = (3.0, 0.35, 2.0), (0.9, 3.4, 0.3)
    products = sorted((b * a for b, a in zip(B, A, strict=True)), reverse=True)
    roots = [math.sqrt(p) for p in products]
    panels = {"before": (B, A), "after: equal lengths, sorted": (roots, roots)}
    with _page(balance, dark, (7.0, 2.9), 2) as (figure, axes, ink):
        for ax, (title, (b, a)) in zip(axes, panels.items(), strict=True):
            for i in range(3):
                _bar(ax, i - 0.19, b[i], ink["orange"], "b", ink)
                _bar(ax, i + 0.19, a[i], ink["green"], "a", ink)
                words = f"{b[i]:.2g} · {a[i]:.2g} = {b[i] * a[i]:.1f}"
                ax.text(i, -0.6, words, ha="center", color=ink["soft"], fontsize=8.5)
            ax.axhline(0, color=ink["soft"], lw=0.8)
            ax.set(xlim=(-0.6, 2.6), ylim=(-0.9, 4.1))
            ax.set_title(title, color=ink["ink"])
        figure.text(
            0.5, 0.0,
            "b: length of a column of B;  a: length of its row of A;  products don't change",
            ha="center", color=ink["soft"], fontsize=9,
        )  # fmt: skip
        figure.alt = (
            "Lengths of three columns of B and of their rows of A. Before: 3 and 0.9, 0.35 and "
            "3.4, 2 and 0.3. After refactorization both are 1.6, 1.1 and 0.77: the products are "
            "the same, in descending order."
        )
    return figure


def turning(dark: bool = False) -> Figure:
    """Adam's average in a basis, kept in a new one, and transported into it."""
    m, turn = (2.0, 0.9), math.radians(55)
    x, y = m
    moved = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    panels: Sequence[tuple[str, float, Point]] = (
        ("the average m", 0.0, m), ("kept: the same numbers", turn, m),
        ("transported: the same arrow", turn, moved),
    )  # fmt: skip
    with _page(turning, dark, (7.6, 3.0), 3) as (figure, axes, ink):
        for ax, (title, angle, numbers) in zip(axes, panels, strict=True):
            first = math.cos(angle), math.sin(angle)
            second = -first[1], first[0]
            names = ("p₁", "p₂") if not angle else ("p₁′", "p₂′")
            for axis, name in zip((first, second), names, strict=True):
                _arrow(ax, (0, 0), (2.1 * axis[0], 2.1 * axis[1]), ink["soft"], width=1.2)
                ax.text(2.4 * axis[0], 2.4 * axis[1], name, color=ink["soft"],
                        ha="center", va="center", fontsize=10)  # fmt: skip
            if angle:
                _arrow(ax, (0, 0), m, ink["soft"], dashed=True, width=1.2)
                if title.startswith("kept"):
                    ax.text(1.75, 0.35, "before", color=ink["soft"], ha="center", fontsize=8.5)
            tip = (numbers[0] * first[0] + numbers[1] * second[0],
                   numbers[0] * first[1] + numbers[1] * second[1])  # fmt: skip
            _arrow(ax, (0, 0), tip, ink["orange" if title.startswith("kept") else "blue"])
            words = f"({numbers[0]:.1f}, {numbers[1]:.1f})".replace("-", "−")
            ax.text(0.3, -1.15, f"coordinates {words}", ha="center", color=ink["ink"], fontsize=9)
            ax.set_title(title, color=ink["ink"], fontsize=9.5)
            ax.set(xlim=(-2.2, 2.8), ylim=(-1.4, 2.7), aspect="equal")
        figure.alt = (
            "Three panels. First: a basis of two arrows and the average m with the coordinates 2.0 "
            "and 0.9. Second: the basis has turned; the kept coordinates now give another arrow. "
            "Third: the transported coordinates 1.9 and −1.1 give the same arrow as before."
        )
    return figure


IDEAS: Mapping[str, Callable[[bool], Figure]] = {
    "shapes": shapes, "shadow": shadow, "balance": balance, "turning": turning,
}  # fmt: skip


def redraw(folder: Path | str) -> list[Path]:
    """Draw the pictures NAME_light.png and NAME_dark.png of `IDEAS` in a folder again.

    Returns:
        The pictures that were drawn; those that the folder lacks are not added, others stay.
    """
    drawn = []
    for name, draw in IDEAS.items():
        for page in ("light", "dark"):
            if (path := Path(folder) / f"{name}_{page}.png").exists():
                save_small(png(draw(page == "dark"), dpi=160, bbox_inches="tight"), path)
                drawn.append(path)
    return drawn


@contextmanager
def _page(
    draw: Callable[[bool], Figure], dark: bool, size: Point, columns: int
) -> Iterator[tuple[Drawing, list[Axes], Mapping[str, str]]]:
    """A figure on a light or dark page, with axes without frames, and its colours."""
    ink = DARK if dark else LIGHT
    with mpl.rc_context(STYLE):
        figure = Idea(figsize=size, layout="constrained", facecolor=ink["page"])
        figure.variant = draw
        axes = list(figure.subplots(1, columns, squeeze=False)[0])
        for ax in axes:
            ax.set_axis_off()
        yield figure, axes, ink


def _matrix(
    ax: Axes, x: float, y: float, width: float, height: float,
    ink: Mapping[str, str], colour: str, name: str,
) -> None:  # fmt: skip
    ax.add_patch(Rectangle((x, y), width, height, facecolor=ink[colour], alpha=0.3))
    ax.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=ink[colour], lw=1.5))
    ax.text(x + width / 2, y + height / 2, name, ha="center", va="center",
            color=ink["ink"], fontsize=13, fontweight="bold")  # fmt: skip


def _bar(ax: Axes, x: float, height: float, colour: str, name: str, ink: Mapping[str, str]) -> None:
    ax.bar(x, height, width=0.34, color=colour)
    ax.text(x, height + 0.1, name, ha="center", color=ink["ink"], fontsize=9)


def _arrow(
    ax: Axes, tail: Point, tip: Point, colour: str, *, dashed: bool = False, width: float = 2.0
) -> None:
    arrow = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", tip, tail, arrowprops=arrow | ({"ls": (0, (4, 3))} if dashed else {}))
