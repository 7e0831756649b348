"""A figure of a report."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure, its data and its caption."""

    name: str
    figure: Figure
    table: pd.DataFrame
    caption: str
