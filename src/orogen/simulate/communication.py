"""Analytic costs of a plan's collectives: for each layer, the operations over each axis and the bytes that they send.

Convention: bytes are what one device sends. Over n ranks an all-gather of a piece s sends (n - 1) s; a reduce-scatter
of S sends (n - 1) S / n, an all-reduce twice that (a ring of both), an all-to-all (n - 1) S / n, and a shift s. A
ragged all-to-all counts all rows that could leave and find room, spread evenly over the ranks. Activations and the
parameters of FSDP travel in the compute dtype, sums of gradients in float32. No jax here.

Phases: forward, backward and, with remat, the part of the forward pass that the backward pass repeats (recompute)
happen once per microbatch and application of the layer; update happens once per step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.remat import Remat
from orogen.parallel.fold import expert_shards
from orogen.parallel.schedule import plan_schedule
from orogen.simulate.weights import Weight, end_weights, layer_weights, mtp_weights

# Units beside the letters of the pattern: embedding, final norm, head and loss, at every depth of prediction; the
# projection and norms of the multi-token-prediction block; and each expert's load, counted for the whole batch.
# PIPELINE is what stages send at every tick, in both directions, whether or not it is used.
# COUNTING is a pass that only counts assignments.
ENDS, MTP, LOAD, PIPELINE, COUNTING = "ends", "mtp", "load", "pipeline", "counting"
FLOAT32 = INT32 = 4
CONTEXT = ("context",)


class Workload(NamedTuple):
    """One microbatch on one device before the sequence is split over `tensor`: rows, tokens per row, and bytes per
    number in the compute dtype."""

    rows: int
    tokens: int
    itemsize: int = FLOAT32


class Collective(NamedTuple):
    """`count` collectives over the ranks of all of `axes` together, with which one device sends `bytes` in all.

    part: what is moved; axes: names of parallel/fold.py, only those above size one.
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


def unit_collectives(unit: str, model: ModelConfig, plan: PlanConfig, work: Workload) -> list[Collective]:
    """The collectives of one layer of a letter, or of the model's ENDS, MTP or LOAD."""
    ledger, weights = _Ledger(unit, plan, model, work), []
    if unit == LOAD:
        _load(ledger)
    elif unit == PIPELINE:
        held = ledger.own_tokens * model.hidden_size * work.itemsize
        ledger.add("stream", "forward", "collective-permute", ("stage",), held, 2 * plan_schedule(plan, model).ticks)
    elif unit == MTP:
        weights = mtp_weights(model)
    elif unit == ENDS:
        _ends(ledger)
        weights = end_weights(model, plan.vocab_rows(model.vocab_size))
        again = weights * model.mtp_depths + weights[:1] * (1 + model.mtp_depths) * model.tie_word_embeddings
        for weight in again:  # a tied matrix is embedding and head
            ledger.gathered(weight)
    else:
        LAYER_COLLECTIVES[unit](ledger)
        weights = layer_weights(unit, model)
    for weight in weights:
        ledger.gathered(weight)
    ledger.summed(weights[:-1] if unit == ENDS and ledger.paired else weights)
    return ledger.records


def step_collectives(model: ModelConfig, plan: PlanConfig, work: Workload) -> dict[str, list[Collective]]:
    """{unit: the collectives of all its applications in one step}, `work` being one of the plan's microbatches.

    For a pipeline these are the average stage's, so counts may be fractions. The multi-token-prediction block is
    applied once per depth, and sums its gradients once. Layers that the model's stack repeats in a loop share one
    collective for their counts: the program then has fewer collectives than this table, of the same bytes.
    """
    pattern, depths = model.layers, model.mtp_depths
    units = [*dict.fromkeys(pattern.main + pattern.mtp), *([MTP] if depths else []), ENDS, LOAD]
    found = {}
    for unit in units:
        main, deeper = pattern.main.count(unit), pattern.mtp.count(unit)
        if unit in (ENDS, MTP, LOAD):
            main, deeper = int(unit != MTP), int(unit == MTP)
        turns = (main + depths * deeper) * plan.microbatches / plan.stage
        records = unit_collectives(unit, model, plan, work)
        # Units that are no layers are on every stage.
        updates = (main + deeper) / (1 if unit in (ENDS, MTP) else plan.stage)
        found[unit] = [_times(r, updates if r.phase == "update" else turns) for r in records]
    if plan.stage > 1:
        found[PIPELINE] = unit_collectives(PIPELINE, model, plan, work)
    if model.router_balance == "global" and model.router_aux_loss_coef > 0 and plan.microbatches > 1 and "E" in units:
        found[COUNTING] = _counting(model, plan, work, found)
    return found


