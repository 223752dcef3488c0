"""The plan: which mesh axes each logical axis is split over, and the methods by which model code communicates.

Model code names logical axes only. Inside `Plan.run` it sees one device's arrays; a collective over an axis of size one
is the identity, so one device runs the same code on a mesh of ones.

Between layers the ranks of `tensor` hold the residual stream (b, t, d) in one of three ways, `Plan.stream`:

- `time`: each holds a piece of every row's tokens (sequence parallelism; training, prefill)
- `rows`: each holds some rows of the batch (decoding, where a row has one or two tokens)
- `whole`: each holds all of it (tensor parallelism alone). The gradient of the stream is then the sum of the ranks'
  gradients; `leave` computes it in the backward pass, just as it sums the ranks' outputs in the forward pass.

In all three, a layer whose weights are sharded over `tensor` reads `plan.enter(x_btd)` and returns `plan.leave(y_btd)`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from orogen.config.checks import require
from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.config.recipe import FP8, PLAIN, RECIPES, Recipe, layer_recipes
from orogen.parallel.axes import SHARDED, MeshAxes, full_axes, make_rules, map_variables, spec_of, stream_rules
from orogen.parallel.gathered import gather_weight
from orogen.parallel.legal import fold_plan
from orogen.parallel.mesh import make_mesh
from orogen.parallel.ragged import Runs, ragged_exchange
from orogen.parallel.rounding_state import NUMBER, Rounding
from orogen.parallel.schedule import Schedule, plan_schedule
from orogen.parallel.varying import vary, varying_axes

# The dimension of (b, t, …) along which the ranks of `tensor` split the residual stream, if they do.
STREAM_DIM = {"time": 1, "rows": 0, "whole": None}
# For programs with products in FP8: otherwise XLA:GPU compiles a product and the conversions before it with Triton,
# which multiplies in 16 bits, and never offers them to cuBLASLt (observed with jax 0.11.2).
FP8_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A device mesh and the mesh axes that each logical axis is split over.

    rules: the mesh axes of arrays inside the step; storage: those of master weights and optimizer state between steps.
    sources: (data, context, tensor) of the ranks that a single device stands for when it decides which tokens exceed an
    expert's capacity; capacity counts per source rank, so `verify` needs it to reproduce a plan on one device.
    schedule: what the stages of a pipeline do at each tick; None without stages.
    stream: how the ranks of `tensor` hold the residual stream: time, rows or whole.
    decode_kernels: the implementation of kernels that only decoding uses: reference, or triton on an NVIDIA GPU.
    recipe: the formats of products in the current layer. recipes: those of the layers that follow, first the
    backbone's, then the multi-token-prediction block's; None: all have `recipe`.
    rounding: the inputs of this step's roundings; None if no recipe rounds. expert_tokens: see PrecisionConfig. maxima:
    see `Rounding`. nested: whether channels whose norm has weight 0, and experts whose gate is 0, count as absent.
    """

    mesh: Mesh | AbstractMesh
    rules: Mapping[str, MeshAxes]
    storage: Mapping[str, MeshAxes]
    config: PlanConfig
    sources: tuple[int, int, int] = (1, 1, 1)
    schedule: Schedule | None = None
    stream: str = "time"
    decode_kernels: str = "reference"
    recipe: Recipe = RECIPES[PLAIN]
    recipes: tuple[Recipe, ...] | None = None
    rounding: Rounding | None = None
    expert_tokens: int | None = None
    maxima: np.ndarray | None = None
    nested: bool = False

    @property
    def rounds(self) -> bool:
        """Whether a recipe of some layer rounds operands, or measures what rounding would do."""
        return any(recipe.rounded or recipe.measured for recipe in (self.recipe, *(self.recipes or ())))

    @property
    def compiler_options(self) -> dict[str, Any]:
        """XLA options without which a program of this plan would not run as planned. jax accepts them for the
        outermost jit only."""
        formats = set().union(*(recipe.names() for recipe in (self.recipe, *(self.recipes or ()))))
        return dict(FP8_OPTIONS) if FP8 in formats else {}

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes. Raises KeyError on an unknown axis, ValueError if
        one mesh axis would split two of them."""
        return spec_of(self.rules, axes)

    def size(self, axis: str) -> int:
        """The number of pieces that `axis` is split into."""
        return math.prod(self.mesh.shape[name] for name in self.rules[axis])

    def specs(self, tree: Any) -> Any:
        """`tree` of variables with `axes`, the value of each replaced by its PartitionSpec inside the step."""
        # A value may be several arrays with these axes (`precision.scaled`).
        each = lambda v: jax.tree.map(lambda _: spec_of(self.rules, full_axes(v)), v.get_value())  # noqa: E731
        return map_variables(each, tree)

    def with_recipes(self, recipes: tuple[Recipe, ...] | None) -> "Plan":
        """The plan for layers with these recipes; None: all have the plan's `recipe`."""
        return dataclasses.replace(self, recipes=recipes)

    def of_layers(self, start: int, stop: int | None = None) -> "Plan":
        """The plan for the layers from `start` to `stop` of those that follow. Raises ValueError if there are fewer."""
        if self.recipes is None:
            return self
        if (stop or start) > len(self.recipes):
            raise ValueError(f"{stop or start} layers with {len(self.recipes)} recipes: expected one for each")
        rounding = self.rounding and self.rounding.of_layers(start, stop)
        return dataclasses.replace(self, recipes=self.recipes[start:stop], rounding=rounding)

    def of_layer(self) -> "Plan":
        """The plan inside the first of the layers that follow."""
        if self.recipes is None:
            return self
        rounding = self.rounding and self.rounding.of_layers(0, 1)
        return dataclasses.replace(self, recipe=self.recipes[0], recipes=None, rounding=rounding)

    def with_each(self, each: tuple[Array, Array | None]) -> "Plan":
        """The plan with another `Rounding.each` for the layers that follow, if it rounds."""
        if self.rounding is None:
            return self
        layer_l, probe_l = each
        return dataclasses.replace(self, rounding=self.rounding._replace(layer_l=layer_l, probe_l=probe_l))

    def in_step(self, key: Array, tokens_bt: Array) -> "Plan":
        """The plan of a step, if it rounds. key: see `Rounding`; tokens_bt: this device's part of the global batch.
        Raises ValueError if the plan rounds but is that of a single layer."""
        if not self.rounds:
            return self
        if self.recipes is None:
            raise ValueError("the plan of one layer, whose recipe rounds operands; expected that of all layers")
        rows, length = (n * self.size(axis) for n, axis in zip(tokens_bt.shape, ("batch", "context"), strict=True))
        layer_l = jnp.asarray(np.arange(len(self.recipes), dtype=np.int32))
        rounding = Rounding(key, rows * length, self.expert_tokens or length, layer_l, maxima=self.maxima)
        return dataclasses.replace(self, rounding=rounding)

    def on_tokens(self, extras: Mapping[str, Array], probe_l: Array | None = None) -> "Plan":
        """The plan for a part of the step's batch with these extras. probe_l: see `Rounding`."""
        if self.rounding is None:
            return self
        rounding = self.rounding._replace(number_bt=extras[NUMBER], probe_l=probe_l)
        return dataclasses.replace(self, rounding=rounding)

    def from_layer(self, start: Array, count: int) -> "Plan":
        """The plan for `count` layers from number `start` on, whose recipes are set already. start: int32 ()."""
        if self.rounding is None:
            return self
        taken = lambda a: lax.dynamic_slice_in_dim(a, start, count)  # noqa: E731
        return self.with_each(jax.tree.map(taken, self.rounding.each))

    def at_depth(self, depth: int) -> "Plan":
        """The plan for one depth, from 1, of the multi-token-prediction block, whose layers draw other random words at
        each depth."""
        if self.rounding is None:
            return self
        rounding = self.rounding
        return self.with_each((rounding.layer_l + (depth - 1) * len(rounding.layer_l), rounding.probe_l))

    def with_stream(self, stream: str) -> "Plan":
        """The plan whose ranks of `tensor` hold the residual stream by `time`, by `rows` or `whole`."""
        rules, storage = (stream_rules(rules, stream) for rules in (self.rules, self.storage))
        return dataclasses.replace(self, rules=rules, storage=storage, stream=stream)

    def decoding(self) -> "Plan":
        """The plan for rows of too few tokens to be split: `tensor` splits the rows instead, and must divide them."""
        return self.with_stream("rows")

    def sharding(self, *axes: str | None) -> NamedSharding:
        """The NamedSharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def run(self, function: Callable[..., Any], *, inputs: Any, outputs: Any) -> Callable[..., Any]:
        """`function` on every device at once, each seeing its own pieces: the one shard_map, manual over all axes.

        inputs, outputs: prefix trees of PartitionSpecs (from `spec` and `specs`). Replication is type-checked.
        """
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=True)

    # Methods for the residual stream, for use inside `run`.

    def enter(self, x: Array) -> Array:
        """The residual stream `x` (b, t, …), whole on every rank, for a layer with weights sharded over `tensor`."""
        dim = STREAM_DIM[self.stream]
        return x if dim is None else self.gather(x, "tensor", dim=dim)

    def leave(self, y: Array) -> Array:
        """The sum of the ranks' partial `y` (b, t, …), laid out as the residual stream. Raises ValueError if the ranks
        of `tensor` cannot share it evenly."""
        dim = STREAM_DIM[self.stream]
        # The sum is one value, but what follows (norms, biases) treats it as each rank's own, whose gradients add up.
        return vary(self.sum(y, "tensor"), self.rules["tensor"]) if dim is None else self.scatter(y, "tensor", dim=dim)

    def own(self, x: Array) -> Array:
        """This rank's share of the stream, from an `x` (b, t, …) that every rank of `tensor` holds whole."""
        dim = STREAM_DIM[self.stream]
        return x if dim is None else self.piece(x, "tensor", dim=dim)

    def deal(self, x: Array) -> Array:
        """The tokens of the residual stream `x` (b, t, …) that this rank alone routes. Raises ValueError if the ranks
        of `tensor` cannot share them evenly."""
        return self.piece(x, "tensor", dim=1) if self.stream == "whole" else x

    def collect(self, y: Array) -> Array:
        """The inverse of `deal`."""
        return self.gather(y, "tensor", dim=1) if self.stream == "whole" else y

    def stream_shape(self, rows: int, time: int) -> tuple[int, int]:
        """(b, t) of the residual stream on this device, if its data and context rank has `rows` rows of `time`
        tokens."""
        shape, dim = [rows, time], STREAM_DIM[self.stream]
        if dim is not None:
            shape[dim] //= self.size("tensor")
        return shape[0], shape[1]

    # Other methods for use inside `run`.

    @jax.named_scope("weight")
    def weight(self, parameter: nnx.Variable) -> Array:
        """The parameter, gathered along the axes that FSDP shards; its gradient is reduce-scattered in float32."""
        value: Any = parameter[...]
        for dim, axis in enumerate(full_axes(parameter)):
            if axis in SHARDED and self.rules[axis]:
                value = gather_weight(value, self.rules[axis], dim)
        return value

    def gather(self, x: Array, axis: str, *, dim: int = 1) -> Array:
        """All pieces of `x` along `axis`, concatenated along `dim`; the gradient is reduce-scattered."""
        return lax.all_gather(x, self.rules[axis], axis=dim, tiled=True) if self.rules[axis] else x

    def scatter(self, x: Array, axis: str, *, dim: int = 1) -> Array:
        """The sum of `x` over `axis`; each rank keeps its piece of it along `dim`."""
        if not self.rules[axis]:
            return x
        self._require_pieces(x, axis, dim)
        return lax.psum_scatter(vary(x, self.rules[axis]), self.rules[axis], scatter_dimension=dim, tiled=True)

    def sum(self, x: Any, axis: str) -> Any:
        """The sum of `x` over `axis`, on every rank."""
        return lax.psum(vary(x, self.rules[axis]), self.rules[axis]) if self.rules[axis] else x

    def max(self, x: Array, axis: str) -> Array:
        """The maximum of `x` over `axis`, on every rank. Has no gradient."""
        return lax.pmax(vary(x, self.rules[axis]), self.rules[axis]) if self.rules[axis] else x

    def total(self, tree: Any) -> Any:
        """Each leaf summed over every axis that it varies over, except the pipeline's, whose stages do not reach this
        call at the same tick. Only for partial sums, never for copies."""
        stages = self.rules["stage"]
        inside = lambda x: tuple(sorted(varying_axes(x) - set(stages)))  # noqa: E731
        return jax.tree.map(lambda x: lax.psum(x, axes) if (axes := inside(x)) else x, tree)

    def exchange(self, x: Array, axis: str) -> Array:
        """All-to-all: piece r of dimension 0 goes to rank r; the result is stacked by sender along dimension 0."""
        if not self.rules[axis]:
            return x
        # In two dimensions: with more, XLA:CPU may give the pieces different layouts, which it then rejects (jax
        # 0.10.1).
        flat = lax.all_to_all(x.reshape(x.shape[0], -1), self.rules[axis], 0, 0, tiled=True)
        return flat.reshape(x.shape)

    def ragged_exchange(self, x: Array, runs: Runs, axis: str, *, rows: int) -> Array:
        """(rows, d): the rows that arrive here when the ranks of `axis` exchange `runs`; zero where none does."""
        if not self.rules[axis]:  # one rank: what it sends arrives here
            row_m = jnp.arange(rows) - runs.arrives[0]
            inside_m = (row_m >= 0) & (row_m < runs.received[0])
            return jnp.take(x, jnp.where(inside_m, row_m + runs.starts[0], len(x)), axis=0, mode="fill", fill_value=0)
        return ragged_exchange(x, runs, rows=rows, axes=self.rules[axis])

    def shift(self, x: Array, axis: str, by: int) -> Array:
        """The `x` of the rank that is `by` ranks before this one in the ring."""
        ranks = self.size(axis)
        if by % ranks == 0:
            return x
        if self.config.shift == "permute":
            return self.pass_on(x, axis, by)
        # Every rank sends to every rank, and zeros to all but one. That takes more bytes than a permutation, which
        # would deadlock when only some stages of a pipeline reach it.
        sent = jnp.zeros((ranks, *x.shape), x.dtype).at[(self.index(axis) + by) % ranks].set(x)
        return self.exchange(sent, axis)[(self.index(axis) - by) % ranks]

    @jax.named_scope("send")
    def pass_on(self, x: Array, axis: str, by: int) -> Array:
        """`shift` by a permutation, which every device of the mesh must reach at once."""
        ranks = self.size(axis)
        return lax.ppermute(x, self.rules[axis], [(rank, (rank + by) % ranks) for rank in range(ranks)])

    def agreed(self, x: Array, *axes: str | None) -> Array:
        """`x`, which is split over these axes and equal on all other ranks, marked as the same value on those."""
        split = {name for axis in axes if axis is not None for name in self.rules[axis]}
        copies = tuple(sorted(varying_axes(x) - split))
        return lax.pmax(x, copies) if copies else x

    def over_others(self, x: Array, *axes: str) -> Array:
        """The sum of the partial `x`, which is split over these axes, over every other axis that it varies over, except
        the pipeline's."""
        split = {name for axis in (*axes, "stage") for name in self.rules[axis]}
        others = tuple(sorted(varying_axes(x) - split))
        return lax.psum(x, others) if others else x

    def index(self, axis: str) -> Array | int:
        """This device's rank along `axis`."""
        return lax.axis_index(self.rules[axis]) if self.rules[axis] else 0

    def piece(self, x: Array, axis: str, *, dim: int = 1) -> Array:
        """This rank's piece of `x`, which every rank of `axis` holds whole."""
        self._require_pieces(x, axis, dim)
        length = x.shape[dim] // self.size(axis)
        return lax.dynamic_slice_in_dim(x, self.index(axis) * length, length, dim) if self.rules[axis] else x

    def _require_pieces(self, x: Array, axis: str, dim: int) -> None:
        if x.shape[dim] % self.size(axis):
            size = self.size(axis)
            raise ValueError(f"{axis}={size} for {x.shape}: expected a multiple of {size} along dimension {dim}")

    def vary(self, tree: Any) -> Any:
        """`tree` marked as differing on every device, so that a loop over it sums its gradient once, at the end."""
        return vary(tree, self.mesh.axis_names if self.config.devices > 1 else ())


