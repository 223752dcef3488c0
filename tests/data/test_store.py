"""Tokenized stores: the same batches as in memory, the same bytes after a kill, and nothing lost in silence."""

import collections
import contextlib
import dataclasses
import errno
import gzip
import hashlib
import itertools
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.files import locked
from orogen.data import indexed, make_store
from orogen.data.loader import open_corpus
from orogen.data.packing import document_stream
from orogen.data.readers import read_records
from orogen.data.units import plan_units, unit_size

WORDS = "the of layer state 'x' é 🙂 <bos> \r\n return".split(" ")
UNIT = 900  # bytes


def some_text(rng, most=120):
    return " ".join(rng.choice(WORDS) for _ in range(int(most * rng.random() ** 2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files of lines, Parquet in five row groups, and small texts; one document is empty."""
    root, rng = tmp_path_factory.mktemp("corpus"), random.Random(3)
    lines = [json.dumps({"text": some_text(rng)}) for _ in range(31)]
    (root / "a.jsonl").write_text("\n".join([*lines[:9], "", *lines[9:]]) + "\n")
    (root / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:7]).encode()))
    texts = pa.table({"text": [some_text(rng) for _ in range(23)]})
    parquet.write_table(texts, root / "c.parquet", row_group_size=5)
    for number in range(6):
        (root / f"d{number}.txt").write_text(some_text(rng) if number else "")
    return root


@pytest.fixture(scope="module")
def config(folder):
    return DataConfig(corpus=str(folder), tokenizer="bpe", vocab_size=270, heldout_fraction=0.2, tuning_fraction=0.1)


def made(config, folder, *, workers=1, **more):
    return make_store.make_store(config, folder, workers=workers, unit_bytes=UNIT, **more)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A store, its manifest, and the corpus opened from it."""
    folder = tmp_path_factory.mktemp("stores") / "one"
    manifest = made(config, folder)
    return folder, manifest, open_corpus(dataclasses.replace(config, corpus=str(folder)))


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_store_gives_the_batches_of_the_corpus_in_memory(config, whole):
    folder, manifest, stored = whole
    memory = open_corpus(config)
    assert len({one["name"].split("-")[1] for one in manifest["shards"]}) > 8
    assert stored.tokenizer.fingerprint == memory.tokenizer.fingerprint
    shape = {"batch_size": 3, "sequence_length": 32, "shuffle_seed": 5}
    pairs = zip(memory.train_loader(**shape), stored.train_loader(**shape), strict=True)
    for one, other in itertools.islice(pairs, 150):
        assert all(np.array_equal(x, y) for x, y in zip(one[:4], other[:4], strict=True))
    for split in ("train", "heldout", "tuning"):
        assert list(stored.splits[split].texts()) == list(memory.splits[split].texts())
        assert stored.splits[split].byte_count == memory.splits[split].byte_count
        assert stored.splits[split].token_count == sum(len(s.tokens_t) - 1 for s in memory.splits[split])
    facts = stored.describe()
    assert facts["documents"] == memory.describe()["documents"] and facts["content_hash"] == manifest["sha256"]


def test_the_number_of_workers_does_not_show(config, whole, tmp_path):
    made(config, tmp_path / "two", workers=2)
    assert content(tmp_path / "two") == content(whole[0])


def test_the_files_are_megatrons(whole):
    """Read by the layout that Megatron-LM documents, without the code of the store."""
    folder, manifest, stored = whole
    one = max((s for s in manifest["shards"] if s["split"] == "train"), key=lambda s: s["documents"])
    index, data = ((folder / f"{one['name']}.{end}").read_bytes() for end in ("idx", "bin"))
    assert index[:9] == b"MMIDIDX\x00\x00" and struct.unpack("<Q", index[9:17]) == (1,) and index[17] == 8  # uint16
    count, boundaries = struct.unpack("<QQ", index[18:34])
    assert (count, boundaries) == (one["documents"], one["documents"] + 1) and count > 2
    lengths = struct.unpack(f"<{count}i", index[34 : 34 + 4 * count])
    offsets = struct.unpack(f"<{count}q", index[34 + 4 * count : 34 + 12 * count])
    assert struct.unpack(f"<{boundaries}q", index[34 + 12 * count :]) == tuple(range(count + 1))
    assert sum(lengths) == one["tokens"] and len(data) == 2 * one["tokens"]
    first = sum(s["documents"] for s in manifest["shards"] if s["split"] == "train" and s["name"] < one["name"])
    for number in range(count):
        tokens = struct.unpack_from(f"<{lengths[number]}H", data, offsets[number])
        assert tokens[-1] == stored.tokenizer.eos_id
        assert stored.splits["train"][first + number].tokens_t.tolist() == [stored.tokenizer.bos_id, *tokens]


def test_the_manifest_hashes_what_it_describes(whole, config):
    folder, manifest, _ = whole
    for one in manifest["shards"]:
        for end in ("bin", "idx"):
            data = (folder / f"{one['name']}.{end}").read_bytes()
            assert one[f"{end}_sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["counts"]["documents"] == 31 + 7 + 23 + 6 and manifest["counts"]["empty"] >= 1
    assert manifest["files"] == 9 and manifest["counts"]["broken"] == 0
    assert manifest["settings"]["vocab_size"] == 270 and len(manifest["code"]) == 64


class Killed(BaseException):
    """Stands for a signal: nothing handles it."""


@pytest.mark.parametrize("end", [0, 1, 4])
@pytest.mark.parametrize("where", ["marker", "shard"])
def test_a_run_that_was_killed_gives_the_same_bytes(config, whole, tmp_path, monkeypatch, where, end):
    """Killed after `end` units, between a unit's shards and its marker or among its shards."""
    kind, name = (indexed.IndexedWriter, "close") if where == "shard" else (make_store, "write_atomically")
    right, calls = getattr(kind, name), []

    def killed(*arguments):
        if where == "shard" or "done" in str(arguments[0]):
            calls.append(1)
        if len(calls) > end:
            raise Killed
        return right(*arguments)

    monkeypatch.setattr(kind, name, killed)
    with pytest.raises(Killed):
        made(config, tmp_path / "s")
    with pytest.raises(ConfigError, match=r"is a store that is not whole; expected `orogen tokenize` to have finished"):
        open_corpus(dataclasses.replace(config, corpus=str(tmp_path / "s")))
    monkeypatch.undo()
    starts = []
    made(config, tmp_path / "s", progress=lambda counts, done, units: starts.append(done))
    assert starts[0] == (end if where == "marker" else starts[0]) and len(starts) > 3
    assert content(tmp_path / "s") == content(whole[0])
    made(config, tmp_path / "s")  # a whole one stays as it is
    assert content(tmp_path / "s") == content(whole[0])


def test_kill_9_of_a_run_with_workers_leaves_no_process_and_a_store_that_continues(config, whole, tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "from orogen.data.make_store import make_store\nfrom orogen.config.data import DataConfig\n"
        "def progress(counts, done, units):\n"
        "    if done == 2: print('two', flush=True); time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        f"    config = DataConfig(**{dataclasses.asdict(config)!r})\n"
        f"    make_store(config, pathlib.Path(sys.argv[1]), workers=2, unit_bytes={UNIT}, progress=progress)\n"
    )
    (tmp_path / "run.py").write_text(code)
    target = tmp_path / "s"
    running = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", target], stdout=subprocess.PIPE, start_new_session=True
    )
    assert running.stdout is not None and running.stdout.readline() == b"two\n"
    children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    deadline = time.monotonic() + 20
    while any(_alive(int(pid)) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) >= 2 and not any(_alive(int(pid)) for pid in children)
    made(config, target, workers=2)
    assert content(target) == content(whole[0])


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_full_disk_is_one_line_and_the_same_command_continues(config, whole, tmp_path, monkeypatch, capsys):
    right, calls = indexed.IndexedWriter.add, []

    def full(self, tokens_t):
        calls.append(1)
        if len(calls) == 40:
            raise OSError(errno.ENOSPC, "No space left on device")  # as a write does: without a path
        return right(self, tokens_t)

    (tmp_path / "a.gin").write_text(
        "".join(f"DataConfig.{k} = {v!r}\n" for k, v in dataclasses.asdict(config).items() if k != "sources")
    )
    command = ["tokenize", "--gin_file", str(tmp_path / "a.gin"), "--out", str(tmp_path / "s"), "--workers", "1"]
    monkeypatch.setattr(make_store, "unit_size", lambda total: UNIT)
    monkeypatch.setattr(
        make_store.make_store, "__kwdefaults__", {**make_store.make_store.__kwdefaults__, "unit_bytes": UNIT}
    )
    monkeypatch.setattr(indexed.IndexedWriter, "add", full)
    assert main(command) == 1
    expected = f"No space left on device; expected room: the same command then continues: '{tmp_path / 's'}'"
    assert capsys.readouterr().err.splitlines()[-1] == f"orogen: [Errno 28] {expected}"
    assert not list((tmp_path / "s").glob("*.tmp"))
    monkeypatch.setattr(indexed.IndexedWriter, "add", right)
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 67
    assert content(tmp_path / "s") == content(whole[0])


def test_units_are_neither_too_few_nor_too_many():
    assert [unit_size(total) for total in (0, 2**32, 2**33, 2**38, 2**40)] == [2**22, 2**22, 2**23, 2**28, 2**28]


@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 333, 5000])
def test_units_divide_files_without_losing_or_renaming_a_record(folder, unit_bytes):
    """Against each file read whole."""
    names = sorted(path.name for path in folder.iterdir())
    units = plan_units([(name, folder / name) for name in names], unit_bytes=unit_bytes)
    divided = [
        record
        for one in itertools.chain.from_iterable(units)
        for record in read_records(folder / one.key, one.key, "text", form=one.form, part=one.part)
    ]
    form = {"jsonl": ".jsonl", "gz": ".jsonl", "parquet": ".parquet", "txt": ".txt"}
    kept = [
        record for name in names for record in read_records(folder / name, name, "text", form=form[name.split(".")[-1]])
    ]
    assert divided == kept and len(kept) == 67
    parts = collections.Counter(one.key for one in itertools.chain.from_iterable(units))
    assert (parts["a.jsonl"] > 1) == (unit_bytes < (folder / "a.jsonl").stat().st_size)


def test_lines_without_an_end_and_longer_than_a_unit_stay_whole(tmp_path):
    for text in ("", "\n", "a", "a\n", "\n\na\n", "ab\ncdefghijk\nl", "abcdefghij" * 3):
        (tmp_path / "x.jsonl").write_text(text)
        for unit_bytes in (1, 2, 3, 4, 9):
            units = plan_units([("x.jsonl", tmp_path / "x.jsonl")], unit_bytes=unit_bytes)
            parts = [one.part for one in itertools.chain.from_iterable(units) if one.part]
            pieces = [text[part.start : part.stop] for part in parts] or [text]
            assert "".join(pieces) == text and all(piece.endswith("\n") for piece in pieces[:-1])
            assert [part.before for part in parts] == [text[: part.start].count("\n") for part in parts]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heldout_fraction": 0.3}, "DataConfig.heldout_fraction is 0.3; expected 0.2, with which"),
        ({"seed": 9}, "DataConfig.seed is 9; expected 0, with which"),
        ({"vocab_size": 280}, "DataConfig.vocab_size is 280; expected 270, with which"),
        ({"tokenizer": "byte", "vocab_size": None}, "DataConfig.tokenizer is 'byte'; expected 'bpe', with which"),
        ({"text_field": "body"}, "DataConfig.text_field is 'body'; expected 'text', with which"),
    ],
)
def test_a_store_made_with_other_settings_is_refused(whole, config, tmp_path, change, message):
    with pytest.raises(ConfigError) as caught:
        open_corpus(dataclasses.replace(config, corpus=str(whole[0]), **change))
    assert message in str(caught.value)
    made_folder = tmp_path / "again"
    made_folder.mkdir()
    (made_folder / "manifest.json").write_bytes((whole[0] / "manifest.json").read_bytes())
    with pytest.raises(ConfigError, match="was begun, or a new folder"):
        made(dataclasses.replace(config, **change), made_folder)


