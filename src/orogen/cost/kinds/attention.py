"""Attention, all or with a window. Other kinds of attention share parts of it."""

import math

from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU
from orogen.cost.collectives import block
from orogen.cost.kind import Cached, LayerCosts
from orogen.cost.ledger import CONTEXT, FLOAT32, Ledger
from orogen.cost.local import Local
from orogen.cost.operation import Operation, memory, product
from orogen.cost.weight import Weight, norm, vector

# Reads and writes of all scores of attention that keeps them in memory: scores, softmax and dropout, forward and back.
SCORE_PASSES = (6, 8)
# Of cuDNN's attention: the documents per row that a whole batch may have, and those of one row and key head at a time
# (FEW and RUNS in kernels/attention/cudnn.py).
FEW, RUNS = 8, 32


def _flops(config: ModelConfig, length: int, window: int | None = None) -> float:
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    seen = seen_keys(length, length if window is None else window)
    return 2 * config.hidden_size * (2 * queries + 2 * keys) + 4 * queries * seen


def seen_keys(length: int, window: int) -> float:
    """Keys that the average query of `length` tokens sees: a triangle, then `window` each, less half its own."""
    window = min(window, length)
    return window * (length - window / 2) / length


def _weights(model: ModelConfig) -> list[Weight]:
    size, heads = model.hidden_size, model.num_attention_heads
    queries, keys = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    found = projections(model)
    if model.attention_bias != "none":
        found += [vector(queries, "heads"), *[vector(keys, "kv_heads")] * 2]
    if model.attention_bias == "all":
        found.append(vector(size, "norm"))
    if model.qk_norm:
        found += 2 * norm(model, model.head_dim)
    return [*found, vector(heads, "heads")] if model.attention_sinks else found


def projections(model: ModelConfig) -> list[Weight]:
    """Queries, output, keys and values of attention."""
    size, heads = model.hidden_size, model.num_attention_heads
    queries, keys = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    found = [Weight((size, queries), ("embed", "heads")), Weight((queries, size), ("heads", "embed"))]
    return found + [Weight((size, keys), ("embed", "kv_heads"))] * 2


def _kept(here: Local) -> dict[str, float]:
    model, n = here.model, here.tokens * here.itemsize
    queries = here.split(model.num_attention_heads) * model.head_dim
    keys = here.split(model.num_key_value_heads) * model.head_dim
    return {"query": n * queries, "key": n * keys, "value": n * keys, **core_kept(here, queries)}


def core_kept(here: Local, out: int) -> dict[str, float]:
    """What softmax(q kᵀ) v keeps, with `out` numbers per token."""
    plan, heads = here.plan, here.split(here.model.num_attention_heads)
    cudnn, by_heads = plan.attention == FOR_GPU["attention"], plan.context > 1 and plan.context_attention == "alltoall"
    # Sums over parts of the keys, which other ranks hold.
    by_parts = plan.context > 1 and not by_heads and (cudnn or plan.context_attention == "ring")
    held: dict[str, float] = {"attention": here.tokens * out * (here.itemsize if cudnn or not by_parts else FLOAT32)}
    if plan.attention == "full" and not by_parts:
        held["core"] = heads * here.tokens * here.length * here.itemsize
    if cudnn or by_parts:
        # The log-sum-exps, with room for packed documents.
        held["attention"] += here.tokens * heads * FLOAT32 * (FEW if _packed(here) else 1)
    if cudnn and by_heads:
        held["attention"] += here.tokens * out * here.itemsize  # by heads, and by tokens
    return held


def _norms(here: Local) -> float:
    """Queries and keys."""
    heads = here.split(here.model.num_attention_heads) + here.split(here.model.num_key_value_heads)
    return here.tokens * heads * here.model.head_dim * here.itemsize if here.model.qk_norm else 0.0


def _packed(here: Local) -> bool:
    """Whether cuDNN's form for packed rows is compiled. Context ranks take the plain one unless they hold whole rows of
    fewer heads; other programs choose when they see the documents."""
    plan = here.plan
    whole_rows = plan.context == 1 or plan.context_attention == "alltoall"
    return plan.attention == FOR_GPU["attention"] and whole_rows and not here.dynamic


