"""The collectives of each kind of layer, and of what comes before and after the layers, as entries of a ledger."""

import math
from collections.abc import Callable

from orogen.cost.ledger import CONTEXT, FLOAT32, INT32, Ledger


def block(ledger: Ledger, part: str = "sequence", *, needed: bool = False, name: str = "") -> None:
    """A layer split over `tensor`: its input enters from the residual stream, the ranks' summed output leaves to it."""
    enter(ledger, part)
    leave(ledger, part, needed=needed, name=name)


def enter(ledger: Ledger, part: str) -> None:
    """What `Plan.enter` sends: the other ranks' pieces of the residual stream; nothing if each holds all of it."""
    if ledger.plan.stream == "time":
        ledger.gather(part, ("tensor",), ledger.stream / ledger.plan.tensor)


def leave(ledger: Ledger, part: str, *, needed: bool = False, name: str = "") -> None:
    """What `Plan.leave` sends: the ranks' partial outputs are summed, and each keeps its piece of the sum, or all of
    it. In the second case their gradients are summed in the backward pass."""
    if ledger.plan.stream == "time":
        ledger.scatter(part, ("tensor",), ledger.stream, needed=needed, name=name)
    else:
        ledger.both(part, "all-reduce", ("tensor",), ledger.stream, needed=needed, name=name)


