"""Tokenizes a corpus into a store, unit by unit, on any number of processes; see `store` for what it holds. Records
that are tokens already are taken as they are.

Each unit writes its shards, then `done/NUMBER.json`, which makes it count. A run that is killed leaves whole units and
temporary files; the next one goes on with the units that are missing, and gives the same bytes. The manifest comes
last. What cannot be used is left out, counted and named in `broken.jsonl`: a record that its reader refuses, a text
with NUL characters (binary data, or UTF-16), one that the tokenizer would change, and a file that is damaged, gone, or
another than when the store was begun.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.files import locked, write_atomically
from orogen.data import corpora
from orogen.data.indexed import MAX_TOKENS, IndexedWriter, dtype_for
from orogen.data.readers import Broken, Document, Part, Record, read_records
from orogen.data.sources import MANIFEST, PLAN, TOKENIZER
from orogen.data.store import DONE, SETTINGS, code_hash, is_store, shard, write_manifest
from orogen.data.tokenized import Tokens, text_ids
from orogen.data.tokenizer import Tokenizer
from orogen.data.units import Slice, plan_units, stamp, unit_size
from orogen.data.vocabulary import make_tokenizer

LOCK = "lock"
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**20, 1024  # tokenized together


class Job(NamedTuple):
    """What a worker needs beside the number of its unit. plan: the content of plan.json."""

    folder: Path
    plan: dict[str, Any]
    tokenizer: Tokenizer


def make_store(
    config: DataConfig,
    folder: Path,
    *,
    workers: int,
    progress: Callable[[dict[str, int], int, int], None] = lambda counts, done, units: None,
    unit_bytes: int | None = None,
) -> dict[str, Any]:
    """Writes the store of `config.corpus` in `folder`, or the rest of it. Returns its manifest.

    progress: called with the counts of each unit, the number of units that are done, and that of all. unit_bytes:
    about the size of a unit; None: `unit_size`. Raises ConfigError if the folder holds something else, or was begun
    with other settings or code; OSError if it cannot be written.
    """
    if config.sources:
        raise ConfigError("DataConfig.sources is set; expected DataConfig.corpus: a store holds one source")
    if config.corpus is not None and is_store(config.corpus):
        raise ConfigError(f"DataConfig.corpus is {config.corpus!r}, a store; expected texts, or other programs' tokens")
    _check_folder(folder)
    if not folder.exists():
        corpora.corpus_files(config)  # a refused corpus leaves no folder
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, LOCK):
        if not (folder / MANIFEST).exists():
            plan = _plan(config, folder, unit_bytes)
            _tokenize_units(Job(folder, plan, Tokenizer.load(folder / TOKENIZER)), workers, progress)
            write_manifest(folder, plan)
        else:
            _check_same(json.loads((folder / MANIFEST).read_text())["settings"], config, folder)
        shutil.rmtree(folder / DONE, ignore_errors=True)
        (folder / PLAN).unlink(missing_ok=True)
        return json.loads((folder / MANIFEST).read_text())


def _check_folder(folder: Path) -> None:
    """Raises ConfigError if the folder is a file, or holds something else than a store or the beginning of one."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is a file; expected a folder or a new name")
    if not folder.exists() or (folder / PLAN).exists() or (folder / MANIFEST).exists():
        return
    left = [p.name for p in folder.iterdir() if p.name not in (LOCK, TOKENIZER) and not p.name.endswith(".tmp")]
    if left:
        raise ConfigError(f"{str(folder)!r} holds {sorted(left)[0]!r}; expected a new folder or a store begun there")


def _plan(config: DataConfig, folder: Path, unit_bytes: int | None) -> dict[str, Any]:
    """The plan of a store that was begun, or a new one, with its tokenizer. plan.json is written last."""
    path = folder / PLAN
    if path.exists():
        plan = json.loads(path.read_text())
        _check_same(plan["settings"], config, folder)
        if plan["code"] != code_hash():
            raise ConfigError(f"{str(folder)!r} was begun by another version of this code; expected a new folder")
        return plan
    root, keys = corpora.corpus_files(config)
    stamps = [stamp(_path(root, key)) for key in keys]
    unit_bytes = unit_bytes or unit_size(sum(one[0] for one in stamps if one is not None))
    units = plan_units([(key, _path(root, key)) for key in keys], unit_bytes=unit_bytes)
    tokenizer = make_tokenizer(config, _train_texts(config, root, units))
    tokenizer.check_lossless()
    tokenizer.save(folder / TOKENIZER)
    plan = {
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "code": code_hash(),
        "root": str(root.resolve()),
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "stamps": dict(zip(keys, stamps, strict=True)),
        "units": units,
    }
    write_atomically(path, json.dumps(plan).encode())
    return plan


def _check_same(begun: dict[str, Any], config: DataConfig, folder: Path) -> None:
    for name, value in begun.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"DataConfig.{name} is {getattr(config, name)!r}; expected {value!r}, with which {str(folder)!r} was "
                "begun, or a new folder"
            )


def _path(root: Path, key: str) -> Path:
    return root if root.is_file() else root / key


def _train_texts(config: DataConfig, root: Path, units: list[list[Slice]]) -> Iterator[str]:
    """The texts of the train split that can be read, for a tokenizer to be trained on. Raises ConfigError for
    tokens."""
    for one in itertools.chain.from_iterable(units):
        for record in _records(root, one, config):
            if isinstance(record, Tokens):
                expected = f"expected the path of the tokenizer that made the tokens of {record.key}"
                raise ConfigError(f"DataConfig.tokenizer is {config.tokenizer!r}; {expected}")
            if isinstance(record, Document) and corpora.split_of(record.key, config=config) == "train":
                yield record.text


