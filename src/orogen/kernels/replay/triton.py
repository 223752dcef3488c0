"""Replay and flush in one Triton kernel each, for NVIDIA GPUs: replay reads the state once and does not write it.

Axes: b batch, l entries of the ring, t new tokens, u new tokens that t reads, h heads, p head size, g groups, n state.

Tiling: the grid of both is (blocks of a head's p, heads, batch); a program holds so many numbers of a state in
registers as ELEMENTS says, or ELEMENTS_OF_MANY where that leaves enough programs, since each reads the ring anew. In
`replay` it also holds the ring and the piece (their x in its block of p, all of their B), and computes
one new token after the other by the formula of `parallel`: products over 1 to 8 tokens are too thin for tensor cores,
so all run in float32. Every program writes its block of the piece's x into the ring; the first program of a group also
writes B, and the first of a head dt. No program reads an entry that another writes: the ring is read up to the cursor,
and the piece from its own arrays. `flush` runs the recurrence over the ring in registers and writes the state once, in
place.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from orogen.kernels.pallas_triton import both, call, inside, load, require_gpu, store
from orogen.kernels.replay.operands import FlushOperands, Operands, Ring
from orogen.kernels.stochastic import random_bits, to_float16

# Of the state per program. Timed on an H200, R1's heads, a ring of 16: of 1,024 to 8,192 with 1 to 8 warps.
ELEMENTS, ELEMENTS_OF_MANY, WARPS = 4096, 8192, 4
MANY = 2048  # programs
FLUSH_ELEMENTS, FLUSH_WARPS = 2048, 2
STEP = 4  # entries of the ring that `flush` loads before it uses the first


class Sizes(NamedTuple):
    """Entries of the ring, tokens of the piece (0: none), head size, state size, heads per group, and how much of a
    head a program takes (`block`)."""

    entries: int
    tokens: int
    head: int
    state: int
    per_group: int
    block: int


def replay_triton(o: Operands, *, interpret: bool = False) -> tuple[Array, Ring]:
    """`replay` on an NVIDIA GPU; `interpret` runs the same kernel anywhere, slowly.

    Raises ValueError if there is no GPU and `interpret` is False.
    """
    require_gpu(interpret=interpret)
    elements = ELEMENTS_OF_MANY if o.state_bhpn.size >= MANY * ELEMENTS_OF_MANY else ELEMENTS
    sizes, spec = _specs(o.state_bhpn, o.ring, tokens=o.c_btgn.shape[1], elements=elements)
    operands = {
        "state": (o.state_bhpn, spec("state")),
        **{f"ring_{name}": (array, spec(f"ring_{name}")) for name, array in zip("xbd", o.ring, strict=True)},
        **{name: (array, spec(name)) for name, array in zip("xbd", o.piece, strict=True)},
        "c": (o.c_btgn, spec("b")),
        "a": (o.a_h, spec("of_head")),
        "skip": (o.skip_h, spec("of_head")),
        "cursor": (o.cursor_b, spec("of_row")),
        "active": (o.active_b.astype(jnp.int32), spec("of_row")),
    }
    outputs = {"y": (o.piece.x_blhp.shape, o.piece.x_blhp.dtype, spec("x"))}
    outputs |= {f"new_{k}": (a.shape, a.dtype, s) for k, (a, s) in operands.items() if k.startswith("ring")}
    results = _call(_replay_kernel, operands, outputs, sizes, warps=WARPS, interpret=interpret)
    return results["y"], Ring(*(results[f"new_ring_{name}"] for name in "xbd"))


def flush_triton(o: FlushOperands, *, interpret: bool = False) -> Array:
    """`flush` on an NVIDIA GPU, as `replay_triton`."""
    require_gpu(interpret=interpret)
    sizes, spec = _specs(o.state_bhpn, o.ring, tokens=0, elements=FLUSH_ELEMENTS)
    operands = {
        "state": (o.state_bhpn, spec("state")),
        **{f"ring_{name}": (array, spec(f"ring_{name}")) for name, array in zip("xbd", o.ring, strict=True)},
        "a": (o.a_h, spec("of_head")),
        # A sequence that is not flushed has no entry in use, so nothing is done.
        "cursor": (jnp.where(o.flush_b, o.cursor_b, 0), spec("of_row")),
    }
    if o.seeds_b2 is not None:
        operands |= {f"seed{k}": (o.seeds_b2[:, k], spec("of_row")) for k in range(2)}
    outputs = {"new_state": (o.state_bhpn.shape, o.state_bhpn.dtype, spec("state"))}
    return _call(_flush_kernel, operands, outputs, sizes, warps=FLUSH_WARPS, interpret=interpret)["new_state"]


def _specs(state_bhpn: Array, ring: Ring, *, tokens: int, elements: int) -> tuple[Sizes, Any]:
    """The sizes, and the block of each operand as a function of its name."""
    (_, heads, head, state), (_, entries, groups, _) = state_bhpn.shape, ring.b_blgn.shape
    power = pl.next_power_of_2
    wide, block = power(state), min(power(head), max(1, elements // power(state)))
    sizes = Sizes(entries, tokens, head, state, heads // groups, block)

    def spec(name: str) -> pl.BlockSpec:
        length, per_group = power(entries if name.startswith("ring") else max(tokens, 1)), sizes.per_group
        return {
            "state": pl.BlockSpec((None, None, block, wide), lambda p, h, b: (b, h, p, 0)),
            "x": pl.BlockSpec((None, length, None, block), lambda p, h, b: (b, 0, h, p)),
            "b": pl.BlockSpec((None, length, None, wide), lambda p, h, b: (b, 0, h // per_group, 0)),
            "d": pl.BlockSpec((None, length, None), lambda p, h, b: (b, 0, h)),
            "of_head": pl.BlockSpec((None,), lambda p, h, b: (h,)),
            "of_row": pl.BlockSpec((None,), lambda p, h, b: (b,)),
        }[name.removeprefix("ring_")]

    return sizes, spec


def _call(
    kernel,
    operands: dict[str, tuple[Array, Any]],
    outputs: dict[str, Any],
    sizes: Sizes,
    *,
    warps: int,
    interpret: bool,
) -> dict[str, Array]:
    """The outputs by name; an output called new_… overwrites the operand of that name."""
    batch, heads, *_ = operands["state"][0].shape
    return call(
        functools.partial(kernel, names=(*operands, *outputs), sizes=sizes),
        [array for array, _ in operands.values()],
        [spec for _, spec in operands.values()],
        outputs,
        grid=(pl.cdiv(sizes.head, sizes.block), heads, batch),
        warps=warps,
        in_place={k: list(operands).index(k.removeprefix("new_")) for k in outputs if k.startswith("new_")},
        interpret=interpret,
    )


class _Part(NamedTuple):
    """The ring or the piece: its tokens' x, B, dt and log decays, float32; zeros where there is no token."""

    x_sp: Array
    b_sn: Array
    dt_s: Array
    log_s: Array

    def after(self, last: Any) -> Array:
        """The sum of the log decays of the tokens after s, up to and including `last`. (s,)"""
        number_s = jnp.arange(len(self.dt_s))
        between_ss = (number_s[:, None] < number_s[None, :]) & (number_s[None, :] <= last)
        return jnp.sum(jnp.where(between_ss, self.log_s[None, :], 0.0), axis=1)

    def read(self, c_n: Array, log_s: Array) -> Array:
        """What the tokens add to the output that C reads, each decayed by its log. (p,)"""
        weight_s = jnp.exp(log_s) * self.dt_s * jnp.sum(self.b_sn * c_n[None, :], axis=1)
        return jnp.sum(weight_s[:, None] * self.x_sp, axis=0)


