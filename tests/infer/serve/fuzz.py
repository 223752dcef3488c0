"""Malformed bodies for every route, drawn from a seed: each must be answered in time, by JSON, with no fault of ours.

A few hundred run with the tests. All of them: python -m tests.infer.serve.fuzz [--count 10000] [--first 0]
"""

import argparse
import asyncio
import collections
import copy
import json
import random
import sys
import time
from typing import Any

from tests.infer.chats import WEATHER, tokenizer
from tests.infer.serve.harness import RENDERER, Client, Reply, lifespan, saying, worded

from orogen.infer.chat import Chat, own_template
from orogen.infer.serve.app import make_app
from orogen.infer.serve.conversation import RESPONSE
from orogen.infer.serve.exchange import Settings
from orogen.infer.serve.forms import CHAT, COMPLETION, NOT_OFFERED
from orogen.infer.service import Service

MOST_SECONDS = 10
ALLOWED = {200, 400, 404, 413}
SAYS = {"role": "user", "content": "hi"}
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "é"}'}}
FULL = {
    "/v1/completions": {"prompt": [5, 6, 7], "max_tokens": 2, "n": 1, "logprobs": 2, "stop": ["x"],
     "stop_token_ids": [9],
                        "logit_bias": {"3": 1}, "seed": 3, "temperature": 0.5, "top_p": 0.9, "echo": False,
                        "stream_options": {"include_usage": True}, "response_format": {"type": "text"}},
    "/v1/chat/completions": {"messages": [{"role": "system", "content": "a"}, SAYS, {"role": "assistant",
     "content": None,
                             "tool_calls": [CALL]}, {"role": "tool", "content": "b"}, {**SAYS,
                              "content": [{"type": "text",
                             "text": "é"}]}], "tools": [WEATHER], "tool_choice": "auto", "max_tokens": 2,
                              "logprobs": True,
                             "top_logprobs": 1, "chat_template_kwargs": {"enable_thinking": True},
                              "reasoning_budget": 3,
                             "response_format": {"type": "text"}},
    "/v1/responses": {"input": [SAYS, {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"},
                      {"type": "function_call_output", "call_id": "a", "output": "b"}, {"type": "reasoning",
                      "content": [{"type": "reasoning_text", "text": "é"}]}], "instructions": "a",
                      "tools": [{"type": "function", "name": "weather", "parameters": {}}], "tool_choice": "auto",
                      "max_output_tokens": 2, "top_logprobs": 1, "text": {"format": {"type": "text"}},
                      "reasoning": {"effort": "low"}, "include": ["message.output_text.logprobs"], "store": False},
    "/tokenize": {"messages": [SAYS], "tools": [WEATHER], "chat_template_kwargs": {}},
    "/detokenize": {"tokens": [1, 2, 3]},
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.5, 1e300, -0.0, float("nan"), float("inf"), 2**31, 2**63, -(2**63), 2**64,
     10**40, "",
    "x", "\u0000", "\ud800", "<|im_end|>", "﷐", "0", "json_schema", "required", [], [0], [None], [[]], [[1], 2], {},
     {"a": 1},
    {"type": "function", "function": {"name": "x"}}, {"type": "json_schema"}, {"role": "user"}, "x" * 10**4, [1] * 300,
    {str(i): i for i in range(400)}, {"a": {"b": [{"c": None}]}}, [SAYS] * 3, [{**SAYS, "role": "\n"}], ["a"] * 200,
]  # fmt: skip
NAMES = sorted({*COMPLETION.optional, *COMPLETION.required, *CHAT.optional, *CHAT.required, *RESPONSE.optional,
                *RESPONSE.required, *NOT_OFFERED, "other", "é"})  # fmt: skip


def malformed(draw: random.Random) -> tuple[str, bytes]:
    """A route and a body for it."""
    path = draw.choice(list(FULL))
    body = json.loads(json.dumps(FULL[path]))
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        where, key = draw.choice(list(_places(body)))
        kind = draw.random()
        if kind < 0.7:
            where[key] = copy.deepcopy(draw.choice(ODD))
        elif kind < 0.8 and isinstance(where, dict):
            del where[key]
        elif isinstance(body, dict):
            body[draw.choice(NAMES)] = copy.deepcopy(draw.choice(ODD))
        if not body:
            break
    if draw.random() < 0.15 and isinstance(body, dict):
        body["stream"] = True
    data = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    return path, _damaged(data, draw) if draw.random() < 0.25 else data


def _places(value: Any):
    """Every place in a body that holds a value."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _damaged(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    return draw.choice([
        data[:place], data[place:], data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :], data + data,
        data[:place] + draw.choice([b"[", b"{", b'"', b"\\", b",", b"\xff", b"\x00", b"[" * 5000]) + data[place:], b"",
        b"\xef\xbb\xbf" + data, data.decode("utf-8", "replace").encode("utf-16"), b"7" * 5000, b'{"a":' * 200,
    ])  # fmt: skip


def fault(reply: Reply) -> str | None:
    """What is wrong with a response; None if nothing is."""
    if reply.status not in ALLOWED:
        return f"status {reply.status}: {reply.text[:300]}"
    if reply.headers["content-type"].startswith("text/event-stream"):
        named = reply.text.startswith("event: ")
        data = [line[6:] for line in reply.text.split("\n") if line.startswith("data: ")]
        events = [json.loads(line) for line in data] if named else reply.events
        bad = [event for event in events if event.get("error") or event.get("type") in ("error", "response.failed")]
        return f"an error in a stream: {bad[0]}" if bad else None
    answer = reply.json
    if reply.status != 200 and ("\n" in answer["error"]["message"] or not 10 < len(answer["error"]["message"]) < 3000):
        return f"no clear line: {answer}"
    return None


async def run(first: int, count: int) -> tuple[list[str], collections.Counter]:
    """Faults, and how often each status came, over bodies `first` to `first + count`."""
    service = Service(worded(slots=16, script=saying("hm</think>yes")), limit=500)
    chat = Chat(tokenizer(), own_template("nemotron_3_nano"), RENDERER)
    app = make_app(service, Settings(name="tiny", most=4000, most_body=10**5), tokenizer=tokenizer(), chat=chat)
    faults, statuses = [], collections.Counter()
    async with lifespan(app):
        client = Client(app)
        for number in range(first, first + count):
            path, data = malformed(random.Random(number))
            begin = time.perf_counter()
            try:
                reply = await client.post(path, data)
                statuses[reply.status] += 1
                found = fault(reply)
            except Exception as error:  # it is what this looks for
                found = f"{type(error).__name__}: {error}"
            if time.perf_counter() - begin > MOST_SECONDS:
                found = f"it took {time.perf_counter() - begin:.1f} s"
            if service.open:
                found = f"{service.open} requests are left; {found}"
            if found:
                faults.append(f"{number} {path} {data[:300]!r}: {found}")
        assert service.failure is None
    return faults, statuses


def main() -> int:
    """Prints faults and statuses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    faults, statuses = asyncio.run(run(options.first, options.count))
    print("\n".join(faults[:20]), len(faults), "faults of", options.count, dict(statuses))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
