"""The server before the engine itself: what only a model's own texts show."""

import asyncio
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest
from tests.infer.chats import backend, tokenizer
from tests.infer.engines import changed
from tests.infer.serve.live import ids_in, post, serving, stream

from orogen.checkpoint.open import Opened
from orogen.config.engine import EngineConfig
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.infer.engine import Engine
from orogen.model.lm import build, initial_state
from orogen.parallel.plan import single_device_plan

MOST = 2048
POISON = backend().token_to_id("<SPECIAL_11>")  # its embedding is NaN: who reads it fails


@pytest.fixture(scope="module")
def port():
    model = ModelConfig(
        pattern="-*", vocab_size=tokenizer().vocab_size, hidden_size=8, intermediate_size=12, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    params, buffers = jax.jit(lambda: initial_state(model, 0))()
    plan = single_device_plan(PlanConfig(dispatch="allgather"), model)
    opened = Opened(model, plan, build(model), params, buffers, tokenizer())
    opened = changed(opened, ("embedding", "weight"), lambda a: a.at[POISON].set(jnp.nan))
    config = EngineConfig(slots=4, max_length=MOST, page=64, chunk=256, prefill_tokens=256, steps=4)
    engine = Engine(opened, config)
    with serving(engine, words=True, most=MOST) as (port, service):
        yield port
        assert service.open == 0 and not engine.busy
        told = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    values = dict(line.rsplit(" ", 1) for line in told.splitlines() if line[0] != "#")
    assert {name: values[name] for name in values if "_held" in name or "_slots" in name} == {
        "orogen_slots": "4.0", "orogen_slots_used": "0.0", "orogen_pages_held": "0.0", "orogen_snapshots_held": "0.0",
    }  # fmt: skip


def chat(port: int, **body) -> dict:
    says = [{"role": "user", "content": "hi"}]
    reply = json.load(post(port, "/v1/chat/completions", {"messages": says, "max_tokens": 24, "seed": 3, **body}))
    return reply["choices"][0]


def test_thinking_ends_at_its_budget_and_the_tag_is_found(port):
    choice = chat(port, reasoning_budget=5, return_token_ids=True)
    close = backend().token_to_id("</think>")
    assert choice["token_ids"].index(close) == 5
    reasoning = choice["message"]["reasoning_content"].replace("<tool_call>", "")  # which decoding leaves out
    assert reasoning == tokenizer().decode(choice["token_ids"][:5]).strip("\n")


def test_answers_of_a_given_form(port):
    pytest.importorskip("llguidance")
    assert chat(port, guided_regex="(yes|no)")["message"]["content"] in ("yes", "no")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    ask = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}, "max_tokens": 90}
    choice = chat(port, **ask)
    assert choice["finish_reason"] == "length" or json.loads(choice["message"]["content"])["a"] in (1, 2)


def test_a_call_that_must_be_made_is_made(port):
    """By a model that learnt nothing."""
    pytest.importorskip("llguidance")
    count = {"type": "object", "properties": {"n": {"enum": [3, 5]}}, "required": ["n"]}
    tools = [{"type": "function", "function": {"name": "count", "parameters": count}},
             {"type": "function", "function": {"name": "stop"}}]  # fmt: skip
    choice = chat(port, tools=tools, tool_choice="required", max_tokens=99)
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    expected = {"count": [{"n": 3}, {"n": 5}], "stop": [{}]}
    assert json.loads(call["function"]["arguments"]) in expected[call["function"]["name"]]


def test_streams_beside_each_other_are_those_alone(port):
    asks = [{"prompt": [20 + n, 90 + n], "max_tokens": 9, "seed": n, "ignore_eos": True, "return_token_ids": True}
            for n in range(12)]  # fmt: skip

    async def together():
        return [ids_in(events) for events in await asyncio.gather(*(stream(port, ask) for ask in asks))]

    found = asyncio.run(together())
    assert found == [ids_in(asyncio.run(stream(port, ask))) for ask in asks]
    assert len({tuple(ids) for ids in found}) == 12


def test_logits_that_are_no_numbers_fail_their_request_alone(port):
    ask = {"max_tokens": 9, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    prompts = [[20 + n, 90 + n] for n in range(6)]

    async def together():
        poisoned = [stream(port, {**ask, "prompt": [5, POISON, n]}) for n in (5, 6)]
        sound = [stream(port, {**ask, "prompt": prompt}) for prompt in prompts]
        return await asyncio.gather(*sound, *poisoned)

    *sound, first, second = asyncio.run(together())
    for events in (first, second):
        assert events[-1][1]["error"]["message"] == "the logits of token 0 are not numbers, or allow no token"
    assert [ids_in(e) for e in sound] == [ids_in(asyncio.run(stream(port, {**ask, "prompt": p}))) for p in prompts]
    reply = post(port, "/v1/completions", {**ask, "prompt": [POISON]})
    assert reply.status == 500 and json.load(reply)["error"]["type"] == "server_error"


def test_a_request_beyond_the_memory_and_clients_that_vanish(port):
    assert post(port, "/v1/completions", {"prompt": [5] * 10 * MOST, "max_tokens": 5}).status == 400

    async def leave():
        ask = {"prompt": [5], "max_tokens": 2000, "ignore_eos": True, "return_token_ids": True}
        await asyncio.gather(*(stream(port, ask, leave_after=1) for _ in range(9)))

    asyncio.run(leave())
    with ThreadPoolExecutor(4) as threads:
        assert [
            r.status for r in threads.map(lambda n: post(port, "/v1/completions", {"prompt": [n]}), range(5, 9))
        ] == [200] * 4
