"""Passes over calibration text: the largest magnitudes of products' inputs, the sensitivity of products to formats, and
the loss, on any plan without a pipeline whose ranks split no block of numbers that share a scale.

Letters: l layers of the pattern, f candidates.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from orogen.checkpoint.leaves import leaves_of
from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError, require
from orogen.config.model import ModelConfig
from orogen.config.precision import KINDS
from orogen.config.products import product_of
from orogen.config.quantize import Measured, Target
from orogen.config.recipe import Recipe, Scales, Stored
from orogen.data.packing import Batch
from orogen.model.homes import homes
from orogen.parallel import placement
from orogen.parallel.axes import SHARDED
from orogen.parallel.plan import Plan
from orogen.precision.calibration import probe_shape
from orogen.precision.policy import working_copy
from orogen.precision.words import step_key
from orogen.train.formats import with_numbers
from orogen.train.heldout import measure
from orogen.train.loss import batch_counts, loss_share
from orogen.train.next_token import LOSS, NEXT_TOKEN
from orogen.train.step import BATCH_AXES, batch_to_devices

# The loss of the next token alone: neither multi-token prediction nor the routers' losses.
OBJECTIVE = dataclasses.replace(NEXT_TOKEN, deeper=False)
# Of one layer, by kind of weight.
Layer = dict[str, Measured]


class Passes:
    """Passes of a model over batches. progress: called after each batch.

    Raises ConfigError for a plan with stages or microbatches, or one that drops tokens, or whose empty rows would be
    measured.
    """

    def __init__(self, opened: Opened, *, dtype: str = "float32", progress: Callable[[], None] = lambda: None):
        plan = opened.plan.config
        require(plan.stage == 1, plan, "stage", "1: layers are calibrated on all devices together")
        require(plan.microbatches == 1, plan, "microbatches", "1: maxima are of whole batches")
        require(plan.capacity_factor is None, plan, "capacity_factor", "None: no token is dropped here")
        empty = plan.dispatch == "alltoall" and opened.config.routed_expert_bias
        require(not empty, plan, "dispatch", "another: biases of experts would make its empty rows count in maxima")
        self.opened, self.dtype, self.progress = opened, dtype, progress

    @property
    def layers(self) -> int:
        """How many layers there are, those of the multi-token-prediction block included."""
        layers = self.opened.config.layers
        return len(layers.main + layers.mtp)

    def release(self) -> None:
        """Frees the model's parameters; what follows needs `params`."""
        self.opened = self.opened._replace(params=nnx.State({}))

    def maxima(self, batches: Iterable[Batch], kinds: Sequence[Iterable[str]]) -> np.ndarray:
        """(l, kinds, calls) float32: the largest magnitude of the input of each product of these kinds, by layer.
        Raises ConfigError if one is not finite."""
        plan = self._plan([{kind: Measured() for kind in layer} for layer in kinds])
        found = np.zeros(probe_shape(self.layers, 0)[:-1], np.float32)
        for probe in self._probes(plan, batches, 0):
            found = np.maximum(found, probe[..., 0])
        if not np.isfinite(found).all():
            layer, kind, _ = np.argwhere(~np.isfinite(found))[0]
            raise ConfigError(f"layer {layer}: the input of {KINDS[kind]} is not finite; expected finite numbers")
        return found

    def scores(
        self, batches: Iterable[Batch], targets: Sequence[dict[str, tuple[Target, ...]]], maxima: np.ndarray
    ) -> list[dict[str, np.ndarray]]:
        """Of each layer, by kind: the sensitivity (f,) float64 to each of its targets, summed over batches. Those of
        routed experts are under the first of their kinds."""
        most = max((len(found) for layer in targets for found in layer.values()), default=0)
        self._require_whole_gradients()
        self.require_whole_blocks(targets)
        layers = [{kind: Measured(candidates=found) for kind, found in layer.items()} for layer in targets]
        plan = dataclasses.replace(self._plan(layers, most), maxima=maxima)
        total = np.zeros((*probe_shape(self.layers, 0)[:2], most))
        for probe in self._probes(plan, batches, most):
            total += probe[..., 1:].astype(np.float64).sum(2)
        if not np.isfinite(total).all():
            layer, kind, _ = np.argwhere(~np.isfinite(total))[0]
            raise ConfigError(f"layer {layer}: the sensitivity of {KINDS[kind]} is not finite; expected finite numbers")
        return [
            {kind: total[number, KINDS.index(kind), : len(found)] for kind, found in layer.items()}
            for number, layer in enumerate(targets)
        ]

    def loss(
        self, batches: Iterable[Batch], *, applied: Sequence[dict[str, Target]] = (),
        maxima: np.ndarray | None = None, cache: Sequence[Scales | None] = (), params: Any = None,
    ) -> float:  # fmt: skip
        """Nats per token. applied: by layer and kind, how inputs are rounded, with scales from `maxima`; weights are
        taken as they are. cache: by layer, the scales of keys and values in FP8; none: they are not rounded. params: of
        the same model, in place of the opened ones. Raises ConfigError if it is not finite."""
        opened = self.opened
        if cache or any(target.inputs for layer in applied for target in layer.values()):
            self.require_whole_blocks([{k: (t,) for k, t in layer.items() if t.inputs} for layer in applied])
            layers = [{k: Measured(applied=t) for k, t in layer.items() if t.inputs} for layer in applied]
            plan = dataclasses.replace(self._plan(layers, cache=cache), maxima=maxima)
            measured = measure(opened.built, OBJECTIVE, opened.config, plan, self.dtype)
        else:
            measured = self._measure
        params = placement.working(opened.params if params is None else params, opened.plan)
        nats = count = 0.0
        for batch in batches:
            found = jax.device_get(measured(params, opened.buffers, batch_to_devices(batch, opened.plan)))[LOSS]
            nats, count = nats + float(found.sum), count + float(found.count)
            self.progress()
        if not np.isfinite(nats):
            raise ConfigError(f"the loss of the calibration text is {nats}; expected a finite number")
        return nats / max(count, 1)

    @functools.cached_property
    def _measure(self) -> Callable[..., Any]:
        opened = self.opened
        return measure(opened.built, OBJECTIVE, opened.config, opened.plan, self.dtype)

    def _plan(self, layers: Sequence[Layer], candidates: int = 0, *, cache: Sequence[Scales | None] = ()) -> Plan:
        """The plan whose layers measure this, those of the multi-token-prediction block nothing. cache: of `loss`."""
        plan = self.opened.plan
        assert plan.recipes is not None, "the plan of a whole model has a recipe for each layer"
        found: list[tuple[tuple[str, Measured], ...]] = [tuple(layer.items()) for layer in layers]
        found += [()] * (len(plan.recipes) - len(found))
        kept = [Stored(key_values=scales) for scales in cache]
        kept += [Stored()] * (len(found) - len(kept))
        recipes = tuple(Recipe(measured=one, stored=stored) for one, stored in zip(found, kept, strict=True))
        return dataclasses.replace(plan, recipes=recipes, recipe=Recipe())

    def _probes(self, plan: Plan, batches: Iterable[Batch], candidates: int) -> Iterable[np.ndarray]:
        """What products measure on each batch."""
        opened = self.opened
        run = probing(opened.built, opened.config, plan, self.dtype, candidates)
        params = placement.working(opened.params, opened.plan)
        for batch in batches:
            yield np.asarray(jax.device_get(run(params, opened.buffers, batch_to_devices(batch, opened.plan))))
            self.progress()

    def require_whole_blocks(self, targets: Sequence[Mapping[str, Iterable[Target]]]) -> None:
        """Raises ConfigError if ranks that share the inputs of a weight split a block of inputs that a target gives one
        scale: scores would depend on the plan."""
        plan, leaves = self.opened.plan, leaves_of(self.opened.built.params)
        for number, (home, layer) in enumerate(zip(homes(self.opened.config), targets, strict=False)):
            for path, leaf in leaves.items():
                name = path[len(home.path) :]
                if path[: len(home.path)] != home.path or (product := product_of(home.letter, name)) is None:
                    continue
                axis, inputs = leaf.get_metadata()["axes"][-2], leaf.get_value().shape[-2]
                ranks = 1 if axis is None or axis in SHARDED else plan.size(axis)
                for block in {target.weight.block or 1 for target in layer.get(product[0], ())}:
                    if ranks > 1 and inputs // ranks % block:
                        raise ConfigError(
                            f"layer {number}: {ranks} ranks share the {inputs} inputs of {product[0]}; expected a "
                            f"multiple of {block} for each, the numbers that have one scale"
                        )

    def _require_whole_gradients(self) -> None:
        """Raises ConfigError if several ranks compute one output, each with a part of its gradient."""
        plan, model = self.opened.plan.config, self.opened.config
        letters = set(model.layers.main)
        shared = [(model.num_key_value_heads, "*w", "num_key_value_heads"), (model.n_groups, "M", "n_groups")]
        shared += [(1, "+", "latent vectors of keys and values")]
        for most, found, name in shared:
            if most is not None and letters & set(found) and plan.tensor > most:
                raise ConfigError(
                    f"PlanConfig.tensor is {plan.tensor}; expected at most {most} ({name}) to measure sensitivities"
                )


