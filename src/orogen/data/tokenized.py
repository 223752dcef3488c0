"""Records tokenized by other programs, and text in ArrayRecord, for `readers` and `units`.

**ArrayRecord** (github.com/google/array_record) is a sequence of byte strings. The bytes of a record decide how it is
read: a `tf.train.Example`, as TFDS and MaxText write it, whose feature `DataConfig.text_field` holds one text or token
ids; an array of token ids, as `numpy.save` writes it; otherwise UTF-8 text. Ids without a header, as `array.tobytes()`
gives them, need `DataConfig.record_dtype`. Pickles are never opened: they are not UTF-8, so they count as broken.

**Megatron's `.idx`, with its `.bin`** (see `indexed`) holds ids; sequences of one document are joined.
"""

import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orogen.config.checks import ConfigError, shown
from orogen.data.indexed import IndexedTokens

NPY = b"\x93NUMPY"
AT_ONCE = 64  # records read by one call


class Tokens(NamedTuple):
    """The token ids (t,) of one document, of any integer dtype, and its permanent name."""

    key: str
    ids_t: np.ndarray

    @property
    def size(self) -> int:
        """Roughly the number of characters of its text."""
        return 4 * len(self.ids_t)


def record_count(file: Path) -> int:
    """The number of records of an ArrayRecord, or of documents of a Megatron index. Raises ValueError for a
    damaged file, OSError for one that cannot be opened."""
    return IndexedTokens(file.with_suffix("")).document_count if file.suffix == ".idx" else _open(file).num_records()


def array_records(file: Path, start: int, stop: int | None) -> Iterator[bytes | ConfigError]:
    """The records [start, stop) of an ArrayRecord; in place of one whose chunk is damaged, what is wrong. Raises as
    `record_count` does."""
    reader = _open(file)
    try:
        end: int = reader.num_records() if stop is None else stop
        for first in range(start, end, AT_ONCE):
            last = min(first + AT_ONCE, end)
            try:
                found = reader.read(first, last)
            except (RuntimeError, ValueError, IndexError):  # at least one is damaged; each is tried alone
                found = [_alone(reader, file, number) for number in range(first, last)]
            yield from found
    finally:
        reader.close()


