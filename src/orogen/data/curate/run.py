"""A curation from its config to a whole output folder: `documents/`, `report.json`, `broken.jsonl`, `manifest.json`.

`documents` gets its name when all of its files are written, the manifest when everything else is there. A run that was
stopped goes on where it was: tasks that completed are not run again.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from orogen.config.checks import ConfigError
from orogen.config.curate import ClassifyConfig, CurateConfig, DecontaminateConfig, DedupConfig
from orogen.config.files import is_unfinished, remove_unfinished, write_atomically
from orogen.data.curate.execute import Pass, Resources, execute
from orogen.data.curate.inputs import list_inputs, listed, load_inputs, save_inputs
from orogen.data.curate.match import Choose, Gather, Match
from orogen.data.curate.read import Broken
from orogen.data.curate.steps import IndexNgrams, Judge, Keep, Read, Train, Write, rules
from orogen.data.curate.store import write_json, write_lines
from orogen.data.curate.tally import merged
from orogen.data.curate.work import BROKEN, CONFIG, DOCUMENTS, MANIFEST, REPORT, WORK, Work

VERSION = 1  # of the output folder
Show = Callable[[Path, dict[str, Any]], None]


def prepare(config: CurateConfig, text: str, out: Path) -> Work:
    """The folder of a new run, or of one that was stopped, with its list of inputs.

    Raises ConfigError if `out` holds anything else, or a run with another config; errors of `list_files` for every
    path of the config that a new run cannot read.
    """
    work = Work(out)
    manifest, config_file = out / MANIFEST, out / CONFIG
    if work.inputs.is_file() or manifest.is_file():
        before = load_inputs(work.inputs)[1] if work.inputs.is_file() else config_file.read_text()
        if before != text:
            raise ConfigError(
                f"{str(out)!r} holds a curation with another config; expected the same, or another folder"
            )
        return work
    if out.exists() and not (out.is_dir() and all(_is_begun(entry.name) for entry in out.iterdir())):
        raise ConfigError(f"{str(out)!r} is not an empty folder, nor one of `orogen curate`; expected one of them")
    inputs = list_inputs(config)
    for kind, paths in _further_paths(config):
        list(listed(paths, kind))
    work.folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(out)
    write_atomically(config_file, text.encode())
    save_inputs(work.inputs, inputs, text)
    return work


def _is_begun(name: str) -> bool:
    """Whether a kill between the first files of a run leaves a file of this name, or one within the first file."""
    return name in (CONFIG, WORK) or (name.startswith(f"{CONFIG}.") and is_unfinished(name))


def curate(config: CurateConfig, work: Work, resources: Resources, show: Show) -> str | None:
    """Runs all passes. show: makes the page of the report from its facts. Returns what `execute` returns."""
    return execute(passes(config, work, show), work, resources)


def is_whole(out: Path) -> bool:
    """Whether the folder holds a run that ended."""
    return (out / MANIFEST).is_file()


def passes(config: CurateConfig, work: Work, show: Show) -> list[Pass]:
    """The passes of a run, as far as its stages need them."""
    shards = len(load_inputs(work.inputs)[0].shards)
    classify, dedup = config.stage(ClassifyConfig), config.stage(DedupConfig)
    decontaminate = config.stage(DecontaminateConfig)
    found = []
    if classify:
        found.append(Pass("train", [Train(work, classify, config.text_field)], 1))
    if decontaminate:
        found.append(Pass("index", [IndexNgrams(work, decontaminate)], 1))
    steps = [Read(work, config), *(Judge(rule, config) for rule in rules(work, config))]
    found.append(Pass("filter", [*steps, Keep(work, config, steps)], shards))
    if dedup:
        found.append(Pass("gather", [Gather(work, dedup)], 1))
        found.append(Pass("match", [Match(work, dedup)], dedup.bands + 1))
        found.append(Pass("choose", [Choose(work, config, dedup)], 1))
    found.append(Pass("write", [Write(work, config)], shards))
    found.append(Pass("finish", [Finish(work, config, show)], 1))
    return found


def _further_paths(config: CurateConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    if classify := config.stage(ClassifyConfig):
        yield "ClassifyConfig.good", classify.good
        yield "ClassifyConfig.bad", classify.bad
    if decontaminate := config.stage(DecontaminateConfig):
        yield "DecontaminateConfig.evaluation", decontaminate.evaluation


class Finish(PipelineStep):
    """Joins what all tasks counted, and names the output."""

    type, name = "curate", "finish"

    def __init__(self, work: Work, config: CurateConfig, show: Show):
        super().__init__()
        self.work, self.config, self.show = work, config, show

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Writes report, list of broken records, documents and, last, the manifest."""
        out = self.work.out
        inputs, text = load_inputs(self.work.inputs)
        shards = range(len(inputs.shards))
        first = [_load(self.work.tally("read", shard)) for shard in shards]
        last = [_load(self.work.tally("write", shard)) for shard in shards]
        others = {name: self._facts(name) for name in ("classifier", "evaluation", "dedup")}
        broken = [entry for facts in (*others.values(), *first) if facts for entry in facts.pop("broken", [])]
        facts = {
            "sources": [name for name, _ in self.config.sources],
            "files": sum(map(len, inputs.shards)),
            "skipped_files": inputs.skipped,
            "broken": {
                "records": len(broken),
                "reasons": dict(sorted(Counter(why for _, _, why, _ in broken).items())),
            },
            "stages": self._stages(first) | self._stages(last),
            **{name: found for name, found in others.items() if found},
        }
        write_lines(out / BROKEN, [Broken(*entry)._asdict() for entry in broken])
        write_json(out / REPORT, facts)
        self.show(out, facts)
        if self.work.documents.is_dir():  # else a run that was stopped just here has moved them
            remove_unfinished(self.work.documents)
            self.work.documents.replace(out / DOCUMENTS)
        manifest = {
            "version": VERSION,
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "files": [entry["file"] for entry in last],
        }
        write_json(out / MANIFEST, manifest)

    def _facts(self, name: str) -> dict[str, Any] | None:
        file = self.work.tally(name, 0)
        return _load(file) if file.is_file() else None

    def _stages(self, tallies: list[dict[str, Any]]) -> dict[str, Any]:
        names = tallies[0]["stages"]
        return {name: merged((t["stages"][name] for t in tallies), self.config.examples) for name in names}


def tidy(out: Path) -> None:
    """Removes what only the passes of a whole run needed."""
    work = Work(out).folder
    if is_whole(out) and work.is_dir():
        remove_unfinished(out)
        shutil.rmtree(work)


def _load(file: Path) -> Any:
    return json.loads(file.read_bytes())
