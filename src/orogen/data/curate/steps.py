"""The steps of the passes, as datatrove runs them: `run(data, rank, world_size)`, with one shard per rank.

A step that is run again, by a resumed run or by a second worker, writes the same files.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from orogen.config.curate import (
    C4Config,
    ClassifyConfig,
    CurateConfig,
    DecontaminateConfig,
    DedupConfig,
    ExtractConfig,
    GopherConfig,
    LanguageConfig,
)
from orogen.data.curate import contamination
from orogen.data.curate.inputs import HTML, load_inputs
from orogen.data.curate.minhash import signatures
from orogen.data.curate.read import Broken, read_input
from orogen.data.curate.rules import C4, Classify, Extract, Gopher, Language, Rule
from orogen.data.curate.store import DocumentWriter, read_records, write_arrays, write_json
from orogen.data.curate.tally import Tally
from orogen.data.curate.words import shingles
from orogen.data.curate.work import Work

# Here, because every worker imports this: datatrove's lines about its own progress would drown ours. What goes wrong is
# raised all the same.
logger.disable("datatrove")

BLOCK = 256  # documents whose signatures are computed together


def size_of(document: Document) -> int:
    """Bytes of the document's text in UTF-8."""
    return len(document.text.encode())


class Read(PipelineStep):
    """The documents of a shard; `broken` names what could not be read."""

    type, name = "curate", "read"

    def __init__(self, work: Work, config: CurateConfig):
        super().__init__()
        self.work, self.config = work, config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Ignores `data`: this is the first step."""
        self.tally, self.broken = Tally(self.config.examples), []
        inputs, _ = load_inputs(self.work.inputs)
        for file in inputs.shards[rank]:
            source = self.config.sources[file.source][0]
            for document in read_input(file, text_field=self.config.text_field, report=self.broken.append):
                self.tally.enter(size_of(document))
                self.tally.leave(size_of(document), source)
                html = {HTML: True} if document.metadata.pop(HTML, False) else {}
                document.metadata = {"source": source, "metadata": document.metadata, **html}
                yield document


class Judge(PipelineStep):
    """One stage that judges documents one at a time."""

    type = "curate"

    def __init__(self, rule: Rule, config: CurateConfig):
        super().__init__()
        self.rule, self.name, self.config = rule, rule.name, config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields the documents that stay."""
        self.tally = tally = Tally(self.config.examples)
        try:
            for document in data:
                before, text = size_of(document), document.text
                tally.enter(before)
                if reason := self.rule(document, tally):
                    tally.remove(reason, before, name=document.id, text=text)
                else:
                    tally.leave(size_of(document), document.metadata["source"])
                    yield document
        finally:
            self.rule.close()


class Keep(PipelineStep):
    """The end of the first pass: writes the documents that are left, their signatures, and what the steps counted."""

    type, name = "curate", "keep"

    def __init__(self, work: Work, config: CurateConfig, steps: Sequence[Any]):
        super().__init__()
        self.work, self.config, self.steps = work, config, steps

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Consumes all documents of the shard."""
        dedup = self.config.stage(DedupConfig)
        sketch = Sketch(dedup, [name for name, _ in self.config.sources]) if dedup else None
        with DocumentWriter(self.work.kept(rank)) as out:
            for document in data:
                document.metadata.pop(HTML, None)  # without the stage `extract`, the HTML itself is the text
                out.write({"text": document.text, "id": document.id, **document.metadata})
                if sketch:
                    sketch.add(document)
        if sketch:
            write_arrays(self.work.sketches(rank), **sketch.arrays())
        broken: list[Broken] = self.steps[0].broken
        tallies = {step.name: step.tally.facts() for step in self.steps}
        write_json(self.work.tally("read", rank), {"stages": tallies, "broken": broken})


class Sketch:
    """What deduplication needs of each document: its signature, the digest of its text, its source and its id."""

    def __init__(self, config: DedupConfig, sources: Sequence[str]):
        self._config, self._sources = config, list(sources)
        self._sets: list[Any] = []
        self._signatures = [signatures([], config)]
        self._digests: list[bytes] = []
        self._priority: list[int] = []
        self._ids: list[str] = []

    def add(self, document: Document) -> None:
        """Adds the next document of the shard."""
        self._sets.append(shingles(document.text, self._config.shingle))
        self._digests.append(hashlib.blake2b(document.text.encode(), digest_size=16).digest())
        self._priority.append(self._sources.index(document.metadata["source"]))
        self._ids.append(document.id)
        if len(self._sets) == BLOCK:
            self._sign()

    def arrays(self) -> dict[str, Any]:
        """One row per document: uint32 (n, k), 16 bytes (n,), int64 (n,), ids as UTF-8 with NUL between."""
        self._sign()
        return {
            "signatures": np.concatenate(self._signatures),
            "digests": np.array(self._digests, "S16"),
            "priority": np.array(self._priority, np.int64),
            "ids": np.frombuffer("\0".join(self._ids).encode(), np.uint8),
        }

    def _sign(self) -> None:
        self._signatures.append(signatures(self._sets, self._config))
        self._sets.clear()


class Train(PipelineStep):
    """Trains the quality classifier. A tenth of its documents is held out, by a hash of their names."""

    type, name = "curate", "train"

    def __init__(self, work: Work, config: ClassifyConfig, text_field: str):
        super().__init__()
        self.work, self.config, self.text_field = work, config, text_field

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Writes the weights, and how well they do."""
        from orogen.data.curate.training import train_classifier

        weights, facts = train_classifier(self.config, self.text_field)
        write_arrays(self.work.weights, weights=weights)
        write_json(self.work.tally("classifier", 0), facts)


