"""Measures tokenizing against the tokenizers library, and training from a store. See README.md.

python experiments/corpora/run.py tokenize | store DIR [--gb N] | loader DIR | train DIR [--steps N]
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from orogen.config.data import DataConfig
from orogen.data import corpora, indexed, store
from orogen.data.indexed import IndexedWriter, dtype_for
from orogen.data.make_store import make_store
from orogen.data.tokenizer import Tokenizer
from orogen.data.vocabulary import train_bpe

RESULTS = Path(__file__).parent / "results.jsonl"
MEGABYTES = 10  # of text that is tokenized
VOCAB_SIZE, TURNS = 4096, 2
SHARD_TOKENS = 250_000_000  # 0.5 GB of uint16
SEQUENCE_LENGTH, BATCH_SIZE = 8192, 8


def record(**facts):
    line = json.dumps(facts)
    print(line)
    with RESULTS.open("a") as file:
        file.write(line + "\n")


def texts():
    """The standard library's files, again and again, up to MEGABYTES."""
    documents, size = [document.text for document in corpora.stdlib_documents()], 0
    for number in range(10**6):
        text = documents[number % len(documents)]
        size += len(text)
        yield text
        if size > MEGABYTES * 1e6:
            return


def cpu_seconds():
    """Processor time of this process with its threads, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def rates(size, began, cpu):
    """Megabytes per second since `began`, and per processor second since `cpu`."""
    seconds, used = time.perf_counter() - began, cpu_seconds() - cpu
    return {"megabytes_per_second": size / seconds / 1e6, "megabytes_per_cpu_second": size / used / 1e6}


def tokenize():
    """Alternates the library's own batches, on all cores, with `orogen tokenize` on as many processes."""
    with tempfile.TemporaryDirectory() as name:
        folder, everything = Path(name), list(texts())
        train_bpe([document.text for document in corpora.stdlib_documents()], vocab_size=VOCAB_SIZE).save(folder / "t")
        (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in everything))
        tokenizer = Tokenizer.load(folder / "t")
        config = DataConfig(
            corpus=str(folder / "x.jsonl"), tokenizer=str(folder / "t"), heldout_fraction=0.0, tuning_fraction=0.0
        )
        size = sum(len(text.encode()) for text in everything)
        cores = os.cpu_count() or 1
        for turn in range(TURNS):
            for name, method in (("encode_batch", "encode_batch"), ("encode_batch_fast", "encode_batch_fast")):
                began, cpu, count = time.perf_counter(), cpu_seconds(), 0
                for start in range(0, len(everything), 1000):
                    batch = getattr(tokenizer._backend, method)(
                        everything[start : start + 1000], add_special_tokens=False
                    )
                    count += sum(len(one.ids) for one in batch)
                record(what="tokenize", by=name, turn=turn, cores=cores, **rates(size, began, cpu))
            began, cpu = time.perf_counter(), cpu_seconds()
            manifest = make_store(config, folder / "s", workers=cores)
            assert manifest["counts"]["tokens"] == count
            record(what="tokenize", by="orogen tokenize", turn=turn, cores=cores, **rates(size, began, cpu))
            shutil.rmtree(folder / "s")


def make(folder, gb):
    """A store of random tokens, with documents of lognormal lengths: about so many GB."""
    folder.mkdir(parents=True)
    tokenizer = train_bpe([document.text for document in corpora.stdlib_documents()], vocab_size=VOCAB_SIZE)
    tokenizer.save(folder / store.TOKENIZER)
    rng, shards = np.random.default_rng(0), []
    block = (3 + rng.zipf(1.2, 2**24) % (VOCAB_SIZE - 3)).astype(np.int32)
    for number in range(round(gb * 1e9 / 2 / SHARD_TOKENS)):
        split, left, n_bytes = "train" if number else "heldout", SHARD_TOKENS, 0
        with IndexedWriter(store.shard(folder, split, number), dtype_for(VOCAB_SIZE)) as writer:
            while left > 0:
                length = int(min(left, np.clip(rng.lognormal(6.2, 1.2), 2, 2**17)))
                start = int(rng.integers(0, len(block) - length))
                ids = np.append(block[start : start + length - 1], tokenizer.eos_id)
                writer.add(ids)
                left, n_bytes = left - length, n_bytes + 4 * length
            facts = writer.close()
        shards.append({"name": store.shard(folder, split, number).name, "split": split, "bytes": n_bytes, **facts})
    settings = {"corpus": "random", "tokenizer": "bpe", "vocab_size": VOCAB_SIZE, "text_field": "text"}
    settings |= {"heldout_fraction": 0.05, "tuning_fraction": 0.0, "seed": 0}
    manifest = {"format": store.FORMAT, "settings": settings, "sha256": "0" * 64, "tokenizer": tokenizer.fingerprint}
    (folder / store.MANIFEST).write_text(json.dumps({**manifest, "shards": shards}))


def memory():
    """Resident bytes of this process now, and at most."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now = 1024 * int(status["VmRSS"].split()[0])
    return {"resident_mb": now / 1e6, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}


def held(folder):
    """The size of the store, and how much of it a process maps at most."""
    size = sum(path.stat().st_size for path in folder.glob("*.bin"))
    return {"store_gb": size / 1e9, "mapped_mib": indexed.RESIDENT_BYTES / 2**20}


def loader(folder):
    """The time to the first batch of a new process, the rate after it, and the resident memory."""
    began = time.perf_counter()
    from orogen.data.loader import open_corpus

    config = DataConfig(
        corpus=str(folder), tokenizer="bpe", vocab_size=VOCAB_SIZE, heldout_fraction=0.05, tuning_fraction=0.0
    )
    corpus = open_corpus(config)
    batches = corpus.train_loader(batch_size=BATCH_SIZE, sequence_length=SEQUENCE_LENGTH)
    next(batches)
    first = time.perf_counter() - began
    began, count, cpu = time.perf_counter(), 0, time.process_time()
    while time.perf_counter() - began < 20:
        count += next(batches).tokens_bt.size
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    record(
        what="loader", **held(folder), first_batch_seconds=first, tokens_per_second=count / seconds,
        tokens_per_cpu_second=count / cpu, **memory(),
    )  # fmt: skip


def train(folder, steps):
    """Peak memory of `orogen train` of a tiny model on the store, an evaluation every 30 steps included."""
    run = Path(tempfile.mkdtemp()) / "run"
    command = [
        sys.executable, "-m", "orogen.cli", "train", "--gin_file", str(Path(__file__).parent / "tiny.gin"),
        "--gin_bindings", f"DataConfig.corpus = '{folder}'", "--run", str(run),
    ]  # fmt: skip
    began, metrics = time.perf_counter(), run / "metrics.jsonl"
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
        assert running.poll() is None
        time.sleep(0.5)
    running.terminate()  # before the whole held-out split is scored, 250 million tokens
    assert running.wait() == 0
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    tokens = sum(one["tokens"] for one in records)
    start = records[0]["start_seconds"]
    record(what="train", **held(folder), steps=steps, seconds=seconds, tokens=tokens, start_seconds=start, peak_mb=peak)
    shutil.rmtree(run.parent)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("tokenize", "store", "loader", "train"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--gb", type=float, default=10.0, help="of store: its size")
    parser.add_argument("--steps", type=int, default=100, help="of train")
    options = parser.parse_args()
    match options.what:
        case "tokenize":
            tokenize()
        case "store":
            make(options.folder, options.gb)
        case "loader":
            loader(options.folder)
        case "train":
            train(options.folder, options.steps)
