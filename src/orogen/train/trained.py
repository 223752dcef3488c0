"""Which parameters a run trains: those of chosen layers, by letter, and of chosen parts, by name; with adapters, these
and what is chosen besides."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from orogen.checkpoint.leaves import in_dtype
from orogen.config.checks import ConfigError
from orogen.config.run import OptimizerConfig, RunConfig
from orogen.layers.adapter import is_factor
from orogen.model.block import places, repeats
from orogen.model.lm import Built
from orogen.model.stages import BACKBONE, EMBEDDING, HEAD, LAYERS, MTP, VOCABULARY
from orogen.train.optimizer import make_optimizer


def optimizer_of(config: RunConfig, built: Built) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run. Raises ConfigError as `trained_mask` does."""
    train, trained = config.train, trained_mask(built, config.optimizer)
    return make_optimizer(config.optimizer, train.steps, built.params, train.rates, trained)


def trained_mask(built: Built, config: OptimizerConfig) -> nnx.State | None:
    """Of each parameter, whether the run trains it: it is in a part that is `trained`, or an adapter's, and in no
    module that is `frozen`, whose names mean the same under every plan. None: all are trained, as nothing is named and
    there are no adapters.

    Raises ConfigError if no parameter has one of the names, or if what stages keep as one array is not treated alike:
    embedding and head, and layers of the backbone and of the MTP block.
    """
    names, frozen, adapted = config.trained, config.frozen, _has_adapters(built)
    if not names and not frozen and not adapted:
        return None
    parts: set[str] = set()
    modules: set[str] = set()
    pattern, mtp = _backbone(built), built.layout.mtp
    if LAYERS in built.params:
        _require_alike(names, frozen, mtp)

    def chosen(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        keys = _keys(path)
        part = part_of(keys, pattern)
        of_vocabulary = part == VOCABULARY
        parts.update({EMBEDDING, HEAD} if of_vocabulary else {part})
        inside = _modules(keys, pattern, mtp) | ({EMBEDDING, HEAD} if of_vocabulary else set())
        modules.update(inside)
        for field, listed in (("trained", names), ("frozen", frozen)):
            if of_vocabulary and (EMBEDDING in listed) != (HEAD in listed):
                raise ConfigError(
                    f"OptimizerConfig.{field} is {tuple(listed)!r}; expected both embedding and head or neither: "
                    "stages keep them as one array"
                )
        is_trained = part in names or (of_vocabulary and HEAD in names) or (is_factor(keys) if adapted else not names)
        return variable.replace(is_trained and inside.isdisjoint(frozen))

    is_leaf = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    mask = jax.tree_util.tree_map_with_path(chosen, built.params, is_leaf=is_leaf)
    _require_known("trained", names, parts, "letters of the pattern or parts of the model")
    _require_known("frozen", frozen, modules, "the model's modules and parameters")
    return mask


def trained_biases(built: Built, config: OptimizerConfig) -> list[bool]:
    """Of each buffer, the correction biases of routers, whether its steps move it: those of parts that are not
    `trained` stay, all of them beside adapters, while those of modules that are `frozen` move."""
    names, pattern = config.trained, _backbone(built)
    everything = not names and not _has_adapters(built)
    is_leaf = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(built.buffers, is_leaf=is_leaf)]
    return [everything or part_of(_keys(path), pattern) in names for path in paths]


def narrow_frozen(built: Built, config: RunConfig) -> Built:
    """The model as a run holds it: beside adapters, what is not trained is in the compute dtype, since nothing is ever
    added to it."""
    if not _has_adapters(built):
        return built
    mask, narrow = trained_mask(built, config.optimizer), in_dtype(built.params, config.train.compute_dtype)
    return built._replace(
        params=jax.tree.map(lambda wide, kept, trained: wide if trained else kept, built.params, narrow, mask)
    )


def dtype_to_read(config: RunConfig) -> str:
    """The dtype in which a run reads the parameters that it starts from: beside adapters nothing is added to them,
    unless parts are trained whole."""
    frozen = config.lora is not None and not config.optimizer.trained
    return config.train.compute_dtype if frozen else "float32"


def _has_adapters(built: Built) -> bool:
    return any(is_factor(path) for path, _ in nnx.to_flat_state(built.params))


def _keys(path: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(getattr(key, "key", key) for key in path)


def _backbone(built: Built) -> str:
    """The letters of the backbone's layers."""
    return "".join(main for main, _ in built.layout.chunks)


def _require_alike(names: Sequence[str], frozen: Sequence[str], mtp: str) -> None:
    """Raises ConfigError if the layers `mtp` of the MTP block are not treated like the backbone's of their letters."""
    expected = "stages keep the MTP block's layers and the backbone's of their letters as one array"
    for letter in sorted(set(mtp)):
        if names and (letter in names) != (MTP in names):
            raise ConfigError(
                f"OptimizerConfig.trained is {tuple(names)!r}; expected both {letter} and mtp, or neither: {expected}"
            )
        if MTP in frozen and letter not in frozen:
            raise ConfigError(f"OptimizerConfig.frozen is {tuple(frozen)!r}; expected {letter} beside mtp: {expected}")


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
    return _in_layer(path, pattern)[0] if path[0] == BACKBONE else path[0]


def _modules(path: tuple[Any, ...], pattern: str, mtp: str) -> set[str]:
    """The names of the modules that a parameter is in. One of a layer is in `layers`, the layer's letter and its own
    modules: in a whole model as in stages, which keep layers by their letter. pattern, mtp: the letters of both."""
    names = path
    if path[0] == BACKBONE:
        letter, below = _in_layer(path, pattern)
        names = (LAYERS, letter, *below)
    elif path[:2] == (MTP, LAYERS):
        letter, below = _in_layer(path[1:], mtp)
        names = (MTP, LAYERS, letter, *below)
    return {name for name in names if isinstance(name, str)}


def _in_layer(path: tuple[Any, ...], pattern: str) -> tuple[str, tuple[Any, ...]]:
    """The letter of a layer in a whole model, and the keys below it. path: that of a stack's parameter, whose name
    comes first, then `children` before the number of each child on the way; numbers further below belong to the layer's
    own modules."""
    letters = _letters(pattern)
    for end in range(3, len(path) + 1, 2):
        if (letter := letters.get(path[2:end:2])) is not None:
            return letter, path[end:]
    raise KeyError(path)


@functools.lru_cache(maxsize=64)
def _letters(pattern: str) -> dict[tuple[int, ...], str]:
    """The letter of each place in the backbone's stack, by the children on the way."""
    return {place.path: letter for letter, place in zip(pattern, places(repeats(pattern)), strict=True)}


def only_trained(grads: Any, mask: nnx.State | None) -> Any:
    """The gradients, with zeros for what is not trained."""
    if mask is None:
        return grads
    return jax.tree.map(lambda g, trained: g if trained else jnp.zeros_like(g), grads, mask)


def kept_unless(mask: nnx.State | None, new: Any, old: Any) -> Any:
    """The new parameters, and the old ones of what is not trained: adding zeros would be a pass over all of them."""
    if mask is None:
        return new
    return jax.tree.map(lambda after, before, trained: after if trained else before, new, old, mask)
