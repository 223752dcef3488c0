"""Texts and tokens of other programs' files: ArrayRecord as TFDS, MaxText and numpy fill it, and Megatron's indices."""

import dataclasses
import io
import json
import pickle
import struct

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.data.loader import open_corpus
from orogen.data.make_store import make_store
from orogen.data.sources import linked_folders, unread_files
from orogen.data.tokenized import content_of
from orogen.data.vocabulary import byte_tokenizer

TEXTS = [f"line {i} é" * (i % 5) + "\n\n" for i in range(40)]
IDS = [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3 for text in TEXTS]  # of the byte tokenizer
EOS = 2


def varint(number):
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def field(number, data):
    return bytes([number << 3 | 2]) + varint(len(data)) + data


def example(**features):
    """A tf.train.Example, byte by byte: features of bytes, or of ids as packed int64."""
    entries = b""
    for name, value in features.items():
        is_text = isinstance(value, bytes)
        kind = field(1, field(1, value)) if is_text else field(3, field(1, b"".join(varint(int(i)) for i in value)))
        entries += field(1, field(1, name.encode()) + field(2, kind))
    return field(1, entries)


EMPTY = field(1, field(1, field(1, b"text") + field(2, b"")))  # an Example whose only feature has no kind


def write_records(path, records, options="group_size:4"):
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()


def saved(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


CODES = {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}  # Megatron's, of whole numbers


def write_index(prefix, documents, dtype="<u2"):
    """Megatron's files, by the layout that it documents; each document is a list of sequences."""
    sequences = [np.array(one, dtype) for document in documents for one in document]
    lengths = [len(one) for one in sequences]
    offsets = [np.dtype(dtype).itemsize * sum(lengths[:i]) for i in range(len(lengths))]
    ends = np.cumsum([0, *(len(document) for document in documents)])
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(ends))
    body = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(offsets)}q", *offsets)
    prefix.with_suffix(".idx").write_bytes(head + body + struct.pack(f"<{len(ends)}q", *ends))
    prefix.with_suffix(".bin").write_bytes(b"".join(one.tobytes() for one in sequences))


def config_of(corpus, **more):
    settings = {"heldout_fraction": 0.2, "tuning_fraction": 0.0} | more
    return DataConfig(corpus=str(corpus), tokenizer="byte", **settings)


def stored(config, folder, **more):
    """The manifest of the new store, and what it holds."""
    manifest = make_store(config, folder, **({"workers": 1} | more))
    return manifest, open_corpus(dataclasses.replace(config, corpus=str(folder)))


def found(corpus):
    """All texts, sorted, and all ids in their order."""
    splits = [corpus.splits[name] for name in ("train", "heldout")]
    return sorted(text.decode() for split in splits for text in split.texts()), splits


@pytest.mark.parametrize("make", [str.encode, lambda text: example(title=b"no", text=text.encode())])
def test_texts_of_array_records_are_read_like_any_other(tmp_path, make):
    """The numbered names are those of TFDS."""
    for number in range(2):
        write_records(tmp_path / f"c4.array_record-{number:05}-of-00002", [make(t) for t in TEXTS[number::2]])
    in_memory = open_corpus(config_of(tmp_path))
    manifest, corpus = stored(config_of(tmp_path), tmp_path / "store", unit_bytes=2**15)
    assert found(in_memory)[0] == found(corpus)[0] == sorted(TEXTS)
    assert manifest["counts"]["broken"] == 0 and len({one["name"][-5:] for one in manifest["shards"]}) > 2
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["files"] == 2


FORMS = {
    "npy": (saved, {}),
    "example": (lambda ids: example(inputs=ids), {"text_field": "inputs"}),
    "bytes": (lambda ids: ids.astype("<u2").tobytes(), {"record_dtype": "uint16"}),
}


