"""The passes over all documents at once: signatures into one file, pairs band by band, and which documents go.

A pass holds in memory one key per document and the pairs; signatures are mapped from the file.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep

from orogen.config.curate import CurateConfig, DedupConfig
from orogen.data.curate.duplicates import BINS, band_pairs, exact_pairs, kept_documents
from orogen.data.curate.inputs import load_inputs
from orogen.data.curate.minhash import candidate_probability, planted_rates
from orogen.data.curate.store import write_arrays, write_json
from orogen.data.curate.work import Work

CURVE = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
PLANTED = 400  # pairs per point of the curve: a standard deviation of at most 2.5 points


class Gather(PipelineStep):
    """Joins the signatures of all shards into one file of rows."""

    type, name = "curate", "gather"

    def __init__(self, work: Work, config: DedupConfig):
        super().__init__()
        self.work, self.config = work, config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Writes the signatures."""
        shards = range(len(load_inputs(self.work.inputs)[0].shards))
        counts = [len(self._sketch(shard)["priority"]) for shard in shards]
        temporary = self.work.signatures.with_suffix(".tmp.npy")
        shape = (sum(counts), self.config.bands * self.config.rows)
        if not shape[0]:
            np.save(temporary, np.empty(shape, np.uint32))
        else:
            rows_nk = np.lib.format.open_memmap(temporary, "w+", np.uint32, shape)
            start = 0
            for shard, count in zip(shards, counts, strict=True):
                rows_nk[start : start + count] = self._sketch(shard)["signatures"]
                start += count
            rows_nk.flush()
        temporary.replace(self.work.signatures)

    def _sketch(self, shard: int) -> Any:
        return load_arrays(self.work.sketches(shard))


class Match(PipelineStep):
    """Duplicates: exact ones by rank 0, those of band b by rank b + 1."""

    type, name = "curate", "match"

    def __init__(self, work: Work, config: DedupConfig):
        super().__init__()
        self.work, self.config = work, config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Writes the pairs, and for a band the histogram of its candidates."""
        if rank == 0:
            shards = range(len(load_inputs(self.work.inputs)[0].shards))
            digests_n = np.concatenate([load_arrays(self.work.sketches(shard))["digests"] for shard in shards])
            write_arrays(self.work.pairs(0), pairs=exact_pairs(digests_n))
            return
        signatures_nk = np.load(self.work.signatures, mmap_mode="r")
        found = band_pairs(signatures_nk, rank - 1, self.config)
        extra = {"histogram": found.histogram, "large_buckets": found.large_buckets}
        write_arrays(self.work.pairs(rank), pairs=found.pairs_e2, **extra)


class Choose(PipelineStep):
    """Joins all pairs into components, and lists by shard which documents are left out, and why."""

    type, name = "curate", "choose"

    def __init__(self, work: Work, config: CurateConfig, dedup: DedupConfig):
        super().__init__()
        self.work, self.config, self.dedup = work, config, dedup

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Writes the lists, and what the report says of deduplication.

        A document is an exact duplicate if a better one of its component has the same text, a fuzzy one otherwise.
        """
        shards = range(len(load_inputs(self.work.inputs)[0].shards))
        priorities = [load_arrays(self.work.sketches(shard))["priority"] for shard in shards]
        priority_n = np.concatenate(priorities)
        exact = load_arrays(self.work.pairs(0))["pairs"]
        bands = [load_arrays(self.work.pairs(band + 1)) for band in range(self.dedup.bands)]
        kept_n = kept_documents(np.concatenate([exact, *(band["pairs"] for band in bands)]), priority_n)
        exact_n = exact_copies(exact, priority_n)
        starts = np.cumsum([0, *map(len, priorities)])
        names = Names(self.work, starts)
        for shard in shards:
            self._list(shard, int(starts[shard]), kept_n[starts[shard] : starts[shard + 1]], exact_n, names)
        components_n = np.bincount(kept_n, minlength=len(kept_n))
        write_json(self.work.tally("dedup", 0), self._facts(bands, components_n))

    def _list(self, shard: int, start: int, kept_n: Any, exact_n: Any, names: "Names") -> None:
        dropped, shown = [], defaultdict(int)
        for row in np.flatnonzero(kept_n != start + np.arange(len(kept_n))).tolist():
            reason = "exact duplicate" if exact_n[start + row] else "fuzzy duplicate"
            shown[reason] += 1
            kept = names[int(kept_n[row])] if shown[reason] <= self.config.examples else None
            dropped.append((row, reason, kept))
        write_json(self.work.dropped(shard), dropped)

    def _facts(self, bands: list[Any], components_n: Any) -> dict[str, Any]:
        histogram = np.sum([band["histogram"] for band in bands], 0)
        rates = planted_rates(CURVE, self.dedup, pairs=PLANTED)
        expected = candidate_probability(np.array(CURVE), self.dedup)
        return {
            "curve": [
                {"jaccard": j, "expected": float(e), "measured": r}
                for j, e, r in zip(CURVE, expected, rates, strict=True)
            ],
            "pairs_per_point": PLANTED,
            "candidates": {f"{i / BINS:.2f}": int(count) for i, count in enumerate(histogram)},
            "large_buckets": int(sum(band["large_buckets"] for band in bands)),
            "components": int((components_n > 1).sum()),
            "largest_component": int(components_n.max(initial=0)),
            "bands": self.dedup.bands,
            "rows": self.dedup.rows,
            "jaccard": self.dedup.jaccard,
        }


class Names:
    """The ids of documents by their numbers; the last shard asked for stays loaded."""

    def __init__(self, work: Work, starts: Any):
        self._work, self._starts = work, starts
        self._shard, self._ids = -1, [""]

    def __getitem__(self, number: int) -> str:
        shard = int(np.searchsorted(self._starts, number, "right")) - 1
        if shard != self._shard:
            self._shard = shard
            self._ids = load_arrays(self._work.sketches(shard))["ids"].tobytes().decode().split("\0")
        return self._ids[number - int(self._starts[shard])]


def exact_copies(pairs_e2: Any, priority_n: Any) -> Any:
    """By document, whether a better one, by priority and then by number, has the same text: bool (n,)."""
    n = len(priority_n)
    kept_n = kept_documents(pairs_e2, priority_n)
    return kept_n != np.arange(n)


def load_arrays(path: Path) -> Any:
    """The arrays that `write_arrays` wrote, each read when it is asked for."""
    return np.load(path, allow_pickle=False)
