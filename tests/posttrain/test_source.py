"""What a batch of rollouts is judged by and what its record says, with samples by hand and without a model."""

import dataclasses
from types import SimpleNamespace

import pytest

from orogen.config.rl import EnvironmentConfig, RLConfig
from orogen.posttrain.groups import Groups
from orogen.posttrain.measures import measured
from orogen.posttrain.rollout import Spent
from orogen.posttrain.samples import Mismatch, Sample

ONE = EnvironmentConfig(name="a", kind="synthetic", family="copy")
RL = RLConfig(
    environments=(ONE,), prompts=2, samples=2, max_tokens=8, template="plain", overlong="penalty", overlong_buffer=4,
    normalise=False, baseline="group", table_rows=0,
)  # fmt: skip


def sample(group, reward, longest):
    return Sample("a", group, group, "k", "p", reward=reward, longest=longest)


def groups(**attributes):
    """Those of a run without engine and weights."""
    made = object.__new__(Groups)
    config = SimpleNamespace(train=SimpleNamespace(seed=0))
    for name, value in ({"_rl": RL, "_config": config} | attributes).items():
        setattr(made, name, value)
    return made


def test_the_longest_turn_decides_the_penalty():
    """Turns of 6 and at most 4 tokens: penalties -0.5 and 0, however many turns there are."""
    group = [sample(0, 1.0, 6), sample(0, 1.0, 4)]
    groups()._judge(group)
    assert [one.advantage for one in group] == [-0.25, 0.25]


def test_equal_rewards_with_unequal_lengths_are_a_gradient():
    """Of two groups of equal rewards, the penalty makes one unequal: only the other is drawn again and counted."""
    drawn = []

    def write(draws, engine, **more):
        drawn.append([draw.number for draw in draws])
        return [sample(d.group, 1.0, 6 if d.number == 7 and n % 2 else 1) for n, d in enumerate(draws)]

    curriculum = SimpleNamespace(draw=lambda rollout: [("a", 7), ("a", 8)], more=lambda name, count, rollout: [9])
    rl = dataclasses.replace(RL, resample=1)
    made = groups(_rl=rl, _rollouts=SimpleNamespace(write=write), curriculum=curriculum)
    samples, replaced = made._groups(0, None, lambda: None)
    assert drawn == [[7, 7, 8, 8], [9, 9]] and replaced == 0
    found = measured(samples, [samples[:2], samples[2:]], Mismatch(), rl)
    assert found["zero_gradient_groups"] == 0.5


def test_what_a_teacher_judges_is_not_drawn_again():
    """Of two groups of equal rewards, that of the environment without a teacher alone."""
    drawn = []

    def write(draws, engine, **more):
        drawn.append([(draw.environment, draw.number) for draw in draws])
        return [Sample(d.environment, d.number, d.group, "k", "p", reward=1.0, longest=1) for d in draws]

    curriculum = SimpleNamespace(draw=lambda n: [("a", 7), ("b", 8)], more=lambda name, count, n: [9])
    two = (dataclasses.replace(ONE, teacher="x"), dataclasses.replace(ONE, name="b"))
    rl = dataclasses.replace(RL, resample=1, environments=two)
    groups(_rl=rl, _rollouts=SimpleNamespace(write=write), curriculum=curriculum)._groups(0, None, lambda: None)
    assert drawn == [[("a", 7)] * 2 + [("b", 8)] * 2, [("b", 9)] * 2]


def test_faults_are_those_of_this_rollout():
    faults = {"timeout": 3, "crash": 1}
    rollouts = SimpleNamespace(spent=Spent(), take=lambda *weights: None, faults=faults, server=None)

    def written(*_):
        rollouts.faults = {"timeout": 5, "crash": 1}
        return [sample(0, 1.0, 1), sample(1, 1.0, 1)], 0

    curriculum = SimpleNamespace(profile_due=lambda rollout: False, state=dict)
    made = groups(_rollouts=rollouts, curriculum=curriculum, _groups=written)
    found = made.write(0, None, lambda: None).measures
    faults = {name: count for name, count in found.items() if name.startswith("faults/")}
    assert faults == {"faults/timeout": pytest.approx(2)}


def test_a_server_that_names_parts_anew_floods_no_record():
    """The parts that most samples have are told, the others counted."""
    rewards = [{"same": 1.0, **{f"{n} of {number}": 0.0 for n in range(30)}} for number in range(8)]
    samples = [sample(number, 1.0, 1) for number in range(8)]
    for one, parts in zip(samples, rewards, strict=True):
        one.rewards = parts
    name = samples[0].environment
    rl = dataclasses.replace(RL, environments=(dataclasses.replace(ONE, name=name),))
    found = measured(samples, [samples], Mismatch(), rl)
    parts = [key for key in found if key.startswith(f"reward/{name}/")]
    assert len(parts) == 32 and found[f"reward/{name}/same"] == 1
    assert found[f"reward_parts_left_out/{name}"] == 8 * 30 - 31
    for one, left_out in zip(samples, range(8), strict=True):
        one.rewards, one.left_out = {"same": 1.0}, left_out
    assert measured(samples, [samples], Mismatch(), rl)[f"reward_parts_left_out/{name}"] == 28
    for one in samples:
        one.left_out = 0
    assert not any(key.startswith("reward_parts") for key in measured(samples, [samples], Mismatch(), rl))
