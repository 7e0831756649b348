"""A panel: controls, and the text and picture that they redraw."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

from lowrank_lab.config import InputError

UNSQUEEZED = {"flex": "0 0 auto"}  # controls keep their width beside a wide picture
Draw = Callable[[dict[str, Any]], tuple[str, str]]


def panel(
    knobs: Mapping[str, Any], draw: Draw, above: bool = False,
    waiting: Callable[[dict[str, Any]], str] | None = None,
) -> Any:  # fmt: skip
    """A box of controls beside the text and picture that they redraw.

    Args:
        knobs: name → widget.
        draw: values by name → picture as HTML (`figures.image`), and text. The message of an
            InputError is shown in their place.
        above: put the controls in a row above a wide picture.
        waiting: values by name → text shown at once, while a picture that takes longer is drawn.
    """
    import ipywidgets as ipw

    text, picture = ipw.HTML(), ipw.HTML()

    def show(change: object = None) -> None:
        values = {name: knob.value for name, knob in knobs.items()}
        try:
            if waiting:
                text.value = html.escape(waiting(values))
            drawn, words = draw(values)
        except InputError as error:
            drawn, words = "", str(error)
        picture.value = drawn
        text.value = html.escape(words)  # last: when the text has changed, the picture has too

    for knob in knobs.values():
        knob.observe(show, "value")
    show()
    if above:
        row = ipw.HBox(list(knobs.values()), layout={"flex_flow": "row wrap"})
        return ipw.VBox([row, picture, text])
    left = ipw.VBox(list(knobs.values()), layout=UNSQUEEZED)
    return ipw.HBox([left, ipw.VBox([text, picture])])
