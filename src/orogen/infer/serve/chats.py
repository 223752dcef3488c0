"""`/v1/chat/completions`: chats with reasoning, tools and streams."""

import asyncio
import dataclasses
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from orogen.config.checks import ConfigError, shown
from orogen.data.tokenizer import Tokenizer
from orogen.infer.answer import Answer, Part
from orogen.infer.chat import THOUGHT, Chat, Prompt
from orogen.infer.request import STOP, Chosen, Grammar, Output, Request
from orogen.infer.serve import forms
from orogen.infer.serve.body import ignored, read_body
from orogen.infer.serve.errors import bad
from orogen.infer.serve.exchange import Answers, Parts, check_end, ids_of, respond, token_text, usage
from orogen.infer.serve.messages import check_messages
from orogen.infer.tool_calls import Call, beginning, schemas_of

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
    parts.check_model(body)
    chat, loop = parts.need_chat(), asyncio.get_running_loop()
    asked = await loop.run_in_executor(parts.prompts, _asked, body, chat)
    requests = await asyncio.to_thread(_requests, body, asked, parts)
    answers, stream = Answers(parts, requests), body.get("stream", False)
    return await respond(request, answers, _Form(parts, body, asked), stream=stream, headers=ignored(unknown))


class _Form:
    """Answers in the route's form."""

    def __init__(self, parts: Parts, body: dict[str, Any], asked: Asked) -> None:
        self._parts, self._body, self._asked = parts, body, asked
        make = lambda: Answer(thinks=asked.prompt.thinks, tools=asked.tools, called=asked.called)  # noqa: E731
        self._choices = [Choice(make()) for _ in range(forms.choices(body))]
        self._same = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": parts.settings.name,
        }
        self._shows_ids = body.get("return_token_ids", False)
        self._prompt = {"prompt_token_ids": asked.prompt.ids} if self._shows_ids else {}

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """All of it at once."""
        async with answers:
            async for number, output in answers:
                check_end(output)
                self._take(self._choices[number], output)
        found = [self._message(number, choice) for number, choice in enumerate(self._choices)]
        return {**self._same, **self._prompt, "choices": found, "usage": self._usage()}

    async def events(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """Chunks of each choice, then the counts if they are wanted."""
        counts = self._body.get("stream_options", {}).get("include_usage", False)
        same = {**self._same, "object": "chat.completion.chunk", **({"usage": None} if counts else {})}
        for number in range(len(self._choices)):
            yield {**same, **self._prompt, "choices": [_chunk(number, {"role": "assistant", "content": ""})]}
        async for number, output in answers:
            check_end(output)
            choice = self._choices[number]
            deltas = self._take(choice, output)
            known = self._known(output.tokens)
            if known and not deltas:
                deltas = [{"content": ""}]  # what is known of tokens whose text waits
            for place, delta in enumerate(deltas):
                yield {**same, "choices": [{**_chunk(number, delta), **({} if place else known)}]}
            if output.finish is not None:
                yield {**same, "choices": [_chunk(number, {}, choice.finish)]}
        if counts:
            yield {**same, "choices": [], "usage": self._usage()}

    def _take(self, choice: Choice, output: Output) -> list[dict[str, Any]]:
        """Adds an output to a choice. Returns the deltas that tell what it adds."""
        choice.tokens += output.tokens
        found = choice.answer.push(output.text)
        if output.finish is not None:
            found += choice.answer.finish()
        deltas = [delta for part in found for delta in self._add(choice, part)]
        if output.finish is not None:
            choice.finish = "tool_calls" if choice.calls and output.finish == STOP else output.finish
        return deltas

    def _add(self, choice: Choice, part: Part) -> list[dict[str, Any]]:
        choice.reasoning += part.reasoning
        choice.content += part.content
        if part.call is not None:
            if choice.calls and not self._body.get("parallel_tool_calls", True):
                return []
            deltas = _call_deltas(part.call, len(choice.calls))
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
            known["logprobs"] = _logprobs(tokens, self._parts.tokenizer)
        if self._shows_ids and tokens:
            known["token_ids"] = ids_of(tokens)
        return known

    def _message(self, number: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.content or (None if choice.calls else "")}
        message["reasoning_content"] = choice.reasoning or None
        if choice.calls:
            message["tool_calls"] = choice.calls
        known = {"logprobs": None, **self._known(choice.tokens)}
        return {"index": number, "message": message, **known, "finish_reason": choice.finish}

    def _usage(self) -> dict[str, int]:
        return usage(len(self._asked.prompt.ids), sum(len(choice.tokens) for choice in self._choices))


def _chunk(number: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish}


def _call_deltas(call: Call, number: int) -> list[dict[str, Any]]:
    """A call as a stream tells it: its name, then each argument as a piece of a JSON object."""
    named = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
    deltas: list[dict[str, Any]] = [{"index": number, **named, "function": {"name": call.name, "arguments": ""}}]
    pieces = [
        f"{json.dumps(k, ensure_ascii=False)}: {json.dumps(v, ensure_ascii=False)}" for k, v in call.arguments.items()
    ]
    text = ["{" + pieces[0], *(f", {piece}" for piece in pieces[1:]), "}"] if pieces else ["{}"]
    deltas += [{"index": number, "function": {"arguments": piece}} for piece in text]
    return [{"tool_calls": [delta]} for delta in deltas]


def _logprobs(tokens: Sequence[Chosen], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """In the form of OpenAI's chats."""

    def told(token_id: int, logprob: float | None) -> dict[str, Any]:
        text, data = token_text(tokenizer, token_id)
        return {"token": text, "logprob": logprob, "bytes": data}

    tops = [[told(*one) for one in chosen.top] for chosen in tokens]
    listed = [{**told(c.id, c.logprob), "top_logprobs": top} for c, top in zip(tokens, tops, strict=True)]
    return {"content": listed, "refusal": None}


def _asked(body: dict[str, Any], chat: Chat) -> Asked:
    """The prompt of a body. A call that must be made is begun in it, after the end of thinking."""
    choice, tools = _chosen_tools(body)
    begun = beginning([tool["function"]["name"] for tool in tools or []], chat.calls) if choice == "called" else None
    grammar, options = forms.grammar(body), _options(body)
    if begun and grammar:
        raise bad("tool_choice asks for a call beside an answer of a given form; expected one of them")
    if begun or grammar:
        # Neither a call nor a grammar has room for thinking.
        if options.get("enable_thinking"):
            what = "a call that must be made" if begun else "an answer of a given form"
            raise bad(f"chat_template_kwargs.enable_thinking is True beside {what}; expected false")
        options["enable_thinking"] = False
    if begun and begun.rest:
        grammar = Grammar(kind="regex", text=begun.rest)
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
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise bad(f"tool_choice is {shown(choice)}; expected auto, none, required or a function")
        if choice == "required" and not tools:
            raise bad("tool_choice is 'required' without tools; expected tools")
        return "called" if choice == "required" else choice, tools if choice != "none" and tools else None
    name = choice["function"]["name"]
    named = [tool for tool in tools or [] if tool["function"]["name"] == name]
    if choice["type"] != "function" or not named:
        raise bad(f"tool_choice is {shown(choice)}; expected a function among tools")
    return "called", named[:1]


def _requests(body: dict[str, Any], asked: Asked, parts: Parts) -> list[Request]:
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
            max_tokens=tokens,
            logprobs=body.get("top_logprobs", 0) if body.get("logprobs") else None,
            budget=budget if asked.prompt.thinks is not False else None,
            shown=chat.shown_ids(),
            grammar=asked.grammar,
        )
        for number in range(forms.choices(body))
    ]
