"""The files that a curation reads, divided into shards: what one task reads and one file of the output holds."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.config.curate import CurateConfig
from orogen.config.files import write_atomically
from orogen.data.sources import walk

HTML = "orogen.html"  # the key of metadata that marks a text as HTML
COMPRESSIONS = ("", ".gz", ".zst")
SUFFIXES = tuple(
    f".{kind}{packed}" for kind in ("txt", "html", "htm", "jsonl", "warc", "wet") for packed in COMPRESSIONS
)
SUFFIXES += (".parquet",)


class Input(NamedTuple):
    """One file. source: its number in CurateConfig.sources. key: the source's name and the path below the source.

    kind: txt, html, jsonl, warc or parquet. size: bytes when the run began.
    """

    source: int
    key: str
    path: str
    kind: str
    size: int


class Inputs(NamedTuple):
    """All files by shard, and by source the number of files of kinds that are not read."""

    shards: list[list[Input]]
    skipped: dict[str, int]


def list_inputs(config: CurateConfig) -> Inputs:
    """The files of all sources in order, divided into shards of at most `shard_bytes`, or of one file.

    A shard has files of one source. Raises FileNotFoundError and ConfigError for a source without a file to read.
    """
    shards: list[list[Input]] = []
    skipped = {}
    for number, (name, path) in enumerate(config.sources):
        files, skipped[name] = list_files(path, name)
        left = 0
        for file in files:
            if not shards or shards[-1][0].source != number or file.size > left:
                shards.append([])
                left = config.shard_bytes
            shards[-1].append(file._replace(source=number))
            left -= file.size
    return Inputs(shards, skipped)


def list_files(path: str | Path, name: str) -> tuple[list[Input], int]:
    """The files of a source in the order of their paths, numbered 0 as a source, and the number of other entries.

    Raises FileNotFoundError if the path does not exist, ConfigError if nothing there can be read.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"{name}: {str(path)!r} does not exist; expected a file or a folder")
    found, others = walk(root)
    files = []
    for file in found:
        if kind := kind_of(file.name):
            below = file.name if file == root else file.relative_to(root).as_posix()
            files.append(Input(0, printable(f"{name}/{below}"), str(file), kind, file.stat().st_size))
    if not files:
        raise ConfigError(f"{name}: {str(path)!r} has no file to read; expected {', '.join(SUFFIXES)}")
    return files, len(found) - len(files) + len(others)


def kind_of(name: str) -> str | None:
    """How a file of this name is read; None if it is not."""
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)
    if suffix is None:
        return None
    kind = suffix.split(".")[1]
    return {"htm": "html", "wet": "warc"}.get(kind, kind)


def printable(name: str) -> str:
    """A name as UTF-8 can hold it: undecodable bytes of a file's name become escapes, as in `\\udcff`."""
    return name.encode("utf-8", "backslashreplace").decode()


def save_inputs(file: Path, inputs: Inputs, config_text: str) -> None:
    """Writes what a run reads, and the config it follows."""
    facts = {"config": config_text, "shards": inputs.shards, "skipped": inputs.skipped}
    write_atomically(file, json.dumps(facts, ensure_ascii=True).encode())


def load_inputs(file: Path) -> tuple[Inputs, str]:
    """What `save_inputs` wrote."""
    facts: dict[str, Any] = json.loads(file.read_bytes())
    shards = [[Input(*entry) for entry in shard] for shard in facts["shards"]]
    return Inputs(shards, facts["skipped"]), facts["config"]


def listed(paths: Sequence[str], name: str) -> Iterable[Input]:
    """The files of all these paths, in order. Raises as `list_files` does."""
    for path in paths:
        yield from list_files(path, name)[0]