def probing(
    built: Any, config: ModelConfig, plan: Plan, dtype: str, candidates: int
) -> Callable[[nnx.State, nnx.State, Batch], Array]:
    """The jitted function (params, buffers, batch) -> what the products of the plan's layers measure, of the shape
    `probe_shape`. The loss is the mean over the batch's targets."""
    quiet = dataclasses.replace(config, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)

    def on_device(params: nnx.State, buffers: nnx.State, batch: Batch, key: Array, probe: Array) -> Array:
        counts = batch_counts(batch, OBJECTIVE, 0, plan)
        here = plan.in_step(key, batch.tokens_bt)
        model = nnx.merge(built.graph, working_copy(params, dtype), buffers)

        def loss(probe: Array) -> Array:
            at = here.on_tokens(batch.extras, probe)
            return loss_share(model, batch, counts, objective=OBJECTIVE, config=quiet, plan=at)[0]

        return jax.grad(loss)(probe)

    specs = plan.specs(built.params), plan.specs(built.buffers), plan.spec(*BATCH_AXES), plan.spec(), plan.spec()
    on_devices = plan.run(on_device, inputs=specs, outputs=plan.spec())
    count = len(plan.recipes or ())

    def run(params: nnx.State, buffers: nnx.State, batch: Batch) -> Array:
        probe = jnp.zeros(probe_shape(count, candidates))
        return on_devices(params, buffers, with_numbers(batch, plan), step_key(0, 0), probe)

    return jax.jit(run)