def _attention(ledger: Ledger) -> None:
    block(ledger)
    model, plan, itemsize = ledger.model, ledger.plan, ledger.work.itemsize
    heads = ledger.own(model.num_attention_heads)
    if ledger.unit == "+":  # every query head has its own keys
        key_heads, key, value = heads, model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    else:
        key_heads, key, value = ledger.own(model.num_key_value_heads, "kv_heads"), model.head_dim, model.head_dim
    keys, values = ledger.numbers * key_heads * key, ledger.numbers * key_heads * value
    masks = "core" if plan.attention == "full" else ""  # kept probabilities are zero outside the mask
    if plan.context_attention == "allgather" and plan.attention == "cudnn":
        # Gathered again for the gradient, whose shares are summed in float32.
        for phase in ("forward", "backward"):
            for held in (keys, values, ledger.segments):
                ledger.add("keys", phase, "all-gather", CONTEXT, held, name="attention")
        for held in (keys, values):
            ledger.add("keys", "backward", "reduce-scatter", CONTEXT, held // itemsize * FLOAT32 * plan.context)
    elif plan.context_attention == "allgather":
        ledger.gather("keys", CONTEXT, keys)
        ledger.gather("keys", CONTEXT, values)
        ledger.gather("keys", CONTEXT, ledger.segments, gradient=False, name=masks)
    elif plan.context_attention == "alltoall":
        # Fewer heads than ranks are repeated.
        shared, alike = math.lcm(heads, plan.context), math.lcm(key_heads, plan.context)
        ledger.both("heads", "all-to-all", CONTEXT, ledger.numbers * (shared * key + alike * (key + value)))
        ledger.gather("heads", CONTEXT, ledger.segments, gradient=False, name=masks)
        ledger.both("heads", "all-to-all", CONTEXT, ledger.numbers * heads * value, name="attention")
    else:
        turns = plan.context - 1
        # Once around the ring, and once more in the backward pass, where the gradients travel with the keys, in float32
        # and one rank further.
        for phase in ("forward", "backward"):
            for held in (keys, values, ledger.segments):
                ledger.shift("ring", CONTEXT, held, turns, phase=phase, name="attention")
        for held in (keys, values):
            ledger.shift("ring", CONTEXT, held // itemsize * FLOAT32, turns + 1, phase="backward")


def _halos(ledger: Ledger, channels: int) -> None:
    """The tokens before each of a rank's two parts of the sequence, for the causal convolution."""
    before = ledger.model.conv_kernel - 1
    ledger.shift("halo", CONTEXT, ledger.work.rows * before * channels * ledger.work.itemsize, 2, gradient=True)
    ledger.shift("halo", CONTEXT, ledger.work.rows * before * INT32, 2)


def _entering(ledger: Ledger, decays: int, states: int, *, name: str) -> None:
    """What `parallel.context.entering` sends for so many numbers per sequence: rounds of doubling over the ranks' first
    parts and over their second parts, and finally the state to the next rank."""
    rounds, sequences = (ledger.plan.context - 1).bit_length(), ledger.work.rows
    ledger.shift("states", CONTEXT, sequences * INT32, 2)  # does a part continue the segment before it?
    ledger.shift("states", CONTEXT, sequences * decays * FLOAT32, 2 * rounds - 1, gradient=True)
    ledger.shift("states", CONTEXT, sequences * states * FLOAT32, 2 * rounds, gradient=True)
    ledger.shift("states", CONTEXT, sequences * states * FLOAT32, 2, gradient=True, name=name)


def _mamba2(ledger: Ledger) -> None:
    block(ledger)
    model, plan = ledger.model, ledger.plan
    heads, groups = ledger.own(model.mamba_num_heads), ledger.own(model.n_groups, "groups")
    head, state = model.mamba_head_dim, model.ssm_state_size
    _halos(ledger, heads * head + 2 * groups * state)
    if plan.context_ssm == "heads":
        # Fewer groups than ranks are repeated.
        shared, alike = math.lcm(heads, plan.context), math.lcm(groups, plan.context)
        ledger.both("heads", "all-to-all", CONTEXT, ledger.numbers * (shared * (head + 1) + 2 * alike * state))
        ledger.gather("heads", CONTEXT, ledger.segments, gradient=False)
        ledger.both("heads", "all-to-all", CONTEXT, ledger.numbers * heads * head)
    else:
        _entering(ledger, heads, heads * head * state, name="ssd_states")
    if ledger.work.carried:  # convolution windows of B and C, which all ranks that share a group hold
        sequences, taps = ledger.work.rows * plan.microbatches, model.conv_kernel - 1
        window = sequences * taps * groups * state * ledger.work.itemsize
        ledger.add("windows", "update", "all-reduce", ("groups_copies",), window, count=2)
    # If a norm group spans several ranks: one sum of squares per token and rank, and its gradient.
    squares = ledger.work.rows * ledger.work.tokens * FLOAT32
    ledger.both("norm peers", "all-reduce", ("norm_groups_copies",), squares)


def _mamba1(ledger: Ledger) -> None:
    block(ledger)
    model, channels = ledger.model, ledger.own(ledger.model.mamba_intermediate_size)
    state = model.ssm_state_size
    _halos(ledger, channels)
    # The low-rank time step, B and C read all channels: sums over the ranks, forward and of their gradients.
    ledger.both("low rank", "all-reduce", ("tensor",), ledger.numbers * model.time_step_rank, name="x_proj")
    ledger.both("low rank", "all-reduce", ("tensor",), ledger.numbers * state, 2, name="x_proj")
    if ledger.plan.context_ssm == "heads":  # each channel is a head, and all read the same B and C
        in_float32 = ledger.numbers // ledger.work.itemsize * FLOAT32
        ledger.both("heads", "all-to-all", CONTEXT, ledger.numbers * channels, 2)  # and the time steps
        for _ in range(2):
            ledger.gather("heads", CONTEXT, ledger.numbers * state)
        ledger.gather("heads", CONTEXT, ledger.segments, gradient=False)
        ledger.both("heads", "all-to-all", CONTEXT, in_float32 * channels)  # the scan's output
    else:
        _entering(ledger, channels * state, channels * state, name="scan_states")


def _experts(ledger: Ledger) -> None:
    plan, model = ledger.plan, ledger.model
    DISPATCH_COLLECTIVES[plan.dispatch](ledger)
    if plan.stream == "whole":  # each rank routes its own tokens
        ledger.gather("combine", ("tensor",), ledger.stream / plan.tensor, needed=False)
    if model.moe_shared_expert_intermediate_size:
        block(ledger, "shared expert", needed=model.moe_shared_expert_gate, name="shared_out")
    experts, sequences = model.n_routed_experts, ledger.work.rows
    sequence, everywhere = ("context", "tensor"), ("data", "context", "tensor")
    statistic = lambda axes, numbers, needed=False, name="": ledger.add(  # noqa: E731
        "router statistics", "forward", "all-reduce", axes, numbers * FLOAT32, needed=needed, name=name
    )
    # For the balance loss: probabilities and counts per expert, tokens per sequence. Gradients of sums send nothing.
    if model.router_balance == "global":
        statistic(everywhere, experts)
        statistic(everywhere, experts)
    else:
        statistic(sequence, sequences * experts)
        statistic(sequence, sequences * experts, needed=True, name="routing")
        statistic(sequence, sequences, needed=True)
        statistic(("data",), 1)
    statistic(everywhere, 1)  # the z-loss


def _gathered_tokens(ledger: Ledger) -> None:
    tokens, k, axes = ledger.own_tokens, ledger.model.num_experts_per_tok, ("expert", "expert_tensor")
    width = tokens * ledger.model.expert_width * ledger.work.itemsize
    ledger.gather("dispatch", axes, width, name="rows")
    ledger.gather("dispatch", axes, tokens * k * INT32, gradient=False, name="routing")  # each token's experts
    ledger.gather("dispatch", axes, tokens * k, gradient=False, name="routing")  # whether there is room, one byte each
    ledger.gather("combine", axes, tokens * k * FLOAT32)  # the weights
    projected = ledger.model.moe_latent_size is not None
    ledger.scatter("combine", axes, width * ledger.ranks(axes), needed=projected, name="combined")


def _exchanged_assignments(ledger: Ledger) -> None:
    model, tokens, factor = ledger.model, ledger.own_tokens, ledger.plan.capacity_factor
    even = tokens * model.num_experts_per_tok / model.n_routed_experts
    capacity = tokens if factor is None else math.ceil(min(tokens, even * factor))
    buffers = model.n_routed_experts * capacity * model.expert_width * ledger.work.itemsize
    ledger.both("dispatch", "all-to-all", ("expert",), buffers, name="rows")
    _split_experts(ledger, buffers)
    ledger.both("combine", "all-to-all", ("expert",), buffers, name="expert_out")


def _ragged_assignments(ledger: Ledger) -> None:
    model, plan, sent = ledger.model, ledger.plan, ledger.own_tokens * ledger.model.num_experts_per_tok
    room = ledger.own_tokens * plan.expert * min(model.num_experts_per_tok, model.n_routed_experts // plan.expert)
    room = room if plan.buffer_factor is None else math.ceil(min(room, sent * plan.buffer_factor))
    counted, width = model.n_routed_experts * INT32, model.expert_width * ledger.work.itemsize
    ledger.gather("dispatch", ("expert",), counted, gradient=False, name="routing")
    ledger.both("dispatch", "ragged-all-to-all", ("expert",), min(sent, room) * width, name="rows")
    ledger.gather("dispatch", ("expert_tensor",), counted, gradient=False, name="routing")
    _split_experts(ledger, room * width)
    ledger.both("combine", "ragged-all-to-all", ("expert",), min(sent, room) * width, name="expert_out")


def _split_experts(ledger: Ledger, held: int) -> None:
    """Ranks that split an expert's hidden units gather each other's assignments and sum their partial outputs."""
    axes = ("expert_tensor",)
    ledger.gather("dispatch", axes, held, name="rows")
    ledger.scatter("combine", axes, held * ledger.ranks(axes), needed=True, name="expert_out")


def outer(ledger: Ledger) -> None:
    """Embedding, head and loss at every depth of prediction, and the batch's counts."""
    plan, model, tokens = ledger.plan, ledger.model, ledger.work.rows * ledger.work.tokens
    depths = 1 + model.mtp_depths
    # The softmax over all ranks' columns: the maximum, the sum of exponentials, the target's logit.
    chunk = tokens if plan.cross_entropy == "full" else min(plan.logit_rows, tokens)
    for depth in range(depths):
        embedded(ledger, depth)
        enter(ledger, "head")
        ledger.add(
            "cross-entropy", "forward", "all-reduce", ("tensor",), chunk * FLOAT32, count=3 * -(-tokens // chunk)
        )
        # Later tokens, their weights and documents.
        ledger.shift("targets", ("context",), ledger.work.rows * (depth + 1) * FLOAT32, 3 * 2)
    ledger.add("cross-entropy", "forward", "all-reduce", ("data", "context"), depths * FLOAT32)
    _counts(ledger, ledger.work.rows * plan.microbatches, depths)


def embedded(ledger: Ledger, depth: int) -> None:
    """The embedding of the tokens at MTP depth `depth`. The tokens beyond a rank's part, their positions and their
    documents come from its neighbours."""
    leave(ledger, "embedding")
    ledger.shift("targets", ("context",), ledger.work.rows * depth * FLOAT32, 3 * 2)


def _counts(ledger: Ledger, sequences: int, depths: int) -> None:
    """Counts of targets, tokens and sequences over the whole batch; a sequence counts if any context rank holds one of
    its tokens."""
    for depth in range(depths):
        ledger.shift("counts", ("context",), sequences * (depth + 1) * FLOAT32, 2 * 2, phase="update")
        ledger.shift("counts", ("context",), sequences * depth * FLOAT32, 2, phase="update")
    ledger.add("counts", "update", "all-reduce", ("data", "context"), depths * FLOAT32, count=2)
    ledger.add("counts", "update", "all-reduce", ("context",), sequences * FLOAT32, count=depths)
    ledger.add("counts", "update", "all-reduce", ("data",), depths * FLOAT32)


def load(ledger: Ledger) -> None:
    """Each expert's load in every layer, and the numbers of dropped assignments."""
    pattern, everywhere = ledger.model.layers, ("data", "context", "tensor")
    layers = (pattern.main + pattern.mtp).count("E")
    if layers:
        ledger.add("load", "forward", "all-reduce", everywhere, ledger.model.n_routed_experts * FLOAT32, count=layers)
        # Assignments without room at an expert, and in a ragged buffer.
        ledger.add(
            "dropped", "forward", "all-reduce", everywhere, FLOAT32, count=1 + (ledger.plan.dispatch in BUFFERED)
        )


# By name of `PlanConfig.dispatch`: records what it takes to send a layer's tokens to their experts and back.
DISPATCH_COLLECTIVES: dict[str, Callable[[Ledger], None]] = {
    "allgather": _gathered_tokens,
    "alltoall": _exchanged_assignments,
    "ragged": _ragged_assignments,
}
# Dispatches whose buffers may lack room for an assignment, which is counted.
BUFFERED = {"ragged"}
# By letter: records the collectives of one layer, except those of its weights.
LAYER_COLLECTIVES: dict[str, Callable[[Ledger], None]] = {
    "M": _mamba2,
    "m": _mamba1,
    **dict.fromkeys("*w+", _attention),
    "-": block,
    "E": _experts,
    **dict.fromkeys("xg", block),
}
