"""The other routes, the key, limits, clients that vanish, a full queue, draining; without a network."""

import asyncio
import json
import threading
import time

import pytest
from tests.infer.chats import backend, tokenizer
from tests.infer.fake_engine import FakeEngine
from tests.infer.scheduled import capacity
from tests.infer.serve.harness import BODIES, with_client, worded

from orogen.config.checks import ConfigError
from orogen.infer.request import Request
from orogen.infer.schedule import Scheduler
from orogen.infer.serve import exchange
from orogen.infer.serve.measures import Measures


def ask(method: str, path: str, body=None, engine=None, headers=None, **settings):
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    return with_client(engine or worded(), lambda client: client.send(method, path, data, headers=headers), **settings)


def test_models():
    (model,) = ask("GET", "/v1/models", words=True).json["data"]
    assert model["id"] == "tiny" and model["object"] == "model" and model["max_model_len"] == 4000
    assert model["chat"] is True
    assert ask("GET", "/v1/models/tiny").json["chat"] is False
    assert ask("GET", "/v1/models/a/b").status == 404


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("PUT", "/", 405)]
)
def test_other_routes_answer_as_openai_does(method, path, status):
    reply = ask(method, path)
    assert reply.status == status
    assert reply.json["error"]["message"].startswith(f"{method} {path}: ") and reply.json["error"]["type"]


def test_the_key():
    use = {"engine": FakeEngine(), "key": "gehéim"}
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "gehéim"}, {"authorization": "Basic gehéim"}):
        encoded = {k: v.encode().decode("latin-1") for k, v in headers.items()}
        for path in ("/v1/models", "/tokenize", "/v1/completions", "/other"):
            reply = ask("POST", path, {}, headers=encoded, **use)
            assert reply.status == 401 and reply.json["error"]["code"] == "invalid_api_key"
    for path in ("/", "/health", "/metrics"):
        assert ask("GET", path, **use).status == 200


def test_the_right_key():
    headers = {"authorization": "Bearer secret"}
    assert ask("GET", "/v1/models", headers=headers, key="secret").status == 200
    assert ask("GET", "/v1/models", headers={"authorization": "bearer  secret "}, key="secret").status == 200
    assert ask("GET", "/v1/models", headers={"authorization": "Bearer secre"}, key="secret").status == 401


@pytest.mark.parametrize("told", [True, False])
def test_a_large_body_is_refused(told):
    body = b'{"prompt": [' + b"1," * 600 + b"1]}"
    headers = {"content-length": str(len(body))} if told else {}
    reply = ask("POST", "/v1/completions", body, headers=headers, most_body=1000)
    assert reply.status == 413 and "expected at most" in reply.error
    assert (
        ask("POST", "/v1/completions", body, headers=headers, most_body=len(body), engine=FakeEngine(most=2000)).status
        == 200
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"prompt": [1], "prompt": [2]}',
        b"[" * 10**5,
        b'{"prompt": ' + b"7" * 5000 + b"}",
    ],
)
def test_bodies_that_are_no_json_objects(body):
    reply = ask("POST", "/v1/completions", body)
    assert reply.status == 400 and reply.error.startswith("the body") and "expected" in reply.error


