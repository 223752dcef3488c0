"""`orogen curate`: documents in, fewer and better documents out, and a report of what went.

    sources ─ read ─ extract ─ language ─ gopher ─ c4 ─ classify ─ keep      pass `filter`, one task per shard
    signatures ─ gather, match (one task per band), choose                    deduplication, over all documents
    kept ─ without duplicates ─ decontaminate ─ documents/                    pass `write`, one task per shard

A gin file names the stages (`config/curate.py`); the order is fixed. A shard is a run of input files of one source
(`inputs.py`), so that shards, their order and every choice follow from the inputs and the config: any number of workers
gives the same bytes. An input file is never divided: a file larger than `shard_bytes` is one task.

**datatrove** carries the documents, runs the tasks (`execute.py`: processes, SLURM, Ray), holds extractors in a process
of their own, and has the rules of Gopher and C4. Ours are:
- readers (`read.py`): datatrove's skip broken records without a count, lose the rest of a file behind a byte that is
  not UTF-8, and end on a truncated one. Its reader of WARC takes pages of any HTTP status and the whole part of a
  damaged gzip body, refuses brotli, ignores the stated character set, and passes over texts of a WET that libmagic
  takes for code;
- deduplication (`words.py`, `minhash.py`, `duplicates.py`, `match.py`): datatrove's hashes shingle by shingle, compares
  signatures in Python, neither verifies candidates nor knows the priority of sources, and is slower
  (`experiments/curation`);
- decontamination (`contamination.py`): datatrove's drops whole documents, and indexes evaluation sets that lighteval
  downloads;
- language identification by py3langid, whose model is in the package: datatrove downloads fastText's;
- the quality classifier (`classifier.py`).

**Stops.** Every task writes its files under temporary names and renames them when they are whole; a second call goes on
with the tasks that did not complete. `documents/` appears when all of its files are whole, `manifest.json` (counts and
SHA-256 of every file) last. A config other than that of the folder is refused. One run at a time holds the folder. With
SLURM, a call submits all passes; one after the last job prints the report and removes what only the passes needed.

**Broken input** is never fatal and never silent: every record or file that cannot be read is in `broken.jsonl` with its
reason, and counted in the report.

What a run needs: disk for the documents that pass the first stages, once more compressed; memory for the largest
document of each worker, and in `match` and `choose` for 8 bytes per document and 16 per pair. `Gather` copies the
signatures, 1 kB per document, into one file that is mapped, not loaded.
"""
