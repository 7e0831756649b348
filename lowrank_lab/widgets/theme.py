"""What a page tells a widget: whether it is dark. And answers without the collector's pauses."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anywidget
import traitlets


class Theme(anywidget.AnyWidget):
    """An invisible widget; `dark` follows the theme of JupyterLab, Voilà, or the browser."""

    _esm = Path(__file__).parent / "theme.js"

    dark = traitlets.Bool(False).tag(sync=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Collect no garbage in this block, so that an answer to a click doesn't wait for it.

    A full collection takes 0.4 s where torch is imported.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
