"""Other weights for an engine in the midst of answers, and through a server."""

import collections
import dataclasses
import http.client
import json
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tests.infer.chats import tokenizer
from tests.infer.engines import asked
from tests.infer.fake_engine import FakeEngine
from tests.infer.serve.live import post, serving

from orogen.checkpoint.open import Opened
from orogen.checkpoint.written import write_folder
from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.rl import EnvironmentConfig, RLConfig
from orogen.cost.assemble import assemble
from orogen.infer.engine import Engine
from orogen.infer.request import Sampling
from orogen.infer.serve.weights import Weights
from orogen.model.lm import initial_state
from orogen.posttrain import remote

CONFIG = EngineConfig(slots=3, max_length=64, page=8, chunk=16, prefill_tokens=32, steps=2)
PROMPTS = [[5, 9, 30, 7], list(range(40, 60)), [3]]


@pytest.fixture(scope="module")
def model():
    return made(tokenizer().vocab_size)


def made(vocab_size):
    """A model of random weights, whose config says nothing that its layers do not read, as a checkpoint's does."""
    model = ModelConfig(
        pattern="M*-", vocab_size=vocab_size, hidden_size=12, intermediate_size=14, num_attention_heads=6,
        num_key_value_heads=2, head_dim=5, mamba_num_heads=4, mamba_head_dim=3, n_groups=2, ssm_state_size=4,
        chunk_size=8,
    )  # fmt: skip
    plan, built = assemble(model, PlanConfig())
    params, buffers = map(built.laid, jax.jit(lambda: initial_state(model, 0))())
    return Opened(model, plan, built, jax.tree.map(lambda a: 3 * a, params), buffers, tokenizer())


def others(model):
    """Other weights of the model."""
    return jax.tree.map(lambda a: a * 0.7 + 0.01, model.params), model.buffers


def requests(tokens=12):
    return [asked(p, tokens, Sampling(seed=n), ignore_eos=True) for n, p in enumerate(PROMPTS)]


def told(outputs):
    return [[(c.id, c.logprob) for o in one for c in o.tokens] for one in outputs]


def test_answers_go_on_with_weights_that_are_handed_over(model):
    """Each token has the log-probability of the weights that chose it, which its version names."""
    same = Engine(model, CONFIG)
    before = told(same.run(requests()))
    engine, found, swapped = Engine(model, CONFIG), {}, False
    for request in requests():
        found[engine.submit(request)] = []
    while engine.busy:
        for output in engine.step():
            found[output.number].append(output)
        if not swapped and any(len(o.tokens) for one in found.values() for o in one):
            engine.swap(*others(model), version=7)
            swapped = True
    counts = []
    for outputs, alone in zip(found.values(), before, strict=True):
        versions, mine = [o.version for o in outputs for _ in o.tokens], told([outputs])[0]
        counts.append(old := versions.count(0))
        assert versions == [0] * old + [7] * (12 - old)
        assert mine[:old] == alone[:old] and mine[old] != alone[old]
    assert any(0 < old < 12 for old in counts)
    more = [asked(range(60, 95), 6, Sampling(seed=9))]
    engine.run(more)  # prefixes that other weights cached, too, are gone afterwards
    engine.give(model.params, model.buffers)
    assert told(engine.run(more)) == told(same.run(more))
    assert told(engine.run(requests())) == before


def test_later_requests_begin_with_nothing_that_earlier_weights_cached(model):
    """Though the version be the same, and others still run; by the same weights, prefixes are shared again."""
    engine, prompt = Engine(model, CONFIG), asked(range(60, 95), 6, Sampling(seed=9))
    for _ in range(2):
        engine.run([prompt])
    assert (cached := engine.stats.cached_tokens) > 0
    running = engine.submit(asked([3], 40, ignore_eos=True))
    found = {running: engine.step()}
    engine.swap(*others(model), version=0)
    number = engine.submit(prompt)
    found[number] = []
    while engine.busy:
        for output in engine.step():
            found[output.number].append(output)
    assert engine.stats.cached_tokens == cached and len(told(found.values())[0]) == 40
    new = Engine(model._replace(params=others(model)[0]), CONFIG)
    assert told([found[number]]) == told(new.run([prompt]))
    engine.run([prompt])
    assert engine.stats.cached_tokens > cached


@pytest.fixture
def server(model, tmp_path, monkeypatch):
    """A server whose engine may be given weights, and what it was opened with."""
    monkeypatch.setenv(remote.API_KEY, "secret")
    engine = Engine(model, CONFIG)
    weights = Weights(engine, tmp_path, model.config, None, CONFIG)
    with serving(engine, words=True, most=64, key="secret", weights=weights) as (port, _):
        yield SimpleNamespace(port=port, folder=tmp_path, engine=engine)


def remote_engine(server, model, **more):
    environments = (EnvironmentConfig(name="a", kind="workplace"),)
    rl = RLConfig(
        environments=environments, prompts=1, samples=2, max_tokens=4, template="plain",
        server=f"http://127.0.0.1:{server.port}", server_weights=str(server.folder), **{"slots": 3, **more},
    )  # fmt: skip
    return remote.RemoteEngine(rl, model.config, tokenizer())


