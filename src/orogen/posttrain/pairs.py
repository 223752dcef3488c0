"""Pairs of answers of a corpus: read, split, rendered and kept as token sequences.

A line of a .jsonl file is one of:

    {"prompt": …, "chosen": …, "rejected": …}            without "prompt": "context" or "messages" in its place
    {"chosen": [message, …], "rejected": [message, …]}   two conversations that begin alike: that is the prompt
    {"prompt": …, "completions": [{"rank": 0, "completion": …}, {"rank": 1, "completion": …}]}    the lower is preferred

each with "tools" if there are any. A prompt is a list of OpenAI's messages, or the text of a user's; an answer is a
text, a message or a list of messages of the assistant and of tools, which may repeat the prompt before them.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.json_file import ListOf, Number, Record, check_form, read_object
from orogen.config.preference import PreferenceConfig
from orogen.data import corpora
from orogen.data.loader import ONLY, Corpus, Source
from orogen.data.packing import Stream
from orogen.data.readers import Document
from orogen.data.tokenizer import Tokenizer
from orogen.infer.chat import Chat
from orogen.infer.messages import MESSAGE, TOOL, check_messages
from orogen.posttrain.chats import check_said, read_lines, rendered_each, rendered_hash, spell_arguments
from orogen.posttrain.conversations import ASSISTANT, USER, Conversation, answer

PROMPTS = ("prompt", "context", "messages")  # the first of them that a line has
TOOL_ROLE = "tool"
_SIDE = (str, MESSAGE, ListOf(MESSAGE))
_COMPLETION = Record({"rank": Number(), "completion": _SIDE})
_LINE = Record(
    {},
    dict.fromkeys(PROMPTS, (str, ListOf(MESSAGE), None))
    | {"chosen": _SIDE, "rejected": _SIDE, "completions": ListOf(_COMPLETION), "tools": (ListOf(TOOL), None)},
)


class Compared(NamedTuple):
    """Two conversations that begin with the same `prompt` messages."""

    chosen: Conversation
    rejected: Conversation
    prompt: int


class Pair(NamedTuple):
    """Two sequences, each of a prompt and the answer that is learned."""

    chosen: Stream
    rejected: Stream

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.chosen.tokens_t) + len(self.rejected.tokens_t)


class Told(NamedTuple):
    """What became of the pairs of a corpus. dropped: too long; equal: both answers are the same tokens, so there is
    nothing to prefer."""

    pairs: int
    dropped: int
    equal: int


class PairSplit(Sequence[Stream]):
    """The answers of a split, in the order of its pairs: the chosen one, then the rejected one."""

    def __init__(self, pairs: Sequence[Pair], tokenizer: Tokenizer):
        self.pairs, self._tokenizer = pairs, tokenizer

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    def __getitem__(self, index: SupportsIndex) -> Stream:  # type: ignore[override]  # grain indexes by number only
        number = int(index)
        return self.pairs[number // 2][number % 2]

    @property
    def byte_count(self) -> int:
        """UTF-8 bytes of all answers."""
        return sum(len(text) for text in self.texts())

    @property
    def token_count(self) -> int:
        """Tokens of all sequences."""
        return sum(pair.length for pair in self.pairs)

    def texts(self) -> Iterator[bytes]:
        """The text of each answer, in UTF-8."""
        for stream in self:
            yield self._tokenizer.decode_bytes(stream.tokens_t[stream.weights_t > 0])


class PairCorpus(Corpus):
    """A corpus of pairs. told: what became of them; template: as `Chat` takes it; pairs: by split."""

    def __init__(self, told: Told, template: str | dict[str, str], pairs: Mapping[str, Sequence[Pair]], **fields: Any):
        super().__init__(**fields)
        self.told, self.template, self.pairs = told, template, pairs

    def describe(self) -> dict[str, Any]:
        """As a corpus of text, with what became of the pairs."""
        return {**super().describe(), **self.told._asdict()}


def open_pairs(
    data: DataConfig, config: PreferenceConfig, template: str | dict[str, str], tokenizer: Tokenizer, *, length: int
) -> PairCorpus:
    """Reads, splits and renders the pairs of a corpus, for rows of `length` tokens.

    Raises ConfigError with file and line for a malformed one, for an empty answer, for what the template refuses or, if
    the config says so, for a pair that is too long.
    """
    found = dict(read_lines(Path(data.corpus), _compared))
    documents = [Document(key, f"{one.chosen.text}\n{one.rejected.text}") for key, one in found.items()]
    split = corpora.split_documents(documents, config=data)
    rendered = rendered_each(found, _rendered, template, tokenizer)
    equal = {key for key, pair in rendered.items() if pair.chosen.tokens_t.tolist() == pair.rejected.tokens_t.tolist()}
    long = {key for key, pair in rendered.items() if pair.length > length} - equal
    if long and config.too_long == "refuse":
        first = next(key for key in rendered if key in long)
        raise ConfigError(
            f"{first} has two sequences of {rendered[first].length} tokens; expected at most "
            f"TrainConfig.sequence_length = {length}, or PreferenceConfig.too_long = 'drop'"
        )
    kept = {name: [rendered[d.key] for d in part if d.key not in equal | long] for name, part in split.items()}
    for name, part in split.items():
        if part and not kept[name]:
            raise ConfigError(
                f"the {name} split of corpus {data.corpus!r} has no pair of two answers of at most "
                f"TrainConfig.sequence_length = {length} tokens together; expected some"
            )
    splits = {name: PairSplit(pairs, tokenizer) for name, pairs in kept.items()}
    told = Told(len(found), len(long), len(equal))
    source = Source(rendered_hash(documents, template), splits, data.corpus)
    return PairCorpus(told, template, kept, config=data, sources={ONLY: source}, tokenizer=tokenizer)


def _rendered(key: str, one: Compared, chat: Chat) -> Pair:
    try:
        return Pair(*(answer(side, one.prompt, chat) for side in (one.chosen, one.rejected)))
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _compared(line: bytes, *, where: str) -> Compared:
    """Raises ConfigError unless the line holds a pair that can be learned from."""
    record = read_object(line, where=where)
    completions = record.get("completions")  # not checked yet
    listed = completions if isinstance(completions, list) else []
    ranked = [one.get("completion") for one in listed if isinstance(one, dict)]
    for value in (*(record.get(name) for name in (*PROMPTS, "chosen", "rejected")), *ranked):
        spell_arguments([value] if isinstance(value, dict) else value)
    check_form(record, _LINE, where=where)
    prompt, sides = _prompt(record), _sides(record, where)
    if prompt is None:
        prompt = _common(*sides, where=where)
    sides = [side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in sides]
    tools, before = record.get("tools") or [], _asked(prompt, where)
    after = [_answer(side, f"{where}: {name}") for side, name in zip(sides, ("chosen", "rejected"), strict=True)]
    return Compared(*(Conversation([*before, *side], tools) for side in after), prompt=len(before))


def prompt_of(line: bytes, *, where: str) -> Conversation:
    """The conversation of a line that has a prompt alone, to be answered. Raises ConfigError."""
    record = read_object(line, where=where)
    for name in PROMPTS:
        spell_arguments(record.get(name))
    check_form(record, _LINE, where=where)
    messages = _prompt(record)
    if messages is None:
        raise ConfigError(f"{where}: it has no prompt; expected one of {', '.join(PROMPTS)}")
    return Conversation(_asked(messages, where), record.get("tools") or [])


def _asked(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The messages of a prompt. Raises ConfigError."""
    checked = _checked(messages, f"{where}: prompt")
    if checked[-1]["role"] == ASSISTANT:
        raise ConfigError(f"{where}: the prompt ends with the assistant; expected the user or a tool, who are answered")
    return checked