def _counting(
    model: ModelConfig, plan: PlanConfig, work: Workload, step: dict[str, list[Collective]]
) -> list[Collective]:
    """The collectives of the pass over all microbatches that counts assignments, where routers are balanced over the
    global batch: the forward collectives of `step` without those that only losses need. A pipeline's pass has these
    too."""
    ledger = _Ledger(COUNTING, plan, model, work)
    uses = model.layers.main.count("E") + model.mtp_depths * model.layers.mtp.count("E")
    everywhere = ("data", "context", "tensor")
    ledger.add("assignments", "forward", "all-reduce", everywhere, model.n_routed_experts * FLOAT32)
    turns = plan.microbatches / plan.stage
    records = [_times(r, uses * turns) for r in ledger.records]
    forward = [(unit, r) for unit, found in step.items() for r in found if r.phase == "forward" and unit != LOAD]
    if plan.stage > 1:
        ticks = plan_schedule(plan, model)
        share = ticks.forward_only().ticks / ticks.ticks
        return records + [_times(r, share if unit == PIPELINE else 1) for unit, r in forward]
    records += [r for unit, r in forward if unit != ENDS and r.part != "router statistics"]
    ends = _Ledger(ENDS, plan, model, work)
    matrix, *others = end_weights(model, plan.vocab_rows(model.vocab_size))
    for depth in range(1 + model.mtp_depths):
        _embedded(ends, depth)
        for weight in [matrix, *(w for w in others if "positions" in w.axes)]:
            ends.gathered(weight)
    return records + [_times(r, turns) for r in ends.records if r.phase == "forward"]


def describe_collectives(model: ModelConfig, plan: PlanConfig, work: Workload) -> dict[str, Any]:
    """The records of one application of each unit, and the bytes that a step sends in all, by axes."""
    step: dict[str, float] = {}
    found = step_collectives(model, plan, work)
    for record in (record for records in found.values() for record in records):
        axes = " x ".join(record.axes)
        step[axes] = step.get(axes, 0) + record.bytes
    units = {u: [r._asdict() for r in unit_collectives(u, model, plan, work)] for u in found if u != COUNTING}
    return {**work._asdict(), "units": units, "step_bytes": step}


