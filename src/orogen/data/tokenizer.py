"""Text to token ids and back: bytes or byte-level BPE, kept as one Hugging Face `tokenizers` file.

Legend: n tokens, v vocabulary.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from orogen.config.checks import ConfigError, shown
from orogen.config.data import DataConfig
from orogen.config.json_file import ListOf, MapOf, Record, Whole, read_json

MAX_TOKENS = 2**24  # a list of the bytes of every id is kept; the largest released vocabularies have 2**18
TOKEN_ID = Whole(0, MAX_TOKENS - 1)
MODEL_FORM = Record({}, {"vocab": (MapOf(TOKEN_ID), list)})
TOKENIZER_FORM = Record(
    {"model": MODEL_FORM}, {"added_tokens": (ListOf(Record({"id": TOKEN_ID, "content": str})), None)}
)
PAD, BOS, EOS = SPECIALS = ("<pad>", "<bos>", "<eos>")  # ids 0, 1, 2

# Words with their leading space, numbers by threes, punctuation, line ends, indentation: the split that OpenAI's
# cl100k_base uses (github.com/openai/tiktoken, tiktoken_ext/openai_public.py), without possessive quantifiers.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary. Source: GPT-2, encoder.py."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


class Tokenizer:
    """A byte-level tokenizer: any text survives encode and decode, if its file has no normaliser and adds no space.

    Text never becomes a special token, also where it spells one. `byte_length_v` (v,) int32 is the number of text
    bytes of each token, 0 for specials: `byte_length_v[tokens].sum()` counts the bytes behind any tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, pad: str, bos: str, eos: str) -> None:
        """Wraps a `tokenizers` tokenizer. Raises ConfigError if it is not byte-level or lacks a special."""
        backend.encode_special_tokens = True  # text that spells a special is encoded as text
        # A file may ask for what would cut or pad documents, or draw their tokens at random.
        backend.no_truncation()
        backend.no_padding()
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None
        self._backend = backend
        self._special_names = {"pad_token": pad, "bos_token": bos, "eos_token": eos}
        self.pad_id, self.bos_id, self.eos_id = (_special_id(backend, name) for name in (pad, bos, eos))
        self._bytes_of_token = _bytes_of_tokens(backend)
        self.byte_length_v = np.array([len(b) for b in self._bytes_of_token], np.int32)
        self._token_of_byte = self._byte_table()

    @property
    def vocab_size(self) -> int:
        """The largest id plus one, specials included: the rows an embedding needs."""
        return len(self._bytes_of_token)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Token ids (n,) int32 of a text, without bos and eos."""
        if self._token_of_byte is not None:
            return self._token_of_byte[np.frombuffer(text.encode(), np.uint8)]
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        if self._token_of_byte is not None:
            return [self.encode(text) for text in texts]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens; specials have none. Raises ConfigError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ConfigError(f"token ids from {min(ids)} to {max(ids)}: expected 0 to {self.vocab_size - 1}")
        return b"".join(self._bytes_of_token[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bytes that are not UTF-8, as where a cut parts a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def check_lossless(self) -> None:
        """Raises ConfigError if some text would not survive: bits per byte would leave its bytes out."""
        if self._backend.normalizer is not None:
            raise ConfigError("the tokenizer has a normalizer, which changes text; expected one without, to train with")
        missing = set(range(256)) - {b[0] for b in self._bytes_of_token if len(b) == 1}
        if missing:
            raise ConfigError(f"the tokenizer has no token for byte {min(missing)}; expected all 256, to train with")
        probe = "a  b\r\n\tc\n "
        if (found := self.decode(self.encode(probe))) != probe:
            raise ConfigError(f"the tokenizer turns {probe!r} into {found!r}; expected no change, to train with")

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special_names}
        names["clean_up_tokenization_spaces"] = False  # true would drop spaces before punctuation on decoding
        # The names come first: a folder that has a tokenizer.json is complete.
        _write_atomically(folder / "tokenizer_config.json", json.dumps(names, indent=2) + "\n")
        _write_atomically(folder / "tokenizer.json", self._backend.to_str(pretty=True) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json, or the folder that holds one, written by `save` or by Hugging Face.

        Specials are named by the tokenizer_config.json beside it, else `<pad>`, `<bos>`, `<eos>`. A tokenizer
        without bos or pad uses its eos there, which is safe: neither is ever predicted.
        Raises FileNotFoundError, or ValueError if the file is no byte-level tokenizer.
        """
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"tokenizer {str(path)!r} not found: expected 'byte', 'bpe' or a tokenizer.json")
        return cls(_read_backend(file), **_special_names(file.with_name("tokenizer_config.json")))

    def _byte_table(self) -> np.ndarray | None:
        """The id of each byte (256,) int32 when every token is a byte: then a lookup encodes; else None."""
        merges = json.loads(self._backend.to_str())["model"].get("merges")
        if merges != [] or self._backend.normalizer is not None or max(map(len, self._bytes_of_token)) != 1:
            return None
        table = {b[0]: i for i, b in enumerate(self._bytes_of_token) if b}
        return np.array([table[byte] for byte in range(256)], np.int32) if len(table) == 256 else None


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes after the three specials: byte b is token b + 3."""
    characters = sorted(_BYTE_OF_CHARACTER, key=lambda c: _BYTE_OF_CHARACTER[c])
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate((*SPECIALS, *characters))}, merges=[])
    )
    backend.add_special_tokens(list(SPECIALS))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, pad=PAD, bos=BOS, eos=EOS)


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE learnt from the texts: specials, 256 bytes, then merges. The same texts give the same file.

    Raises ConfigError if the texts have too few repeated pairs for `vocab_size`. Source: arXiv:1508.07909.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(_BYTE_OF_CHARACTER),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"DataConfig.vocab_size = {vocab_size}: expected at most {backend.get_vocab_size()}, "
            "which is all that the train split's repeated pairs give"
        )
    return Tokenizer(backend, pad=PAD, bos=BOS, eos=EOS)


def make_tokenizer(config: DataConfig, train_texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that the config names; `train_texts` are read only to train one. Raises ConfigError."""
    if config.tokenizer == "byte":
        return byte_tokenizer()
    if config.tokenizer == "bpe":
        assert config.vocab_size is not None
        return train_bpe(train_texts, vocab_size=config.vocab_size)
    tokenizer = Tokenizer.load(config.tokenizer)
    if config.vocab_size is not None:
        check_vocab_size(tokenizer, config.vocab_size, name="DataConfig.vocab_size")
    return tokenizer


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int, *, name: str = "ModelConfig.vocab_size") -> None:
    """Raises ConfigError, naming the field, if `vocab_size` is not the tokenizer's."""
    if vocab_size != tokenizer.vocab_size:
        raise ConfigError(f"{name} = {vocab_size}: expected {tokenizer.vocab_size}, the tokenizer's")


