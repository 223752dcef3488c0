"""The plan: which mesh axes each logical axis is split over, and the verbs by which model code communicates.

Model code names logical axes only. Inside `Plan.run` it sees one device's arrays; a verb over an axis of size one is
the identity, so one device runs the same code on a mesh of ones.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from orogen.config.checks import require
from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.parallel.fold import Folding
from orogen.parallel.mesh import fold_plan, make_mesh
from orogen.parallel.ragged import Runs, ragged_exchange
from orogen.parallel.schedule import Schedule, plan_schedule
from orogen.parallel.varying import vary, varying_axes

MeshAxes = tuple[str, ...]
# Parameter axes over which fully sharded data parallelism splits; vectors ("norm") stay whole: they are tiny.
SHARDED = ("embed", "expert_embed")
# JAX's names of an accelerator's own memory, and of the part of the host's that it reads without a copy between.
DEVICE, HOST = "device", "pinned_host"
# For programs with products in FP8: otherwise XLA:GPU gives a product and the conversions before it to its Triton
# compiler, which multiplies in 16 bits and does not offer them to cuBLASLt (observed with jax 0.11.2).
FP8_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A device mesh and the mesh axes that each logical axis is split over.

    rules: of arrays inside the step; storage: of master weights and optimizer state between steps.
    sources: (data, context, tensor) of the ranks that a single device stands for when it decides which tokens exceed an
    expert's capacity; capacity counts per source rank, so `verify` needs it to reproduce a plan on one device.
    schedule: what the stages of a pipeline do at each tick; None without stages.
    """

    mesh: Mesh | AbstractMesh
    rules: Mapping[str, MeshAxes]
    storage: Mapping[str, MeshAxes]
    config: PlanConfig
    sources: tuple[int, int, int] = (1, 1, 1)
    schedule: Schedule | None = None

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Options of XLA without which a program of this plan would not run as planned. jax takes them for the
        outermost jit alone."""
        return dict(FP8_OPTIONS) if self.config.linear == "fp8" else {}

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes. Raises KeyError on an unknown axis, ValueError if
        one mesh axis would split two of them."""
        return _spec(self.rules, axes)

    def size(self, axis: str) -> int:
        """How many ways `axis` is split."""
        return math.prod(self.mesh.shape[name] for name in self.rules[axis])

    def specs(self, tree: Any) -> Any:
        """`tree` of variables with `axes`, each holding its PartitionSpec inside the step."""
        return _map_variables(lambda v: _spec(self.rules, full_axes(v)), tree)

    def stored_specs(self, tree: Any) -> Any:
        """`tree` of variables, each holding the PartitionSpec in which it is stored between steps."""
        return _map_variables(lambda v: _spec(self.storage, full_axes(v)), tree)

    def shardings(self, tree: Any) -> Any:
        """`tree` with the sharding in which each array is stored between steps; what has no axes is replicated."""
        return _map_variables(lambda v: self._stored(full_axes(v)), tree, lambda _: self._stored(()))

    def spread(self, tree: Any) -> Any:
        """Shardings in which `tree`, the state of a whole model or of other stages, waits until it is laid out again:
        as it would be stored without stages, but with each array also split over the stages along the longest axis that
        they divide, so that no device needs room for all layers."""
        rules, stages = {**self.storage, "stage": ()}, self.size("stage")

        def over_stages(variable: nnx.Variable) -> NamedSharding:
            shape = variable.get_value().shape
            ways = lambda part: math.prod(self.mesh.shape[name] for name in part)  # noqa: E731
            parts = [() if axis is None else rules[axis] for axis in full_axes(variable)]
            # A vocabulary that is not padded yet waits whole.
            parts = [part if size % ways(part) == 0 else () for part, size in zip(parts, shape, strict=True)]
            local = [size // ways(part) for part, size in zip(parts, shape, strict=True)]
            longest = max(range(len(local)), key=lambda dim: (local[dim] % stages == 0, local[dim]), default=None)
            if longest is not None and local[longest] % stages == 0:
                parts[longest] += self.rules["stage"]
            return NamedSharding(self.mesh, PartitionSpec(*(part or None for part in parts)))

        return _map_variables(over_stages, tree, lambda _: self._stored(()))

    def offloaded(self, tree: Any, shardings: Any) -> Any:
        """`shardings` of `tree`'s arrays, but in the host's memory; numbers stay where they are."""
        return jax.tree.map(lambda x, s: s.with_memory_kind(HOST) if x.ndim else s, tree, shardings)

    def fetched(self, tree: Any) -> Any:
        """`tree` of state that lives in the host's memory, on the device."""
        fetch = lambda x, s: jax.device_put(x, s.with_memory_kind(DEVICE)) if x.ndim else x  # noqa: E731
        return jax.tree.map(fetch, tree, self.shardings(tree))

    def working(self, tree: Any) -> Any:
        """`tree` with its arrays constrained to their layout inside the step (ZeRO-1 gathers its masters here)."""
        return lax.with_sharding_constraint(
            tree, _map_variables(lambda v: NamedSharding(self.mesh, _spec(self.rules, full_axes(v))), tree)
        )

    def without_fp8(self) -> "Plan":
        """The plan of a layer that computes all its products in the dtype of computation."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, linear="plain"))

    def sharding(self, *axes: str | None) -> NamedSharding:
        """The NamedSharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def run(self, function: Callable[..., Any], *, inputs: Any, outputs: Any) -> Callable[..., Any]:
        """`function` on every device at once, each seeing its own pieces: the one shard_map, manual over all axes.

        inputs, outputs: prefix trees of PartitionSpecs (from `spec` and `specs`). Replication is type-checked.
        """
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=True)

    # Verbs, for use inside `run`.

    def weight(self, parameter: nnx.Variable) -> Array:
        """The parameter, whole along the axes that FSDP shards; its gradient is scattered back, summed in float32."""
        value: Any = parameter[...]
        for dim, axis in enumerate(full_axes(parameter)):
            if axis in SHARDED and self.rules[axis]:
                value = _gather_weight(value, self.rules[axis], dim)
        return value

    def gather(self, x: Array, axis: str, *, dim: int = 1) -> Array:
        """All pieces of `x` along `axis`, concatenated along `dim`; the gradient is summed and scattered."""
        return lax.all_gather(x, self.rules[axis], axis=dim, tiled=True) if self.rules[axis] else x

    def scatter(self, x: Array, axis: str, *, dim: int = 1) -> Array:
        """The sum of `x` over `axis`, of which each rank keeps its piece along `dim`."""
        if not self.rules[axis]:
            return x
        return lax.psum_scatter(vary(x, self.rules[axis]), self.rules[axis], scatter_dimension=dim, tiled=True)

    def sum(self, x: Any, axis: str) -> Any:
        """The sum of `x` over `axis`, on every rank."""
        return lax.psum(vary(x, self.rules[axis]), self.rules[axis]) if self.rules[axis] else x

    def max(self, x: Array, axis: str) -> Array:
        """The maximum of `x` over `axis`, on every rank. Has no gradient."""
        return lax.pmax(vary(x, self.rules[axis]), self.rules[axis]) if self.rules[axis] else x

    def total(self, tree: Any) -> Any:
        """Each leaf summed over every axis that it varies over, except the pipeline's, whose stages do not get here
        together. Only for true partial sums: pieces, never copies."""
        stages = self.rules["stage"]
        inside = lambda x: tuple(sorted(varying_axes(x) - set(stages)))  # noqa: E731
        return jax.tree.map(lambda x: lax.psum(x, axes) if (axes := inside(x)) else x, tree)

    def exchange(self, x: Array, axis: str) -> Array:
        """All-to-all: piece r of dimension 0 goes to rank r; the result is stacked by sender along dimension 0."""
        if not self.rules[axis]:
            return x
        # As two dimensions: with more, XLA:CPU may lay out the pieces in different ways and then refuses them (jax
        # 0.10.1).
        flat = lax.all_to_all(x.reshape(x.shape[0], -1), self.rules[axis], 0, 0, tiled=True)
        return flat.reshape(x.shape)

    def ragged_exchange(self, x: Array, runs: Runs, axis: str, *, rows: int) -> Array:
        """(rows, d): of the rows that the ranks of `axis` send each other those that arrive here; zero where none
        does."""
        if not self.rules[axis]:  # one rank: what it sends arrives here
            row_m = jnp.arange(rows) - runs.arrives[0]
            inside_m = (row_m >= 0) & (row_m < runs.received[0])
            return jnp.take(x, jnp.where(inside_m, row_m + runs.starts[0], len(x)), axis=0, mode="fill", fill_value=0)
        return ragged_exchange(x, runs, rows=rows, axes=self.rules[axis])

    def shift(self, x: Array, axis: str, by: int) -> Array:
        """The `x` of the rank that is `by` before this one in the ring."""
        ranks = self.size(axis)
        if by % ranks == 0:
            return x
        if self.config.shift == "permute":
            return self.pass_on(x, axis, by)
        # Every rank sends to every rank, zeros to all but one. That is more bytes, but no collective that only some
        # ranks of a pipeline reach.
        sent = jnp.zeros((ranks, *x.shape), x.dtype).at[(self.index(axis) + by) % ranks].set(x)
        return self.exchange(sent, axis)[(self.index(axis) - by) % ranks]

    def pass_on(self, x: Array, axis: str, by: int) -> Array:
        """`shift` by a permutation, which every device of the mesh must reach at once."""
        ranks = self.size(axis)
        return lax.ppermute(x, self.rules[axis], [(rank, (rank + by) % ranks) for rank in range(ranks)])

    def agreed(self, x: Array, *axes: str | None) -> Array:
        """`x`, whose dimensions these axes split and which is equal on all other ranks, as one value to them."""
        split = {name for axis in axes if axis is not None for name in self.rules[axis]}
        copies = tuple(sorted(varying_axes(x) - split))
        return lax.pmax(x, copies) if copies else x

    def index(self, axis: str) -> Array | int:
        """This device's rank along `axis`."""
        return lax.axis_index(self.rules[axis]) if self.rules[axis] else 0

    def piece(self, x: Array, axis: str, *, dim: int = 1) -> Array:
        """This rank's piece of `x`, which every rank of `axis` holds whole."""
        length = x.shape[dim] // self.size(axis)
        return lax.dynamic_slice_in_dim(x, self.index(axis) * length, length, dim) if self.rules[axis] else x

    def vary(self, tree: Any) -> Any:
        """`tree` marked as differing on every device, so that a loop over it sums its gradient once, at the end."""
        return vary(tree, self.mesh.axis_names if self.config.devices > 1 else ())

    def scatter_gradients(self, grads: Any) -> Any:
        """For each of `grads` of varied parameters the piece that this rank stores, summed in float32 over the ranks
        that store other pieces. A gradient that is stored as it is used stays as it is: `weight` has scattered it, or
        none does."""

        def scattered(variable: nnx.Variable) -> Any:
            value: Any = variable[...]
            for dim, axis in enumerate(full_axes(variable)):
                if axis in SHARDED and self.storage[axis] != self.rules[axis]:
                    value = _scatter_sum(value, self.storage[axis], dim)
            return value

        return _map_variables(scattered, grads)

    def sum_gradients(self, grads: Any) -> Any:
        """Scattered `grads`, summed over every mesh axis that does not split their parameter in storage."""

        def summed(variable: nnx.Variable) -> Any:
            split = {name for axis in full_axes(variable) if axis is not None for name in self.storage[axis]}
            copies = tuple(sorted(varying_axes(variable[...]) - split))
            return lax.psum(variable[...], copies) if copies else variable[...]

        return _map_variables(summed, grads)

    def _stored(self, axes: tuple[str | None, ...]) -> NamedSharding:
        return NamedSharding(self.mesh, _spec(self.storage, axes))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_weight(x: Array, axes: MeshAxes, dim: int) -> Array:
    """All pieces of `x`. What comes back is summed over ranks in float32, whatever x's dtype is."""
    return lax.all_gather(x, axes, axis=dim, tiled=True)


