"""The Mamba-1 mixer (arXiv:2312.00752), as Hugging Face's `mamba` computes it.

Letters: b batch, t time, d model, i inner channels, r rank of the time step, n state.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from orogen.config.model import ModelConfig
from orogen.kernels.recompute import from_inputs
from orogen.kernels.selective_scan import selective_scan
from orogen.layers.documents import Documents
from orogen.layers.linear import add_bias, linear, linear_plain, linears
from orogen.layers.parameter import normal, parameter, uniform
from orogen.layers.probe import measuring, probe_of
from orogen.model.cache import require_one_context_rank
from orogen.model.context_cache import with_inputs
from orogen.model.context_ssm import convolve, scan_over_parts
from orogen.model.mamba2 import CausalConv, initial_dt_bias, projection_bias
from orogen.parallel.context import to_heads, to_tokens, whole
from orogen.parallel.plan import Plan
from orogen.parallel.varying import vary_like

# Tokens whose states the backward pass holds at once. Of 16, 32, 64 and 128, this is the fastest and needs the least
# memory on a CPU (b 2, t 1024, i 512, n 16).
CHUNK = 32


class Mamba1(nnx.Module):
    """x, z = projections; x = silu(conv(x)); dt, B, C = projections of x; out((scan(x, dt, B, C) + D x) · silu(z)).

    Each channel is a head of its own, sharded like Mamba-2's heads.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, inner = config.hidden_size, config.mamba_intermediate_size
        rank, state, std = config.time_step_rank, config.ssm_state_size, config.init_std
        self.x, self.z = (normal(rngs, (size, inner), ("embed", "mamba_heads"), std=std) for _ in range(2))
        self.x_bias, self.z_bias = (projection_bias(config, inner, "mamba_heads") for _ in range(2))
        self.conv = CausalConv(config, inner, "mamba_heads", rngs)
        project = lambda width: normal(rngs, (inner, width), ("mamba_heads", None), std=std)  # noqa: E731
        self.dt_down, self.B, self.C = project(rank), project(state), project(state)
        self.dt_up = uniform(rngs, (rank, inner), (None, "mamba_heads"), bound=rank**-0.5)
        self.dt_bias = parameter(initial_dt_bias(rngs, inner), ("mamba_heads",))
        rates_in = jnp.broadcast_to(jnp.arange(1.0, state + 1), (inner, state))
        self.A_log = parameter(jnp.log(rates_in), ("mamba_heads", "state"), float32=True)
        self.D = parameter(jnp.ones(inner), ("mamba_heads",))
        self.out = normal(rngs, (inner, size), ("mamba_heads", "embed"), std=config.output_init_std)
        self.out_bias = projection_bias(config, size, "norm")

    def __call__(self, x_btd: Array, docs: Documents, plan: Plan, given: Any = None) -> tuple[Array, Any]:
        """y (b, t, d), and what is kept. Given a cache of earlier tokens' window and state, it continues from them and
        returns the updated cache."""
        probe, given = probe_of(given)
        require_one_context_rank(plan, given)
        with jax.named_scope("in_proj"):
            h_btd = plan.enter(x_btd)
            projected = zip(linears(h_btd, (self.x, self.z), plan, "mamba_in"), (self.x_bias, self.z_bias), strict=True)
            x_bti, z_bti = (checkpoint_name(add_bias(y_bti, bias), "in_proj") for y_bti, bias in projected)
        with jax.named_scope("conv"):
            inputs = (x_bti,)
            (x_bti,) = convolve((self.conv,), inputs, docs, plan, given)
        with jax.named_scope("selective_scan"):
            y_bti, state = self._scan(x_bti, docs, plan, given)
        with jax.named_scope("gate"):
            y_bti = checkpoint_name(from_inputs(partial(_gated, dtype=x_btd.dtype))(y_bti, z_bti), "gated")
        with jax.named_scope("out_proj"):
            # The ranks' partial products are summed first, so that the bias is added once.
            y_btd = add_bias(plan.leave(linear(y_bti, self.out, plan, "mamba_out")), self.out_bias)
        kept = {} if measuring(probe) else None
        if given is not None:
            kept = with_inputs(given, inputs, state, docs, plan, window=self.conv.taps - 1)
        return y_btd, kept

    def start(self, allocator: Any, dtype: Any) -> Any:
        """The cache before the first token; its size does not depend on the number of tokens."""
        channels, state = self.A_log[...].shape[-2:]
        inputs = (channels,), (state,), (channels,)
        return allocator.recurrent(self.conv.taps, (channels,), (channels, state), inputs, dtype)

    def cache_axes(self, allocator: Any) -> Any:
        """The logical axes of what `start` makes."""
        inputs = ("mamba_heads",), (None,), ("mamba_heads",)
        return allocator.recurrent_axes(("mamba_heads",), ("mamba_heads", None), inputs)

    def _scan(self, x_bti: Array, docs: Documents, plan: Plan, given: Any) -> tuple[Array, Any]:
        """The scan's output plus D x (b, t, i), float32; and the state (b, i, n) after the last token, as the given
        cache stores it, or None without a cache."""
        segments_bt, state = docs.segments_bt, None
        # The time step's low-rank part, B and C are sums over all channels, of which each rank holds only its own.
        parts = tuple(linear_plain(x_bti, w, plan) for w in (self.dt_down, self.B, self.C))
        dt_btr, B_btn, C_btn = (checkpoint_name(a, "x_proj") for a in plan.sum(parts, "mamba_heads"))
        # The ranks' gradients of B and C are summed here, where they are smallest, once each.
        B_btn, C_btn = vary_like((B_btn, C_btn), x_bti)
        dt_bti = checkpoint_name(linear_plain(dt_btr, self.dt_up, plan), "x_proj")
        vectors = self.dt_bias[...], self.A_log[...], self.D[...]
        by_heads = plan.config.context_ssm == "heads" and plan.size("context") > 1
        if by_heads:  # each channel is a head
            x_bti, dt_bti = (to_heads(a, plan) for a in (x_bti, dt_bti))
            B_btn, C_btn, segments_bt = (whole(a, plan) for a in (B_btn, C_btn, segments_bt))
            vectors = tuple(plan.piece(v, "context", dim=0) for v in vectors)
        dt_bias_i, A_log_in, D_i = vectors
        step = from_inputs(lambda dt_bti, bias_i: jax.nn.softplus(dt_bti.astype(jnp.float32) + bias_i))
        operands = (x_bti, step(dt_bti, dt_bias_i), -jnp.exp(A_log_in), B_btn, C_btn)
        settings = {"chunk_size": CHUNK, "implementation": plan.config.selective_scan}
        if given is not None:
            y_bti, state = given.selective_scan(operands, docs, plan, **settings)
        elif by_heads or plan.size("context") == 1:
            y_bti, _ = selective_scan(*operands, segments_bt=segments_bt, **settings)
        else:
            y_bti = scan_over_parts(operands, segments_bt, plan, chunk_size=CHUNK)
        y_bti = from_inputs(lambda y_bti, x_bti, D_i: y_bti + D_i * x_bti)(y_bti, x_bti, D_i)
        return to_tokens(y_bti, plan) if by_heads else y_bti, state


def _gated(y_bti: Array, z_bti: Array, *, dtype: Any) -> Array:
    """y · silu(z), multiplied in float32."""
    return (y_bti * jax.nn.silu(z_bti.astype(jnp.float32))).astype(dtype)
