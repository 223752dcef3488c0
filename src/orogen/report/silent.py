"""The stand-in for the writer of metrics on the processes of a run that do not write them."""

from collections.abc import Mapping
from typing import Any, Self


class SilentWriter:
    """Stands for the `MetricsWriter` of another process, whose last record was `last`, and writes nothing."""

    def __init__(self, last: dict[str, Any] | None):
        self.last = last

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Remembers that the step was written elsewhere."""
        self.last = dict(metrics)

    def amend(self, metrics: Mapping[str, Any]) -> None:
        """Remembers that the last record was completed elsewhere."""
        self.last = {**(self.last or {}), **metrics}

    def rewind(self, step: int) -> None:
        """Forgets the last record: the file lost those after `step`."""
        self.last = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """There is nothing to close."""
