"""Loss and gradient of a model split into pipeline stages.

Letters: m microbatches, b batch, t time, k experts per token, r uses of MoE layers, e experts, p stages, v chunks per
stage.
"""

import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from orogen.config.model import ModelConfig
from orogen.data.packing import Batch
from orogen.model.block import Stack
from orogen.model.by_letter import ByLetter, add_rows, by_letter, joined, stacked
from orogen.model.lm import LanguageModel
from orogen.model.stages import MOE, Segment, Stages, add, take
from orogen.moe.layer import Choice, Replay
from orogen.parallel import placement
from orogen.parallel.pipeline import Program, run
from orogen.precision.policy import DTYPES, working_copy
from orogen.train.formats import counting
from orogen.train.loss import Assigned, Counts, Drops, Passed, Sums, drops, embed, map_moe, run_backbone, run_head
from orogen.train.task import Computation

# Slices of lists by stack: the backbone's entry, and those of the MTP block, one per depth.
_FIRST_AND_REST = slice(1), slice(1, None)


class Pipeline:
    """Runs the segments of a model that is split into stages over a batch (m, b, t), on one device of a plan, inside
    `Plan.run`.

    buffers: those of this device's stage. replay: choices to use in place of the routers' own, laid out by stage too.
    record: whether every token's choice is reported. assigned: the assignments of all microbatches (1, v, r, e), as the
    method `assigned` returns them, for balance over the global batch; None: they are not needed.
    """

    def __init__(
        self, stages: Stages, computation: Computation, batch: Batch, counts: Counts, buffers: Any, *,
        replay: Replay | None = None, record: bool = False, assigned: Array | None = None,
    ):  # fmt: skip
        self.stages = stages
        self.objective, self.config, self.plan, self.dtype = computation
        self.depths = self.objective.depths(self.config)
        self.batch, self.counts, self.buffers, self.replay, self.record = batch, counts, buffers, replay, record
        self.tally, self.known = False, assigned

    def gradients(self, params: Any) -> tuple[Array, Any, Sums]:
        """The loss, and the gradients and Sums of this device's stage; gradients are scattered if `fsdp` is
        `gradients`."""
        stored = jax.eval_shape(self._kept, params)
        zeros = self.plan.vary(jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.float32), stored))
        found = self._run(params, zeros)
        return found.loss, found.grads, self._sums(found.reports)

    def metrics(self, params: Any) -> Any:
        """The objective's sums, by forward passes alone."""
        return self._sums(self._run(params, None).reports).metrics

    def assigned(self, params: Any) -> Array:
        """The assignments per expert of each use of an MoE layer of this stage, by forward passes alone."""
        tallying = copy.copy(self)
        tallying.tally = True
        return tallying._run(params, None).reports["assigned"]

    def _run(self, params: Any, zeros: Any) -> Any:
        varied = working_copy(self.plan.vary(params), self.dtype)  # once per step, not once per tick
        size, length = self.batch.tokens_bt.shape[1:]
        shape = *self.plan.stream_shape(size, length), self.config.hidden_size
        schedule = self.plan.schedule
        assert schedule is not None, "a split model's plan has a schedule"
        return run(
            schedule if zeros is not None else schedule.forward_only(),
            [self._program(segment, varied) for segment in self.stages.kinds(self.plan.recipes)],
            self.stages.kind_vp(self.plan.recipes),
            params=varied,
            x=jnp.zeros(shape, DTYPES[self.dtype]),
            grads=zeros,
            reports=self._nothing(size, length // self.plan.size("tensor")),
            plan=self.plan,
        )

    def _program(self, segment: Segment, params: Any) -> Program:
        tied = self.config.tie_word_embeddings
        used = lambda name: segment.uses(name, tied=tied)  # noqa: E731
        graph = _graph(segment, self.config)

        def taken(chunk: Array) -> nnx.State:
            return take(params, segment, chunk)

        def forward(pieces: nnx.State, x_btd: Array, chunk: Array, microbatch: Array) -> tuple[Array, Array, Any]:
            others = nnx.State({name: part for name, part in taken(chunk).items() if not used(name)})
            pieces, probe_l = counting(pieces)
            whole = nnx.State({**others, **pieces})
            model = nnx.merge(graph, whole, take(self.buffers, segment, chunk))
            passed = self._pass(model, segment, x_btd, chunk, microbatch, probe_l=probe_l)
            y_btd = jnp.zeros_like(x_btd) if segment.last else passed.x_btd
            return y_btd, passed.loss, self._report(passed, segment)

        def give(total: Any, grads: Any, chunk: Array) -> Any:
            return add(total, self._kept(grads), segment, chunk)

        # Only the parts that the segment computes with are differentiated. The graph needs the others too: `forward`
        # adds them without a gradient.
        def pieces(params: Any, chunk: Array) -> nnx.State:
            return nnx.State({name: part for name, part in take(params, segment, chunk).items() if used(name)})

        return Program(take=pieces, forward=forward, give=give, note=self._note)

    def _pass(
        self, model: LanguageModel, segment: Segment, x_btd: Array, chunk: Array, microbatch: Array, *,
        probe_l: Array | None,
    ) -> Passed:  # fmt: skip
        batch = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, microbatch, keepdims=False), self.batch)
        replay = None if self.replay is None else self._replayed(segment, chunk, microbatch)
        known = None if self.known is None else self._known(segment, chunk)
        start = jnp.asarray(self.stages.start_vp, jnp.int32)[chunk, self.plan.index("stage")]
        layers = start, len(segment.pattern + segment.mtp)
        plan = self.plan.with_recipes(segment.recipes).on_tokens(batch.extras, probe_l).from_layer(*layers)
        common: Any = {"config": self.config, "plan": plan}
        if segment.first:
            x_btd = embed(model, batch, self.plan)
        first, rest = ({"replay": replay and replay[i], "assigned": known and known[i]} for i in _FIRST_AND_REST)
        passed = run_backbone(model, x_btd, batch, self.counts, **first, **common)
        if not segment.last:
            return passed
        return run_head(model, passed, batch, self.counts, objective=self.objective, **rest, **common)

    def _kept(self, grads: Any) -> Any:
        """The gradients of one microbatch, sharded as their sum over microbatches is kept."""
        return placement.scatter_gradients(grads, self.plan) if self.plan.config.fsdp == "gradients" else grads

    def _items(self, segment: Segment) -> list[Any]:
        """The stacks that the segment runs, in order: the MTP block's once per depth."""
        main, deeper = segment.items
        return [main] + [deeper] * (self.depths if segment.last else 0)

    def _report(self, passed: Passed, segment: Segment) -> dict[str, Any]:
        """What this segment's pass adds to the sums: among them loads (r, e) of its layers, and choices (r, b, t, …) of
        each use of a layer."""
        report = {"metrics": passed.metrics, "lost": drops(passed.stats, self.plan)}

        def of_layers(field: str) -> list[ByLetter]:
            """This field of the layers' statistics, per stack that ran."""
            pairs = zip(passed.stats, self._items(segment), strict=True)
            return [by_letter(map_moe(lambda s: getattr(s, field), stats), items) for stats, items in pairs]

        loads = of_layers("load")
        if MOE in segment.pattern + segment.mtp * (self.depths > 0):
            deeper = [jax.tree.map(lambda *parts: sum(parts), *loads[1:])] if loads[1:] else []
            report["load"] = self.plan.total(joined([loads[0], *deeper])[MOE])
            if self.record:
                report["choices"] = joined(of_layers("choice"))[MOE]
            if self.tally:
                report["assigned"] = self.plan.total(joined(of_layers("losses"))[MOE].balance.counts)
        return jax.lax.stop_gradient(report)

    def _note(self, total: dict[str, Any], report: dict[str, Any], chunk: Array, microbatch: Array) -> dict[str, Any]:
        summed = {name: jax.tree.map(jnp.add, total[name], report[name]) for name in ("metrics", "lost")}
        if "load" in report:
            summed["load"] = add_rows(total["load"], report["load"], chunk)
        if "assigned" in report:
            summed["assigned"] = add_rows(total["assigned"], report["assigned"], chunk)
        if "choices" in report:
            summed["choices"] = jax.tree.map(partial(_set, chunk, microbatch), total["choices"], report["choices"])
        return total | summed

    def _nothing(self, size: int, time: int) -> dict[str, Any]:
        """Reports of zeros. Loads are (1, v, r, e), choices (1, v, r, m, b, t, …)."""
        zero = jnp.zeros(())
        reports: dict[str, Any] = {
            "metrics": jax.tree.map(jnp.zeros_like, self.counts.metrics), "lost": Drops(zero, zero),
        }  # fmt: skip
        counted, used = (
            max(s.pattern.count(MOE) + times * s.mtp.count(MOE) for s in self.stages.segments)
            for times in (1, self.depths)
        )
        if counted:
            reports["load"] = jnp.zeros((1, self.stages.virtual, counted, self.config.n_routed_experts))
        if used and self.tally:
            reports["assigned"] = jnp.zeros((1, self.stages.virtual, used, self.config.n_routed_experts))
        if used and self.record:
            token = (1, self.stages.virtual, used, len(self.batch.tokens_bt), size, time)
            each = (*token, self.config.num_experts_per_tok)
            replay = Replay(jnp.zeros(each, jnp.int32), jnp.zeros(each, bool))
            reports["choices"] = Choice(replay, jnp.zeros(token), jnp.zeros(token, bool))
        return reports

    def _sums(self, reports: dict[str, Any]) -> Sums:
        metrics, (dropped, overflow) = (
            jax.tree.map(lambda x: self.plan.sum(x, "stage"), reports[name]) for name in ("metrics", "lost")
        )
        load = [reports["load"]] if "load" in reports else []
        return Sums(metrics, load, dropped, overflow, reports.get("choices", ()))

    def _replayed(self, segment: Segment, chunk: Array, microbatch: Array) -> tuple[Any, ...]:
        """The replay (b, t, k) of each layer, in trees like the statistics of each stack that the segment runs."""
        trees, start = [], 0
        for items in self._items(segment):
            count = _count(items)
            read = partial(_read, chunk, microbatch, start, count)
            trees.append(stacked({MOE: jax.tree.map(read, self.replay)} if count else {}, items))
            start += count
        return tuple(trees)

    def _known(self, segment: Segment, chunk: Array) -> Assigned:
        """The assignments of all microbatches, per layer of each stack that the segment runs."""
        stacks, start = [], 0
        for items in self._items(segment):
            count = _count(items)
            known: Any = self.known
            known_vre = lax.dynamic_index_in_dim(known[0], chunk, keepdims=False)[start : start + count]
            stacks.append(jax.tree.leaves(stacked({MOE: known_vre} if count else {}, items)))
            start += count
        return stacks


