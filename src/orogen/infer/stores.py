"""Caches of a model on its plan: made, counted, and copied by rows.

Letters: b slots, d data ranks, l tokens of a text.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from orogen.checkpoint.open import Opened
from orogen.config.engine import KEPT, EngineConfig
from orogen.infer.forward import Caches
from orogen.model.cache import map_layers
from orogen.model.lm import LanguageModel
from orogen.model.slots import Paged, Slots, with_pools
from orogen.parallel.context import over_rows
from orogen.parallel.placement import jitted
from orogen.parallel.plan import Plan
from orogen.precision.fp8 import E4M3


class Layout(NamedTuple):
    """How the caches of a model lie: specs of arrays, and how many axes of repeated layers each has in front."""

    specs: Any
    leads: Any
    axes: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Stores:
    """The caches of one model on its plan, and the programs that keep them.

    drafts: as in `config`, 0 if nothing drafts. length: most tokens of a text.
    """

    opened: Opened
    config: EngineConfig
    drafts: int
    length: int

    @property
    def plan(self) -> Plan:
        """Of reading; that of decoding splits rows."""
        return self.opened.plan

    @functools.cached_property
    def holding(self) -> Plan:
        """Of what slots keep: of a data rank's caches each rank of `context` has a copy, which need not be equal, and
        of its slots a share, which it decodes. A copy has pages of prompts whole, and those of answers where the rank
        decodes them."""
        return over_rows(self.opened.plan)

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
        specs = jax.tree.map(lambda lead, names: self.holding.spec(*(None,) * lead, *names), leads, axes)
        return Layout(specs, leads, axes)

    def bytes_per_device(self, slots: int, pages: int) -> int:
        """What `start` takes on each device, from shapes alone."""
        made, bytes_of = self._shapes(self._room(slots, pages)), lambda a: a.size * a.dtype.itemsize
        ways = lambda names: math.prod(self.plan.size(n) for n in names if n not in (None, "batch"))  # noqa: E731
        return sum(jax.tree.leaves(jax.tree.map(lambda a, n: bytes_of(a) // ways(n), made, self.layout.axes)))

    def _shapes(self, room: Slots) -> Caches:
        """The arrays of one data rank's caches, whole, without their numbers."""
        built = self.opened.built
        start = lambda params, buffers: self._empty(self.merged(params, buffers), room)  # noqa: E731
        return jax.eval_shape(start, built.params, built.buffers)

    @property
    def _abstract(self) -> LanguageModel:
        built = self.opened.built
        return nnx.merge(built.graph, built.params, built.buffers)

    def start(self, slots: int, pages: int) -> Caches:
        """Empty caches of so many slots and pages in each data rank."""

        def make(params: Any, buffers: Any) -> Caches:
            made = self._empty(self.merged(params, buffers), self._room(slots, pages))
            return self.settled(self.plan.vary(made))

        opened = self.opened
        inputs = self.plan.specs(opened.params), self.plan.specs(opened.buffers)
        run = self.plan.run(make, inputs=inputs, outputs=self.layout.specs)
        return jax.jit(run)(opened.params, opened.buffers)

    def merged(self, params: Any, buffers: Any) -> LanguageModel:
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

    @functools.cached_property
    def copy(self) -> Any:
        """(into, source, into_d, source_d): `into`, with what one row of `source` keeps beside pages in one of its own,
        in each data rank; a number beyond the last: nothing is copied there, or zeros from there."""

        def copy(into: Caches, source: Caches, into_d: Array, source_d: Array) -> Caches:
            def put(old: Array, new: Array, lead: int) -> Array:
                row = jnp.take(new, source_d, axis=lead, mode="fill", fill_value=0)
                return old.at[(slice(None),) * lead + (into_d,)].set(row, mode="drop")

            return self.settled(self.plan.vary(self.of_rows(put, into, source)))

        rank = self.plan.spec("batch")
        inputs, outputs = (self.layout.specs,) * 2 + (rank,) * 2, self.layout.specs
        return jitted(copy, self.plan, inputs=inputs, outputs=outputs)

    @functools.cached_property
    def write(self) -> Any:
        """(caches, text_dl, row_d): the caches, with a text in one row of each data rank; a number beyond the last:
        in none."""

        def write(caches: Caches, text_dl: Array, row_d: Array) -> Caches:
            text_bl = self.plan.vary(caches.text_bl).at[row_d].set(text_dl, mode="drop")
            return caches._replace(text_bl=self.holding.agreed(text_bl, *self.layout.axes.text_bl))

        rank = self.plan.spec("batch")
        return jitted(write, self.plan, inputs=(self.layout.specs, rank, rank), outputs=self.layout.specs)

    def _mtp(self, model: LanguageModel) -> Any:
        """The layers of the block that drafts; None if it does not."""
        return model.mtp.layers if self.config.drafter == "mtp" and model.mtp is not None else None

    def _room(self, slots: int, pages: int) -> Slots:
        config = self.config
        piece = config.chunk if config.exact else config.prefill_tokens  # exact sums over a ring need one length of it
        return Slots(
            slots, pages, config.page, 1, piece, self.drafts, config.replayed,
            jnp.dtype(config.state_dtype), None if config.key_values == KEPT else E4M3,
        )  # fmt: skip

    def of_rows(self, function: Callable[..., Array], one: Caches, other: Caches) -> Caches:
        """The function of each array of `one` that has slots, with that of `other` and how many axes it has in front;
        pages as in `one`."""

        def each(a: Any, b: Any, lead: Any) -> Any:
            return a if isinstance(a, Paged) else jax.tree.map(function, a, b, lead)

        return Caches(*(map_layers(each, *fields) for fields in zip(one, other, self.layout.leads, strict=True)))

    def local(self, caches: Caches) -> Caches:
        """The caches of the slots that this rank of `context` decodes."""
        return self.of_rows(lambda a, _, lead: self.plan.piece(a, "context", dim=lead), caches, caches)

    def with_local(self, caches: Caches, local: Caches) -> Caches:
        """The caches with those of the slots that this rank of `context` has decoded."""

        def put(old: Array, new: Array, lead: int) -> Array:
            if self.plan.size("context") == 1:
                return new
            return lax.dynamic_update_slice_in_dim(old, new, self.plan.index("context") * new.shape[lead], lead)

        return self.of_rows(put, self.pooled(caches, local), local)

    def pooled(self, caches: Caches, other: Caches) -> Caches:
        """The caches with the pages of others."""
        return Caches(*(with_pools(*fields) for fields in zip(caches, other, strict=True)))

    def settled(self, caches: Caches) -> Caches:
        """The caches as they leave a program: equal arrays of several ranks are one."""
        axes, leads = self.layout.axes, self.layout.leads

        def agreed(a: Array, lead: int, names: Any) -> Array:
            if a.dtype == E4M3:  # as bits, so that no collective has to know the format
                return lax.bitcast_convert_type(agreed(lax.bitcast_convert_type(a, jnp.uint8), lead, names), E4M3)
            return self.holding.agreed(a, *(None,) * lead, *names)

        return jax.tree.map(agreed, caches, leads, axes)
