"""Chats with images, which a model that sees images answers beside the engine, one chat after another.

Images come within the body alone, as data: URLs: a server that fetched others would fetch what clients say. Answers are
the likeliest tokens, so that what asks for others is refused.
"""

import base64
import binascii
import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from orogen.config.checks import ConfigError, shown
from orogen.infer.messages import ROLES
from orogen.infer.request import LENGTH, STOP
from orogen.infer.serve import forms
from orogen.infer.serve.body import ignored
from orogen.infer.serve.errors import bad
from orogen.infer.serve.events import PLAIN, Events
from orogen.infer.serve.exchange import Parts, usage
from orogen.infer.sight import TOKENS, Seen, Sees

MOST_IMAGES = 8  # of a chat; a body's bytes are limited as those of others
IMAGE = "image_url"
_DATA = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.ASCII)
# Fields that images leave as they are, with the values that ask for nothing; of others, no value is offered.
_READ = {"messages", "model", "max_tokens", "max_completion_tokens", "stream", "stream_options", "seed", "priority"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "temperature": (0,), "top_p": (1,), "top_k": (0, -1, 1), "min_p": (0,), "presence_penalty": (0,),
    "frequency_penalty": (0,), "repetition_penalty": (1,), "logprobs": (False,), "stop": ([],), "tools": ([],),
    "response_format": ({"type": "text"},), "ignore_eos": (False,), "min_tokens": (0,),
}  # fmt: skip


def has_images(body: dict[str, Any]) -> bool:
    """Whether a message of the body has an image."""
    contents = [message["content"] for message in body["messages"] if isinstance(message.get("content"), list)]
    return any(part["type"] == IMAGE for content in contents for part in content)


async def answer(request: HttpRequest, sees: Sees, body: dict[str, Any], unknown: list[str]) -> Response:
    """The response to a chat with images. Raises HttpError."""
    parts: Parts = request.app.state.parts
    said, most = said_of(body), forms.most_new(body, TOKENS)
    streams = forms.streams(body)
    with parts.preparing.reserve() as reserved:
        seen = await parts.preparing.run_seen(_answered, sees, said, most, reserved=reserved)
    form = _Form(parts, body, seen)
    parts.measures.prompt_tokens.inc(seen.prompt)
    parts.measures.tokens.inc(seen.tokens)
    parts.measures.finished.labels(form.finish).inc()
    if not streams:
        return JSONResponse(form.whole(), headers=ignored(unknown))
    events = form.events()
    return Events(events, timeout=parts.settings.timeout, close=lambda: None, headers=ignored(unknown), framing=PLAIN)


def said_of(body: dict[str, Any]) -> list[str | bytes]:
    """The texts and images of a body's messages, in order. Raises HttpError."""
    for name in sorted(body.keys() - _READ):
        if body[name] not in _NEUTRAL.get(name, ()):
            expected = "; expected nothing of it beside images, whose answers are the likeliest tokens"
            raise bad(f"{name} is {shown(body[name])}{expected}")
    said: list[str | bytes] = []
    for number, message in enumerate(body["messages"]):
        where = f"messages[{number}]"
        if message["role"] not in ROLES:
            raise bad(f"{where}.role is {shown(message['role'])}; expected one of {', '.join(ROLES)}")
        for name in ("tool_calls", "reasoning_content", "reasoning"):
            if message.get(name):
                raise bad(f"{where}.{name} is {shown(message[name])}; expected nothing of it beside images")
        if (content := message.get("content")) is None:
            raise bad(f"{where}.content is missing; expected a text, or a list of texts and images")
        listed = [{"type": "text", "text": content}] if isinstance(content, str) else content
        said += [_part(part, f"{where}.content[{place}]") for place, part in enumerate(listed)]
    count = sum(isinstance(one, bytes) for one in said)
    if count > MOST_IMAGES:
        raise bad(f"messages have {count} images; expected at most {MOST_IMAGES}")
    return said


def _part(part: dict[str, Any], where: str) -> str | bytes:
    if part["type"] == "text" and part.get("text") is not None:
        return part["text"]
    if part["type"] != IMAGE or part.get(IMAGE) is None:
        raise bad(f"{where}.type is {shown(part['type'])}; expected text or {IMAGE}")
    url = part[IMAGE]["url"]
    found = _DATA.match(url)
    if found is None:
        raise bad(f"{where}.{IMAGE}.url is {shown(url)}; expected data:image/…;base64,… since nothing is fetched")
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad(f"{where}.{IMAGE}.url is no base64 ({error}); expected it after the comma") from None


def _answered(sees: Sees, said: Sequence[str | bytes], most: int) -> Seen:
    try:
        return sees(said, most)
    except ConfigError as error:
        raise bad(error) from None


class _Form:
    """An answer in the route's form. `retrieved` is ours."""

    def __init__(self, parts: Parts, body: dict[str, Any], seen: Seen) -> None:
        self._seen, self._body = seen, body
        self._same = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": parts.settings.name}
        self.finish = STOP if seen.ended else LENGTH

    def whole(self) -> dict[str, Any]:
        """All of it at once."""
        message = {"role": "assistant", "content": self._seen.text, "refusal": None, "retrieved": self._seen.retrieved}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish}
        return {**self._same, "object": "chat.completion", "choices": [choice], "usage": self._usage()}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """A chunk with the answer, one with its end, and one with the counts if they are wanted."""
        same, counts = {**self._same, "object": "chat.completion.chunk"}, forms.Counts(self._body, self._usage)
        for delta, finish in (({"role": "assistant", "content": self._seen.text}, None), ({}, self.finish)):
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            yield {**same, "choices": [choice], **counts.of_chunk()}
        if counts.wanted:
            yield {**same, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        return usage(self._seen.prompt, self._seen.tokens)
