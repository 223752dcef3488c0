"""A folder's special tokens: their names, which of them end a text, and which are put around a prompt."""

from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import read_json
from orogen.data.panics import panics_refused

PAD, BOS, EOS = SPECIALS = ("<pad>", "<bos>", "<eos>")  # ids 0, 1, 2 of our own tokenizers
SETTINGS = "tokenizer_config.json"


class Specials(NamedTuple):
    """Names of the specials; ids that end a text besides `eos`; ids before and after the text of a prompt."""

    pad: str
    bos: str
    eos: str
    end_ids: tuple[int, ...]
    front: tuple[int, ...]
    back: tuple[int, ...]


def read_specials(folder: Path, backend: tokenizers.Tokenizer) -> Specials:
    """The specials of the tokenizer in `folder`.

    Names come from tokenizer_config.json and special_tokens_map.json (which has precedence, unless the former lists
    `added_tokens_decoder`, as in transformers); else from ids in generation_config.json and config.json; else they are
    `<pad>`, `<bos>`, `<eos>`. A tokenizer without bos or pad uses its eos instead: neither is ever predicted.
    Raises ConfigError for files that are not JSON objects, names that are not strings, and malformed ids.
    """
    settings = _read_object(folder / SETTINGS)
    named = _named(folder, settings)
    ids = _model_ids(folder)
    names = {role: named[role] or _name_of(ids[role], role, backend) for role in named}
    stated = (folder / SETTINGS).is_file() or any(names.values())
    if not stated:
        names = {"pad": PAD, "bos": BOS, "eos": EOS}
    if names["eos"] is None:
        raise ConfigError(f"{folder / SETTINGS}: eos_token is None: expected the name of a token")
    filled = {role: name if name is not None else names["eos"] for role, name in names.items()}
    front, back = _around(settings, named, backend)
    return Specials(**filled, end_ids=tuple(ids["eos"]), front=front, back=back)


def _named(folder: Path, settings: dict[str, Any]) -> dict[str, str | None]:
    file = folder / "special_tokens_map.json"
    others = _read_object(file)
    sources = [(file, others), (folder / SETTINGS, settings)]
    if "added_tokens_decoder" in settings:
        sources.reverse()
    return {role: _first_name(role, sources) for role in ("pad", "bos", "eos")}


def _first_name(role: str, sources: list[tuple[Path, dict[str, Any]]]) -> str | None:
    for file, settings in sources:
        name = settings.get(f"{role}_token")
        # Hugging Face writes a special either as its text or as {"content": text, ...}.
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"{file}: {role}_token is {shown(name)}: expected the name of a token")
        if name is not None:
            return name
    return None


def _around(
    settings: dict[str, Any], named: dict[str, str | None], backend: tokenizers.Tokenizer
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that are put before and after a text. The post-processor decides, as in transformers 5.23, which ignores
    add_bos_token and add_eos_token for any tokenizer.json; here they decide if there is no post-processor."""
    if backend.post_processor is not None:
        return ids_around(backend)
    chosen = [named[role] if settings.get(f"add_{role}_token") else None for role in ("bos", "eos")]
    front, back = (() if name is None else (special_id(backend, name),) for name in chosen)
    return front, back


def ids_around(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a tokenizer's post-processor puts before and after a text. Raises ConfigError if it does more."""
    if backend.post_processor is None:
        return (), ()
    with panics_refused("a post-processor that puts ids around a text"):
        text = backend.encode("a", add_special_tokens=False).ids
        whole = backend.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), None)
    if start is None or not text:
        raise ConfigError(f"the tokenizer's post-processor turns the ids {text} into {whole}; expected ids around them")
    return tuple(whole[:start]), tuple(whole[start + len(text) :])


def _model_ids(folder: Path) -> dict[str, list[int]]:
    """The ids of each role that the model's own files give, in order and once each."""
    # An Orogen checkpoint or a run keeps the tokenizer in a folder of its own, and the model's files above it.
    above = folder.parent if folder.name == "tokenizer" else folder
    kept = _read_object(above / "huggingface.json").get("config")
    sources = [
        (above / "generation_config.json", _read_object(above / "generation_config.json")),
        (above / "config.json", _read_object(above / "config.json")),
        (above / "huggingface.json", kept if isinstance(kept, dict) else {}),
    ]
    found: dict[str, list[int]] = {}
    for role in ("pad", "bos", "eos"):
        ids: dict[int, None] = {}
        for file, settings in sources:
            ids |= dict.fromkeys(_ids(settings.get(f"{role}_token_id"), role, file))
        found[role] = list(ids)
    return found


def _ids(value: Any, role: str, file: Path) -> list[int]:
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in listed):
        raise ConfigError(f"{file}: {role}_token_id is {shown(value)}: expected a token's id, or a list of them")
    return [i for i in listed if i >= 0]  # some configs say -1 for none


def _name_of(ids: list[int], role: str, backend: tokenizers.Tokenizer) -> str | None:
    named = (backend.id_to_token(i) for i in ids if i < 2**32)
    return next((name for name in named if name is not None), None)


def special_id(backend: tokenizers.Tokenizer, name: str) -> int:
    """The id of the token `name`. Raises ConfigError if there is none."""
    token_id = backend.token_to_id(name)
    if token_id is None:
        raise ConfigError(f"the tokenizer has no token {name!r}: expected it, or other names in {SETTINGS}")
    return token_id


def begins_after(file: str, name: str) -> bool:
    """Whether a tokenizer, given as its file's text, encodes what follows the special `name` like the beginning of a
    text: some pipelines put a space before both, others only before the latter."""
    with panics_refused("a text after a special token"):
        backend = tokenizers.Tokenizer.from_str(file)  # a separate one, which finds specials in texts
        after, first = (backend.encode(text, add_special_tokens=False).ids for text in (f"{name}a", "a"))
    return after[1:] == first


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    return read_json(file) if file.is_file() else {}
