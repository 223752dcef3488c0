"""Text to token ids and back, kept as one Hugging Face `tokenizers` file.

Legend: n tokens, v vocabulary.
"""

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.data import long_text
from orogen.data.backend import as_text, exact, first_difference, read_backend
from orogen.data.panics import panics_refused
from orogen.data.pipeline import normalizers_of, only_spaces, with_bos, without_prefix
from orogen.data.specials import SETTINGS, begins_after, ids_around, read_specials, special_id
from orogen.data.token_bytes import SPACE, check_ids, decoded, token_bytes

# What a vocabulary with byte fallback may take for a space or for a byte.
_MISREAD = f"{SPACE}|<(?=0x[0-9A-F]{{2}}>)"
# Spaces and line ends of every kind, letters with two spellings, and nearly every character that some step drops.
_PROBES = (
    "a  b\r\n\tc\n ",
    "  a",
    " a",
    "don't stop . Go , now ! 'm 's",
    "É E\u0301 ﬁ Å \u212b ﷺ １ ½ İ ß Σς \ufeff\ufffd\u00ad\u200b\u2028",
    f"{SPACE}a{SPACE} {SPACE}",
    "<0x41> <unk> [UNK] ## Ġ Ċ </w> @@",
    "".join(map(chr, range(0x300))),
    "漢字 ひらがな 한글 \u1112\u1161\u11ab 🙂👩\u200d👩\u200d👧 \U0010ffff \ue000",
)


