"""Attention: grouped-query, with the options of several model families, and DeepSeek's multi-head latent attention.

Letters: b batch, t time, d model, s all tokens so far, h query heads, g key heads, k head size, r latent width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from orogen.config.model import ModelConfig
from orogen.layers.adapter import base_of
from orogen.layers.documents import Documents
from orogen.layers.linear import add_bias, linear, linears
from orogen.layers.norm import make_norm
from orogen.layers.parameter import normal, parameter
from orogen.layers.probe import Probe, probe_of, row_squares
from orogen.layers.rotary import make_rotary, mscale
from orogen.model.context_attention import attend
from orogen.model.context_cache import reading, with_tokens
from orogen.model.slots import Paged
from orogen.parallel.plan import Plan
from orogen.precision.key_values import read, stored

# For the norms of MLA's latent vectors. DeepSeek's own code and transformers use their norm's default there, whatever
# rms_norm_eps is.
LATENT_EPSILON = 1e-6


class Attention(nnx.Module):
    """softmax(q kᵀ / √k) v, causal and within documents; query head i reads key head i // (h/g).

    A query attends to the last `window` tokens, its own included, or to all up to its own if None. Depending on the
    config, heads are normalised (Qwen3), then rotated by position, projections have biases, and each head has a sink
    (gpt-oss). Without any of these it is Nemotron-H's attention.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, window: int | None = None):
        size, std = config.hidden_size, config.init_std
        self.head_dim, self.window = config.head_dim, window
        rotated = int(config.head_dim * config.partial_rotary_factor)
        self.rotary = None if config.rope_theta is None else make_rotary(config, rotated)
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.query = normal(rngs, (size, queries), ("embed", "heads"), std=std)
        self.key = normal(rngs, (size, keys), ("embed", "kv_heads"), std=std)
        self.value = normal(rngs, (size, keys), ("embed", "kv_heads"), std=std)
        self.out = normal(rngs, (queries, size), ("heads", "embed"), std=config.output_init_std)
        biased = config.attention_bias != "none"
        self.query_bias = _bias(queries, "heads", biased)
        self.key_bias, self.value_bias = (_bias(keys, "kv_heads", biased) for _ in range(2))
        self.out_bias = _bias(size, "norm", config.attention_bias == "all")
        head_norm = lambda: make_norm(config, self.head_dim) if config.qk_norm else None  # noqa: E731
        self.query_norm, self.key_norm = head_norm(), head_norm()
        heads = (config.num_attention_heads,)
        self.sinks = normal(rngs, heads, ("heads",), std=std) if config.attention_sinks else None

    def __call__(self, x_btd: Array, docs: Documents, plan: Plan, given: Any = None) -> tuple[Array, Any]:
        """y (b, t, d), and what is kept. Given a cache of earlier tokens' keys and values, it attends to these too and
        returns the cache with this call's tokens; given a probe, it returns statistics."""
        probe, given = probe_of(given)
        with jax.named_scope("in_proj"):
            h_btd = plan.enter(x_btd)
            q_btf, k_btf, v_btf = linears(h_btd, (self.query, self.key, self.value), plan, "attention_in")
        q_bthk = self._heads("query", q_btf, self.query_bias)
        k_btgk = self._heads("key", k_btf, self.key_bias)
        v_btgk = self._heads("value", v_btf, self.value_bias)
        if self.query_norm is not None and self.key_norm is not None:
            q_bthk, k_btgk = self.query_norm(q_bthk, plan), self.key_norm(k_btgk, plan)
        if self.rotary is not None:
            q_bthk, k_btgk = (self.rotary(a, docs.positions_bt) for a in (q_bthk, k_btgk))
        scales = plan.recipe.stored.key_values
        k_btgk, v_btgk = stored((k_btgk, v_btgk), scales)
        kept = None if given is None else with_tokens(given, (k_btgk, v_btgk), docs, plan)
        sinks_h = None if self.sinks is None else self.sinks[...]
        settings = {"sinks_h": sinks_h, "window": self.window, "scale": self.head_dim**-0.5}
        y_bthk = kept.attend(q_bthk, docs, plan, **settings) if isinstance(kept, Paged) else None
        if y_bthk is None:
            found = None if kept is None else reading(kept, docs, plan)
            k_bsgk, v_bsgk = read((k_btgk, v_btgk) if found is None else found.values, scales, x_btd.dtype)
            y_bthk = attend(q_bthk, k_bsgk, v_bsgk, docs.segments_bt, plan, reading=found, **settings)
        return _join(y_bthk, self.out, self.out_bias, plan), _measured(y_bthk, docs, plan, probe) or kept

    def start(self, allocator: Any, dtype: Any) -> Any:
        """An empty cache of keys and values (…, g, k) per token."""
        heads = base_of(self.key)[...].shape[-1] // self.head_dim, self.head_dim
        return allocator.key_values((heads, heads), dtype, window=self.window)

    def cache_axes(self, allocator: Any) -> Any:
        """The logical axes of what `start` makes."""
        return allocator.key_value_axes((("kv_heads", None),) * 2, window=self.window)

    def _heads(self, name: str, projected_btf: Array, bias: nnx.Param | None) -> Array:
        return _split(checkpoint_name(add_bias(projected_btf, bias), name), self.head_dim)


