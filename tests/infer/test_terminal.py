"""A conversation in a terminal, with an engine that answers by rote."""

import io
import re
import signal

import pytest

from orogen.config.checks import ConfigError
from orogen.infer.request import CANCELLED, ERROR, LENGTH, Chosen, Output, Request
from orogen.infer.terminal import Words, converse


class Rote:
    """Answers with the prompt's ids as letters, `pace` per step, after `before(step)`; see `Stepped`."""

    def __init__(self, *, length: int = 32, pace: int = 2, before=lambda step: None, fails: bool = False):
        self.length, self.pace, self.before, self.fails = length, pace, before, fails
        self.seen: list[Request] = []
        self.steps = 0
        self.done: int | None = None
        self.cancelled = False

    @property
    def busy(self) -> bool:
        return self.done is not None

    def submit(self, request: Request) -> int:
        if request.prompt[0] == 0:
            raise ConfigError("token id 0; expected others")
        self.seen.append(request)
        self.done, self.cancelled = 0, False
        return len(self.seen)

    def cancel(self, number: int) -> None:
        self.cancelled = True

    def step(self) -> list[Output]:
        self.steps += 1
        self.before(self.steps)
        request, number = self.seen[-1], len(self.seen)
        if self.cancelled:
            return [Output(number, text="!", finish=CANCELLED)]
        ids = [request.prompt[i % len(request.prompt)] for i in range(self.done, self.done + self.pace)]
        ids = ids[: request.max_tokens - self.done]
        self.done += len(ids)
        ended = self.done == request.max_tokens
        finish = ERROR if self.fails else LENGTH if ended else None
        error = "the logits are not numbers" if self.fails else None
        return [Output(number, tuple(map(Chosen, ids)), "".join(map(chr, ids)), finish, error)]


def encode(text: str) -> list[int]:
    return [ord(c) for c in text if c != "0"] or [0]


def talk(engine, typed: str, words: Words, **fields) -> str:
    out = io.StringIO()
    assert converse(engine, words, {"max_tokens": 5, "seed": 3} | fields, source=io.StringIO(typed), out=out) == 0
    return out.getvalue()


def test_lines_are_continued_each_by_itself_without_a_template(capsys):
    engine = Rote()
    assert talk(engine, "abc\n\n  \nxy\n", Words(encode), temperature=0.5) == "abcab\nxyxyx\n"
    assert [r.prompt for r in engine.seen] == [tuple(map(ord, "abc")), tuple(map(ord, "xy"))]
    assert [(r.sampling.seed, r.sampling.temperature) for r in engine.seen] == [(3, 0.5), (4, 0.5)]
    hint, *said = capsys.readouterr().err.splitlines()
    assert "Ctrl-C" in hint and len(said) == 2
    # Two tokens came first, and three after them.
    assert all(re.fullmatch(r"\[5 tokens, [\d.]+ tokens/s, first after \d\.\d\d s; length\]", line) for line in said)


def test_a_template_is_given_all_that_was_said_until_it_is_forgotten():
    asked = []

    def render(messages):
        asked.append([(m["role"], m["content"]) for m in messages])
        return encode(messages[-1]["content"])

    engine = Rote()
    talk(engine, "ab\ncd\n/new\nef\n", Words(encode, render, {"shown": (7,)}), max_tokens=2)
    first = [("user", "ab")]
    assert asked == [first, [*first, ("assistant", "ab"), ("user", "cd")], [("user", "ef")]]
    assert engine.seen[0].shown == (7,)


def test_a_model_cannot_command_the_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    words = Words(lambda text: [*map(ord, "a\x1b[2J\x07\x7f\x9b\té\n")])
    converse(Rote(), words, {"max_tokens": 11, "seed": 0}, source=io.StringIO("x\n"), out=out)
    assert out.getvalue() == "a␛[2J␇␡\ufffd\té\n\n"


def test_without_a_limit_an_answer_has_the_room_that_there_is(capsys):
    engine = Rote(length=9)
    assert talk(engine, "abcd\nabcdefghi\nab\n", Words(encode), max_tokens=None) == "abcda\nabababa\n"
    assert "9 tokens so far; expected fewer than 9: try /new" in capsys.readouterr().err


def test_what_cannot_be_answered_is_said_and_forgotten(capsys):
    asked = []
    words = Words(encode, lambda messages: asked.append(len(messages)) or encode(messages[-1]["content"]))
    assert talk(Rote(), "0\nab\n", words) == "ababa\n"
    assert "orogen: token id 0; expected others\n" in capsys.readouterr().err
    assert asked == [1, 1]
    talk(Rote(fails=True), "ab\n", words)
    assert "orogen: the logits are not numbers\n" in capsys.readouterr().err


def test_an_interrupt_ends_the_answer_and_a_second_one_the_program(capsys):
    before = signal.getsignal(signal.SIGINT)

    def interrupt(*steps):
        return lambda step: signal.raise_signal(signal.SIGINT) if step in steps else None

    engine = Rote(before=interrupt(2))
    assert talk(engine, "abc\nxy\n", Words(encode)) == "abca!\nxyxyx\n", "what is held back is shown"
    assert "[4 tokens" in (said := capsys.readouterr().err) and "; interrupted]" in said
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        talk(Rote(before=lambda step: [signal.raise_signal(signal.SIGINT) for _ in range(2)]), "abc\n", Words(encode))
    assert signal.getsignal(signal.SIGINT) is before
