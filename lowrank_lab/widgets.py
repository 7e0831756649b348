"""Widgets over runs and figures: no maths, and nothing at all when headless."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lowrank_lab.config import RunConfig

OnStep = Callable[[dict[str, Any]], None]


@contextmanager
def progress(config: RunConfig, headless: bool = True) -> Iterator[OnStep]:
    """A progress bar for `train(on_step=…)` that is gone when the run is; nothing when headless."""
    if headless:
        yield lambda row: None
        return
    import ipywidgets as ipw
    from IPython.display import display

    bar = ipw.IntProgress(max=config.total_steps, description="steps")
    text = ipw.Label("starting")
    box = ipw.HBox([bar, text])

    def show(row: dict[str, Any]) -> None:
        bar.value = row["step"]
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        text.value = f"{row['step']}/{config.total_steps}  loss {row['loss']:.3f}  {speed}"

    display(box)  # type: ignore[no-untyped-call]
    try:
        yield show
    finally:
        box.close()
