"""Measures tokenizing against the tokenizers library, and training from a store. See README.md.

python experiments/corpora/run.py tokenize
python experiments/corpora/run.py tokens DIR [--gb N]                # tokens of another program: one .bin and its .idx
python experiments/corpora/run.py take DIR STORE                     # a store made of them by `orogen tokenize`
python experiments/corpora/run.py store STORE [--gb N] [--units N]   # a store written without a text
python experiments/corpora/run.py loader STORE [--cold]
python experiments/corpora/run.py train STORE [--cold] [--steps N]
"""

import argparse
import functools
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from orogen.config.data import DataConfig
from orogen.data import corpora, indexed, store
from orogen.data.indexed import IndexedWriter, dtype_for
from orogen.data.make_store import make_store
from orogen.data.tokenizer import Tokenizer
from orogen.data.vocabulary import train_bpe

HERE = Path(__file__).parent
VOCAB_SIZE, SPECIALS = 4096, 3
SEQUENCE_LENGTH, BATCH_SIZE = 8192, 8
SPLITS: dict[str, Any] = {"heldout_fraction": 0.05, "tuning_fraction": 0.0}
PAGE_CACHE = Path("/proc/sys/vm/drop_caches")


def record(**facts):
    line = json.dumps(facts)
    print(line)
    with (HERE / "results.jsonl").open("a") as file:
        file.write(line + "\n")


def library_texts():
    return [document.text for document in corpora.stdlib_documents()]


def texts(megabytes):
    """The standard library's files, again and again, up to so many characters."""
    documents, size = library_texts(), 0
    for number in range(10**6):
        text = documents[number % len(documents)]
        size += len(text)
        yield text
        if size > megabytes * 1e6:
            return


def tokenize(megabytes, turns):
    """Alternates the library's own batches, on all cores, with `orogen tokenize` on as many processes."""
    with tempfile.TemporaryDirectory() as name:
        folder, everything = Path(name), list(texts(megabytes))
        train_bpe(library_texts(), vocab_size=VOCAB_SIZE).save(folder / "t")
        (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in everything))
        backend = Tokenizer.load(folder / "t")._backend
        size, found = sum(len(text.encode()) for text in everything), {}
        ways = {
            "encode_batch": lambda: encoded(backend.encode_batch, everything),
            "encode_batch_fast": lambda: encoded(backend.encode_batch_fast, everything),
            "orogen tokenize": lambda: stored(folder),
        }
        for turn in range(turns):
            counts = set()
            for way, run in ways.items():
                began, cpu = time.perf_counter(), cpu_seconds()
                counts.add(run())
                seconds, used = time.perf_counter() - began, cpu_seconds() - cpu
                found.setdefault(way, []).append(size / seconds / 1e6)
                rates = {"megabytes_per_second": size / seconds / 1e6, "megabytes_per_cpu_second": size / used / 1e6}
                facts = {"turn": turn, "cores": os.cpu_count(), "megabytes": size / 1e6, "load": os.getloadavg()[0]}
                record(what="tokenize", by=way, **facts, **rates)
            assert len(counts) == 1, counts
        print({way: statistics.median(rates) for way, rates in found.items()})


def encoded(encode, everything):
    """The number of tokens of the texts, in batches of the library."""
    batches = (everything[start : start + 1000] for start in range(0, len(everything), 1000))
    return sum(len(one.ids) for batch in batches for one in encode(batch, add_special_tokens=False))