def collective_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `describe_collectives` for a person: one line per part of a unit, operation and axes."""
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    for unit, records in facts["units"].items():
        for r in records:
            key = unit, r["part"], r["operation"], " x ".join(r["axes"])
            sent = rows.setdefault(key, dict.fromkeys(("forward", "recompute", "backward", "update"), 0))
            sent[r["phase"]] += r["bytes"]
    lines = [
        f"bytes that one device sends for {facts['rows']} rows of {facts['tokens']} tokens, per microbatch and layer:",
        f"{'':5} {'':18} {'':18} {'':28} {'forward':>9} {'recompute':>9} {'backward':>9} {'update':>9}",
    ]
    for (unit, part, operation, axes), sent in rows.items():
        numbers = " ".join(f"{_short(n):>9}" for n in sent.values())
        lines.append(f"{unit:5} {part:18} {operation:18} {axes:28} {numbers}")
    total = ", ".join(f"{axes} {_short(size)}" for axes, size in facts["step_bytes"].items())
    return [*lines, f"per step, over {total}" if total else "nothing is sent: one device"]


def _short(size: float) -> str:
    """Bytes to three digits, `-` for none."""
    if not size:
        return "-"
    power = min(max(int(math.log(size, 1000)), 0), 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _times(record: Collective, turns: float) -> Collective:
    return record._replace(count=record.count * turns, bytes=record.bytes * turns)


class _Ledger:
    """Collects the records of one layer."""

    def __init__(self, unit: str, plan: PlanConfig, model: ModelConfig, work: Workload):
        self.unit, self.plan, self.model, self.work = unit, plan, model, work
        self.records: list[Collective] = []
        self.remat = plan.layer_remat(unit) if unit not in (ENDS, MTP, LOAD, PIPELINE, COUNTING) else Remat("none")
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
        count: int = 1,
        *,
        needed: bool = True,
        name: str = "",
    ) -> None:
        """`count` collectives of operands of `held` bytes each; nothing over axes of size one.

        needed: by the gradient of what follows, so that recomputation repeats it, unless the layer keeps `name`.
        """
        axes = tuple(axis for axis in axes if self.sizes[axis] > 1)
        if axes and held and count:
            size = count * sent_bytes(operation, held, self.ranks(axes))
            self.records.append(Collective(part, phase, operation, axes, count, size))
            again = self.remat.kind != "none" and not (name and self.remat.keeps(name))
            if phase == "forward" and needed and again:
                self.records.append(Collective(part, "recompute", operation, axes, count, size))

    def gather(self, part: str, axes: Sequence[str], held: float, *, gradient: bool = True, name: str = "") -> None:
        """An all-gather of pieces of `held` bytes, and its transpose. name: see `add`, as everywhere below."""
        self.add(part, "forward", "all-gather", axes, held, name=name)
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
        """`count` arrays from each rank to another, as the plan sends them, and with `gradient` their gradients
        back."""
        operation, size = ("collective-permute", held)
        if self.plan.shift == "alltoall":
            operation, size = ("all-to-all", held * self.ranks(axes))
        self.add(part, phase, operation, axes, size, count, name=name)
        if gradient:
            self.add(part, "backward", operation, axes, size, count)

    def both(
        self, part: str, operation: str, axes: Sequence[str], held: float, count: int = 1, *, name: str = ""
    ) -> None:
        """A collective that is its own transpose."""
        self.add(part, "forward", operation, axes, held, count, name=name)
        self.add(part, "backward", operation, axes, held, count)

    def ranks(self, axes: Iterable[str]) -> int:
        """Devices over which `axes` split."""
        return math.prod(self.sizes[axis] for axis in axes)

    def own(self, pieces: int, axis: str = "tensor") -> int:
        """How many of the heads, channels or groups this device has; at least one."""
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
    def own_tokens(self) -> int:
        """Tokens of this device's piece of the sequence."""
        return self.work.rows * self.work.tokens // self.plan.tensor

    @property
    def paired(self) -> bool:
        """Whether embedding and head are one array, of which a stage holds the one or the other."""
        return self.plan.stage > 1 and not self.model.tie_word_embeddings and not self.model.layers.mtp

    def gathered(self, weight: Weight) -> None:
        """FSDP: gathers the weight's pieces before its product, and scatters its gradient, in float32, after it."""
        axes = self._sharded(weight)
        if self.plan.fsdp == "parameters" and axes:
            piece = self._held(weight)
            itemsize = FLOAT32 if weight.float32 else self.work.itemsize
            self.add("weights", "forward", "all-gather", axes, piece * itemsize)
            if self.plan.stage > 1 and self.remat.kind == "none" and self.unit not in (ENDS, MTP):
                # A pipeline does not keep gathered weights from a microbatch's forward to its backward pass.
                self.add("weights", "recompute", "all-gather", axes, piece * itemsize)
            self.add("weights", "backward", "reduce-scatter", axes, piece * self.ranks(axes) * FLOAT32)

    def summed(self, weights: Iterable[Weight]) -> None:
        """Sums each gradient over the devices that store the same piece of the parameter.

        Where masters are sharded and parameters are not (ZeRO-1, ZeRO-2), masters are gathered first, and gradients
        scattered: once per step, or once per microbatch.
        """
        for weight in weights if self.plan.fsdp in ("optimizer", "gradients") else ():
            axes = self._sharded(weight)
            phase = "update" if self.plan.fsdp == "optimizer" else "backward"
            piece = self._held(weight, stored=True) * FLOAT32
            self.add("masters", "update", "all-gather", axes, piece)
            self.add("gradients", phase, "reduce-scatter", axes, piece * self.ranks(axes))
        total: dict[tuple[str, ...], list[int]] = {}
        for weight in weights:
            total.setdefault(self._copies(weight), []).append(self._held(weight, stored=True) * FLOAT32)
        for axes, held in total.items():
            self.add("gradients", "update", "all-reduce", axes, sum(held) / len(held), len(held))

    def _sharded(self, weight: Weight) -> tuple[str, ...]:
        dims = {"embed": ("fsdp",), "expert_embed": ("expert_fsdp",)}
        return next((dims[axis] for axis in weight.axes if axis in dims), ())

    def _held(self, weight: Weight, *, stored: bool = False) -> int:
        """How many numbers of the parameter one device holds, inside the step or between steps."""
        ways = self.ranks(name for axis in weight.axes for name in SPLIT.get(axis or "", ()))
        splits = self.plan.fsdp != "none" if stored else self.plan.fsdp == "parameters"
        sharded = self.ranks(self._sharded(weight)) if splits else 1
        return math.prod(weight.shape) // (ways * sharded)

    def _copies(self, weight: Weight) -> tuple[str, ...]:
        """The axes over which the parameter is the same."""
        split = {name for axis in weight.axes for name in SPLIT.get(axis or "", ())}
        sharded = self.plan.fsdp != "none" and self._sharded(weight)
        if "expert" in weight.axes:
            everywhere = ["expert_fsdp_copies" if sharded else "expert_data", "expert", "expert_tensor"]
        else:
            few = next((axis for axis in weight.axes if axis in ("kv_heads", "groups")), None)
            dense = ["fsdp_copies"] if sharded else ["data", "context"]
            everywhere = [*dense, f"{few}_copies" if few else "tensor"]
        if self.unit in (ENDS, MTP) and not ("vocab" in weight.axes and self.paired):
            everywhere.insert(0, "stage")
        return tuple(axis for axis in everywhere if axis not in split and self.sizes[axis] > 1)


