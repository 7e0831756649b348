"""A panel: controls, and a text and a picture that answer to them."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

from lowrank_lab.config import InputError

UNSQUEEZED = {"flex": "0 0 auto"}  # controls keep their width beside a wide picture
Draw = Callable[[dict[str, Any]], tuple[str, str]]


def panel(knobs: Mapping[str, Any], draw: Draw, above: bool = False, waiting: str = "") -> Any:
    """A box of controls with what they change beside them, or below.

    Args:
        knobs: name → widget.
        draw: values by name → the picture as HTML (`figures.image`), and words. What it raises as
            InputError is shown instead.
        above: the controls stand in a row above, for wide pictures.
        waiting: shown until the answer is there.
    """
    import ipywidgets as ipw

    text, picture = ipw.HTML(), ipw.HTML()

    def show(change: object = None) -> None:
        if waiting:
            text.value = waiting
        try:
            drawn, words = draw({name: knob.value for name, knob in knobs.items()})
        except InputError as error:
            drawn, words = "", str(error)
        picture.value = drawn
        text.value = html.escape(words)  # last: who waits for it finds the picture there

    for knob in knobs.values():
        knob.observe(show, "value")
    show()
    if above:
        row = ipw.HBox(list(knobs.values()), layout={"flex_flow": "row wrap"})
        return ipw.VBox([row, picture, text])
    left = ipw.VBox(list(knobs.values()), layout=UNSQUEEZED)
    return ipw.HBox([left, ipw.VBox([text, picture])])
