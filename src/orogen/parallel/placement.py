"""Where a plan keeps trees of variables between steps, and how they enter and leave a step.

Between steps arrays are laid out by `Plan.storage`, inside the step by `Plan.rules`; with ZeRO-1 and -2 the two differ.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from orogen.parallel import distributed
from orogen.parallel.axes import SHARDED, full_axes, map_variables, spec_of
from orogen.parallel.gathered import scatter_sum
from orogen.parallel.plan import Plan
from orogen.parallel.varying import varying_axes

# JAX's names for an accelerator's own memory, and for host memory that the accelerator reads directly.
DEVICE, HOST = "device", "pinned_host"


def stored_specs(tree: Any, plan: Plan) -> Any:
    """`tree` of variables, the value of each replaced by the PartitionSpec in which it is stored between steps."""
    return map_variables(lambda v: spec_of(plan.storage, full_axes(v)), tree)


def jitted(
    function: Callable[..., Any],
    plan: Plan,
    *,
    inputs: Any,
    outputs: Any,
    options: dict[str, Any] | None = None,
    donated: tuple[int, ...] = (0,),
) -> Callable[..., Any]:
    """`Plan.run` of the function, jitted. Shardings are stated because arguments may come from the host or from other
    programs: jax would otherwise compile once for each sharding in which they arrive.

    inputs, outputs: PartitionSpecs, as for `Plan.run`. options: compiler options of XLA. donated: numbers of the
    arguments whose buffers the results may reuse.
    """
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    named = lambda specs: jax.tree.map(lambda s: NamedSharding(plan.mesh, s), specs, is_leaf=is_spec)  # noqa: E731
    run = plan.run(function, inputs=inputs, outputs=outputs)
    laid = {"in_shardings": named(inputs), "out_shardings": named(outputs)}
    return jax.jit(run, donate_argnums=donated, compiler_options=options, **laid)


def shardings(tree: Any, plan: Plan) -> Any:
    """`tree` with the sharding in which each array is stored between steps; leaves without axes are replicated."""
    return map_variables(lambda v: _stored(full_axes(v), plan), tree, lambda _: _stored((), plan))


def spread(tree: Any, plan: Plan) -> Any:
    """Shardings for `tree`, the state of a whole model or of another number of stages, until it is laid out for this
    plan.

    They are those in which it would be stored without stages, but each array is also split over the stages along its
    longest axis that they divide, so that no device needs memory for all layers.
    """
    rules, stages = {**plan.storage, "stage": ()}, plan.size("stage")

    def over_stages(variable: nnx.Variable) -> NamedSharding:
        shape = variable.get_value().shape
        ways = lambda part: math.prod(plan.mesh.shape[name] for name in part)  # noqa: E731
        parts = [() if axis is None else rules[axis] for axis in full_axes(variable)]
        # A vocabulary that has not been padded yet is not split.
        parts = [part if size % ways(part) == 0 else () for part, size in zip(parts, shape, strict=True)]
        local = [size // ways(part) for part, size in zip(parts, shape, strict=True)]
        longest = max(range(len(local)), key=lambda dim: (local[dim] % stages == 0, local[dim]), default=None)
        if longest is not None and local[longest] % stages == 0:
            parts[longest] += plan.rules["stage"]
        return NamedSharding(plan.mesh, PartitionSpec(*(part or None for part in parts)))

    return map_variables(over_stages, tree, lambda _: _stored((), plan))


def offloaded(tree: Any, placed: Any) -> Any:
    """The shardings `placed` of `tree`'s arrays, moved to the host's memory; scalars stay where they are."""
    return jax.tree.map(lambda x, s: s.with_memory_kind(HOST) if x.ndim else s, tree, placed)


def fetched(tree: Any, plan: Plan) -> Any:
    """`tree`, whose arrays are in the host's memory, on the device."""
    fetch = lambda x, s: jax.device_put(x, s.with_memory_kind(DEVICE)) if x.ndim else x  # noqa: E731
    return jax.tree.map(fetch, tree, shardings(tree, plan))


