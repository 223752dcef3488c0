"""What an engine runs on its devices: caches made, prompts read, tokens decoded, rows of caches copied.

Arrays over slots are over those of all data ranks, a rank's own one after another. The devices keep caches, and where
each slot is in its text (`state.py`); the host says with each call which slots go on.

Letters: b slots, r rows that are read, t time, n drafts.
"""

import collections
import dataclasses
import functools
import importlib.util
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.infer import prompt_scores
from orogen.infer.budget import Markers, markers_of
from orogen.infer.exact import COMPILER_OPTIONS
from orogen.infer.forward import NONE, Caches, Exact, Forward, Report, Sampler, with_pages
from orogen.infer.knobs import Features
from orogen.infer.packing import unpack
from orogen.infer.request import MOST_LOGPROBS
from orogen.infer.state import State, carried, controlled, entered, history_for, no_entries, no_seats, no_state
from orogen.infer.stores import Stores
from orogen.model.stages import MOE
from orogen.parallel.axes import STREAM
from orogen.parallel.placement import jitted
from orogen.parallel.plan import Plan


class Emitted(NamedTuple):
    """What a call emitted: tokens (b,), or (b, steps, n + 1), with what was asked for of each; slots (b,) whose logits
    were no numbers or had no possible token; and how many drafts of each depth (b, n) were there to be kept, None
    without drafts."""

    report: Report
    bad_b: Array
    offered_bn: Array | None


class Held(NamedTuple):
    """What a call is given and gives back changed, in place: caches, and `State`."""

    caches: Caches
    state: State


