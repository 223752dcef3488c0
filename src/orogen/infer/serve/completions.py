"""`/v1/completions`: prompts, as text or as token ids, continued."""

import base64
import dataclasses
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from orogen.config.checks import ConfigError
from orogen.data.tokenizer import Tokenizer
from orogen.infer.request import Chosen, Output, Request
from orogen.infer.serve import forms, structured
from orogen.infer.serve.body import ignored, read_body
from orogen.infer.serve.errors import bad
from orogen.infer.serve.exchange import Answers, Parts, check_end, ids_of, respond, token_text, told_logprob, usage

DEFAULT_TOKENS = 16  # OpenAI's


@dataclasses.dataclass
class Choice:
    """What has come of one choice. scored: the prompt's tokens but the first, where they were requested. versions: of
    the weights that chose its tokens. experts: those that are not told yet, see `Output`. length: characters of the
    tokens whose log-probabilities were told."""

    prompt: tuple[int, ...]
    text: str
    tokens: list[Chosen] = dataclasses.field(default_factory=list)
    scored: tuple[Chosen, ...] = ()
    versions: list[int] = dataclasses.field(default_factory=list)
    experts: list[Any] = dataclasses.field(default_factory=list)
    length: int = 0
    finish: str | None = None
    stop: str | int | None = None

    def add(self, output: Output, text: str) -> None:
        """Takes what has come."""
        self.text += text
        self.tokens += output.tokens
        self.versions += [output.version] * len(output.tokens)
        self.scored += output.prompt
        self.finish, self.stop = output.finish, output.stop
        if output.experts is not None:
            self.experts.append(output.experts)

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, by which the best of several is found; there are no NaNs among them."""
        return sum(chosen.logprob or 0.0 for chosen in self.tokens) / max(1, len(self.tokens))


async def completions(request: HttpRequest) -> Response:
    """The route."""
    parts: Parts = request.app.state.parts
    body, unknown = await read_body(request, forms.COMPLETION)
    parts.check_body(body)
    with parts.preparing.reserve(_counts(body)[1] * len(_listed(body))) as reserved:
        choices, requests = await parts.preparing.run(_asked, body, parts, reserved=reserved)
        form = _Form(parts, body, choices)
        answers = Answers(parts, requests, salt=forms.salt(body), since=request.state.arrived, reserved=reserved)
        return await respond(request, answers, form, stream=forms.streams(body), headers=ignored(unknown))


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
        if parts.weights is not None:
            self._same["instance"] = parts.instance
        # A model without a tokenizer has nothing else to answer with.
        self._shows_ids = body.get("return_token_ids", False) or parts.tokenizer is None
        self._n, self._of = _counts(body)
        # Of a stream: whether prompts are scored, the first choices that have begun, and what waits for one of them.
        self._scores, self._begun = bool(_scores(body)), set[int]()
        self._held: dict[int, list[tuple[int, Output]]] = {}
        # One prompt of several choices is counted once.
        self._prompt_tokens = sum(len(choice.prompt) for choice in choices) // self._of

    async def collect(self, answers: Answers) -> None:
        """Takes all outputs."""
        async with answers:
            async for number, output in answers:
                self._choices[number].add(output, forms.said(self._body, output))
                check_end(output)
        for number, choice in enumerate(self._choices):
            choice.scored = self._choices[number - number % self._of].scored

    def whole(self) -> dict[str, Any]:
        """All of it at once."""
        kept = self._best() if self._of > self._n else self._choices
        found = [self._choice(i, c, c.text, c.tokens, first=True) for i, c in enumerate(kept)]
        return {**self._same, "choices": found, "usage": self._usage()}

    def _best(self) -> list[Choice]:
        """The likeliest choices of each prompt, by the mean log-probability of a token, best first."""
        of = [self._choices[i : i + self._of] for i in range(0, len(self._choices), self._of)]
        ranked = [sorted(some, key=lambda choice: choice.mean_logprob, reverse=True) for some in of]
        return [choice for some in ranked for choice in some[: self._n]]

    async def events(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """A chunk per step and choice, then the counts if they are wanted."""
        counts = forms.Counts(self._body, self._usage)
        async for number, output in answers:
            check_end(output)
            for one, told in self._ready(number, output):
                yield {**self._same, "choices": [self._taken(one, told)], **counts.of_chunk()}
        if counts.wanted:
            yield {**self._same, "choices": [], "usage": self._usage()}

    def _ready(self, number: int, output: Output) -> Iterator[tuple[int, Output]]:
        """What a stream can tell now: a prompt is scored with its first choice, for whose first output others wait."""
        first = number - number % self._of
        if number == first:
            self._begun.add(first)
        if self._scores and first not in self._begun:
            self._held.setdefault(first, []).append((number, output))
            return
        yield number, output
        if number == first:
            yield from self._held.pop(first, ())

    def _taken(self, number: int, output: Output) -> dict[str, Any]:
        """What an output adds to a choice, as a stream tells it."""
        choice, text = self._choices[number], forms.said(self._body, output)
        first = not choice.tokens
        shown = choice.text + text if first else text
        choice.experts.clear()
        choice.add(output, text)
        leader = number - number % self._of
        if first and number != leader:
            choice.scored += self._choices[leader].scored
        return self._choice(number, choice, shown, output.tokens, first=first)

    def _usage(self) -> dict[str, int]:
        return usage(self._prompt_tokens, sum(len(choice.tokens) for choice in self._choices))

    def _choice(
        self, number: int, choice: Choice, text: str, tokens: Sequence[Chosen], *, first: bool
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"index": number, "text": text, "logprobs": None}
        found |= {"finish_reason": choice.finish, "stop_reason": choice.stop}
        if "logprobs" in self._body:
            echoed = _echoed_tokens(choice, self._body["logprobs"]) if first and self._body.get("echo") else []
            found["logprobs"] = _logprobs([*echoed, *tokens], self._parts.tokenizer, choice.length)
            choice.length += sum(map(len, found["logprobs"]["tokens"]))
        if "prompt_logprobs" in self._body and first:
            found["prompt_logprobs"] = _by_id(choice, self._body["prompt_logprobs"], self._parts.tokenizer)
        if self._body.get("return_routed_experts"):
            found["routed_experts"] = _encoded(choice.experts)
        if self._shows_ids:
            found["token_ids"] = ids_of(tokens)
            if self._parts.weights is not None:
                found["token_versions"] = choice.versions[len(choice.versions) - len(tokens) :]
            if first:
                found["prompt_token_ids"] = list(choice.prompt)
        return found


def _encoded(experts: Sequence[np.ndarray]) -> dict[str, Any] | None:
    """(n, l, k) experts of tokens that were read, as `shape` and little-endian int16 in base64; None where the engine
    does not report them."""
    if not experts:
        return None
    whole = np.concatenate(experts).astype("<i2")
    return {"shape": list(whole.shape), "int16": base64.b64encode(whole.tobytes()).decode()}


def _counts(body: dict[str, Any]) -> tuple[int, int]:
    """How many answers there are for each prompt, and of how many they are the best. Raises HttpError."""
    n = body.get("n", 1)
    of = body.get("best_of", n)
    if of < n:
        raise bad(f"best_of is {of}; expected n, {n}, or more")
    if of > n and body.get("stream", False):
        raise bad(f"best_of is {of} beside stream; expected n, {n}: the best is known at the end")
    return n, of


def _listed(body: dict[str, Any]) -> list[Any]:
    """The prompts of a body, each a text or ids."""
    prompt: Any = body["prompt"]
    several = isinstance(prompt, list) and (not prompt or isinstance(prompt[0], str | list))
    return prompt if several else [prompt]


def _prompts(body: dict[str, Any], parts: Parts) -> list[tuple[tuple[int, ...], str]]:
    """The ids of each prompt, and its text where that is known."""
    listed = _listed(body)
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


def _scores(body: dict[str, Any]) -> list[int]:
    """How many of the likeliest tokens are to be told of a prompt's own, by each field that asks for that."""
    echoed = [body["logprobs"]] if body.get("echo") and "logprobs" in body else []
    return [*([body["prompt_logprobs"]] if "prompt_logprobs" in body else []), *echoed]