@pytest.mark.parametrize("form", [*FORMS, "index"])
def test_tokens_are_taken_as_they_are(tmp_path, form):
    """With and without bos and eos; a document of Megatron's may have several sequences, or none."""
    given = [np.array([*[1] * (i % 2), *ids, *[EOS] * (i % 3 > 0)], np.int32) for i, ids in enumerate(IDS)]
    if form == "index":
        more = {}
        write_index(tmp_path / "c", [[one[:3], one[3:7], one[7:]] if i % 4 else [one] for i, one in enumerate(given)])
    else:
        make, more = FORMS[form]
        write_records(tmp_path / "c.array_record", [make(one) for one in given])
    config = config_of(tmp_path / ("c.idx" if form == "index" else "c.array_record"), **more)
    manifest, corpus = stored(config, tmp_path / "store", unit_bytes=700, workers=2)
    texts, splits = found(corpus)
    assert texts == sorted(TEXTS) and manifest["counts"]["broken"] == 0 and len(manifest["shards"]) > 3
    streams = sorted(split[i].tokens_t.tolist() for split in splits for i in range(len(split)))
    assert streams == sorted([1, *ids.tolist(), EOS] for ids in IDS)
    assert manifest["counts"]["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert manifest["counts"]["tokens"] == sum(len(ids) for ids in IDS)
    with pytest.raises(ConfigError, match="holds tokens, not text; expected a store that `orogen tokenize`"):
        open_corpus(config)
    bpe = dataclasses.replace(config, tokenizer="bpe", vocab_size=260)
    with pytest.raises(ConfigError, match="expected the path of the tokenizer that made the tokens of c"):
        make_store(bpe, tmp_path / "other", workers=1)


@pytest.mark.parametrize("dtype", CODES)
def test_an_index_of_any_dtype_of_megatrons_is_read(tmp_path, dtype):
    given = [[one[:2], one[2:]] for one in (np.minimum(ids, 120) for ids in IDS)]
    write_index(tmp_path / "c", given, dtype)
    manifest, corpus = stored(config_of(tmp_path / "c.idx"), tmp_path / "store")
    _, splits = found(corpus)
    streams = sorted(split[i].tokens_t.tolist() for split in splits for i in range(len(split)))
    assert streams == sorted([1, *first.tolist(), *second.tolist(), EOS] for first, second in given)
    assert manifest["counts"]["broken"] == 0


def test_ids_that_no_vocabulary_has_and_places_outside_a_file_cost_their_documents(tmp_path):
    """2^32 + 5 is 5 in 32 bits; a length of -1 means the whole file to numpy."""
    write_index(tmp_path / "c", [[[7, 8]], [[2**32 + 5]], [[9]], [[]], [[-(2**40), 4]], [[10]]], "<i8")
    data = bytearray((tmp_path / "c.idx").read_bytes())
    data[34 + 8 : 34 + 12] = struct.pack("<i", -1)  # the length of the third
    data[34 + 24 : 34 + 32] = struct.pack("<q", 2**40)  # the place of the first
    (tmp_path / "c.idx").write_bytes(data)
    manifest, corpus = stored(config_of(tmp_path / "c.idx", heldout_fraction=0.0), tmp_path / "store")
    train = corpus.splits["train"]
    assert [train[i].tokens_t.tolist() for i in range(len(train))] == [[1, EOS], [1, 10, EOS]]
    lines = [json.loads(line) for line in (tmp_path / "store" / "broken.jsonl").read_text().splitlines()]
    assert [one["key"] for one in lines] == ["c.idx:1", "c.idx:2", "c.idx:3", "c.idx:5"]
    for one, part in zip(lines, ("2 tokens from byte 1099", "4294967301", "-1 tokens", "-1099511627776"), strict=True):
        assert part in one["reason"]


def test_what_cannot_be_used_is_named(tmp_path):
    good = [saved(ids) for ids in IDS[:20]]
    bad = {
        "ids from 3 to 259; expected 0 to 258": saved(np.array([3, 259])),
        "ids from -100 to 9; expected 0 to 258": saved(np.array([9, -100])),
        "the special token 2 inside; expected one document": saved(np.array([9, 2, 9, 2])),
        "the special token 0 inside": saved(np.array([9, 0, 0])),
        r"an array (2, 2) of int64": saved(np.ones((2, 2), np.int64)),
        r"an array (3,) of float32": saved(np.ones(3, np.float32)),
        "Object arrays cannot be loaded": saved(np.array([print], object)),
        "expected an array as numpy.save writes it": good[0][:-3],
        "not UTF-8": pickle.dumps([1, 2], 4),
        "found the features ['inputs']: expected one called 'text'": example(inputs=[4]),
        "the feature 'text' is empty; expected one text, or token ids": EMPTY + example(inputs=[4]),
        "NUL characters": b"a\0b",
    }
    write_records(tmp_path / "c.array_record", [*good, *bad.values()])
    write_records(tmp_path / "d.array_record", [np.random.default_rng(0).bytes(0)] * 9)
    write_records(tmp_path / "e.array_record", [])
    manifest, _ = stored(config_of(tmp_path), tmp_path / "store", unit_bytes=2**15)
    assert manifest["counts"]["documents"] == 29 and manifest["counts"]["broken"] == len(bad)
    lines = [json.loads(line) for line in (tmp_path / "store" / "broken.jsonl").read_text().splitlines()]
    for number, (line, reason) in enumerate(zip(lines, bad, strict=True), 21):
        assert line["key"] == f"c.array_record:{number}" and reason in line["reason"] and "\n" not in line["reason"]
    with pytest.raises(ConfigError, match="has 3 bytes; expected a multiple of 4: ids of int32"):
        content_of(b"abc", field="text", dtype="int32", where="it")


def test_a_damaged_chunk_costs_its_own_records(tmp_path):
    """A file that is cut off has no index and gives none; one that is no ArrayRecord, and an index without its .bin."""
    rng = np.random.default_rng(0)
    records = [saved(rng.integers(3, 259, 400)) for _ in range(100)]
    write_records(tmp_path / "a.array_record", records)
    data = bytearray((tmp_path / "a.array_record").read_bytes())
    (tmp_path / "b.array_record").write_bytes(data[: len(data) // 2])
    (tmp_path / "c.arrayrecord").write_bytes(b"no such thing" * 99)
    (tmp_path / "pack.idx").write_bytes(b"\xfftOc")  # Git's: there is no .bin
    data[20_000:20_020] = bytes(20)
    (tmp_path / "a.array_record").write_bytes(data)
    manifest, _ = stored(config_of(tmp_path), tmp_path / "store")
    lines = [json.loads(line) for line in (tmp_path / "store" / "broken.jsonl").read_text().splitlines()]
    numbers = [int(one["key"].split(":")[1]) for one in lines if one["key"].startswith("a.")]
    assert len(numbers) == 4 and numbers == list(range(numbers[0], numbers[0] + 4)) and numbers[0] % 4 == 1
    assert manifest["counts"]["documents"] == 96
    others = [one for one in lines if not one["key"].startswith("a.")]
    assert [one["key"] for one in others] == ["b.array_record", "c.arrayrecord"]
    assert all("no ArrayRecord, or one that is cut off" in one["reason"] for one in others)


def test_a_store_is_no_part_of_a_corpus(tmp_path):
    """Whole or begun, it is skipped and counted below a corpus, and refused as one: its documents are split already."""
    write_records(tmp_path / "c.array_record", [saved(ids) for ids in IDS])
    config = config_of(tmp_path)
    first, _ = stored(config, tmp_path / "below" / "store")
    begun = tmp_path / "begun"
    (begun / "tokenizer").mkdir(parents=True)
    for name in ("plan.json", "train-00000.idx", "train-00000.bin"):
        (begun / name).write_bytes(b"{}")
    second, _ = stored(config, tmp_path / "again")
    assert (first["counts"]["documents"], first["files"]) == (len(IDS), 1)
    assert (second["counts"], second["files"], second["sha256"]) == (first["counts"], 1, first["sha256"])
    assert unread_files(tmp_path) == 3 and linked_folders(tmp_path) == 0
    with pytest.raises(ConfigError, match="below/store', a store; expected texts, or other programs' tokens"):
        make_store(config_of(tmp_path / "below" / "store"), tmp_path / "other", workers=1)
    with pytest.raises(ConfigError, match="begun' is a store that is not whole"):
        make_store(config_of(begun), tmp_path / "other", workers=1)
    assert not (tmp_path / "other").exists()


def test_settings_that_nothing_reads_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"record_dtype is 'int32'; expected None, since nothing reads it"):
        open_corpus(config_of(tmp_path, record_dtype="int32"))
    with pytest.raises(ConfigError, match=r"record_dtype is 'float'; expected None, or one of uint16, int32"):
        config_of(tmp_path, record_dtype="float")


def test_a_text_that_looks_like_an_example_is_a_text():
    """Protobuf takes `rd` for an unknown field of 100 bytes."""
    assert byte_tokenizer().eos_id == EOS
    unknown = b"rd" + b"x" * 100
    for text in (unknown, b"", b"\n\n", b"\n\x00", example(text=b"a") + unknown):
        assert content_of(text, field="text", dtype=None, where="it") == text
    for record in (example(inputs=b"a"), example(inputs=b"a") + EMPTY):
        assert content_of(record, field="inputs", dtype=None, where="it") == b"a"
