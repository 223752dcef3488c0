"""What processes tell each other, through a store that stands for the runtime's."""

import errno
import itertools
import time

import jax
import pytest

from orogen.config.checks import ConfigError
from orogen.parallel import distributed
from orogen.parallel.cluster import Cluster


class Store:
    """The runtime's key-value store, which never waits."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        if key in self.values:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.values[key]


@pytest.fixture
def process(monkeypatch):
    """(number) -> from now on this is that process of two, at the beginning of its program."""
    store = Store()
    monkeypatch.setattr(distributed, "_client", lambda: store)

    def be(number: int) -> None:
        monkeypatch.setattr(distributed, "_processes", [Cluster("x:1", 2, number)])
        monkeypatch.setattr(distributed, "_numbers", itertools.count())

    return be


def fail(error: BaseException):
    def work():
        raise error

    return work


def test_what_the_first_process_finds_is_what_all_get(process):
    process(0)
    assert distributed.from_first(lambda: {"a": [1, None]}) == {"a": [1, None]}
    process(1)
    assert distributed.from_first(lambda: pytest.fail("a process that is not the first does the work")) == {
        "a": [1, None]
    }


@pytest.mark.parametrize(
    ("error", "kind", "text", "number"),
    [
        (ConfigError("x is 3; expected 4"), ConfigError, "x is 3; expected 4", None),
        (OSError(errno.ENOSPC, "No space left on device", "/disk/a"), OSError,
         "[Errno 28] No space left on device: '/disk/a'", errno.ENOSPC),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), FileNotFoundError,
         "[Errno 2] No such file or directory", errno.ENOENT),
        (OSError("a disk of no kind"), OSError, "a disk of no kind", None),
        (KeyError("w"), RuntimeError, "process 0 failed with KeyError: 'w'", None),
        (KeyboardInterrupt(), RuntimeError, "process 0 failed with KeyboardInterrupt: ", None),
    ],
)  # fmt: skip
def test_an_error_of_the_first_process_is_raised_on_all(process, error, kind, text, number):
    process(0)
    with pytest.raises(type(error)) as own:
        distributed.from_first(fail(error))
    assert own.value is error
    process(1)
    with pytest.raises(kind) as told:
        distributed.from_first(lambda: pytest.fail("a process that is not the first does the work"))
    assert type(told.value) is kind and str(told.value) == text
    assert getattr(told.value, "errno", None) == number


def test_what_is_no_json_is_an_error_for_all(process):
    process(0)
    with pytest.raises(TypeError):
        distributed.from_first(lambda: {1, 2})
    process(1)
    with pytest.raises(RuntimeError, match="process 0 failed with TypeError"):
        distributed.from_first(lambda: None)


def test_processes_meet_unless_they_are_interrupted_or_late(process):
    never = lambda: False  # noqa: E731
    process(1)
    with pytest.raises(TimeoutError, match="process 0 did not come to b within 0 s"):
        distributed.meet("b", 0, never)
    assert not distributed.meet("a", 60, lambda: True)
    process(0)
    began = time.monotonic()
    assert distributed.meet("a", 60, lambda: True)  # all are there
    assert time.monotonic() - began < 10
