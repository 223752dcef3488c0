"""The `tokenizers` library's own object: read from a file, and set to encode exactly."""

from pathlib import Path

import tokenizers
from tokenizers import models

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import ListOf, MapOf, Record, Whole, read_json
from orogen.data.panics import panics_refused
from orogen.data.token_bytes import MAX_TOKENS

TOKEN_ID = Whole(0, MAX_TOKENS - 1)
MODEL_FORM = Record({}, {"vocab": (MapOf(TOKEN_ID), list)})
TOKENIZER_FORM = Record(
    {"model": MODEL_FORM}, {"added_tokens": (ListOf(Record({"id": TOKEN_ID, "content": str})), None)}
)


def exact(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The backend without truncation, padding and random tokenisation, which a file may request."""
    backend.no_truncation()
    backend.no_padding()
    if isinstance(backend.model, models.BPE):
        backend.model.dropout = None
    return backend


def as_text(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The backend set to encode what spells a special token as text."""
    backend.encode_special_tokens = True
    return backend


def read_backend(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a file. Raises ConfigError.

    It is made from the file's bytes, since tokenizers accepts only UTF-8 names of files. A file that would make it
    panic or exhaust memory is refused first.
    """
    expected = "expected a Hugging Face tokenizer.json"
    try:
        model = read_json(file, TOKENIZER_FORM)["model"]
        if prefix := model.get("continuing_subword_prefix"):  # tokenizers panics at a merge that is shorter
            raise ConfigError(f"{file}: continuing_subword_prefix is {shown(prefix)}; expected none")
        with panics_refused(f"{file} to be a tokenizer that it can use"):
            return exact(tokenizers.Tokenizer.from_buffer(file.read_bytes()))
    except ConfigError as error:
        raise ConfigError(f"{error}: {expected}") from None
    except Exception as error:  # tokenizers raises bare Exception for every malformed file
        raise ConfigError(f"{file}: {error}: {expected}") from error


def first_difference(text: str, found: str) -> tuple[str, str]:
    """A few characters of both texts around the first that differs."""
    pairs = zip(text, found, strict=False)
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(found)))
    around = slice(max(0, start - 4), start + 8)
    return text[around], found[around]
