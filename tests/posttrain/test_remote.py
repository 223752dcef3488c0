"""Rollouts by a server that refuses, drops, hangs, loses answers, or is started anew with other weights.

The engine and the server are real, and so are the faults, of a server in front of it (`faulty.py`).
"""

import contextlib
import json
import threading
import time
from types import SimpleNamespace

import pytest
from tests.infer.chats import tokenizer
from tests.infer.engines import asked
from tests.infer.serve.live import serving
from tests.infer.test_swap import CONFIG, PROMPTS, made, others, remote_engine, told
from tests.posttrain.faulty import Fault, front

from orogen.infer.engine import Engine
from orogen.infer.request import Sampling
from orogen.infer.serve.weights import Weights
from orogen.posttrain import calls, remote
from orogen.posttrain.calls import Patience

ASKED = [asked(prompt, 6, Sampling(seed=n)) for n, prompt in enumerate(PROMPTS)]
BUSY = Fault(status=429, headers={"retry-after": "0"})


@pytest.fixture(scope="module")
def model():
    return made(tokenizer().vocab_size)


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    monkeypatch.setenv(remote.API_KEY, "secret")
    monkeypatch.setattr(calls, "FIRST_WAIT", 0.02)


@contextlib.contextmanager
def served(model, folder, faults=()):
    """A server with an engine of its own, and the one in front of it."""
    engine = Engine(model, CONFIG)
    weights = Weights(engine, folder, model.config, None, CONFIG)
    with (
        serving(engine, words=True, most=64, key="secret", weights=weights) as (port, service),
        front(port, faults) as one,
    ):
        yield SimpleNamespace(port=one.port, folder=folder, engine=engine, front=one, service=service)


def far_of(server, model, **more):
    more = {"server_timeout": 20.0, "server_deadline": 60.0, "slots": 1} | more
    return remote_engine(server, model, **more)


def test_faults_change_no_bit_and_count_nothing_twice(model, tmp_path):
    """Weights whose answer is lost are given again, and a request whose answer is lost is answered again."""
    faults = [
        BUSY,
        Fault("lost"),
        None,
        BUSY,
        Fault("drop"),
        None,
        Fault("lost"),
        Fault(status=503),
        None,
        Fault("half"),
    ]
    near = Engine(model, CONFIG)
    near.give(*others(model))
    with served(model, tmp_path, {n: f for n, f in enumerate(faults) if f}) as server:
        far = far_of(server, model)
        far.give(*others(model), version=3, in_flight=False)
        found = far.run(ASKED, lambda: None)
        assert told(found) == told(near.run(ASKED)) and len(server.front.asked) == len(faults) + 1
        assert {output.version for one in found for output in one if output.tokens} == {3}
        assert far.retries() == 7 and far.retries() == 0


def test_a_server_that_hangs_is_asked_again(model, tmp_path):
    with served(model, tmp_path, {2: Fault("hang"), 4: Fault("slow")}) as server:
        far = far_of(server, model)
        far.give(model.params, model.buffers, version=0, in_flight=False)
        far.run(ASKED[:1], lambda: None)  # compiles
        far._calls._patience = Patience(timeout=1.0, deadline=60.0, retries=8)
        found = far.run(ASKED, lambda: None)
        assert told(found) == told(Engine(model, CONFIG).run(ASKED)) and far.retries() == 2


def test_a_server_started_anew_gets_the_weights_again(model, tmp_path):
    """Its own weights are others; none of their tokens is taken, though several requests hear of them at once."""
    near = Engine(model, CONFIG)
    near.give(*others(model))
    expected = told(near.run(ASKED))
    with served(model, tmp_path) as server:
        far = far_of(server, model, slots=3)
        far.give(*others(model), version=5, in_flight=False)
        far.run(ASKED, lambda: None)
        server.engine.give(model.params, model.buffers)  # as if it had just been started
        given = lambda: [body for path, body in server.front.asked if path == "/v1/weights"]  # noqa: E731
        before = len(given())
        found = far.run(ASKED, lambda: None)
        assert {output.version for one in found for output in one if output.tokens} == {5}
        assert [[i for i, _ in one] for one in told(found)] == [[i for i, _ in one] for one in expected]
        assert len(given()) == before + 1 and given()[-1]["folder"] == given()[0]["folder"] and far.retries() >= 3


