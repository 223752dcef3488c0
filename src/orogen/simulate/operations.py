"""The operations of a layer on one device: their products, and the bytes that they read and write.

Letters of dimensions: m rows, k contracted, n columns.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from orogen.cost.flops import seen_keys
from orogen.cost.kept import FLOAT32, Local, expert_rows

# Reads and writes of all scores of attention that keeps them in memory: scores, softmax and dropout, forward and back.
SCORE_PASSES = (6, 8)


class Operation(NamedTuple):
    """One kind of work of a layer, for one microbatch on one device.

    kind: matmul, grouped, attention, scores, ssd or memory. flops, bytes: of the forward pass; back: of the backward
    pass. shape: (m, k, n) of a product, whose gradients have (m, n, k) and (k, m, n). makes: the name of what it
    computes (config/remat.py), "" if that has none. kernels: launches of the forward pass; the backward pass has twice
    as many. groups: experts of a grouped product. length: tokens that attention sees at most. last: whether no gradient
    needs its result.
    """

    name: str
    kind: str
    flops: float
    bytes: float
    back: tuple[float, float]
    shape: tuple[float, float, float] = (0, 0, 0)
    makes: str = ""
    kernels: float = 1
    groups: float = 1
    length: float = 1
    last: bool = False


def product(name: str, m: float, k: float, n: float, size: int, *, makes: str = "", last: bool = False) -> Operation:
    """A product of (m, k) and (k, n) with `size` bytes per number, and its two gradients."""
    flops, moved = 2 * m * k * n, size * (m * k + k * n + m * n)
    return Operation(name, "matmul", flops, moved, (2 * flops, 2 * moved), (m, k, n), makes, last=last)


def memory(name: str, forward: float, backward: float, *, makes: str = "", kernels: float = 1) -> Operation:
    """Elementwise work that reads and writes so many bytes."""
    return Operation(name, "memory", 0, forward, (0, backward), makes=makes, kernels=kernels)


def layer_operations(letter: str, here: Local) -> list[Operation]:
    """All operations of a layer: its norm, its mixer, and the sum with the residual stream."""
    stream = here.own * here.model.hidden_size * here.itemsize
    around = [memory("norm", 2 * stream, 3 * stream, makes="norm"), memory("residual", 2 * stream, 2 * stream)]
    return [*LAYER_OPERATIONS[letter](here), *around]


def end_operations(here: Local, depths: int) -> tuple[list[Operation], list[Operation]]:
    """The embedding's operations, and those of final norm, head and loss, once per depth of prediction."""
    model, plan, n = here.model, here.plan, here.tokens
    stream, columns = here.own * model.hidden_size * here.itemsize, plan.vocab_rows(model.vocab_size) // plan.tensor
    full = n * model.hidden_size * here.itemsize
    first = [memory("embedding", 2 * full, 3 * full, kernels=4)]
    chunks = 1 if plan.cross_entropy == "full" else -(-n // plan.logit_rows)
    logits = n * columns * FLOAT32
    # The head's float32 gradient is read and written once per chunk.
    head_gradient = chunks * 2 * model.hidden_size * columns * FLOAT32
    last = [
        memory("norm", 2 * stream, 3 * stream),
        product("head", n, model.hidden_size, columns, here.itemsize),
        memory("cross_entropy", 2 * logits, logits + head_gradient, kernels=6 * chunks),
    ]
    return first, last * depths


def logit_operations(here: Local) -> list[Operation]:
    """The final norm of all tokens, and the head at one position of each sequence, as an engine applies it."""
    model, plan = here.model, here.plan
    stream, columns = here.own * model.hidden_size * here.itemsize, plan.vocab_rows(model.vocab_size) // plan.tensor
    head = product("head", here.rows, model.hidden_size, columns, here.itemsize)
    return [memory("norm", 2 * stream, 3 * stream), head]


def mtp_operations(here: Local) -> list[Operation]:
    """What the multi-token-prediction block has beside its layers, for one depth."""
    size = here.model.hidden_size
    stream = here.own * size * here.itemsize
    norms = memory("norm", 6 * stream, 9 * stream, kernels=3)
    return [norms, product("mtp_projection", here.own, 2 * size, size, here.itemsize)]


def _attention(here: Local, window: int | None = None) -> list[Operation]:
    model, n, size = here.model, here.tokens, here.itemsize
    heads, keys = here.split(model.num_attention_heads), here.split(model.num_key_value_heads)
    queries, width = heads * model.head_dim, (heads + 2 * keys) * model.head_dim
    found = [
        product("query_key_value", n, model.hidden_size, width, size, makes="query"),
        *_core(here, heads, model.head_dim, model.head_dim, window),
        product("out", n, queries, model.hidden_size, size, last=True),
    ]
    turned = 2 * n * (heads + keys) * model.head_dim * size
    if model.rope_theta is not None:
        found.append(memory("rotary", turned, turned, kernels=2))
    return [*found, memory("head_norm", turned, 1.5 * turned, kernels=2)] if model.qk_norm else found


def _cross_attention(here: Local) -> list[Operation]:
    """Of tokens that all see an image; what images cost by themselves is left out."""
    model, n, size = here.model, here.tokens, here.itemsize
    heads, seen = here.split(model.num_attention_heads), model.image_vectors
    queries, scores = heads * model.head_dim, n * heads * seen * size
    moved, flops = 2 * n * queries * size, 4 * n * queries * seen
    forward, backward = (moved + passes * scores for passes in SCORE_PASSES)
    return [
        product("query", n, model.hidden_size, queries, size, makes="query"),
        Operation("attention", "scores", flops, forward, (2 * flops, backward), makes="core", kernels=4),
        product("out", n, queries, model.hidden_size, size, last=True),
    ]


def _core(here: Local, heads: int, key: int, value: int, window: int | None = None) -> list[Operation]:
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


def _latent_attention(here: Local) -> list[Operation]:
    model, n, size = here.model, here.tokens, here.itemsize
    heads, rank, latent = here.split(model.num_attention_heads), model.q_lora_rank, model.kv_lora_rank
    key, rope = model.qk_nope_head_dim + model.qk_rope_head_dim, model.qk_rope_head_dim
    wide = model.hidden_size if rank is None else rank
    found = [product("query_up", n, wide, heads * key, size, makes="query")]
    down = latent + rope + (rank or 0)
    turned = n * heads * key * size
    return [
        *found,
        product("latent_down", n, model.hidden_size, down, size, makes="latent"),
        product("key_value_up", n, latent, heads * (model.qk_nope_head_dim + model.v_head_dim), size, makes="key"),
        memory("latent_norm", 2 * n * down * size, 3 * n * down * size, kernels=2),
        memory("rotary", 4 * turned, 4 * turned, kernels=4),
        *_core(here, heads, key, model.v_head_dim),
        product("out", n, heads * model.v_head_dim, model.hidden_size, size, last=True),
    ]


def _mlp(here: Local, hidden: int | None = None, prefix: str = "") -> list[Operation]:
    model, n, size = here.model, here.tokens, here.itemsize
    width, gates = here.split(hidden or model.intermediate_size), 1 + model.mlp_gated
    inner = n * width * size
    return [
        product(f"{prefix}up", n, model.hidden_size, gates * width, size, makes=f"{prefix}up"),
        memory(f"{prefix}activation", (1 + gates) * inner, (1 + 2 * gates) * inner, makes=f"{prefix}activation"),
        product(f"{prefix}down", n, width, model.hidden_size, size, last=True),
    ]


def _mamba2(here: Local) -> list[Operation]:
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


def _mamba1(here: Local) -> list[Operation]:
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


def _experts(here: Local) -> list[Operation]:
    model, plan, size = here.model, here.plan, here.itemsize
    rows, room = expert_rows(here)
    width, hidden, gates = model.expert_width, model.moe_intermediate_size // plan.expert_tensor, 1 + model.mlp_gated
    local, n = model.n_routed_experts // plan.expert, here.routed
    scores = n * model.n_routed_experts * FLOAT32
    sent = (n + n * model.num_experts_per_tok) * width * size
    found = [
        product("router", n, model.hidden_size, model.n_routed_experts, size, makes="router"),
        memory("routing", 4 * scores, 4 * scores, makes="routing", kernels=10),
        memory("permute", sent, sent, makes="rows", kernels=2),
        _grouped("expert_up", (rows, width, gates * hidden), local, size, makes="expert_up"),
        memory(
            "expert_activation",
            (1 + gates) * room * hidden * size,
            (1 + 2 * gates) * room * hidden * size,
            makes="expert_activation",
        ),
        _grouped("expert_down", (rows, hidden, width), local, size, makes="expert_out"),
        memory("combine", sent, 2 * sent, makes="combined", kernels=2),
    ]
    if latent := model.moe_latent_size:
        found.append(product("latent_down", n, model.hidden_size, latent, size, makes="latent"))
        found.append(product("latent_up", n, latent, model.hidden_size, size, last=True))
    if shared := model.moe_shared_expert_intermediate_size:
        found += _mlp(here, shared, "shared_")
    return found


def _grouped(name: str, shape: tuple[float, float, float], groups: int, size: int, *, makes: str) -> Operation:
    """The products of `groups` experts, with m rows in all, and their gradients."""
    m, k, n = shape
    flops, moved = 2 * m * k * n, size * (m * k + groups * k * n + m * n)
    return Operation(name, "grouped", flops, moved, (2 * flops, 2 * moved), shape, makes, groups=groups)


def names(operations: Iterable[Operation]) -> list[str]:
    """Their names, in order."""
    return [operation.name for operation in operations]


# By letter: the operations of its mixer.
LAYER_OPERATIONS: dict[str, Callable[[Local], list[Operation]]] = {
    "M": _mamba2,
    "m": _mamba1,
    "*": _attention,
    "w": lambda here: _attention(here, here.model.sliding_window),
    "+": _latent_attention,
    "-": _mlp,
    "E": _experts,
    "x": _cross_attention,
    "g": _mlp,
}