def test_a_damaged_store_is_refused(whole, config, tmp_path):
    folder, manifest, _ = whole
    name = next(one["name"] for one in manifest["shards"] if one["split"] == "train")
    for number, (end, change, message) in enumerate(
        [
            ("bin", lambda data: data[:-2], "bytes; expected"),
            ("bin", lambda data: data + b"\0\0", "bytes; expected"),
            ("idx", lambda data: data[:-1], "bytes; expected"),
            ("idx", lambda data: data[:20], "expected an index of Megatron's, version 1"),
            ("idx", lambda data: b"X" + data[1:], "expected an index of Megatron's, version 1"),
            ("idx", lambda data: data[:17] + b"\x07" + data[18:], "dtype code 7; expected one of [1, 2, 3, 4, 5, 8]"),
        ]
    ):
        copy = tmp_path / str(number)
        for path, data in content(folder).items():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            (copy / path).write_bytes(change(data) if path == f"{name}.{end}" else data)
        with pytest.raises(ConfigError) as caught:
            _ = open_corpus(dataclasses.replace(config, corpus=str(copy))).splits
        assert message in str(caught.value), message
    (copy / f"{name}.bin").unlink()
    (copy / f"{name}.idx").write_bytes((folder / f"{name}.idx").read_bytes())
    with pytest.raises(FileNotFoundError, match=name):
        open_corpus(dataclasses.replace(config, corpus=str(copy)))


