"""State-space mixers over a sequence sharded over context ranks: halos, states passed on, or heads for sequence.

Letters: b batch, t time of this rank, s time of the whole sequence, p parts or head size, c channels, h heads,
g groups, n state, i inner channels of Mamba-1.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from orogen.kernels.selective_scan import selective_scan
from orogen.kernels.ssd import ssd
from orogen.kernels.ssd.passing import passed_on
from orogen.layers.documents import Documents
from orogen.parallel.context import at_start, continued, earlier, entering, joined, parts, to_heads
from orogen.parallel.plan import Plan


class Convolution(Protocol):
    """A causal convolution of `taps` tokens: (b, t, c) from x_btc. Tokens of other segments than a token's own do not
    contribute to it. halo_bkc, halo_segments_bk: the `taps` - 1 tokens before the first; None: zeros."""

    taps: int

    def __call__(
        self,
        x_btc: Array,
        segments_bt: Array,
        plan: Plan,
        halo_bkc: Array | None = None,
        halo_segments_bk: Array | None = None,
    ) -> Array: ...


def convolve(
    convs: Sequence[Convolution], arrays: Sequence[Array], docs: Documents, plan: Plan, given: Any = None
) -> list[Array]:
    """Each array (b, t, c) through its causal convolution, called with array, segments, plan, halo and its segments.

    One exchange for all arrays brings the tokens before each part. given: the cache of the tokens before the first.
    """
    before, segments_bt = convs[0].taps - 1, docs.segments_bt
    cached = given.halos(before, docs) if given is not None and before else None
    if cached is not None and plan.size("context") == 1:
        return [
            conv(x_btc, segments_bt, plan, halo_bkc, halo_segments_bk)
            for conv, x_btc, (halo_bkc, halo_segments_bk) in zip(convs, arrays, cached, strict=True)
        ]
    if plan.size("context") == 1 or not before:
        return [conv(x_btc, segments_bt, plan) for conv, x_btc in zip(convs, arrays, strict=True)]
    # Only the parts' last tokens are joined and sent.
    tails = [joined(parts(x_btc, plan)[:, -before:], plan) for x_btc in arrays]
    halo_bkc = earlier(jnp.concatenate(tails, -1), before, plan)
    halos = jnp.split(halo_bkc, np.cumsum([x_btc.shape[-1] for x_btc in arrays])[:-1], -1)
    halo_segments_bk, segments_bt = earlier(segments_bt, before, plan), parts(segments_bt, plan)
    if cached is not None:
        halos = [halo + at_start(of_cache, plan) for halo, (of_cache, _) in zip(halos, cached, strict=True)]
        halo_segments_bk += at_start(cached[0][1], plan)
    return [
        joined(conv(parts(x_btc, plan), segments_bt, plan, halo, halo_segments_bk), plan)
        for conv, x_btc, halo in zip(convs, arrays, halos, strict=True)
    ]


def ssd_over_parts(
    operands: tuple[Array, ...], skip_h: Array, segments_bt: Array, plan: Plan, *, chunk_size: int
) -> Array:
    """The outputs of `ssd` over the whole sequence, float32, from its first five arguments: each part by itself, plus
    what the states that enter the parts add. Only states move between ranks, so the bytes do not grow with the
    sequence."""
    y_bthp, passed_bth, final_bhpn = _ssd_apart(operands, skip_h, segments_bt, plan, chunk_size=chunk_size)
    passed_bth *= _continues(segments_bt, plan)[:, None, None]
    final_bhpn: Any = checkpoint_name(final_bhpn, "ssd_states")
    state_bhpn: Any = checkpoint_name(entering(passed_bth[:, -1, :, None, None], final_bhpn, plan), "ssd_states")
    return _ssd_together(y_bthp, passed_bth, state_bhpn, operands[-1], plan)


def ssd_continued(
    operands: tuple[Array, ...], start_bhpn: Array, plan: Plan, *, skip_h: Array, chunk_size: int, implementation: str
) -> tuple[Array, Array]:
    """`ssd` over the whole sequence, as one document that starts from the state `start_bhpn`, which every rank has:
    outputs in x's dtype, and the state after it, float32, on every rank. Padding takes steps of length zero."""
    if plan.size("context") == 1:
        settings = {"skip_h": skip_h, "chunk_size": chunk_size, "implementation": implementation}
        return ssd(*operands, initial_state_bhpn=start_bhpn, **settings)
    segments_bt = jnp.ones(operands[0].shape[:2], jnp.int32)
    y_bthp, passed_bth, final_bhpn = _ssd_apart(operands, skip_h, segments_bt, plan, chunk_size=chunk_size)
    decay_bhpn = passed_bth[:, -1, :, None, None]
    state_bhpn, after_bhpn = continued(decay_bhpn, final_bhpn, start_bhpn.astype(jnp.float32), plan)
    y_bthp = _ssd_together(y_bthp, passed_bth, state_bhpn, operands[-1], plan)
    return y_bthp.astype(operands[0].dtype), after_bhpn


