"""`/v1/chat/completions`: chats with reasoning, tools and streams."""

import dataclasses
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from orogen.config.checks import ConfigError, shown
from orogen.data.tokenizer import Tokenizer
from orogen.infer.answer import Answer, Part
from orogen.infer.chat import THOUGHT, Chat, Prompt
from orogen.infer.forced_call import beginning
from orogen.infer.messages import check_messages
from orogen.infer.request import STOP, Chosen, Grammar, Output, Request
from orogen.infer.serve import forms, pictures, structured
from orogen.infer.serve.body import ignored, read_body
from orogen.infer.serve.errors import bad
from orogen.infer.serve.exchange import (
    Answers,
    Parts,
    check_end,
    ids_of,
    reasoning_tokens,
    respond,
    token_text,
    told_logprob,
    usage,
)
from orogen.infer.tool_calls import Call, schemas_of

# Of OpenAI's interface (openai-python 3.57, types/shared/reasoning_effort.py).
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_NAME = re.compile(r"[\w./-]{1,256}", re.ASCII)


@dataclasses.dataclass
class Choice:
    """What has come of one choice."""

    answer: Answer
    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tokens: list[Chosen] = dataclasses.field(default_factory=list)
    finish: str | None = None
    stop: str | int | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
    """A chat as it goes to the engine. called: how the call begins that the prompt ends in. grammar: of the answer."""

    prompt: Prompt
    tools: dict[str, dict[str, Any]] | None
    called: str | None
    grammar: Grammar | None


async def chats(request: HttpRequest) -> Response:
    """The route."""
    parts: Parts = request.app.state.parts
    body, unknown = await read_body(request, forms.CHAT)
    parts.check_body(body)
    if parts.sees is not None and pictures.has_images(body):
        return await pictures.answer(request, parts.sees, body, unknown)
    with parts.preparing.reserve(body.get("n", 1)) as reserved:
        asked, requests = await parts.preparing.run_chat(prepared, body, parts, reserved=reserved)
        form, stream = _Form(parts, body, asked), forms.streams(body)
        answers = Answers(parts, requests, salt=forms.salt(body), since=request.state.arrived, reserved=reserved)
        return await respond(request, answers, form, stream=stream, headers=ignored(unknown))


