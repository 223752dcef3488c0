"""What every route needs: the server's parts, requests handed to the engine, answers streamed, clients that vanish."""

import asyncio
import dataclasses
import functools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from orogen.config.checks import ConfigError, shown
from orogen.data.tokenizer import Tokenizer
from orogen.infer.chat import THOUGHT, Chat
from orogen.infer.constrain import Compiled
from orogen.infer.request import CANCELLED, ERROR, Chosen, Full, Output, Request
from orogen.infer.serve.errors import HttpError, bad, closed, full
from orogen.infer.serve.events import PLAIN, Events, Framing, ended, vanished
from orogen.infer.serve.grammars import Grammars
from orogen.infer.serve.measures import Measures
from orogen.infer.serve.preparing import Preparing, Reservation
from orogen.infer.service import ClosedError, Service, Stream
from orogen.infer.sight import Sees

T = TypeVar("T")
_THOUGHT = THOUGHT.encode()
LEAST_LOGPROB = -9999.0  # vLLM's, in place of -infinity, which JSON has not
LARGE = 1000  # tokens of an answer that is written in a thread, since the event loop would be late for all streams
GONE = 499  # nginx's status for a client that closed the connection; nobody reads it


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server goes by. name: of its model. most: tokens of a prompt and its answer. key: of clients, None for
    none. timeout: seconds per request, and for what is done before the engine has it. most_body: bytes. priorities:
    whether clients may say which requests go first."""

    name: str
    most: int
    key: str | None = None
    timeout: float = 600.0
    most_body: int = 8 * 2**20
    priorities: bool = False


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the routes share. sees: what answers chats with images (`infer/sight.py`), None where nothing does.
    instance: random, so that clients notice another process in this one's place, which has other weights."""

    service: Service
    settings: Settings
    tokenizer: Tokenizer | None
    chat: Chat | None
    measures: Measures
    grammars: Grammars | None = None
    weights: Any = None  # `weights.Weights`, which loads other ones
    sees: Sees | None = None
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))
    instance: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))

    @functools.cached_property
    def preparing(self) -> Preparing:
        """What is done before the engine has a request; as many may be there as the engine may have."""
        return Preparing(self.service, seconds=self.settings.timeout)

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        return frozenset() if self.tokenizer is None else self.tokenizer.end_ids

    def check_body(self, body: dict[str, Any]) -> None:
        """Raises HttpError for a body that this server takes from nobody."""
        self.check_model(body)
        if (priority := body.get("priority", 0)) and not self.settings.priorities:
            raise bad(f"priority is {priority}; expected 0, or a server with --priorities")

    def check_model(self, body: dict[str, Any]) -> None:
        """Raises HttpError unless the body names this server's model, or none."""
        if (name := body.get("model", self.settings.name)) != self.settings.name:
            message = f"the model {shown(name)} does not exist; expected {self.settings.name!r}"
            raise HttpError(404, message, code="model_not_found")

    def check_length(self, prompt: int, new: int) -> None:
        """Raises HttpError if so many tokens of a prompt and its answer can never run."""
        if prompt + new > self.settings.most:
            expected = f"expected at most {self.settings.most} in all"
            raise HttpError(
                400, f"a prompt of {prompt} tokens and {new} new ones; {expected}", code="context_length_exceeded"
            )

    def need_tokenizer(self, use: str) -> Tokenizer:
        """The tokenizer. Raises HttpError if there is none."""
        if self.tokenizer is None:
            raise bad(f"{use}; expected token ids, for the model has no tokenizer")
        return self.tokenizer

    def need_chat(self) -> Chat:
        """The chat. Raises HttpError if there is none."""
        if self.chat is None:
            raise bad("the model has no chat template; expected /v1/completions, or a server with --chat_template")
        return self.chat


