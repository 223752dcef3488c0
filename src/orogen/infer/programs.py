"""What an engine runs on its devices: caches made, prompts read, tokens decoded, rows of caches copied.

Arrays over slots are over those of all data ranks, a rank's own one after another. All control comes from the host with
each call; the devices keep caches and what sampling counts.

Letters: b slots, r rows that are read, t time, n drafts.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from orogen.checkpoint.open import Opened
from orogen.config.engine import EngineConfig
from orogen.infer.budget import Markers, markers_of
from orogen.infer.exact import COMPILER_OPTIONS
from orogen.infer.forward import Caches, Control, Exact, Forward, Pieces, Report, Sampler, with_pages
from orogen.infer.knobs import Features
from orogen.model.cache import map_layers
from orogen.model.lm import LanguageModel
from orogen.model.slots import Paged, Slots, with_pools
from orogen.parallel.placement import jitted
from orogen.parallel.plan import Plan


class Emitted(NamedTuple):
    """What a call emitted: tokens (b,), or (b, steps, n + 1), with what was asked for of each; drafts (b, n) of the
    next; slots (b,) whose logits were no numbers or had no possible token; and how many drafts of each depth (b, n)
    were there to be kept."""

    report: Report
    drafts_bn: Array
    bad_b: Array
    offered_bn: Array


class Layout(NamedTuple):
    """How the caches of a model lie: specs of arrays, and how many axes of repeated layers each has in front."""

    specs: Any
    leads: Any
    axes: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """The programs of one model on its plan. Each compiles once per shape and features.

    drafts: as in `config`, 0 if nothing drafts. length: most tokens of a text.
    """

    opened: Opened
    config: EngineConfig
    drafts: int
    length: int
    is_token_v: Any

    @functools.cached_property
    def traces(self) -> collections.Counter[str]:
        """How many programs of each kind were compiled."""
        return collections.Counter()

    @functools.cached_property
    def markers(self) -> Markers:
        """Of thinking, for requests with a budget. Raises ConfigError if the tokenizer has none."""
        return markers_of(self.opened.tokenizer, self.opened.config.vocab_size)

    @property
    def plan(self) -> Plan:
        """Of reading; that of decoding splits rows."""
        return self.opened.plan

    @property
    def ranks(self) -> int:
        """Data ranks, each with slots, pages and snapshots of its own."""
        return self.plan.size("batch")

    @functools.cached_property
    def layout(self) -> Layout:
        """Of the caches."""
        room, model = self._room(1, 1), self._abstract
        axes = Caches(
            model.backbone.cache_axes(room),
            self._mtp(model) and self._mtp(model).cache_axes(room),
            ("batch", None) if self.keeps_text else None,
        )
        leads = jax.tree.map(lambda array, names: array.ndim - len(names), self._shapes(room), axes)
        specs = jax.tree.map(lambda lead, names: self.plan.spec(*(None,) * lead, *names), leads, axes)
        return Layout(specs, leads, axes)

    def bytes_per_device(self, slots: int, pages: int) -> int:
        """What `start` takes on each device, from shapes alone."""
        made, bytes_of = self._shapes(self._room(slots, pages)), lambda a: a.size * a.dtype.itemsize
        ways = lambda names: math.prod(self.plan.size(n) for n in names if n not in (None, "batch"))  # noqa: E731
        return sum(jax.tree.leaves(jax.tree.map(lambda a, n: bytes_of(a) // ways(n), made, self.layout.axes)))

    def _shapes(self, room: Slots) -> Caches:
        """The arrays of one data rank's caches, whole, without their numbers."""
        built = self.opened.built
        start = lambda params, buffers: self._empty(self._merged(params, buffers), room)  # noqa: E731
        return jax.eval_shape(start, built.params, built.buffers)

    @property
    def _abstract(self) -> LanguageModel:
        built = self.opened.built
        return nnx.merge(built.graph, built.params, built.buffers)

    def start(self, slots: int, pages: int) -> Caches:
        """Empty caches of so many slots and pages in each data rank."""

        def make(params: Any, buffers: Any) -> Caches:
            made = self._empty(self._merged(params, buffers), self._room(slots, pages))
            return self._settled(self.plan.vary(made))

        opened = self.opened
        inputs = self.plan.specs(opened.params), self.plan.specs(opened.buffers)
        run = self.plan.run(make, inputs=inputs, outputs=self.layout.specs)
        return jax.jit(run)(opened.params, opened.buffers)

    def put(self, tree: Any) -> Any:
        """Arrays over slots, laid on the devices."""
        return jax.device_put(tree, self.plan.sharding("batch"))

    def read(self, caches: Caches, pieces: tuple[Any, Pieces], sampler: Sampler, *, features: Features):
        """Reads pieces of the prompts of some slots (r,), numbered in their ranks; a number beyond the last: of none.
        sampler: of these rows. Returns caches, and what was emitted, one token of each row whose prompt ends."""
        return self.reader(features)(*self.read_inputs(caches, pieces, sampler))

    def read_inputs(self, caches: Caches, pieces: tuple[Any, Pieces], sampler: Sampler) -> tuple[Any, ...]:
        """What `reader`'s program takes."""
        return caches, self._weights, pieces, sampler

    def decode(self, caches: Caches, control: Control, sampler: Sampler, *, features: Features, steps: int):
        """Decodes for `steps` steps, or until no slot has tokens left. Returns caches, rows, and what was emitted."""
        return self.decoder(features)(*self.decode_inputs(caches, control, sampler, steps))

    def decode_inputs(self, caches: Caches, control: Control, sampler: Sampler, steps: int) -> tuple[Any, ...]:
        """What `decoder`'s program takes."""
        return caches, self._weights, (control, sampler), np.int32(steps)

    @functools.cached_property
    def copy(self) -> Any:
        """(into, source, into_d, source_d): `into`, with what one row of `source` keeps beside pages in one of its own,
        in each data rank; a number beyond the last: nothing is copied there, or zeros from there."""

        def copy(into: Caches, source: Caches, into_d: Array, source_d: Array) -> Caches:
            def put(old: Array, new: Array, lead: int) -> Array:
                row = jnp.take(new, source_d, axis=lead, mode="fill", fill_value=0)
                return old.at[(slice(None),) * lead + (into_d,)].set(row, mode="drop")

            return self._settled(self.plan.vary(self._of_rows(put, into, source)))

        rank = self.plan.spec("batch")
        inputs, outputs = (self.layout.specs,) * 2 + (rank,) * 2, self.layout.specs
        return jitted(copy, self.plan, inputs=inputs, outputs=outputs)

    @functools.cached_property
    def write(self) -> Any:
        """(caches, text_dl, row_d): the caches, with a text in one row of each data rank; a number beyond the last:
        in none."""

        def write(caches: Caches, text_dl: Array, row_d: Array) -> Caches:
            text_bl = self.plan.vary(caches.text_bl).at[row_d].set(text_dl, mode="drop")
            return caches._replace(text_bl=self.plan.agreed(text_bl, *self.layout.axes.text_bl))

        rank = self.plan.spec("batch")
        return jitted(write, self.plan, inputs=(self.layout.specs, rank, rank), outputs=self.layout.specs)

    @functools.cached_property
    def _weights(self) -> list[Array]:
        """Parameters and buffers as a flat list: each call takes that apart in far less time than nested states."""
        return jax.tree.leaves((self.opened.params, self.opened.buffers))

    @functools.cached_property
    def reader(self) -> Callable[[Features], Any]:
        """The jitted program of `read`, by features; kept as long as this."""
        return functools.lru_cache(None)(self._reading)

    @functools.cached_property
    def decoder(self) -> Callable[[Features], Any]:
        """That of `decode`."""
        return functools.lru_cache(None)(self._decoding)

    def _reading(self, features: Features) -> Callable[..., Any]:
        def read(caches, params, buffers, numbered, sampler):
            slot_r, pieces = numbered
            forward = self._forward(params, buffers, self.plan, features)
            caches, slot_r, pieces, sampler = self.plan.vary((caches, slot_r, pieces, sampler))
            take = lambda a, _, lead: jnp.take(a, slot_r, axis=lead, mode="clip")  # noqa: E731
            put = lambda old, new, lead: old.at[(slice(None),) * lead + (slot_r,)].set(new, mode="drop")  # noqa: E731
            mine = self._of_rows(take, caches, caches)
            mine, _, report, drafts_rn, bad_r = forward.read(mine, pieces, sampler)
            caches = self._of_rows(put, self._pooled(caches, mine), mine)
            emitted = Emitted(report, drafts_rn, bad_r, jnp.zeros_like(drafts_rn))
            return self._settled(caches), self._agreed(self.plan.vary(emitted))

        return self._compiled(read, inputs=(self.plan.spec("batch"),) * 2, outputs=1)

    def _decoding(self, features: Features) -> Callable[..., Any]:
        def decode(caches, params, buffers, inputs, steps):
            control, sampler = inputs
            plan = self._decode_plan()
            forward = self._forward(params, buffers, plan, features)
            caches, control, sampler = plan.vary((caches, control, sampler))
            paged = with_pages(caches, control.table_bp)
            slots = len(control.token_b)
            alive = lambda control: plan.max(jnp.any(control.left_b > 0).astype(jnp.int32), "batch")  # noqa: E731

            def body(carry):
                step, _, (caches, rows, control, report, bad_b, offered_bn) = carry
                offered_bn += control.offered_bn
                caches, rows, control, now, bad_now_b = forward.step(caches, control, sampler._replace(rows=rows))
                report = jax.tree.map(lambda a, new: a.at[:, step].set(new), report, now)
                state = caches, rows, control, report, bad_b | bad_now_b, offered_bn
                return step + 1, alive(control), plan.vary(state)

            report = forward.blank((slots, self.config.steps, self.drafts + 1))
            state = paged, sampler.rows, control, report, jnp.zeros(slots, bool), jnp.zeros_like(control.drafts_bn)
            start = jnp.int32(0), alive(control), plan.vary(state)
            goes_on = lambda carry: (carry[0] < steps) & (carry[1] > 0)  # noqa: E731
            _, _, (paged, rows, control, *told) = lax.while_loop(goes_on, body, start)
            report, bad_b, offered_bn = told
            emitted = Emitted(report, control.drafts_bn, bad_b, offered_bn)
            # Not with this call's tables, whose width would make the caches those of another program.
            caches = self._of_rows(lambda _, new, lead: new, self._pooled(caches, paged), paged)
            return self._settled(caches), self._agreed(rows), self._agreed(emitted)

        return self._compiled(decode, inputs=(self.plan.spec("batch"), self.plan.spec()), outputs=2)

    def _compiled(self, program: Callable[..., Any], *, inputs: tuple[Any, ...], outputs: int) -> Callable[..., Any]:
        """The program, jitted, of caches, the list of weights, and inputs so laid out; so many trees over rows come out
        beside the caches."""
        opened, batch = self.opened, self.plan.spec("batch")
        model = self.plan.specs(opened.params), self.plan.specs(opened.buffers)
        nested = jax.tree.structure((opened.params, opened.buffers))

        def flat(caches: Caches, weights: list[Array], *rest: Any) -> Any:
            self.traces[program.__name__] += 1
            return program(caches, *jax.tree.unflatten(nested, weights), *rest)

        laid = self.layout.specs, jax.tree.leaves(model), *inputs
        options = COMPILER_OPTIONS if self.config.exact else None
        return jitted(flat, self.plan, inputs=laid, outputs=(self.layout.specs, *(batch,) * outputs), options=options)

    def _forward(self, params: Any, buffers: Any, plan: Plan, features: Features) -> Forward:
        is_token_v = jnp.asarray(self.is_token_v)
        lookup = self.config.drafter == "lookup"
        exact = Exact(self.config.chunk, self.layout.leads.backbone) if self.config.exact else None
        model = self._merged(params, buffers)
        markers = self.markers if features.budgets else None
        return Forward(model, plan, self.drafts, lookup, exact, features, is_token_v, markers)

    def _merged(self, params: Any, buffers: Any) -> LanguageModel:
        return nnx.merge(self.opened.built.graph, params, buffers)

    def _empty(self, model: LanguageModel, room: Slots) -> Caches:
        mtp, dtype = self._mtp(model), jnp.dtype(self.config.compute_dtype)
        text_bl = jnp.zeros((room.rows, self.text_length), jnp.int32) if self.keeps_text else None
        return Caches(model.backbone.start(room, dtype), mtp and mtp.start(room, dtype), text_bl)

    @property
    def text_length(self) -> int:
        """Tokens of a slot's text: whole chunks."""
        return -(-self.length // self.config.chunk) * self.config.chunk

    @property
    def keeps_text(self) -> bool:
        """Whether slots know the tokens of their texts."""
        return self.config.exact or self.config.drafter == "lookup"

    def _decode_plan(self) -> Plan:
        """Of decoding: rows are split, and products of experts are those for few rows."""
        if self.config.exact:  # the plan of reading: the same products
            return self.plan
        plan = self.plan.decoding()
        if plan.decode_kernels == "reference":
            blocks = plan.config.grouped_matmul == "blocks"
            few = dataclasses.replace(plan.config, grouped_matmul="small_blocks") if blocks else plan.config
            return dataclasses.replace(plan, config=few)
        # Norms of a few rows are part of what XLA fuses around them; a kernel for each takes longer than all of that.
        few = dataclasses.replace(plan.config, grouped_matmul="triton_small", rms_norm="plain")
        return dataclasses.replace(plan, config=few)

    def _mtp(self, model: LanguageModel) -> Any:
        """The layers of the block that drafts; None if it does not."""
        return model.mtp.layers if self.config.drafter == "mtp" and model.mtp is not None else None

    def _room(self, slots: int, pages: int) -> Slots:
        config = self.config
        piece = config.chunk if config.exact else config.prefill_tokens  # exact sums over a ring need one length of it
        return Slots(
            slots, pages, config.page, 1, piece, self.drafts, config.replayed,
            jnp.dtype(config.state_dtype),
        )  # fmt: skip

    def _of_rows(self, function: Callable[..., Array], one: Caches, other: Caches) -> Caches:
        """The function of each array of `one` that has slots, with that of `other` and how many axes it has in front;
        pages as in `one`."""

        def each(a: Any, b: Any, lead: Any) -> Any:
            return a if isinstance(a, Paged) else jax.tree.map(function, a, b, lead)

        return Caches(*(map_layers(each, *fields) for fields in zip(one, other, self.layout.leads, strict=True)))

    def _pooled(self, caches: Caches, other: Caches) -> Caches:
        """The caches with the pages of others."""
        return Caches(*(with_pools(*fields) for fields in zip(caches, other, strict=True)))

    def _settled(self, caches: Caches) -> Caches:
        """The caches as they leave a program: equal arrays of several ranks are one."""
        axes, leads = self.layout.axes, self.layout.leads
        agreed = lambda a, lead, names: self.plan.agreed(a, *(None,) * lead, *names)  # noqa: E731
        return jax.tree.map(agreed, caches, leads, axes)

    def _agreed(self, tree: Any) -> Any:
        """Arrays over slots that are equal on the ranks of other axes, as one."""

        def agree(a: Array) -> Array:
            if a.dtype == bool:
                return self.plan.agreed(a.astype(jnp.int8), "batch").astype(bool)
            return self.plan.agreed(a, "batch")

        return jax.tree.map(agree, tree)
