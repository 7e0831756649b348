"""A slider over figures that were drawn beforehand: it answers in any browser, with no kernel."""

from __future__ import annotations

import html
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from lowrank_lab.config import InputError
from lowrank_lab.figures import STYLE, alt_text, data_uri, png

Label = TypeVar("Label", bound=Hashable)

# The handler stands in the input itself: JupyterLab and static pages run it alike, and several
# sliders on a page need no names. Arrow keys, Home and End are the browser's own.
_ON_INPUT = (
    "const box = this.closest('.slider'), text = this.dataset.texts.split('|')[this.value];"
    "box.querySelectorAll('img').forEach((img, i) => img.hidden = i != this.value);"
    "box.querySelector('output').textContent = text;"
    "this.setAttribute('aria-valuetext', text);"
)


@dataclass(frozen=True)
class Slider:
    """Pictures with a text and words for those who can't see them; shows itself as HTML."""

    name: str
    texts: tuple[str, ...]
    alts: tuple[str, ...]
    images: tuple[bytes, ...]  # PNG
    start: int = 0

    def _repr_html_(self) -> str:
        pictures = "\n".join(
            f'<img alt="{html.escape(alt)}" src="{data_uri(png)}"{_hidden(index != self.start)} '
            'style="max-width: 100%; height: auto">'
            for index, (png, alt) in enumerate(zip(self.images, self.alts, strict=True))
        )
        text = html.escape(self.texts[self.start])
        return (
            '<figure class="slider" style="margin: 1em 0">'
            f"<label>{html.escape(self.name)} "
            f'<input type="range" min="0" max="{len(self.images) - 1}" step="1" '
            f'value="{self.start}" autocomplete="off" aria-valuetext="{text}" '
            f'data-texts="{html.escape("|".join(self.texts))}" '
            f'oninput="{html.escape(_ON_INPUT)}" style="width: 18em; vertical-align: middle">'
            f'</label> <output aria-live="polite">{text}</output>\n{pictures}</figure>'
        )


def slider(
    figures: Mapping[Label, Figure],
    name: str,
    alt: Callable[[Label], str] | None = None,
    start: Label | None = None,
    say: Callable[[Label], str] | None = None,
) -> Slider:
    """A slider that shows one of the figures, and `name = label` beside it.

    A notebook's cell returns it where it is headless: what it shows is drawn now and needs no
    kernel later, neither in JupyterLab nor in the published pages. A picture is 20 to 60 kB.

    Args:
        figures: label (a number or a text) → figure, in the order of the slider.
        name: of what the slider changes, such as `rank`; the label of the slider.
        alt: words for a label's figure, for those who can't see it; what is written in it if None.
        start: the label that is shown first; the first one if None.
        say: what is written beside the slider; `name = label` if None.

    Raises:
        InputError: no figures, a start that isn't among the labels, or an empty alt text.
    """
    labels = list(figures)
    if not labels:
        raise InputError("figures", {}, "a slider needs at least one figure")
    if start is not None and start not in figures:
        raise InputError("start", start, f"one of {', '.join(map(str, labels))}")
    alts = tuple(
        (alt(label) if alt else alt_text(figure)).strip() for label, figure in figures.items()
    )
    if not all(alts):
        raise InputError("alt", "", f"no words for {labels[alts.index('')]!r}")
    texts = (say(label) if say else f"{name} = {_shown(label)}" for label in labels)
    return Slider(
        name=name,
        texts=tuple(text.replace("|", "/") for text in texts),
        alts=alts,
        images=tuple(pngs_of(list(figures.values()))),
        start=0 if start is None else labels.index(start),
    )


def pngs_of(figures: Sequence[Figure]) -> Iterator[bytes]:
    """Figures as PNG, all cropped to the same box: what a slider switches doesn't jump."""
    with mpl.rc_context(STYLE):
        boxes = []
        for figure in figures:
            figure.draw_without_rendering()  # the layout is found here  # type: ignore
            renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
            boxes.append(figure.get_tightbbox(renderer))
        box = Bbox.union(boxes).padded(mpl.rcParams["savefig.pad_inches"])
        for figure in figures:
            yield png(figure, dpi=figure.dpi, bbox_inches=box)


def _shown(label: Hashable) -> str:
    return f"{label:g}" if isinstance(label, float) else str(label)


def _hidden(hidden: bool) -> str:
    return " hidden" if hidden else ""
