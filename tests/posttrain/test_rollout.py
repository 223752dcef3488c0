"""Episodes of several turns, with a scripted engine; and weights on the plan of an engine."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tests.helpers import hybrid, run_config, several_devices
from tests.infer.chats import tokenizer
from tests.posttrain.environments import test_gym as gym

from orogen.config.data import DataConfig
from orogen.config.rl import EnvironmentConfig, RLConfig
from orogen.cost.assemble import assemble
from orogen.infer.chat import Chat, own_template
from orogen.infer.request import LENGTH, STOP, Chosen, Output
from orogen.model.lm import initial_state
from orogen.parallel import placement
from orogen.posttrain.dialogue import Plain, Templated, said_of
from orogen.posttrain.environments.make import make_environment
from orogen.posttrain.rollout import Draw, Rollouts, seed_of
from orogen.posttrain.samples import Sample, Track, batch_of

DESK = EnvironmentConfig(name="desk", kind="workplace", turns=4)


class Scripted:
    """An engine that says what it is told, one text per request, by turn."""

    def __init__(self, *texts, finish=STOP):
        self.texts, self.finish, self.requests = list(texts), finish, []

    def run(self, requests, progress):
        text = self.texts.pop(0)
        self.requests += requests
        ids = tokenizer().encode(text).tolist() + [sorted(tokenizer().end_ids)[-1]]
        tokens = tuple(Chosen(one, -0.5 - place / 64) for place, one in enumerate(ids))
        return [[Output(0, tokens[:1]), Output(0, tokens[1:], text, self.finish)] for _ in requests]


def config(length=9000, **rl):
    fields = {"environments": (DESK,), "prompts": 1, "samples": 2, "max_tokens": 900, "template": "plain", "workers": 1}
    model = hybrid(pattern="-", mtp_depths=0, vocab_size=400)
    data = DataConfig(corpus="environments", tokenizer="byte")
    made = run_config(model, data=data, sequence_length=length)
    return dataclasses.replace(made, rl=RLConfig(**(fields | rl)))


@pytest.fixture(params=["plain", "nemotron_3_nano"])
def rollouts(request):
    if request.param == "plain":
        form, called = Plain(tokenizer()), json_call
    else:
        form, called = Templated(Chat(tokenizer(), own_template("nemotron_3_nano"))), xml_call
    made = Rollouts(config(), tokenizer(), {"desk": make_environment(DESK)}, form)
    yield made, called
    made.close()


def json_call(name, arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def xml_call(name, arguments):
    parts = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"Let me see.</think><tool_call>\n<function={name}>\n{parts}</function>\n</tool_call>"


def test_a_task_may_begin_with_thoughts_and_calls(rollouts, tmp_path, monkeypatch):
    """Of NeMo Gym: the prompt has the calls and their outputs."""
    made, _ = rollouts
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "I must look."}]}
    output = {"type": "function_call_output", "call_id": "c", "output": "a key"}
    asked = {"input": [*gym.PARAMS["input"], thought, gym.CALL, output], "tools": [gym.TOOL]}
    far = gym.NemoGym(gym.environment(tmp_path, "http://h", {"responses_create_params": asked}))
    monkeypatch.setitem(made._environments, "far", far)
    episode = made._begin(Draw("far", 0, 0, (1,)))
    assert made._open(episode)
    text = tokenizer().decode(episode.opened.ids)
    assert all(part in text for part in ("What is there?", "the door", "a key"))


def test_an_episode_of_tools_is_learned_turn_by_turn(rollouts):
    made, called = rollouts
    example = make_environment(DESK).example(5)
    ((name, arguments),) = example.secret["calls"]
    texts = called("list_tickets", {}), called(name, arguments), "</think>Done."
    engine = Scripted(*texts)
    draws = [Draw("desk", 5, 0, (1, sample)) for sample in range(2)]
    one, other = made.write(draws, engine, temperature=1.0)
    assert one.said == list(texts) and one.rewards == {"state": 1.0} and one.reward == 1.0 and one.fault is None
    assert [t.ids for t in one.tracks] == [t.ids for t in other.tracks] and not one.overlong
    seeds = [request.sampling.seed for request in engine.requests]
    assert len(set(seeds)) == 6 and seeds[0] == seed_of(1, 0, 0) and seeds[3] == seed_of(1, 1, 1)
    # What was chosen, in order, with its log-probabilities; each prompt is the beginning of a track.
    expected = [tokenizer().encode(text).tolist() + [sorted(tokenizer().end_ids)[-1]] for text in texts]
    chosen = [i for t in one.tracks for i, mine in zip(t.ids, t.chosen, strict=True) if mine]
    assert chosen == sum(expected, []) and one.tokens == len(chosen)
    assert one.longest == max(map(len, expected)) < one.tokens
    reported = [p for t in one.tracks for p, mine in zip(t.rollout, t.chosen, strict=True) if mine]
    assert reported == [-0.5 - place / 64 for ids in expected for place in range(len(ids))]
    read = tokenizer().decode(engine.requests[2].prompt)  # the second turn: the first one's tool has answered
    assert all(f'"id": "{ticket}"' in read for ticket in example.secret["start"]["tickets"])
    for request in engine.requests:
        assert any(t.ids[: len(request.prompt)] == list(request.prompt) for t in one.tracks)
    assert not any(t.chosen[0] for t in one.tracks)


@pytest.mark.parametrize("argument", ['"\\ud800"', "[" * 500 + "]" * 500], ids=["surrogate", "nested"])
def test_a_conversation_that_cannot_go_on_is_a_fault_of_its_sample(argument):
    form = Templated(Chat(tokenizer(), own_template("nemotron_3_nano")))
    made = Rollouts(config(), tokenizer(), {"desk": make_environment(DESK)}, form)
    text = f'Let me see.</think><tool_call>{{"name": "find_people", "arguments": {{"name": {argument}}}}}</tool_call>'
    (sample,) = made.write([Draw("desk", 5, 0, (1,))], Scripted(text, "</think>Done."), temperature=1.0)
    made.close()
    assert np.isnan(sample.reward) and sample.fault is not None and sample.fault.startswith("unreadable: ")
    assert made.faults == {"unreadable": 1}


def test_a_row_that_is_full_ends_an_episode_without_reward():
    form = Plain(tokenizer())
    first = len(form.open(make_environment(DESK).example(5), make_environment(DESK).example(5).messages, None).ids)
    made = Rollouts(config(length=first + 40, max_tokens=30), tokenizer(), {"desk": make_environment(DESK)}, form)
    engine = Scripted(json_call("list_tickets", {}), finish=LENGTH)
    (sample,) = made.write([Draw("desk", 5, 0, (1,))], engine, temperature=1.0)
    made.close()
    assert sample.overlong and sample.reward == 0 and len(engine.requests) == 1
    assert engine.requests[0].max_tokens == 30


def test_said_is_taken_apart_as_a_server_would():
    example = make_environment(DESK).example(5)
    opened = Templated(Chat(tokenizer(), own_template("nemotron_3_nano"))).open(example, example.messages, None)
    call = xml_call("cancel_meeting", {"meeting": "m1"}).removeprefix("Let me see.</think>")
    found = said_of("I think.\n</think>\nHello " + call, opened, example.tools)
    assert found.reasoning == "I think." and found.content == "Hello"
    assert found.calls == (("cancel_meeting", {"meeting": "m1"}),)


def test_filtered_failed_and_mismatched_samples_weigh_nothing():
    """Of four samples: one overlong, one whose verifier failed, one too far from the trainer, one to learn."""

    def sample(number, reward, rollout, **more):
        track = Track.of_prompt([1, 2, 3])
        track.add([4, 5], rollout)
        return Sample("desk", number, 0, "k", "p", [track], reward=reward, advantage=number + 1.0, **more)

    samples = [
        sample(0, 1.0, [-1.0, -1.0], overlong=True), sample(1, float("nan"), [-1.0, -1.0]),
        sample(2, 0.0, [-9.0, -1.0]), sample(3, 0.0, [-1.0, -2.5]),
    ]  # fmt: skip
    rl = dataclasses.replace(config().rl, mean="sequence", importance_low=0.5, importance_high=2.0, sequence_error=5.0)
    score = lambda batch, tracks, at: np.full(batch.tokens_bt.shape, -1.0, np.float32)  # noqa: E731
    batch, found = batch_of(samples, rl, score, reference=None, shape=(3, 12), pad_id=0)
    assert batch.tokens_bt.shape == (3, 12) and (batch.segments_bt[2] == 0).all()
    # Position i is about token i + 1: the answers' tokens are 3 and 4 of each sequence of 5.
    lines = {name: batch.extras[name].reshape(-1) for name in ("weight", "advantage", "importance", "rollout")}
    assert np.flatnonzero(lines["advantage"]).tolist() == [2, 3, 7, 8, 14, 15, 19, 20]
    assert lines["weight"][[2, 3, 7, 8, 14, 15, 19, 20]].tolist() == [0] * 6 + [0.5, 0.5]
    assert lines["importance"][[14, 15, 19, 20]].tolist() == [0, 1, 1, 0]  # ratios e^8, 1; 1, e^1.5
    assert lines["rollout"][[19, 20]].tolist() == [-1.0, -2.5]
    assert found == (8.0, pytest.approx(9.5), 8, 2, 1, 4)


@several_devices
@pytest.mark.parametrize("plan", [{"context": 2, "tensor": 2}, {"stage": 2, "data": 2, "microbatches": 2}], ids=str)
def test_weights_are_laid_out_anew_where_no_engine_runs(plan):
    model = hybrid(pattern="*E*E", mtp_depths=0, vocab_size=399)
    made = dataclasses.replace(config(), model=model, plan=dataclasses.replace(run_config(model, plan=plan).plan))
    rollouts = Rollouts(made, tokenizer(), {}, Plain(tokenizer()))
    laid, built = assemble(model, made.plan, length=4000)
    whole = jax.jit(lambda: initial_state(model, 3))()
    states = [jax.device_put(s, placement.shardings(s, laid)) for s in map(built.laid, whole)]
    moved = rollouts._here(*states)
    assert rollouts._plan.config.stage == rollouts._plan.config.context == 1 and rollouts._plan.config.devices == 4
    for before, after in zip(whole, moved, strict=True):
        there = rollouts._built.whole(after)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), before, there)
    rollouts.close()