def _replay_kernel(*refs, names: tuple[str, ...], sizes: Sizes):
    ref = dict(zip(names, refs, strict=True))
    block, wide = ref["state"].shape
    part, head = pl.program_id(0), pl.program_id(1)
    in_p = inside(part * block + jnp.arange(block), sizes.head, block)
    in_n = inside(jnp.arange(wide), sizes.state, wide)
    active, cursor, a = ref["active"][...] != 0, ref["cursor"][...], ref["a"][...]

    def tokens(prefix: str, used_s: Array | None) -> _Part:
        read = lambda name, mask: load(ref[prefix + name], mask).astype(jnp.float32)  # noqa: E731
        dt_s = read("d", used_s)
        return _Part(read("x", both(used_s, in_p)), read("b", both(used_s, in_n)), dt_s, dt_s * a)

    @pl.when(active)
    def _():
        state_pn = load(ref["state"], both(in_p, in_n)).astype(jnp.float32)
        ring = tokens("ring_", jnp.arange(ref["ring_d"].shape[0]) < cursor)
        piece = tokens("", inside(jnp.arange(ref["d"].shape[0]), sizes.tokens, ref["d"].shape[0]))
        number_u = jnp.arange(len(piece.dt_s))
        whole, after_l = jnp.sum(ring.log_s), ring.after(sizes.entries)
        for t in map(np.int32, range(sizes.tokens)):
            c_n = load(ref["c"].at[t], in_n).astype(jnp.float32)
            upto = jnp.sum(jnp.where(number_u <= t, piece.log_s, 0.0))
            y_p = jnp.exp(whole + upto) * jnp.sum(state_pn * c_n[None, :], axis=1)
            y_p += ring.read(c_n, after_l + upto)
            y_p += piece.read(c_n, jnp.where(number_u <= t, piece.after(t), -jnp.inf))
            x_p = load(ref["x"].at[t], in_p).astype(jnp.float32)
            store(ref["y"].at[t], y_p + ref["skip"][...] * x_p, in_p)
            entry, fits = jnp.minimum(cursor + t, sizes.entries - 1), cursor + t < sizes.entries
            store(ref["new_ring_x"].at[entry], x_p, _where(fits, in_p, block))
            first = fits & (part == 0)
            b_n = load(ref["b"].at[t], in_n)
            store(ref["new_ring_b"].at[entry], b_n, _where(first & (lax.rem(head, sizes.per_group) == 0), in_n, wide))
            store(ref["new_ring_d"].at[entry], ref["d"][t], first)

    @pl.when(~active)
    def _():
        for t in map(np.int32, range(sizes.tokens)):
            store(ref["y"].at[t], jnp.zeros(block), in_p)


