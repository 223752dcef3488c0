"""What checks of many plans share, the side of one device; and what tests of run folders share, one whole run."""

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
from tests.train import runs

from orogen.train import sides, verify
from orogen.train.sides import Side

_computed: dict[Hashable, Any] = {}


@pytest.fixture
def one_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes one device's side once for all plans of one model, batch and optimizer, in every test that takes this
    fixture. Such tests check pretraining on the batches that `verify` makes up. Plans are always computed anew."""

    def shared(module: Any, name: str, key: Callable[..., Hashable | None]) -> None:
        honest = getattr(module, name)

        def call(*arguments: Any) -> Any:
            found = key(*arguments)
            if found is None:
                return honest(*arguments)
            if (name, found) not in _computed:
                _computed[name, found] = honest(*arguments)
            return _computed[name, found]

        monkeypatch.setattr(module, name, call)

    shared(sides, "initial_state", lambda model, seed: (model, seed))
    shared(verify, "_placed", lambda start, side: alone(side))
    shared(verify, "_gradients", lambda side, *_: alone(side))
    shared(verify, "_updated", lambda side, name, *_: (found := alone(side)) and (name, side.config.optimizer, found))


def alone(side: Side) -> Hashable | None:
    """What determines the numbers of one device; None for a plan on several. Capacity counts for the ranks that the
    device stands for."""
    if side.plan.config.devices > 1:
        return None
    sources = side.plan.sources if side.plan.config.capacity_factor else None
    return side.config.model, side.config.train, side.config.precision, side.plan.config, sources


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    """A recipe that trains a tiny hybrid on a folder of text."""
    return runs.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def whole(recipe, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run, which no test changes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    runs.run(recipe, folder)
    return folder
