"""What a layer keeps for its backward pass, by name, from the configs alone; no jax.

`activations` reads the same from a layer's trace, which takes seconds; tests compare the two. Arrays that are chosen by
name are exact, except for a few bytes of routing, and so is what `elementwise` keeps of the kernels of a GPU. Without
remat, what autodiff keeps beyond names is that of the implementations that run on any device.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.cost.ledger import Workload

FLOAT32 = INT32 = 4
# Tokens per chunk of Mamba-1's scan (model/mamba1.py).
SCAN_CHUNK = 32
# Of cuDNN's attention: the documents per row that a whole batch may have, and those of one row and key head at a time
# (FEW and RUNS in kernels/attention/cudnn.py).
FEW, RUNS = 8, 32
# Of the SSD's Triton kernels: the smallest tile, and the longest chunk and the most numbers of a head's chunk by bytes
# per number (kernels/ssd/triton.py).
SMALLEST_TILE, LONGEST_CHUNK, LARGEST_CHUNK = 16, {2: 128, 4: 64}, {2: 2**15, 4: 2**14}
# What `elementwise` keeps: outputs of products with weights and of fused kernels.
LAYER_PRODUCTS = {
    **dict.fromkeys("*w", ("query", "key", "value", "attention")),
    "+": ("latent", "query", "key", "value", "attention"),
    "M": ("in_proj",),
    "m": ("in_proj", "x_proj"),
    "-": ("up",),
    "g": ("up", "branch"),
    "x": ("query", "key", "value", "attention", "branch"),
    "E": ("router", "latent", "expert_activation", "shared_up", "chosen"),
}
# By operation, what else it keeps if a kernel for GPUs makes it, which would otherwise run twice.
KERNEL_PRODUCTS = {
    "rms_norm": ("norm", "gated_norm"),
    "causal_conv1d": ("conv",),
    "ssd": ("ssd", "ssd_states"),
    "permutation": ("rows",),
    "grouped_matmul": ("expert_up", "expert_out"),
}


class Local(NamedTuple):
    """The sizes of one microbatch on one device. tokens: those of its context rank; own: its part of the residual
    stream; routed: those whose experts it chooses; length: the tokens of a whole sequence. dynamic: whether buffers of
    rows have the size of what they hold, as in programs whose shapes need not be known when they are compiled.
    imbalance: assignments of the busiest expert rank over an even share."""

    model: ModelConfig
    plan: PlanConfig
    rows: int
    tokens: int
    own: int
    routed: int
    length: int
    itemsize: int
    dynamic: bool = False
    imbalance: float = 1.0

    def split(self, size: int) -> int:
        """This device's part of heads, channels or groups that `tensor` splits, at least one of them."""
        return max(1, size // self.plan.tensor)


def local(
    model: ModelConfig, plan: PlanConfig, work: Workload, *, dynamic: bool = False, imbalance: float = 1.0
) -> Local:
    """The sizes of `work` on one device. dynamic, imbalance: see `Local`."""
    tokens = work.rows * work.tokens
    own = tokens if plan.stream == "whole" else tokens // plan.tensor
    length = plan.context * work.tokens
    routed = tokens // plan.tensor
    return Local(model, plan, work.rows, tokens, own, routed, length, work.itemsize, dynamic, imbalance)


def expert_rows(here: Local) -> tuple[float, float]:
    """Rows that the busiest device's experts multiply, and rows of the buffers around them, padding included."""
    model, plan = here.model, here.plan
    k, local_experts = model.num_experts_per_tok, model.n_routed_experts // plan.expert
    sent = here.routed * k * plan.expert_tensor
    most = here.routed * plan.expert * plan.expert_tensor * min(k, local_experts)
    if plan.dispatch == "alltoall":
        factor, even = plan.capacity_factor, here.routed * k / model.n_routed_experts
        capacity = here.routed if factor is None else math.ceil(min(here.routed, even * factor))
        rows = model.n_routed_experts * capacity * plan.expert_tensor
        return rows, rows
    filled = min(sent * here.imbalance, most)
    if here.dynamic:
        return filled, filled
    if plan.dispatch == "ragged" and plan.buffer_factor is not None:
        room = math.ceil(min(most // plan.expert_tensor, here.routed * k * plan.buffer_factor)) * plan.expert_tensor
        return min(filled, room), room
    return filled, most


def kept_bytes(letter: str, here: Local) -> tuple[dict[str, float], float]:
    """The bytes that one device keeps of one layer and microbatch, by name; and the bytes that it offloads."""
    remat = here.plan.layer_remat(letter)
    named = named_bytes(letter, here)
    held = {"input": named["input"]}
    if remat.kind == "elementwise":
        held |= {name: named[name] for name in (*LAYER_PRODUCTS[letter], *_by_kernels(here)) if name in named}
    elif remat.kind == "names":
        names = (name for name in named if name not in remat.again and name not in ("chosen", *_behind(letter, here)))
        held |= {name: named[name] for name in names}
    elif remat.kind == "none":
        held |= AUTODIFF.get(letter, _as_named)(here, named)
    host = sum(size for name, size in named.items() if name in remat.host)
    return {name: size for name, size in held.items() if name not in remat.host and size}, host


def _by_kernels(here: Local) -> list[str]:
    """Names of what the plan's kernels for GPUs make."""
    mine = {field: names for field, names in KERNEL_PRODUCTS.items() if getattr(here.plan, field) == FOR_GPU[field]}
    if not here.model.norm.startswith("rms"):
        mine.pop("rms_norm", None)
    return [name for names in mine.values() for name in names]


def workspace(letter: str, here: Local) -> float:
    """Bytes that cuDNN's gradient of a layer's attention works in; 0 without it.

    It takes 8 bytes per token, head, channel and document that its packed form has room for; that form is compiled
    whether or not rows are packed. XLA allocates them on a GPU alone. Source: experiments/gpu_throughput.
    """
    if here.plan.attention != FOR_GPU["attention"] or letter not in "*+" or here.dynamic:
        return 0.0  # other programs choose a form when they see the documents
    model, heads = here.model, here.split(here.model.num_attention_heads)
    groups = here.split(model.num_key_value_heads) if letter == "*" else heads
    size = model.head_dim if letter == "*" else model.v_head_dim
    runs = here.rows * heads  # context ranks take the plain form
    if here.plan.context == 1:
        runs = max(FEW * here.rows * heads, RUNS * heads // groups)
    return 8.0 * here.tokens / here.rows * size * runs


def _behind(letter: str, here: Local) -> tuple[str, ...]:
    """Named arrays that no gradient reads, because a later one holds the same; the kernel that permutes rows keeps what
    it reads."""
    return ("latent",) if letter == "E" and here.plan.permutation != FOR_GPU["permutation"] else ()


def named_bytes(letter: str, here: Local) -> dict[str, float]:
    """The bytes of each named array of one layer on one device."""
    stream = here.own * here.model.hidden_size * here.itemsize
    return {"input": stream, "norm": stream, **LAYER_KEPT[letter](here)}


def _attention(here: Local) -> dict[str, float]:
    model, n = here.model, here.tokens * here.itemsize
    queries = here.split(model.num_attention_heads) * model.head_dim
    keys = here.split(model.num_key_value_heads) * model.head_dim
    return {"query": n * queries, "key": n * keys, "value": n * keys, **_core(here, queries)}


def _core(here: Local, out: int) -> dict[str, float]:
    heads = here.split(here.model.num_attention_heads)
    held: dict[str, float] = {"attention": here.tokens * out * here.itemsize}
    if here.plan.attention == "full" and here.plan.context == 1:
        held["core"] = heads * here.tokens * here.length * here.itemsize
    elif here.plan.attention == "cudnn" or here.plan.context > 1:
        # The log-sum-exps, with room for packed documents.
        held["attention"] += here.tokens * heads * FLOAT32 * (FEW if here.plan.context == 1 else 1)
    return held


def _cross_attention(here: Local) -> dict[str, float]:
    """With one image per sequence; more add to `core`, `key` and `value`. What the resampler keeps is left out."""
    model, size = here.model, here.itemsize
    heads, groups = here.split(model.num_attention_heads), here.split(model.num_key_value_heads)
    queries = here.tokens * heads * model.head_dim * size
    keys = here.rows * model.image_vectors * groups * model.head_dim * size
    core = heads * here.tokens * model.image_vectors * size
    return {"query": queries, "key": keys, "value": keys, "core": core, "attention": queries, **_branch(here)}


def _branch(here: Local) -> dict[str, float]:
    """What a tanh-gated layer multiplies by its gate."""
    return {"branch": here.own * here.model.hidden_size * here.itemsize}


def _latent_attention(here: Local) -> dict[str, float]:
    model, n = here.model, here.tokens * here.itemsize
    heads, rope = here.split(model.num_attention_heads), model.qk_rope_head_dim
    latents = model.kv_lora_rank + rope + (model.q_lora_rank or 0)
    return {
        "query": n * heads * (model.qk_nope_head_dim + rope),
        "key": n * heads * model.qk_nope_head_dim,
        "value": n * heads * model.v_head_dim,
        "latent": n * latents,
        **_core(here, heads * model.v_head_dim),
    }


def _mlp(here: Local) -> dict[str, float]:
    hidden = here.tokens * here.split(here.model.intermediate_size) * here.itemsize
    return {"up": hidden * (1 + here.model.mlp_gated), "activation": hidden}


def _mamba2(here: Local) -> dict[str, float]:
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


def _mamba1(here: Local) -> dict[str, float]:
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


def _experts(here: Local) -> dict[str, float]:
    model, plan = here.model, here.plan
    width, gates, k = model.expert_width * here.itemsize, 1 + model.mlp_gated, model.num_experts_per_tok
    _, room = expert_rows(here)
    hidden = room * (model.moe_intermediate_size // plan.expert_tensor) * here.itemsize
    returned = here.routed * k if plan.dispatch == "ragged" else room
    held = {
        "router": here.routed * model.n_routed_experts * FLOAT32,
        "routing": 3 * here.routed * k * INT32 + here.rows * model.n_routed_experts * FLOAT32,
        "chosen": here.routed * k * 2 * INT32,
        "rows": room * width,
        "expert_up": hidden * gates,
        "expert_activation": hidden,
        "expert_out": returned * width,
    }
    if model.moe_latent_size:
        held |= {"combined": here.routed * width, "latent": here.routed * width}
    if shared := model.moe_shared_expert_intermediate_size:
        inner = here.tokens * here.split(shared) * here.itemsize
        held |= {"shared_up": inner * gates, "shared_activation": inner}
    if model.moe_shared_expert_gate:
        held["shared_out"] = here.own * (model.hidden_size + 1) * here.itemsize
    return held


def _as_named(here: Local, named: dict[str, float]) -> dict[str, float]:
    return {name: size for name, size in named.items() if name != "chosen"}


def _autodiff_mamba2(here: Local, named: dict[str, float]) -> dict[str, float]:
    """A skip and float32 time steps beside the names; of the chunked output one part."""
    heads = here.split(here.model.mamba_num_heads)
    inner = heads * here.model.mamba_head_dim
    halved = named["ssd"] / (1 if here.plan.ssd == "triton" else 2)
    return {**named, "ssd": halved, "unnamed": here.tokens * (inner * here.itemsize + heads * FLOAT32)}


def _autodiff_experts(here: Local, named: dict[str, float]) -> dict[str, float]:
    """Scores, their sigmoids and softmaxes instead of the logits."""
    model = here.model
    scores = here.routed * (3 * model.n_routed_experts + 3 * model.num_experts_per_tok) * FLOAT32
    return {name: size for name, size in named.items() if name not in ("router", "latent", "chosen")} | {
        "unnamed": scores
    }


def _autodiff_mamba1(here: Local, named: dict[str, float]) -> dict[str, float]:
    """Transposed and float32 operands of the scan instead of its output."""
    inner = here.tokens * here.split(here.model.mamba_intermediate_size)
    states = 2 * here.tokens * here.model.ssm_state_size * here.itemsize
    return {**named, "scan": 0, "unnamed": inner * (here.itemsize + 2 * FLOAT32) + states}


# By letter: the bytes of its named arrays on one device, except the layer's input and norm.
LAYER_KEPT: dict[str, Callable[[Local], dict[str, float]]] = {
    "M": _mamba2,
    "m": _mamba1,
    "*": _attention,
    "w": _attention,
    "+": _latent_attention,
    "-": _mlp,
    "E": _experts,
    "x": _cross_attention,
    "g": lambda here: {**_mlp(here), **_branch(here)},
}
# By letter: what autodiff keeps without remat, where that is not the named arrays.
AUTODIFF: dict[str, Callable[[Local, dict[str, float]], dict[str, float]]] = {
    "M": _autodiff_mamba2,
    "E": _autodiff_experts,
    "m": _autodiff_mamba1,
}
