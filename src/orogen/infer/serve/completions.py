"""`/v1/completions`: prompts, as text or as token ids, continued."""

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from orogen.config.checks import ConfigError
from orogen.data.tokenizer import Tokenizer
from orogen.infer.request import Chosen, Request
from orogen.infer.serve import forms
from orogen.infer.serve.body import ignored, read_body
from orogen.infer.serve.errors import bad
from orogen.infer.serve.exchange import Answers, Parts, check_end, ids_of, respond, token_text, usage

DEFAULT_TOKENS = 16  # OpenAI's


@dataclasses.dataclass
class Choice:
    """What has come of one choice."""

    prompt: tuple[int, ...]
    text: str
    tokens: list[Chosen] = dataclasses.field(default_factory=list)
    finish: str | None = None


async def completions(request: HttpRequest) -> Response:
    """The route."""
    parts: Parts = request.app.state.parts
    body, unknown = await read_body(request, forms.COMPLETION)
    parts.check_model(body)
    choices, requests = await asyncio.to_thread(_asked, body, parts)
    answers, stream = Answers(parts, requests), body.get("stream", False)
    return await respond(request, answers, _Form(parts, body, choices), stream=stream, headers=ignored(unknown))


class _Form:
    """Answers in the route's form."""

    def __init__(self, parts: Parts, body: dict[str, Any], choices: list[Choice]) -> None:
        self._parts, self._body, self._choices = parts, body, choices
        self._same = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": parts.settings.name,
        }
        # A model without a tokenizer has nothing else to answer with.
        self._shows_ids = body.get("return_token_ids", False) or parts.tokenizer is None
        # One prompt of several choices is counted once.
        self._prompt_tokens = sum(len(choice.prompt) for choice in choices) // forms.choices(body)

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """All of it at once."""
        async with answers:
            async for number, output in answers:
                choice = self._choices[number]
                choice.text += output.text
                choice.tokens += output.tokens
                choice.finish = output.finish
                check_end(output)
        found = [self._choice(i, c.text, c.tokens, c.finish, first=True, offset=0) for i, c in enumerate(self._choices)]
        return {**self._same, "choices": found, "usage": self._usage()}

    async def events(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """A chunk per step and choice, then the counts if they are wanted."""
        counts = self._body.get("stream_options", {}).get("include_usage", False)
        blank = {"usage": None} if counts else {}
        async for number, output in answers:
            check_end(output)
            choice = self._choices[number]
            first = not choice.tokens
            text, offset = (choice.text + output.text, 0) if first else (output.text, len(choice.text))
            choice.text += output.text
            choice.tokens += output.tokens
            found = self._choice(number, text, output.tokens, output.finish, first=first, offset=offset)
            yield {**self._same, "choices": [found], **blank}
        if counts:
            yield {**self._same, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        return usage(self._prompt_tokens, sum(len(choice.tokens) for choice in self._choices))

    def _choice(
        self, number: int, text: str, tokens: Sequence[Chosen], finish: str | None, *, first: bool, offset: int
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"index": number, "text": text, "logprobs": None, "finish_reason": finish}
        if "logprobs" in self._body:
            found["logprobs"] = _logprobs(tokens, self._parts.tokenizer, offset)
        if self._shows_ids:
            found["token_ids"] = ids_of(tokens)
            if first:
                found["prompt_token_ids"] = list(self._choices[number].prompt)
        return found


def _prompts(body: dict[str, Any], parts: Parts) -> list[tuple[tuple[int, ...], str]]:
    """The ids of each prompt, and its text where that is known."""
    prompt: Any = body["prompt"]
    several = isinstance(prompt, list) and (not prompt or isinstance(prompt[0], str | list))
    listed: list[Any] = prompt if several else [prompt]
    if not listed:
        raise bad("prompt is []; expected at least one")
    if isinstance(listed[0], str):
        tokenizer = parts.need_tokenizer("prompt is a string")
        try:
            return [(tuple(tokenizer.prompt_ids(text)), text) for text in listed]
        except ConfigError as error:
            raise bad(error) from None
    return [(tuple(ids), _echoed(ids, parts.tokenizer) if body.get("echo") else "") for ids in listed]


def _echoed(ids: Sequence[int], tokenizer: Tokenizer | None) -> str:
    try:
        return tokenizer.decode(ids) if tokenizer is not None else ""
    except ConfigError as error:
        raise bad(f"prompt: {error}") from None


def _asked(body: dict[str, Any], parts: Parts) -> tuple[list[Choice], list[Request]]:
    """The choices of a body, and what the engine is asked for each."""
    n, tokens = forms.choices(body), forms.most_new(body, DEFAULT_TOKENS)
    if body.get("echo") and "logprobs" in body:
        raise bad("echo is true beside logprobs; expected one of them: the prompt's are not computed")
    if stops := forms.stops(body):
        parts.need_tokenizer(f"stop is {stops[0]!r}")
    prompts = _prompts(body, parts)
    if n * len(prompts) > forms.MOST_CHOICES:
        raise bad(f"n is {n} for {len(prompts)} prompts; expected {forms.MOST_CHOICES} answers at most")
    choices, requests = [], []
    for prompt, text in prompts:
        parts.check_length(len(prompt), tokens)
        for number in range(n):
            fields = {"logprobs": body.get("logprobs"), "grammar": forms.grammar(body)}
            requests.append(forms.request(body, prompt, number, max_tokens=tokens, **fields))
            choices.append(Choice(prompt, text if body.get("echo") else ""))
    return choices, requests


def _logprobs(tokens: Sequence[Chosen], tokenizer: Tokenizer | None, offset: int) -> dict[str, Any]:
    """In the form of OpenAI's completions."""
    texts = [token_text(tokenizer, chosen.id)[0] for chosen in tokens]
    places = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
    # The chosen one is always among them.
    tops = [{token_text(tokenizer, i)[0]: p for i, p in (*c.top, (c.id, c.logprob))} for c in tokens]
    logprobs = [chosen.logprob for chosen in tokens]
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": places}
