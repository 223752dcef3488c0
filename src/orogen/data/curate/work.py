"""Where a curation keeps what its passes hand on: the folder `.work` of its output, gone when the run is whole."""

from pathlib import Path
from typing import NamedTuple

WORK = ".work"
DOCUMENTS = "documents"
MANIFEST = "manifest.json"  # written last
REPORT = "report.json"
BROKEN = "broken.jsonl"
CONFIG = "config.gin"


class Work(NamedTuple):
    """The paths of a run with the output folder `out`."""

    out: Path

    @property
    def folder(self) -> Path:
        """All of it."""
        return self.out / WORK

    @property
    def inputs(self) -> Path:
        """The files to read, by shard, and the config."""
        return self.folder / "inputs.json"

    @property
    def weights(self) -> Path:
        """The trained classifier."""
        return self.folder / "classifier.npz"

    @property
    def ngrams(self) -> Path:
        """The n-grams of the evaluation sets."""
        return self.folder / "ngrams.json"

    @property
    def signatures(self) -> Path:
        """The signatures of all documents, one row each."""
        return self.folder / "signatures.npy"

    @property
    def documents(self) -> Path:
        """The output's documents, until all are written."""
        return self.folder / DOCUMENTS

    def tally(self, part: str, shard: int) -> Path:
        """What the stages of one pass counted in a shard."""
        return self.folder / "tallies" / part / f"{shard:06d}.json"

    def kept(self, shard: int) -> Path:
        """The documents that passed the stages which judge one at a time."""
        return self.folder / "kept" / f"{shard:06d}.jsonl.zst"

    def sketches(self, shard: int) -> Path:
        """The signatures, digests, sources and ids of those."""
        return self.folder / "sketches" / f"{shard:06d}.npz"

    def pairs(self, band: int) -> Path:
        """The duplicates that a band found."""
        return self.folder / "pairs" / f"{band:04d}.npz"

    def dropped(self, shard: int) -> Path:
        """The shard's documents that are duplicates of others."""
        return self.folder / "dropped" / f"{shard:06d}.json"

    def logs(self, part: str) -> Path:
        """datatrove's own records of a pass, among them which tasks are complete."""
        return self.folder / "logs" / part
