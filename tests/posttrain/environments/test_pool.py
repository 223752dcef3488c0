"""Verifiers that crash, hang or flood are contained and counted."""

import time

import pytest

from orogen.config.checks import ConfigError
from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.interface import Said, Turn
from orogen.posttrain.environments.pool import Asked, Fault, Pool

GOOD = Turn(None, [], {"a": 0.5})


@pytest.fixture(scope="module")
def pool():
    config = EnvironmentConfig(name="bad", kind="synthetic", family="copy", seconds=0.5, memory_mb=700)
    made = Pool(config, workers=2, module="tests.posttrain.environments.bad_worker")
    assert made.verify([Asked(0, None, Said("good"))] * 2) == [GOOD] * 2  # both have started
    yield made
    made.close()


def test_parts_without_a_name_are_counted(pool):
    assert pool.verify([Asked(0, None, Said("left out"))]) == [GOOD._replace(left_out=3)]


@pytest.mark.parametrize(
    ("said", "kind", "reason"),
    [
        ("crash", "crash", "the verifier ended: its output ended"),
        ("hang", "timeout", "no answer within 0.5 s"),
        ("flood", "flood", "expected at most 4194304"),
        ("raise", "raised", "RuntimeError: no verdict"),
        ("memory", "raised", "MemoryError"),
        ("nan", "nan", "a reward is {'a': nan}; expected finite numbers of at most 1e+09 in size"),
        ("-1e308", "nan", "a reward is {'a': -1e+308}; expected finite numbers of at most 1e+09 in size"),
    ],
)
def test_a_bad_verifier_is_counted_and_the_next_answers(pool, said, kind, reason):
    before, began = pool.faults[kind], time.monotonic()
    found = pool.verify([Asked(0, None, Said(text)) for text in (said, "good", "print", "good")])
    assert isinstance(found[0], Fault) and found[0].kind == kind and reason in found[0].reason
    assert found[1:] == [GOOD] * 3 and pool.faults[kind] == before + 1
    assert time.monotonic() - began < 30


def test_an_environment_that_cannot_run_is_refused_at_once(tmp_path):
    """Its own last words are the reason."""
    config = EnvironmentConfig(name="gone", kind="synthetic", family="chess")
    with pytest.raises(ConfigError, match="environment 'gone' does not run: .*EnvironmentConfig.family is 'chess'"):
        Pool(config, workers=1)


def test_a_pool_says_that_it_is_at_work_and_gives_up(monkeypatch):
    """Each result is progress; three in a row without an answer are enough, with an answer between they are not."""
    monkeypatch.setattr("orogen.posttrain.environments.pool.GIVE_UP", 3)
    config = EnvironmentConfig(name="bad", kind="synthetic", family="copy", seconds=0.2, memory_mb=700)
    made = Pool(config, workers=1, module="tests.posttrain.environments.bad_worker")
    done, asked = [], lambda *texts: [Asked(0, None, Said(text)) for text in texts]
    made.verify(asked("crash", "crash", "good", "hang", "crash"), lambda: done.append(1))
    assert len(done) == 5
    with pytest.raises(ConfigError, match="environment 'bad': 3 verifications in a row had no answer; expected"):
        made.verify(asked("crash", "good"), lambda: done.append(1))
    assert len(done) == 6
    made.close()
