"""What one layer, or another unit of a model on a plan, sends: the records of its collectives.

Convention: bytes are what one device sends. Over n ranks an all-gather of a piece s sends (n - 1) s; a reduce-scatter
of S sends (n - 1) S / n, an all-reduce twice that (a ring of both), an all-to-all (n - 1) S / n, and a shift s. A
ragged all-to-all counts all assignments that could leave and find room, spread evenly over the ranks. Activations and
the parameters of FSDP travel in the compute dtype, sums of gradients in float32.

Phases: forward, backward and, with remat, the part of the forward pass that the backward pass repeats (recompute)
happen once per microbatch and application of the layer; update happens once per step.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.remat import Remat
from orogen.cost.weight import Weight
from orogen.parallel.fold import expert_shards

# Units other than the letters of the pattern: embedding, final norm, head and loss, at every depth of prediction; the
# projection and norms of the multi-token-prediction block; and each expert's load, counted for the whole batch.
# PIPELINE is what stages send at every tick, in both directions, whether or not it is used.
# COUNTING is a pass that only counts assignments.
OUTER, MTP, LOAD, PIPELINE, COUNTING = "ends", "mtp", "load", "pipeline", "counting"
FLOAT32 = INT32 = 4
CONTEXT = ("context",)


class Workload(NamedTuple):
    """One microbatch on one device, before the sequence is split over `tensor`: sequences (rows), tokens per sequence,
    and bytes per number in the compute dtype. carried: whether its sequences continue the previous batch's states."""

    rows: int
    tokens: int
    itemsize: int = FLOAT32
    carried: bool = False


class Collective(NamedTuple):
    """`count` collectives over the ranks of all of `axes` together; one device sends `bytes` in all of them.

    part: what is moved; axes: names of parallel/fold.py, only those of size above one.
    """

    part: str
    phase: str
    operation: str
    axes: tuple[str, ...]
    count: float
    bytes: float


def sent_bytes(operation: str, held: float, ranks: int) -> float:
    """Bytes that one of `ranks` devices sends of an operand of `held` bytes per device."""
    share = (ranks - 1) / ranks
    factors = {
        "all-gather": ranks - 1,
        "reduce-scatter": share,
        "all-reduce": 2 * share,
        "all-to-all": share,
        "ragged-all-to-all": share,
        "collective-permute": 1,
    }
    return held * factors[operation]


