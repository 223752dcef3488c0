"""A conversation in a terminal: what is typed is answered at once, token by token."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TextIO

from orogen.config.checks import ConfigError
from orogen.config.streams import say
from orogen.infer.batch import Stepped
from orogen.infer.lines import request_of
from orogen.infer.request import CANCELLED, ERROR, SEEDS, held_back

NEW = "/new"  # a line that begins another conversation
_CONTROLS = {*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")}
_PICTURES = {c: chr(0x2400 + c) if c < 0x20 else "\u2421" if c == 0x7F else "\ufffd" for c in _CONTROLS}
HINT = f"Ctrl-C ends an answer, and then the program; {NEW} forgets what was said; Ctrl-D ends"


class Cancelling(Stepped, Protocol):
    """What a conversation needs of an engine."""

    @property
    def length(self) -> int:
        """The most tokens of a prompt and its answer."""
        ...

    def cancel(self, number: int) -> None:
        """Ends a request."""
        ...


class Words(NamedTuple):
    """How texts become prompts. encode: the ids of a text to continue. render: those of a chat's messages, each with a
    role and a content; None without a chat template: every line is then continued by itself. fields: of each request
    besides the user's, which the template needs. end_ids: tokens that end a text."""

    encode: Callable[[str], Sequence[int]]
    render: Callable[[list[dict[str, str]]], Sequence[int]] | None = None
    fields: Mapping[str, Any] = {}
    end_ids: Iterable[int] = ()


class Answer(NamedTuple):
    """What came of one question. seconds: until the first tokens, and until the last."""

    text: str
    tokens: int
    finish: str
    error: str | None
    seconds: tuple[float, float]
    first: int

    @property
    def summary(self) -> str:
        """One line for people. The rate is of decoding: of what came after the first tokens, and their time."""
        begun, ended = self.seconds
        counted, spent = self.tokens - self.first, ended - begun
        rate = f", {counted / spent:.1f} tokens/s" if counted and spent > 0 else ""
        return f"[{self.tokens} tokens{rate}, first after {begun:.2f} s; {self.finish}]"


def converse(engine: Cancelling, words: Words, fields: Mapping[str, Any], *, source: TextIO, out: TextIO) -> int:
    """Answers the lines of `source` on `out` until it ends, and says on stderr how fast. Returns the exit status.

    fields: of the requests, by name; `max_tokens` None: as many as there is room for. Answer i is drawn with the seed
    plus i. What cannot be answered is said, and the conversation goes on without it. Ctrl-C at the prompt, or a second
    time during one answer, raises KeyboardInterrupt.
    """
    say(f"orogen: {HINT}")
    messages: list[dict[str, str]] = []
    seed = fields.get("seed") or 0
    for line in _typed(source, out):
        if line.strip() == NEW:
            messages.clear()
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            prompt = words.encode(line) if words.render is None else words.render(asked)
            room = engine.length - len(prompt)
            if room < 1:
                raise ConfigError(f"{len(prompt)} tokens so far; expected fewer than {engine.length}: try {NEW}")
            most = {"max_tokens": fields.get("max_tokens") or room, "seed": seed}
            request = held_back(request_of(prompt, {**fields, **words.fields, **most}), words.end_ids)
            number = engine.submit(request)
        except ConfigError as error:
            say(f"orogen: {error}")
            continue
        answer = _answer(engine, number, out)
        seed = (seed + 1) % SEEDS
        messages[:] = [*asked, {"role": "assistant", "content": answer.text}]
        say(f"orogen: {answer.error}" if answer.finish == ERROR else answer.summary)
    return 0


def _typed(source: TextIO, out: TextIO) -> Iterator[str]:
    """The lines that are not blank."""
    asks = source.isatty()
    if asks and source is sys.stdin:
        import readline  # noqa: F401  edits what `input` reads
    while True:
        try:
            line = input(">>> ") if asks and source is sys.stdin else next(source).rstrip("\n")
        except (EOFError, StopIteration):
            if asks:
                print(file=out)
            return
        if line.strip():
            yield line


def _answer(engine: Cancelling, number: int, out: TextIO) -> Answer:
    """The answer to a request, printed as it comes; Ctrl-C cancels it."""
    began = time.perf_counter()
    texts, tokens, first, begun = [], 0, 0, 0.0
    finish, error = None, None
    with _interrupts() as interrupted:
        while finish is None:
            if interrupted():
                engine.cancel(number)
            for output in engine.step():
                if output.tokens and not tokens:
                    first, begun = len(output.tokens), time.perf_counter() - began
                tokens += len(output.tokens)
                texts.append(output.text)
                print(_shown(output.text) if out.isatty() else output.text, end="", file=out, flush=True)
                finish, error = output.finish, output.error
    print(file=out, flush=True)
    if finish == CANCELLED:
        finish = "interrupted"
    return Answer("".join(texts), tokens, finish, error, (begun, time.perf_counter() - began), first)


def _shown(text: str) -> str:
    """The text with pictures of control characters, by which a model could command the terminal."""
    return text.translate(_PICTURES)


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed. It interrupts nothing by itself: a call of a program that is cut short would lose the
    caches that it was given. The second one does, as the program ends with it."""
    count = 0

    def pressed(*_: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, pressed)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)
