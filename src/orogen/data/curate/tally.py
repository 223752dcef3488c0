"""What one stage saw: documents and bytes that entered, left and were removed, by reason, with examples."""

import collections
from collections.abc import Iterable
from typing import Any

SHOWN = 300  # characters of an example


class Tally:
    """Counts of one stage, over one shard or, after `merged`, over all. Bytes are those of the text in UTF-8.

    examples: how many removed documents are kept for each reason; the first ones in the order of the documents.
    """

    def __init__(self, examples: int):
        self._examples = examples
        self.entered = [0, 0]
        self.left = [0, 0]
        self.removed: dict[str, dict[str, Any]] = {}
        self.lengths: dict[str, int] = collections.Counter()  # documents that left, by the bits of their lengths
        self.groups: dict[str, dict[str, list[int]]] = {}

    def enter(self, size: int) -> None:
        """Counts a document of so many bytes."""
        _add(self.entered, size)

    def leave(self, size: int, source: str) -> None:
        """Counts a document that goes on, as it then is."""
        _add(self.left, size)
        self.lengths[str(size.bit_length())] += 1
        self.group("source", source, size)

    def remove(self, reason: str, size: int, *, name: str, text: str) -> None:
        """Counts a document that was removed. name, text: shown if it is among the first examples."""
        found = self.removed.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
        found["documents"] += 1
        found["bytes"] += size
        if len(found["examples"]) < self._examples:
            found["examples"].append({"id": name, "text": text[:SHOWN]})

    def group(self, kind: str, value: str, size: int) -> None:
        """Counts a document in a group, such as ("language", "en")."""
        _add(self.groups.setdefault(kind, {}).setdefault(value, [0, 0]), size)

    def facts(self) -> dict[str, Any]:
        """The counts as JSON; all names sorted."""
        return {
            "entered": _count(self.entered),
            "left": _count(self.left),
            "removed": dict(sorted(self.removed.items())),
            "lengths": dict(sorted(self.lengths.items(), key=lambda item: int(item[0]))),
            "groups": {
                kind: {value: _count(count) for value, count in sorted(values.items())}
                for kind, values in sorted(self.groups.items())
            },
        }


def merged(all_facts: Iterable[dict[str, Any]], examples: int) -> dict[str, Any]:
    """The facts of several tallies as those of one, in the order given."""
    total = Tally(examples)
    for facts in all_facts:
        for pair, key in ((total.entered, "entered"), (total.left, "left")):
            _add(pair, facts[key]["bytes"], facts[key]["documents"])
        for reason, found in facts["removed"].items():
            known = total.removed.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
            known["documents"] += found["documents"]
            known["bytes"] += found["bytes"]
            known["examples"] = (known["examples"] + found["examples"])[:examples]
        for bits, count in facts["lengths"].items():
            total.lengths[bits] += count
        for kind, values in facts["groups"].items():
            for value, found in values.items():
                pair = total.groups.setdefault(kind, {}).setdefault(value, [0, 0])
                _add(pair, found["bytes"], found["documents"])
    return total.facts()


def _add(pair: list[int], size: int, documents: int = 1) -> None:
    pair[0] += documents
    pair[1] += size


def _count(pair: list[int]) -> dict[str, int]:
    return {"documents": pair[0], "bytes": pair[1]}
