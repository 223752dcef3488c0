"""Held-out loss during and after training. Letters: b batch, t time."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array

from orogen.config.model import ModelConfig
from orogen.config.run import RunConfig
from orogen.data.batches import HeldoutPass
from orogen.data.loader import Corpus
from orogen.data.packing import Batch, prefix_byte_count, target_byte_count
from orogen.model.lm import Built
from orogen.parallel import distributed, placement
from orogen.parallel.plan import Plan, make_plan
from orogen.precision.words import step_key
from orogen.train.formats import in_formats, is_switched, with_numbers
from orogen.train.loss import batch_counts
from orogen.train.next_token import LOSS, NEXT_TOKEN
from orogen.train.state import TrainState
from orogen.train.step import BATCH_AXES, batch_to_devices, microbatches, skeleton
from orogen.train.task import Computation, Metric, Objective


class Score(NamedTuple):
    """Loss in nats per token, and in bits per byte of the text that the tokens encode."""

    loss: float
    bits_per_byte: float


class Totals(NamedTuple):
    """Nats of all targets, the number of targets, and the bytes of text that they encode."""

    nats: float
    count: float
    n_bytes: int

    @property
    def score(self) -> Score:
        """The mean loss."""
        return Score(self.nats / max(self.count, 1), self.nats / math.log(2) / max(self.n_bytes, 1))


SCORES = "heldout_loss", "heldout_bits_per_byte"


class Heldout:
    """Scores the held-out split: a fixed, evenly spaced sample of its sequences, or all of it. With several sources,
    each is also scored by itself (`heldout_loss/NAME`), and the sample has about equally many sequences of each.

    Experts drop no token here, whatever capacity the run trains with.
    """

    def __init__(self, config: RunConfig, built: Built, corpus: Corpus):
        self.train, self.precision, self.corpus = config.train, config.precision, corpus
        self.progress: Callable[[], None] = lambda: None
        self.plan = heldout_plan(config)
        shape = {"batch_size": config.train.batch_size, "sequence_length": config.train.sequence_length}
        self.passes = {
            name: corpus.heldout_batches("heldout", source=name, **shape)
            for name, source in corpus.sources.items()
            if len(source.splits["heldout"])
        }
        several = len(corpus.sources) > 1
        of_source = tuple(f"{score}/{name}" for name in self.passes for score in SCORES) if several else ()
        self.sampled = (*SCORES, *of_source)
        self.whole = tuple(f"whole_{name}" for name in self.sampled)
        self._samples: dict[str, tuple[list[Batch], int]] = {}
        self._measured: list[Callable[..., dict[str, Metric]]] = []
        for switched in (False, True) if config.precision.switch_step is not None else (False,):
            plan = in_formats(self.plan, config.precision, config.model, switched=switched)
            measured = measure(built, NEXT_TOKEN, config.model, plan, config.train.compute_dtype)
            self._measured.append(distributed.compiled_together(measured))

    def sample(self, state: TrainState) -> dict[str, float]:
        """The scores of a sample of about `evaluate_rows` sequences."""
        return self._named(self.sampled, [self.totals(state, *one) for one in self._drawn().values()])

    def sample_batches(self) -> list[Batch]:
        """The batches of that sample."""
        return [batch for batches, _ in self._drawn().values() for batch in batches]

    def _drawn(self) -> dict[str, tuple[list[Batch], int]]:
        """By source, the sample's batches and the bytes that their targets encode."""
        if not self._samples:
            rows = math.ceil(self.train.evaluate_rows / len(self.passes))
            self._samples = {name: self._sample(one, rows) for name, one in self.passes.items()}
        return self._samples

    def full(self, state: TrainState) -> dict[str, float]:
        """The scores of the whole split."""
        return self._named(self.whole, [self.totals(state, one, one.byte_count) for one in self.passes.values()])

    def _sample(self, heldout: HeldoutPass, rows: int) -> tuple[list[Batch], int]:
        """About `rows` sequences, evenly spread over the pass, and the bytes that their targets encode."""
        first, *others = heldout.thinned(rows)
        whole = first.map(lambda *parts: np.concatenate(parts), *others)
        kept = int((whole.segments_bt != 0).any(1).sum())
        size = self.train.batch_size
        wanted = math.ceil(min(rows, kept) / size) * size
        chosen = np.arange(wanted) * kept // wanted if wanted <= kept else np.arange(wanted) % len(whole.tokens_bt)
        batches = [whole.map(lambda x, i=i: x[chosen[i : i + size]]) for i in range(0, wanted, size)]
        tokenizer = self.corpus.tokenizer
        lengths = (target_byte_count(b, tokenizer.byte_length_v) - prefix_byte_count(b, tokenizer) for b in batches)
        return batches, sum(lengths)

    def _named(self, names: Sequence[str], totals: Sequence[Totals]) -> dict[str, float]:
        """The scores of all sources together, then, with several, those of each."""
        of_all = Totals(*(sum(column) for column in zip(*totals, strict=True)))
        scores = [of_all.score, *(one.score for one in totals)] if len(names) > len(SCORES) else [of_all.score]
        return dict(zip(names, itertools.chain.from_iterable(scores), strict=True))

    def score(self, state: TrainState, batches: Iterable[Batch], n_bytes: int) -> Score:
        """The scores of the batches, whose targets encode `n_bytes` bytes of text."""
        return self.totals(state, batches, n_bytes).score

    def totals(self, state: TrainState, batches: Iterable[Batch], n_bytes: int) -> Totals:
        """`score`, as sums."""
        params = jax.jit(placement.working, static_argnums=1)(state.params, self.plan)
        measured = self._measured[is_switched(self.precision, int(state.step))]
        nats = count = 0.0
        for batch in batches:
            # Fetched one by one: with many programs over simulated devices in flight, XLA:CPU runs out of threads, and
            # its collectives deadlock (observed with jax 0.10.1).
            found = jax.device_get(measured(params, state.buffers, batch_to_devices(batch, self.plan)))[LOSS]
            nats, count = nats + float(found.sum), count + float(found.count)
            self.progress()
        return Totals(nats, count, n_bytes)


