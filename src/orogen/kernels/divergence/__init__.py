"""The divergence of a model from its teacher, over a vocabulary that ranks may share; implementations by name.

`full` is plain jax with all logits at once; `chunked` computes loss and gradient together, some tokens at a time.
Axes: n tokens, d model, e teacher's model, v vocabulary of this rank, k tokens that the teacher finds most likely.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from orogen.kernels.checks import chosen, require_shapes
from orogen.kernels.cross_entropy.operands import Operands, Reduce
from orogen.kernels.divergence.chunked import distilled_chunked
from orogen.kernels.divergence.likely import most_likely
from orogen.kernels.divergence.operands import Distilled, Hidden, Likely, Mix
from orogen.kernels.divergence.reference import distilled_reference
from orogen.parallel.varying import vary_like

__all__ = ["IMPLEMENTATIONS", "Distilled", "Hidden", "Likely", "Mix", "distilled", "most_likely"]
IMPLEMENTATIONS = {"full": distilled_reference, "chunked": distilled_chunked}


def distilled(
    x_nd: Array,
    head_dv: Array,
    teacher: Hidden | Likely,
    targets_n: Array,
    weights_n: Array,
    *,
    mix: Mix,
    chunk: int,
    vocab_start: Array | int = 0,
    vocab_size: int | None = None,
    reduce_max: Callable[[Array], Array] = lambda x: x,
    reduce_sum: Callable[[Array], Array] = lambda x: x,
    implementation: str,
) -> Distilled:
    """Sums over tokens of weight times the mix's terms: the forward divergence KL(p || q) of the student q from the
    teacher p, and the negative log-likelihood of the target (arXiv:1503.02531, eq. 1 to 4, without the factor T²).

    Logits accumulate and softmaxes run in float32 whatever the inputs are. Arguments other than `teacher` and `mix`,
    and what they mean on one rank of the vocabulary, are those of `cross_entropy`; ranks combine float32 (n,) and
    (n, k). Only x and the student's head have a gradient. A token of weight 0 has a gradient of exactly zero if its
    teacher's numbers are finite. Raises ValueError if the shapes disagree or a name or size is unknown.
    """
    run = chosen(IMPLEMENTATIONS, implementation)
    _check(x_nd, head_dv, teacher, {"targets": targets_n, "weights": weights_n}, chunk)
    _check_mix(teacher, mix)
    weights_n = jax.lax.stop_gradient(weights_n.astype(jnp.float32))
    teacher = jax.lax.stop_gradient(teacher)
    # One varying type inside shard_map: see `cross_entropy`.
    x_nd, head_dv = vary_like((x_nd, head_dv), (x_nd, head_dv, targets_n, weights_n, vocab_start, teacher))
    present_v = None if vocab_size is None else jnp.arange(head_dv.shape[1]) + vocab_start < vocab_size
    operands = Operands(x_nd, head_dv, targets_n - vocab_start, present_v)
    found = run(operands, teacher, vocab_start, weights_n, mix=mix, chunk=chunk, reduce=Reduce(reduce_max, reduce_sum))
    return Distilled(found.total, *jax.lax.stop_gradient(found[1:]))


def _check(x_nd: Array, head_dv: Array, teacher: Hidden | Likely, by_token: dict[str, Array], chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least 1")
    if x_nd.ndim != 2 or head_dv.ndim != 2 or x_nd.shape[1] != head_dv.shape[0]:
        raise ValueError(f"x {x_nd.shape}, head {head_dv.shape}: expected (n, d) and (d, v)")
    expected = {name: (operand, x_nd.shape[:1]) for name, operand in by_token.items()}
    if isinstance(teacher, Hidden):
        width = teacher.x_ne.shape[-1]
        expected |= {"teacher's x": (teacher.x_ne, (len(x_nd), width))}
        expected |= {"teacher's head": (teacher.head_ev, (width, head_dv.shape[1]))}
    else:
        count = teacher.ids_nk.shape[-1]
        expected |= {name: (part, (len(x_nd), count)) for name, part in teacher._asdict().items()}
    require_shapes(expected, beside=f"x {x_nd.shape}")


def _check_mix(teacher: Hidden | Likely, mix: Mix) -> None:
    if mix.rest not in ("renormalize", "bucket"):
        raise ValueError(f"rest={mix.rest!r}: expected renormalize or bucket")
    if mix.rest == "bucket" and isinstance(teacher, Likely) and mix.temperature != 1:
        raise ValueError(f"temperature={mix.temperature}: expected 1, at which the mass of the rest is known")
