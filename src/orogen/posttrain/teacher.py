"""A teacher: a frozen model on the devices of its student's run, under a plan of its own.

The teacher's pass is a program of its own. It leaves final hidden states, from which the student's step computes the
teacher's logits where it needs them, some tokens at a time: logits of a whole batch never exist. The student's plan
holds the teacher's head for that. With top_k, the pass leaves the most likely tokens instead.
Letters: b batch, t time, e teacher's model, v vocabulary, k most likely tokens.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from orogen.checkpoint.folders import Folder
from orogen.checkpoint.open import Opened, read_model
from orogen.config.checks import ConfigError, require
from orogen.config.distill import DistillConfig
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.run import RunConfig
from orogen.config.text import model_text
from orogen.data.packing import Batch
from orogen.kernels.divergence import Hidden, Likely
from orogen.layers.documents import Documents
from orogen.layers.linear import head_matrix
from orogen.model.heads import most_likely
from orogen.model.streams import streams, watching
from orogen.model.vocabulary import resized
from orogen.parallel import distributed, placement
from orogen.parallel.axes import STREAM
from orogen.parallel.context import zigzag
from orogen.parallel.plan import Plan
from orogen.posttrain import states
from orogen.train.step import BATCH_AXES, batch_to_devices

# Names in `Batch.extras`: (b, t, e) in the compute dtype; (b, t, k) int32 and float32.
HIDDEN, IDS, LOG = "teacher_hidden", "teacher_ids", "teacher_log"
HEAD = "head"


def teacher_plan(config: RunConfig, distill: DistillConfig) -> PlanConfig:
    """The plan of the teacher's pass. Raises ConfigError if it is not on the run's devices, or does not suit its
    batches."""
    train, plan, given = config.train, config.plan, distill.teacher_plan
    if given is None:
        own = {"stage": 1, "data": plan.data * plan.stage, "schedule": "1f1b", "virtual": None}
        rows = train.batch_size // (plan.data * plan.microbatches)  # that the student's devices take at a time
        shared = -(-train.batch_size // own["data"])
        own |= {"microbatches": shared // rows if shared % rows == 0 else 1}
        own |= {"fsdp": "parameters"} if plan.stage > 1 else {}  # no device has room for all layers
        given = dataclasses.replace(plan.dropping_none(), **own)
    require(given.stage == 1, given, "stage", "1 for a teacher, whose pass is not split into stages")
    devices = given.devices
    if devices != plan.devices:
        raise ConfigError(f"DistillConfig.teacher_plan has {devices} devices; expected the run's {plan.devices}")
    for one in config.stretches():
        parts = given.data * given.microbatches
        if one.batch_size % parts:
            expected = f"a multiple of the teacher's data x microbatches = {given.data} x {given.microbatches}"
            raise ConfigError(
                f"TrainConfig.batch_size is {one.batch_size}; expected {expected}, or another teacher_plan"
            )
    return dataclasses.replace(given.dropping_none(), remat="none", offload=(), offload_optimizer=False, linear="plain")


def require_same_vocabulary(teacher: ModelConfig, student: ModelConfig) -> None:
    """Raises ConfigError unless both have as many tokens."""
    expected = f"{teacher.vocab_size}, the teacher's: the divergence compares the models token by token"
    require(student.vocab_size == teacher.vocab_size, student, "vocab_size", expected)


class Teacher:
    """A `FrozenModel`. top_k: how many of its most likely tokens it gives; None: its hidden states."""

    def __init__(self, folder: Folder, config: RunConfig, plan: Plan, *, top_k: int | None):
        distill = config.need("distill").distill
        require_same_vocabulary(folder.config, config.model)
        opened = _opened(folder, config, distill)
        self._student_plan, self._teacher_plan, self._top_k = plan, opened.plan, top_k
        self._watched = tuple(number for _, number in distill.state_pairs)
        self._channels = states.channels_of(distill, folder.config, config.model) if distill.states else None
        place = jax.jit(placement.working, static_argnums=1)
        self._state = place(opened.params, opened.plan), opened.buffers
        self.fingerprint = _fingerprint(opened)
        self.variables = None if top_k is not None else {HEAD: _head(opened, plan)}
        self._run = distributed.compiled_together(self._program(opened))

    def extras(self, batch: Batch) -> dict[str, Array]:
        """What it says of each token, placed as the run's batches. batch: on the host, of the run's shape."""
        placed = batch_to_devices(batch._replace(extras={}), self._teacher_plan)
        return jax.device_put(self._run(*self._state, placed), self._student_plan.sharding(*BATCH_AXES))

    def _program(self, opened: Opened) -> Callable[..., dict[str, Array]]:
        plan, parts = self._teacher_plan, self._teacher_plan.config.microbatches
        main, watched = opened.config.layers.main, self._watched
        axes = {states.name(number): STREAM for number in range(len(watched))} | {HIDDEN: STREAM}
        if self._top_k is not None:
            axes = {**axes, IDS: BATCH_AXES, LOG: BATCH_AXES}
            del axes[HIDDEN]

        def of_part(model: Any, part: Batch) -> dict[str, Array]:
            docs = Documents(part.segments_bt, part.positions_bt)
            h_bte, kept = model.hidden(part.tokens_bt, docs, plan, watching(main, watched))
            found = {states.name(n): self._seen(x_bte) for n, x_bte in enumerate(streams(main, kept, watched))}
            if self._top_k is None:
                return found | {HIDDEN: h_bte}
            return found | dict(zip((IDS, LOG), most_likely(h_bte, model, self._top_k, plan), strict=True))

        def on_device(params: Any, buffers: Any, batch: Batch) -> dict[str, Array]:
            model = nnx.merge(opened.built.graph, params, buffers)
            if parts == 1:
                return of_part(model, batch)
            split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
            found = lax.map(lambda part: of_part(model, part), split)
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

        specs = plan.specs(opened.built.params), plan.specs(opened.built.buffers), plan.spec(*BATCH_AXES)
        on_devices = plan.run(on_device, inputs=specs, outputs={name: plan.spec(*axes[name]) for name in axes})

        def run(params: Any, buffers: Any, batch: Batch) -> dict[str, Array]:
            found = on_devices(params, buffers, batch)
            return {name: _reordered(x, plan, self._student_plan) for name, x in found.items()}

        return jax.jit(run, out_shardings=plan.sharding(*BATCH_AXES), compiler_options=plan.compiler_options)

    def _seen(self, x_bte: Array) -> Array:
        """The channels of a stream that the student's is compared with."""
        return x_bte if self._channels is None else jnp.take(x_bte, self._channels, axis=-1)


