"""Which tasks are drawn: shares, epochs, pass rates."""

import collections
import json

import numpy as np
import pytest

from orogen.config.rl import EnvironmentConfig, RLConfig
from orogen.posttrain.curriculum import Curriculum, gaussian, split_prompts


def rl(**changes):
    two = tuple(
        EnvironmentConfig(name=n, kind="synthetic", family="copy", share=s) for n, s in (("a", 3.0), ("b", 1.0))
    )
    fields = {"environments": two, "prompts": 8, "samples": 2, "max_tokens": 4, "template": "plain"}
    return RLConfig(**(fields | changes))


@pytest.mark.parametrize(
    ("prompts", "shares", "expected"),
    [(8, [3, 1], [6, 2]), (10, [1, 1, 1], [4, 3, 3]), (3, [98, 1, 1], [1, 1, 1]), (7, [0.5, 0.25, 0.25], [3, 2, 2])],
)
def test_prompts_are_split_by_shares(prompts, shares, expected):
    assert split_prompts(prompts, shares) == expected


def test_every_task_comes_once_per_epoch():
    drawing = Curriculum(rl(), {"a": range(9), "b": range(100, 105)}, seed=3, steps=10)
    found = [draw for rollout in range(15) for draw in drawing.draw(rollout)]
    counts = collections.Counter(found)
    assert set(counts.values()) == {10, 6} and {n for e, n in counts if e == "b"} == set(range(100, 105))
    assert [n for e, n in found if e == "a"][:9] != [n for e, n in found if e == "a"][9:18]
    assert all(collections.Counter(e for e, _ in found[k : k + 8]) == {"a": 6, "b": 2} for k in range(0, 120, 8))


def test_a_position_goes_on_where_it_was():
    whole = Curriculum(rl(), {"a": range(9), "b": range(5)}, seed=3, steps=10)
    draws = [whole.draw(rollout) for rollout in range(4)]
    parts = Curriculum(rl(), {"a": range(9), "b": range(5)}, seed=3, steps=10)
    assert [parts.draw(0), parts.draw(1)] == draws[:2]
    again = Curriculum(rl(), {"a": range(9), "b": range(5)}, seed=3, steps=10)
    again.restore(json.loads(json.dumps(parts.state())))
    assert [again.draw(2), again.draw(3)] == draws[2:]


def test_the_gaussian_by_hand():
    """Of pass rates 0.25, 0.5, 1 around 0.25 with width 0.25: 1, e^(-1/2) and none."""
    found = gaussian(np.array([0.25, 0.5, 1.0]), mean=0.25, width=0.25)
    np.testing.assert_allclose(found, np.array([1, np.exp(-0.5), 0]) / (1 + np.exp(-0.5)), rtol=1e-12)
    np.testing.assert_allclose(gaussian(np.array([1.0, 1.0]), mean=0.2, width=0.1), [0.5, 0.5])
    tiny = gaussian(np.array([0.0, 0.9]), mean=1.0, width=1e-3)  # far from all: the nearest
    np.testing.assert_allclose(tiny, [0, 1])


def test_tasks_get_harder_and_those_that_always_pass_are_dropped():
    config = rl(curriculum="gaussian", curriculum_start=0.9, curriculum_end=0.1, curriculum_width=0.1)
    rates = [n / 20 for n in range(21)]
    drawing = Curriculum(config, {"a": range(21), "b": range(21)}, seed=0, steps=11)
    assert drawing.profile_due(0)
    drawing.profiled({"a": rates, "b": rates})
    assert not drawing.profile_due(1)
    assert [round(drawing.mean_rate(step), 6) for step in (0, 5, 10, 40)] == [0.9, 0.5, 0.1, 0.1]
    means = []
    for rollout in range(11):
        numbers = [number for name, number in drawing.draw(rollout) if name == "a"]
        assert 20 not in numbers and len(set(numbers)) == 6
        means.append(np.mean([rates[number] for number in numbers]))
    assert means[0] > 0.7 and means[-1] < 0.3 and np.all(np.diff(means) < 0.1)


def test_profiles_are_repeated():
    config = rl(curriculum="gaussian", profile_every=3)
    drawing = Curriculum(config, {"a": range(2), "b": range(2)}, seed=0, steps=9)
    drawing.profiled({"a": [0.5, 0.5], "b": [0.5, 0.5]})
    assert [drawing.profile_due(rollout) for rollout in range(1, 7)] == [False, False, True, False, False, True]
