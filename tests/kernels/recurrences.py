"""What the tests of both state-space recurrences share: operands, documents, and what two outcomes may differ by.

Axes: b batch, t time; what comes after them is a recurrence's own.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax import Array
from jax import numpy as jnp
from tests.helpers import implementations
from tests.kernels.rounding import assert_within, tolerance

from orogen.kernels import selective_scan, ssd

CHUNK = 8
TIME = 43
# Documents of a row of 43 tokens, the rest of it padding: boundaries at a chunk border, one before and one after,
# documents of one token, and one over three chunks.
LENGTHS = {"around_the_border": (7, 1, 1, 8, 6, 15), "at_the_border": (8, 17, 1, 14), "one_token_each": (1,) * 9}


class Operands(NamedTuple):
    """What a recurrence is differentiated by, in the order of its arguments; the initial state is last."""

    x_bt: Array
    dt_bt: Array
    rates: Array
    b_bt: Array
    c_bt: Array
    initial_b: Array

    def between(self, start: int, stop: int) -> "Operands":
        """The tokens from `start` to before `stop`, and the same rates and initial state."""
        return self.of_tokens(lambda a_bt: a_bt[:, start:stop])

    def of_tokens(self, function: Callable[[Array], Array]) -> "Operands":
        """These, with `function` applied to each array that has an axis of time."""
        x_bt, dt_bt, b_bt, c_bt = map(function, (self.x_bt, self.dt_bt, self.b_bt, self.c_bt))
        return self._replace(x_bt=x_bt, dt_bt=dt_bt, b_bt=b_bt, c_bt=c_bt)

    def products(self) -> int:
        """In the longest sum: a state gathers over time, an output over the state, a gradient over both."""
        return self.b_bt.shape[1] * self.b_bt.shape[-1]


class Recurrence(NamedTuple):
    """A recurrence under test.

    shapes: of its operands, by sizes (h heads of p in g groups, or i channels; n of the state).
    extreme: what extreme steps may change, relative to the largest element.
    """

    function: Callable
    implementations: tuple[str, ...]
    reference: str
    initial_state: str
    shapes: Callable[..., Operands]
    extreme: float

    def operands(self, *, dt=(1e-3, 0.5), seed=0, **sizes) -> Operands:
        """Random ones, float32, with steps between those two."""
        rng = np.random.default_rng(seed)
        shapes = self.shapes(**sizes)
        steps_bt = np.exp(rng.uniform(*np.log(dt), shapes.dt_bt))
        x_bt, rates = rng.normal(size=shapes.x_bt), -rng.uniform(1, 16, shapes.rates)
        others = (rng.normal(size=shape) for shape in shapes[3:])
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), Operands(x_bt, steps_bt, rates, *others))

    def run(self, o: Operands, segments_bt=None, *, implementation: str, chunk_size: int = CHUNK):
        """Outputs and final state."""
        arguments = {"segments_bt": segments_bt, self.initial_state: o.initial_b, "chunk_size": chunk_size}
        return self.function(*o[:5], **arguments, implementation=implementation)

    def outcome(self, o: Operands, segments_bt: Array, *, weights=None, implementation: str, chunk_size: int = CHUNK):
        """Both results, and the gradient of their sums weighted by `weights`, random if None."""
        weights = random_weights(o) if weights is None else weights
        return _outcome(o, segments_bt, weights, self, implementation, chunk_size)


# Compiled once for all tests that have operands of the same shapes: interpreted kernels take seconds to lower.
@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _outcome(o, segments_bt, weights, recurrence, implementation, chunk_size):
    run = functools.partial(recurrence.run, implementation=implementation, chunk_size=chunk_size)
    return differentiate(lambda o: run(o, segments_bt), o, weights)


def random_weights(o: Operands) -> tuple[Array, Array]:
    """Of the outputs, in their dtype, and of the final state."""
    rng = np.random.default_rng(1)
    y_bt, final_b = (rng.normal(size=shape) for shape in (o.x_bt.shape, o.initial_b.shape))
    return jnp.asarray(y_bt, o.x_bt.dtype), jnp.asarray(final_b, jnp.float32)


def differentiate(function, operands, weights):
    """Both results of function(operands), and the gradient of their sums weighted by `weights`."""
    results, pullback = jax.vjp(function, operands)
    return results, *pullback(weights)


def _of_ssd(*, b=2, t=29, h=6, p=3, g=3, n=5) -> Operands:
    return Operands((b, t, h, p), (b, t, h), (h,), (b, t, g, n), (b, t, g, n), (b, h, p, n))  # pyright: ignore


def _of_selective_scan(*, b=2, t=29, i=6, n=5) -> Operands:
    return Operands((b, t, i), (b, t, i), (i, n), (b, t, n), (b, t, n), (b, i, n))  # pyright: ignore


SSD = Recurrence(
    function=ssd.ssd,
    implementations=tuple(ssd.IMPLEMENTATIONS),
    reference="recurrence",
    initial_state="initial_state_bhpn",
    shapes=_of_ssd,
    # An exponent is a difference of sums over a chunk, each term as low as -88 (exp is 0 below): eps of that much.
    extreme=float(jnp.finfo(jnp.float32).eps) * 88 * CHUNK,
)
SELECTIVE_SCAN = Recurrence(
    function=selective_scan.selective_scan,
    implementations=tuple(selective_scan.IMPLEMENTATIONS),
    reference="reference",
    initial_state="initial_state_bin",
    shapes=_of_selective_scan,
    extreme=tolerance(jnp.float32, terms=29 * 5),
)


def every_implementation(*, but: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Parameters `recurrence` and `implementation`: each of both recurrences, but those named."""
    return pytest.mark.parametrize(
        "recurrence, implementation",
        [
            pytest.param(recurrence, *param.values, marks=param.marks, id=f"{name_of(recurrence)}-{param.values[0]}")
            for recurrence in (SSD, SELECTIVE_SCAN)
            for param in implementations(name for name in recurrence.implementations if name not in but)
        ],
    )


def name_of(recurrence: Recurrence) -> str:
    return recurrence.function.__name__


def segments(lengths: tuple[int, ...], *, t: int = TIME, b: int = 2) -> Array:
    """Documents of these lengths and padding after them; the second row holds them in reverse."""
    rows = [np.repeat(np.arange(1, len(lengths) + 1), order) for order in (lengths, lengths[::-1])]
    return jnp.asarray([np.pad(rows[i % 2], (0, t - sum(lengths))) for i in range(b)])


def assert_close(got, want, limit: float) -> None:
    """`assert_within` that limit."""
    # A decay is at least about the smallest normal number: what sums of a few make of it a CPU flushes, a GPU keeps.
    on_gpu = jax.default_backend() == "gpu"
    assert_within(got, want, limit, least=8 * float(jnp.finfo(jnp.float32).tiny) if on_gpu else 0.0)
