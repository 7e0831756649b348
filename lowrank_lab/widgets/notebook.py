"""Widgets of the notebooks: progress, memory of a configuration, and spectra of runs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from lowrank_lab.config import SIZES, InputError, ResolvedConfig, RunConfig
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.widgets.panel import panel
from lowrank_lab.widgets.slider import slider

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lowrank_lab.planning.memory_report import MemoryReport
    from lowrank_lab.runs.run import Run

OnStep = Callable[[dict[str, Any]], None]


def is_live(headless: bool = True) -> bool:
    """Whether to show widgets: not headless, LOWRANK_LAB_LIVE=1, or served by Voilà."""
    served = os.environ.get("SERVER_SOFTWARE", "").startswith("voila")
    served |= "VOILA_REQUEST_URL" in os.environ
    return not headless or os.environ.get("LOWRANK_LAB_LIVE") == "1" or served


@contextmanager
def progress(config: RunConfig, headless: bool = True) -> Iterator[OnStep]:
    """A progress bar for `train(on_step=…)`, removed after training; no bar when headless."""
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
        text.value = (
            f"{row['step']}/{config.total_steps}  loss {row['loss'] or math.nan:.3f}  {speed}"
        )

    display(box)  # type: ignore[no-untyped-call]
    try:
        yield show
    finally:
        box.close()


def what_fits(
    config: RunConfig, capacity: int, headless: bool = True, account: MemoryReport | None = None
) -> Any:
    """The simulated step of a configuration, and whether it fits; live, with controls.

    Headless, a slider over three batch sizes shows steps simulated in advance.

    Args:
        capacity: memory of the card, in bytes.
        account: `simulate_memory(config, "cuda")`, which headless is not simulated again.
    """
    if headless:
        batches = sorted({max(1, config.batch // 4), config.batch, 4 * config.batch})
        known = {config.batch: account}
        steps = {n: _step_figure(config.replace(batch=n), capacity, known.get(n)) for n in batches}
        return slider(
            {n: figure for n, (figure, _) in steps.items()}, "batch", start=config.batch,
            say=lambda n: steps[n][1],
        )  # fmt: skip
    import ipywidgets as ipw
    from IPython.display import display

    from lowrank_lab.planning.fit import of_method

    wide = {"style": {"description_width": "9em"}, "layout": ipw.Layout(width="26em")}
    powers = [2**i for i in range(13)]
    knobs: dict[str, Any] = {
        "model": ipw.Dropdown(options=list(SIZES), value=config.model, **wide),
        "method": ipw.Dropdown(options=list(METHODS), value=config.method, **wide),
        "rank": ipw.SelectionSlider(
            options=sorted({*powers[:13], config.rank or 128}), value=config.rank or 128, **wide
        ),
        "batch": ipw.SelectionSlider(
            options=sorted({*powers[:10], config.batch}), value=config.batch, **wide
        ),
        "sequence_length": ipw.SelectionSlider(
            options=sorted({*powers[4:], config.sequence_length}), value=config.sequence_length,
            **wide,
        ),
        "precision": ipw.Dropdown(
            options=["bf16", "fp32", "amp-bf16"], value=config.precision, **wide
        ),
        "activation_checkpointing": ipw.Checkbox(value=config.activation_checkpointing, **wide),
        "per_layer": ipw.Checkbox(value=config.per_layer, **wide),
    }  # fmt: skip
    for name, knob in knobs.items():
        knob.description = name.replace("_", " ")
        if hasattr(knob, "continuous_update"):
            knob.continuous_update = False

    def asked(values: dict[str, Any]) -> RunConfig:
        clip = 0.0 if values["per_layer"] else config.clip
        return of_method(config.replace(**values, clip=clip, method_options={}), values["method"])

    shown: dict[str, tuple[Figure, str]] = {}

    def draw(values: dict[str, Any]) -> tuple[Figure, str]:
        chosen = asked(values)
        key = chosen.model_dump_json()
        if key not in shown:
            shown[key] = _step_figure(chosen, capacity)
        return shown[key]

    def at_once(values: dict[str, Any]) -> str:
        return _formula_line(asked(values))

    display(panel(knobs, draw, waiting=at_once))  # type: ignore[no-untyped-call]
    return None


MEASURABLE = 3e11  # FLOPs of a step that takes seconds on a CPU
EMULATED = 16  # slowdown of bfloat16 products where torch emulates them (15.7 measured)


def _step_figure(
    asked: RunConfig, capacity: int, account: MemoryReport | None = None
) -> tuple[Figure, str]:
    """The timeline of an ordinary step, and its peak in one line."""
    from lowrank_lab import figures
    from lowrank_lab.methods.resolve import resolve
    from lowrank_lab.planning.simulate import measure, simulate

    config = resolve(asked)
    account = account or simulate(config, "cuda")
    peak = account.peak.total
    name = f"{config.method}, {config.model}, batch {config.batch} × {config.sequence_length}"
    rank = f"rank = {config.rank}" if config.rank else "no rank"
    fits = "fits" if peak <= capacity else "does not fit"
    words = (
        f"{name}, {rank}: peak = {peak / 1e9:.3f} GB ({account.peak_step} step), "
        f"{fits} in {capacity / 1e9:.4g} GB."
    )
    if _measurable(config):
        here = simulate(config).peak.total
        real = max(measure(config).allocated.values())
        words += f" On this CPU: simulated {here / 1e9:.3f}, measured {real / 1e9:.3f} GB."
    return figures.memory_timeline(account.steps["next"].table(), name), words


def _formula_line(asked: RunConfig) -> str:
    """Weights and states by formula: milliseconds, where a simulated step takes seconds."""
    from lowrank_lab.memory.formulas import by_formula
    from lowrank_lab.methods.resolve import resolve

    found = by_formula(resolve(asked))
    held = (found.weights + found.optimizer_states) / 1e9
    return f"weights + optimizer states = {held:.3f} GB by formula; simulating the step …"


def _measurable(config: ResolvedConfig) -> bool:
    """Whether a step of the configuration takes this CPU only seconds."""
    from lowrank_lab.device import bf16_products
    from lowrank_lab.memory.formulas import flops_per_token

    emulated = config.precision != "fp32" and bf16_products() == "emulation"
    flops = flops_per_token(config) * config.tokens_per_step
    return flops * (EMULATED if emulated else 1) <= MEASURABLE


def choose_spectra(runs: Sequence[Run], what: str, kind: str, headless: bool = True) -> Any:
    """Spectra over training of one kind of layer: a slider over runs, or live dropdowns.

    Args:
        what: as for `Run.spectra_of`.
        kind: a part of the layers' names, such as `q_proj`.

    Raises:
        InputError: no recorded layer has `kind` in its name.
    """
    from lowrank_lab import figures

    tables = cache(lambda run: run.spectra_of(what))  # reading one takes longer than drawing it

    def drawn(run: Run, kind: str) -> Figure:
        table = tables(run)
        layers = [name for name in table["layer"].unique() if kind in name]
        if not layers:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in table["layer"]})
            raise InputError("kind", kind, f"recorded: {', '.join(kinds) or 'nothing'}")
        return figures.spectrum_curves(table, layers[:8])

    if headless:
        return slider({run.label: drawn(run, kind) for run in runs}, "run")
    import ipywidgets as ipw
    from IPython.display import display

    kinds = list(dict.fromkeys(n.rsplit(".", 1)[-1] for n in runs[0].spectra["layer"]))
    by_label = {run.label: run for run in runs}
    knobs = {
        "run": ipw.Dropdown(options=list(by_label), description="run"),
        "layers": ipw.Dropdown(
            options=kinds, value=kind if kind in kinds else kinds[0], description="layers"
        ),
    }

    def draw(values: dict[str, Any]) -> tuple[Figure, str]:
        figure = drawn(by_label[values["run"]], values["layers"])
        return figure, f"{values['run']}, {what.replace('_', ' ')}, {values['layers']}"

    display(panel(knobs, draw, above=True))  # type: ignore[no-untyped-call]
    return None
