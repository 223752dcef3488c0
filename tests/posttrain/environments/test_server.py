"""Environments behind NeMo Gym's contract: rewards over HTTP, contained verifiers, and bodies that are wrong."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import uvicorn
from tests.helpers import bound as bindings_of
from tests.helpers import child_process

from orogen.cli import main
from orogen.config.rl import EnvironmentConfig
from orogen.infer.serve.run import listen
from orogen.posttrain.environments import server as module
from orogen.posttrain.environments.gym import NemoGym
from orogen.posttrain.environments.interface import Said
from orogen.posttrain.environments.make import make_environment
from orogen.posttrain.environments.pool import Pool
from orogen.posttrain.environments.server import GymServer, task_rows

BITS = EnvironmentConfig(name="bits", kind="synthetic", family="parity", examples=3, level=4)
DESK = EnvironmentConfig(name="desk", kind="workplace", examples=2, level=2, turns=3)
BAD = EnvironmentConfig(name="bad", kind="synthetic", family="copy", seconds=2.0, memory_mb=700, examples=2)
MADE = {one.name: make_environment(one) for one in (BITS, DESK, BAD)}


@pytest.fixture(scope="module")
def port():
    """The server, on a socket of its own, with one process per environment."""
    pools = {"bad": Pool(BAD, workers=1, gives_up=False, module="tests.posttrain.environments.bad_worker")}
    pools |= {one.name: Pool(one, workers=1, gives_up=False) for one in (BITS, DESK)}
    with listen("127.0.0.1", 0) as bound:
        config = uvicorn.Config(GymServer(MADE, pools).app(), log_config=None)
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
        thread.start()
        while not running.started:
            time.sleep(0.01)
        yield bound.getsockname()[1]
        running.should_exit = True
        thread.join(20)
        assert not thread.is_alive() and all(worker._process is None for pool in pools.values() for worker in pool._all)


def ask(port, path, body, cookie=None, method="POST"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, {"cookie": cookie} if cookie else {})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read()), (answer.getheader("set-cookie") or "").partition(";")[0]
    connection.close()
    return found


def row(name, number=0):
    return {"environment": name, "number": number}


def spoken(text):
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def verdict(port, name, text, number=0):
    """Of an episode of one turn."""
    cookie = ask(port, "/seed_session", row(name, number))[2]
    status, found, _ = ask(port, "/verify", row(name, number) | {"response": {"output": [spoken(text)]}}, cookie)
    assert status == 200
    return found


def test_rewards_over_http_are_those_of_the_environments(port, tmp_path):
    """Of our client and our server: the desk with the calls that solve its task, and with others."""
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in task_rows(MADE)))
    far = NemoGym(EnvironmentConfig(name="far", kind="nemo_gym", corpus=str(file), url=f"http://127.0.0.1:{port}"))
    assert len(far) == 7
    bits, desk = far.example(1), far.example(4)
    own = MADE["bits"].example(1), MADE["desk"].example(1)
    assert [dict(m) for m in bits.messages] == own[0].messages and desk.tools == own[1].tools
    answer = lambda text: far.step(bits, far.start(bits), Said(text, text)).rewards  # noqa: E731
    assert answer(own[0].secret) == {"exact": 1.0} and answer("2") == {"exact": 0.0}

    def played(calls):
        state = far.start(desk)
        for name, arguments in calls:
            turn = far.step(desk, state, Said("", calls=((name, arguments),)))
            state = turn.state
        return turn.replies, far.step(desk, state, Said("done", "done")).rewards

    first, second = own[1].secret["calls"]
    replies, rewards = played([first, second])
    assert rewards == {"state": 1.0} and "error" not in json.loads(replies[0]["content"])
    replies, rewards = played([first, ("find_people", {"shoe": 3})])
    assert rewards == {"state": 0.0}
    assert json.loads(replies[0]["content"]) == {"error": "shoe is 3; expected no such argument"}


def test_without_a_session_the_response_s_calls_are_carried_out(port):
    calls = MADE["desk"].example(0).secret["calls"]
    items = [
        {"type": "function_call", "call_id": f"c{n}", "name": name, "arguments": json.dumps(arguments)}
        for n, (name, arguments) in enumerate(calls)
    ]
    asked = lambda some: ask(port, "/verify", row("desk") | {"response": {"output": some}})[1]  # noqa: E731
    assert asked([*items, spoken("done")])["reward"] == 1.0 and asked(items[:1])["reward"] == 0.0
    broken = [{**items[0], "arguments": "{"}]
    assert ask(port, "/verify", row("desk") | {"response": {"output": broken}})[0] == 422


def test_an_episode_ends_with_its_turns_and_its_session_with_its_verdict(port):
    cookie = ask(port, "/seed_session", row("desk"))[2]
    outputs = [ask(port, "/list_tickets", {}, cookie)[1] for _ in range(4)]
    over = {"error": "the episode is over"}
    assert [output == over for output in outputs] == [False, False, True, True]
    assert ask(port, "/verify", row("desk", 1) | {"response": {"output": []}}, cookie)[0] == 422
    (name, arguments), (last, rest) = MADE["desk"].example(0).secret["calls"]  # the second comes too late
    late = ask(port, "/seed_session", row("desk"))[2]
    for tool, given in ((name, arguments), ("list_tickets", {}), ("list_tickets", {}), (last, rest)):
        ask(port, f"/{tool}", given, late)
    assert ask(port, "/verify", row("desk") | {"response": {"output": []}}, late)[1]["reward"] == 0
    status, found, _ = ask(port, "/list_tickets", {}, cookie)
    assert status == 400 and found == {"detail": "the request has no session; expected /seed_session first"}


@pytest.mark.parametrize(
    ("said", "kind"), [("crash", "crash"), ("hang", "timeout"), ("flood", "flood"), ("nan", "nan")]
)
def test_a_verifier_that_misbehaves_is_masked_counted_and_replaced(port, said, kind):
    before = ask(port, "/health", b"", method="GET")[1]["faults"]["bad"].get(kind, 0)
    found = verdict(port, "bad", said)
    assert (found["reward"], found["mask_sample"], found["failure_kind"]) == (0.0, True, f"orogen:{kind}")
    assert found["environment"] == "bad" and found["failure_reason"]
    after = ask(port, "/health", b"", method="GET")[1]["faults"]["bad"][kind]
    good = verdict(port, "bad", "good")
    assert after == before + 1 and good["reward_components"] == {"a": 0.5} and good["mask_sample"] is False


def test_a_broken_environment_is_named_and_still_tried(port, monkeypatch):
    monkeypatch.setattr("orogen.posttrain.environments.pool.GIVE_UP", 2)
    broken = lambda: ask(port, "/health", b"", method="GET")[1]["broken"]  # noqa: E731
    kinds = [verdict(port, "bad", "crash")["failure_kind"] for _ in range(3)]
    assert kinds == ["orogen:crash"] * 3 and broken() == ["bad"]
    assert verdict(port, "bad", "good")["reward"] == 0.5 and broken() == []


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/seed_session", b"{", 422, "the body: Expecting property name"),
        ("/seed_session", b"\xff", 422, "the body: byte 0 is not UTF-8"),
        ("/seed_session", b"[" * 100, 422, "the body: it nests more than 64 deep"),
        ("/seed_session", [], 422, "the body holds list; expected a JSON object"),
        ("/seed_session", {}, 422, "the body: environment is missing; expected a string"),
        ("/seed_session", row("chess"), 422, "environment is 'chess'; expected one of bits, desk, bad"),
        ("/seed_session", row("bits", 3), 422, "number is 3; expected less than 3, the tasks of bits"),
        ("/seed_session", row("bits", -1), 422, "the body: number is -1; expected a whole number"),
        ("/verify", row("bits"), 422, "the body: response is missing"),
        ("/verify", row("bits") | {"response": {"output": [{"type": "x"}]}}, 422, "input[0].type is 'x'; expected"),
        ("/verify", {**row("bits"), "response": {"output": []}, "x": float("nan")}, 422, "NaN or Infinity"),
        ("/look", {}, 400, "the request has no session"),
        ("/aggregate_metrics", {"verify_responses": [{}]}, 422, "verify_responses[0].reward is missing"),
        ("/seed_session", b" " * 5000, 413, "the body has more than 4096 bytes"),
    ],
)
def test_a_wrong_body_is_refused_in_one_line(port, monkeypatch, path, body, status, message):
    monkeypatch.setattr(module, "MOST_BODY", 4096)
    found = ask(port, path, body)
    assert found[0] == status and message in found[1]["detail"] and "\n" not in found[1]["detail"]


def test_sessions_that_nobody_ends_are_bounded(port, monkeypatch):
    monkeypatch.setattr(module, "MOST_SESSIONS", 2)
    cookies = [ask(port, "/seed_session", row("desk"))[2] for _ in range(3)]
    assert [ask(port, "/list_tickets", {}, cookie)[0] for cookie in cookies] == [400, 200, 200]
    assert ask(port, "/health", b"", method="GET")[1]["sessions"] == 2


def test_results_are_described_without_masked_ones(port):
    rows = [("a", 1.0, False), ("a", 0.0, False), ("b", 0.5, False), ("b", 0.0, True)]
    results = [{"_ng_task_index": task, "reward": x, "mask_sample": mask} for task, x, mask in rows]
    found = ask(port, "/aggregate_metrics", {"verify_responses": results})[1]
    assert found["key_metrics"] == {"mean/reward": 0.5} and found["agent_metrics"]["max/reward"] == 1.0
    tasks = {one["_ng_task_index"]: one["mean/reward"] for one in found["group_level_metrics"]}
    assert tasks == {"a": 0.5, "b": 0.5}


def command(action, *more):
    small = bindings_of("copy/EnvironmentConfig.examples = 4", "RLConfig.workers = 1")
    return ["environments", action, "--gin_file", "gin_configs/posttrain/rl_toy.gin", *small, *map(str, more)]


def test_the_command_writes_tasks_and_refuses_what_does_not_fit(tmp_path, capsys):
    file = tmp_path / "tasks.jsonl"
    assert main(command("write", "--out", file, "--json")) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(file), "tasks": 204}
    first = json.loads(file.read_text().splitlines()[0])
    assert first["environment"] == "copy" and first["responses_create_params"]["input"][0]["role"] == "user"
    assert "secret" not in first
    for wrong in (command("write"), command("serve", "--out", file), command("write", "--out", tmp_path)):
        assert main(wrong) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_command_serves_until_it_is_ended():
    started = [sys.executable, "-m", "orogen.cli", *command("serve", "--port", 0, "--json")]
    with child_process(started, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": "src:."}) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told["environments"] == ["copy", "parity"]
        assert ask(told["port"], "/seed_session", row("copy"))[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