def test_tokenize_and_detokenize():
    ids = backend().encode("the é").ids
    reply = ask("POST", "/tokenize", {"prompt": "the é"}, words=True).json
    assert reply == {"count": len(ids) + 1, "max_model_len": 4000, "tokens": [tokenizer().bos_id, *ids]}
    assert ask("POST", "/tokenize", {"prompt": "the é", "add_special_tokens": False}, words=True).json["tokens"] == ids
    named = ask("POST", "/tokenize", {"prompt": "the", "return_token_strs": True}, words=True).json
    assert named["token_strs"] == ["<s>", *(backend().decode([i]) for i in named["tokens"][1:])]
    assert ask("POST", "/detokenize", {"tokens": ids}, words=True).json == {"prompt": "the é"}
    info = ask("GET", "/tokenizer_info", words=True).json  # lm-eval looks up the ids of what it names
    assert info["chat_template"] and {info[name] for name in ("bos_token", "eos_token")} <= set(
        tokenizer().special_names.values()
    )
    for name, found in (("eos_token", tokenizer().eos_id), ("bos_token", tokenizer().bos_id)):
        named = {"prompt": info[name], "add_special_tokens": False}
        assert ask("POST", "/tokenize", named, words=True).json["tokens"] == [found]
        assert found not in ask("POST", "/tokenize", {"prompt": f"{info[name]} a"}, words=True).json["tokens"][1:]
    assert "no tokenizer" in ask("GET", "/tokenizer_info").error
    chat = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"enable_thinking": False}}
    tokens = ask("POST", "/tokenize", chat, words=True).json["tokens"]
    assert backend().decode(tokens, skip_special_tokens=False).endswith("<|im_start|>assistant\n<think></think>")
    assert "expected one of them" in ask("POST", "/tokenize", {}, words=True).error
    assert "token ids from 9999" in ask("POST", "/detokenize", {"tokens": [9999]}, words=True).error
    assert "no tokenizer" in ask("POST", "/detokenize", {"tokens": [1]}).error
    assert "king" in ask("POST", "/tokenize", {"messages": [{"role": "king"}]}, words=True).error


def test_metrics_count():
    async def use(client):
        for body in ({"prompt": [5, 6], "n": 2}, {"prompt": [7]}, {"prompt": [8], "stream": True}, {"prompt": "x"}):
            await client.complete(**body)
        return (await client.get("/metrics")).text

    text = with_client(FakeEngine(fails=7), use)
    told = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert told["orogen_prompt_tokens_total"] == "6.0" and told["orogen_generation_tokens_total"] == "9.0"
    assert told["orogen_requests_waiting"] == told["orogen_requests_running"] == "0.0"
    finished = {k: v for k, v in told.items() if k.startswith("orogen_requests_finished_total")}
    assert finished == {'orogen_requests_finished_total{reason="length"}': "3.0",
                        'orogen_requests_finished_total{reason="error"}': "1.0"}  # fmt: skip
    assert (
        told["orogen_time_to_first_token_seconds_count"] == "3.0" and told["orogen_inter_token_seconds_count"] == "6.0"
    )
    assert told['orogen_http_responses_total{route="/v1/completions",status="200"}'] == "2.0"
    assert told['orogen_http_responses_total{route="/v1/completions",status="400"}'] == "1.0"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_takes_its_requests_along(stream):
    engine = FakeEngine(wait=0.01)

    async def use(client):
        gone = asyncio.Event()
        body = {"prompt": [[5], [6]], "max_tokens": 60, "stream": stream}
        task = asyncio.create_task(client.post("/v1/completions", body, gone=gone))
        await asyncio.sleep(0.1)
        gone.set()
        await task
        await asyncio.sleep(0.05)
        return (await client.get("/metrics")).text

    text = with_client(engine, use)
    assert not engine.busy and len(engine.cancelled) == 2
    assert 'orogen_requests_finished_total{reason="cancelled"} 2.0' in text
    assert "orogen_requests_waiting 0.0" in text and "orogen_requests_running 0.0" in text


def test_a_client_that_reads_nothing_holds_no_slot(monkeypatch):
    """Its connection takes no more, so that sending never ends: the stream's time ends it."""
    monkeypatch.setattr("orogen.infer.serve.events.LAST_SECONDS", 0.5)
    engine = FakeEngine(wait=0.01)

    async def use(client):
        async def stalled(message):
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        body = {"prompt": [5], "max_tokens": 60, "stream": True}
        task = asyncio.create_task(client.post("/v1/completions", body, stalled=stalled))
        await asyncio.sleep(0.35)
        assert not engine.busy and not task.done(), "the slot is free before the connection ends"
        await task

    with_client(engine, use, timeout=0.2)
    assert len(engine.cancelled) == 1


def test_a_slow_template_holds_up_no_other_route():
    async def use(client):
        chat = client.app.state.parts.chat
        chat.prompt = lambda *a, **k: time.sleep(0.6) or 1 / 0
        chats = [asyncio.create_task(client.chat()) for _ in range(40)]
        await asyncio.sleep(0.05)
        begin = time.perf_counter()
        reply = await client.complete(prompt=[5])
        took = time.perf_counter() - begin
        for task in chats:
            task.cancel()
        await asyncio.wait(chats)
        return reply, took

    reply, took = with_client(worded(), use, words=True)
    assert reply.status == 200 and took < 0.5