def test_weights_that_come_amid_answers_are_ours(model, tmp_path):
    """A request that is sent while the server still has the ones before is no stranger's."""
    with served(model, tmp_path) as server:
        far = far_of(server, model, slots=2)
        far.give(model.params, model.buffers, version=0, in_flight=False)
        versions = iter(range(1, 100))
        more = [asked(p, 24, Sampling(seed=n), ignore_eos=True) for n, p in enumerate(PROMPTS * 3)]
        found = far.run(more, lambda: far.give(*others(model), version=next(versions), in_flight=True))
        seen = {output.version for one in found for output in one if output.tokens}
        assert len(seen) > 1 and seen <= set(range(100)) and far.retries() == 0


def test_a_run_ends_with_one_line_and_does_not_wait_for_what_hangs(model, tmp_path):
    """One request is refused to the end while two others hang."""
    faults = {1: Fault("hang"), 2: Fault("hang"), **dict.fromkeys(range(3, 9), Fault("drop"))}
    with served(model, tmp_path, faults) as server:
        far = far_of(server, model, slots=3, server_retries=2)
        far.give(model.params, model.buffers, version=0, in_flight=False)
        began, last = time.monotonic(), f"http://127.0.0.1:{server.port}/v1/completions: given up after 3 attempts in "
        with pytest.raises(remote.ServerError) as caught:
            far.run(ASKED, lambda: None)
        assert time.monotonic() - began < 10 and last in str(caught.value) and "\n" not in str(caught.value)
        assert not [one for one in threading.enumerate() if one.name.startswith("ThreadPool")]
        server.front.faults.clear()
        assert told(far.run(ASKED[:1], lambda: None)) == told(Engine(model, CONFIG).run(ASKED[:1]))


SHARED = [asked([*range(40, 80), n], 6, Sampling(seed=n), ignore_eos=True) for n in range(9)]  # pieces of 16 tokens


@contextlib.contextmanager
def replaced(model, server, engine):
    """As if the server had ended and another process, with this engine, had taken its place."""
    weights = Weights(engine, server.folder, model.config, None, CONFIG)
    with serving(engine, words=True, most=64, key="secret", weights=weights) as (port, _):
        server.front.behind = port
        yield


def check_undisturbed(model, found, version):
    """That they are what other weights of the model write, up to the rounding of requests that are read together."""
    near = Engine(model, CONFIG)
    near.give(*others(model))
    for one, other in zip(told(found), told(near.run(SHARED)), strict=True):
        assert [i for i, _ in one] == [i for i, _ in other]
        assert max(abs(p - q) for (_, p), (_, q) in zip(one, other, strict=True)) < 1e-5
    assert {output.version for one in found for output in one if output.tokens} == {version}


def rest(engine, when):
    """Lets an engine that has its own weights rest while `when(outputs so far)` holds, and until it has all requests:
    faster or slower machines would have it read and write more or less before it is given others."""
    step, before, outputs = engine.step, engine.stats.requests, []

    def resting():
        if engine.version == 0 and (engine.stats.requests - before < len(SHARED) or when(outputs)):
            time.sleep(0.01)
            return []
        found = step()
        outputs.extend(found)
        return found

    engine.step = resting


@pytest.mark.parametrize("instance", ["another", "the same"])
def test_no_answer_depends_on_what_other_weights_cached(model, tmp_path, instance):
    """More requests than the server has slots: when the first answers are foreign, others wait that take the prompt
    from the cache. All of their tokens are by our weights, with log-probabilities of neither."""
    with served(model, tmp_path) as server, contextlib.ExitStack() as stack:
        far, engine = far_of(server, model, slots=9), server.engine
        far.give(*others(model), version=5, in_flight=False)
        if instance == "another":
            engine = Engine(model, CONFIG)
            stack.enter_context(replaced(model, server, engine))
        else:
            engine.give(model.params, model.buffers)
        rest(engine, lambda outputs: any(output.finish for output in outputs))
        check_undisturbed(model, far.run(SHARED, lambda: None), 5)
        assert far.retries() >= len(SHARED)


