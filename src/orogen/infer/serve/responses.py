"""`/v1/responses`: chats as items and as a stream of named events. Nothing is kept between requests."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from orogen.infer.answer import Answer, Part
from orogen.infer.request import LENGTH, Chosen, Output
from orogen.infer.serve import forms
from orogen.infer.serve.body import ignored, read_body
from orogen.infer.serve.chats import Asked, call_deltas, logprobs_of, prepared
from orogen.infer.serve.conversation import RESPONSE, chat_of
from orogen.infer.serve.errors import HttpError
from orogen.infer.serve.events import Framing
from orogen.infer.serve.exchange import Answers, Parts, check_end, reasoning_tokens, respond
from orogen.infer.tool_calls import Call

# What of a body comes back in its response, and what that is where the body says nothing.
_ECHOED = {
    "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {},
    "parallel_tool_calls": True, "reasoning": {"effort": None, "summary": None}, "temperature": 1.0,
    "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": 1.0,
    "truncation": "disabled",
}  # fmt: skip


async def responses(request: HttpRequest) -> Response:
    """The route."""
    parts: Parts = request.app.state.parts
    body, unknown = await read_body(request, RESPONSE)
    parts.check_body(body)
    parts.need_chat()
    asked_body = await parts.preparing.run(chat_of, body)
    with parts.preparing.reserve() as reserved:
        asked, requests = await parts.preparing.run_chat(prepared, asked_body, parts, reserved=reserved)
        form, stream = _Form(parts, body, asked, logprobs=asked_body.get("logprobs", False)), body.get("stream", False)
        answers = Answers(parts, requests, salt=forms.salt(body), since=request.state.arrived, reserved=reserved)
        framing, headers = Framing(_event, form.failure, ""), ignored(unknown)
        return await respond(request, answers, form, stream=stream, headers=headers, framing=framing)


def _event(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"


class _Form:
    """Answers in the route's form."""

    def __init__(self, parts: Parts, body: dict[str, Any], asked: Asked, *, logprobs: bool) -> None:
        self._parts, self._body, self._asked, self._logprobs = parts, body, asked, logprobs
        self._answer = Answer(thinks=asked.prompt.thinks, tools=asked.tools, called=asked.called)
        self._tokens: list[Chosen] = []
        self._said = 0  # tokens whose log-probabilities have been told, or that belong to the thought
        self._items: list[dict[str, Any]] = []
        self._number = -1  # of the last event
        self._cached = 0
        self._finish: str | None = None
        same = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time())}
        told = {name: body.get(name, default) for name, default in _ECHOED.items()}
        self._same = {**same, "model": parts.settings.name, **told, "background": False, "store": False}
        self._same |= {"previous_response_id": None, "service_tier": "default"}

    async def collect(self, answers: Answers) -> None:
        """Takes all outputs."""
        async with answers:
            async for _, output in answers:
                check_end(output)
                self._finish = output.finish
                for _ in self._take(output):
                    continue

    def whole(self) -> dict[str, Any]:
        """All of it at once."""
        return self._response(self._finish)

    async def events(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """Named events, each with its number."""
        begun = {**self._same, "status": "in_progress", "output": [], "usage": None}
        begun |= {"error": None, "incomplete_details": None}
        for name in ("created", "in_progress"):
            yield self._numbered(f"response.{name}", response=begun)
        finish = None
        async for _, output in answers:
            try:
                check_end(output)
            except HttpError as error:
                failed = {"code": "server_error", "message": str(error)}
                yield self._numbered("response.failed", response={**begun, "status": "failed", "error": failed})
                return
            finish = output.finish
            for event in self._take(output):
                yield event
        whole = self._response(finish)
        yield self._numbered(f"response.{whole['status']}", response=whole)

    def failure(self, error: HttpError) -> dict[str, Any]:
        """The event that tells an error, the last of its stream."""
        told = error.body()["error"]
        code = told["code"] or told["type"]
        return self._numbered("error", code=code, message=told["message"], param=told["param"])

    def _numbered(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}

    def _response(self, finish: str | None) -> dict[str, Any]:
        cut = finish == LENGTH
        ended = {"status": "incomplete" if cut else "completed", "error": None}
        details = {"reason": "max_output_tokens"} if cut else None
        thought = reasoning_tokens(self._parts.tokenizer, self._tokens) if self._is("reasoning", first=True) else 0
        read, made = len(self._asked.prompt.ids), len(self._tokens)
        usage = {
            "input_tokens": read, "input_tokens_details": {"cached_tokens": self._cached}, "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": thought}, "total_tokens": read + made,
        }  # fmt: skip
        return {**self._same, **ended, "incomplete_details": details, "output": self._items, "usage": usage}

    def _take(self, output: Output) -> Iterator[dict[str, Any]]:
        """The events of what an output adds, which they have added once they are all read."""
        self._tokens += output.tokens
        self._cached = self._cached if output.cached is None else output.cached
        found = self._answer.push(forms.said(self._body, output))
        if output.finish is not None:
            found += self._answer.finish()
        for part in found:
            yield from self._add(part)
        if output.finish is not None:
            status = "incomplete" if output.finish == LENGTH else "completed"
            if status == "completed" and not (self._is("message") or self._is("function_call")):
                yield from self._closed(status)
                yield from self._opened("message")  # an answer of no text
            yield from self._closed(status)

    def _add(self, part: Part) -> Iterator[dict[str, Any]]:
        if part.call is not None:
            calls = sum(item["type"] == "function_call" for item in self._items)
            if not calls or self._body.get("parallel_tool_calls", True):
                yield from self._closed("completed")
                yield from self._called(part.call)
            return
        kind = "reasoning" if part.reasoning else "message"
        if not self._is(kind) or self._items[-1]["status"] != "in_progress":
            yield from self._closed("completed")
            yield from self._opened(kind)
        text, item = part.reasoning or part.content, self._items[-1]
        item["content"][0]["text"] += text
        place = {"item_id": item["id"], "output_index": len(self._items) - 1, "content_index": 0}
        if kind == "reasoning":
            yield self._numbered("response.reasoning_text.delta", **place, delta=text)
        else:
            new = self._new_logprobs()
            item["content"][0]["logprobs"] += new
            yield self._numbered("response.output_text.delta", **place, delta=text, logprobs=new)

    def _new_logprobs(self) -> list[dict[str, Any]]:
        """Those of tokens since the last ones, of the text alone."""
        if not self._logprobs:
            return []
        if not self._said and self._is("reasoning", first=True):
            self._said = reasoning_tokens(self._parts.tokenizer, self._tokens)
        new, self._said = self._tokens[self._said :], len(self._tokens)
        return logprobs_of(new, self._parts.tokenizer)

    def _is(self, kind: str, *, first: bool = False) -> bool:
        """Whether the last item, or the first, is of this kind."""
        return bool(self._items) and self._items[0 if first else -1]["type"] == kind

    def _opened(self, kind: str) -> Iterator[dict[str, Any]]:
        """Begins an item of text."""
        named: dict[str, Any] = {"id": f"{kind[:3]}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"}
        if kind == "message":
            item, part = {**named, "role": "assistant"}, {"type": "output_text", "annotations": [], "logprobs": []}
        else:
            item, part = {**named, "summary": []}, {"type": "reasoning_text"}
        place = {"output_index": len(self._items)}
        yield self._numbered("response.output_item.added", **place, item={**item, "content": []})
        place |= {"item_id": item["id"], "content_index": 0}
        yield self._numbered("response.content_part.added", **place, part={**part, "text": ""})
        self._items.append({**item, "content": [{**part, "text": ""}]})

    def _closed(self, status: str) -> Iterator[dict[str, Any]]:
        """Ends the item of text that is open, if one is."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        item["status"], part = status, item["content"][0]
        index = {"output_index": len(self._items) - 1}
        place = {**index, "item_id": item["id"], "content_index": 0}
        more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
        yield self._numbered(f"response.{part['type']}.done", **place, text=part["text"], **more)
        yield self._numbered("response.content_part.done", **place, part=part)
        yield self._numbered("response.output_item.done", **index, item=item)

    def _called(self, call: Call) -> Iterator[dict[str, Any]]:
        """An item that calls a function."""
        first, *rest = (delta["tool_calls"][0] for delta in call_deltas(call, 0))
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress", "arguments": ""}
        item |= {"call_id": first["id"], "name": call.name}
        place = {"output_index": len(self._items)}
        yield self._numbered("response.output_item.added", **place, item=dict(item))
        pieces = [delta["function"]["arguments"] for delta in rest]
        within = {**place, "item_id": item["id"]}
        for piece in pieces:
            yield self._numbered("response.function_call_arguments.delta", **within, delta=piece)
        item |= {"status": "completed", "arguments": "".join(pieces)}
        ended = {"arguments": item["arguments"], "name": call.name}
        yield self._numbered("response.function_call_arguments.done", **within, **ended)
        yield self._numbered("response.output_item.done", **place, item=item)
        self._items.append(item)