class Ledger:
    """Collects the records of one layer."""

    def __init__(self, unit: str, plan: PlanConfig, model: ModelConfig, work: Workload):
        self.unit, self.plan, self.model, self.work = unit, plan, model, work
        self.records: list[Collective] = []
        self.remat = plan.layer_remat(unit) if unit not in (OUTER, MTP, LOAD, PIPELINE, COUNTING) else Remat("none")
        norm_groups = model.mamba_norm_groups or model.n_groups
        pieces = {"kv_heads": model.num_key_value_heads, "groups": model.n_groups, "norm_groups": norm_groups}
        # Neighbours hold copies of arrays that have fewer pieces than tensor has ranks.
        copies = {f"{name}_copies": plan.tensor // (n or plan.tensor) or 1 for name, n in pieces.items()}
        ranks, replicas = plan.data * plan.context, plan.expert * plan.expert_tensor
        fsdp = plan.fsdp_size or ranks
        expert_data, shards = (
            ranks * plan.tensor // replicas,
            expert_shards(fsdp, tensor=plan.tensor, expert=plan.expert, expert_tensor=plan.expert_tensor),
        )
        self.sizes = {
            "fsdp": fsdp,
            "fsdp_copies": ranks // fsdp,
            "expert_fsdp": shards,
            "expert_fsdp_copies": expert_data // shards,
            "stage": plan.stage,
            "data": plan.data,
            "context": plan.context,
            "tensor": plan.tensor,
            "expert_data": expert_data,
            "expert": plan.expert,
            "expert_tensor": plan.expert_tensor,
            **copies,
            **{name: plan.tensor // copies[f"{name}_copies"] for name in pieces},
        }

    def add(
        self,
        part: str,
        phase: str,
        operation: str,
        axes: Sequence[str],
        held: float,
        *,
        count: float = 1,
        needed: bool = True,
        name: str = "",
    ) -> None:
        """`count` collectives of operands of `held` bytes each; nothing over axes of size one.

        needed: whether a later gradient needs the result, so that recomputation repeats the collective unless the layer
        keeps the array `name`.
        """
        axes = tuple(axis for axis in axes if self.sizes[axis] > 1)
        if axes and held and count:
            size = count * sent_bytes(operation, held, self.ranks(axes))
            self.records.append(Collective(part, phase, operation, axes, count, size))
            recomputed = self.remat.kind != "none" and not (name and self.remat.keeps(name))
            if phase == "forward" and needed and recomputed:
                self.records.append(Collective(part, "recompute", operation, axes, count, size))

    def gather(
        self, part: str, axes: Sequence[str], held: float, *, gradient: bool = True, needed: bool = True, name: str = ""
    ) -> None:
        """An all-gather of pieces of `held` bytes, and its transpose. needed, name: see `add`, as everywhere below."""
        self.add(part, "forward", "all-gather", axes, held, needed=needed, name=name)
        if gradient:
            self.add(part, "backward", "reduce-scatter", axes, held * self.ranks(axes))

    def scatter(self, part: str, axes: Sequence[str], held: float, *, needed: bool = False, name: str = "") -> None:
        """A reduce-scatter of `held` bytes, and its transpose. It usually ends a layer, so no gradient needs it."""
        self.add(part, "forward", "reduce-scatter", axes, held, needed=needed, name=name)
        self.add(part, "backward", "all-gather", axes, held / self.ranks(axes))

    def shift(
        self,
        part: str,
        axes: Sequence[str],
        held: float,
        count: int,
        *,
        phase: str = "forward",
        gradient: bool = False,
        name: str = "",
    ) -> None:
        """Sends `count` arrays from each rank to another, as the plan does, and with `gradient` their gradients
        back."""
        operation, size = ("collective-permute", held)
        if self.plan.shift == "alltoall":
            operation, size = ("all-to-all", held * self.ranks(axes))
        self.add(part, phase, operation, axes, size, count=count, name=name)
        if gradient:
            self.add(part, "backward", operation, axes, size, count=count)

    def both(
        self, part: str, operation: str, axes: Sequence[str], held: float, count: int = 1, *, needed: bool = True,
        name: str = "",
    ) -> None:  # fmt: skip
        """A collective that is its own transpose."""
        self.add(part, "forward", operation, axes, held, count=count, needed=needed, name=name)
        self.add(part, "backward", operation, axes, held, count=count)

    def ranks(self, axes: Iterable[str]) -> int:
        """The number of ranks over `axes`."""
        return math.prod(self.sizes[axis] for axis in axes)

    def own(self, pieces: int, axis: str = "tensor") -> int:
        """How many of `pieces` heads, channels or groups this device has; at least one."""
        return pieces // self.ranks((axis,))

    @property
    def numbers(self) -> int:
        """Bytes of one number per token of a whole context rank, in the compute dtype."""
        return self.work.rows * self.work.tokens * self.work.itemsize

    @property
    def segments(self) -> int:
        """Bytes of the segment ids of a whole context rank."""
        return self.work.rows * self.work.tokens * INT32

    @property
    def stream(self) -> int:
        """Bytes of the residual stream of a whole context rank."""
        return self.work.rows * self.work.tokens * self.model.hidden_size * self.work.itemsize

    @property
    def own_stream(self) -> int:
        """Bytes of this device's part of the residual stream."""
        return self.stream if self.plan.stream == "whole" else self.stream // self.plan.tensor

    @property
    def own_tokens(self) -> int:
        """Tokens that this device routes."""
        return self.work.rows * self.work.tokens // self.plan.tensor

    @property
    def paired(self) -> bool:
        """Whether embedding and head are one array over the stages, so that a stage holds the one or the other."""
        return self.plan.stage > 1 and not self.model.tie_word_embeddings and not self.model.layers.mtp

    def gathered(self, weight: Weight) -> None:
        """FSDP: all-gathers the weight before its product, and sums and scatters its gradient after it."""
        axes = self.sharded(weight)
        if self.plan.fsdp == "parameters" and axes:
            piece = self.held(weight)
            itemsize = FLOAT32 if weight.float32 else self.work.itemsize
            self.add("weights", "forward", "all-gather", axes, piece * itemsize)
            if self.plan.stage > 1 and self.remat.kind == "none" and self.unit not in (OUTER, MTP):
                # A pipeline does not keep gathered weights from a microbatch's forward to its backward pass.
                self.add("weights", "recompute", "all-gather", axes, piece * itemsize)
            self.scattered("weights", "backward", axes, piece, itemsize)

    def summed(self, weights: Iterable[Weight]) -> None:
        """Sums each gradient over the devices that store the same piece of the parameter.

        If masters are sharded and parameters are not, working copies are all-gathered once per step, and gradients are
        scattered once per step (ZeRO-1) or once per microbatch (ZeRO-2).
        """
        for weight in weights if self.plan.fsdp in ("optimizer", "gradients") else ():
            axes, piece = self.sharded(weight), self.held(weight, stored=True)
            phase = "update" if self.plan.fsdp == "optimizer" else "backward"
            itemsize = FLOAT32 if weight.float32 else self.work.itemsize
            self.add("masters", "update", "all-gather", axes, piece * itemsize)
            # Those of several microbatches are summed first.
            summed = phase == "update" and (self.plan.microbatches > 1 or self.plan.stage > 1)
            self.scattered("gradients", phase, axes, piece, FLOAT32 if summed else itemsize)
        total: dict[tuple[str, ...], list[int]] = {}
        for weight in weights:
            total.setdefault(self._copies(weight), []).append(self.held(weight, stored=True) * FLOAT32)
        for axes, held in total.items():
            self.add("gradients", "update", "all-reduce", axes, sum(held) / len(held), count=len(held))

    def scattered(self, part: str, phase: str, axes: Sequence[str], piece: int, itemsize: int) -> None:
        """What `parallel.plan.scatter_sum` sends, for a rank's piece of so many numbers."""
        operation = "reduce-scatter" if itemsize == FLOAT32 else "all-to-all"
        self.add(part, phase, operation, axes, piece * self.ranks(axes) * itemsize)

    def sharded(self, weight: Weight) -> tuple[str, ...]:
        """The axes over which FSDP can shard the parameter."""
        dims = {"embed": ("fsdp",), "expert_embed": ("expert_fsdp",)}
        return next((dims[axis] for axis in weight.axes if axis in dims), ())

    def held(self, weight: Weight, *, stored: bool = False) -> int:
        """How many numbers of the parameter one device holds, inside the step or between steps."""
        ways = self.ranks(name for axis in weight.axes for name in SPLIT.get(axis or "", ()))
        splits = self.plan.fsdp != "none" if stored else self.plan.fsdp == "parameters"
        sharded = self.ranks(self.sharded(weight)) if splits else 1
        return math.prod(weight.shape) // (ways * sharded)

    def _copies(self, weight: Weight) -> tuple[str, ...]:
        """The axes over which the parameter is replicated."""
        split = {name for axis in weight.axes for name in SPLIT.get(axis or "", ())}
        sharded = self.plan.fsdp != "none" and self.sharded(weight)
        if "expert" in weight.axes:
            everywhere = ["expert_fsdp_copies" if sharded else "expert_data", "expert", "expert_tensor"]
        else:
            few = next((axis for axis in weight.axes if axis in ("kv_heads", "groups")), None)
            dense = ["fsdp_copies"] if sharded else ["data", "context"]
            everywhere = [*dense, f"{few}_copies" if few else "tensor"]
        if self.unit in (OUTER, MTP) and not ("vocab" in weight.axes and self.paired):
            everywhere.insert(0, "stage")
        return tuple(axis for axis in everywhere if axis not in split and self.sizes[axis] > 1)


# The logical axes of parameters that every plan splits, and the axes they are split over.
SPLIT = {
    **dict.fromkeys(("vocab", "heads", "mlp", "mamba_heads"), ("tensor",)),
    **{axis: (axis,) for axis in ("kv_heads", "groups", "expert")},
    "expert_mlp": ("expert_tensor",),
}
