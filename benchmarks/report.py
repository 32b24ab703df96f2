"""How every benchmark reports: rows of one shape, as a table or as JSON.

Owns: the row, its aim and ratio, the table, the machine's description, the exit code. Must not: measure.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

EXIT_MISSED: Final = 1
"""Exit code of a benchmark with an aim that was missed; 2 means that it could not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measure. ``aim`` is the most that is wanted, or the least where ``higher_is_better``.

    ``note`` says how spread or sampled.
    """

    measure: str
    unit: str
    ours: float
    peer: str = ""
    peer_value: float | None = None
    aim: float | None = None
    higher_is_better: bool = False
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours by the peer's."""
        return self.ours / self.peer_value if self.peer_value else None

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None without one."""
        if self.aim is None:
            return None
        return self.ours >= self.aim if self.higher_is_better else self.ours <= self.aim

    @property
    def aim_text(self) -> str:
        return "" if self.aim is None else f"{'≥' if self.higher_is_better else '≤'} {self.aim:g}"


def _json(rows: Sequence[Row]) -> str:
    """The rows as a JSON list of objects; ``ratio`` and ``met`` are null where there is no peer or aim."""
    return json.dumps(
        [
            {
                "measure": row.measure,
                "unit": row.unit,
                "ours": row.ours,
                "peer": row.peer,
                "peer_value": row.peer_value,
                "ratio": row.ratio,
                "aim": row.aim_text,
                "met": row.met,
                "note": row.note,
            }
            for row in rows
        ],
        indent=2,
        ensure_ascii=False,
    )


def _table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table that is also readable as it stands."""
    heads = ("measure", "ours", "unit", "peer", "peer value", "ratio", "aim", "met", "note")
    lines = [heads, *(_cells(row) for row in rows)]
    used = [i for i in range(len(heads)) if any(line[i] for line in lines[1:]) or i < 3]
    widths = {i: max(len(line[i]) for line in lines) for i in used}
    texts = ["| " + " | ".join(line[i].ljust(widths[i]) for i in used) + " |" for line in lines]
    return "\n".join([texts[0], "|" + "|".join("-" * (widths[i] + 2) for i in used) + "|", *texts[1:]])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.measure,
        _number(row.ours),
        row.unit,
        row.peer,
        _number(row.peer_value),
        _number(row.ratio),
        row.aim_text,
        {True: "yes", False: "NO", None: ""}[row.met],
        row.note,
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"


def machine() -> str:
    """The machine in a line: a number without it says little."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")
        ]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{len(os.sched_getaffinity(0))} cores, {model}, Python {platform.python_version()}"


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def show(rows: Sequence[Row], *, as_json: bool) -> int:
    """Print the rows; returns the exit code: 0 where every aim is met."""
    if as_json:
        print(_json(rows))
    else:
        print(f"{_table(rows)}\n\nOn {machine()}.")
    return EXIT_MISSED if any(row.met is False for row in rows) else 0