def stored(folder):
    """The number of tokens of the same texts, by `orogen tokenize` in a process of its own, interpreter included."""
    out, recipe = folder / "s", folder / "x.gin"
    values = {"corpus": str(folder / "x.jsonl"), "tokenizer": str(folder / "t"), "heldout_fraction": 0.0}
    lines = (f"DataConfig.{name} = {value!r}\n" for name, value in {**values, "tuning_fraction": 0.0}.items())
    recipe.write_text("".join(lines))
    command = [sys.executable, "-m", "orogen.cli", "tokenize", "--gin_file", str(recipe), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    count = json.loads((out / store.MANIFEST).read_text())["counts"]["tokens"]
    shutil.rmtree(out)
    return count


def cpu_seconds():
    """Processor time of this process with its threads, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@functools.cache
def frequent_and_rare():
    """Tokens with Zipf's frequencies, from which documents are taken."""
    numbers_t = np.random.default_rng(0).zipf(1.2, 2**22)
    return (SPECIALS + numbers_t % (VOCAB_SIZE - SPECIALS)).astype(dtype_for(VOCAB_SIZE))


def write_documents(prefix, seed, n_tokens) -> dict[str, Any]:
    """Random documents of lognormal lengths, median 490, of so many tokens in all; each ends with eos. Returns the
    facts of the file."""
    rng, left, block_t = np.random.default_rng(seed), n_tokens, frequent_and_rare()
    with IndexedWriter(prefix, dtype_for(VOCAB_SIZE)) as writer:
        while left > 0:
            length_n = np.clip(rng.lognormal(6.2, 1.2, 4096), 2, 2**17).astype(np.int64)
            start_n = rng.integers(0, len(block_t) - 2**17, len(length_n))
            for length, start in zip(length_n.tolist(), start_n.tolist(), strict=True):
                if left <= 0:
                    break
                ids_t = block_t[start : start + length].copy()
                ids_t[-1] = 2  # eos
                writer.add(ids_t)
                left -= length
        return writer.close()


def write_tokens(folder, gb):
    """One .bin with its .idx, as Megatron's own tools write them, and the tokenizer beside it."""
    folder.mkdir(parents=True)
    train_bpe(library_texts(), vocab_size=VOCAB_SIZE).save(folder / store.TOKENIZER)
    began = time.perf_counter()
    facts = write_documents(folder / "tokens", 0, round(gb * 1e9 / 2))
    record(what="tokens", gb=gb, seconds=time.perf_counter() - began, documents=facts["documents"])


def take(folder, out):
    """A store of those tokens, by as many workers as cores."""
    tokenizer = str(folder / store.TOKENIZER)
    config = DataConfig(corpus=str(folder / "tokens.idx"), tokenizer=tokenizer, **SPLITS)
    began, cpu = time.perf_counter(), cpu_seconds()
    counts = make_store(config, out, workers=os.cpu_count() or 1)["counts"]
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    rates = {"tokens_per_second": counts["tokens"] / seconds, "tokens_per_cpu_second": counts["tokens"] / cpu}
    record(what="take", **held(out), **counts, seconds=seconds, **rates)


def write_unit(folder, n_tokens, number):
    """A unit of a store, with 5 % of its tokens held out: the manifest's lines of it. The bytes of their text are a
    guess: four per token."""
    lines = []
    for place, (split, share) in enumerate((("heldout", 0.05), ("train", 0.95))):
        prefix = store.shard(folder, split, number)
        facts = write_documents(prefix, (number, place), round(share * n_tokens))
        lines.append({"name": prefix.name, "split": split, "bytes": 4 * facts["tokens"], **facts})
    return lines


def write_store(folder, gb, units):
    """A store of about so many GB, with the files of so many units, a process per core."""
    folder.mkdir(parents=True)
    tokenizer, began = train_bpe(library_texts(), vocab_size=VOCAB_SIZE), time.perf_counter()
    tokenizer.save(folder / store.TOKENIZER)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        work = functools.partial(write_unit, folder, round(gb * 1e9 / 2 / units))
        shards = [line for lines in pool.map(work, range(units)) for line in lines]
    settings = {"corpus": "random", "tokenizer": "bpe", "vocab_size": VOCAB_SIZE, "text_field": "text", "seed": 0}
    manifest = {"format": store.FORMAT, "settings": settings | SPLITS, "sha256": "0" * 64, "shards": shards}
    manifest["tokenizer"] = tokenizer.fingerprint
    (folder / store.MANIFEST).write_text(json.dumps(manifest))
    documents = sum(one["documents"] for one in shards)
    record(what="store", **held(folder), documents=documents, seconds=time.perf_counter() - began)


def held(folder):
    """The size of the store, how many files it has, and how much of it a process maps at most."""
    sizes = [path.stat().st_size for end in ("bin", "idx") for path in folder.glob(f"*.{end}")]
    return {"store_gb": sum(sizes) / 1e9, "files": len(sizes), "mapped_mib": indexed.RESIDENT_BYTES / 2**20}


def config_of(folder):
    """The settings with which the store was made."""
    settings = json.loads((folder / store.MANIFEST).read_text())["settings"]
    return {"corpus": str(folder), "tokenizer": settings["tokenizer"], "vocab_size": VOCAB_SIZE, **SPLITS}


def read(folder, began):
    """Reads batches for 20 s and prints when the first one came, in seconds after `began`, and how many followed."""
    from orogen.data.loader import open_corpus

    corpus = open_corpus(DataConfig(**config_of(folder)))
    batches = corpus.train_loader(batch_size=BATCH_SIZE, sequence_length=SEQUENCE_LENGTH)
    next(batches)
    first = time.monotonic() - began
    start, count, cpu = time.perf_counter(), 0, time.process_time()
    while time.perf_counter() - start < 20:
        count += next(batches).tokens_bt.size
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    rates = {"tokens_per_second": count / seconds, "tokens_per_cpu_second": count / cpu}
    print(json.dumps({"first_batch_seconds": first, **rates}), flush=True)
    sys.stdin.readline()  # until its memory has been read


def begin(command, cold, **settings) -> tuple[Any, float]:
    """Starts a process, with an empty page cache if `cold`. Returns it and the time of its start."""
    if cold:
        os.sync()
        PAGE_CACHE.write_text("1")
    began = time.monotonic()
    return subprocess.Popen([str(word) for word in command(began)], **settings), began


class Memory:
    """Resident memory of a process, in MB, while it runs. peak: by the kernel's count; the rest is sampled: memory of
    its own, mapped files, and the sum of both."""

    NAMES = {"VmHWM": "peak_mb", "VmRSS": "resident_mb", "RssAnon": "anonymous_mb", "RssFile": "files_mb"}

    def __init__(self, pid):
        self._file, self.most = Path(f"/proc/{pid}/status"), {}

    def sample(self):
        lines = dict(line.split(":", 1) for line in self._file.read_text().splitlines())
        now = {self.NAMES[name]: int(lines[name].split()[0]) * 1024 / 1e6 for name in self.NAMES if name in lines}
        self.most = {name: max(value, self.most.get(name, 0)) for name, value in now.items()}


def loader(folder, cold):
    """From the start of a new process, imports included, to its first batch; its rate after it; and its memory."""
    command = lambda began: [sys.executable, __file__, "read", folder, "--began", began]  # noqa: E731
    running, _ = begin(command, cold, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    memory = Memory(running.pid)
    os.set_blocking(running.stdout.fileno(), False)
    while not (line := running.stdout.readline()):
        memory.sample()
        time.sleep(0.05)
        assert running.poll() is None
    memory.sample()
    running.communicate(b"\n")
    record(what="loader", cold=cold, load=os.getloadavg()[0], **held(folder), **json.loads(line), **memory.most)


def train(folder, cold, steps):
    """`orogen train` of a tiny model on the store, with an evaluation every 30 steps: its memory, and from the start of
    the process to its first step, JAX included. cold: nothing is compiled yet either."""
    run = Path(tempfile.mkdtemp()) / "run"
    binds = [w for name, v in config_of(folder).items() for w in ("--gin_bindings", f"DataConfig.{name} = {v!r}")]
    words = [sys.executable, "-m", "orogen.cli", "train", "--gin_file", HERE / "tiny.gin", "--run", run, *binds]
    kept = {"JAX_COMPILATION_CACHE_DIR": str(run.parent / "compiled")} if cold else {}
    running, began = begin(lambda began: words, cold, stdout=subprocess.DEVNULL, env=os.environ | kept)
    memory, metrics = Memory(running.pid), run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
        memory.sample()
        time.sleep(0.05)
        assert running.poll() is None
    seconds = time.monotonic() - began
    running.terminate()  # before the whole held-out split is scored, 250 million tokens
    assert running.wait() == 0
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    facts = {"tokens": sum(one["tokens"] for one in lines), "start_seconds": lines[0]["start_seconds"]}
    record(what="train", cold=cold, **held(folder), steps=steps, seconds=seconds, **facts, **memory.most)
    shutil.rmtree(run.parent)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("tokenize", "tokens", "take", "store", "loader", "train", "read"))
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--gb", type=float, default=10.0, help="of tokens and store: their size")
    parser.add_argument("--units", type=int, default=1024, help="of store: `orogen tokenize` divides 10 GB into 1,024")
    parser.add_argument("--steps", type=int, default=100, help="of train")
    parser.add_argument("--cold", action="store_true", help="empties the page cache first, as root alone may")
    parser.add_argument("--megabytes", type=float, default=60, help="of text that is tokenized")
    parser.add_argument("--turns", type=int, default=5, help="of tokenize")
    parser.add_argument("--began", type=float, help="of read: when the process was started")
    options = parser.parse_args()
    match options.what, options.folders:
        case "tokenize", []:
            tokenize(options.megabytes, options.turns)
        case "tokens", [folder]:
            write_tokens(folder, options.gb)
        case "take", [folder, out]:
            take(folder, out)
        case "store", [folder]:
            write_store(folder, options.gb, options.units)
        case "loader", [folder]:
            loader(folder, options.cold)
        case "read", [folder]:
            read(folder, options.began)
        case "train", [folder]:
            train(folder, options.cold, options.steps)
        case what, folders:
            parser.error(f"{what} with {len(folders)} folders; see the head of this file")


if __name__ == "__main__":
    main()
