"""Mamba-1."""

import math

from orogen.config.model import ModelConfig
from orogen.cost.collectives import block
from orogen.cost.kind import Cached, LayerCosts
from orogen.cost.kinds.mamba2 import convolution, entering, halos
from orogen.cost.ledger import CONTEXT, FLOAT32, Ledger
from orogen.cost.local import Local
from orogen.cost.operation import Operation, memory, product
from orogen.cost.weight import Weight, vector

# Tokens per chunk of the scan (model/mamba1.py).
SCAN_CHUNK = 32


def _flops(config: ModelConfig, _: int) -> float:
    size, inner, state = config.hidden_size, config.mamba_intermediate_size, config.ssm_state_size
    rank = config.time_step_rank
    projections = 2 * size * 2 * inner + 2 * inner * (rank + 2 * state) + 2 * rank * inner + 2 * inner * size
    # per element of the state: dt · A; decay · S + (dt x) · B; and S · C summed
    scan = (1 + 3 + 2) * inner * state
    return projections + 2 * config.conv_kernel * inner + scan


def _weights(model: ModelConfig) -> list[Weight]:
    size, inner, rank, state = (
        model.hidden_size,
        model.mamba_intermediate_size,
        model.time_step_rank,
        model.ssm_state_size,
    )
    found = [Weight((size, inner), ("embed", "mamba_heads"))] * 2 + [Weight((inner, size), ("mamba_heads", "embed"))]
    if model.mamba_proj_bias:
        found += [vector(inner, "mamba_heads")] * 2 + [vector(size, "norm")]
    found += convolution(model, inner, "mamba_heads")
    found += [Weight((inner, width), ("mamba_heads", None)) for width in (rank, state, state)]
    found.append(Weight((rank, inner), (None, "mamba_heads")))
    found.append(Weight((inner, state), ("mamba_heads", "state"), float32=True))
    return [*found, *[vector(inner, "mamba_heads")] * 2]


def _kept(here: Local) -> dict[str, float]:
    model, n = here.model, here.tokens * here.itemsize
    inner, state = here.split(model.mamba_intermediate_size), model.ssm_state_size
    chunks = here.rows * math.ceil(here.tokens / here.rows / SCAN_CHUNK)
    return {
        "in_proj": 2 * n * inner,
        "conv": n * inner,
        "x_proj": n * (model.time_step_rank + 2 * state + inner),
        "scan": n * inner,
        "scan_states": chunks * inner * state * FLOAT32,
        "gated": n * inner,
    }


def _autodiff(here: Local, named: dict[str, float]) -> dict[str, float]:
    """Transposed and float32 operands of the scan instead of its output."""
    inner = here.tokens * here.split(here.model.mamba_intermediate_size)
    states = 2 * here.tokens * here.model.ssm_state_size * here.itemsize
    return {**named, "scan": 0, "unnamed": inner * (here.itemsize + 2 * FLOAT32) + states}


def _cache(here: Local) -> Cached:
    inner = here.split(here.model.mamba_intermediate_size)
    taps = (here.model.conv_kernel - 1) * inner
    return Cached(channels=inner, taps=taps, replayed=inner, replayed_float32=inner)


def _collectives(ledger: Ledger) -> None:
    block(ledger)
    model, channels = ledger.model, ledger.own(ledger.model.mamba_intermediate_size)
    state = model.ssm_state_size
    halos(ledger, channels, model.conv_kernel)
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
        entering(ledger, channels * state, channels * state, name="scan_states")


def _operations(here: Local) -> list[Operation]:
    model, n, size = here.model, here.tokens, here.itemsize
    inner, state, rank = here.split(model.mamba_intermediate_size), model.ssm_state_size, model.time_step_rank
    numbers, scan = n * inner * size, 6 * n * inner * state
    return [
        product("in_proj", n, model.hidden_size, 2 * inner, size, makes="in_proj"),
        memory("conv", 2 * numbers, 3 * numbers, makes="conv"),
        product("x_proj", n, inner, rank + 2 * state, size, makes="x_proj"),
        product("dt_up", n, rank, inner, size, makes="x_proj"),
        Operation("scan", "ssd", scan, 3 * numbers, (2.5 * scan, 6 * numbers), makes="scan", kernels=2),
        memory("gated", 3 * numbers, 5 * numbers, makes="gated"),
        product("out_proj", n, inner, model.hidden_size, size, last=True),
    ]


COSTS = LayerCosts(
    flops=_flops,
    weights=_weights,
    kept=_kept,
    products=("in_proj", "x_proj"),
    autodiff=_autodiff,
    cache=_cache,
    collectives=_collectives,
    operations=_operations,
)
