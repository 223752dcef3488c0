"""A model's parameters one by one: their names in files, their shapes, and their placement on a plan."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.convert import names
from orogen.convert.tensor_files import Spec, check_fits
from orogen.model.layout import Layout, relaid
from orogen.model.lm import Built, build
from orogen.model.vocabulary import resized
from orogen.parallel import placement
from orogen.parallel.plan import Plan


class Leaves(Protocol):
    """A folder that gives its parameters one at a time."""

    folder: Path
    config: ModelConfig

    def parameters(self) -> Mapping[names.Path, Spec]:
        """Shape and dtype of every parameter."""
        ...

    def parameter(self, path: names.Path, spec: Spec) -> np.ndarray:
        """A parameter, whole."""
        ...


def leaves_of(*trees: nnx.State) -> dict[names.Path, Any]:
    """The variables of trees by their paths."""
    flat: list[Any] = [nnx.to_flat_state(tree) for tree in trees]
    return {path: leaf for leaves in flat for path, leaf in leaves}


def dotted(path: Iterable[str | int]) -> str:
    """A parameter's name in files: `backbone.children.0.mixer.x`."""
    return ".".join(map(str, path))


def key_of(part: str) -> str | int:
    """The key of a path that one part of such a name stands for."""
    return int(part) if part.isascii() and part.isdecimal() and len(part) < 10 else part


def check_shapes(
    folder: Path,
    have: Mapping[str, tuple[int, ...]],
    want: Mapping[str, tuple[int, ...]],
    optional: Iterable[str] = (),
) -> None:
    """Raises ConfigError with every name that is missing, surplus or of another shape."""
    faults = [f"{name} is missing" for name in sorted(want.keys() - have.keys() - set(optional))]
    faults += [f"{name} is surplus" for name in sorted(have.keys() - want.keys())]
    both = sorted(name for name in want.keys() & have.keys() if want[name] != have[name])
    faults += [f"{name} is {list(have[name])}, expected {list(want[name])}" for name in both]
    if faults:
        raise ConfigError(f"{folder} does not hold the model of its config: {'; '.join(faults)}")


# (path, sharding, plan) -> the parameter in a form other than an array, or None if it is to be an array.
Hold = Callable[[names.Path, Any, Plan], Any]


def read_leaves(
    source: Leaves, built: Built, plan: Plan, dtype: str, *, hold: Hold = lambda path, sharding, plan: None
) -> tuple[nnx.State, nnx.State]:
    """`Folder.read` of a folder with a whole model; one parameter is in the host's memory at a time."""
    whole, have = build(source.config), source.parameters()
    want = {dotted(path): leaf.get_value().shape for path, leaf in leaves_of(whole.params, whole.buffers).items()}
    check_shapes(source.folder, {dotted(path): spec.shape for path, spec in have.items()}, want)

    def put(path: names.Path, leaf: Any, sharding: Any) -> nnx.Variable:
        if (held := hold(path, sharding, plan)) is not None:
            return leaf.replace(held)
        array, wanted = source.parameter(path, have[path]), leaf.get_value()
        check_fits(f"{source.folder}: {dotted(path)}", array, wanted.dtype)
        if array.shape != wanted.shape:  # padding rows of the vocabulary
            array = np.pad(array, [(0, more - size) for size, more in zip(array.shape, wanted.shape, strict=True)])
        part = lambda index: np.ascontiguousarray(array[index], wanted.dtype)  # noqa: E731
        return leaf.replace(jax.make_array_from_callback(wanted.shape, sharding, part))

    def read(tree: nnx.State) -> nnx.State:
        filled = jax.eval_shape(lambda tree: resized(tree, built.vocab_rows), tree)
        there = leaves_of(shardings_of(filled, whole.layout, built, plan))
        found = [(path, put(path, leaf, there[path].get_value())) for path, leaf in leaves_of(filled).items()]
        return nnx.from_flat_state(found)

    return laid_out((read(in_dtype(whole.params, dtype)), read(whole.buffers)), whole.layout, built, plan)


def check_finite(folder: Path, params: nnx.State) -> None:
    """Raises ConfigError if a number became infinite in the dtype that parameters were restored to; a run saves only
    finite ones. (`check_fits` looks before the cast, but orbax casts as it reads.)"""
    leaves = {path: leaf.get_value() for path, leaf in leaves_of(params).items()}
    narrow = {path: leaf for path, leaf in leaves.items() if leaf.dtype != jnp.float32}
    if not narrow:
        return
    for path, lost in jax.device_get(jax.jit(_any_infinite)(narrow)).items():
        if lost:
            dtype = narrow[path].dtype.name
            largest = float(jnp.finfo(dtype).max)
            raise ConfigError(f"{folder}: {dotted(path)} holds a number beyond {largest:.6g}, the largest of {dtype}")


def _any_infinite(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.isinf(x).any(), tree)


def in_dtype(params: nnx.State, dtype: str) -> nnx.State:
    """Abstract parameters in `dtype`, except those that are used in float32."""

    def cast(leaf: nnx.Variable) -> nnx.Variable:
        kept = jnp.float32 if leaf.get_metadata().get("float32") else jnp.dtype(dtype)
        return leaf.replace(jax.ShapeDtypeStruct(leaf.get_value().shape, kept))

    return jax.tree.map(cast, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def shardings_of(tree: Any, layout: Layout, built: Built, plan: Plan) -> Any:
    """Shardings of a model in `layout`: the plan's if `built` has that layout, else spread over all devices."""
    return placement.shardings(tree, plan) if layout == built.layout else placement.spread(tree, plan)


def laid_out(model: tuple[nnx.State, nnx.State], layout: Layout, built: Built, plan: Plan) -> Any:
    """Converts parameters and buffers from `layout` to the layout of `built`, in the plan's shardings."""
    if layout == built.layout:
        return model
    there = placement.shardings((built.params, built.buffers), plan)
    return jax.jit(lambda model: relaid(model, layout, built.layout), out_shardings=there)(model)
