"""What one device holds during a training step, stage by stage, from configs alone.

State is exact for this code; `orogen plan --memory` reads the same from shardings and compares it with the compiled
step. Letters: r rows of a letter in a chunk.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

from orogen.config.dtype import BYTES
from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.config.run import OptimizerConfig
from orogen.cost.dispatches import dispatch_of
from orogen.cost.kept import kept_bytes, named_bytes
from orogen.cost.kind import costs_of
from orogen.cost.ledger import FLOAT32, OUTER, Ledger, Workload
from orogen.cost.local import Local
from orogen.cost.weight import Weight
from orogen.cost.weights import Weights, weights
from orogen.simulate.pipeline import Flight
from orogen.simulate.prediction import MEMORY_PARTS, StageMemory

# Float32 copies of a block of logits that are live at once: logits, exponentials and their gradient.
LOGITS = 3
# In a layer's backward pass, the bytes of gradients that are live at once over those of its named arrays; and of all
# arrays together, if neither a GPU's kernel nor a product does its work, which then has arrays of its own.
GRADIENTS, WIDEST = 0.5, 2
# Buffers of rows that experts on other ranks have sent or are sent: both ends of an exchange, which waits for the
# layers beside it.
EXCHANGED = 2
# Of what one pass keeps, the share that lies beside the slots of a pipeline while it is copied into its own or out of
# it. Source of these: what XLA:GPU lays out for three small steps (experiments/predicted_and_measured) and allocated
# on one and two GPUs (experiments/two_gpus); the only step with a ragged dispatch took 29 % more than they say, most of
# it copies of zeros, which its exchange has since come to avoid.
COPIED = 0.5


class Moments(NamedTuple):
    """Bytes of the optimizer's state per parameter: of matrices, and of vectors and the vocabulary."""

    matrix: float
    other: float


def moments(optimizer: OptimizerConfig | None) -> Moments:
    """AdamW keeps two moments, Muon one per matrix. None: AdamW in float32."""
    each = BYTES[optimizer.moment_dtype] if optimizer else FLOAT32
    return Moments(each if optimizer and optimizer.name == "muon" else 2 * each, 2 * each)


def stage_memory(
    here: Local, optimizer: OptimizerConfig | None, patterns: Sequence[str], flight: Flight, *, alike: bool,
    outermost: bool = False,
) -> tuple[StageMemory, ...]:  # fmt: skip
    """What a device of each stage holds. patterns: the layers of each segment; flight: how many passes are in flight.
    outermost: of the first and the last stage alone.

    alike: whether all stages run one program, as in this code: each then holds as many rows of a letter as the fullest
    chunk, and as many slots as the fullest stage.
    """
    model, plan = here.model, here.plan
    found, held = weights(model, plan.vocab_rows(model.vocab_size)), _Held(here, moments(optimizer))
    layers = {letter: _layer_bytes(letter, here) for letter in found.layers}
    chunks = [*patterns[:-1], patterns[-1] + model.layers.mtp * model.mtp_depths]
    kept = [tuple(sum(layers[letter][i] for letter in chunk) for i in (0, 1)) for chunk in chunks]
    memory = []
    for stage in dict.fromkeys((0, plan.stage - 1)) if outermost else range(plan.stage):
        rows = _rows(patterns, stage, model, plan, alike)
        shared = [found.parts[name] for name in _outer(patterns, stage, model, plan, alike)]
        if model.layers.mtp and (alike or stage == plan.stage - 1):
            shared.append(found.mtp)
        held_here = [(n, held.of(found.layers[letter])) for letter, n in rows.items()]
        held_here += [(1, held.of(part)) for part in shared]
        parts = {part: float(sum(n * each.get(part, 0) for n, each in held_here)) for part in MEMORY_PARTS}
        parts["activations"], host = _activations(kept, stage, plan, flight, alike=alike)
        mine = "".join(chunks[stage :: plan.stage])
        exchanged = _exchanged(here) if "E" in (found.layers if alike else mine) else 0.0
        parts["temporary"], parts["workspace"] = _temporary(found, mine, stage, here, held, exchanged=exchanged)
        if plan.offload_optimizer:
            host, parts["optimizer"] = host + parts["optimizer"], 0.0
        memory.append(StageMemory(stage, parts, float(host)))
    return tuple(memory)


