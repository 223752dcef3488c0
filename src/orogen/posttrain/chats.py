"""Conversations of a corpus: read, split, rendered and kept as token sequences."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from orogen.config.chat import EVERY, ChatConfig
from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.json_file import ListOf, Record, read_object
from orogen.data import corpora
from orogen.data.compressed import opened
from orogen.data.learned import LearnedSplit
from orogen.data.loader import ONLY, Corpus, Source
from orogen.data.packing import Stream
from orogen.data.readers import MAX_LINE_BYTES, Document, form_of
from orogen.data.sources import key_in, supported_files
from orogen.data.tokenizer import Tokenizer
from orogen.infer.chat import Chat
from orogen.infer.messages import MESSAGE, TOOL, check_messages
from orogen.infer.render import Renderer
from orogen.posttrain.conversations import ASSISTANT, Conversation, cut_short, sequences, without_reasoning

_LINE = Record({"messages": ListOf(MESSAGE)}, {"tools": (ListOf(TOOL), None)})
RENDERERS = 4  # processes that render at a time
Read = TypeVar("Read")  # what a line holds
Rendered = TypeVar("Rendered")  # what is rendered of it


class Told(NamedTuple):
    """What became of the conversations of a corpus. dropped, cut: sequences that were too long."""

    conversations: int
    sequences: int
    dropped: int
    cut: int


class ChatCorpus(Corpus):
    """A corpus of conversations. told: what became of them; template: as `Chat` takes it."""

    def __init__(self, told: Told, template: str | dict[str, str], **fields: Any):
        super().__init__(**fields)
        self.told, self.template = told, template

    def describe(self) -> dict[str, Any]:
        """As a corpus of text, with what became of the conversations."""
        return {**super().describe(), **self.told._asdict()}


def open_chats(
    data: DataConfig, chat: ChatConfig, template: str | dict[str, str], tokenizer: Tokenizer, *, length: int
) -> ChatCorpus:
    """Reads, splits and renders the conversations of a corpus, for rows of `length` tokens.

    Raises ConfigError with file and line for a malformed one, one whose assistant says nothing, what the template
    refuses, or, if the config says so, one that is too long.
    """
    found = dict(read_lines(Path(data.corpus), conversation_of))
    documents = [Document(key, conversation.text) for key, conversation in found.items()]
    split = corpora.split_documents(documents, config=data)
    render = lambda key, one, by: _sequences(key, one, chat, by, data.seed)  # noqa: E731
    rendered = rendered_each(found, render, template, tokenizer)
    fitted = {key: _fitting(streams, chat, length, key) for key, streams in rendered.items()}
    splits = {
        name: LearnedSplit([s for d in part for s in fitted[d.key].kept], tokenizer) for name, part in split.items()
    }
    for name, part in split.items():
        if part and not len(splits[name]):
            raise ConfigError(
                f"the {name} split of corpus {data.corpus!r} has no sequence of at most TrainConfig.sequence_length = "
                f"{length} tokens; expected some, or ChatConfig.too_long = 'cut'"
            )
    every = sum(map(len, rendered.values()))
    dropped, cut = sum(one.dropped for one in fitted.values()), sum(one.cut for one in fitted.values())
    told = Told(len(found), every, dropped, cut)
    source = Source(rendered_hash(documents, template), splits, data.corpus)
    return ChatCorpus(told, template, config=data, sources={ONLY: source}, tokenizer=tokenizer)


def rendered_hash(documents: Sequence[Document], template: str | dict[str, str]) -> str:
    """The hash of a corpus whose rows depend on the template too: a resumed run must have the same."""
    known = json.dumps([corpora.content_hash(documents), template], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()


def read_lines(path: Path, parse: Callable[..., Read]) -> Iterator[tuple[str, Read]]:
    """By key, what `parse(line, where=…)` makes of each line of the .jsonl files of a corpus. Raises ConfigError."""
    for file in supported_files(path):
        if (form_of(file.name) or ("",))[0] != ".jsonl":
            raise ConfigError(f"{file}: expected conversations in .jsonl files")
        with opened(file) as lines:
            number = 0
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ConfigError(f"{file}:{number} has more than {MAX_LINE_BYTES} bytes; expected a shorter line")
                if line.strip():
                    yield f"{key_in(path, file)}:{number}", parse(line, where=f"{file}:{number}")


def places_of(keys: Iterable[str], path: Path) -> list[dict[str, Any]]:
    """The place of each line that `read_lines` read from `path`: its number and, in a folder, the file's name there."""
    found = []
    for key in keys:
        file, _, number = key.rpartition(":")
        found.append(({"file": file} if path.is_dir() else {}) | {"line": int(number)})
    return found