def _ssd_apart(
    operands: tuple[Array, ...], skip_h: Array, segments_bt: Array, plan: Plan, *, chunk_size: int
) -> tuple[Array, Array, Array]:
    """Of each part by itself (b p, ...): outputs, how much of an entering state passes each token, and final states."""
    x_bthp, dt_bth, a_h, b_btgn, c_btgn = operands
    x_bthp, dt_bth, b_btgn, c_btgn, segments_bt = (
        parts(a, plan) for a in (x_bthp, dt_bth, b_btgn, c_btgn, segments_bt)
    )
    y_bthp, final_bhpn = ssd(
        x_bthp, dt_bth, a_h, b_btgn, c_btgn, segments_bt=segments_bt, skip_h=skip_h, chunk_size=chunk_size,
        implementation=plan.config.ssd,
    )  # fmt: skip
    return y_bthp, passed_on(dt_bth, a_h, segments_bt), final_bhpn


def _ssd_together(y_bthp: Array, passed_bth: Array, state_bhpn: Array, c_btgn: Array, plan: Plan) -> Array:
    """The outputs (b, t, ...) with what the states that enter the parts add to those of each part by itself."""
    c_btgn, (batch, time, heads, size) = parts(c_btgn, plan), y_bthp.shape
    state_bgrpn = state_bhpn.reshape(batch, c_btgn.shape[2], -1, size, c_btgn.shape[3])
    read_btgrp = jnp.einsum("btgn,bgrpn->btgrp", c_btgn.astype(jnp.float32), state_bgrpn)
    read_btgrp: Any = checkpoint_name(read_btgrp, "ssd")
    return joined(y_bthp + passed_bth[..., None] * read_btgrp.reshape(batch, time, heads, size), plan)


def scan_over_parts(operands: tuple[Array, ...], segments_bt: Array, plan: Plan, *, chunk_size: int) -> Array:
    """The outputs of `selective_scan` over the whole sequence, from its first five arguments. Each part is scanned
    twice, first for the state that it leaves, then with the state that enters it: computing only what that state adds
    would be as much elementwise work."""
    continues_b, segments_bt = _continues(segments_bt, plan), parts(segments_bt, plan)
    x_bti, dt_bti, A_in, B_btn, C_btn = _scanned_parts(operands, plan)
    settings = {"chunk_size": chunk_size, "implementation": plan.config.selective_scan}
    _, final_bin = selective_scan(x_bti, dt_bti, A_in, B_btn, C_btn, segments_bt=segments_bt, **settings)
    one_document_b = continues_b & jnp.all(segments_bt == segments_bt[:, :1], axis=1)
    decay_bin = jnp.exp(dt_bti.sum(1)[..., None] * A_in) * one_document_b[:, None, None]
    state_bin = entering(decay_bin, final_bin, plan) * continues_b[:, None, None]
    y_bti, _ = selective_scan(
        x_bti, dt_bti, A_in, B_btn, C_btn, segments_bt=segments_bt, initial_state_bin=state_bin, **settings
    )
    return joined(y_bti, plan)


def scan_continued(
    operands: tuple[Array, ...], start_bin: Array, plan: Plan, *, chunk_size: int, implementation: str
) -> tuple[Array, Array]:
    """`selective_scan` in the way of `ssd_continued`."""
    settings = {"chunk_size": chunk_size, "implementation": implementation}
    if plan.size("context") == 1:
        return selective_scan(*operands, initial_state_bin=start_bin, **settings)
    x_bti, dt_bti, A_in, B_btn, C_btn = _scanned_parts(operands, plan)
    _, final_bin = selective_scan(x_bti, dt_bti, A_in, B_btn, C_btn, **settings)
    state_bin, after_bin = continued(jnp.exp(dt_bti.sum(1)[..., None] * A_in), final_bin, start_bin, plan)
    y_bti, _ = selective_scan(x_bti, dt_bti, A_in, B_btn, C_btn, initial_state_bin=state_bin, **settings)
    return joined(y_bti, plan), after_bin


def _scanned_parts(operands: tuple[Array, ...], plan: Plan) -> tuple[Array, ...]:
    x_bti, dt_bti, A_in, B_btn, C_btn = operands
    x_bti, dt_bti, B_btn, C_btn = (parts(a, plan) for a in (x_bti, dt_bti, B_btn, C_btn))
    return x_bti, dt_bti, A_in, B_btn, C_btn


def heads_for_sequence(arrays: Sequence[Array], plan: Plan) -> list[Array]:
    """Each array (b, t, heads, ...) as this rank's share of its heads over the whole sequence (b, s, heads / c, ...).

    One all-to-all for all of them. If the ranks do not divide an array's heads, each head is repeated in place until
    they do: head i of 2h still reads group i // (2h / g).
    """
    ranks = plan.size("context")
    arrays = [jnp.repeat(a, math.lcm(a.shape[2], ranks) // a.shape[2], axis=2) for a in arrays]
    flat = [a.reshape(*a.shape[:2], ranks, -1) for a in arrays]
    together = to_heads(jnp.concatenate(flat, -1), plan)[:, :, 0]
    pieces = jnp.split(together, np.cumsum([f.shape[-1] for f in flat])[:-1], -1)
    return [p.reshape(*p.shape[:2], a.shape[2] // ranks, *a.shape[3:]) for p, a in zip(pieces, arrays, strict=True)]


def _continues(segments_bt: Array, plan: Plan) -> Array:
    """(b p,) whether the token before each part is in the same segment as the part's first."""
    return earlier(segments_bt, 1, plan)[:, 0] == parts(segments_bt, plan)[:, 0]