def test_a_server_writes_what_an_engine_of_this_process_does(server, model):
    """To the bit, before and after other weights; text and all."""
    far, near = remote_engine(server, model), Engine(model, CONFIG)
    asked_for = [asked(p, 6, Sampling(seed=n)) for n, p in enumerate(PROMPTS)]
    rounds = []
    for version, weights in enumerate([(model.params, model.buffers), others(model)]):
        far.give(*weights, version=version, in_flight=False)
        near.give(*weights)
        one, other = far.run(asked_for, lambda v=version: rounds.append(v)), near.run(asked_for)
        assert told(one) == told(other)
        text = lambda found: ["".join(o.text for o in outputs) for outputs in found]  # noqa: E731
        assert text(one) == text(other) and [o[-1].finish for o in one] == [o[-1].finish for o in other]
        assert {o.version for outputs in one for o in outputs if o.tokens} == {version}
    assert set(rounds) == {0, 1} and len(list(server.folder.iterdir())) == 2
    after_a_kill = remote_engine(server, model)  # by a process that may have the same id
    after_a_kill.give(model.params, model.buffers, version=0, in_flight=False)
    after_a_kill.close()
    assert len(list(server.folder.iterdir())) == 2
    far.close()
    assert not list(server.folder.iterdir()) and told(after_a_kill.run(asked_for[:1], lambda: None))


@pytest.mark.parametrize(
    ("body", "key", "status", "message"),
    [
        ({"folder": "../outside"}, "secret", 403, "expected one inside the server's --weights"),
        ({"folder": "/etc"}, "secret", 403, "expected one inside the server's --weights"),
        ({"folder": "link"}, "secret", 403, "expected one inside the server's --weights"),
        ({"folder": "none"}, "secret", 400, "has no config.gin"),
        ({"folder": "other"}, "secret", 400, "a checkpoint of another model"),
        ({"folder": "other"}, "guess", 401, "API key"),
        ({"folder": 3}, "secret", 400, "folder is 3"),
    ],
)
def test_weights_that_a_server_does_not_load(server, model, tmp_path_factory, body, key, status, message):
    (server.folder / "link").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    wider = made(tokenizer().vocab_size + 8)
    write_folder(server.folder / "other", wider.config, wider.params, wider.buffers)
    reply = post(server.port, "/v1/weights", body, headers={"authorization": f"Bearer {key}"})
    assert reply.status == status and message in json.load(reply)["error"]["message"]


class Routing(FakeEngine):
    """One whose answers tell experts: of two tokens at first, then of one each; or none."""

    tells = True

    def step(self):
        found = super().step()
        sizes = [1 + (len(self.answered[o.number]) == 0) for o in found] if self.tells else []
        for output in found:
            self.answered[output.number] += output.tokens
        made = [np.full((n, 2, 3), n, np.int16) for n in sizes] or [None] * len(found)
        return [dataclasses.replace(o, experts=experts) for o, experts in zip(found, made, strict=True)]


def test_a_server_tells_experts_where_its_engine_does(model, tmp_path, monkeypatch):
    monkeypatch.setenv(remote.API_KEY, "secret")
    engine = Routing()
    engine.answered = collections.defaultdict(list)
    with serving(engine, words=False, key="secret", weights=object()) as (port, _):
        far = remote_engine(SimpleNamespace(port=port, folder=tmp_path), model, router_replay=True)
        (outputs,) = far.run([asked([5, 6], 3)], lambda: None)
        found = [o.experts for o in outputs if o.experts is not None]
        assert np.concatenate(found)[:, 0, 0].tolist() == [2, 2, 1, 1] and found[0].shape[1:] == (2, 3)
        engine.tells = False
        with pytest.raises(ConfigError, match="tells no experts; expected router_replay False"):
            far.run([asked([5, 6], 3)], lambda: None)


def test_a_server_that_refuses_or_is_not_there(server, model, monkeypatch):
    monkeypatch.setenv(remote.API_KEY, "guess")
    far = remote_engine(server, model)
    with pytest.raises(ConfigError, match="answers /v1/weights with 401: the API key"):
        far.give(model.params, model.buffers, version=0, in_flight=False)
    bounds = {"server_timeout": 0.5, "server_deadline": 0.5}
    nowhere = remote_engine(SimpleNamespace(port=1, folder=server.folder), model, **bounds)
    with pytest.raises(remote.ServerError, match="given up after 1 attempt in .*ConnectionRefusedError"):
        nowhere.run(requests(), lambda: None)
    for bad in ("secret\n", "sécret-x", "s\u2011", " secret"):
        monkeypatch.setenv(remote.API_KEY, bad)
        with pytest.raises(ConfigError, match="OROGEN_API_KEY holds .*; expected printable ASCII") as caught:
            remote_engine(server, model)
        assert bad.strip() not in str(caught.value)
    monkeypatch.delenv(remote.API_KEY)
    with pytest.raises(ConfigError, match="OROGEN_API_KEY is not; expected the key"):
        remote_engine(server, model)


def test_a_failure_of_one_answer_is_heard_before_the_others_are_asked_for(server, model, monkeypatch):
    """Here the first of 40, of which three are under way at once."""
    far, asked_for = remote_engine(server, model), []

    def answer(number, request):
        asked_for.append(number)
        if number == 0:
            raise remote.ServerError("gone")
        time.sleep(0.05)
        return []

    monkeypatch.setattr(far, "_answer", answer)
    with pytest.raises(remote.ServerError, match="gone"):
        far.run([asked([5], 1)] * 40, lambda: None)
    assert len(asked_for) < 20


def test_a_server_without_permission_takes_no_weights(model):
    with serving(Engine(model, CONFIG), words=True, most=64) as (port, _):
        reply = post(port, "/v1/weights", {"folder": "x"})
    assert reply.status == http.client.FORBIDDEN and "--weights" in json.load(reply)["error"]["message"]


def test_a_folder_holds_what_was_written(model, tmp_path):
    write_folder(tmp_path / "new", model.config, model.params, model.buffers)
    weights = Weights(Engine(model, CONFIG), tmp_path, model.config, None, CONFIG)
    for one, other in zip(jax.tree.leaves(weights.read("new").params), jax.tree.leaves(model.params), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
