"""Metrics mirrored to TensorBoard, or to a tracker of the user's choice, during training.

A tracker has the methods of accelerate's `GeneralTracker`, so accelerate's trackers work unchanged.
Trackers receive copies of metrics.jsonl and result.json: one that raises an error is dropped with a
warning, and the run continues.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.methods.optimizers import imported

VARIABLE = "LOWRANK_LAB_TRACKERS"  # names, separated by commas; used if `train` gets None


class MetricsTracker(Protocol):
    """What `train(trackers=…)` calls. Optional: `start()`, called first."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The run's configuration, and its name as `run`, before the first step."""

    def log(self, values: dict[str, float], step: int) -> None:
        """The numbers of one row of metrics.jsonl; `event/<name>` is 1 where there was an event.

        After the last step, a further call has the numbers of result.json as `final_<name>`, and
        no `loss`. A resumed run logs the steps after its checkpoint again.
        """

    def finish(self) -> None:
        """The run has ended, or was stopped."""


class TensorBoard:
    """Event files for TensorBoard.

    Args:
        folder: folder of the event files.
        purge_step: hides earlier events from this step on, which a resumed run logs again.

    Raises:
        ImportError: the package tensorboard is missing.
    """

    def __init__(self, folder: Path | str, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(folder, purge_step=purge_step)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        lines = [f"    {name}: {value}" for name, value in values.items()]
        self._writer.add_text("configuration", "\n".join(lines), 0)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


# Makes the tracker of a run from its name, its folder and the number of updates it resumes from.
TrackerBuilder = Callable[[str, Path, int], MetricsTracker]


def tracker_builders(asked: Sequence[str | MetricsTracker] | None) -> list[TrackerBuilder]:
    """A builder for each tracker; None: for those that the environment variable names.

    Raises:
        InputError: a name that is neither `tensorboard` nor a class that can be imported, or an
            object without the methods of a tracker.
    """
    if asked is None:
        asked = [name for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    return [_builder(one.strip() if isinstance(one, str) else one) for one in asked]


def _builder(asked: str | MetricsTracker) -> TrackerBuilder:
    if asked == "tensorboard":
        if importlib.util.find_spec("tensorboard") is None:
            raise InputError("trackers", asked, "it needs its package: pip install tensorboard")
        return lambda run, folder, updates: TensorBoard(folder / "tensorboard", updates + 1)
    if not isinstance(asked, str):
        _check(asked, asked)
        return lambda run, folder, updates: asked
    if "." not in asked:
        raise InputError("trackers", asked, "tensorboard, or module.Class")
    made = imported("trackers", asked)
    _check(made, asked)
    return lambda run, folder, updates: made(run)


def _check(tracker: Any, asked: Any) -> None:
    needed = ("store_init_configuration", "log", "finish")
    missing = [name for name in needed if not callable(getattr(tracker, name, None))]
    if missing:
        raise InputError("trackers", asked, f"it has no {missing[0]}; needed: {', '.join(needed)}")


class Mirror:
    """The trackers of one run.

    Args:
        builders: the result of `tracker_builders`.
        config, name, folder: those of the run.
        updates: number of updates that the run resumes from; 0 for a new run.
    """

    def __init__(
        self,
        builders: Iterable[TrackerBuilder],
        config: RunConfig,
        name: str,
        folder: Path,
        updates: int,
    ) -> None:
        self._trackers: list[MetricsTracker] = []
        for build in builders:
            with _dropping():
                self._trackers.append(build(name, folder, updates))
        facts = {key: _plain(value) for key, value in config.model_dump().items()}
        self._each(lambda tracker: getattr(tracker, "start", lambda: None)())
        self._each(lambda tracker: tracker.store_init_configuration({"run": name, **facts}))

    def log(self, row: Mapping[str, Any]) -> None:
        """Log a row of metrics.jsonl."""
        values = _numbers(row, but="step")
        values |= {f"event/{event['event']}": 1.0 for event in row.get("events", ())}
        self._each(lambda tracker: tracker.log(dict(values), step=row["step"]))

    def log_result(self, result: Mapping[str, Any]) -> None:
        """Log result.json at its last step."""
        values = {f"final_{name}": value for name, value in _numbers(result, but="steps").items()}
        self._each(lambda tracker: tracker.log(dict(values), step=result["steps"]))

    def finish(self) -> None:
        self._each(lambda tracker: tracker.finish())

    def _each(self, call: Callable[[MetricsTracker], object]) -> None:
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            with _dropping():
                call(tracker)
                self._trackers.append(tracker)


@contextmanager
def _dropping() -> Iterator[None]:
    """Turn any error of a tracker into a warning in one line: it must not end the run."""
    try:
        yield
    except Exception as error:
        line = f"trackers: one is dropped: {type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(line, stacklevel=2)


def _numbers(row: Mapping[str, Any], but: str) -> dict[str, float]:
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != but
    }


def _plain(value: Any) -> Any:
    """A value that every tracker can store: lists, dictionaries and others become text."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
