"""cuDNN's attention to one block of keys, with the log-sum-exps by which blocks are merged.

Axes: b batch, t queries, s keys, h query heads, g key heads, k head size.
"""

from typing import Any, NamedTuple

from jax import Array
from jax import numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # jax.nn gives no log-sum-exps to a gradient
from jax._src.cudnn.fused_attention_stablehlo import AttentionLayout, MaskType

from orogen.kernels.attention.cudnn import DROPOUT, NO_BIAS, SEED, require_gpu, require_half_precision
from orogen.parallel.varying import vary_like


class Lengths(NamedTuple):
    """How many of each row's first queries and of its first keys see each other, int32 (b,), all at least 1."""

    q_b: Array
    k_b: Array


class Softmax(NamedTuple):
    """The queries' outputs (b, t, h, k) over the keys of all blocks, their cotangents, and their log-sum-exps float32
    (b, t, h)."""

    y_bthk: Array
    dy_bthk: Array
    lse_bth: Array


def attend_cudnn(
    qkv: tuple[Array, Array, Array], lengths: Lengths | None, *, causal: bool, scale: float
) -> tuple[Array, Array]:
    """The queries' outputs over these keys alone (b, t, h, k), in their dtype, and log-sum-exps float32 (b, t, h).

    causal: query i sees keys 0 to i. Without lengths, all queries and keys count. Rows beyond the lengths are
    undefined. Raises ValueError without a GPU, and for other dtypes than bfloat16 and float16.
    """
    require_gpu()
    require_half_precision(*qkv)
    mask, mask_operands = _mask(qkv[0], lengths, causal)
    rule: Any = cudnn._dot_product_attention_fwd_rule  # its arguments are those of jax 0.11
    y_bthk, residuals = rule(
        *qkv, *mask_operands, scale, SEED, DROPOUT, NO_BIAS, mask, AttentionLayout.BTNH.value, None,
        cudnn.check_cudnn_version(), False,
    )  # fmt: skip
    return vary_like((y_bthk, jnp.swapaxes(residuals[-2], 1, 2)), (qkv, lengths))


def pull_cudnn(
    qkv: tuple[Array, Array, Array], softmax: Softmax, lengths: Lengths | None, *, causal: bool, scale: float
) -> tuple[Array, Array, Array]:
    """This block's share of the gradients of q, k and v, in their dtype.

    Shares add up, since a probability is exp(score - lse) with the log-sum-exp over all blocks, and the gradient of its
    score is p (dy · v - dy · y) with the output over all blocks. Rows beyond the lengths are undefined.
    """
    mask, mask_operands = _mask(qkv[0], lengths, causal)
    statistics_bht = jnp.swapaxes(softmax.lse_bth, 1, 2)
    residuals = (*qkv, *mask_operands, statistics_bht, softmax.y_bthk)
    layout = AttentionLayout.BTNH.value
    gradients = cudnn._dot_product_attention_bwd_rule(
        scale, SEED, DROPOUT, NO_BIAS, mask, layout, None, True, False, residuals, softmax.dy_bthk
    )
    return vary_like(tuple(gradients[:3]), (qkv, softmax, lengths))


def _mask(q_bthk: Array, lengths: Lengths | None, causal: bool) -> tuple[MaskType, tuple[Array, ...]]:
    """cuDNN's mask and its operands from the bias on: bias, lengths and starts of queries and keys, two page tables."""
    none = jnp.zeros(0, q_bthk.dtype)
    if lengths is None:
        return (MaskType.CAUSAL if causal else MaskType.NO_MASK), (none,) * 7
    mask = MaskType.PADDING_CAUSAL if causal else MaskType.PADDING
    return mask, (none, lengths.q_b, lengths.k_b, none, none, none, none)
