"""Pictures for a live page: quick to draw, and on a dark page in colours that are seen there.

A figure is made once, in colours for print. On a dark page it is drawn with others, and is then as
it was: what a reader downloads stays light.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axis import Axis as _Axis
from matplotlib.collections import Collection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from lowrank_lab.figures.drawing import STYLE, alt_text, data_uri, png

LIGHT = {"ink": "#1f2328", "soft": "#6b7280", "page": "#ffffff",
         "blue": "#0072B2", "orange": "#D55E00", "green": "#009E73"}  # fmt: skip
DARK = {"ink": "#e6e8eb", "soft": "#9aa3ad", "page": "#121212",
        "blue": "#56B4E9", "orange": "#E69F00", "green": "#2FC79A"}  # fmt: skip
TEXT, MARK = 4.5, 3.0  # contrast with the page that WCAG 2.2 asks of text (AA) and of graphics
AS_IS = "as-is"  # gid of artists with the same colours on every page: cells of a map, their numbers
DPI = 100  # of a picture in a live page
QUICK: Any = {"text.hinting": "no_hinting"}
RC: Any = mpl.rcParams
Axis: Any = _Axis  # whose stubs lack axis_name
Colour = tuple[float, float, float, float]


def live_image(figure: Figure, dark: bool = False, **options: Any) -> str:
    """A figure as an HTML image that is drawn in a third less time than `image`.

    Its text is not fitted to pixels, and its PNG is compressed less.

    Args:
        dark: on a dark page.
        options: for `savefig`; without any the picture has the size of the figure.
    """
    with mpl.rc_context(QUICK), _laid_out(figure), darkened(figure, dark):
        content = png(figure, **{"dpi": DPI, "pil_kwargs": {"compress_level": 1}} | options)
    return image_tag(alt_text(figure), content)


@contextmanager
def _laid_out(figure: Figure) -> Iterator[None]:
    """Find the layout of a figure, and fix it in this block: else `savefig` draws it twice."""
    engine, dpi = figure.get_layout_engine(), figure.dpi
    try:
        if engine is not None:
            figure.dpi = DPI
            engine.execute(figure)
            figure.set_layout_engine("none")
        yield
    finally:
        figure.dpi = dpi
        figure.set_layout_engine(engine)


def image_tag(alt: str, content: bytes, more: str = "") -> str:
    """An HTML image of a PNG.

    Args:
        more: attributes.
    """
    alt = html.escape(alt)
    size = 'style="max-width: 100%; height: auto"'
    return f'<img alt="{alt}" src="{data_uri(content)}" {more}{size}>'


@contextmanager
def darkened(figure: Figure, dark: bool = True) -> Iterator[None]:
    """Give a figure the colours of a dark page in this block.

    Greys are inverted. Other colours are mixed with white until they are seen on the page. Images,
    colour maps and artists with the gid AS_IS keep their colours.
    """
    undo: list[Callable[[], Any]] = []
    try:
        with mpl.rc_context(STYLE):  # ticks are made here
            for artist in _parts(figure) if dark else ():
                _recolour(artist, undo)
        yield
    finally:
        for step in reversed(undo):
            step()


def _parts(figure: Figure) -> list[Artist]:
    return [part for part in figure.findobj() if part.get_gid() != AS_IS]


def _recolour(artist: Any, undo: list[Callable[[], Any]]) -> None:
    """Change the colours of one artist, and note how to change them back."""
    if isinstance(artist, Axis):  # ticks that are made later
        kind = f"{artist.axis_name}tick.color"
        now = {n: artist.get_tick_params().get(n, RC[default]) for n, default in
               {"color": kind, "labelcolor": kind, "grid_color": "grid.color"}.items()}  # fmt: skip
        artist.set_tick_params(**{name: seen(colour, MARK)[:3] for name, colour in now.items()})
        undo.append(lambda: artist.set_tick_params(**now))
        return
    if isinstance(artist, Text):
        _set(artist, "color", TEXT, undo)
    elif isinstance(artist, Line2D):
        own = [artist.get_markerfacecolor(), artist.get_markeredgecolor()]
        for part, colour in zip(("markerfacecolor", "markeredgecolor"), own, strict=True):
            if colour != artist.get_color():  # others follow the line
                _set(artist, part, MARK, undo)
        _set(artist, "color", MARK, undo)
    elif isinstance(artist, Patch) or (
        isinstance(artist, Collection) and artist.get_array() is None
    ):
        for part in ("facecolor", "edgecolor"):
            _set(artist, part, MARK, undo)


def _set(artist: Any, part: str, contrast: float, undo: list[Callable[[], Any]]) -> None:
    before = getattr(artist, f"get_{part}")()
    change = getattr(artist, f"set_{part}")
    if isinstance(before, str) and before in ("none", "auto"):
        return
    if isinstance(before, np.ndarray) and before.ndim == 2:
        after: Any = [seen(tuple(colour), contrast) for colour in before]
    else:
        after = seen(before, contrast)
    change(after)
    undo.append(lambda: change(before))


def seen(colour: Any, contrast: float) -> Colour:
    """A colour as it is drawn on a dark page, with at least that contrast; white is the page."""
    return _seen(to_rgba(colour), contrast)


@cache
def _seen(colour: Colour, contrast: float) -> Colour:
    rgb, page, ink = (np.array(to_rgba(c)[:3]) for c in (colour, DARK["page"], DARK["ink"]))
    if np.ptp(rgb) < 0.06:
        rgb = ink + (page - ink) * rgb
        if colour[:3] == (1.0, 1.0, 1.0):
            return (*page.tolist(), colour[3])
    lighter = (rgb + share * (1 - rgb) for share in np.linspace(0, 1, 41))
    found = next(mixed for mixed in lighter if _contrast(mixed, page) >= contrast)
    return (*found.tolist(), colour[3])


def _contrast(one: Any, other: Any) -> float:
    """Contrast of two sRGB colours by WCAG 2.2: 1 (none) to 21."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(rgb: Any) -> float:
    rgb = np.asarray(rgb)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
