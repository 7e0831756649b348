"""What a check of a card writes: a line of JSON per measured fact, and a table at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

PASSED, FAILED, UNFINISHED = "passed", "failed", "not finished"


@dataclass(frozen=True)
class Limit:
    """What a value is compared with: `value sign limit`, where the sign is ≤ or ≥."""

    sign: str
    value: float

    def allows(self, value: float) -> bool:
        """Whether the value is within the limit; NaN never is."""
        return value <= self.value if self.sign == "≤" else value >= self.value

    def __str__(self) -> str:
        return f"{self.sign} {self.value:g}"


def at_most(value: float) -> Limit:
    return Limit("≤", value)


def at_least(value: float) -> Limit:
    return Limit("≥", value)


class Results:
    """The facts of a check; each is on disk before the next one is measured.

    Args:
        path: the file of JSON lines; it is written anew. None: nothing is written.
        echo: prints a line.
    """

    def __init__(self, path: Path | None, echo: Callable[[str], Any] = lambda line: None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._echo, self._started = echo, time.monotonic()
        self._file: TextIO | None = None
        self.section = self.item = ""  # that are measured now
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")

    def fact(
        self, what: str, value: Any, unit: str = "", limit: Limit | None = None, **more: Any
    ) -> None:
        """A measured fact. With a limit it is a check; a number that isn't finite fails it."""
        status = ""
        if limit is not None:
            good = isinstance(value, int | float) and math.isfinite(value) and limit.allows(value)
            status = PASSED if good else FAILED
        self._write(what, status, value=value, unit=unit, limit=str(limit or ""), **more)

    def failed(self, what: str, reason: str) -> None:
        """A check that could not be made, and why, in one line."""
        self._write(what, FAILED, reason=" ".join(reason.split())[:300])

    def unfinished(self, what: str) -> None:
        """A check that its section had no time for."""
        self._write(what, UNFINISHED)

    def value(self, section: str, what: str) -> float | None:
        """An earlier fact, the last of its name; None if it was not measured."""
        found = [r for r in self.rows if (r["section"], r["what"]) == (section, what)]
        return found[-1].get("value") if found else None

    def _write(self, what: str, status: str, **more: Any) -> None:
        after = round(time.monotonic() - self._started, 1)
        row = {"section": self.section, "what": what, "status": status, **more, "after_s": after}
        self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            self._file.flush()
        self._echo(line_of(row))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def line_of(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    value = row.get("value", row.get("reason", ""))
    shown = f"{value:.4g}" if isinstance(value, float) else f"{value}"
    parts = [f"{row['section']}: {row['what']}: {shown} {row.get('unit', '')}".rstrip()]
    if row["status"]:
        limit = row.get("limit", "")
        parts.append(f"{limit}: {row['status']}" if limit else row["status"])
    return ", ".join(parts)


def table(rows: list[dict[str, Any]], seconds: dict[str, float]) -> list[str]:
    """Per section: checks passed, failed and not finished, and seconds; then what did not pass."""
    head = f"{'section':<12}{'passed':>8}{'failed':>8}{'not finished':>14}{'facts':>7}{'s':>7}"
    lines = [head, "-" * len(head)]
    for section, spent in seconds.items():
        own = [row["status"] for row in rows if row["section"] == section]
        counts = [own.count(status) for status in (PASSED, FAILED, UNFINISHED)]
        lines.append(
            f"{section:<12}{counts[0]:>8}{counts[1]:>8}{counts[2]:>14}{len(own):>7}{spent:>7.0f}"
        )
    return lines + [f"! {line_of(row)}" for row in rows if row["status"] in (FAILED, UNFINISHED)]


def all_passed(rows: list[dict[str, Any]]) -> bool:
    """Whether facts were measured, and no check failed or was left out."""
    return bool(rows) and not {row["status"] for row in rows} & {FAILED, UNFINISHED}
