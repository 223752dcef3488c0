"""Which parameters a run trains: those of chosen layers, by letter, and of chosen parts, by name."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from orogen.config.checks import ConfigError
from orogen.config.run import OptimizerConfig, RunConfig
from orogen.model.block import places, repeats
from orogen.model.lm import Built
from orogen.model.stages import BACKBONE, EMBEDDING, HEAD, LAYERS, VOCABULARY
from orogen.train.optimizer import make_optimizer


def optimizer_of(config: RunConfig, built: Built) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run. Raises ConfigError as `trained_mask` does."""
    train, trained = config.train, trained_mask(built, config.optimizer)
    return make_optimizer(config.optimizer, train.steps, built.params, train.rates, trained)


def trained_mask(built: Built, config: OptimizerConfig) -> nnx.State | None:
    """Of each parameter, whether the run trains it: it is in a part that is `trained`, and in no module that is
    `frozen`. None: all are trained, as nothing is named.

    Raises ConfigError if no parameter has one of the names, or if embedding and head, which stages keep as one array,
    are not treated alike.
    """
    names, frozen = config.trained, config.frozen
    if not names and not frozen:
        return None
    parts: set[str] = set()
    modules: set[str] = set()
    pattern = "".join(main for main, _ in built.layout.chunks)

    def chosen(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        keys = tuple(getattr(key, "key", key) for key in path)
        part = part_of(keys, pattern)
        of_vocabulary = part == VOCABULARY
        parts.update({EMBEDDING, HEAD} if of_vocabulary else {part})
        inside = {key for key in keys if isinstance(key, str)} | ({EMBEDDING, HEAD} if of_vocabulary else set())
        modules.update(inside)
        for field, listed in (("trained", names), ("frozen", frozen)):
            if of_vocabulary and (EMBEDDING in listed) != (HEAD in listed):
                raise ConfigError(
                    f"OptimizerConfig.{field} is {tuple(listed)!r}; expected both embedding and head or neither: "
                    "stages keep them as one array"
                )
        is_trained = not names or part in names or (of_vocabulary and HEAD in names)
        return variable.replace(is_trained and inside.isdisjoint(frozen))

    is_leaf = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    mask = jax.tree_util.tree_map_with_path(chosen, built.params, is_leaf=is_leaf)
    _require_known("trained", names, parts, "letters of the pattern or parts of the model")
    _require_known("frozen", frozen, modules, "the model's modules and parameters")
    return mask


def _require_known(field: str, names: Sequence[str], known: set[str], expected: str) -> None:
    for name in names:
        if name not in known:
            found = ", ".join(sorted(known))
            raise ConfigError(f"OptimizerConfig.{field} has {name!r}; expected {expected}: {found}")


def part_of(path: tuple[Any, ...], pattern: str) -> str:
    """The letter of the layer that a parameter is in, or the name of the model's part. path: keys of its place in the
    model's state, in the layout of a whole model or of stages; pattern: the backbone's letters."""
    if path[0] == LAYERS:
        return path[1]
    if path[0] != BACKBONE:
        return path[0]
    children = tuple(key for key in path if isinstance(key, int))
    return _letters(pattern)[children]


@functools.lru_cache(maxsize=64)
def _letters(pattern: str) -> "_Longest":
    """The letter of each place in the backbone's stack, by the children on the way."""
    return _Longest(
        {place.path: letter for letter, place in zip(pattern, places(repeats(pattern)), strict=True)}
    )  # fmt: skip


class _Longest(dict[tuple[int, ...], str]):
    """Looks a path up by the part of it that is a key: numbers below a layer belong to its own modules."""

    def __missing__(self, path: tuple[int, ...]) -> str:
        if not path:
            raise KeyError(path)
        return self[path[:-1]]


def only_trained(grads: Any, mask: nnx.State | None) -> Any:
    """The gradients, with zeros for what is not trained."""
    if mask is None:
        return grads
    return jax.tree.map(lambda g, trained: g if trained else jnp.zeros_like(g), grads, mask)
