"""Passes over calibration text that measure what pruning goes by, on any plan without stages.

Letters: b batch, t time, d model, n tokens, v vocabulary, l layers.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from orogen.checkpoint.leaves import leaves_of
from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError, require
from orogen.config.model import ModelConfig
from orogen.data.packing import Batch
from orogen.layers.documents import Documents
from orogen.layers.probe import Probe, own_tokens, stream_squares
from orogen.model.block import Items, letters, repeats
from orogen.model.homes import homes
from orogen.model.lm import LanguageModel
from orogen.parallel import distributed, placement
from orogen.parallel.axes import STREAM
from orogen.parallel.plan import Plan
from orogen.precision.policy import working_copy
from orogen.train.step import BATCH_AXES, batch_to_devices

# By layer, along the pattern, with the multi-token-prediction block's last: sums over batches, float64.
LayerSums = list[dict[str, np.ndarray]]


class Measured(NamedTuple):
    """Sums over the batches: of each layer (see `Probe`; of the multi-token-prediction block's, over its depths too),
    and `row_squares` of the final norm's output; `changes` (l), the sum over batches of each layer's mean change."""

    layers: LayerSums
    final_d: np.ndarray
    changes: np.ndarray


class Idle(NamedTuple):
    """Hidden units, by number, of the dense MLP that is the layer `layer` of the pattern."""

    layer: int
    units: np.ndarray


class Calibration:
    """The passes of an open model in `dtype`. Raises ConfigError for a plan with stages."""

    def __init__(self, opened: Opened, dtype: str = "float32"):
        plan = opened.plan.config
        require(plan.stage == 1, plan, "stage", "1: every layer is measured on each device; fsdp shares the memory")
        self._opened, self._dtype = opened, dtype
        laid = jax.jit(placement.working, static_argnums=1)
        stored = opened.plan.storage != opened.plan.rules
        params = laid(opened.params, opened.plan) if stored else opened.params
        self._weights = params, opened.buffers
        self.layers = len(opened.config.layers.main)

    def measure(self, batches: Iterable[Batch], progress: Callable[[], None] = lambda: None) -> Measured:
        """The statistics of all layers, by one pass over the batches."""
        config = self._opened.config
        total: Any = None
        for batch in batches:
            found = self._fetched(self._statistics(*self._weights, self._laid(batch)))
            kept, depths, final_d, tokens = found
            layers = _by_layer(config, kept, depths)
            changes = np.array([layer.pop("change") / max(float(tokens), 1) for layer in layers])
            new = Measured(layers, final_d, changes)
            total = new if total is None else jax.tree.map(np.add, total, new)
            progress()
        return total

    def finals(self, batches: Iterable[Batch]) -> list[tuple[Batch, Any]]:
        """Each batch on its devices, with the final hidden states (b, t, d) of the whole model. They are on the
        host, since a device may not hold those of all batches, unless other processes have parts of them."""
        whole = np.ones(self.layers, np.float32)
        laid = (self._laid(batch) for batch in batches)
        return [(batch, _on_host(self._final(*self._weights, batch, whole))) for batch in laid]

    def distance(
        self, kind: str, finals: Sequence[tuple[Batch, Any]], removed: Sequence[int], *, idle: Idle | None = None
    ) -> float:
        """How far the model without the layers `removed` is from the whole one, by DEPTH_SCORES: the sum over tokens of
        the squared difference of final hidden states, or of logits, divided by that of the whole model's square; or the
        mean KL divergence, in nats per token. idle: hidden units that it also lacks. Raises ConfigError unless both
        sums are finite and the second above 0."""
        weights = self._weights if idle is None else self._without(idle)
        gain_l = np.ones(self.layers, np.float32)
        gain_l[list(removed)] = 0
        total = np.zeros(2)
        for batch, final in finals:
            without = self._final(*weights, batch, gain_l)
            whole = jax.device_put(final, without.sharding)
            total += self._fetched(self._compared(kind)(*self._weights, batch, whole, without))
        if not (np.isfinite(total).all() and total[1] > 0):
            gone = ", ".join(map(str, sorted(removed))) or "none"
            found = f"{kind} without layers {gone} is {total[0]:g} / {total[1]:g}"
            raise ConfigError(f"{found}; expected finite sums, the second above 0")
        return float(total[0] / total[1])

    def _without(self, idle: Idle) -> tuple[Any, Any]:
        """The weights of the model whose MLP has these hidden units multiplied by zero."""
        home, (params, buffers) = homes(self._opened.config)[idle.layer], self._weights
        flat: dict[Any, Any] = {**leaves_of(params)}
        down = flat[path := (*home.path, "mixer", "down")]
        zeroed = down[...].at[(*home.index, idle.units)].set(0)
        flat[path] = down.replace(jax.device_put(zeroed, down[...].sharding))
        return nnx.from_flat_state(flat), buffers

    def _laid(self, batch: Batch) -> Batch:
        return batch_to_devices(batch._replace(extras={}), self._opened.plan)

    def _fetched(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(tree))

    def _model(self, params: Any, buffers: Any) -> LanguageModel:
        return nnx.merge(self._opened.built.graph, working_copy(params, self._dtype), buffers)

    def _jitted(self, function: Callable[..., Any], inputs: tuple[Any, ...], outputs: Any) -> Callable[..., Any]:
        plan, built = self._opened.plan, self._opened.built
        weights = plan.specs(built.params), plan.specs(built.buffers), plan.spec(*BATCH_AXES)
        run = plan.run(function, inputs=(*weights, *inputs), outputs=outputs)
        return distributed.compiled_together(jax.jit(run, compiler_options=plan.compiler_options))

    @functools.cached_property
    def _statistics(self) -> Callable[..., Any]:
        """(parameters, buffers, batch) -> what the stack keeps, what each depth's keeps, the final norm's, tokens."""
        plan, config = self._opened.plan, self._opened.config

        def statistics(params: Any, buffers: Any, batch: Batch) -> tuple[Any, ...]:
            model, docs = self._model(params, buffers), _documents(batch)
            given = _probes(repeats(config.layers.main))
            deeper = [_probes(repeats(config.layers.mtp))] * config.mtp_depths
            h_btd, kept = model.hidden(batch.tokens_bt, docs, plan, given)
            depths = [kept for _, kept in model.deeper(h_btd, batch.tokens_bt, docs, plan, deeper)]
            tokens = jnp.sum(own_tokens(docs, plan), dtype=jnp.float32)
            return kept, depths, stream_squares(h_btd, docs, plan), _over_devices(tokens, plan)

        return self._jitted(statistics, (), plan.spec())

    @functools.cached_property
    def _final(self) -> Callable[..., Array]:
        """(parameters, buffers, batch, gains of the layers) -> final hidden states (b, t, d)."""
        plan, items = self._opened.plan, repeats(self._opened.config.layers.main)

        def final(params: Any, buffers: Any, batch: Batch, gain_l: Array) -> Array:
            given, docs = _gains(items, gain_l, np.arange(self.layers)), _documents(batch)
            h_btd, _ = self._model(params, buffers).hidden(batch.tokens_bt, docs, plan, given)
            return plan.agreed(h_btd, *STREAM)  # ranks that hold the same tokens hold one value

        return self._jitted(final, (plan.spec(),), plan.spec(*STREAM))

    @functools.cached_property
    def _compared(self) -> Callable[[str], Callable[..., Array]]:
        """By kind, (parameters, buffers, batch, two final hidden states) -> (2,): their distance and what it is divided
        by."""
        plan = self._opened.plan

        def program(kind: str) -> Callable[..., Array]:
            def compared(params: Any, buffers: Any, batch: Batch, whole_btd: Array, without_btd: Array) -> Array:
                docs = _documents(batch)
                if kind != "hidden_mse":
                    model = self._model(params, buffers)
                    return _of_logits(kind, (whole_btd, without_btd), docs, model, plan)
                whole, without = (plan.deal(x).astype(jnp.float32) for x in (whole_btd, without_btd))
                valid_bt1 = own_tokens(docs, plan)[..., None]
                sums = [jnp.sum(jnp.where(valid_bt1, jnp.square(a), 0)) for a in (without - whole, whole)]
                return _over_devices(jnp.stack(sums), plan)

            return self._jitted(compared, (plan.spec(*STREAM), plan.spec(*STREAM)), plan.spec())

        return functools.cache(program)


def _on_host(array: Array) -> Any:
    return jax.device_get(array) if array.is_fully_addressable else array


def _documents(batch: Batch) -> Documents:
    return Documents(batch.segments_bt, batch.positions_bt)


def _of_logits(kind: str, states: tuple[Array, Array], docs: Documents, model: LanguageModel, plan: Plan) -> Array:
    """(2,): the sum over tokens of how far the logits of the second states are from those of the first, and what it is
    divided by."""
    head_dv = model.head_matrix(plan)
    columns = plan.index("vocab") * head_dv.shape[1] + jnp.arange(head_dv.shape[1])
    known_v = columns < model.vocab_size
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    first_nd, second_nd = (flat(plan.enter(x)) for x in states)
    valid_n = flat(docs.segments_bt != 0)

    def compare(rows: tuple[Array, Array, Array]) -> Array:
        first_v, second_v = (jnp.matmul(x, head_dv, preferred_element_type=jnp.float32) for x in rows[:2])
        if kind == "logit_mse":
            found = [jnp.where(known_v, jnp.square(a), 0) for a in (second_v - first_v, first_v)]
            return jnp.where(rows[2], plan.sum(jnp.stack([a.sum() for a in found]), "vocab"), 0)
        log_p, log_q = (_log_softmax(jnp.where(known_v, a, -jnp.inf), plan) for a in (first_v, second_v))
        terms = jnp.where(known_v, jnp.exp(log_p) * (log_p - log_q), 0)
        return jnp.where(rows[2], jnp.stack([plan.sum(terms.sum(), "vocab"), 1.0]), 0)

    chunk = min(plan.config.logit_rows, len(valid_n))
    sums = lax.map(compare, (first_nd, second_nd, valid_n), batch_size=chunk).sum(0)
    return plan.agreed(plan.sum(plan.sum(sums, "context"), "batch"))


def _log_softmax(logit_v: Array, plan: Plan) -> Array:
    shifted_v = logit_v - plan.max(logit_v.max(), "vocab")
    return shifted_v - jnp.log(plan.sum(jnp.exp(shifted_v).sum(), "vocab"))


def _over_devices(x: Array, plan: Plan) -> Array:
    """The sum over the ranks that route tokens."""
    return plan.agreed(plan.sum(plan.sum(x, "token_time"), "token_rows"))


def _probes(items: Items) -> tuple[Any, ...]:
    """What a stack is given to be measured."""
    return tuple(Probe(measures=True) if isinstance(item, str) else _probes(item.items) for item in items)


def _gains(items: Items, gain_l: Array, number: np.ndarray) -> tuple[Any, ...]:
    """What a stack is given to have these gains. number (…, layers): of the stack's layers, after the axes of the
    repetitions around it."""
    given, start = [], 0
    for item in items:
        if isinstance(item, str):
            given.append(Probe(gain_l[number[..., start]]))
            start += 1
        else:
            size, stop = len(letters(item.items)), start + len(letters((item,)))
            inner = number[..., start:stop].reshape(*number.shape[:-1], item.count, size)
            given.append(_gains(item.items, gain_l, inner))
            start = stop
    return tuple(given)


def _by_layer(config: ModelConfig, kept: Any, depths: Sequence[Any]) -> LayerSums:
    """What each layer kept; those of the multi-token-prediction block summed over its depths."""
    found = []
    deeper = jax.tree.map(lambda *parts: sum(parts), *depths) if depths else None
    for home in homes(config):
        tree: Any = kept if home.path[0] == "backbone" else deeper
        for part in home.path:
            tree = tree[part] if isinstance(part, int) else tree
        found.append({name: np.array(array[home.index]) for name, array in tree.items()})
    return found