class _Held:
    """Bytes of parameters and of what belongs to them, on one device."""

    def __init__(self, here: Local, each: Moments):
        self.plan, self.itemsize, self.moments = here.plan, here.itemsize, each
        plan, work = here.plan, Workload(here.rows, here.tokens // here.rows, here.itemsize)
        self.ledger = Ledger(OUTER, plan, here.model, work)
        summed = plan.microbatches > 1 or plan.data * plan.context > 1
        self.gradient = FLOAT32 if summed else here.itemsize

    def of(self, each: Sequence[Weight]) -> dict[str, float]:
        """By part, the bytes of these parameters, their working copies, gradients and moments."""
        parts: dict[str, float] = collections.defaultdict(float)
        for weight in each:
            stored, inside = (self.ledger.held(weight, stored=s) for s in (True, False))
            matrix = len(weight.shape) > 1 and "vocab" not in weight.axes
            parts["parameters"] += FLOAT32 * stored
            parts["optimizer"] += stored * (self.moments.matrix if matrix else self.moments.other)
            if self.itemsize < FLOAT32 and not weight.float32:
                parts["working"] += self.itemsize * inside
            parts["gradients"] += self.gradient * (inside if self.plan.fsdp == "optimizer" else stored)
        return dict(parts)


def _rows(patterns: Sequence[str], stage: int, model: ModelConfig, plan: PlanConfig, alike: bool) -> dict[str, int]:
    """How many layers of each letter a stage holds, with room for those that another chunk has more of."""
    mtp = [*[""] * (len(patterns) - 1), model.layers.mtp]
    full = [pattern + block for pattern, block in zip(patterns, mtp, strict=True)]
    letters = dict.fromkeys("".join(full))
    if alike and plan.stage > 1:
        virtual = len(patterns) // plan.stage
        return {letter: virtual * max(chunk.count(letter) for chunk in full) for letter in letters}
    mine = "".join(full[stage :: plan.stage])
    return {letter: mine.count(letter) for letter in letters if letter in mine}


def _outer(patterns: Sequence[str], stage: int, model: ModelConfig, plan: PlanConfig, alike: bool) -> list[str]:
    """The parts besides layers that a stage holds."""
    tied, first, last = model.tie_word_embeddings, stage == 0, stage == plan.stage - 1
    norm = ["norm", *(["score"] if model.score_head else [])]
    seeing = ["resampler"] if "x" in model.layers.main else []
    if plan.stage == 1:
        return ["embedding", *norm, *([] if tied else ["head"]), *seeing]
    if alike:
        both = tied or bool(model.layers.mtp)
        return ["embedding", *norm, *(["head"] if both and not tied else []), *seeing]
    if "x" not in "".join(patterns[stage :: plan.stage]):
        seeing = []
    found = [*seeing, "embedding"] if first or (last and (tied or model.layers.mtp)) else seeing
    return [*found, *([*norm, *([] if tied else ["head"])] if last else [])]


def _layer_bytes(letter: str, here: Local) -> tuple[float, float]:
    kept, host = kept_bytes(letter, here)
    return sum(kept.values()), host


def _activations(
    kept: Sequence[tuple[float, ...]], stage: int, plan: PlanConfig, flight: Flight, *, alike: bool
) -> tuple[float, float]:
    """Bytes of the activations of all passes in flight on a stage's device, and on its host. kept: of each chunk."""
    if plan.stage == 1:
        return plan.overlapping * kept[0][0], plan.overlapping * kept[0][1]
    if alike:
        return max(device for device, _ in kept) * (max(flight.slots) + COPIED), 0.0
    # Each pair in flight holds one of the stage's chunks.
    mine = kept[stage :: plan.stage]
    device, host = (flight.in_flight[stage] * sum(chunk[i] for chunk in mine) / len(mine) for i in (0, 1))
    return device, host


def _exchanged(here: Local) -> float:
    """Rows on their way to or from experts."""
    plan = here.plan
    waits = plan.expert > 1 and dispatch_of(plan).exchanges
    return EXCHANGED * named_bytes("E", here)["rows"] if waits else 0.0


def _temporary(
    found: Weights, letters: str, stage: int, here: Local, held: _Held, *, exchanged: float
) -> tuple[float, float]:
    """The larger of the loss and of any layer's backward pass, and two layers' gathered parameters; and what cuDNN adds
    to that. exchanged: rows that wait beside a layer."""
    model, plan = here.model, here.plan
    arrays = {letter: _backward(letter, found, here, held, exchanged) for letter in set(letters)}
    tokens = here.tokens if plan.cross_entropy == "full" else min(here.tokens, plan.logit_rows)
    columns = plan.vocab_rows(model.vocab_size) // plan.tensor
    loss = LOGITS * tokens * columns * FLOAT32 if stage == plan.stage - 1 else 0.0
    gathered = 0.0
    if plan.fsdp == "parameters":
        whole = held.ledger.sizes["fsdp"], held.ledger.sizes["expert_fsdp"]
        gathered = 2 * max(
            (sum(_gathered(weight, held, whole) for weight in found.layers[letter]) for letter in set(letters)),
            default=0.0,
        )
    alone = max(*arrays.values(), loss, 0.0)
    working = max((size + costs_of(letter).workspace(here) for letter, size in arrays.items()), default=0.0)
    return alone + gathered, max(0.0, working - alone)


def _backward(letter: str, found: Weights, here: Local, held: _Held, exchanged: float) -> float:
    """What a layer recomputes, gradients of its arrays and of its weights, and the rows that are exchanged."""
    named, (kept, host) = named_bytes(letter, here), kept_bytes(letter, here)
    arrays = sum(named.values())
    if all(getattr(here.plan, field) != FOR_GPU[field] for field in costs_of(letter).kernels):
        return WIDEST * arrays
    recomputed = max(0.0, arrays - sum(kept.values()) - host)
    own = sum(FLOAT32 * held.ledger.held(weight) for weight in found.layers[letter])
    return recomputed + GRADIENTS * arrays + own + exchanged


def _gathered(weight: Weight, held: _Held, whole: tuple[int, int]) -> float:
    axes = held.ledger.sharded(weight)
    ways = held.ledger.ranks(axes) if axes else 1
    return held.ledger.held(weight) * ways * (FLOAT32 if weight.float32 else held.itemsize)
