"""Bits per byte and perplexity of texts: long documents by windows, or with everything carried.

Letters: t tokens of a document.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.data.sources import Document, is_readable, read_documents, read_text
from orogen.data.tokenizer import Tokenizer
from orogen.evaluate.likelihood import Row, Score
from orogen.evaluate.subject import Subject

TOKENS_IN_MEMORY = 2**21


class Measured(NamedTuple):
    """Sums over documents: nats and number of predicted tokens, bytes of the texts, documents."""

    nats: float = 0.0
    tokens: int = 0
    n_bytes: int = 0
    documents: int = 0

    def metrics(self) -> dict[str, float]:
        """Bits per byte are those of all predicted tokens over the bytes of the text. Perplexities are per token and
        per byte; nothing is finite that is above e^709."""
        return {
            "bits_per_byte": self.nats / math.log(2) / self.n_bytes,
            "perplexity": _exp(self.nats / max(self.tokens, 1)),
            "byte_perplexity": _exp(self.nats / self.n_bytes),
            "nats_per_token": self.nats / max(self.tokens, 1),
            "tokens": self.tokens,
            "bytes": self.n_bytes,
            "documents": self.documents,
        }


def measure_text(subject: Subject, path: str) -> dict[str, float]:
    """The metrics of a file, or of every document below a folder, in the formats of `orogen.data`; any other file is
    one text. Bytes are those of the documents' text in UTF-8. A document without text counts for nothing.

    Raises ConfigError for what cannot be read, has no text, or is changed by the tokenizer, FileNotFoundError.
    """
    config, total = subject.config, Measured()
    for documents in _batches(_documents(Path(path), config.text_field), subject.tokenizer):
        streams = [_stream(ids_t, subject.tokenizer, with_eos=config.score_ends) for _, ids_t in documents]
        if config.method == "carried":
            scores = subject.carry([Row(stream_t, np.arange(len(stream_t)) > 0) for stream_t in streams])
        else:
            scores = _by_windows(subject, streams)
        total = Measured(
            total.nats - sum(score.log_likelihood for score in scores),
            total.tokens + sum(score.asked for score in scores),
            total.n_bytes + sum(len(text.encode()) for text, _ in documents),
            total.documents + len(documents),
        )
    if not total.n_bytes:
        raise ConfigError(f"{path!r} has no text; expected some, to measure bits per byte on")
    return total.metrics()


def windows(stream_t: np.ndarray, *, length: int, stride: int) -> list[Row]:
    """Windows of at most `length` tokens. The first asks for all of its tokens but the first; each further one for the
    next `stride` tokens, with as many before them as fit. Every token except the first is asked for once.

    Raises ConfigError unless 1 ≤ stride < length.
    """
    if not 1 <= stride < length:
        raise ConfigError(f"stride is {stride}; expected 1 to {length - 1}, less than the {length} tokens of a window")
    rows, done = [], 1
    while done < len(stream_t):
        end = min(len(stream_t), length if done == 1 else done + stride)
        start = max(0, end - length)
        rows.append(Row(stream_t[start:end], np.arange(start, end) >= done))
        done = end
    return rows


def _by_windows(subject: Subject, streams: Sequence[np.ndarray]) -> list[Score]:
    length = subject.max_length
    stride = subject.config.stride or length // 2
    rows = [row for stream_t in streams for row in windows(stream_t, length=length, stride=stride)]
    return subject.score(rows)


def _documents(path: Path, text_field: str) -> Iterator[Document]:
    if path.is_file() and not is_readable(path):
        return iter([Document(path.name, read_text(path))])
    return read_documents(path, text_field=text_field)


def _batches(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Documents that have text, with their ids, as many as stay in memory."""
    held, tokens = [], 0
    for document in documents:
        if not document.text:
            continue
        try:
            ids_t = tokenizer.encode_document(document.text)
        except ConfigError as error:
            raise ConfigError(f"document {document.key}: {error}") from None
        held.append((document.text, ids_t))
        tokens += len(ids_t)
        if tokens >= TOKENS_IN_MEMORY:
            yield held
            held, tokens = [], 0
    if held:
        yield held


def _stream(ids_t: np.ndarray, tokenizer: Tokenizer, *, with_eos: bool) -> np.ndarray:
    """bos, the document and, with `with_eos`, eos."""
    return np.concatenate([[tokenizer.bos_id], ids_t, [tokenizer.eos_id] * with_eos]).astype(np.int32)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 709 else math.inf