# The logical axes of parameters that every plan splits, and the axes they are split over.
SPLIT = {
    **dict.fromkeys(("vocab", "heads", "mlp", "mamba_heads"), ("tensor",)),
    **{axis: (axis,) for axis in ("kv_heads", "groups", "expert")},
    "expert_mlp": ("expert_tensor",),
}


# Activations


def _block(ledger: _Ledger, part: str = "sequence", *, needed: bool = False, name: str = "") -> None:
    """Sequence parallelism: the input is gathered, the ranks' parts of the output are summed and scattered."""
    ledger.gather(part, ("tensor",), ledger.stream / ledger.plan.tensor)
    ledger.scatter(part, ("tensor",), ledger.stream, needed=needed, name=name)


def _attention(ledger: _Ledger) -> None:
    _block(ledger)
    model, plan, itemsize = ledger.model, ledger.plan, ledger.work.itemsize
    heads = ledger.own(model.num_attention_heads)
    if ledger.unit == "+":  # every query head has its own keys
        key_heads, key, value = heads, model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    else:
        key_heads, key, value = ledger.own(model.num_key_value_heads, "kv_heads"), model.head_dim, model.head_dim
    keys, values = ledger.numbers * key_heads * key, ledger.numbers * key_heads * value
    masks = "core" if plan.attention == "full" else ""  # kept probabilities are zero where nothing is seen
    if plan.context_attention == "allgather":
        ledger.gather("keys", CONTEXT, keys)
        ledger.gather("keys", CONTEXT, values)
        ledger.gather("keys", CONTEXT, ledger.segments, gradient=False, name=masks)
    elif plan.context_attention == "alltoall":
        shared, alike = math.lcm(heads, plan.context), math.lcm(key_heads, plan.context)  # few heads are repeated
        ledger.both("heads", "all-to-all", CONTEXT, ledger.numbers * (shared * key + alike * (key + value)))
        ledger.gather("heads", CONTEXT, ledger.segments, gradient=False, name=masks)
        ledger.both("heads", "all-to-all", CONTEXT, ledger.numbers * heads * value, name="attention")
    else:
        turns, places = plan.context - 1, ledger.work.tokens * INT32
        # Around the ring, and once more for the gradients, which travel with the keys in float32 and one rank further.
        for phase in ("forward", "backward"):
            for held in (keys, values, ledger.segments, places, INT32):  # the last names their owner
                ledger.shift("ring", CONTEXT, held, turns, phase=phase, name="attention")
        for held in (keys, values):
            ledger.shift("ring", CONTEXT, held // itemsize * FLOAT32, turns + 1, phase="backward")


def _halos(ledger: _Ledger, channels: int) -> None:
    """The tokens before each of a rank's two parts of the sequence, for the causal convolution."""
    before = ledger.model.conv_kernel - 1
    ledger.shift("halo", CONTEXT, ledger.work.rows * before * channels * ledger.work.itemsize, 2, gradient=True)
    ledger.shift("halo", CONTEXT, ledger.work.rows * before * INT32, 2)


def _entering(ledger: _Ledger, decays: int, states: int, *, name: str) -> None:
    """What `parallel.context.entering` sends for this many numbers per row: by doubling, over the ranks' first parts
    and over their second parts, and last the state to the next rank."""
    rounds, rows = (ledger.plan.context - 1).bit_length(), ledger.work.rows
    ledger.shift("states", CONTEXT, rows * INT32, 2)  # does a part continue the segment before it?
    ledger.shift("states", CONTEXT, rows * decays * FLOAT32, 2 * rounds - 1, gradient=True)
    ledger.shift("states", CONTEXT, rows * states * FLOAT32, 2 * rounds, gradient=True)
    ledger.shift("states", CONTEXT, rows * states * FLOAT32, 2, gradient=True, name=name)


def _mamba2(ledger: _Ledger) -> None:
    _block(ledger)
    model, plan = ledger.model, ledger.plan
    heads, groups = ledger.own(model.mamba_num_heads), ledger.own(model.n_groups, "groups")
    head, state = model.mamba_head_dim, model.ssm_state_size
    _halos(ledger, heads * head + 2 * groups * state)
    if plan.context_ssm == "heads":
        shared, alike = math.lcm(heads, plan.context), math.lcm(groups, plan.context)  # few groups are repeated
        ledger.both("heads", "all-to-all", CONTEXT, ledger.numbers * (shared * (head + 1) + 2 * alike * state))
        ledger.gather("heads", CONTEXT, ledger.segments, gradient=False)
        ledger.both("heads", "all-to-all", CONTEXT, ledger.numbers * heads * head)
    else:
        _entering(ledger, heads, heads * head * state, name="ssd_states")
    # A group of the norm over several ranks: one sum of squares per token and rank, and its gradient.
    squares = ledger.work.rows * ledger.work.tokens * FLOAT32
    ledger.both("norm peers", "all-reduce", ("norm_groups_copies",), squares)


def _mamba1(ledger: _Ledger) -> None:
    _block(ledger)
    model, channels = ledger.model, ledger.own(ledger.model.mamba_intermediate_size)
    state = model.ssm_state_size
    _halos(ledger, channels)
    # The time step's low rank, B and C read all channels: sums forward, and of their gradients.
    ledger.both("low rank", "all-reduce", ("tensor",), ledger.numbers * model.time_step_rank, name="x_proj")
    ledger.both("low rank", "all-reduce", ("tensor",), ledger.numbers * state, 2, name="x_proj")
    if ledger.plan.context_ssm == "heads":  # each channel is a head, and all read the same B and C
        in_float32 = ledger.numbers // ledger.work.itemsize * FLOAT32
        ledger.both("heads", "all-to-all", CONTEXT, ledger.numbers * channels, 2)  # and the time steps
        for _ in range(2):
            ledger.gather("heads", CONTEXT, ledger.numbers * state)
        ledger.gather("heads", CONTEXT, ledger.segments, gradient=False)
        ledger.both("heads", "all-to-all", CONTEXT, in_float32 * channels)  # what the scan gives
    else:
        _entering(ledger, channels * state, channels * state, name="scan_states")


def _experts(ledger: _Ledger) -> None:
    plan, model = ledger.plan, ledger.model
    {"allgather": _gathered_tokens, "alltoall": _exchanged_rows, "ragged": _ragged_rows}[plan.dispatch](ledger)
    if model.moe_shared_expert_intermediate_size:
        _block(ledger, "shared expert", needed=model.moe_shared_expert_gate, name="shared_out")
    experts, rows = model.n_routed_experts, ledger.work.rows
    sequence, everywhere = ("context", "tensor"), ("data", "context", "tensor")
    statistic = lambda axes, numbers, needed=False, name="": ledger.add(  # noqa: E731
        "router statistics", "forward", "all-reduce", axes, numbers * FLOAT32, needed=needed, name=name
    )
    # For the balance loss: probabilities and counts per expert, tokens per row. Sums have no gradient to send.
    if model.router_balance == "global":
        statistic(everywhere, experts)
        statistic(everywhere, experts)
    else:
        statistic(sequence, rows * experts)
        statistic(sequence, rows * experts, needed=True, name="routing")
        statistic(sequence, rows, needed=True)
        statistic(("data",), 1)
    statistic(everywhere, 1)  # the z-loss


def _gathered_tokens(ledger: _Ledger) -> None:
    tokens, k, axes = ledger.own_tokens, ledger.model.num_experts_per_tok, ("expert", "expert_tensor")
    width = tokens * ledger.model.expert_width * ledger.work.itemsize
    ledger.gather("dispatch", axes, width, name="rows")
    ledger.gather("dispatch", axes, tokens * k * INT32, gradient=False, name="routing")  # each token's experts
    ledger.gather("dispatch", axes, tokens * k, gradient=False, name="routing")  # whether there is room, one byte each
    ledger.gather("combine", axes, tokens * k * FLOAT32)  # the weights
    projected = ledger.model.moe_latent_size is not None
    ledger.scatter("combine", axes, width * ledger.ranks(axes), needed=projected, name="combined")


def _exchanged_rows(ledger: _Ledger) -> None:
    model, tokens, factor = ledger.model, ledger.own_tokens, ledger.plan.capacity_factor
    even = tokens * model.num_experts_per_tok / model.n_routed_experts
    capacity = tokens if factor is None else math.ceil(min(tokens, even * factor))
    rows = model.n_routed_experts * capacity * model.expert_width * ledger.work.itemsize
    ledger.both("dispatch", "all-to-all", ("expert",), rows, name="rows")
    _shared_rows(ledger, rows)
    ledger.both("combine", "all-to-all", ("expert",), rows, name="expert_out")


def _ragged_rows(ledger: _Ledger) -> None:
    model, plan, sent = ledger.model, ledger.plan, ledger.own_tokens * ledger.model.num_experts_per_tok
    room = ledger.own_tokens * plan.expert * min(model.num_experts_per_tok, model.n_routed_experts // plan.expert)
    room = room if plan.buffer_factor is None else math.ceil(min(room, sent * plan.buffer_factor))
    counts, row = model.n_routed_experts * INT32, model.expert_width * ledger.work.itemsize
    ledger.gather("dispatch", ("expert",), counts, gradient=False, name="routing")
    ledger.both("dispatch", "ragged-all-to-all", ("expert",), min(sent, room) * row, name="rows")
    ledger.gather("dispatch", ("expert_tensor",), counts, gradient=False, name="routing")
    _shared_rows(ledger, room * row)
    ledger.both("combine", "ragged-all-to-all", ("expert",), min(sent, room) * row, name="expert_out")


def _shared_rows(ledger: _Ledger, rows: int) -> None:
    """Ranks that split an expert's hidden units each take the rows of all, and sum their partial outputs."""
    axes = ("expert_tensor",)
    ledger.gather("dispatch", axes, rows, name="rows")
    ledger.scatter("combine", axes, rows * ledger.ranks(axes), needed=True, name="expert_out")


def _ends(ledger: _Ledger) -> None:
    plan, model, tokens = ledger.plan, ledger.model, ledger.work.rows * ledger.work.tokens
    depths = 1 + model.mtp_depths
    # The softmax over all ranks' columns: the maximum, the sum of exponentials, the target's logit.
    chunk = tokens if plan.cross_entropy == "full" else min(plan.logit_rows, tokens)
    for depth in range(depths):
        _embedded(ledger, depth)
        ledger.gather("head", ("tensor",), ledger.stream / plan.tensor)
        ledger.add("cross-entropy", "forward", "all-reduce", ("tensor",), chunk * FLOAT32, 3 * -(-tokens // chunk))
        # Later tokens, their weights and documents.
        ledger.shift("targets", ("context",), ledger.work.rows * (depth + 1) * FLOAT32, 3 * 2)
    ledger.add("cross-entropy", "forward", "all-reduce", ("data", "context"), depths * FLOAT32)
    _counts(ledger, ledger.work.rows * plan.microbatches, depths)


def _embedded(ledger: _Ledger, depth: int) -> None:
    """The tokens of a prediction `depth` deep; their positions and documents come from a rank's neighbours, too."""
    ledger.scatter("embedding", ("tensor",), ledger.stream)
    ledger.shift("targets", ("context",), ledger.work.rows * depth * FLOAT32, 3 * 2)


def _counts(ledger: _Ledger, rows: int, depths: int) -> None:
    """Counts of targets, tokens and rows over the whole batch; a row counts where any context rank holds a token of
    it."""
    for depth in range(depths):
        ledger.shift("counts", ("context",), rows * (depth + 1) * FLOAT32, 2 * 2, phase="update")
        ledger.shift("counts", ("context",), rows * depth * FLOAT32, 2, phase="update")
    ledger.add("counts", "update", "all-reduce", ("data", "context"), depths * FLOAT32, 2)
    ledger.add("counts", "update", "all-reduce", ("context",), rows * FLOAT32, depths)
    ledger.add("counts", "update", "all-reduce", ("data",), depths * FLOAT32)


def _load(ledger: _Ledger) -> None:
    pattern, everywhere = ledger.model.layers, ("data", "context", "tensor")
    layers = (pattern.main + pattern.mtp).count("E")
    if layers:
        ledger.add("load", "forward", "all-reduce", everywhere, ledger.model.n_routed_experts * FLOAT32, layers)
        # Assignments without room at an expert, and in a ragged buffer.
        ledger.add("dropped", "forward", "all-reduce", everywhere, FLOAT32, 1 + (ledger.plan.dispatch == "ragged"))


# By letter: what enters the ledger of one layer beside its weights.
LAYER_COLLECTIVES: dict[str, Callable[[_Ledger], None]] = {
    "M": _mamba2,
    "m": _mamba1,
    **dict.fromkeys("*w+", _attention),
    "-": _block,
    "E": _experts,
}