class IndexNgrams(PipelineStep):
    """Lists the n-grams of the evaluation sets."""

    type, name = "curate", "index"

    def __init__(self, work: Work, config: DecontaminateConfig):
        super().__init__()
        self.work, self.config = work, config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Writes the n-grams."""
        from orogen.data.curate.training import evaluation_texts

        broken: list[Broken] = []
        ngrams = contamination.ngrams_of(evaluation_texts(self.config, broken.append), self.config)
        write_json(self.work.tally("evaluation", 0), {"ngrams": len(ngrams), "broken": broken})
        write_json(self.work.ngrams, ngrams)


class Write(PipelineStep):
    """The last pass over a shard: leaves duplicates out, cuts evaluation text out, and writes the output's file."""

    type, name = "curate", "write"

    def __init__(self, work: Work, config: CurateConfig):
        super().__init__()
        self.work, self.config = work, config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Writes the file and what the stages counted."""
        tallies: dict[str, Tally] = {}
        records: Iterable[dict[str, Any]] = read_records(self.work.kept(rank))
        if self.config.stage(DedupConfig):
            records = self._undoubled(records, rank, tallies.setdefault("dedup", Tally(self.config.examples)))
        stage = self.config.stage(DecontaminateConfig)
        if stage:
            tally = tallies.setdefault("decontaminate", Tally(self.config.examples))
            records = decontaminated(records, stage, contamination.Index(read_ngrams(self.work)), tally)
        final = tallies["write"] = Tally(0)
        with DocumentWriter(self.work.documents / f"{rank:06d}.jsonl.zst") as out:
            for record in records:
                size = len(record["text"].encode())
                final.enter(size)
                final.leave(size, record["source"])
                out.write(record)
        assert out.written is not None
        facts = {"stages": {name: tally.facts() for name, tally in tallies.items()}, "file": out.written._asdict()}
        write_json(self.work.tally("write", rank), facts)

    def _undoubled(self, records: Iterable[dict[str, Any]], rank: int, tally: Tally) -> Iterator[dict[str, Any]]:
        dropped = {row: (reason, kept) for row, reason, kept in json.loads(self.work.dropped(rank).read_bytes())}
        for row, record in enumerate(records):
            size = len(record["text"].encode())
            tally.enter(size)
            if row in dropped:
                reason, kept = dropped[row]
                text = f"kept: {kept}\n{record['text']}" if kept else record["text"]
                tally.remove(reason, size, name=record["id"], text=text)
            else:
                tally.leave(size, record["source"])
                yield record


def read_ngrams(work: Work) -> list[str]:
    """The n-grams that `IndexNgrams` wrote."""
    return json.loads(work.ngrams.read_bytes())


def decontaminated(
    records: Iterable[dict[str, Any]], config: DecontaminateConfig, index: contamination.Index, tally: Tally
) -> Iterator[dict[str, Any]]:
    """The records without evaluation text; pieces of a split one get `#0`, `#1`, … behind the id.

    What is cut out of documents that stay counts as removed bytes without a document.
    """
    for record in records:
        text = record["text"]
        size = len(text.encode())
        tally.enter(size)
        hits = index.hits(text)
        if not hits:
            tally.leave(size, record["source"])
            yield record
            continue
        pieces, splits = contamination.split(text, hits, config)
        where = text[max(hits[0].start - 50, 0) : hits[0].end + 50]
        if splits > config.max_splits:
            tally.remove(f"split more than {config.max_splits} times", size, name=record["id"], text=where)
            continue
        if not pieces:
            tally.remove("nothing left around a match", size, name=record["id"], text=where)
            continue
        tally.group("decontaminate", "documents split", size)
        for number, (start, end) in enumerate(pieces):
            tally.leave(len(text[start:end].encode()), record["source"])
            yield {**record, "text": text[start:end], "id": f"{record['id']}#{number}"}


def rules(work: Work, config: CurateConfig) -> list[Rule]:
    """The stages of the config that judge documents one at a time."""
    makers: dict[type, Any] = {
        ExtractConfig: Extract,
        LanguageConfig: Language,
        GopherConfig: Gopher,
        C4Config: C4,
        ClassifyConfig: lambda stage: Classify(stage, work.weights),
    }
    return [makers[type(stage)](stage) for stage in config.stages if type(stage) in makers]