@dataclasses.dataclass(frozen=True, eq=False)
class Programs(Stores):
    """The programs of one model on its plan. Each compiles once per shape and features.

    is_token_v: which rows of the vocabulary a tokenizer has. traces: how many programs of each kind were traced.
    """

    is_token_v: Any
    traces: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter, init=False)
    _tracing: threading.Lock = dataclasses.field(default_factory=threading.Lock, init=False)

    @functools.cached_property
    def markers(self) -> Markers:
        """Of thinking, for requests with a budget. Raises ConfigError if the tokenizer has none."""
        return markers_of(self.opened.tokenizer, self.opened.config.vocab_size)

    @functools.cached_property
    def everything(self) -> Features:
        """All that a request can ask of the model: text only where there is a tokenizer."""
        try:
            budgets = bool(self.markers)
        except ConfigError:  # a request for a budget is refused with this message
            budgets = False
        masks = self.opened.tokenizer is not None and importlib.util.find_spec("llguidance") is not None
        each = dict.fromkeys(("draws", "restricts", "penalties", "biases", "holds"), True)
        return Features(**each, masks=masks, budgets=budgets, logprobs=MOST_LOGPROBS)

    def state(self) -> State:
        """Of slots without requests."""
        size = self.opened.config.vocab_size
        return self.put(no_state(self.config.slots, self.everything, vocab_size=size, drafts=self.drafts))

    def put(self, tree: Any) -> Any:
        """Arrays over slots, laid on the devices."""
        return jax.device_put(tree, self.holding.sharding("batch"))

    def put_rows(self, tree: Any) -> Any:
        """Arrays over rows that are read, laid on the devices: every rank of `context` has all of them."""
        return jax.device_put(tree, self.plan.sharding("batch"))

    def read(self, held: Held, inputs: tuple[Any, ...]) -> tuple[Held, tuple[Emitted, Array | None]]:
        """Reads pieces of the prompts of some slots (r,). Returns what was emitted beside, one token of each row whose
        prompt ends, and hidden states, see `Read`.

        inputs: packed `Entries`; tokens (r, t) and pages of the pieces; `History` with counts and prompts alone; masks
        or None.
        """
        return self.reader(*self.read_inputs(held, inputs))

    def read_inputs(self, held: Held, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """What `reader` takes."""
        return held, self._weights, inputs

    def score(self, h_rtd: Array, next_rt: Any) -> Report:
        """What is reported of tokens (r, t) after the hidden states that a call of `read` gave."""
        return self.scorer(h_rtd, self._weights, next_rt)

    def score_inputs(self, rows: int, length: int) -> tuple[Any, ...]:
        """What `scorer` takes, for calls of this shape, with nothing to score."""
        shape = rows, length, self.opened.config.hidden_size
        dtype, sharding = jnp.dtype(self.config.compute_dtype), self.plan.sharding(*STREAM, None)
        h_rtd = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return h_rtd, self._weights, np.full((rows, length), NONE, np.int32)

    def decode(self, held: Held, inputs: tuple[Any, ...], *, features: Features, steps: int) -> tuple[Held, Emitted]:
        """Decodes for `steps` steps, or until no slot has tokens left. inputs: packed `Seats` of all slots, their page
        table, and masks or None. Returns what was emitted beside."""
        return self.decoder(features)(*self.decode_inputs(held, inputs, steps))

    def decode_inputs(self, held: Held, inputs: tuple[Any, ...], steps: int) -> tuple[Any, ...]:
        """What `decoder`'s program takes."""
        return held, self._weights, inputs, np.int32(steps)

    @functools.cached_property
    def _weights(self) -> list[Array]:
        """Parameters and buffers as a flat list: each call takes that apart in far less time than nested states."""
        return jax.tree.leaves((self.opened.params, self.opened.buffers))

    def take(self, opened: Opened) -> None:
        """Computes from now on with the weights of `opened`, which are laid out like those before; those go free."""
        object.__setattr__(self, "opened", opened)  # frozen for everybody else
        self.__dict__.pop("_weights", None)

    @functools.cached_property
    def decoder(self) -> Callable[[Features], Any]:
        """The jitted program of `decode`, by features; kept as long as this."""
        return functools.lru_cache(None)(self._decoding)

    @functools.cached_property
    def reader(self) -> Callable[..., Any]:
        """That of `read`, which can do everything: it chooses few tokens."""
        features, like = self.everything, no_entries(1, self.everything)

        def read(held, params, buffers, inputs):
            forward = self._forward(params, buffers, self.plan, features)
            (caches, state), (packed_rw, tokens_rt, table_rp, history, mask_rw) = self.plan.vary((held, inputs))
            entries = unpack(packed_rw, like)
            slot_r = entries.slot_r
            take = lambda a, _, lead: jnp.take(a, slot_r, axis=lead, mode="clip")  # noqa: E731
            put = lambda old, new, lead: old.at[(slice(None),) * lead + (slot_r,)].set(new, mode="drop")  # noqa: E731
            mine = self.of_rows(take, caches, caches)
            history = history._replace(number_b=jnp.zeros_like(slot_r), thought=entries.thought)
            sampler = Sampler(entries.knobs, history, mask_rw)
            found = forward.read(mine, entries.pieces(tokens_rt, table_rp), sampler)
            mine, history, report, drafts_rn, bad_r, h_rtd = found
            caches = self.of_rows(put, self.pooled(caches, mine), mine)
            entries = entries.of_share(self.plan.index("context"), len(state.token_b))
            state = entered(state, entries, report.token, drafts_rn, bad_r=bad_r, history=history)
            emitted = Emitted(report, bad_r, jnp.zeros_like(drafts_rn) if self.drafts else None)
            return self._given_back(caches, state), (self._agreed(self.plan.vary(emitted), self.plan), h_rtd)

        rows: Any = self.plan.spec("batch")
        return self._compiled(read, inputs=(rows,), emitted=(rows, self._stream))

    @functools.cached_property
    def scorer(self) -> Callable[..., Any]:
        """The jitted program of `score`, which is apart from `reader`: others need none of it."""

        def score(h_rtd, params, buffers, next_rt):
            inputs, is_token_v = self.plan.vary((h_rtd, next_rt)), jnp.asarray(self.is_token_v)
            report = prompt_scores.score(self.merged(params, buffers), self.plan, *inputs, is_token_v=is_token_v)
            return self._agreed(report, self.plan)

        rows: Any = self.plan.spec("batch")
        return self._laid(score, given=self._stream, inputs=(rows,), outputs=rows, donated=())

    @property
    def _stream(self) -> Any:
        return self.plan.spec(*STREAM, None)

    def _decoding(self, features: Features) -> Callable[..., Any]:
        like = no_seats(1, features)

        def decode(held, params, buffers, inputs, steps):
            plan = self._decode_plan()
            forward = self._forward(params, buffers, plan, features)
            (caches, state), (packed_bw, table_bp, mask_bw) = plan.vary((held, inputs))
            seats = unpack(packed_bw, like)
            control = controlled(state, seats, table_bp)
            sampler = Sampler(seats.knobs, history_for(state.history, features), mask_bw)
            alive = lambda control: plan.max(jnp.any(control.left_b > 0).astype(jnp.int32), "batch")  # noqa: E731

            def body(carry):
                step, _, (caches, history, control, report, bad_b, offered_bn) = carry
                offered_bn += control.offered_bn
                caches, history, control, now, bad_now_b = forward.step(
                    caches, control, sampler._replace(history=history)
                )
                report = jax.tree.map(lambda a, new: a.at[:, step].set(new), report, now)
                state = caches, history, control, report, bad_b | bad_now_b, offered_bn
                return step + 1, alive(control), plan.vary(state)

            slots = len(control.token_b)
            report = forward.blank((slots, self.config.steps, self.drafts + 1))
            told = report, jnp.zeros(slots, bool), jnp.zeros_like(control.drafts_bn)
            loop = with_pages(self.local(caches), table_bp), sampler.history, control, *told
            start = jnp.int32(0), alive(control), plan.vary(loop)
            goes_on = lambda carry: (carry[0] < steps) & (carry[1] > 0)  # noqa: E731
            _, _, (paged, history, after, report, bad_b, offered_bn) = lax.while_loop(goes_on, body, start)
            # Not with this call's tables, whose width would make the caches those of another program.
            state = carried(state, control, after, history)
            emitted = Emitted(report, bad_b, offered_bn if self.drafts else None)
            return self._given_back(self.with_local(caches, paged), state), self._agreed(emitted, self.holding)

        slots: Any = self.holding.spec("batch")
        return self._compiled(decode, inputs=(slots, self.plan.spec()), emitted=slots)

    def _compiled(self, program: Callable[..., Any], *, inputs: tuple[Any, ...], emitted: Any) -> Callable[..., Any]:
        """The program, jitted, of what is held, the list of weights, and inputs so laid out; what it emits, laid out so
        too, comes out beside what is held."""
        slots: Any = self.holding.spec("batch")  # of every array of a tree
        held = Held(self.layout.specs, slots)
        return self._laid(program, given=held, inputs=inputs, outputs=(held, emitted), donated=(0,))

    def _laid(
        self,
        program: Callable[..., Any],
        *,
        given: Any,
        inputs: tuple[Any, ...],
        outputs: Any,
        donated: tuple[int, ...],
    ) -> Callable[..., Any]:
        """The program, jitted, of what it is given, the list of weights, and inputs."""
        opened = self.opened
        model = self.plan.specs(opened.params), self.plan.specs(opened.buffers)
        nested = jax.tree.structure((opened.params, opened.buffers))

        def flat(given: Any, weights: list[Array], *rest: Any) -> Any:
            with self._tracing:  # several may compile at the same time
                self.traces[program.__name__] += 1
            return program(given, *jax.tree.unflatten(nested, weights), *rest)

        options = COMPILER_OPTIONS if self.config.exact else None
        laid = given, jax.tree.leaves(model), *inputs
        return jitted(flat, self.plan, inputs=laid, outputs=outputs, options=options, donated=donated)

    def _given_back(self, caches: Caches, state: State) -> Held:
        return Held(self.settled(caches), self._agreed(state, self.holding))

    def _forward(self, params: Any, buffers: Any, plan: Plan, features: Features) -> Forward:
        is_token_v = jnp.asarray(self.is_token_v)
        lookup = self.config.drafter == "lookup"
        exact = Exact(self.config.chunk, self.layout.leads.backbone) if self.config.exact else None
        model = self.merged(params, buffers)
        markers = self.markers if features.budgets else None
        told, config = self.config.report_experts, self.opened.config
        experts = (config.layers.main.count(MOE), config.num_experts_per_tok) if told else None
        return Forward(model, plan, self.drafts, lookup, exact, features, is_token_v, markers, experts)

    def _decode_plan(self) -> Plan:
        """Of decoding: rows are split, and products of experts are those for few rows."""
        if self.config.exact:  # the plan of reading: the same products
            return self.plan
        plan = self.holding.decoding()
        if plan.decode_kernels == "reference":
            blocks = plan.config.grouped_matmul == "blocks"
            few = dataclasses.replace(plan.config, grouped_matmul="small_blocks") if blocks else plan.config
            return dataclasses.replace(plan, config=few)
        # Norms of a few rows are part of what XLA fuses around them; a kernel for each takes longer than all of that.
        few = dataclasses.replace(plan.config, grouped_matmul="triton_small", rms_norm="plain")
        return dataclasses.replace(plan, config=few)

    def _agreed(self, tree: Any, plan: Plan) -> Any:
        """Arrays over the plan's batch that are equal on the ranks of other axes, as one."""

        def agree(a: Array) -> Array:
            if a.dtype == bool:
                return plan.agreed(a.astype(jnp.int8), "batch").astype(bool)
            return plan.agreed(a, "batch")

        return jax.tree.map(agree, tree)
