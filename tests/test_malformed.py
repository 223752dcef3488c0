"""Malformed files: every reader reads them or refuses them in one line, in bounded memory, and writes nothing."""

import functools
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from tests import fuzz
from tests.convert.synthetic import shapes, write

from orogen.checkpoint.folders import KEPT
from orogen.checkpoint.steps import Checkpoints
from orogen.checkpoint.transfer import to_hf
from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.convert.tensor_files import INDEX, Spec, TensorReader, TensorWriter

COUNT = int(os.environ.get("OROGEN_MALFORMED_FILES", "40"))
A, B = "a.safetensors", "b.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> fuzz.Bases:
    return fuzz.Bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_malformed_files_are_read_or_refused(reader, bases, tmp_path):
    found = {n: fuzz.outcome(fuzz.READERS[reader], bases, n, tmp_path / "case") for n in range(COUNT)}
    assert {n: text for n, text in found.items() if text not in ("read", "refused")} == {}
    assert "refused" in found.values()


# The index


def _shards(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        with TensorWriter(folder, {f"w{number}": Spec((2, 3), np.dtype(np.float32))}):
            pass
        (folder / "model.safetensors").rename(folder / name)


def _indexed(folder: Path, weights: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weights}))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([A], f"weight_map is ['{A}']; expected an object whose values are a string"),
        (None, "weight_map is None"),
        (3, "weight_map is 3"),
        ({"w0": 3}, "weight_map.w0 is 3; expected a string"),
        ({"w0": {A: 1}}, "weight_map.w0 is {'a.safetensors': 1}; expected a string"),
        ({"w0": None}, "weight_map.w0 is None"),
        ({}, "names no files"),
        ({"w0": "c.safetensors"}, "names files that do not exist: ['c.safetensors']"),
        ({"w0": "../other/a.safetensors"}, "names '../other/a.safetensors'; expected a file of its folder"),
        ({"w0": "sub/../a.safetensors"}, "expected a file of its folder"),
        ({"w0": "/etc/passwd"}, "names '/etc/passwd'; expected a file of its folder"),
        ({"w0": ""}, "names ''"),
        ({"w0": ".."}, "names '..'"),
        ({"w0": "a\0"}, "names 'a\\x00'"),
    ],
)
def test_an_index_names_files_of_its_folder_or_is_refused(tmp_path, weights, message):
    _shards(tmp_path / "hf", A)
    _shards(tmp_path / "other", A)
    _indexed(tmp_path / "hf", weights)
    with pytest.raises(ConfigError, match=re.escape(message)):
        TensorReader(tmp_path / "hf")


@pytest.mark.parametrize("copied", [False, True])
def test_the_links_of_a_hugging_face_cache_are_followed(tmp_path, copied):
    cache = tmp_path / "models--owner--name"
    _shards(cache / "blobs", "0123", "4567")
    snapshot = tmp_path / "mine" if copied else cache / "snapshots" / "abcd"
    snapshot.mkdir(parents=True)
    for name, blob in ((A, "0123"), (B, "4567")):
        (snapshot / name).symlink_to(cache / "blobs" / blob if copied else Path("../../blobs") / blob)
    _indexed(snapshot, {"w0": A, "w1": B})
    with TensorReader(snapshot) as reader:
        assert reader.specs.keys() == {"w0", "w1"}
        assert reader.read("w1").shape == (2, 3)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    _shards(tmp_path / "other", A)
    _shards(tmp_path / "hf", B)
    (tmp_path / "hf" / A).symlink_to("../other/" + A)
    _indexed(tmp_path / "hf", {"w0": A, "w1": B})
    with pytest.raises(ConfigError, match=r"a\.safetensors is a link to .*other.*; expected a file of its folder"):
        TensorReader(tmp_path / "hf")
    (tmp_path / "hf" / A).unlink()
    (tmp_path / "hf" / A).symlink_to(B)
    _indexed(tmp_path / "hf", {"w0": A})
    assert TensorReader(tmp_path / "hf").specs.keys() == {"w0"}


