"""DeepSeek's multi-head latent attention."""

from orogen.config.model import ModelConfig
from orogen.cost.collectives import block
from orogen.cost.kind import Cached, LayerCosts
from orogen.cost.kinds.attention import core_kept, core_operations, core_workspace, exchange, seen_keys
from orogen.cost.ledger import Ledger
from orogen.cost.local import Local
from orogen.cost.operation import Operation, memory, product
from orogen.cost.weight import Weight, norm, vector


def _flops(config: ModelConfig, length: int) -> float:
    size, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    rank = config.q_lora_rank
    queries = size * heads * key if rank is None else rank * (size + heads * key)
    keys = size * (latent + config.qk_rope_head_dim) + latent * heads * (config.qk_nope_head_dim + value)
    return 2 * (queries + keys + heads * value * size) + 2 * heads * (key + value) * seen_keys(length, length)


def _weights(model: ModelConfig) -> list[Weight]:
    size, heads, rank, latent = model.hidden_size, model.num_attention_heads, model.q_lora_rank, model.kv_lora_rank
    nope, rope, value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    biased = model.attention_bias == "all"
    up = lambda rank, width: Weight((rank, heads * width), ("embed", "heads"))  # noqa: E731

    def down(width: int) -> list[Weight]:
        return [Weight((size, width), ("embed", None)), *([vector(width, "norm")] if biased else [])]

    found = [up(size if rank is None else rank, nope + rope)]
    if rank is not None:
        found += [*down(rank), *norm(model, rank)]
    found += [*down(latent), *down(rope), *norm(model, latent), up(latent, nope), up(latent, value)]
    found.append(Weight((heads * value, size), ("heads", "embed")))
    return [*found, vector(size, "norm")] if biased else found


def _kept(here: Local) -> dict[str, float]:
    model, n = here.model, here.tokens * here.itemsize
    heads, rope = here.split(model.num_attention_heads), model.qk_rope_head_dim
    latents = model.kv_lora_rank + rope + (model.q_lora_rank or 0)
    return {
        "query": n * heads * (model.qk_nope_head_dim + rope),
        "key": n * heads * model.qk_nope_head_dim,
        "value": n * heads * model.v_head_dim,
        "latent": n * latents,
        **core_kept(here, heads * model.v_head_dim),
    }


def _norms(here: Local) -> float:
    """Latent vectors of keys, and of queries if they have any."""
    return here.tokens * (here.model.kv_lora_rank + (here.model.q_lora_rank or 0)) * here.itemsize


def _cache(here: Local) -> Cached:
    return Cached(token=here.model.kv_lora_rank + here.model.qk_rope_head_dim)


def _collectives(ledger: Ledger) -> None:
    block(ledger)
    model, heads = ledger.model, ledger.own(ledger.model.num_attention_heads)
    # Every query head has its own keys.
    exchange(ledger, heads, heads, model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim)


def _operations(here: Local) -> list[Operation]:
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
        *core_operations(here, heads, key, model.v_head_dim),
        product("out", n, heads * model.v_head_dim, model.hidden_size, size, last=True),
    ]


COSTS = LayerCosts(
    flops=_flops,
    weights=_weights,
    kept=_kept,
    workspace=lambda here: core_workspace(here, here.split(here.model.num_attention_heads), here.model.v_head_dim),
    products=("latent", "query", "key", "value", "attention"),
    cache=_cache,
    collectives=_collectives,
    operations=_operations,
    norms=_norms,
    kernels=("attention",),
)