def _asked(body: dict[str, Any], parts: Parts) -> tuple[list[Choice], list[Request]]:
    """The choices of a body, and what the engine is asked for each."""
    (n, of), tokens = _counts(body), forms.most_new(body, DEFAULT_TOKENS)
    asked = _scores(body)
    if not tokens and not asked:
        raise bad("max_tokens is 0; expected 1 or more, or prompt_logprobs, or logprobs beside echo")
    if stops := forms.stops(body):
        parts.need_tokenizer(f"stop is {stops[0]!r}")
    prompts = _prompts(body, parts)
    if of * len(prompts) > forms.MOST_CHOICES:
        name = "n" if of == n else "best_of"
        raise bad(f"{name} is {of} for {len(prompts)} prompts; expected {forms.MOST_CHOICES} answers at most")
    logprobs = body.get("logprobs", None if of == n else 0)
    scores = {"logprobs": logprobs, "prompt_logprobs": max(asked, default=None)}
    fields = {"max_tokens": tokens, **scores, "grammar": structured.grammar(body)}
    # A prompt is scored once for all of its choices, but what has no tokens to answer with is there for its scores.
    others = fields | ({"prompt_logprobs": None} if tokens else {})
    choices, requests = [], []
    for prompt, text in prompts:
        parts.check_length(len(prompt), tokens)
        for number in range(of):
            requests.append(forms.request(body, prompt, number, parts.end_ids, **(others if number else fields)))
            choices.append(Choice(prompt, text if body.get("echo") else ""))
    return choices, requests


def _echoed_tokens(choice: Choice, count: int) -> list[Chosen]:
    """The prompt's tokens with so many of the likeliest ones; nothing is known of the first."""
    return [Chosen(choice.prompt[0]), *(dataclasses.replace(one, top=one.top[:count]) for one in choice.scored)]


def _by_id(choice: Choice, count: int, tokenizer: Tokenizer | None) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` as vLLM has it: of each token of the prompt, null for the first, what is told of it and of the
    likeliest ones, by id. rank: from 1; null for a token that is not among those."""
    found: list[dict[str, Any] | None] = [None]
    for chosen in choice.scored:
        ranks = {token: rank for rank, (token, _) in enumerate(chosen.top[:count], 1)}
        told = {}
        for token, logprob in ((chosen.id, chosen.logprob), *chosen.top[:count]):
            text, _ = token_text(tokenizer, token)
            told[str(token)] = {"logprob": told_logprob(logprob), "rank": ranks.get(token), "decoded_token": text}
        found.append(told)
    return found


def _logprobs(tokens: Sequence[Chosen], tokenizer: Tokenizer | None, offset: int) -> dict[str, Any]:
    """In the form of OpenAI's completions."""
    texts = [token_text(tokenizer, chosen.id)[0] for chosen in tokens]
    offsets = list(itertools.accumulate(map(len, texts[:-1]), initial=offset)) if texts else []
    # The chosen one is always among them.
    told = lambda c: {token_text(tokenizer, i)[0]: told_logprob(p) for i, p in (*c.top, (c.id, c.logprob))}  # noqa: E731
    tops = [None if c.logprob is None else told(c) for c in tokens]
    logprobs = [told_logprob(chosen.logprob) for chosen in tokens]
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