class Compiler:
    """Takes its time to compile, or refuses to."""

    def __init__(self, seconds: float = 0.0, error: str = "") -> None:
        self.seconds, self.error, self.seen, self.closed = seconds, error, [], False

    def prepare(self, grammar) -> None:
        time.sleep(self.seconds)
        self.seen.append(grammar.text)
        if self.error:
            raise ConfigError(self.error)

    def close(self) -> None:
        self.closed = True


def test_a_slow_grammar_holds_up_nobody_else():
    compiler = Compiler(seconds=0.4)

    async def use(client):
        slow = asyncio.create_task(client.complete(prompt=[5], guided_regex="a", n=2))
        await asyncio.sleep(0.05)
        begin = time.perf_counter()
        reply = await client.complete(prompt=[5])
        took = time.perf_counter() - begin
        assert not slow.done()
        return reply, took, await slow

    reply, took, slow = with_client(FakeEngine(), use, constraints=compiler)
    assert reply.status == slow.status == 200 and took < 0.3
    assert compiler.seen == ["a"], "once for all choices"
    assert compiler.closed


def test_a_grammar_that_is_refused_reaches_no_engine():
    engine = FakeEngine()
    compiler = Compiler(error="Grammar.text 'a(' is not closed; expected a regex")
    reply = with_client(engine, lambda c: c.complete(prompt=[5], guided_regex="a(", stream=True), constraints=compiler)
    assert (reply.status, reply.error) == (400, "the grammar 'a(' is not closed; expected a regex")
    assert engine.seen == []


def test_too_many_grammars(monkeypatch):
    monkeypatch.setattr("orogen.infer.serve.grammars.MOST_WAITING", 2)

    async def use(client):
        return await asyncio.gather(*(client.complete(prompt=[5], guided_regex="a" * n) for n in range(1, 5)))

    replies = with_client(FakeEngine(), use, constraints=Compiler(seconds=0.05))
    assert [reply.status for reply in replies] == [200, 200, 429, 429]


def test_a_full_queue():
    async def use(client):
        replies = await asyncio.gather(*(client.complete(prompt=[5], max_tokens=9) for _ in range(8)))
        return replies, (await client.get("/metrics")).text

    replies, text = with_client(FakeEngine(wait=0.01), use, limit=3)
    refused = [reply for reply in replies if reply.status == 429]
    assert len(refused) == 5 and sum(reply.status == 200 for reply in replies) == 3
    assert refused[0].headers["retry-after"] == "1" and refused[0].json["error"]["code"] == "queue_full"
    assert "orogen_requests_waiting 0.0" in text


def test_answers_to_one_body_come_together_or_not_at_all():
    engine = FakeEngine(wait=0.01)

    async def use(client):
        running = asyncio.create_task(client.complete(prompt=[6], max_tokens=20))
        await asyncio.sleep(0.05)
        refused = await client.complete(prompt=[5], n=3, max_tokens=50)
        return refused, await running

    refused, whole = with_client(engine, use, limit=3)
    assert (refused.status, whole.status) == (429, 200)
    assert not engine.busy


@pytest.mark.parametrize("stream", [False, True])
def test_more_answers_than_can_ever_be_open_are_no_full_queue(stream):
    engine = FakeEngine()
    reply = with_client(engine, lambda c: c.complete(prompt=[[5], [6]], n=2, stream=stream), limit=3)
    assert (reply.status, reply.error) == (
        400, "n, over all prompts, asks for 4 answers; expected 3 at most, all that can be open",
    )  # fmt: skip
    assert "retry-after" not in reply.headers and engine.seen == []