def fingerprint_of(folder: Folder, config: RunConfig) -> str:
    """The fingerprint of a teacher that is read for this alone."""
    return _fingerprint(_opened(folder, config, config.need("distill").distill))


def _opened(folder: Folder, config: RunConfig, distill: DistillConfig) -> Opened:
    return read_model(folder, teacher_plan(config, distill), config.train.compute_dtype, tokenizer=False)


def knowledge(batch: Batch, frozen: Any, plan: Plan) -> Hidden | Likely:
    """What the objective knows of the teacher, of this device's tokens: from `Batch.extras`, whichever are there."""
    flat = lambda name: batch.extras[name].reshape(-1, batch.extras[name].shape[-1])  # noqa: E731
    if HIDDEN in batch.extras:
        return Hidden(flat(HIDDEN), head_matrix(frozen[HEAD], frozen[HEAD], plan))
    return Likely(flat(IDS), flat(LOG).astype(jnp.float32))


def _reordered(x_bt: Array, here: Plan, there: Plan) -> Array:
    """The tokens of each row in the order of the other plan's context ranks."""
    if here.size("context") == there.size("context"):
        return x_bt
    length = x_bt.shape[1]
    place_t = np.argsort(zigzag(length, here.size("context")))[zigzag(length, there.size("context"))]
    return jnp.take(x_bt, place_t, axis=1)


def _head(opened: Opened, plan: Plan) -> nnx.Variable:
    """The teacher's head (e, v) on the student's plan, with as many rows of the vocabulary as the student's."""
    tied = opened.config.tie_word_embeddings
    weight: Any = opened.params["embedding" if tied else "head"]["weight"]
    head = nnx.Param(weight[...].T if tied else weight[...], axes=("embed", "vocab"))
    rows = plan.config.vocab_rows(opened.config.vocab_size)
    if head[...].shape[1] != rows:  # laid out whole first: other rows need not divide by the ranks here
        head = head.replace(jax.device_put(head[...], plan.sharding("embed", None)))
        head = jax.jit(resized, static_argnums=1)(head, rows)
    return head.replace(jax.device_put(head[...], plan.sharding("embed", "vocab")))


def _fingerprint(opened: Opened) -> str:
    """What tells this teacher from others: its config, and of each parameter and buffer the sum of the bits that its
    numbers have in bfloat16.

    These integers are the same under every plan, in any order of summation and with rows of zeros that pad the
    vocabulary, and in every dtype that a teacher is read in.
    """

    def sums(trees: Any) -> Array:
        bits = lambda x: lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)  # noqa: E731
        return jnp.stack([jnp.sum(bits(leaf), dtype=jnp.uint32) for leaf in jax.tree.leaves(trees)])

    found = jax.jit(sums, out_shardings=opened.plan.sharding())((opened.params, opened.buffers))
    return hashlib.sha256(model_text(opened.config).encode() + np.asarray(found, "<u4").tobytes()).hexdigest()
