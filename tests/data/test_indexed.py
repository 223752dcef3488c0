"""Megatron's .bin and .idx files: what is written comes back, and nothing else does."""

import numpy as np
import pytest

from orogen.config.checks import ConfigError
from orogen.data import indexed


def test_documents_of_any_length_come_back_from_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "RESIDENT_BYTES", 64)  # pages are given back all the time
    rng = np.random.default_rng(0)
    for dtype, high in ((indexed.DTYPES[8], 65499), (indexed.DTYPES[4], 2**30)):
        documents = [rng.integers(0, high, length).astype(np.int32) for length in (1, 0, 5000, 3, 0, 17)]
        with indexed.IndexedWriter(tmp_path / "x", dtype) as writer:
            for one in documents:
                writer.add(one)
            writer.close()
        tokens = indexed.IndexedTokens(tmp_path / "x")
        for number in (5, 2, 2, 0, 1, 3, 4, 2):
            found = tokens.read(number)
            assert found.dtype == np.int32 and np.array_equal(found, documents[number])
    assert indexed.dtype_for(65499) == np.uint16 and indexed.dtype_for(65500) == np.int32


def test_files_that_are_replaced_between_reads_are_refused(tmp_path, monkeypatch):
    """Another store of the same sizes, whose tokens would be read as if they were the first one's."""
    monkeypatch.setattr(indexed, "MOST_OPEN", 1)

    def write(name, first):
        with indexed.IndexedWriter(tmp_path / name, indexed.DTYPES[8]) as writer:
            writer.add(np.arange(first, first + 5))
            writer.close()

    for end in ("bin", "idx"):
        write("x", 0)
        write("y", 0)
        kept, other = indexed.IndexedTokens(tmp_path / "x"), indexed.IndexedTokens(tmp_path / "y")
        assert kept.read(0).tolist() == [*range(5)]
        assert other.read(0).tolist() == [*range(5)]  # which closes the files of the first
        write("z", 7)
        (tmp_path / f"z.{end}").replace(tmp_path / f"x.{end}")
        with pytest.raises(ConfigError, match=rf"x\.{end} has changed while it was in use; expected"):
            kept.read(0)