class Answers:
    """The outputs of several requests, each with the number of its request, until all have ended.

    Use as an asynchronous context manager, which hands the requests over and, at its end, cancels what still runs. The
    requests run together or not at all. salt: requests of different ones share no cached prefix. since: when they
    arrived, by `time.perf_counter`. reserved: their room while they were prepared, held until the engine has them.
    size: of what was answered, in tokens, likely ones that are reported included.
    Raises HttpError for what the engine or the service refuses.
    """

    def __init__(
        self, parts: Parts, requests: Sequence[Request], *, salt: str, since: float, reserved: Reservation
    ) -> None:
        self._parts, self._requests, self._salt, self._since = parts, requests, salt, since
        self._reserved = reserved
        self._grammars: list[Compiled] = []  # held until the engine has made matchers of them
        self.size = 0
        self._arrived: asyncio.Queue[Output] = asyncio.Queue()
        self._streams: list[Stream] = []
        self._place: dict[int, int] = {}
        self._begun: set[int] = set()
        self._left = len(requests)

    async def __aenter__(self) -> "Answers":
        if self._left > (most := self._parts.service.limit):  # to try again would be in vain
            raise bad(
                f"n, over all prompts, asks for {self._left} answers; expected {most} at most, all that can be open"
            )
        self._last = [self._since] * len(self._requests)
        self._parts.measures.waiting.inc(self._left)
        try:
            await self._prepare_grammars()
            taken = await asyncio.gather(*map(self._submit, range(len(self._requests))), return_exceptions=True)
            self._grammars.clear()
            if errors := [one for one in taken if one is not None]:
                raise errors[0]
        except BaseException as error:
            self._parts.measures.waiting.dec(self._left)
            self._left = 0  # a refused request is not one that ended
            self.close()
            raise _told(error) from None
        finally:
            self._reserved.leave()
        self._parts.measures.prompt_tokens.inc(sum(len(request.prompt) for request in self._requests))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        while self._left:
            output = await self._arrived.get()
            number = self._place[output.number]
            self._measure(number, output)
            yield number, output

    def close(self) -> None:
        """Cancels what still runs. May be called again."""
        for stream in self._streams:
            stream.close()
        self._streams.clear()
        self._parts.measures.waiting.dec(max(0, self._left - len(self._begun)))
        self._parts.measures.running.dec(len(self._begun))
        if self._left:
            self._parts.measures.finished.labels(CANCELLED).inc(self._left)
        self._begun, self._left = set(), 0

    async def _prepare_grammars(self) -> None:
        if self._parts.grammars is not None:
            for grammar in {request.grammar for request in self._requests if request.grammar is not None}:
                self._grammars.append(await self._parts.grammars.prepare(grammar))

    async def _submit(self, number: int) -> None:
        asked, counted = self._requests[number], self._reserved.counted
        stream = await self._parts.service.submit(asked, self._arrived, salt=self._salt, counted=counted)
        # At once: if this request's client vanishes now, `close` must find the stream.
        self._streams.append(stream)
        assert stream.number is not None
        self._place[stream.number] = number

    def _measure(self, number: int, output: Output) -> None:
        measures, now = self._parts.measures, time.perf_counter()
        asked = self._requests[number]
        self.size += len(output.tokens) * (1 + (asked.logprobs or 0))
        self.size += len(output.prompt) * (1 + (asked.prompt_logprobs or 0))
        if output.tokens:
            measures.tokens.inc(len(output.tokens))
            if number not in self._begun:
                measures.first.observe(now - self._since)
                measures.waiting.dec()
                measures.running.inc()
                self._begun.add(number)
            else:
                for _ in output.tokens:
                    measures.between.observe((now - self._last[number]) / len(output.tokens))
            self._last[number] = now
        if output.finish is not None:
            measures.finished.labels(output.finish).inc()
            (measures.running if number in self._begun else measures.waiting).dec()
            self._begun.discard(number)
            self._left -= 1


def _told(error: Any) -> BaseException:
    """An error of the service as the client hears it."""
    if isinstance(error, Full):
        return full(error)
    if isinstance(error, ClosedError):
        return closed(str(error))
    if isinstance(error, ConfigError):
        return bad(error)
    whole = not isinstance(error, Exception)  # such as a cancellation
    return error if whole else HttpError(500, f"{type(error).__name__}: {error}", kind="server_error")


def check_end(output: Output) -> None:
    """Raises HttpError if a request ended by a fault."""
    if output.finish == ERROR:
        raise HttpError(500, output.error or "the request failed", kind="server_error")
    if output.finish == CANCELLED:
        raise HttpError(503, output.error or "the request was cancelled", kind="server_error")


def usage(prompt: int, new: int) -> dict[str, int]:
    """Counted tokens, as OpenAI's interface gives them."""
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def token_text(tokenizer: Tokenizer | None, chosen: int) -> tuple[str, list[int]]:
    """A token as text, and its bytes; a special by its name, which has none."""
    if tokenizer is None:
        return f"token_id:{chosen}", []
    if chosen in tokenizer.specials:
        return str(tokenizer.specials[chosen]), []
    data = tokenizer.decode_bytes([chosen]) if chosen < tokenizer.vocab_size else b""
    return data.decode(errors="replace"), list(data)


def told_logprob(logprob: float | None) -> float | None:
    """A log-probability as JSON can tell it."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def reasoning_tokens(tokenizer: Tokenizer | None, tokens: Sequence[Chosen]) -> int:
    """How many tokens of an answer that begins with a thought belong to it, `</think>` included."""
    text = bytearray()
    for number, chosen in enumerate(tokens, 1):
        name, data = token_text(tokenizer, chosen.id)
        piece = bytes(data) or name.encode()  # a special has no bytes
        text += piece
        if _THOUGHT in text[-len(_THOUGHT) - len(piece) :]:
            return number
    return len(tokens)


def ids_of(tokens: Sequence[Chosen]) -> list[int]:
    """The ids of generated tokens."""
    return [chosen.id for chosen in tokens]


async def attended(request: HttpRequest, timeout: float, work: Callable[[], Awaitable[T]]) -> T | Response:
    """`work()`, cancelled when the client vanishes or time is up. Raises HttpError for the latter."""
    task = asyncio.ensure_future(work())
    gone = asyncio.ensure_future(vanished(request.receive))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if gone in done:
            return Response(status_code=GONE)
        raise HttpError(504, f"the request took more than {timeout:g} s", kind="timeout_error")
    finally:
        await ended(task, gone)


class Form(Protocol):
    """How a route tells answers: all at once, or event by event."""

    async def collect(self, answers: Answers) -> None:
        """Waits until all have ended."""
        ...

    def whole(self) -> dict[str, Any]:
        """The response's JSON object after that. Any thread may ask."""
        ...

    def events(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream."""
        ...


async def respond(
    request: HttpRequest, answers: Answers, form: Form, *, stream: bool, headers: dict[str, str],
    framing: Framing = PLAIN,
) -> Response:  # fmt: skip
    """The response with the answers in a route's form. Raises HttpError for what is refused."""
    timeout = request.app.state.parts.settings.timeout
    if stream:
        await answers.__aenter__()  # a refusal has a status of its own, so it comes before the stream begins
        events = form.events(answers)
        return Events(events, timeout=timeout, close=answers.close, headers=headers, framing=framing)

    async def answered() -> Response:
        await form.collect(answers)
        made = lambda: JSONResponse(form.whole(), headers=headers)  # noqa: E731
        return await asyncio.to_thread(made) if answers.size > LARGE else made()

    return await attended(request, timeout, answered)