def _graph(segment: Segment, config: ModelConfig) -> nnx.GraphDef:
    """The static part of a model with only the segment's layers."""

    def make() -> LanguageModel:
        model = LanguageModel(config, nnx.Rngs(0))
        model.backbone = Stack(segment.items[0], config, nnx.Rngs(0))
        if not segment.last:
            model.mtp = None
        return model

    return nnx.split(jax.eval_shape(make))[0]


def _count(items: Any) -> int:
    """The number of MoE layers in a stack of these items."""
    return sum(item.count * _count(item.items) if not isinstance(item, str) else item == MOE for item in items)


def _set(chunk: Array, microbatch: Array, total: Array, used_r: Array) -> Array:
    """`total` (1, v, r, m, …) with the entries of one chunk and microbatch set to `used_r`."""
    zero = jnp.zeros_like(chunk)
    start = (zero, chunk, zero, microbatch) + (zero,) * (used_r.ndim - 1)
    return lax.dynamic_update_slice(total, used_r[None, None, :, None], start)


def _read(chunk: Array, microbatch: Array, start: int, count: int, replay: Array) -> Array:
    """(count, …): the entries of one chunk and microbatch of `replay` (1, v, r, m, …), from row `start` on."""
    zero = jnp.zeros_like(chunk)
    begin = (zero, chunk, zero + start, microbatch) + (zero,) * (replay.ndim - 4)
    size = (1, 1, count, 1, *replay.shape[4:])
    return lax.dynamic_slice(replay, begin, size)[0, 0, :, 0]
