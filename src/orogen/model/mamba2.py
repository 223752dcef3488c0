"""The Mamba-2 mixer (arXiv:2405.21060), as Megatron and Nemotron-H compute it.

Letters: b batch, t time, d model, i inner channels (heads x head size), c conv channels, h heads, p head size,
g groups, n state.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from orogen.config.model import ModelConfig
from orogen.kernels.causal_conv1d import causal_conv1d
from orogen.kernels.recompute import from_inputs
from orogen.kernels.ssd import ssd
from orogen.layers.documents import Documents
from orogen.layers.linear import add_bias, linear, linears_and_plain
from orogen.layers.norm import GroupRMSNorm
from orogen.layers.parameter import normal, parameter, uniform
from orogen.layers.probe import measuring, probe_of, row_squares
from orogen.model.cache import require_one_context_rank
from orogen.model.context_cache import with_inputs
from orogen.model.context_ssm import convolve, heads_for_sequence, ssd_over_parts
from orogen.parallel.context import to_tokens, whole
from orogen.parallel.plan import Plan

# The range of the initial time steps and their floor, the same in every Mamba-2 release.
TIME_STEP_MIN, TIME_STEP_MAX, TIME_STEP_FLOOR = 1e-3, 1e-1, 1e-4


class CausalConv(nnx.Module):
    """silu(depthwise causal convolution + bias); weight and bias from U(±1/√K) as PyTorch initialises them."""

    def __init__(self, config: ModelConfig, channels: int, axis: str, rngs: nnx.Rngs):
        self.taps = config.conv_kernel
        bound = self.taps**-0.5
        self.weight = uniform(rngs, (channels, self.taps), (axis, "taps"), bound=bound)
        self.bias = uniform(rngs, (channels,), (axis,), bound=bound) if config.use_conv_bias else None

    def __call__(
        self,
        x_btc: Array,
        segments_bt: Array,
        plan: Plan,
        halo_bkc: Array | None = None,
        halo_segments_bk: Array | None = None,
    ) -> Array:
        y_btc = causal_conv1d(
            x_btc,
            self.weight[...],
            None if self.bias is None else self.bias[...],
            segments_bt=segments_bt,
            halo_bkc=halo_bkc,
            halo_segments_bk=halo_segments_bk,
            activation="silu",
            implementation=plan.config.causal_conv1d,
        )
        return checkpoint_name(y_btc, "conv")


class Mamba2(nnx.Module):
    """z, x, B, C, dt = projections; y = SSD(silu(conv(x, B, C)), softplus(dt + bias)) + D x; out(norm(y · silu(z)))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, heads = config.hidden_size, config.mamba_num_heads
        inner, states = heads * config.mamba_head_dim, config.n_groups * config.ssm_state_size
        self.head_dim, self.state_size = config.mamba_head_dim, config.ssm_state_size
        self.chunk_size = config.chunk_size
        self.time_step_range = config.time_step_min, config.time_step_max
        project = lambda width, axis: normal(rngs, (size, width), ("embed", axis), std=config.init_std)  # noqa: E731
        self.z, self.x = project(inner, "mamba_heads"), project(inner, "mamba_heads")
        self.B, self.C = project(states, "groups"), project(states, "groups")
        self.dt = project(heads, "mamba_heads")
        self.z_bias, self.x_bias = (projection_bias(config, inner, "mamba_heads") for _ in range(2))
        self.B_bias, self.C_bias = (projection_bias(config, states, "groups") for _ in range(2))
        self.dt_proj_bias = projection_bias(config, heads, "mamba_heads")
        self.conv_x = CausalConv(config, inner, "mamba_heads", rngs)
        self.conv_B, self.conv_C = (CausalConv(config, states, "groups", rngs) for _ in range(2))
        self.dt_bias = parameter(initial_dt_bias(rngs, heads), ("mamba_heads",))
        self.A_log = parameter(
            jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=1, maxval=16)), ("mamba_heads",)
        )
        self.D = parameter(jnp.ones(heads), ("mamba_heads",))
        self.norm = GroupRMSNorm(inner, config.mamba_norm_groups or config.n_groups, config.layer_norm_epsilon)
        self.out = normal(rngs, (inner, size), ("mamba_heads", "embed"), std=config.output_init_std)
        self.out_bias = projection_bias(config, size, "norm")

    def __call__(self, x_btd: Array, docs: Documents, plan: Plan, given: Any = None) -> tuple[Array, Any]:
        """y (b, t, d), and what is kept. Given a cache of earlier tokens' windows and state, it continues from them and
        returns the updated cache; given a probe, it returns statistics."""
        probe, given = probe_of(given)
        require_one_context_rank(plan, given)
        with jax.named_scope("in_proj"):
            h_btd = plan.enter(x_btd)
            # dt has one column per head, too few for FP8 to gain anything, and decays are exponentials of it.
            wide = (self.z, self.x, self.B, self.C)
            projected = linears_and_plain(h_btd, wide, self.dt, plan, "mamba_in", call=1)
            biases = (self.z_bias, self.x_bias, self.B_bias, self.C_bias, self.dt_proj_bias)
            z_bti, x_bti, B_btc, C_btc, dt_bth = (
                checkpoint_name(add_bias(y, bias), "in_proj") for y, bias in zip(projected, biases, strict=True)
            )
        kept = {"mamba": row_squares(x_bti, docs, plan, "mamba_heads")} if measuring(probe) else None
        with jax.named_scope("conv"):
            convs, inputs = (self.conv_x, self.conv_B, self.conv_C), (x_bti, B_btc, C_btc)
            x_bti, B_btc, C_btc = convolve(convs, inputs, docs, plan, given)
        with jax.named_scope("ssd"):
            y_bti, state = self._scan((x_bti, B_btc, C_btc, dt_bth), docs, plan, given)
        with jax.named_scope("gated_norm"):
            y_bti = checkpoint_name(self.norm(y_bti, z_bti, plan), "gated_norm")
        with jax.named_scope("out_proj"):
            # The ranks' partial products are summed first, so that the bias is added once.
            y_btd = add_bias(plan.leave(linear(y_bti, self.out, plan, "mamba_out")), self.out_bias)
        if given is not None:
            kept = with_inputs(given, inputs, state, docs, plan, window=self.conv_x.taps - 1)
        return y_btd, kept

    def start(self, allocator: Any, dtype: Any) -> Any:
        """The cache before the first token; its size does not depend on the number of tokens."""
        channels = [conv.weight[...].shape[-2] for conv in (self.conv_x, self.conv_B, self.conv_C)]
        heads, size = self.D[...].shape[-1], self.state_size
        inputs = (heads, self.head_dim), (channels[1] // size, size), (heads,)
        return allocator.recurrent(self.conv_x.taps, channels, (heads, self.head_dim, size), inputs, dtype)

    def cache_axes(self, allocator: Any) -> Any:
        """The logical axes of what `start` makes."""
        inputs = ("mamba_heads", None), ("groups", None), ("mamba_heads",)
        return allocator.recurrent_axes(("mamba_heads", "groups", "groups"), ("mamba_heads", None, None), inputs)

    def _scan(self, inputs: tuple[Array, ...], docs: Documents, plan: Plan, given: Any) -> tuple[Array, Any]:
        """The SSD's output (b, t, i) from its inputs x, B, C and dt; and the state (b, h, p, n) after the last token,
        as the given cache stores it, or None without a cache."""
        x_bti, B_btc, C_btc, dt_bth = inputs
        segments_bt, state = docs.segments_bt, None
        split = lambda a, size: a.reshape(*a.shape[:2], -1, size)  # noqa: E731
        x_bthp = split(x_bti, self.head_dim)
        B_btgn, C_btgn = split(B_btc, self.state_size), split(C_btc, self.state_size)
        vectors = self.dt_bias[...], self.A_log[...], self.D[...]
        by_heads = plan.config.context_ssm == "heads" and plan.size("context") > 1
        if by_heads:
            x_bthp, B_btgn, C_btgn, dt_bth = heads_for_sequence((x_bthp, B_btgn, C_btgn, dt_bth), plan)
            segments_bt = whole(segments_bt, plan)
            vectors = tuple(plan.piece(v, "context", dim=0) for v in vectors)
        dt_bias_h, A_log_h, D_h = vectors
        dt_bth = from_inputs(self._time_step)(dt_bth, dt_bias_h)
        operands = (x_bthp, dt_bth, -jnp.exp(A_log_h), B_btgn, C_btgn)
        settings = {"skip_h": D_h, "chunk_size": self.chunk_size, "implementation": plan.config.ssd}
        if given is not None:
            y_bthp, state = given.ssd(operands, docs, plan, **settings)
        elif by_heads or plan.size("context") == 1:
            y_bthp, _ = ssd(*operands, segments_bt=segments_bt, **settings)
        else:
            y_bthp = ssd_over_parts(operands, D_h, segments_bt, plan, chunk_size=self.chunk_size).astype(x_bti.dtype)
        return (to_tokens(y_bthp, plan) if by_heads else y_bthp).reshape(x_bti.shape), state

    def _time_step(self, dt_bth: Array, bias_h: Array) -> Array:
        """softplus(dt + bias), float32, clipped if the config has bounds."""
        return jnp.clip(jax.nn.softplus(dt_bth.astype(jnp.float32) + bias_h), *self.time_step_range)


def projection_bias(config: ModelConfig, width: int, axis: str) -> nnx.Param | None:
    """A bias of zeros for a projection into or out of a mixer, or None if the model has no such biases."""
    return parameter(jnp.zeros(width), (axis,)) if config.mamba_proj_bias else None


def initial_dt_bias(rngs: nnx.Rngs, heads: int) -> Array:
    """softplus⁻¹ of time steps drawn log-uniformly: v + log(-expm1(-v))."""
    low, high = jnp.log(TIME_STEP_MIN), jnp.log(TIME_STEP_MAX)
    step_h = jnp.maximum(jnp.exp(jax.random.uniform(rngs.params(), (heads,), minval=low, maxval=high)), TIME_STEP_FLOOR)
    return step_h + jnp.log(-jnp.expm1(-step_h))
