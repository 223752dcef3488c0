"""Gated cross-attention to the images of a row."""

from orogen.config.model import ModelConfig
from orogen.cost.collectives import block
from orogen.cost.kind import LayerCosts
from orogen.cost.kinds.attention import SCORE_PASSES, projections
from orogen.cost.kinds.mlp import branch
from orogen.cost.local import Local
from orogen.cost.operation import Operation, product
from orogen.cost.weight import Weight, vector


def _flops(config: ModelConfig, _: int) -> float:
    """Of a token that sees an image; the image's own keys and values, and its resampling, are not a token's work."""
    queries = config.num_attention_heads * config.head_dim
    return 4 * config.hidden_size * queries + 4 * queries * config.image_vectors


def _weights(model: ModelConfig) -> list[Weight]:
    return [*projections(model), vector(1, "norm")]


def _kept(here: Local) -> dict[str, float]:
    """With one image per sequence; more add to `core`, `key` and `value`. What the resampler keeps is left out."""
    model, size = here.model, here.itemsize
    heads, groups = here.split(model.num_attention_heads), here.split(model.num_key_value_heads)
    queries = here.tokens * heads * model.head_dim * size
    keys = here.rows * model.image_vectors * groups * model.head_dim * size
    core = heads * here.tokens * model.image_vectors * size
    return {"query": queries, "key": keys, "value": keys, "core": core, "attention": queries, **branch(here)}


def _operations(here: Local) -> list[Operation]:
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


COSTS = LayerCosts(
    flops=_flops,
    weights=_weights,
    kept=_kept,
    products=("query", "key", "value", "attention", "branch"),
    collectives=block,
    operations=_operations,
)