@jax.named_scope("gather_parameters")
def working(tree: Any, plan: Plan) -> Any:
    """`tree` with its arrays constrained to their shardings inside the step (ZeRO-1 gathers its parameters here, in
    the dtype that they have)."""
    placed = map_variables(lambda v: NamedSharding(plan.mesh, spec_of(plan.rules, full_axes(v))), tree)
    return lax.with_sharding_constraint(tree, placed)


def from_host(x: np.ndarray, sharding: NamedSharding) -> Array:
    """`x`, which every process has whole, on the devices of all of them: each process supplies what its own hold."""
    if distributed.count() == 1:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


class Released:
    """An array on a device that is taken either whole, or in parts: the first part moves it to the host and deletes it
    on the device."""

    def __init__(self, array: Array) -> None:
        self._array, self._sharding = array, array.sharding
        self._host: np.ndarray | None = None

    def whole(self) -> Array:
        """The array itself; no part may have been taken."""
        return self._array

    def __getitem__(self, index: tuple[int, ...]) -> "Array | Released":
        """The part at `index` of the leading axes, on the device; this object itself for an empty index."""
        if not index:
            return self
        if self._host is None:
            self._host = np.array(self._array)
            self._array.delete()
        sharding = self._sharding
        if isinstance(sharding, NamedSharding):  # repeated layers are not split over devices
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[len(index) :]))
        return jax.device_put(self._host[index], sharding)


# For gradients, inside the step.


@jax.named_scope("reduce_gradients")
def scatter_gradients(grads: Any, plan: Plan) -> Any:
    """The piece of each gradient that this rank stores, summed in float32 over the ranks that store the other pieces.

    grads: of parameters that were marked as varying. The gradient of a parameter that is stored in its sharding of the
    step is returned unchanged: `Plan.weight` has scattered it, or it is not sharded.
    """

    def scattered(variable: nnx.Variable) -> Any:
        value: Any = variable[...]
        for dim, axis in enumerate(full_axes(variable)):
            if axis in SHARDED and plan.storage[axis] != plan.rules[axis]:
                value = scatter_sum(value, plan.storage[axis], dim)
        return value

    return map_variables(scattered, grads)


@jax.named_scope("reduce_gradients")
def sum_gradients(grads: Any, plan: Plan) -> Any:
    """Scattered `grads`, summed in float32 over every mesh axis that does not split their parameter in storage."""

    def summed(variable: nnx.Variable) -> Any:
        split = {name for axis in full_axes(variable) if axis is not None for name in plan.storage[axis]}
        copies = tuple(sorted(varying_axes(variable[...]) - split))
        return lax.psum(variable[...].astype(jnp.float32), copies) if copies else variable[...]

    return map_variables(summed, grads)


@jax.named_scope("gradient_norm")
def square_sums(grads: Any, plan: Plan) -> Array:
    """(leaves,) float32: the sum of squares of each gradient, in its stored sharding, outside `Plan.run`; not finite
    where the leaf is not.

    Rows are multiplied with themselves by dot products: otherwise XLA:CPU writes the squares to memory before it adds
    them (jax 0.10.1). The sums over devices are explicit, so that `rank_order` reaches them.
    """

    def split(variable: nnx.Variable) -> list[tuple[str, ...]]:
        return [() if axis is None else plan.storage[axis] for axis in full_axes(variable)]

    def summed(grads: Any) -> Array:
        found: list[Array] = []
        map_variables(lambda v: found.append(_square_sum(v[...], split(v))), grads)
        return jnp.stack(found)

    return plan.run(summed, inputs=(stored_specs(grads, plan),), outputs=plan.spec())(grads)


def _square_sum(x: Array, split: list[tuple[str, ...]]) -> Array:
    """The sum of squares of an array of which this device holds a piece. split: the mesh axes of each dimension."""
    inner, outer = split[-1], tuple(name for part in split[:-1] for name in part)
    sums = jnp.einsum("...i,...i->...", x, x, precision="highest")
    total = (lax.psum(sums, inner) if inner else sums).sum()
    return lax.psum(total, outer) if outer else total


def _stored(axes: tuple[str | None, ...], plan: Plan) -> NamedSharding:
    return NamedSharding(plan.mesh, spec_of(plan.storage, axes))
