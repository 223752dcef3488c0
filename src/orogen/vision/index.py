"""Kinds of index over a database's embeddings: exact, or by faiss faster and not exact.

IVF visits the lists of the centres nearest to a query; HNSW walks a graph of near neighbours (arXiv:1603.09320), which
grows by further entries. faiss takes nothing out of such a graph, so what loses entries is built anew from the others.

Letters: n entries, e embedding.
"""

from pathlib import Path
from typing import Any

import numpy as np

from orogen.config.checks import ConfigError

FLAT, IVF, HNSW = KINDS = ("flat", "ivf", "hnsw")
NEIGHBOURS, EF_BUILD, EF_SEARCH = 32, 200, 128  # of HNSW
PROBED = 16  # IVF lists that a query visits at least; of more than 256 lists, 1 in 16


def check_index(kind: str) -> None:
    """Raises ConfigError unless an index of this kind can be built here."""
    if kind not in KINDS:
        raise ConfigError(f"index is {kind!r}; expected one of {', '.join(KINDS)}")
    if kind != FLAT:
        _faiss()


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("faiss is not installed; expected it: pip install 'orogen[vision]', or index flat") from error
    return faiss


def write_index(file: Path, kind: str, embedding_ne: np.ndarray, *, before: Path | None = None) -> None:
    """Writes the index of all embeddings. before: that of the first of them, from which a graph grows. Raises
    ConfigError if it is damaged."""
    faiss = _faiss()
    if kind == HNSW:
        index = _graph(embedding_ne.shape[1]) if before is None else _read(before)
        new_ne = embedding_ne[index.ntotal :]
    else:
        index, new_ne = _lists(embedding_ne), embedding_ne
    if len(new_ne):
        index.add(new_ne)
    faiss.write_index(index, str(file))


def _graph(dimension: int) -> Any:
    faiss = _faiss()
    index = faiss.IndexHNSWFlat(dimension, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = EF_BUILD
    return index


def _lists(embedding_ne: np.ndarray) -> Any:
    faiss, (count, dimension) = _faiss(), embedding_ne.shape
    lists = max(1, min(int(4 * count**0.5), count // 39))  # faiss warns below 39 training points per list
    quantizer = faiss.IndexFlatIP(dimension)
    index = faiss.IndexIVFFlat(quantizer, dimension, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # small databases are legal, and warned about otherwise
    if count:
        index.train(embedding_ne)
    return index


def _read(file: Path, flags: int = 0) -> Any:
    try:
        return _faiss().read_index(str(file), flags)
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(f"{file} cannot be read ({' '.join(str(error).split())[:200]}); expected an index") from error


def read_index(file: Path, kind: str, *, entries: int, dimension: int) -> Any:
    """The faiss index, its vectors read by memory map. Raises ConfigError."""
    index = _read(file, _faiss().IO_FLAG_MMAP)
    if (index.ntotal, index.d) != (entries, dimension):
        raise ConfigError(f"{file} has {index.ntotal} vectors of {index.d}; expected {entries} of {dimension}")
    if kind == HNSW:
        index.hnsw.efSearch = EF_SEARCH
    else:
        index.nprobe = max(PROBED, index.nlist // 16)
    return index
