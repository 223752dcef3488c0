"""NeMo Gym's contract as a client: episodes with a server in process, and servers that are hostile or broken."""

import contextlib
import http.server
import json
import threading
import time

import pytest

from orogen.config.checks import ConfigError
from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments import gym
from orogen.posttrain.environments.gym import NemoGym
from orogen.posttrain.environments.interface import FaultError, Said
from orogen.posttrain.environments.pool import Asked, Fault, Pool

TOOL = {"type": "function", "name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
PARAMS = {"input": [{"role": "user", "content": "What is there?"}], "tools": [TOOL]}
CALL = {"type": "function_call", "call_id": "c", "name": "look", "arguments": '{"at": "the door"}'}
ROW = {"responses_create_params": PARAMS, "ground_truth": ["b"]}


@contextlib.contextmanager
def served(answer):
    """A real server: `answer(handler, path, body)` writes a response. Yields its address and what it was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, body, self.headers.get("cookie")))
            answer(self, self.path, body)

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def say(handler, data, *, status=200, cookie=None, length=None):
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    handler.send_response(status)
    handler.send_header("content-length", str(len(data) if length is None else length))
    if cookie is not None:
        handler.send_header("set-cookie", cookie)
    handler.end_headers()
    handler.wfile.write(data)


def environment(folder, url, *rows, **fields):
    file = folder / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows or [ROW]))
    return EnvironmentConfig(name="far", kind="nemo_gym", corpus=str(file), url=url, **fields)


def test_an_episode_seeds_calls_and_verifies_in_one_session(tmp_path):
    def answer(handler, path, body):
        if path == "/v/seed_session":
            return say(handler, {}, cookie="session=one; Path=/; HttpOnly")
        if path == "/v/look":
            return say(handler, {"found": body["at"]}, status=418, cookie="session=two")
        return say(handler, body | {"reward": 0.75, "reward_components": {"a": 0.5, "b": 0.25}})

    with served(answer) as (url, asked):
        far = NemoGym(environment(tmp_path, f"{url}/v/"))
        example = far.example(0)
        assert example.messages == [{"role": "user", "content": "What is there?"}]
        assert example.tools[0]["function"]["name"] == "look"
        first = far.step(example, far.start(example), Said("", "", "let me", (("look", {"at": 3}), ("verify", {}))))
        last = far.step(example, json.loads(json.dumps(first.state)), Said("b", "b"))
    outputs = [reply["content"] for reply in first.replies]
    assert outputs == ['{"found": 3}', '{"error": "no tool \'verify\'"}'] and first.rewards is None
    assert last.rewards == {"a": 0.5, "b": 0.25} and last.left_out == 0
    assert [(path, cookie) for path, _, cookie in asked] == [
        ("/v/seed_session", None), ("/v/look", "session=one"), ("/v/verify", "session=two"),
    ]  # fmt: skip
    assert asked[0][1] == ROW and asked[2][1]["ground_truth"] == ["b"]
    items = asked[2][1]["response"]["output"]
    kinds = ["reasoning", "function_call", "function_call", "function_call_output", "function_call_output", "message"]
    assert [item["type"] for item in items] == kinds
    assert items[3]["call_id"] == items[1]["call_id"] != items[2]["call_id"]
    assert json.loads(items[1]["arguments"]) == {"at": 3} and items[5]["content"][0]["text"] == "b"


def test_the_last_turn_s_calls_are_carried_out_and_parts_that_do_not_add_up_are_one_reward(tmp_path):
    def answer(handler, path, body):
        return say(handler, {"reward": 2, "reward_components": {"a": 0.5}})

    with served(answer) as (url, asked):
        far = NemoGym(environment(tmp_path, url, turns=1))
        turn = far.step(far.example(0), far.start(far.example(0)), Said("", calls=(("look", {}),)))
    assert [path for path, *_ in asked] == ["/seed_session", "/look", "/verify"]
    assert turn.rewards == {"reward": 2.0} and turn.left_out == 1 and not turn.replies


@pytest.mark.parametrize("names", ["", "a\nb", "x" * 101, "\x1b[2J", [str(n) for n in range(33)]])
def test_parts_that_cannot_be_metrics_are_one_reward(tmp_path, names):
    names = [names] if isinstance(names, str) else names

    def answer(handler, path, body):
        return say(handler, {"reward": 1.0, "reward_components": {name: 1 / len(names) for name in names}})

    with served(answer) as (url, _):
        far = NemoGym(environment(tmp_path, url))
        turn = far.step(far.example(0), far.start(far.example(0)), Said("x", "x"))
    assert turn.rewards == {"reward": 1.0} and turn.left_out == len(names)


def drip(handler):
    """A byte at a time, each within any timeout of a socket, for ever."""
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(1000):
            handler.wfile.write(b" ")
            time.sleep(0.05)


def wait(handler):
    time.sleep(2)


BAD = {
    "no JSON": (lambda h: say(h, b"<html>"), "raised", "/verify: Expecting value at line 1, column 1; expected JSON"),
    "no object": (lambda h: say(h, [1]), "raised", "/verify answers list; expected a JSON object"),
    "deep": (lambda h: say(h, b"[" * 10**6), "raised", "it nests more than 64 deep"),
    "no reward": (lambda h: say(h, {}), "raised", "the server's reward is None; expected a number"),
    "text": (lambda h: say(h, {"reward": "1"}), "raised", "the server's reward is '1'; expected a number"),
    "truth": (lambda h: say(h, {"reward": True}), "raised", "the server's reward is True; expected a number"),
    "masked": (lambda h: say(h, {"reward": 1, "mask_sample": True, "failure_kind": "x:y"}), "raised", "nothing: x:y"),
    "moved": (lambda h: say(h, {"reward": 1}, status=307), "raised", "/verify answers status 307"),
    "refused": (lambda h: say(h, {"detail": "no"}, status=422), "raised", 'status 422: {"detail": "no"}'),
    "broken": (lambda h: say(h, b"oops\nhere", status=500), "crash", "/verify answers status 500: oops here"),
    "cut off": (lambda h: say(h, b'{"reward": 1}', length=99), "crash", "/verify: IncompleteRead"),
    "no HTTP": (lambda h: h.wfile.write(b"garbage\r\n\r\n"), "crash", "/verify: BadStatusLine garbage"),
    "gone": (lambda h: None, "crash", "/verify: RemoteDisconnected"),
    "cookie": (lambda h: say(h, {"reward": 1}, cookie="a b=c\x01"), None, {"reward": 1.0}),
    "flood": (lambda h: say(h, b" " * (2**20 + 1)), "flood", "/verify answers more than 1048576 bytes"),
    "slow": (wait, "timeout", "/verify has not answered within 0.45 s"),
    "drip": (drip, "timeout", "/verify has not answered within 0.45 s"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_verdict_is_a_fault_of_its_kind(tmp_path, monkeypatch, name):
    misbehave, kind, expected = BAD[name]
    monkeypatch.setattr(gym, "MOST_VERDICT", 2**20)
    with served(lambda handler, path, _: misbehave(handler) if path == "/verify" else say(handler, {})) as (url, _):
        far = NemoGym(environment(tmp_path, url, seconds=0.5))
        began = time.monotonic()
        if kind is None:
            assert far.step(far.example(0), far.start(far.example(0)), Said("x", "x")).rewards == expected
            return
        with pytest.raises(FaultError) as caught:
            far.step(far.example(0), far.start(far.example(0)), Said("x", "x"))
        assert (caught.value.kind, time.monotonic() - began < 1.5) == (kind, True) and expected in str(caught.value)


def test_a_turn_whose_time_is_over_before_a_post_is_a_timeout():
    with pytest.raises(FaultError, match="/verify has not answered within") as caught:
        gym._Server("http://127.0.0.1:1", -1.0, {}).required("verify", {})
    assert caught.value.kind == "timeout"


def test_faults_are_counted_and_a_server_that_is_gone_ends_the_run(tmp_path, monkeypatch):
    """In a process of its own, as in a run; nor is NaN a reward, or what would leave no sum of rewards finite."""
    monkeypatch.setattr("orogen.posttrain.environments.pool.GIVE_UP", 2)
    verdicts = iter([{"reward": float("nan")}, {"reward": "?"}, {"reward": -1e308}, {"reward": 1.0}])

    def answer(handler, path, body):
        say(handler, {} if path == "/seed_session" else next(verdicts))

    with served(answer) as (url, _):
        pool = Pool(environment(tmp_path, url, seconds=5.0), workers=1)
        ask = Asked(0, {"cookies": None, "items": [], "turns": 0}, Said("x", "x"))
        found = pool.verify([ask] * 4)
    assert [one.kind for one in found if isinstance(one, Fault)] == ["nan", "raised", "nan"]
    assert found[3].rewards == {"reward": 1.0} and dict(pool.faults) == {"nan": 2, "raised": 1}
    with pytest.raises(ConfigError, match="environment 'far': 2 verifications in a row had no answer"):
        pool.verify([ask] * 3)
    assert pool.faults["crash"] == 2
    pool.close()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "tasks.jsonl:1: responses_create_params is missing"),
        ({"responses_create_params": {"input": []}}, "tasks.jsonl: task 1: input is []; expected at least"),
        ({"responses_create_params": {"input": [{"type": "image"}]}}, "input[0].type is 'image'; expected message"),
        ({"responses_create_params": {"input": "a", "tools": [{"type": "search"}]}}, "tools[0].type is 'search'"),
        ({"responses_create_params": {"input": [CALL | {"arguments": "["}]}}, "messages[0].tool_calls[0].function.arg"),
        ({"responses_create_params": {"input": 3}}, "responses_create_params.input is 3; expected a string or a list"),
    ],
)  # fmt: skip
def test_a_malformed_task_is_named(tmp_path, row, message):
    with pytest.raises(ConfigError) as caught:
        NemoGym(environment(tmp_path, "http://h", row))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://h", "http://", "h:80", "http://h:99999", "http://a:b@h", "http://h?x=1", None])
def test_an_address_is_checked(url):
    with pytest.raises(ConfigError, match="EnvironmentConfig.url is .*; expected http:// or https:// and a host"):
        EnvironmentConfig(name="far", kind="nemo_gym", corpus="x", url=url)
