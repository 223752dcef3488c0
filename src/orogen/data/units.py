"""A corpus in units: the parts of it that are tokenized one by one, on any number of workers.

Small files are grouped; a large plain .jsonl is divided between lines, a large Parquet file between row groups, an
ArrayRecord or an index of Megatron's between records. A unit depends on the files alone, so neither the number of
workers nor a kill changes what is written.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from orogen.data.readers import Part, form_of
from orogen.data.tokenized import record_count

# A corpus has about UNITS units, if they are of these sizes in bytes: small enough that workers end together and a kill
# costs minutes at most, large enough that a terabyte is not a million files.
UNITS, LEAST_BYTES, MOST_BYTES = 1024, 2**22, 2**28
SCAN_BYTES = 2**20


class Slice(NamedTuple):
    """A file of the corpus, or a part of it."""

    key: str
    form: str
    part: Part | None


def unit_size(total: int) -> int:
    """The size of a unit of a corpus of `total` bytes."""
    return min(max(total // UNITS, LEAST_BYTES), MOST_BYTES)


def plan_units(paths: Sequence[tuple[str, Path]], *, unit_bytes: int) -> list[list[Slice]]:
    """The units of the files, given by key and path, in order. A file that cannot be read stays whole: its unit says
    why."""
    units: list[list[Slice]] = [[]]
    held = 0
    for key, path in paths:
        form, packing = form_of(path.name) or (".txt", "")
        size = (stamp(path) or (0, 0))[0]
        parts: Sequence[Part | None] = [None]
        if size > unit_bytes and not packing:
            parts = _parts(path, form, unit_bytes) or [None]
        for part in parts:
            if units[-1] and held + size // len(parts) > unit_bytes:
                units.append([])
                held = 0
            units[-1].append(Slice(key, form, part))
            held += size // len(parts)
    return units if units[-1] else units[:-1]


def _parts(path: Path, form: str, unit_bytes: int) -> list[Part]:
    """The parts of a large file; none if it has to be read from beginning to end, or cannot be read."""
    divide = _DIVIDERS.get(form)
    try:
        return [] if divide is None else list(divide(path, unit_bytes))
    except (OSError, ValueError):  # pyarrow's own errors are ValueErrors and OSErrors
        return []


def _between_lines(path: Path, unit_bytes: int) -> Iterator[Part]:
    """Parts of at least `unit_bytes`, each from the start of a line."""
    start = before = lines = place = 0
    with path.open("rb") as file:
        while block := file.read(SCAN_BYTES):
            while place + len(block) >= start + unit_bytes:
                # The first line that begins at or after the wanted end.
                at = block.find(b"\n", max(start + unit_bytes - 1 - place, 0)) + 1
                if not at:
                    break
                lines += block.count(b"\n", 0, at)
                yield Part(start, place + at, before)
                start, before = place + at, lines
                block, place = block[at:], place + at
            lines += block.count(b"\n")
            place += len(block)
    if place > start:
        yield Part(start, place, before)


def _between_groups(path: Path, unit_bytes: int) -> Iterator[Part]:
    """Runs of row groups of at least `unit_bytes`."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    start = before = held = 0
    for number, group in enumerate(groups):
        held += group.total_byte_size
        if held >= unit_bytes or number == len(groups) - 1:
            yield Part(start, number + 1, before)
            before += sum(one.num_rows for one in groups[start : number + 1])
            start, held = number + 1, 0


def _between_records(path: Path, unit_bytes: int) -> Iterator[Part]:
    """About equal numbers of records, `unit_bytes` on average."""
    count = record_count(path)
    parts = max(1, min(-(-(stamp(path) or (0, 0))[0] // unit_bytes), count))
    edges = [count * number // parts for number in range(parts + 1)]
    yield from (Part(start, stop, start) for start, stop in itertools.pairwise(edges))


_DIVIDERS = {
    ".jsonl": _between_lines,
    ".parquet": _between_groups,
    ".array_record": _between_records,
    ".idx": _between_records,
}


def stamp(path: Path) -> list[int] | None:
    """The size and the time of the last change of a file, an .idx together with its .bin; None if it is gone: whether
    it is the file that was there."""
    try:
        found = [os.stat(one) for one in ((path, path.with_suffix(".bin")) if path.suffix == ".idx" else (path,))]
    except FileNotFoundError:
        return None
    return [sum(one.st_size for one in found), max(one.st_mtime_ns for one in found)]