def conversation_of(line: bytes, *, where: str) -> Conversation:
    """The conversation of a line. Raises ConfigError unless it can be learned from."""
    record = read_object(line, where=where)
    spell_arguments(record.get("messages"))
    record = read_object(json.dumps(record).encode(), _LINE, where=where)
    try:
        messages = check_messages(record["messages"])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not any(message["role"] == ASSISTANT for message in messages):
        raise ConfigError(f"{where}: no message has the role assistant; expected at least one, to learn from")
    check_said(messages, f"{where}: messages")
    return Conversation(messages, record.get("tools") or [])


def check_said(messages: Sequence[dict[str, Any]], where: str) -> None:
    """Raises ConfigError if the assistant says nothing in one of its messages."""
    for number, message in enumerate(messages):
        said = message["content"] or message.get("reasoning_content") or message.get("tool_calls")
        if message["role"] == ASSISTANT and not said:
            raise ConfigError(f"{where}[{number}] is empty; expected content, reasoning_content or tool_calls")


def spell_arguments(messages: Any) -> None:
    """Makes the arguments of calls text, as OpenAI has them; they are objects in most data sets."""
    for message in messages if isinstance(messages, list) else []:
        for call in (message.get("tool_calls") or []) if isinstance(message, dict) else []:
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
                function["arguments"] = json.dumps(function["arguments"])


def rendered_each(
    found: Mapping[str, Read],
    render: Callable[[str, Read, Chat], Rendered],
    template: str | dict[str, str],
    tokenizer: Tokenizer,
) -> dict[str, Rendered]:
    """`render(key, one, chat)` of each, by key, with RENDERERS templates at a time."""
    keys = list(found)
    parts = [keys[n::RENDERERS] for n in range(RENDERERS)]
    chats = [Chat(tokenizer, template, Renderer()) for _ in parts]

    def render_all(part: Sequence[str], chat: Chat) -> dict[str, Rendered]:
        return {key: render(key, found[key], chat) for key in part}

    try:
        with ThreadPoolExecutor(RENDERERS) as pool:
            made = {key: one for part in pool.map(render_all, parts, chats) for key, one in part.items()}
    finally:
        for one in chats:
            one.close()
    return {key: made[key] for key in keys}


def _sequences(key: str, conversation: Conversation, config: ChatConfig, chat: Chat, seed: int) -> list[Stream]:
    draw, share = np.random.default_rng([seed, *corpora.key_bytes(key)]).random(2)
    if draw < config.without_reasoning:
        conversation = without_reasoning(conversation)
    elif draw < config.without_reasoning + config.truncated:
        conversation = cut_short(conversation, share, chat)
    try:
        found = sequences(conversation, chat)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    return [_wholly(stream) for stream in found] if config.learned == EVERY else found


def _wholly(stream: Stream) -> Stream:
    """The stream whose tokens are all learned but the first, which nothing predicts."""
    weights_t = np.ones_like(stream.weights_t)
    weights_t[0] = 0
    return stream._replace(weights_t=weights_t)


class _Fitted(NamedTuple):
    """The sequences of a conversation that fit into a row, and how many were dropped, or cut to fit."""

    kept: list[Stream]
    dropped: int
    cut: int


def _fitting(streams: Sequence[Stream], config: ChatConfig, length: int, key: str) -> _Fitted:
    long = [stream for stream in streams if len(stream.tokens_t) > length]
    if long and config.too_long == "refuse":
        raise ConfigError(
            f"{key} has a sequence of {len(long[0].tokens_t)} tokens; expected at most TrainConfig.sequence_length = "
            f"{length}, or ChatConfig.too_long = 'drop' or 'cut'"
        )
    cut = config.too_long == "cut"
    fitted = [Stream(s.tokens_t[:length], s.weights_t[:length]) for s in streams if cut or len(s.tokens_t) <= length]
    kept = [stream for stream in fitted if stream.weights_t.any()]  # a cut may leave nothing to learn
    dropped = len(streams) - len(kept)
    return _Fitted(kept, dropped, len(long) - dropped if cut else 0)
