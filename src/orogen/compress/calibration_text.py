"""The text on which a model is calibrated, and other text on which it is measured before and after.

Rows are full: documents follow each other, so that no padding is among the inputs of products.
Letters: b batch, t time.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.quantize import QuantizeConfig
from orogen.data.loader import open_corpus
from orogen.data.packing import Batch, Stream, document_stream
from orogen.data.sources import Document, is_readable, read_documents, read_text
from orogen.data.tokenizer import Tokenizer


class CalibrationText(NamedTuple):
    """Batches of full rows: of calibration, and of the held-out measurement."""

    calibration: list[Batch]
    heldout: list[Batch]

    @property
    def tokens(self) -> tuple[int, int]:
        """The number of tokens of each."""
        return tuple(sum(b.tokens_bt.size for b in part) for part in self)  # type: ignore[return-value]


def text_of_corpus(data: DataConfig, tokenizer: Tokenizer, config: QuantizeConfig) -> CalibrationText:
    """The train split calibrates, the held-out split measures. Raises ConfigError if either has too little text."""
    corpus = open_corpus(data, tokenizer=tokenizer)
    parts = {}
    for name, wanted in (("train", config.calibration_tokens), ("heldout", config.heldout_tokens)):
        documents = corpus.splits[name]
        streams = (documents[number] for number in range(len(documents)))
        parts[name] = _enough(rows_of(streams, config), wanted, config, f"the split {name!r}")
    return CalibrationText(parts["train"], parts["heldout"])


def text_of_files(
    paths: Sequence[str], tokenizer: Tokenizer, config: QuantizeConfig, *, text_field: str = "text"
) -> CalibrationText:
    """The beginning of the text calibrates, what follows measures. Raises ConfigError if there is too little."""
    batches = rows_of(_streams(paths, tokenizer, text_field), config)
    where = " and ".join(map(repr, paths))
    calibration = _enough(batches, config.calibration_tokens, config, where)
    return CalibrationText(calibration, _enough(batches, config.heldout_tokens, config, f"{where}, after that"))


def _streams(paths: Sequence[str], tokenizer: Tokenizer, text_field: str) -> Iterator[Stream]:
    for path in map(Path, paths):
        if path.is_file() and not is_readable(path):
            documents: Iterable[Document] = [Document(path.name, read_text(path))]
        else:
            documents = read_documents(path, text_field=text_field)
        for document in documents:
            if document.text:
                ids_t = tokenizer.encode_document(document.text)
                yield document_stream(ids_t, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)


def rows_of(streams: Iterable[Stream], config: QuantizeConfig) -> Iterator[Batch]:
    """Batches of full rows, cut from the documents one after the other; what does not fill a batch is left out."""
    size = config.batch_size * config.sequence_length
    held: list[tuple[np.ndarray, int]] = []
    count = 0
    for number, stream in enumerate(streams):
        held.append((stream.tokens_t, number))
        count += len(stream.tokens_t)
        while count >= size:
            tokens_n = np.concatenate([tokens_t for tokens_t, _ in held])
            document_n = np.concatenate([np.full(len(tokens_t), n) for tokens_t, n in held])
            yield _batch(tokens_n[:size], document_n[:size], config)
            count -= size
            held = [(tokens_n[size:], number)] if count else []
            if count:
                # What is left may be of several documents only if they ended before; keep their numbers apart.
                held = _runs(tokens_n[size:], document_n[size:])


def _runs(tokens_n: np.ndarray, document_n: np.ndarray) -> list[tuple[np.ndarray, int]]:
    ends = np.flatnonzero(np.diff(document_n)) + 1
    return [(part, int(n[0])) for part, n in zip(np.split(tokens_n, ends), np.split(document_n, ends), strict=True)]


def _batch(tokens_n: np.ndarray, document_n: np.ndarray, config: QuantizeConfig) -> Batch:
    shape = config.batch_size, config.sequence_length
    tokens_bt, document_bt = tokens_n.reshape(shape).astype(np.int32), document_n.reshape(shape)
    first_bt = np.diff(document_bt, axis=1, prepend=document_bt[:, :1] - 1) != 0
    index_t = np.arange(config.sequence_length)
    start_bt = np.maximum.accumulate(np.where(first_bt, index_t, 0), axis=1)
    weights_bt = np.where(first_bt, 0, 1).astype(np.float32)
    segments_bt = np.cumsum(first_bt, axis=1).astype(np.int32)
    return Batch(tokens_bt, segments_bt, (index_t - start_bt).astype(np.int32), weights_bt)


def _enough(batches: Iterator[Batch], wanted: int, config: QuantizeConfig, where: str) -> list[Batch]:
    """As many batches as `wanted` tokens fill. Raises ConfigError if there are fewer."""
    size = config.batch_size * config.sequence_length
    needed, found = math.ceil(wanted / size), []
    while len(found) < needed and (batch := next(batches, None)) is not None:
        found.append(batch)
    if len(found) < needed:
        have = len(found) * size
        raise ConfigError(
            f"{where} fills {have} tokens of batches of {config.batch_size} x {config.sequence_length}; expected "
            f"{needed * size}: more text, or a smaller QuantizeConfig.calibration_tokens or heldout_tokens"
        )
    return found