def _open(file: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    file.open("rb").close()  # the reader reports neither a missing file nor one that may not be read
    # Without read-ahead, which uses threads, a damaged chunk costs only its own records.
    reader = ArrayRecordReader(str(file), "readahead_buffer_size:0")
    if not reader.ok():
        raise ValueError("no ArrayRecord, or one that is cut off")
    return reader


def _alone(reader: Any, file: Path, number: int) -> bytes | ConfigError:
    try:
        return reader.read([number])[0]
    except (RuntimeError, ValueError, IndexError) as error:
        return ConfigError(f"{file}:{number + 1}: {error}: expected a whole, undamaged record")


def content_of(record: bytes, *, field: str, dtype: str | None, where: str) -> bytes | np.ndarray:
    """What a record holds: the bytes of a text, or token ids (t,). dtype: `DataConfig.record_dtype`. Raises
    ConfigError."""
    if dtype is not None:
        size = np.dtype(dtype).itemsize
        if len(record) % size:
            raise ConfigError(f"{where} has {len(record)} bytes; expected a multiple of {size}: ids of {dtype}")
        return np.frombuffer(record, np.dtype(dtype).newbyteorder("<"))
    if record.startswith(NPY):
        return _checked_ids(_saved_array(record, where), where)
    features = _features(record)
    return record if features is None else _of_feature(features, field, where)


def _saved_array(record: bytes, where: str) -> np.ndarray:
    try:
        return np.load(io.BytesIO(record), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ConfigError(f"{where}: {error}: expected an array as numpy.save writes it") from None


def _checked_ids(ids: np.ndarray, where: str) -> np.ndarray:
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ConfigError(f"{where} has an array {ids.shape} of {ids.dtype}; expected token ids (t,) of whole numbers")
    return ids


def _features(record: bytes) -> Any:
    """The features by name of a serialised `tf.train.Example`; None for any other bytes.

    Protobuf accepts unknown fields, so it accepts some texts too. An Example has only known fields.
    """
    from google.protobuf.message import DecodeError
    from google.protobuf.unknown_fields import UnknownFieldSet

    example = _example_class()()
    try:
        example.ParseFromString(record)
    except DecodeError:
        return None
    found = example.features.feature
    known = len(found) and not len(UnknownFieldSet(example)) and not len(UnknownFieldSet(example.features))
    return found if known else None


def _of_feature(features: Any, field: str, where: str) -> bytes | np.ndarray:
    if field not in features:
        raise ConfigError(f"{where}: found the features {shown(sorted(features))}: expected one called {field!r}")
    feature = features[field]
    kind = feature.WhichOneof("kind")
    if kind == "int64_list":
        return np.array(feature.int64_list.value, np.int64)
    if kind == "bytes_list" and len(feature.bytes_list.value) == 1:
        return feature.bytes_list.value[0]
    raise ConfigError(
        f"{where}: the feature {field!r} is {f'a {kind}' if kind else 'empty'}; expected one text, or token ids"
    )


@functools.cache
def _example_class() -> Any:
    """The class of `tf.train.Example` (tensorflow/core/example/example.proto and feature.proto), without
    TensorFlow."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="orogen/example.proto", package="orogen", syntax="proto3")

    def add(name: str, *fields: tuple[str, int, bool, str | None], inside: Any = file.message_type) -> Any:
        message = inside.add(name=name)
        for field, kind, repeated, of in fields:
            message.field.add(
                name=field, number=len(message.field) + 1, type=kind, type_name=of and f".orogen.{of}",
                label=kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL,
            )  # fmt: skip
        return message

    add("BytesList", ("value", kinds.TYPE_BYTES, True, None))
    add("FloatList", ("value", kinds.TYPE_FLOAT, True, None))
    add("Int64List", ("value", kinds.TYPE_INT64, True, None))
    lists = (("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List"))
    feature = add("Feature", *((name, kinds.TYPE_MESSAGE, False, of) for name, of in lists))
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = add("Features", ("feature", kinds.TYPE_MESSAGE, True, "Features.FeatureEntry"))
    entry = add("FeatureEntry", ("key", kinds.TYPE_STRING, False, None),
                ("value", kinds.TYPE_MESSAGE, False, "Feature"), inside=features.nested_type)  # fmt: skip
    entry.options.map_entry = True
    add("Example", ("features", kinds.TYPE_MESSAGE, False, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("orogen.Example"))


def indexed_documents(file: Path, start: int, stop: int | None) -> Iterator[np.ndarray | ConfigError]:
    """The ids (t,) of the documents [start, stop) of a Megatron index, int32, or int64 if the file has it; in place of
    one that the index places outside the file, what is wrong. Raises as `IndexedTokens` does."""
    tokens = IndexedTokens(file.with_suffix(""))
    for number in range(start, tokens.document_count if stop is None else stop):
        try:
            found = tokens.document(number)
        except ConfigError as error:
            found = error
        yield found


def text_ids(ids_t: np.ndarray, *, tokenizer: Any) -> np.ndarray:
    """The ids (t,) int32 of one document without the bos and eos around it. Raises ConfigError for ids outside the
    vocabulary, and for bos, eos or padding inside: it would be several documents, which then see each other."""
    if len(ids_t):
        low, high = int(ids_t.min()), int(ids_t.max())
        if low < 0 or high >= tokenizer.vocab_size:
            raise ConfigError(f"ids from {low} to {high}; expected 0 to {tokenizer.vocab_size - 1}")
    ids_t = ids_t.astype(np.int32)
    ids_t = ids_t[1:] if len(ids_t) and ids_t[0] == tokenizer.bos_id else ids_t
    ids_t = ids_t[:-1] if len(ids_t) and ids_t[-1] == tokenizer.eos_id else ids_t
    special_t = (ids_t == tokenizer.bos_id) | (ids_t == tokenizer.eos_id) | (ids_t == tokenizer.pad_id)
    if special_t.any():
        expected = "expected one document, without padding"
        raise ConfigError(f"the special token {int(ids_t[special_t][0])} inside; {expected}")
    return ids_t