# Headers

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": GOOD | {"data_offsets": [0.0, 24.0]}}, "w.data_offsets[0] is 0.0; expected a whole number"),
        ({"w": GOOD | {"data_offsets": ["0", "24"]}}, "w.data_offsets[0] is '0'"),
        ({"w": GOOD | {"data_offsets": [0, 24, 24]}}, "w.data_offsets is [0, 24, 24]; expected a list of 2"),
        ({"w": GOOD | {"data_offsets": None}}, "w.data_offsets is None"),
        ({"w": GOOD | {"data_offsets": [False, 24]}}, "w.data_offsets[0] is False"),
        ({"w": GOOD | {"data_offsets": [-24, 0]}}, "w.data_offsets[0] is -24"),
        ({"w": GOOD | {"data_offsets": [24, 0]}}, "w lies at 24 to 0; expected F32 [2, 3] takes 24 bytes"),
        ({"w": GOOD | {"data_offsets": [4, 28]}}, "is truncated: w lies at 4 to 28 of 24 bytes"),
        ({"w": GOOD | {"shape": [2.0, 3]}}, "w.shape[0] is 2.0"),
        ({"w": GOOD | {"shape": "23"}}, "w.shape is '23'"),
        ({"w": GOOD | {"shape": [2**40, 2**40]}}, "takes 4835703278458516698824704 bytes"),
        ({"w": GOOD | {"shape": [1] * 65}}, "w has 65 axes; expected at most 64"),
        ({"w": GOOD | {"dtype": ["F32"]}}, "w.dtype is ['F32']; expected a string"),
        ({"w": GOOD | {"dtype": "I4"}}, "w is I4; expected one of F64"),
        ({"w": {"dtype": "F32", "shape": [2, 3]}}, "w.data_offsets is missing"),
        ({"w": [GOOD]}, "expected an object with dtype, shape, data_offsets"),
        ({"v": GOOD, "w": GOOD}, "w begins at byte 0; expected 24, where the tensor before it ends"),
        ({"w": GOOD | {"shape": [3], "data_offsets": [12, 24]}}, "w begins at byte 12; expected 0"),
        ({"w": GOOD | {"shape": [3], "data_offsets": [0, 12]}}, "has 24 bytes of tensors; expected 12"),
        ({}, "has 24 bytes of tensors; expected 0"),
        ([GOOD], "has no safetensors header: its JSON holds list"),
    ],
)
def test_a_header_of_wrong_types_or_ranges_is_refused(tmp_path, header, message):
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    with pytest.raises(ConfigError, match=re.escape(message)):
        TensorReader(tmp_path)


MASK = {"dtype": "BOOL", "shape": [2, 3]}


@pytest.mark.parametrize(
    ("mask", "weight", "message"),
    [
        ([0, 6], [6, 30], None),
        ([24, 30], [0, 24], None),
        ([0, 6], [8, 32], "w begins at byte 8; expected 6, where the tensor before it ends"),
        ([26, 32], [0, 24], "mask begins at byte 26; expected 24, where the tensor before it ends"),
        ([20, 26], [0, 24], "mask begins at byte 20; expected 24, where the tensor before it ends"),
        ([24, 64], [0, 24], "is truncated: mask lies at 24 to 64 of 30 bytes"),
        ([24, 20], [0, 24], "mask lies at 24 to 20; expected its end after its start"),
        ([24, 28], [0, 24], "has 30 bytes of tensors; expected 28"),
    ],
)
def test_a_tensor_that_is_passed_over_lies_where_it_should(tmp_path, mask, weight, message):
    header = {"mask": MASK | {"data_offsets": mask}, "w": GOOD | {"data_offsets": weight}}
    text = json.dumps(header).encode()
    size = 32 if 32 in (*mask, *weight) else 30
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    opened = functools.partial(TensorReader, tmp_path, ignored=lambda name: name == "mask")
    if message is None:
        assert opened().specs.keys() == {"w"}
    else:
        with pytest.raises(ConfigError, match=re.escape(message)):
            opened()


def test_a_name_twice_in_a_header_is_refused(tmp_path):
    entry = json.dumps(GOOD)
    text = f'{{"w": {entry}, "w": {entry.replace("[2, 3]", "[3, 2]")}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    with pytest.raises(ConfigError, match="'w' occurs twice with different values"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("kept", [{"config": []}, {"dtypes": {"w": 3}}, {"copies": "w"}])
def test_huggingface_json_of_wrong_types_is_refused(tmp_path, kept):
    (tmp_path / KEPT).write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match=rf"{re.escape(KEPT)}: .*; expected"):
        to_hf(None, {}, None, tmp_path, tmp_path / "target")
    assert not (tmp_path / "target").exists()


# Names that are not UTF-8


def test_folders_whose_name_is_not_utf8_are_converted_and_named(tmp_path, monkeypatch):
    source, target = (tmp_path / os.fsdecode(name) for name in (b"hub\xff", b"ours\xfe"))
    write(source, *shapes("gpt2"))
    told = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdout", told)
    assert main(["convert", "from-hf", str(source), str(target)]) == 0
    told.flush()
    assert told.buffer.getvalue() == b"written: " + os.fsencode(target) + b"\n"
    assert (target / "config.gin").is_file()


def test_a_run_folder_whose_name_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"run folder .*run\\udcff'; expected a path in UTF-8"):
        Checkpoints(tmp_path / os.fsdecode(b"run\xff"))
    assert list(tmp_path.iterdir()) == []