def test_weights_that_reach_a_server_started_anew_amid_its_answers(model, tmp_path):
    """Before any answer of its own: all tokens are by our weights, after prompts that its own have read."""
    with served(model, tmp_path) as server:
        far, engine = far_of(server, model, slots=9), Engine(model, CONFIG)
        far.give(*others(model), version=5, in_flight=False)
        read = lambda outputs: engine.stats.read_tokens > 0  # noqa: E731
        rest(engine, read)

        def give_once():
            if engine.version == 0 and read(None):
                far.give(*others(model), version=6, in_flight=True)

        with replaced(model, server, engine):
            check_undisturbed(model, far.run(SHARED, give_once), 6)
        assert far.retries() >= len(SHARED)
        assert sum(path == "/v1/weights" for path, _ in server.front.asked) == 2


@pytest.mark.parametrize("held", [False, True])
def test_weights_that_are_sent_again_take_no_longer_than_their_call(model, tmp_path, monkeypatch, held):
    """Neither the request that sends them, here to a server that hangs, nor one that waits for who gives them."""
    late = Fault(status=503, headers={"retry-after": "2"})
    choice = {"token_ids": [1], "logprobs": {"token_logprobs": [-1]}, "token_versions": [0], "finish_reason": "length"}
    foreign = Fault(status=200, text=json.dumps({"instance": "b", "choices": [choice]}))
    with front(faults=[Fault(status=200, text='{"instance": "a"}')]) as server:
        far = far_of(SimpleNamespace(port=server.port, folder=tmp_path), model, slots=2)
        far._calls._patience = Patience(timeout=3.0, deadline=3.0, retries=8)
        far.give(model.params, model.buffers, version=0, in_flight=False)
        taken = server.take

        def take(path, body):
            taken(path, body)
            return Fault("hang") if path == "/v1/weights" else late if len(server.asked) <= 2 else foreign

        monkeypatch.setattr(server, "take", take)
        if held:
            far._giving.acquire()
            threading.Timer(8, far._giving.release).start()
        began = time.monotonic()
        with pytest.raises(remote.ServerError, match="given up after"):
            far.run(ASKED[:1], lambda: None)
        assert time.monotonic() - began < 4.5


def test_another_kind_of_server_is_named(model, tmp_path):
    with front(faults=[Fault(status=200, text='{"choices": [{"text": "a"}]}')]) as server:
        far = far_of(SimpleNamespace(port=server.port, folder=tmp_path), model)
        with pytest.raises(remote.ServerError, match="expected ids, log-probabilities and versions"):
            far.run(ASKED[:1], lambda: None)
    with front(faults=[Fault(status=200, text='{"version": 1}')]) as server:
        far = far_of(SimpleNamespace(port=server.port, folder=tmp_path), model)
        with pytest.raises(remote.ServerError, match="expected its instance, as of an `orogen serve`"):
            far.give(model.params, model.buffers, version=0, in_flight=False)


def test_progress_is_told_while_weights_are_given(model, tmp_path):
    """While the server takes them, and while another thread gives some."""
    told = []
    with front(faults=[Fault("hang"), *[Fault(status=200, text='{"instance": "a"}')] * 2]) as server:
        far = far_of(SimpleNamespace(port=server.port, folder=tmp_path), model, server_timeout=1.0)
        give = lambda: far.give(model.params, model.buffers, version=0, in_flight=False, progress=told_once)  # noqa: E731
        told_once = lambda: told.append(0)  # noqa: E731
        give()
        assert 4 <= len(told) <= 20
        told.clear()
        far._giving.acquire()
        threading.Timer(1.0, far._giving.release).start()
        give()
        assert len(told) >= 4