def heldout_plan(config: RunConfig) -> Plan:
    """The run's plan for evaluation."""
    plan = make_plan(config.plan.evaluating(), config.model)
    return dataclasses.replace(plan, nested=config.elastic is not None)


def measure(
    built: Built, objective: Objective, config: ModelConfig, plan: Plan, dtype: str, *, frozen: Any = None
) -> Callable[..., dict[str, Metric]]:
    """The jitted function (parameters from `placement.working`, buffers, batch[, frozen]) -> the objective's metrics,
    computed by forward passes alone. frozen: the variables of the task's frozen model, which may be abstract."""

    def metrics(params: nnx.State, buffers: nnx.State, batch: Batch, key: Array, known: Any) -> dict[str, Metric]:
        here = plan.in_step(key, batch.tokens_bt)
        counts = batch_counts(batch, objective, objective.depths(config), plan)
        parts = jax.tree.map(lambda x: microbatches(x, plan.config.microbatches, plan.sources[0]), batch)
        computation = Computation(objective.knowing(known), config, here, dtype)
        found = skeleton(built)(computation, parts, counts, buffers).metrics(params)
        return {name: Metric(total, counts.metrics[name]) for name, total in found.items()}

    model = plan.specs(built.params), plan.specs(built.buffers)
    inputs = (*model, plan.spec(*BATCH_AXES), plan.spec(), plan.specs(frozen))
    on_devices = plan.run(metrics, inputs=inputs, outputs=plan.spec())

    def measured(params: nnx.State, buffers: nnx.State, batch: Batch, frozen: Any = None) -> dict[str, Metric]:
        return on_devices(params, buffers, with_numbers(batch, plan), step_key(0, 0), frozen)

    return jax.jit(measured, compiler_options=plan.compiler_options)


def at_work(params: Any, plan: Plan) -> Any:
    """Parameters, given as they are stored between steps, in the shardings inside a step. Returns the same arrays if
    both shardings are equal, since a copy may not fit into memory."""
    return params if plan.storage == plan.rules else _gathered(params, plan)


_gathered = jax.jit(placement.working, static_argnums=1)