class Tokenizer:
    """A byte-level tokenizer, or a SentencePiece-like one with byte fallback: every token stands for known bytes.

    Text never becomes a special token, even where it spells one. `byte_length_v` (v,) int32 is the number of bytes of
    each token, 0 for specials; `is_token_v` (v,) bool is False for ids without a token. `end_ids` end a text. Read-only
    are `bytes_of_token` of each id; `fallback_of_byte`, the ids of byte tokens in a vocabulary with byte fallback;
    `specials` by id; `special_names`, the names of pad, bos and eos by role; and `around`, the ids before and after a
    prompt.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        pad: str,
        bos: str,
        eos: str,
        end_ids: Iterable[int] = (),
        around: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        """Wraps a `tokenizers` tokenizer. Raises ConfigError if a token stands for no bytes or a special is missing.

        end_ids: ids that end a text besides `eos`. around: ids before and after a prompt; None: `bos` before it.
        """
        check_ids(backend)  # first: writing the file goes through every id up to the largest
        self._backend = as_text(exact(backend))
        self._file = json.loads(backend.to_str())
        self.special_names = {"pad_token": pad, "bos_token": bos, "eos_token": eos}
        self.pad_id, self.bos_id, self.eos_id = (special_id(backend, name) for name in (pad, bos, eos))
        self.end_ids = frozenset((self.eos_id, *end_ids))
        self.around = ((self.bos_id,), ()) if around is None else around
        self.bytes_of_token, tokens, self.fallback_of_byte = token_bytes(backend, self._file["model"])
        self.byte_length_v = np.array([len(b) for b in self.bytes_of_token], np.int32)
        self.is_token_v = np.isin(np.arange(self.vocab_size), list(tokens))
        self._added = [str(t) for t in backend.get_added_tokens_decoder().values() if not t.special]
        self.specials = {i: t for i, t in backend.get_added_tokens_decoder().items() if t.special}
        names = map(str, self.specials.values())
        self._misread = re.compile("|".join([_MISREAD, *(f"{re.escape(s[0])}(?={re.escape(s[1:])})" for s in names)]))
        self._token_of_byte = self._byte_table()
        # SentencePiece's dummy prefix, which the pipeline puts before a text and which is no part of it. Read-only.
        self.prefix = b" " if self.fallback_of_byte and self.decode_bytes(self._ids("a"))[:1] == b" " else b""

    @property
    def vocab_size(self) -> int:
        """The largest id plus one, specials included: the rows an embedding needs."""
        return len(self.bytes_of_token)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Token ids (n,) int32 of a text, without bos and eos: those of transformers, with three differences.

        Text that spells a special is encoded as text. Text that a vocabulary with byte fallback would misread, "▁" (as
        a space), "<0x41>" (as "A") or "<s>" (as no text), is spelled in bytes. Texts of more than `long_text.USUAL`
        characters are tokenized in pieces, and words of more than `long_text.MOST` without a safe split point are split
        anyway. Raises ConfigError if the `tokenizers` library fails.
        """
        if self._token_of_byte is not None:
            return self._token_of_byte[np.frombuffer(text.encode(), np.uint8)]
        return self._encode_exactly(text, first=True)

    def encode_inside(self, text: str, *, special: bool = False) -> np.ndarray:
        """`encode` of a text that follows other text, before which the pipeline puts no space, or a special token."""
        return self._encode_exactly(text, first=special and self._begins_after_specials)

    def encode_marked(self, text: str) -> np.ndarray:
        """Token ids (n,) int32 of a text in which the names of special tokens are these tokens: those of transformers,
        without what a tokenizer's folder puts around a text. Raises ConfigError if the `tokenizers` library fails."""
        with panics_refused():
            return np.array(self._marking.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_document(self, text: str) -> np.ndarray:
        """`encode` for training: ids (n,) int32 whose bytes are exactly the text's.

        A leading space that the pipeline takes for its own dummy prefix is spelled in bytes.
        Raises ConfigError if the tokenizer changes the text.
        """
        ids = self.encode(text)
        if self.text_bytes(ids) == (data := text.encode()):
            return ids
        if self.prefix and text.startswith(" "):
            ids = np.concatenate([self._spelled(" "), self._encode_exactly(text, first=False)])
            if self.text_bytes(ids) == data:
                return ids
        given, found = first_difference(text, self.decode(self.encode(text)))
        raise ConfigError(f"the tokenizer turns {given!r} into {found!r}; expected no change, to train with")

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray | ConfigError]:
        """`encode_document` of each text, or the error that it raises; faster for many texts. The library's own threads
        are used as its environment says (TOKENIZERS_PARALLELISM)."""
        found: list[np.ndarray | ConfigError | None] = [None] * len(texts)
        usual = [i for i, text in enumerate(texts) if text and len(text) <= long_text.USUAL]
        if self._token_of_byte is None:
            try:
                with panics_refused():
                    batch = self._backend.encode_batch_fast([texts[i] for i in usual], add_special_tokens=False)
            except ConfigError:  # one of the texts is to blame; below, each is tried alone
                batch, usual = [], []
            for i, one in zip(usual, batch, strict=True):
                ids = one.ids
                if b"".join(map(self.bytes_of_token.__getitem__, ids)).removeprefix(self.prefix) == texts[i].encode():
                    found[i] = np.array(ids, np.int32)
        return [self._document_or_error(text) if one is None else one for text, one in zip(texts, found, strict=True)]

    def _document_or_error(self, text: str) -> np.ndarray | ConfigError:
        try:
            return self.encode_document(text)
        except ConfigError as error:
            return error

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def prompt_ids(self, text: str) -> list[int]:
        """The ids that a model continues: `encode`, with the ids that the tokenizer's folder puts around a text.

        If there are none at all, bos: a model needs a token to begin with.
        """
        front, back = self.around
        return [*front, *self.encode(text).tolist(), *back] or [self.bos_id]

    def as_in_training(self) -> "Tokenizer":
        """The tokenizer with bos before prompts, as `document_stream` puts it before the documents of every run.

        Its post-processor puts bos there too, for `tokenizers` and transformers.
        """
        other = copy.copy(self)
        other.around = ((self.bos_id,), ())
        if ids_around(self._backend) != other.around:
            bos = self.special_names["bos_token"]
            other._file = {**self._file, "post_processor": with_bos(self._file["post_processor"], bos, self.bos_id)}
            other._backend = as_text(tokenizers.Tokenizer.from_str(json.dumps(other._file)))
        return other

    def marker_ids(self, text: str) -> list[int]:
        """The id of the token `text`, special or not; without such a token, the ids of `text` after other text."""
        own = self._backend.token_to_id(text)
        return self.encode_inside(text).tolist() if own is None else [own]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens; specials have none. Raises ConfigError for an id outside the vocabulary."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ConfigError(f"token ids from {min(ids)} to {max(ids)}: expected 0 to {self.vocab_size - 1}")
        return b"".join(map(self.bytes_of_token.__getitem__, ids))

    def text_bytes(self, ids: Iterable[int]) -> bytes:
        """`decode_bytes` of tokens that begin a text, without the space that the tokenizer put before it."""
        return self.decode_bytes(ids).removeprefix(self.prefix)

    def decode(self, ids: Iterable[int], *, after: Iterable[int] = ()) -> str:
        """The text that the tokens add to the text of the tokens `after`, which they follow.

        Bytes that are not UTF-8, such as a part of a character, become U+FFFD, as in transformers.
        """
        before, ids = list(after), [int(i) for i in ids]
        if not self.fallback_of_byte:
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        self.decode_bytes(ids)
        own = set(self.fallback_of_byte.values())
        runs = itertools.groupby((i for i in ids if self.bytes_of_token[i]), key=lambda i: i in own)
        text = "".join(decoded(self.decode_bytes(run), one_by_one=spelled) for spelled, run in runs)
        return text if self.decode_bytes(before) else text.removeprefix(self.prefix.decode())

    def check_lossless(self) -> None:
        """Raises ConfigError if some text would not survive `encode_document`: bits per byte would miss its bytes.

        A tokenizer that passes may still change a text that is not tried here; `encode_document` refuses that text.
        """
        for normalizer in normalizers_of(self._file):
            if not (self.fallback_of_byte and only_spaces(normalizer)):
                kind = normalizer.get("type")
                raise ConfigError(
                    f"the tokenizer has a normalizer, {kind}, which changes text; expected one without, to train with"
                )
        whole = self.fallback_of_byte or {b[0] for b in self.bytes_of_token if len(b) == 1}
        if missing := set(range(256)).difference(whole):
            raise ConfigError(f"the tokenizer has no token for byte {min(missing)}; expected all 256, to train with")
        for probe in (*_PROBES, *(f"a{t}b {t} \t{t}\n {t}" for t in (*self._added, *self.special_names.values()))):
            self.encode_document(probe)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_names}
        front, back = self.around  # for readers that prefer this to the post-processor of tokenizer.json
        names |= {"add_bos_token": front == (self.bos_id,), "add_eos_token": back == (self.eos_id,)}
        names["clean_up_tokenization_spaces"] = False  # true would drop spaces before punctuation on decoding
        # The names are written first: a folder that has a tokenizer.json is complete.
        write_atomically(folder / SETTINGS, (json.dumps(names, indent=2) + "\n").encode())
        write_atomically(folder / "tokenizer.json", (self._backend.to_str(pretty=True) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json, or the folder that holds one, written by `save` or by Hugging Face.

        The files beside it name the specials and what is put around a prompt; see `read_specials`.
        Raises FileNotFoundError, or ConfigError if a file is malformed or a token stands for no bytes.
        """
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"tokenizer {str(path)!r} not found: expected 'byte', 'bpe' or a tokenizer.json")
        backend = read_backend(file)
        found = read_specials(file.parent, backend)
        names = {"pad": found.pad, "bos": found.bos, "eos": found.eos}
        return cls(backend, **names, end_ids=found.end_ids, around=(found.front, found.back))

    def _ids(self, text: str) -> list[int]:
        with panics_refused():
            return self._backend.encode(text, add_special_tokens=False).ids

    def _encode_exactly(self, text: str, *, first: bool) -> np.ndarray:
        """Ids of a text, in which what a vocabulary with byte fallback would misread is spelled in bytes."""
        starts = [match.start() for match in self._misread.finditer(text)] if self.fallback_of_byte else []
        ids = self._encode_long(text, first=first)
        if not starts or (self.text_bytes(ids) if first else self.decode_bytes(ids)) == text.encode():
            return ids
        parts = [self._encode_long(text[: starts[0]], first=first)]
        for start, end in itertools.pairwise((*starts, len(text))):
            parts += [self._spelled(text[start]), self._encode_long(text[start + 1 : end], first=False)]
        return np.concatenate(parts)

    def _encode_long(self, text: str, *, first: bool) -> np.ndarray:
        """Ids of a text of any length; `first`: whether it begins a document, where the pipeline may put a space."""
        if not text:
            return np.array([], np.int32)
        if first and len(text) <= long_text.USUAL:
            return np.array(self._ids(text), np.int32)
        parts = []
        with panics_refused():
            for number, piece in enumerate(self._cutter.pieces(text)):
                backend = self._backend if first and not number else self._continuing
                parts.append(np.array(backend.encode(piece, add_special_tokens=False).ids, np.int32))
        return np.concatenate(parts)

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The pipeline for text that follows other text, before which it puts no space."""
        file = copy.deepcopy(self._file)
        file["normalizer"] = without_prefix(file["normalizer"])
        file["pre_tokenizer"] = without_prefix(file["pre_tokenizer"])
        return as_text(tokenizers.Tokenizer.from_str(json.dumps(file)))

    @cached_property
    def _marking(self) -> tokenizers.Tokenizer:
        """The pipeline that finds specials in texts."""
        return exact(tokenizers.Tokenizer.from_str(json.dumps(self._file)))

    @cached_property
    def _begins_after_specials(self) -> bool:
        return begins_after(json.dumps(self._file), self.special_names["bos_token"])

    @cached_property
    def _cutter(self) -> "long_text.Cutter":
        return long_text.Cutter(self._continuing, self.bytes_of_token, self._added)

    def _spelled(self, text: str) -> np.ndarray:
        """A text in byte tokens. Raises ConfigError if one is missing."""
        try:
            return np.array([self.fallback_of_byte[byte] for byte in text.encode()], np.int32)
        except KeyError as error:
            raise ConfigError(f"the tokenizer has no token for byte {error}; expected all 256") from None

    def _byte_table(self) -> np.ndarray | None:
        """The id of each byte (256,) int32 if every token is a byte, so that a lookup encodes; else None."""
        plain = self._file["model"].get("merges") == [] and not self.fallback_of_byte and not self._added
        split = self._file["pre_tokenizer"]
        if not plain or self._file["normalizer"] or not split or split.get("add_prefix_space", True):
            return None
        table = {b[0]: i for i, b in enumerate(self.bytes_of_token) if len(b) == 1}
        longer = int(self.byte_length_v.max()) > 1
        return None if longer or len(table) < 256 else np.array([table[byte] for byte in range(256)], np.int32)


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int, *, name: str = "ModelConfig.vocab_size") -> None:
    """Raises ConfigError, naming the field, if `vocab_size` is not the tokenizer's."""
    if vocab_size != tokenizer.vocab_size:
        raise ConfigError(f"{name} = {vocab_size}: expected {tokenizer.vocab_size}, the tokenizer's")


def check_rows(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ConfigError if a model of `vocab_size` rows lacks one for some token; released models may have more."""
    if vocab_size < tokenizer.vocab_size:
        expected = f"at least {tokenizer.vocab_size}, the size of the checkpoint's tokenizer"
        raise ConfigError(f"ModelConfig.vocab_size is {vocab_size}; expected {expected}")