def check_rows(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ConfigError if a model of `vocab_size` rows has none for some token; released models have more rows."""
    if vocab_size < tokenizer.vocab_size:
        expected = f"at least {tokenizer.vocab_size}, the size of the checkpoint's tokenizer"
        raise ConfigError(f"ModelConfig.vocab_size is {vocab_size}; expected {expected}")


def _special_id(backend: tokenizers.Tokenizer, name: str) -> int:
    token_id = backend.token_to_id(name)
    if token_id is None:
        raise ConfigError(f"the tokenizer has no token {name!r}: expected it, or other names in tokenizer_config.json")
    return token_id


def _bytes_of_tokens(backend: tokenizers.Tokenizer) -> list[bytes]:
    """The text bytes of every id, specials and ids between entries empty. Raises ConfigError if not byte-level."""
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    bytes_of_token = [b""] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        if token_id in added:
            bytes_of_token[token_id] = b"" if added[token_id].special else token.encode()
            continue
        try:
            bytes_of_token[token_id] = bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError as error:
            raise ConfigError(f"token {token_id} is {token!r}: expected a byte-level vocabulary") from error
    return bytes_of_token


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a file. Raises ConfigError.

    From its bytes, for tokenizers takes no name that is not UTF-8; what would make it panic or take memory without end
    is refused before.
    """
    expected = "expected a Hugging Face tokenizer.json"
    try:
        model = read_json(file, TOKENIZER_FORM)["model"]
        if prefix := model.get("continuing_subword_prefix"):  # tokenizers panics at a merge that is shorter
            raise ConfigError(f"{file}: continuing_subword_prefix is {shown(prefix)}; expected none")
        return tokenizers.Tokenizer.from_buffer(file.read_bytes())
    except ConfigError as error:
        raise ConfigError(f"{error}: {expected}") from None
    except Exception as error:  # tokenizers raises bare Exception for every malformed file
        raise ConfigError(f"{file}: {error}: {expected}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, whose class has no name to import it by
            raise
        raise ConfigError(f"{file}: {error}: {expected}") from error


def _special_names(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {"pad": PAD, "bos": BOS, "eos": EOS}
    settings = read_json(file)
    names = {role: settings.get(f"{role}_token") for role in ("pad", "bos", "eos")}
    # Hugging Face writes a special either as its text or as {"content": text, ...}.
    names = {role: name.get("content") if isinstance(name, dict) else name for role, name in names.items()}
    if not isinstance(names["eos"], str):
        raise ConfigError(f"{file}: eos_token is {shown(names['eos'])}: expected the name of a token")
    names = {role: name if name is not None else names["eos"] for role, name in names.items()}
    for role, name in names.items():
        if not isinstance(name, str):
            raise ConfigError(f"{file}: {role}_token is {shown(name)}: expected the name of a token")
    return names


def _write_atomically(file: Path, text: str) -> None:
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)