def _prompt(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The messages of the prompt; None if there are none beside the answers."""
    value = next((record[name] for name in PROMPTS if record.get(name) is not None), None)
    return [{"role": USER, "content": value}] if isinstance(value, str) else value


def _sides(record: Mapping[str, Any], where: str) -> list[list[dict[str, Any]]]:
    """The messages of the chosen and of the rejected answer."""
    completions = record.get("completions")
    if completions is not None:
        ranks = {one["rank"] for one in completions}
        if len(completions) != 2 or len(ranks) != 2 or {"chosen", "rejected"} & record.keys():
            expected = "two of different ranks, without chosen and rejected beside them"
            raise ConfigError(f"{where}: it has {len(completions)} completions; expected {expected}")
        values = [one["completion"] for one in sorted(completions, key=lambda one: one["rank"])]
    else:
        missing = [name for name in ("chosen", "rejected") if name not in record]
        if missing:
            raise ConfigError(f"{where}: {missing[0]} is missing; expected a text or messages")
        values = [record["chosen"], record["rejected"]]
    return [_messages(value) for value in values]


def _messages(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": ASSISTANT, "content": value}]
    return [value] if isinstance(value, dict) else value


def _common(one: list[dict[str, Any]], other: list[dict[str, Any]], *, where: str) -> list[dict[str, Any]]:
    """The messages with which both begin, less those of the assistant at their end."""
    count = 0
    while count < min(len(one), len(other)) - 1 and one[count] == other[count]:
        count += 1
    while count and one[count - 1].get("role") == ASSISTANT:
        count -= 1
    if not count:
        raise ConfigError(f"{where}: there is no prompt, and chosen and rejected do not begin alike; expected one")
    return one[:count]


def _answer(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The messages of an answer. Raises ConfigError."""
    checked = _checked(messages, where)
    roles = [message["role"] for message in checked]
    if roles[0] != ASSISTANT or roles[-1] != ASSISTANT or set(roles) - {ASSISTANT, TOOL_ROLE}:
        expected = "those of the assistant, first and last, and of tools between"
        raise ConfigError(f"{where} has messages of {', '.join(roles)}; expected {expected}")
    check_said(checked, where)
    return checked


def _checked(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The messages as templates expect them. Raises ConfigError."""
    try:
        return check_messages(messages)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
