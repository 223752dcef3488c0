"""Lines of a batch: what JSON asks of the engine, and what is answered. Importing this does not import jax.

A line is one object. It has a `prompt`, text or a list of token ids, or `messages`, and may have any field of Request
and of Sampling by its name, and an `id`, which its answer repeats:

    {"id": 7, "prompt": "import ", "max_tokens": 32, "temperature": 0, "stop": ["\\n\\n"]}
    {"prompt": [1, 5, 9], "logprobs": 2, "logit_bias": [[13, -100]], "budget": {"tokens": 64, "form": "grace"}}

Its answer is one object, too:

    line            the number of the line it answers, from 1
    id              what the line has by that name, a text or a whole number, if it has it
    text, tokens    what was generated
    finish          why it ended: stop, length, error; absent where the line could not be read
    logprobs, top   of a line with `logprobs`: those of its tokens, and [token, log-probability] of the likeliest ones;
                    null for one that is not finite
    prompt_logprobs, prompt_top     the same of the prompt's tokens, null for the first, of a line with
                    `prompt_logprobs`, which may have `max_tokens` 0
    error           what was wrong
    digest          of the line and of the run's settings, by which a run that goes on knows its own answers
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import ListOf, Record, Whole, check_form, fits, read_object
from orogen.infer.request import SEEDS, Budget, Chosen, Grammar, Request, Sampling, held_back

_SAMPLING = {field.name for field in dataclasses.fields(Sampling)}
_REQUEST = {field.name for field in dataclasses.fields(Request)} - {"sampling", "held"}
_OBJECTS = {"budget": Budget, "grammar": Grammar}
# What a template of messages is given besides them.
_CHAT = ("messages", "tools", "chat_template_kwargs")
_ID = (str, int, None)
_FORM = Record({}, {"id": _ID, "prompt": (str, ListOf(Whole(0, 2**31 - 1))), "messages": list})


class Line(NamedTuple):
    """One line that is to be answered. number: from 1."""

    number: int
    data: bytes
    digest: str


class LineReader:
    """Makes requests of lines.

    defaults: fields that a line need not have. encode: the token ids of a prompt's text; None without a tokenizer.
    render: those of an object of `messages`, and of `tools` and `chat_template_kwargs` if it has them; None without
    a chat template. end_ids: the tokenizer's tokens that end a text. seed: of the whole batch; a line without a seed of
    its own gets one made of this and its number, so that it does not depend on where a run was interrupted.
    """

    def __init__(
        self,
        defaults: Mapping[str, Any],
        *,
        encode: Callable[[str], Sequence[int]] | None = None,
        render: Callable[[Mapping[str, Any]], Sequence[int]] | None = None,
        end_ids: Iterable[int] = (),
        seed: int = 0,
    ):
        self._defaults, self._encode, self._render, self._seed = dict(defaults), encode, render, seed
        self._end_ids = tuple(end_ids)

    def read(self, line: Line) -> Request:
        """The line's request. Raises ConfigError, which begins with the line's number."""
        fields = read_object(line.data, where=f"line {line.number}")
        check_form(fields, _FORM, where=f"line {line.number}")
        try:
            return self._request(fields, line.number)
        except ConfigError as error:
            raise ConfigError(f"line {line.number}: {error}") from None

    def _request(self, fields: dict[str, Any], number: int) -> Request:
        prompt = self._prompt(fields)
        unknown = fields.keys() - _SAMPLING - _REQUEST - {"id", *_CHAT}
        if unknown:
            expected = ", ".join(sorted(_SAMPLING | _REQUEST | {"id", "messages"}))
            raise ConfigError(f"{shown(min(unknown))} is no field of a request; expected some of {expected}")
        given = {key: value for key, value in fields.items() if value is not None and key not in ("id", *_CHAT)}
        request = request_of(prompt, {"seed": self._seed_of(number)} | self._defaults | given)
        return held_back(request, self._end_ids)

    def _prompt(self, fields: dict[str, Any]) -> tuple[int, ...]:
        if ("prompt" in fields) == ("messages" in fields):
            raise ConfigError(
                f"it has {'both' if 'prompt' in fields else 'no'} prompt and messages; expected one of them"
            )
        if "messages" in fields:
            if self._render is None:
                raise ConfigError("it has messages, and the checkpoint no chat template; expected a prompt")
            return tuple(self._render({key: fields[key] for key in _CHAT if key in fields}))
        if not isinstance(fields["prompt"], str):
            return tuple(fields["prompt"])
        if self._encode is None:
            raise ConfigError("its prompt is text, and the checkpoint has no tokenizer; expected a list of token ids")
        return tuple(int(token) for token in self._encode(fields["prompt"]))

    def _seed_of(self, number: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed} {number}".encode()).digest()[:8]) % SEEDS


def request_of(prompt: Sequence[int], fields: Mapping[str, Any]) -> Request:
    """The request with fields of Request and Sampling by their names, as JSON has them. Raises ConfigError."""
    given = {key: _frozen(value) for key, value in fields.items() if key != "prompt"}
    others = {key: value for key, value in given.items() if key in _REQUEST}
    for key, kind in _OBJECTS.items():
        if isinstance(others.get(key), dict):
            others[key] = _made(kind, key, others[key])
    if "max_tokens" not in others:
        raise ConfigError("max_tokens is missing; expected a number above 0, or 0 with prompt_logprobs")
    sampling = Sampling(**{key: value for key, value in given.items() if key in _SAMPLING})
    return Request(prompt=tuple(prompt), sampling=sampling, **others)


def told(*, chosen: Sequence[Chosen], text: str, finish: str, prompt: Sequence[Chosen] | None = None) -> dict[str, Any]:
    """What came of a request, as JSON has it. prompt: see `Output`; None if its scores were not requested."""
    facts: dict[str, Any] = {"text": text, "tokens": [one.id for one in chosen], "finish": finish}
    if chosen and chosen[0].logprob is not None:
        facts["logprobs"] = [_finite(one.logprob) for one in chosen]
        facts["top"] = _tops(chosen)
    if prompt is not None:
        facts["prompt_logprobs"] = [None, *(_finite(one.logprob) for one in prompt)]
        facts["prompt_top"] = [None, *_tops(prompt)]
    return facts


def _tops(chosen: Sequence[Chosen]) -> list[list[list[Any]]]:
    return [[[token, _finite(logprob)] for token, logprob in one.top] for one in chosen]


def digest(data: bytes, settings: str) -> str:
    """What tells the answer to this line, under these settings, from any other: 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(json.dumps(settings).encode() + b"\n" + data).hexdigest()[:16]


def answer(line: Line, facts: dict[str, Any], *, error: str | None) -> dict[str, Any]:
    """The answer to a line whose request has ended, with what was `told` of it."""
    return _about(line, facts if error is None else facts | {"error": error})


def refusal(line: Line, error: str) -> dict[str, Any]:
    """The answer to a line that asks for nothing that can be done."""
    return _about(line, {"error": error})


def _about(line: Line, facts: dict[str, Any]) -> dict[str, Any]:
    return {"line": line.number, **_id(line), **facts, "digest": line.digest}


def _id(line: Line) -> dict[str, Any]:
    """What the line has for an id, also if it is broken otherwise."""
    try:
        fields = read_object(line.data, where="the line")
    except ConfigError:
        return {}
    return {"id": fields["id"]} if "id" in fields and fits(fields["id"], _ID) else {}


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _frozen(value: Any) -> Any:
    """Lists as tuples, as deep as they go."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _made(kind: type, name: str, fields: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    if not needed <= fields.keys() <= known:
        raise ConfigError(f"{name} is {shown(fields)}; expected an object of {', '.join(sorted(known))}")
    return kind(**fields)