def make_plan(config: PlanConfig, model: ModelConfig, *, abstract: bool = False, devices: Any = None) -> Plan:
    """The plan of `config` for `model`, over `devices` (None: this process group's) or, if `abstract`, over none.

    Raises ConfigError if the sizes do not divide, do not fold, or exceed the devices that exist, if the microbatches do
    not suit the schedule, or if a kernel was chosen that does not work on them.
    """
    schedule = plan_schedule(config, model) if config.stage > 1 else None
    folding = fold_plan(config, model)
    shared = bool(folding.logical.get("norm_groups_copies"))
    whole = config.rms_norm != FOR_GPU["rms_norm"] or not shared
    require(whole, config, "rms_norm", "plain where ranks of tensor share a group of Mamba's norm")
    mesh = make_mesh(folding, config, abstract=abstract, devices=devices)
    rules = make_rules(folding, fully_sharded=config.fsdp == "parameters")
    storage = make_rules(folding, fully_sharded=config.fsdp != "none")
    recipes = {"recipe": RECIPES[config.linear], "recipes": layer_recipes(config, model)}
    return Plan(mesh, rules, storage, config, schedule=schedule, **recipes).with_stream(config.stream)


def single_device_plan(config: PlanConfig, model: ModelConfig, *, sources: tuple[int, int, int] = (1, 1, 1)) -> Plan:
    """The plan of `config` on one device, which stands for `sources` ranks when it counts capacity; see `Plan`."""
    ones = dict.fromkeys(("data", "context", "tensor", "stage", "expert", "expert_tensor"), 1)
    plan = make_plan(dataclasses.replace(config, **ones, fsdp="none", fsdp_size=None, buffer_factor=None), model)
    return dataclasses.replace(plan, sources=sources)
