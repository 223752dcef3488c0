"""Mamba-2. Mamba-1 shares parts of it."""

import math

from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU
from orogen.cost.collectives import block
from orogen.cost.kind import Cached, LayerCosts
from orogen.cost.ledger import CONTEXT, FLOAT32, INT32, Ledger
from orogen.cost.local import Local
from orogen.cost.operation import Operation, memory, product
from orogen.cost.weight import Weight, vector

# Of the SSD's Triton kernels: the smallest tile, and the longest chunk and the most numbers of a head's chunk by bytes
# per number (of the same names in kernels/ssd/triton.py).
SMALLEST_TILE, LONGEST_CHUNK, LARGEST_CHUNK = 16, {2: 128, 4: 64}, {2: 2**15, 4: 2**14}


def _flops(config: ModelConfig, length: int) -> float:
    size, heads, state = config.hidden_size, config.mamba_num_heads, config.ssm_state_size
    inner, states = heads * config.mamba_head_dim, config.n_groups * state
    projections = 2 * size * (2 * inner + 2 * states + heads) + 2 * inner * size
    convolution = 2 * config.conv_kernel * (inner + 2 * states)
    chunk = min(config.chunk_size, length)
    inside = 2 * (states + inner) * chunk / 2  # C·B, then its product with x: a causal triangle of the chunk
    across = 2 * 2 * inner * state  # into the chunk's state, and out of the one before
    return projections + convolution + inside + across


def _weights(model: ModelConfig) -> list[Weight]:
    size, heads = model.hidden_size, model.mamba_num_heads
    inner, states = heads * model.mamba_head_dim, model.n_groups * model.ssm_state_size
    found = [Weight((size, inner), ("embed", "mamba_heads"))] * 2 + [Weight((size, states), ("embed", "groups"))] * 2
    found += [Weight((size, heads), ("embed", "mamba_heads")), Weight((inner, size), ("mamba_heads", "embed"))]
    if model.mamba_proj_bias:
        found += [vector(inner, "mamba_heads")] * 2 + [vector(states, "groups")] * 2
        found += [vector(heads, "mamba_heads"), vector(size, "norm")]
    found += convolution(model, inner, "mamba_heads") + convolution(model, states, "groups") * 2
    # The bias of the time steps, the decays, the skip D, and the gated norm.
    return [*found, *[vector(heads, "mamba_heads")] * 3, vector(inner, "mamba_heads")]


def convolution(model: ModelConfig, channels: int, axis: str) -> list[Weight]:
    """The taps of a convolution over channels, and their biases."""
    found = [Weight((channels, model.conv_kernel), (axis, "taps"))]
    return [*found, vector(channels, axis)] if model.use_conv_bias else found


def _kept(here: Local) -> dict[str, float]:
    model, n = here.model, here.tokens * here.itemsize
    heads = here.split(model.mamba_num_heads)
    inner, states = heads * model.mamba_head_dim, here.split(model.n_groups) * model.ssm_state_size
    fused, time = here.plan.ssd == FOR_GPU["ssd"], here.tokens // here.rows
    chunk = _fused_chunk(here, time) if fused else model.chunk_size
    # The chunked form keeps float32 states and two float32 parts of the output, the fused one all in the compute dtype.
    ssd = n * inner if fused else 2 * here.tokens * inner * FLOAT32
    kept_states = here.rows * math.ceil(time / chunk) * inner * model.ssm_state_size
    return {
        "in_proj": n * (2 * inner + 2 * states + heads),
        "conv": n * (inner + 2 * states),
        "ssd": ssd,
        "ssd_states": kept_states * (here.itemsize if fused else FLOAT32),
        "gated_norm": n * inner,
    }