def core_workspace(here: Local, groups: int, size: int) -> float:
    """Bytes that cuDNN's gradient of attention works in, with `groups` key heads and values of `size`; 0 without it.

    It takes 8 bytes per token, head, channel and document that its packed form has room for; that form is compiled
    whether or not rows are packed. XLA allocates them on a GPU alone. Source: experiments/gpu_throughput.
    """
    if here.plan.attention != FOR_GPU["attention"] or here.dynamic:
        return 0.0
    heads = here.split(here.model.num_attention_heads)
    if not _packed(here):
        return 8.0 * here.tokens * size * heads
    # Fewer heads than ranks are repeated.
    heads, groups = (math.lcm(each, here.plan.context) // here.plan.context for each in (heads, groups))
    return 8.0 * here.length * size * max(FEW * here.rows * heads, RUNS * heads // groups)


def _cache(here: Local) -> Cached:
    return Cached(token=2 * here.split(here.model.num_key_value_heads) * here.model.head_dim)


def _collectives(ledger: Ledger) -> None:
    block(ledger)
    model = ledger.model
    heads, key_heads = ledger.own(model.num_attention_heads), ledger.own(model.num_key_value_heads, "kv_heads")
    exchange(ledger, heads, key_heads, model.head_dim, model.head_dim)


def exchange(ledger: Ledger, heads: int, key_heads: int, key: int, value: int) -> None:
    """What attention sends over the ranks of context: this rank has so many heads, and numbers per key and value."""
    plan, itemsize = ledger.plan, ledger.work.itemsize
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


def _operations(here: Local, window: int | None = None) -> list[Operation]:
    model, n, size = here.model, here.tokens, here.itemsize
    heads, keys = here.split(model.num_attention_heads), here.split(model.num_key_value_heads)
    queries, width = heads * model.head_dim, (heads + 2 * keys) * model.head_dim
    found = [
        product("query_key_value", n, model.hidden_size, width, size, makes="query"),
        *core_operations(here, heads, model.head_dim, model.head_dim, window),
        product("out", n, queries, model.hidden_size, size, last=True),
    ]
    turned = 2 * n * (heads + keys) * model.head_dim * size
    if model.rope_theta is not None:
        found.append(memory("rotary", turned, turned, kernels=2))
    return [*found, memory("head_norm", turned, 1.5 * turned, kernels=2)] if model.qk_norm else found


def core_operations(here: Local, heads: int, key: int, value: int, window: int | None = None) -> list[Operation]:
    """softmax(q kᵀ) v: fused, with causal blocks alone, or through all scores in memory."""
    n, length, size = here.tokens, here.length, here.itemsize
    moved = n * heads * (2 * key + 2 * value) * size
    if here.plan.attention != "full" or here.plan.context > 1:
        flops = 2 * n * heads * (key + value) * seen_keys(length, window or length)
        # The backward pass computes the scores again: five products for two.
        back = 2.5 * flops, 2 * moved
        most = min(length, window or length)
        return [Operation("attention", "attention", flops, moved, back, makes="attention", length=most)]
    flops, scores = 2 * n * heads * (key + value) * length, n * heads * length * size
    forward, backward = (moved + passes * scores for passes in SCORE_PASSES)
    return [Operation("attention", "scores", flops, forward, (2 * flops, backward), makes="core", kernels=4)]


COSTS = LayerCosts(
    flops=_flops,
    weights=_weights,
    kept=_kept,
    products=("query", "key", "value", "attention"),
    workspace=lambda here: core_workspace(here, here.split(here.model.num_key_value_heads), here.model.head_dim),
    cache=_cache,
    collectives=_collectives,
    operations=_operations,
    norms=_norms,
    kernels=("attention",),
)
SLIDING_WINDOW = COSTS._replace(
    workspace=lambda here: 0.0,
    flops=lambda model, length: _flops(model, length, model.sliding_window),
    cache=lambda here: _cache(here)._replace(window=here.model.sliding_window),
    operations=lambda here: _operations(here, here.model.sliding_window),
)
