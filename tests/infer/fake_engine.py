"""An engine without a model: what it answers follows from the request alone, with faults on demand.

A request's tokens are its prompt's, repeated, or `script` by its prompt; text is what `decode` makes of them.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

from orogen.config.checks import ConfigError
from orogen.infer.request import ERROR, LENGTH, STOP, Chosen, Full, Output, Request


@dataclasses.dataclass
class Running:
    """A request and how many of its tokens are out."""

    request: Request
    answer: list[int]
    done: int = 0
    said: int = 0  # characters


class FakeEngine:
    """Slots and a queue as an engine has them.

    script: the answer to a prompt, ending with `end` if it is to end before `max_tokens`; None: the prompt, repeated.
    pace: tokens per request and step. wait: seconds per step. A prompt that begins with `fails` ends with an error, one
    that begins with `breaks` makes the step raise. cached: tokens of each prompt that a prefix cache has.
    """

    def __init__(
        self,
        *,
        slots: int = 4,
        queue: int = 8,
        most: int = 64,
        vocab: int = 1000,
        end: int = 2,
        decode: Callable[[Request, Sequence[int]], str] = lambda request, ids: "",
        script: Callable[[Request], Sequence[int] | None] = lambda request: None,
        pace: int = 1,
        wait: float = 0.0,
        fails: int = -1,
        breaks: int = -1,
        logprob: Callable[[int], float] = lambda token: -0.5,
        cached: int = 0,
    ):
        self.logprob, self.cached = logprob, cached
        self.slots, self.queue, self.most, self.vocab, self.end = slots, queue, most, vocab, end
        self.decode, self.script, self.pace, self.wait, self.fails, self.breaks = (
            decode,
            script,
            pace,
            wait,
            fails,
            breaks,
        )
        self.waiting: dict[int, Running] = {}
        self.running: dict[int, Running] = {}
        self.seen: list[Request] = []
        self.salts: list[str] = []
        self.cancelled: list[int] = []
        self._next = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, request: Request, *, salt: str = "") -> int:
        if len(request.prompt) + request.max_tokens > self.most:
            whole = f"{len(request.prompt)} prompt tokens and {request.max_tokens} new ones"
            raise ConfigError(f"{whole}; expected at most {self.most}")
        if max(request.prompt) >= self.vocab:
            raise ConfigError(f"token id {max(request.prompt)}; expected 0 to {self.vocab - 1}")
        if len(self.waiting) >= self.queue:
            raise Full(f"{len(self.waiting)} requests wait; expected at most {self.queue}")
        self._next += 1
        answer = self.script(request)
        if answer is None:
            answer = [request.prompt[i % len(request.prompt)] for i in range(request.max_tokens)]
        self.waiting[self._next] = Running(request, list(answer))
        self.seen.append(request)
        self.salts.append(salt)
        return self._next

    def cancel(self, number: int) -> None:
        if self.waiting.pop(number, None) or self.running.pop(number, None):
            self.cancelled.append(number)

    def step(self) -> list[Output]:
        time.sleep(self.wait)
        for number in list(self.waiting)[: self.slots - len(self.running)]:
            self.running[number] = self.waiting.pop(number)
        return [self._advance(number, one) for number, one in list(self.running.items())]

    def _advance(self, number: int, one: Running) -> Output:
        request = one.request
        if request.prompt[0] == self.breaks:
            raise RuntimeError("the device is gone")
        if request.prompt[0] == self.fails:
            del self.running[number]
            return Output(number, finish=ERROR, error="the logits of this request are not finite")
        ids = one.answer[one.done : one.done + self.pace][: request.max_tokens - one.done]
        cached, prompt = (None, ()) if one.done else (self.cached, self._scored(request))
        one.done += len(ids)
        text = self.decode(request, one.answer[: one.done])
        finish = stopped = None
        if ids and (ids[-1] == self.end or ids[-1] in request.stop_ids) and not request.ignore_eos:
            finish = STOP
        elif one.done >= request.max_tokens or one.done >= len(one.answer):
            finish = LENGTH
        for stop in request.stop:
            if stop in text:
                text, finish, stopped = text[: text.index(stop)], STOP, stop
        if finish:
            del self.running[number]
        else:  # half a character waits, and what may begin a stop string
            text = text.rstrip("\ufffd")
            text = text[: len(text) - max((len(stop) - 1 for stop in request.stop), default=0)]
        new, one.said = text[one.said :], max(one.said, len(text))
        top = tuple((i, -float(i + 1)) for i in range(request.logprobs or 0))
        chosen = tuple(Chosen(i, None if request.logprobs is None else self.logprob(i), top) for i in ids)
        return Output(number, chosen, new, finish, stop=stopped, cached=cached, prompt=prompt)

    def _scored(self, request: Request) -> tuple[Chosen, ...]:
        if request.prompt_logprobs is None:
            return ()
        top = tuple((i, -float(i + 1)) for i in range(request.prompt_logprobs))
        return tuple(Chosen(i, self.logprob(i), top) for i in request.prompt[1:])
