"""What a run reads: the corpus, its tokenizer, its splits and its order."""

import dataclasses
from typing import Annotated

from orogen.config.checks import ABSENT, ConfigError, check_types, require, require_not_negative, require_positive

RECORD_DTYPES = ("uint16", "int32", "uint32", "int64")
BYTE_VOCAB_SIZE = 256 + 3  # every byte, and <pad>, <bos>, <eos>


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of the corpora of a blend. Its tokenizer, splits and text field are those of DataConfig.

    weight: relative to those of the other sources; tokens are counted as the model sees them, padding left out. A
    source that has reached max_epochs is left out, and the others keep their shares among each other.
    """

    name: Annotated[str, "by which phases and metrics know the source: letters, digits, _ and -"]
    corpus: Annotated[str, "as DataConfig.corpus"]
    weight: Annotated[float, "share of the tokens, relative to those of the other sources; 0: none before a phase"]
    max_epochs: Annotated[float | None, "passes over its documents, at most; None: any number"] = None

    def __post_init__(self) -> None:
        check_types(self)
        known = self.name.isascii() and self.name.replace("-", "_").replace("_", "a").isalnum()
        require(known, self, "name", "letters, digits, _ and -")
        require(self.corpus != "", self, "corpus", "a non-empty string")
        require_not_negative(self, "weight")
        require_positive(self, "max_epochs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A corpus, or several, and how text becomes tokens. Raises ConfigError if fields are out of range or contradict
    each other.

    corpus: "stdlib" needs no download. Files are .txt (each file is a document), .jsonl or .parquet (each line or row),
    .warc or .wet (each page); these but Parquet may end in .gz, .xz or .zst. An .array_record has texts or token ids,
    an .idx with its .bin (Megatron's) token ids: `data.tokenized`. The folder of a store, which `orogen tokenize`
    wrote, is read by memory map; ids can be read only from one. tokenizer: "bpe" is a byte-level BPE.
    """

    corpus: Annotated[
        str, "stdlib (the running Python's own library), or the path of a file, a folder or a store; None: see sources"
    ] = ABSENT
    sources: Annotated[tuple[SourceConfig, ...], "the corpora of a blend, instead of corpus"] = ()
    tokenizer: Annotated[str, "byte, bpe (trained on the train split), or the path of a tokenizer.json"]
    vocab_size: Annotated[
        int | None, "tokens of the tokenizer, specials included: required for bpe, else only checked"
    ] = None
    text_field: Annotated[
        str, "the key (jsonl), column (Parquet) or feature (ArrayRecord of tf.train.Example) that holds the text or ids"
    ] = "text"
    record_dtype: Annotated[
        str | None, "dtype of token ids that ArrayRecords hold without any header; None: texts, Examples, .npy"
    ] = None
    heldout_fraction: Annotated[float, "expected share of the documents kept for evaluation; 0 makes no such split"] = (
        0.05
    )
    tuning_fraction: Annotated[
        float, "expected share of the documents kept for choosing hyperparameters; 0 makes no such split"
    ] = 0.02
    seed: Annotated[int, "decides the split of each document; TrainConfig.seed decides the order"] = 0
    shuffle: Annotated[bool, "False trains in the order of the document keys"] = True

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "sources", tuple(self.sources))  # gin may give a list
        for field in ("corpus", "tokenizer", "text_field"):
            require(getattr(self, field) != "", self, field, "a non-empty string")
        self._check_sources()
        for field in ("heldout_fraction", "tuning_fraction"):
            require(0 <= getattr(self, field) < 1, self, field, "a number from 0 to below 1")
        dtypes = (None, *RECORD_DTYPES)
        require(self.record_dtype in dtypes, self, "record_dtype", f"None, or one of {', '.join(RECORD_DTYPES)}")
        left = 1 - self.heldout_fraction
        require(self.tuning_fraction < left, self, "tuning_fraction", f"less than the {left:g} not held out")
        require(0 <= self.seed < 2**32, self, "seed", "an integer from 0 to 2**32 - 1")
        self._check_vocab_size()

    def _check_sources(self) -> None:
        expected = "a path, or None beside DataConfig.sources"
        require((self.corpus is None) == bool(self.sources), self, "corpus", expected)
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ConfigError(f"DataConfig.sources has the names {names}; expected each once")
        if self.sources and not any(source.weight for source in self.sources):
            raise ConfigError("DataConfig.sources has weights of 0 only; expected one above 0")

    def _check_vocab_size(self) -> None:
        size = self.vocab_size
        if self.tokenizer == "bpe":
            expected = f"at least {BYTE_VOCAB_SIZE} (256 bytes and 3 specials) with tokenizer 'bpe'"
            require(size is not None and size >= BYTE_VOCAB_SIZE, self, "vocab_size", expected)
        elif self.tokenizer == "byte":
            require(size in (None, BYTE_VOCAB_SIZE), self, "vocab_size", f"{BYTE_VOCAB_SIZE} with tokenizer 'byte'")
        else:
            require_positive(self, "vocab_size")
