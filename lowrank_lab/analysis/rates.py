"""How much a label's loss depends on its learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

WITHIN = 0.02  # nats per token above the best that still count as good
DIVERGED = 0.5  # nats per token above the best
FITTED = 4.0  # a parabola is fitted to the values within this factor of the best
RATE = re.compile(r", lr [^,]+")


def rate_table(finals: pd.DataFrame) -> pd.DataFrame:
    """Validation loss over learning rates: variant, label (without its rate), lr, mean, n."""
    table = finals.assign(label=[RATE.sub("", label) for label in finals["label"]])
    table = table.assign(variant=[label.split(", ")[0] for label in table["label"]])
    grouped = table.groupby(["variant", "label", "lr"], sort=False)["validation_loss"]
    return grouped.agg(["mean", "count"]).reset_index().rename(columns={"count": "n"})


def robustness(finals: pd.DataFrame, within: float = WITHIN) -> pd.DataFrame:
    """One row per label with at least three learning rates: how far its rate may be off.

    Columns: label; rates, their number; best rate; validation loss there; down and up, the factors
    by which the rate may be divided or multiplied before the loss has risen by `within` (on a
    monotone cubic through the losses over the logarithm of the rate, which is flat at the best; NaN
    if no rate that was tried is that bad); width, their product; and `diverges at`, the lowest rate
    above the best with a loss more than DIVERGED higher or not finite (NaN if none was tried).

    Args:
        finals: returned by `runs.final_table`.
    """
    rows: list[tuple[Any, ...]] = []
    for label, part in rate_table(finals).groupby("label", sort=False):
        part = part.sort_values("lr")
        rates, losses = part["lr"].to_numpy(float), part["mean"].to_numpy(float)
        if len(rates) < 3 or not np.isfinite(losses).any():
            continue
        i = int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))
        level, limit = losses[i] + within, losses[i] + DIVERGED
        down, up = _reach(np.log(rates), losses, i, level)
        bad = [r for r, x in zip(rates[i:], losses[i:], strict=True) if not x <= limit]
        edge = bad[0] if bad else math.nan
        rows.append((label, len(rates), rates[i], losses[i], down, up, down * up, edge))
    names = ["label", "rates", "best rate", "validation loss", "down", "up", "width", "diverges at"]
    return pd.DataFrame(rows, columns=names).sort_values("validation loss", ignore_index=True)


def _reach(logs: np.ndarray, losses: np.ndarray, best: int, level: float) -> tuple[float, float]:
    """The factors from the best down and up to where the losses reach `level`; NaN if nowhere.

    A loss that is not finite counts as above, from the last finite one on.
    """
    from scipy.interpolate import PchipInterpolator

    bad = np.flatnonzero(~np.isfinite(losses))
    first = int(bad[bad < best].max(initial=-1)) + 1
    end = int(bad[bad > best].min(initial=len(losses)))
    ends = [logs[first] if first > 0 else -math.inf, logs[end - 1] if end < len(logs) else math.inf]
    if end - first > 1:
        at = PchipInterpolator(logs[first:end], losses[first:end]).solve(level, extrapolate=False)
        ends[0] = max(at[at < logs[best]], default=ends[0])
        ends[1] = min(at[at > logs[best]], default=ends[1])
    factors = np.exp(np.abs(np.array(ends) - logs[best]))
    down, up = np.where(np.isfinite(factors), factors, math.nan).tolist()
    return down, up


def lowest_point(losses: Mapping[float, float]) -> float:
    """The lowest point of a parabola through losses over the logarithm of a value.

    Values within FITTED of the best count, unless they diverged: those would pull it away. Next to
    one that diverged, it is the best value itself.

    Args:
        losses: value → loss.

    Raises:
        ValueError: fewer than three values count, or there is no lowest point between them.
    """
    values = sorted(value for value in losses if value > 0)
    best = min(values, key=losses.__getitem__, default=0.0)
    near = [v for v in values if best / FITTED <= v <= best * FITTED]
    good = [v for v in near if losses[v] <= losses[best] + DIVERGED]
    at = near.index(best) if near else 0
    if len(near) >= 3 and not {*near[max(0, at - 1) : at + 2]} <= {*good}:
        return best
    if len(good) < 3:
        raise ValueError("a fit needs three values near it")
    logs = np.log(good)
    curvature, slope, _ = np.polyfit(logs, [losses[v] for v in good], 2)
    lowest = -slope / (2 * curvature) if curvature > 0 else math.inf
    if not logs[0] <= lowest <= logs[-1]:
        raise ValueError("the losses have no lowest point between its neighbours")
    return math.exp(lowest)