def _fused_chunk(here: Local, time: int) -> int:
    """Tokens of a chunk in the SSD's Triton kernels."""
    tile = lambda size: max(SMALLEST_TILE, 1 << (size - 1).bit_length())  # noqa: E731
    widest = max(SMALLEST_TILE, LARGEST_CHUNK[here.itemsize] // tile(here.model.mamba_head_dim))
    return min(tile(min(here.model.chunk_size, time)), LONGEST_CHUNK[here.itemsize], widest)


def _autodiff(here: Local, named: dict[str, float]) -> dict[str, float]:
    """A skip and float32 time steps beside the names; of the chunked output one part."""
    heads = here.split(here.model.mamba_num_heads)
    inner = heads * here.model.mamba_head_dim
    halved = named["ssd"] / (1 if here.plan.ssd == FOR_GPU["ssd"] else 2)
    return {**named, "ssd": halved, "unnamed": here.tokens * (inner * here.itemsize + heads * FLOAT32)}


def _cache(here: Local) -> Cached:
    model = here.model
    heads, shared = here.split(model.mamba_num_heads), here.split(model.n_groups) * model.ssm_state_size
    inner = heads * model.mamba_head_dim
    taps = (model.conv_kernel - 1) * (inner + 2 * shared)
    return Cached(channels=inner, taps=taps, replayed=inner + shared, replayed_float32=heads)


def _collectives(ledger: Ledger) -> None:
    block(ledger)
    model, plan = ledger.model, ledger.plan
    heads, groups = ledger.own(model.mamba_num_heads), ledger.own(model.n_groups, "groups")
    head, state = model.mamba_head_dim, model.ssm_state_size
    halos(ledger, heads * head + 2 * groups * state, model.conv_kernel)
    if plan.context_ssm == "heads":
        # Fewer groups than ranks are repeated.
        shared, alike = math.lcm(heads, plan.context), math.lcm(groups, plan.context)
        ledger.both("heads", "all-to-all", CONTEXT, ledger.numbers * (shared * (head + 1) + 2 * alike * state))
        ledger.gather("heads", CONTEXT, ledger.segments, gradient=False)
        ledger.both("heads", "all-to-all", CONTEXT, ledger.numbers * heads * head)
    else:
        entering(ledger, heads, heads * head * state, name="ssd_states")
    if ledger.work.carried:  # convolution windows of B and C, which all ranks that share a group hold
        sequences, taps = ledger.work.rows * plan.microbatches, model.conv_kernel - 1
        window = sequences * taps * groups * state * ledger.work.itemsize
        ledger.add("windows", "update", "all-reduce", ("groups_copies",), window, count=2)
    # If a norm group spans several ranks: one sum of squares per token and rank, and its gradient.
    squares = ledger.work.rows * ledger.work.tokens * FLOAT32
    ledger.both("norm peers", "all-reduce", ("norm_groups_copies",), squares)


def halos(ledger: Ledger, channels: int, taps: int) -> None:
    """The tokens before each of a rank's two parts of the sequence, for a causal convolution with so many taps."""
    before = taps - 1
    ledger.shift("halo", CONTEXT, ledger.work.rows * before * channels * ledger.work.itemsize, 2, gradient=True)
    ledger.shift("halo", CONTEXT, ledger.work.rows * before * INT32, 2)


def entering(ledger: Ledger, decays: int, states: int, *, name: str) -> None:
    """What `parallel.context.entering` sends for so many numbers per sequence: rounds of doubling over the ranks' first
    parts and over their second parts, and finally the state to the next rank."""
    rounds, sequences = (ledger.plan.context - 1).bit_length(), ledger.work.rows
    ledger.shift("states", CONTEXT, sequences * INT32, 2)  # does a part continue the segment before it?
    ledger.shift("states", CONTEXT, sequences * decays * FLOAT32, 2 * rounds - 1, gradient=True)
    ledger.shift("states", CONTEXT, sequences * states * FLOAT32, 2 * rounds, gradient=True)
    ledger.shift("states", CONTEXT, sequences * states * FLOAT32, 2, gradient=True, name=name)


def _operations(here: Local) -> list[Operation]:
    model, n, size = here.model, here.tokens, here.itemsize
    heads, groups = here.split(model.mamba_num_heads), here.split(model.n_groups)
    inner, states = heads * model.mamba_head_dim, groups * model.ssm_state_size
    channels, numbers = n * (inner + 2 * states) * size, n * inner * size
    chunk = model.chunk_size
    flops = n * (chunk * (states + inner) + 4 * inner * model.ssm_state_size)
    # The states that enter the chunks are written by the forward pass, and read, with their gradients, by the other.
    held = n / chunk * inner * model.ssm_state_size * FLOAT32
    forward = 2 * numbers + 2 * n * states * size + held
    backward = 3 * numbers + 4 * n * states * size + 3 * held
    return [
        product("in_proj", n, model.hidden_size, 2 * inner + 2 * states + heads, size, makes="in_proj"),
        memory("conv", 2 * channels, 3 * channels, makes="conv", kernels=3),
        Operation("ssd", "ssd", flops, forward, (2.5 * flops, backward), makes="ssd", kernels=3),
        memory("gated_norm", 3 * numbers, 5 * numbers, makes="gated_norm"),
        product("out_proj", n, inner, model.hidden_size, size, last=True),
    ]


COSTS = LayerCosts(
    flops=_flops,
    weights=_weights,
    kept=_kept,
    products=("in_proj",),
    autodiff=_autodiff,
    cache=_cache,
    collectives=_collectives,
    operations=_operations,
    kernels=("ssd",),
)
