"""The table of a step's time as lines of text and as HTML."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

LEAST = 0.0005  # rows of less than this share of a step are put together
DEVICE = ("step_ms", "compute_ms", "exposed_ms", "waiting_ms", "hidden_ms", "idle_ms")

Grid = list[tuple[str, ...]]


def tables(table: Mapping[str, Any]) -> list[Grid]:
    """What `profile.step_table` gives, as three tables of text, each with its heads first: devices, computation and
    communication. Times are milliseconds per step."""
    devices = table["devices"]
    step = sum(times["step_ms"] for times in devices.values()) / len(devices)
    each = [(name, *(f"{times[field]:.2f}" for field in DEVICE)) for name, times in devices.items()]
    found: list[Grid] = [[("device", *(field.removesuffix("_ms") for field in DEVICE)), *each]]
    share = lambda ms: f"{ms / step if step else 0:.1%}"  # noqa: E731
    large = [row for row in table["compute"] if row["ms"] >= LEAST * step]
    rest = sum(row["ms"] for row in table["compute"]) - sum(row["ms"] for row in large)
    compute = [(row["kind"], row["part"], row["phase"], f"{row['ms']:.3f}", share(row["ms"])) for row in large]
    found.append([("compute", "part", "pass", "ms", "share"), *compute, ("rest", "", "", f"{rest:.3f}", share(rest))])
    sent: Grid = [("communication", "of", "part", "pass", "exposed", "waiting", "hidden", "count")]
    for row in table["communication"]:
        times = (f"{row[field]:.3f}" for field in ("exposed_ms", "waiting_ms", "hidden_ms"))
        sent.append((row["operation"], row["kind"], row["part"], row["phase"], *times, f"{row['count']:g}"))
    return found + ([sent] if table["communication"] else [])


def lines(table: Mapping[str, Any]) -> list[str]:
    """The tables as aligned lines, and the longest kernels outside all scopes."""
    found = [f"{table['steps']} steps; milliseconds per step"]
    for grid in tables(table):
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        numbers = _numbers(grid)
        found.append("")
        for row in grid:
            aligned = (
                text.rjust(width) if number else text.ljust(width)
                for text, width, number in zip(row, widths, numbers, strict=True)
            )  # fmt: skip
            found.append("  ".join(aligned).rstrip())
    if table["unknown"]:
        found += ["", "longest outside all scopes, on the first device:"]
    return found + [f"  {row['ms']:.3f}  {row['kernel']}" for row in table["unknown"]]


def section(table: Mapping[str, Any]) -> str:
    """The tables as a part of a page."""
    text = (
        f"Means over {table['steps']} steps, in milliseconds. A device computes, or it only communicates (exposed), or "
        "it is idle; communication beside computation is hidden. A collective waits until its last device has begun."
    )
    inside = "".join(table_html(grid) for grid in tables(table))
    return f"<section><h2>Where a step's time goes</h2>{inside}<figcaption>{html.escape(text)}</figcaption></section>"


def table_html(grid: Grid) -> str:
    """A table as a part of a page; the first row has the heads, and columns of numbers are aligned right."""
    numbers = ["number" if number else "" for number in _numbers(grid)]

    def cells(tag: str, row: Sequence[str]) -> str:
        pairs = zip(row, numbers, strict=True)
        return "".join(f'<{tag} class="{kind}">{html.escape(text)}</{tag}>' for text, kind in pairs)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in grid[1:])
    return f"<table><thead><tr>{cells('th', grid[0])}</tr></thead><tbody>{body}</tbody></table>"


def _numbers(grid: Grid) -> list[bool]:
    """Whether each column holds numbers."""
    return [all(re.match(r"-?\d", text) for text in column[1:] if text) for column in zip(*grid, strict=True)]
