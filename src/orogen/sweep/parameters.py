"""Parameters of models, counted in a process of its own: the sweep forks, which a process with jax in it should not."""

import multiprocessing
from collections.abc import Sequence

from orogen.config.model import ModelConfig


def totals(models: Sequence[ModelConfig]) -> list[int]:
    """The number of parameters of each model, those of routers and of multi-token prediction included."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(_total, models)


def _total(model: ModelConfig) -> int:
    from orogen.model.count import count

    return count(model)["total"]