def _records(root: Path, one: Slice, config: DataConfig) -> Iterator[Record]:
    """The records of a slice; a file that cannot be opened or read is one that is broken."""
    path = _path(root, one.key)
    try:
        fields = {"form": one.form, "part": one.part, "record_dtype": config.record_dtype}
        for record in read_records(path, one.key, config.text_field, **fields):
            if isinstance(record, Document) and "\0" in record.text:
                record = Broken(record.key, f"{record.key} holds NUL characters; expected text")
            yield record
    except OSError as error:
        yield Broken(one.key, f"{path}: {error.strerror or error}; expected a file that can be read")


def _tokenize_units(job: Job, workers: int, progress: Callable[[dict[str, int], int, int], None]) -> None:
    done, total = job.folder / DONE, len(job.plan["units"])
    done.mkdir(exist_ok=True)
    for left in (*job.folder.glob("*.tmp"), *done.glob("*.tmp")):
        left.unlink()
    missing = [number for number in range(total) if not _marker(job.folder, number).exists()]
    progress({}, total - len(missing), total)
    if workers == 1 or len(missing) < 2:
        for count, number in enumerate(missing, 1):
            progress(_tokenize_unit(job, number), total - len(missing) + count, total)
        return
    with ProcessPoolExecutor(
        min(workers, len(missing)), multiprocessing.get_context("spawn"), initializer=_start
    ) as pool:
        futures = [pool.submit(_tokenize_number, job.folder, number) for number in missing]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                progress(future.result(), total - len(missing) + count, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start() -> None:
    """Prepares a worker: one thread, and an end with its parent, which may be killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@functools.cache  # once per worker
def _job(folder: Path) -> Job:
    return Job(folder, json.loads((folder / PLAN).read_text()), Tokenizer.load(folder / TOKENIZER))


def _tokenize_number(folder: Path, number: int) -> dict[str, int]:
    return _tokenize_unit(_job(folder), number)


def _marker(folder: Path, number: int) -> Path:
    return folder / DONE / f"{number:05}.json"


def _tokenize_unit(job: Job, number: int) -> dict[str, int]:
    """Writes the shards of a unit and its marker. Returns the counts of the unit."""
    folder, dtype = job.folder, dtype_for(job.plan["vocab_size"])
    config = DataConfig(**job.plan["settings"])
    counts, digest, broken = Counter(documents=0, bytes=0, tokens=0, empty=0), hashlib.sha256(), []
    with contextlib.ExitStack() as stack:
        writers: dict[str, IndexedWriter] = {}
        text_bytes: Counter[str] = Counter()

        def write(key: str, ids: np.ndarray, text: bytes) -> None:
            split = corpora.split_of(key, config=config)
            if split not in writers:
                writers[split] = stack.enter_context(IndexedWriter(shard(folder, split, number), dtype))
            # With eos, as Megatron ends documents: none is empty.
            writers[split].add(np.append(ids, job.tokenizer.eos_id))
            corpora.add_to_hash(digest, key, text)
            text_bytes[split] += len(text)
            counts.update(documents=1, bytes=len(text), tokens=len(ids), empty=int(not text))

        for batch in _batches(_unit_records(job, number, config)):
            for found in _tokenized(batch, job.tokenizer):
                if isinstance(found, Broken):
                    broken.append(found)
                else:
                    write(*found)
        shards = {split: {**writer.close(), "bytes": text_bytes[split]} for split, writer in sorted(writers.items())}
    counts["broken"] = len(broken)
    facts = {"shards": shards, "sha256": digest.hexdigest(), "counts": counts, "broken": broken}
    write_atomically(_marker(folder, number), json.dumps(facts).encode())
    return dict(counts)


def _tokenized(batch: list[Record], tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray, bytes] | Broken]:
    """The key, ids and text of each record, or why it has none."""
    texts = iter(tokenizer.encode_documents([record.text for record in batch if isinstance(record, Document)]))
    for record in batch:
        if isinstance(record, Broken):
            yield record
            continue
        try:
            if isinstance(record, Document):
                ids, text = next(texts), record.text.encode()
            else:
                ids = text_ids(record.ids_t, tokenizer=tokenizer)
                text = tokenizer.text_bytes(ids)
            if isinstance(ids, ConfigError):
                raise ids
            if len(ids) >= MAX_TOKENS:
                raise ConfigError(f"{len(ids)} tokens; expected fewer than {MAX_TOKENS}")
            yield record.key, ids, text
        except ConfigError as error:
            yield Broken(record.key, f"{record.key}: {error}")


def _unit_records(job: Job, number: int, config: DataConfig) -> Iterator[Record]:
    root = Path(job.plan["root"])
    for key, form, part in job.plan["units"][number]:
        path = _path(root, key)
        if (there := stamp(path)) is not None and there != job.plan["stamps"][key]:
            yield Broken(key, f"{path} has changed since the store was begun; expected the same file")
        else:
            yield from _records(root, Slice(key, form, part and Part(*part)), config)


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    held = 0
    for record in records:
        batch.append(record)
        held += len(record.text) if isinstance(record, Document) else 0 if isinstance(record, Broken) else record.size
        if held >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