def _gather_weight_forward(x: Array, axes: MeshAxes, dim: int) -> tuple[Array, None]:
    return _gather_weight(x, axes, dim), None


def _gather_weight_backward(axes: MeshAxes, dim: int, _: None, g: Array) -> tuple[Array]:
    return (_scatter_sum(g, axes, dim).astype(g.dtype),)


def _scatter_sum(x: Array, axes: MeshAxes, dim: int) -> Array:
    return lax.psum_scatter(x.astype(jnp.float32), axes, scatter_dimension=dim, tiled=True)


_gather_weight.defvjp(_gather_weight_forward, _gather_weight_backward)


def make_plan(config: PlanConfig, model: ModelConfig, *, abstract: bool = False) -> Plan:
    """The plan of `config` for `model`, over this process group's devices or, `abstract`, over none.

    Raises ConfigError if the sizes do not divide, do not fold, or exceed the devices that exist, if the microbatches do
    not suit the schedule, or if a kernel was chosen that does not work on them.
    """
    schedule = plan_schedule(config, model) if config.stage > 1 else None
    folding = fold_plan(config, model)
    shared = bool(folding.logical.get("norm_groups_copies"))
    whole = config.rms_norm != FOR_GPU["rms_norm"] or not shared
    require(whole, config, "rms_norm", "plain where ranks of tensor share a group of Mamba's norm")
    mesh = make_mesh(folding, config, abstract=abstract)
    rules = _rules(folding, fully_sharded=config.fsdp == "parameters")
    return Plan(mesh, rules, _rules(folding, fully_sharded=config.fsdp != "none"), config, schedule=schedule)


