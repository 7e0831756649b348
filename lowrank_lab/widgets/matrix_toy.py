"""Panels over the one-matrix problem: sliders for the rank and for the settings of a fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from lowrank_lab.analysis import matrix_toy
from lowrank_lab.analysis.matrix_toy import METHODS, Fit, Settings
from lowrank_lab.config import InputError
from lowrank_lab.figures import alt_text
from lowrank_lab.figures.matrix_toy import approximation, fit_result
from lowrank_lab.widgets.panel import panel
from lowrank_lab.widgets.slider import Slider, slider

KNOBS = ("method", "rank", "period", "strength", "noise", "refactor", "imbalance")
CHOICES = {
    "period": (0, 5, 10, 20, 40, 80),
    "noise": (0.0, 0.1, 0.3, 1.0, 2.0),
    "imbalance": (1.0, 10.0, 100.0, 1000.0),
}
UNUSED = {  # settings without effect, per method
    "full-rank": {"rank", "refactor", "imbalance"},
    "galore": {"refactor", "imbalance"},
    "fira": {"refactor", "imbalance"},
    "low-rank": set[str](),
}


def _summary(target: Tensor, done: Fit, reference: Fit) -> str:
    """Settings, error and effective rank of a fit, in one line."""
    asked, best = done.settings, matrix_toy.tail(target, done.settings.rank)
    knobs = [k for k in KNOBS[1:] if k not in UNUSED[asked.method]]
    values = [f"{k} = {_value_text(k, getattr(asked, k))}" for k in knobs]
    compared = f" (best of rank {asked.rank}: {best:.4f}, full-rank: {reference.error:.4f})"
    compared = "" if asked.method == "full-rank" else compared
    rank = f"effective rank {done.effective_rank():.1f}"
    return f"{', '.join([asked.method, *values])}: error {done.error:.4f}{compared}, {rank}"


def _value_text(knob: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "never" if knob == "period" and not value else f"{value:g}"


def approximate(W: Tensor, rank: int, headless: bool = True) -> Any:
    """`approximation` with a slider over ranks; headless, its figures are drawn in advance."""

    def draw(values: Mapping[str, Any], onto: Figure | None = None) -> tuple[Figure, str]:
        error = matrix_toy.tail(W, values["rank"])
        return approximation(W, values["rank"], onto), f"rank = {values['rank']}, error {error:.4f}"

    if headless:
        return _static_slider("rank", _choices("rank", rank, W), rank, draw)
    import ipywidgets as ipw

    return _display_panel({"rank": ipw.IntSlider(rank, 1, min(W.shape))}, draw)


def explore(
    target: Tensor, settings: Settings, knobs: Sequence[str] = KNOBS, headless: bool = True
) -> Any:
    """Fit the matrix with these settings; live, each knob has a control.

    Headless, one slider over the first knob shows figures drawn in advance.

    Args:
        knobs: the settings to vary, a subset of KNOBS.

    Raises:
        InputError: an unknown knob.
    """
    for knob in knobs:
        if knob not in KNOBS:
            raise InputError("knobs", knob, ", ".join(KNOBS))
    fits: dict[Settings, Fit] = {}

    def cached_fit(asked: Settings) -> Fit:
        if asked not in fits:
            fits[asked] = matrix_toy.fit(target, asked)
        return fits[asked]

    def draw(values: Mapping[str, Any], onto: Figure | None = None) -> tuple[Figure, str]:
        asked = settings.replace(**values)
        plain = Settings(noise=asked.noise, steps=asked.steps, lr=asked.lr, seed=asked.seed)
        done, reference = cached_fit(asked), cached_fit(plain)
        return fit_result(target, done, reference, onto), _summary(target, done, reference)

    if headless:
        first, value = knobs[0], getattr(settings, knobs[0])
        return _static_slider(first, _choices(first, value, target), value, draw)
    return _display_panel({knob: _control(knob, settings, target) for knob in knobs}, draw)


def _static_slider(
    knob: str, choices: Sequence[Any], start: Any,
    draw: Callable[[Mapping[str, Any]], tuple[Figure, str]],
) -> Slider:  # fmt: skip
    """A slider over figures drawn now, for pages without a kernel."""
    drawn = {value: draw({knob: value}) for value in choices}
    figures = {value: figure for value, (figure, _) in drawn.items()}
    return slider(
        figures, knob, lambda value: f"{drawn[value][1]}. {alt_text(figures[value])}", start,
        say=lambda value: drawn[value][1],
    )  # fmt: skip


def _choices(name: str, value: Any, target: Tensor) -> list[Any]:
    """The values that a slider offers for a setting: for a rank, powers of two."""
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


def _control(name: str, settings: Settings, target: Tensor) -> Any:
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
    options = [(_value_text(name, v), v) for v in _choices(name, value, target)]
    return ipw.SelectionSlider(options=options, value=value)


def _display_panel(
    knobs: dict[str, Any], draw: Callable[[Mapping[str, Any], Figure | None], tuple[Figure, str]]
) -> None:
    """Display the controls above the figure that they redraw."""
    from IPython.display import display

    for name, knob in knobs.items():
        knob.description = name
        knob.style.description_width, knob.layout.width = "6em", "22em"
    last: Figure | None = None

    def drawn(values: dict[str, Any]) -> tuple[Figure, str]:
        nonlocal last
        for name, knob in knobs.items():
            knob.disabled = name in UNUSED.get(values.get("method", ""), ())
        last, words = draw(values, last)
        return last, words

    display(panel(knobs, drawn, above=True))  # type: ignore[no-untyped-call]
