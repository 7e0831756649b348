"""A panel: controls, and the text and picture that they redraw."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from lowrank_lab.config import InputError
from lowrank_lab.figures import live_image
from lowrank_lab.widgets.theme import Theme, uninterrupted

# Controls keep their width beside a wide picture; narrow pages have the picture below them.
UNSQUEEZED = {"flex": "0 0 auto", "max_width": "100%"}
Draw = Callable[[dict[str, Any]], tuple[Figure, str]]


def panel(
    knobs: Mapping[str, Any], draw: Draw, above: bool = False,
    waiting: Callable[[dict[str, Any]], str] | None = None,
) -> Any:  # fmt: skip
    """A box of controls beside the text and picture that they redraw.

    Args:
        knobs: name → widget.
        draw: values by name → figure, and text. The message of an InputError is shown in their
            place.
        above: put the controls in a row above a wide picture.
        waiting: values by name → text shown at once, while a picture that takes longer is drawn.
    """
    import ipywidgets as ipw

    text, picture, theme = ipw.HTML(), ipw.HTML(), Theme()

    def show(change: object = None) -> None:
        values = {name: knob.value for name, knob in knobs.items()}
        with uninterrupted():
            try:
                if waiting:
                    text.value = html.escape(waiting(values))
                figure, words = draw(values)
                picture.value = live_image(figure, theme.dark)
            except InputError as error:
                words, picture.value = str(error), ""
            text.value = html.escape(words)  # last: when the text has changed, the picture has too

    for knob in knobs.values():
        knob.layout.max_width = "100%"
        knob.observe(show, "value")
    theme.observe(show, "dark")
    show()
    if above:
        row = ipw.HBox(list(knobs.values()), layout={"flex_flow": "row wrap"})
        return ipw.VBox([row, picture, text, theme])
    left = ipw.VBox(list(knobs.values()), layout=UNSQUEEZED)
    right = ipw.VBox([text, picture, theme], layout={"max_width": "100%"})
    return ipw.HBox([left, right], layout={"flex_flow": "row wrap"})