def sliding_window(config: ModelConfig, rngs: nnx.Rngs) -> Attention:
    """Attention to the last `ModelConfig.sliding_window` tokens."""
    return Attention(config, rngs, window=config.sliding_window)


class LatentAttention(nnx.Module):
    """Attention with keys and values computed from one latent vector per token (DeepSeek's MLA, arXiv:2412.19437,
    section 2.1.1).

    c = norm(x W_c); keys are [c W_k, rotary(x W_kr)], the second part shared by all heads; values are c W_v; queries
    are [q, rotary(q_r)] of x W_q, or of norm(x W_qd) W_qu. The latent vectors are replicated, heads are sharded.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
        std = config.init_std
        self.nope, self.rope, self.value_size = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.rotary = make_rotary(config, self.rope)
        self.scale = (self.nope + self.rope) ** -0.5
        if config.yarn_factor is not None and config.yarn_mscale_all_dim is not None:
            self.scale *= mscale(config.yarn_factor, config.yarn_mscale_all_dim) ** 2
        biased = config.attention_bias == "all"
        up = lambda rank, width: normal(rngs, (rank, heads * width), ("embed", "heads"), std=std)  # noqa: E731
        down = lambda width: normal(rngs, (size, width), ("embed", None), std=std)  # noqa: E731
        self.direct = rank is None
        if self.direct:
            self.query = up(size, self.nope + self.rope)
        else:
            self.query_down, self.query_down_bias = down(rank), _bias(rank, "norm", biased)
            self.query_norm = make_norm(config, rank, epsilon=LATENT_EPSILON)
            self.query_up = up(rank, self.nope + self.rope)
        self.latent_down = down(config.kv_lora_rank)
        self.latent_down_bias = _bias(config.kv_lora_rank, "norm", biased)
        self.key_rope, self.key_rope_bias = down(self.rope), _bias(self.rope, "norm", biased)
        self.latent_norm = make_norm(config, config.kv_lora_rank, epsilon=LATENT_EPSILON)
        self.key_up, self.value_up = up(config.kv_lora_rank, self.nope), up(config.kv_lora_rank, self.value_size)
        self.out = normal(rngs, (heads * self.value_size, size), ("heads", "embed"), std=config.output_init_std)
        self.out_bias = _bias(size, "norm", biased)

    def __call__(self, x_btd: Array, docs: Documents, plan: Plan, given: Any = None) -> tuple[Array, Any]:
        """As `Attention`, with a cache of earlier tokens' latent vectors and rotary keys."""
        probe, given = probe_of(given)
        h_btd = plan.enter(x_btd)
        q_bthk = self._queries(h_btd, docs, plan)
        latent_btr, shared_btk = linears(h_btd, (self.latent_down, self.key_rope), plan, "attention_in", call=1)
        latent_btr = checkpoint_name(add_bias(latent_btr, self.latent_down_bias), "latent")
        latent_btr = self.latent_norm(latent_btr, plan)
        shared_btk = checkpoint_name(add_bias(shared_btk, self.key_rope_bias), "latent")
        shared_bt1k = self.rotary(shared_btk[:, :, None], docs.positions_bt)
        # One scale for both, as in vLLM, which stores them side by side.
        pair = plan.recipe.stored.key_values
        scales = None if pair is None else (pair[0], pair[0])
        latent_btr, shared_bt1k = stored((latent_btr, shared_bt1k), scales)
        kept = None if given is None else with_tokens(given, (latent_btr, shared_bt1k), docs, plan)
        found = None if kept is None else reading(kept, docs, plan)
        of_tokens = (latent_btr, shared_bt1k) if found is None else found.values
        latent_bsr, shared_bs1k = read(of_tokens, scales, x_btd.dtype)
        k_bsf, v_bsf = linears(latent_bsr, (self.key_up, self.value_up), plan, "attention_in", call=2)
        k_bsf, v_bsf = checkpoint_name(k_bsf, "key"), checkpoint_name(v_bsf, "value")
        k_bshk = _split(k_bsf, self.nope)
        shared_bshk = jnp.broadcast_to(shared_bs1k, (*k_bshk.shape[:-1], self.rope))
        y_bthk = attend(
            q_bthk,
            jnp.concatenate([k_bshk, shared_bshk], -1),
            _split(v_bsf, self.value_size),
            docs.segments_bt,
            plan,
            reading=found,
            scale=self.scale,
        )
        return _join(y_bthk, self.out, self.out_bias, plan), _measured(y_bthk, docs, plan, probe) or kept

    def start(self, allocator: Any, dtype: Any) -> Any:
        """An empty cache of latent vectors (…, r) and shared rotary keys (…, 1, k) per token."""
        return allocator.key_values(((base_of(self.latent_down)[...].shape[-1],), (1, self.rope)), dtype)

    def cache_axes(self, allocator: Any) -> Any:
        """The logical axes of what `start` makes."""
        return allocator.key_value_axes(((None,), (None, None)))

    @jax.named_scope("in_proj")
    def _queries(self, h_btd: Array, docs: Documents, plan: Plan) -> Array:
        if self.direct:
            q_btf = linear(h_btd, self.query, plan, "attention_in")
        else:
            latent_btr = add_bias(linear(h_btd, self.query_down, plan, "attention_in"), self.query_down_bias)
            latent_btr = self.query_norm(checkpoint_name(latent_btr, "latent"), plan)
            q_btf = linear(latent_btr, self.query_up, plan, "attention_in", call=3)
        q_bthk = _split(checkpoint_name(q_btf, "query"), self.nope + self.rope)
        plain_bthk, rotary_bthk = q_bthk[..., : self.nope], q_bthk[..., self.nope :]
        return jnp.concatenate([plain_bthk, self.rotary(rotary_bthk, docs.positions_bt)], -1)


def _bias(size: int, axis: str, present: bool) -> nnx.Param | None:
    return parameter(jnp.zeros(size), (axis,)) if present else None


def _split(x_btf: Array, size: int) -> Array:
    """(b, t, heads, size)."""
    return x_btf.reshape(*x_btf.shape[:2], -1, size)


def _measured(y_bthk: Array, docs: Documents, plan: Plan, probe: Probe | None) -> dict[str, Array] | None:
    """Statistics of the heads' outputs, from which their importance is computed; None unless the probe requests
    them."""
    if probe is None or not probe.measures:
        return None
    return {"heads": row_squares(y_bthk, docs, plan, "heads")}


@jax.named_scope("out_proj")
def _join(y_bthk: Array, out: nnx.Param, bias: nnx.Param | None, plan: Plan) -> Array:
    """The heads' outputs projected and summed over ranks; the bias is added once, to the sum."""
    y_btd = plan.leave(linear(y_bthk.reshape(*y_bthk.shape[:2], -1), out, plan, "attention_out"))
    return add_bias(y_btd, bias)