def _flush_kernel(*refs, names: tuple[str, ...], sizes: Sizes):
    ref = dict(zip(names, refs, strict=True))
    block, wide = ref["state"].shape
    channel_p = pl.program_id(0) * block + jnp.arange(block)
    first_of_head = pl.program_id(1) * sizes.head
    in_p, in_n = inside(channel_p, sizes.head, block), inside(jnp.arange(wide), sizes.state, wide)
    cursor, a = ref["cursor"][...], ref["a"][...]

    def step(number: Array, state_pn: Array) -> Array:
        tokens = []
        for k in range(STEP):
            used = number * STEP + k < cursor
            entry = jnp.minimum(number * STEP + k, sizes.entries - 1)
            x_p = load(ref["ring_x"].at[entry], _where(used, in_p, block)).astype(jnp.float32)
            b_n = load(ref["ring_b"].at[entry], _where(used, in_n, wide)).astype(jnp.float32)
            tokens.append((jnp.where(used, ref["ring_d"][entry], 0.0), x_p, b_n))
        for dt, x_p, b_n in tokens:
            state_pn = jnp.exp(dt * a) * state_pn + (dt * x_p)[:, None] * b_n[None, :]
        return state_pn

    @pl.when(cursor > 0)
    def _():
        state_pn = load(ref["state"], both(in_p, in_n)).astype(jnp.float32)
        state_pn = lax.fori_loop(0, lax.div(cursor + STEP - 1, STEP), step, state_pn)
        if "seed0" in ref:
            element_pn = (first_of_head + channel_p)[:, None] * sizes.state + jnp.arange(wide)
            state_pn = to_float16(state_pn, random_bits((ref["seed0"][...], ref["seed1"][...]), element_pn))
        store(ref["new_state"], state_pn, both(in_p, in_n))


def _where(condition: Array, mask: Array | None, size: int) -> Array:
    condition_c = jnp.broadcast_to(condition, (size,))
    return condition_c if mask is None else condition_c & mask