def test_draining_refuses_and_lets_end():
    async def use(client):
        service = client.app.state.parts.service
        running = asyncio.create_task(client.complete(prompt=[5], max_tokens=20))
        await asyncio.sleep(0.05)
        draining = asyncio.create_task(service.drain(5))
        await asyncio.sleep(0)
        refused, health = await client.complete(prompt=[5]), await client.get("/health")
        await draining
        return await running, refused, health

    whole, refused, health = with_client(FakeEngine(wait=0.01), use)
    assert whole.status == 200 and len(whole.json["choices"][0]["token_ids"]) == 20
    assert refused.status == 503 and refused.headers["retry-after"] and "shutting down" in refused.error
    assert health.status == 503 and health.json == {"status": "draining"}


def test_an_engine_that_broke():
    async def use(client):
        first = await client.complete(prompt=[7])
        return first, await client.complete(prompt=[5]), await client.get("/health")

    first, second, health = with_client(FakeEngine(breaks=7), use)
    assert (first.status, first.error) == (500, "the engine failed: the device is gone")
    assert second.status == 503 and health.status == 503 and health.json["error"] == "the device is gone"


def test_the_page():
    reply = ask("GET", "/")
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "http://" not in reply.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in reply.text


def test_metrics_count_slots_while_the_engine_changes_them():
    class Changing(dict):
        def __iter__(self):
            raise RuntimeError("dictionary changed size during iteration")

        items = values = keys = __iter__

    scheduler, measures = Scheduler(capacity()), Measures()
    measures.watch(lambda: scheduler)
    scheduler.submit(Request(prompt=(1, 2, 3), max_tokens=1))
    scheduler.round()
    scheduler._running = Changing(scheduler._running)
    assert b"orogen_slots_used 1.0" in measures.text()


def test_the_salt_of_a_body_reaches_the_engine_with_each_of_its_requests():
    engine = worded()

    async def use(client):
        replies = [
            await client.complete(prompt=[5], n=2, cache_salt="é"),
            await client.chat(cache_salt="b", max_tokens=1, stream=True),
            await client.post("/v1/responses", {"input": "a", "cache_salt": "c", "max_output_tokens": 1}),
            await client.complete(prompt=[5], cache_salt=None),
        ]
        wrong = await client.complete(prompt=[5], cache_salt=3)
        return [(reply.status, reply.headers.get("x-ignored-fields")) for reply in replies], wrong

    replies, wrong = with_client(engine, use, words=True)
    assert replies == [(200, None)] * 4 and engine.salts == ["é", "é", "b", "c", ""]
    assert wrong.status == 400 and "cache_salt is 3; expected a string" in wrong.error


def test_the_time_to_a_first_token_begins_with_the_body(monkeypatch):
    async def use(client):
        prompt_ids = client.app.state.parts.tokenizer.prompt_ids
        monkeypatch.setattr(
            client.app.state.parts.tokenizer, "prompt_ids", lambda text: time.sleep(0.3) or prompt_ids(text)
        )
        await client.complete(prompt="a")
        return (await client.get("/metrics")).text

    text = with_client(worded(), use, words=True)
    (line,) = (line for line in text.splitlines() if line.startswith("orogen_time_to_first_token_seconds_sum"))
    assert float(line.split()[1]) > 0.3


@pytest.mark.parametrize("path", BODIES)
def test_priorities_are_for_a_server_that_offers_them(path):
    body = BODIES[path] | {"priority": -1}
    reply = ask("POST", path, body, words=True)
    assert (reply.status, reply.error) == (400, "priority is -1; expected 0, or a server with --priorities")
    assert reply.json["error"]["param"] == "priority"
    assert ask("POST", path, body | {"priority": 0}, words=True).status == 200
    engine = worded()
    assert ask("POST", path, body, engine, words=True, priorities=True).status == 200
    assert [request.priority for request in engine.seen] == [-1]


@pytest.mark.parametrize(("tokens", "inside"), [(3, True), (3000, False)])
def test_large_answers_are_written_beside_the_event_loop(tokens, inside, monkeypatch):
    threads = []

    class Noted(exchange.JSONResponse):
        def render(self, content):
            threads.append(threading.current_thread() is threading.main_thread())
            return super().render(content)

    monkeypatch.setattr(exchange, "JSONResponse", Noted)
    for path, body in BODIES.items():
        body = body | {"max_output_tokens" if "input" in body else "max_tokens": tokens}
        assert ask("POST", path, body, worded(pace=500), words=True).status == 200
    assert threads == [inside] * 3