def single_device_plan(config: PlanConfig, model: ModelConfig, *, sources: tuple[int, int, int] = (1, 1, 1)) -> Plan:
    """The same choices on one device, which stands for `sources` ranks when it counts capacity."""
    ones = dict.fromkeys(("data", "context", "tensor", "stage", "expert", "expert_tensor"), 1)
    plan = make_plan(dataclasses.replace(config, **ones, fsdp="none", fsdp_size=None, buffer_factor=None), model)
    return dataclasses.replace(plan, sources=sources)


def _rules(folding: Folding, *, fully_sharded: bool) -> dict[str, MeshAxes]:
    """Every logical axis name in the code base, and where it lives."""
    axes = folding.logical
    tensor = axes["tensor"]
    return {
        "stage": axes["stage"],
        # activations: rows of the batch, the sequence outside and inside a context rank
        "batch": axes["data"],
        "context": axes["context"],
        "sequence": tensor,
        "tokens": axes["context"] + tensor,
        # parameters of dense layers
        "embed": axes["fsdp"] if fully_sharded else (),
        "norm": (),
        "taps": (),
        "state": (),
        "positions": (),
        "vocab": tensor,
        "heads": tensor,
        "kv_heads": axes.get("kv_heads", tensor),
        "mlp": tensor,
        "mamba_heads": tensor,
        "groups": axes.get("groups", tensor),
        "group_peers": axes.get("norm_groups_copies", ()),
        # parameters of routed experts
        "expert": axes["expert"],
        "expert_tensor": axes["expert_tensor"],
        "expert_ranks": axes["expert"] + axes["expert_tensor"],
        "expert_mlp": axes["expert_tensor"],
        "expert_embed": axes["expert_fsdp"] if fully_sharded else (),
    }


def _spec(rules: Mapping[str, MeshAxes], axes: tuple[str | None, ...]) -> PartitionSpec:
    parts = [() if axis is None else rules[axis] for axis in axes]
    used = [name for part in parts for name in part]
    if len(set(used)) != len(used):
        raise ValueError(f"{axes} -> {parts}: one mesh axis splits two array axes")
    return PartitionSpec(*(part or None for part in parts))


def full_axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The variable's axes, behind one per dimension that stacking layers put in front. The first of these is the
    pipeline's if the variable is marked as `staged`; the others have no name."""
    metadata, ndim = variable.get_metadata(), variable.get_value().ndim
    stacked = (None,) * (ndim - len(metadata["axes"]))
    if metadata.get("staged"):
        stacked = ("stage", *stacked[1:])
    return stacked + tuple(metadata["axes"])


def _map_variables(on_variable: Callable, tree: Any, otherwise: Callable | None = None) -> Any:
    def visit(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):  # optax leaves Variables around nothing for parameters it masks
            return leaf.replace(on_variable(leaf)) if jax.tree.leaves(leaf) else leaf
        return otherwise(leaf) if otherwise else leaf

    return jax.tree.map(visit, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