def test_a_token_outside_the_vocabulary_is_refused_when_it_is_read(whole, config, tmp_path):
    folder, manifest, _ = whole
    for path, data in content(folder).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(
            b"\xff\xfe" * (len(data) // 2) if path.startswith("train") and "bin" in path else data
        )
    corpus = open_corpus(dataclasses.replace(config, corpus=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"has token 65279; expected one below 270: the store is damaged"):
        corpus.splits["train"][0]


def test_a_folder_of_texts_may_have_a_manifest_of_its_own(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": "another"}')
    (tmp_path / "a.txt").write_text("text")
    config = DataConfig(corpus=str(tmp_path), tokenizer="byte", heldout_fraction=0.0, tuning_fraction=0.0)
    assert len(open_corpus(config).splits["train"]) == 1


def test_only_a_new_folder_or_a_store_is_written_to(config, tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'notes.md'; expected a new folder or a store begun there"):
        made(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]
    with pytest.raises(ConfigError, match="is a file; expected a folder or a new name"):
        made(config, tmp_path / "notes.md")
    with pytest.raises(FileNotFoundError, match="does not exist: expected 'stdlib'"):
        made(dataclasses.replace(config, corpus="/nowhere"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_one_process_writes_at_a_time(config, tmp_path):
    with locked(tmp_path, make_store.LOCK), pytest.raises(ConfigError, match="is being written by another process"):
        made(config, tmp_path)


def test_few_of_a_stores_files_are_open_at_a_time(config, whole, monkeypatch):
    """Read by two threads in random orders: a store may have more files than a process may open."""
    folder, manifest, stored = whole
    expected = [stream.tokens_t for stream in stored.splits["train"]]
    monkeypatch.setattr(indexed, "MOST_OPEN", 2)
    split = open_corpus(dataclasses.replace(config, corpus=str(folder))).splits["train"]
    split.ids(0)

    def opened():
        """The store's files alone: other tests' threads open and close files of their own."""
        found = 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found += os.readlink(f"/proc/self/fd/{name}").startswith(f"{folder}{os.sep}")
        return found

    held = [opened()]
    assert held[0] > 0

    def read(seed):
        for number in np.random.default_rng(seed).permutation(4 * len(split)) % len(split):
            assert np.array_equal(split[number].tokens_t, expected[number])
            held.append(opened())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, (0, 1)))
    assert sum(one["split"] == "train" for one in manifest["shards"]) > 8
    # Each thread may hold an index that was closed meanwhile, of two files, and open a third.
    assert max(held) <= held[0] + 2 * 4


def test_a_large_held_out_split_is_thinned_evenly(whole):
    *_, stored = whole
    heldout = stored.heldout_batches("train", batch_size=2, sequence_length=16)
    assert heldout.thinned(2) is heldout  # it is small
    streams = [document_stream(np.full(9, 10 + i), bos_id=1, eos_id=2) for i in range(100)]

    class Many(list):
        token_count, byte_count = 10**6, 0

    thin = dataclasses.replace(heldout, streams=Many(streams)).thinned(20).streams
    wanted = 4 * 20 * 16
    assert len(thin) == -(-100 * wanted // 10**6) == 1
    thin = dataclasses.replace(heldout, streams=Many(streams)).thinned(2000).streams
    assert [thin[i].tokens_t[1] - 10 for i in range(len(thin))] == [int(i * 100 / len(thin)) for i in range(len(thin))]
    assert len(thin) == 13