class _Form:
    """Answers in the route's form."""

    def __init__(self, parts: Parts, body: dict[str, Any], asked: Asked) -> None:
        self._parts, self._body, self._asked = parts, body, asked
        make = lambda: Answer(thinks=asked.prompt.thinks, tools=asked.tools, called=asked.called)  # noqa: E731
        self._choices = [Choice(make()) for _ in range(body.get("n", 1))]
        self._same = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": parts.settings.name,
        }
        self._shows_ids = body.get("return_token_ids", False)
        self._prompt = {"prompt_token_ids": asked.prompt.ids} if self._shows_ids else {}

    async def collect(self, answers: Answers) -> None:
        """Takes all outputs."""
        async with answers:
            async for number, output in answers:
                check_end(output)
                self._take(self._choices[number], output)

    def whole(self) -> dict[str, Any]:
        """All of it at once."""
        found = [self._message(number, choice) for number, choice in enumerate(self._choices)]
        return {**self._same, **self._prompt, "choices": found, "usage": self._usage()}

    async def events(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """Chunks of each choice, then the counts if they are wanted."""
        counts = forms.Counts(self._body, self._counted)
        same = {**self._same, "object": "chat.completion.chunk"}
        for number in range(len(self._choices)):
            begun = {"role": "assistant", "content": ""}
            yield {**same, **self._prompt, "choices": [_chunk(number, begun)], **counts.of_chunk()}
        async for number, output in answers:
            check_end(output)
            for chunk in self._chunks(number, output):
                yield {**same, "choices": [chunk], **counts.of_chunk()}
        if counts.wanted:
            yield {**same, "choices": [], "usage": self._usage()}

    def _chunks(self, number: int, output: Output) -> Iterator[dict[str, Any]]:
        """What an output adds to a choice, as a stream tells it."""
        choice = self._choices[number]
        deltas, known = self._take(choice, output), self._known(output.tokens)
        if known and not deltas:
            deltas = [{"content": ""}]  # what is known of tokens whose text waits
        for place, delta in enumerate(deltas):
            yield {**_chunk(number, delta), **({} if place else known)}
        if output.finish is not None:
            yield {**_chunk(number, {}, choice.finish), "stop_reason": choice.stop}

    def _take(self, choice: Choice, output: Output) -> list[dict[str, Any]]:
        """Adds an output to a choice. Returns the deltas that tell what it adds."""
        choice.tokens += output.tokens
        found = choice.answer.push(forms.said(self._body, output))
        if output.finish is not None:
            found += choice.answer.finish()
        deltas = [delta for part in found for delta in self._add(choice, part)]
        if output.finish is not None:
            choice.finish = "tool_calls" if choice.calls and output.finish == STOP else output.finish
            choice.stop = output.stop
        return deltas

    def _add(self, choice: Choice, part: Part) -> list[dict[str, Any]]:
        choice.reasoning += part.reasoning
        choice.content += part.content
        if part.call is not None:
            if choice.calls and not self._body.get("parallel_tool_calls", True):
                return []
            deltas = call_deltas(part.call, len(choice.calls))
            whole = dict(deltas[0]["tool_calls"][0])
            del whole["index"]
            arguments = "".join(delta["tool_calls"][0]["function"]["arguments"] for delta in deltas)
            choice.calls.append({**whole, "function": {"name": part.call.name, "arguments": arguments}})
            return deltas
        return [{"reasoning_content": part.reasoning} if part.reasoning else {"content": part.content}]

    def _known(self, tokens: Sequence[Chosen]) -> dict[str, Any]:
        """What is told of tokens, beside their text."""
        known: dict[str, Any] = {}
        if self._body.get("logprobs") and tokens:
            known["logprobs"] = {"content": logprobs_of(tokens, self._parts.tokenizer), "refusal": None}
        if self._shows_ids and tokens:
            known["token_ids"] = ids_of(tokens)
        return known

    def _message(self, number: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.content or (None if choice.calls else "")}
        message |= {"reasoning_content": choice.reasoning or None, "refusal": None}
        if choice.calls:
            message["tool_calls"] = choice.calls
        known = {"logprobs": None, **self._known(choice.tokens)}
        ended = {"finish_reason": choice.finish, "stop_reason": choice.stop}
        return {"index": number, "message": message, **known, **ended}

    def _counted(self) -> dict[str, Any]:
        return usage(len(self._asked.prompt.ids), sum(len(choice.tokens) for choice in self._choices))

    def _usage(self) -> dict[str, Any]:
        thinking = [choice for choice in self._choices if choice.reasoning]
        thought = sum(reasoning_tokens(self._parts.tokenizer, choice.tokens) for choice in thinking)
        return {**self._counted(), "completion_tokens_details": {"reasoning_tokens": thought}}


def _chunk(number: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish}


def call_deltas(call: Call, number: int) -> list[dict[str, Any]]:
    """A call as a stream tells it: its name, then each argument as a piece of a JSON object."""
    named = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
    deltas: list[dict[str, Any]] = [{"index": number, **named, "function": {"name": call.name, "arguments": ""}}]
    pieces = [
        f"{json.dumps(k, ensure_ascii=False)}: {json.dumps(v, ensure_ascii=False)}" for k, v in call.arguments.items()
    ]
    text = ["{" + pieces[0], *(f", {piece}" for piece in pieces[1:]), "}"] if pieces else ["{}"]
    deltas += [{"index": number, "function": {"arguments": piece}} for piece in text]
    return [{"tool_calls": [delta]} for delta in deltas]


def logprobs_of(tokens: Sequence[Chosen], tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """Log-probabilities in the form of OpenAI's chats."""

    def told(token_id: int, logprob: float | None) -> dict[str, Any]:
        text, data = token_text(tokenizer, token_id)
        return {"token": text, "logprob": told_logprob(logprob), "bytes": data}

    tops = [[told(*one) for one in chosen.top] for chosen in tokens]
    return [{**told(c.id, c.logprob), "top_logprobs": top} for c, top in zip(tokens, tops, strict=True)]


def prepared(body: dict[str, Any], parts: Parts) -> tuple[Asked, list[Request]]:
    """What is asked of the engine. Raises HttpError."""
    asked = asked_of(body, parts.need_chat())
    return asked, requests_of(body, asked, parts)


def asked_of(body: dict[str, Any], chat: Chat) -> Asked:
    """The prompt of a body, and what is to be made of its answer. A call that must be made is begun in the prompt,
    after the end of thinking. Raises HttpError."""
    choice, tools = _chosen_tools(body)
    try:
        begun = beginning(tools, chat.calls) if choice == "called" and tools else None
    except ConfigError as error:
        raise bad(error) from None
    grammar, options = structured.grammar(body), _options(body)
    if begun and grammar:
        raise bad("tool_choice asks for a call beside an answer of a given form; expected one of them")
    thinks = options.get("enable_thinking")
    if begun and thinks:
        raise bad("chat_template_kwargs.enable_thinking is True beside a call that must be made; expected false")
    # A grammar begins after the thought, which is then asked for by name: a model that goes on thinking would say
    # nothing of the form that a client waits for.
    if begun or (grammar and not thinks and "reasoning_budget" not in options):
        options["enable_thinking"] = False
    if begun:
        grammar = begun.rest
    try:
        messages = check_messages(body["messages"])
        given = {"tools": tools, "options": options, "generate": body.get("add_generation_prompt", True)}
        prompt = chat.prompt(messages, **given)
        # Templates that know no `enable_thinking` have opened it.
        ending = THOUGHT if options.get("enable_thinking") is False and prompt.thinks else ""
        ending += begun.text if begun else ""
        if ending:
            prompt = chat.prompt(messages, **given, add=ending)._replace(thinks=False)
    except ConfigError as error:
        raise bad(error) from None
    return Asked(prompt, schemas_of(tools) if tools else None, begun.text if begun else None, grammar)


def _options(body: dict[str, Any]) -> dict[str, Any]:
    """The variables of the template that a body sets. Raises HttpError."""
    options = dict(body.get("chat_template_kwargs", {}))
    if "reasoning_budget" in body:
        options["reasoning_budget"] = body["reasoning_budget"]
    if (effort := body.get("reasoning_effort")) is not None:
        if effort not in _EFFORTS:  # a template's own efforts are given in chat_template_kwargs
            raise bad(f"the effort of reasoning is {shown(effort)}; expected one of {', '.join(_EFFORTS)}")
        options.setdefault("reasoning_effort", effort)
        if effort == "none":
            options.setdefault("enable_thinking", False)
    if (thinks := options.get("enable_thinking")) is not None and not isinstance(thinks, bool):
        raise bad(f"chat_template_kwargs.enable_thinking is {shown(thinks)}; expected true or false")
    return options


def _chosen_tools(body: dict[str, Any]) -> tuple[str, list[dict[str, Any]] | None]:
    """Whether tools may be called (auto), must be (called) or must not (none), and which. Raises HttpError."""
    tools, choice = body.get("tools"), body.get("tool_choice", "auto")
    for number, tool in enumerate(tools or []):
        if tool["type"] != "function":
            raise bad(f"tools[{number}].type is {shown(tool['type'])}; expected function")
        if not _NAME.fullmatch(name := tool["function"]["name"]):
            raise bad(f"tools[{number}].function.name is {shown(name)}; expected letters, digits, _, -, . and /")
    if isinstance(choice, dict) and choice["type"] == "allowed_tools":
        choice, tools = _allowed(choice, tools)
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise bad(f"tool_choice is {shown(choice)}; expected auto, none, required or a function")
        if choice == "required" and not tools:
            raise bad("tool_choice is 'required' without tools; expected tools")
        return "called" if choice == "required" else choice, tools if choice != "none" and tools else None
    named = _of_names(tools, [choice])
    if choice["type"] != "function" or not named:
        raise bad(f"tool_choice is {shown(choice)}; expected a function among tools")
    return "called", named[:1]


def _allowed(choice: dict[str, Any], tools: list[dict[str, Any]] | None) -> tuple[str, list[dict[str, Any]]]:
    """The mode of OpenAI's `allowed_tools`, and the tools that are among them. Raises HttpError."""
    allowed = choice.get("allowed_tools", {"mode": None, "tools": []})
    named = _of_names(tools, allowed["tools"])
    if allowed["mode"] not in ("auto", "required") or not named:
        raise bad(f"tool_choice is {shown(choice)}; expected the mode auto or required, and functions among tools")
    return allowed["mode"], named


def _of_names(tools: list[dict[str, Any]] | None, references: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools to which there is a reference."""
    names = [reference["function"]["name"] for reference in references if "function" in reference]
    return [tool for tool in tools or [] if tool["function"]["name"] in names]


def requests_of(body: dict[str, Any], asked: Asked, parts: Parts) -> list[Request]:
    """What the engine is asked, a request per choice. Raises HttpError."""
    chat = parts.need_chat()
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise bad(f"top_logprobs is {body['top_logprobs']} without logprobs; expected logprobs true")
    budget = forms.budget(body)
    tokens = forms.most_new(body, max(1, parts.settings.most - len(asked.prompt.ids)))
    parts.check_length(len(asked.prompt.ids), tokens)
    return [
        forms.request(
            body,
            tuple(asked.prompt.ids),
            number,
            parts.end_ids,
            max_tokens=tokens,
            logprobs=body.get("top_logprobs", 0) if body.get("logprobs") else None,
            budget=budget if asked.prompt.thinks is not False else None,
            shown=chat.shown_ids(),
            grammar=asked.grammar,
        )
        for number in range(body.get("n", 1))
    ]
