"""What layers keep and multiply under a policy, from their traces, and what XLA allocates for stacks of them.

Letters: b batch, t time, d model.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.cost.activations import WEIGHTS, bytes_by_name, kept_by_layer
from orogen.cost.ledger import Workload
from orogen.layers.documents import Documents
from orogen.model.block import Repeat, Stack
from orogen.parallel.plan import make_plan
from orogen.simulate.jaxprs import product_flops
from orogen.simulate.units import unit_of

DEPTHS = (4, 8)  # of compiled stacks: both are loops, and one layer's share is a quarter of the difference


def kept_bytes(
    letters: str, model: ModelConfig, work: Workload, *, remat: Any, tensor: int = 1, stream: str = "time"
) -> dict[str, dict[str, int]]:
    """{letter: bytes by name that one device keeps of a layer}, in bfloat16."""
    plan = make_plan(PlanConfig(tensor=tensor, stream=stream, remat=remat), model, abstract=True)
    found = {}
    for letter in letters:
        found[letter] = bytes_by_name(kept_by_layer(letter, model, plan, work, dtype="bfloat16"))
        found[letter].pop(WEIGHTS, None)
    return found


def multiplied(letters: str, model: ModelConfig, work: Workload, *, remat: Any) -> int:
    """FLOPs of the matrix products of one layer per letter, forward and backward."""
    plan = make_plan(PlanConfig(remat=remat, grouped_matmul="ragged_dot"), model, abstract=True)
    total = 0
    for letter in letters:
        unit = unit_of(letter, model, plan, work, dtype="bfloat16")
        total += product_flops(jax.make_jaxpr(unit.function)(*unit.arguments).jaxpr)
    return total


def compiled(letters: str, model: ModelConfig, work: Workload, *, remat: Any, run: bool) -> dict[str, float]:
    """For one repetition of `letters` in a scanned stack, in float32 on one device: the temporary bytes that it adds
    and its operations as XLA counts them; with `run`, the seconds that four take forward and backward, and their
    gradients' norm.

    In float32, because XLA:CPU carries bfloat16 arrays through loops as float32. In a loop, because XLA:CPU of jax 0.10
    undoes recomputation in straight-line code; XLA counts a loop's body once.
    """
    programs = [_program(letters, model, work, remat, depth) for depth in DEPTHS]
    (small, arguments), (large, _) = programs
    temporary = [program.memory_analysis().temp_size_in_bytes for program in (small, large)]
    facts = {
        "temporary": (temporary[1] - temporary[0]) / (DEPTHS[1] - DEPTHS[0]),
        "flops": small.cost_analysis()["flops"],
    }
    return facts | (_run(small, arguments) if run else {})


def _program(letters: str, model: ModelConfig, work: Workload, remat: Any, depth: int) -> tuple[Any, Any]:
    plan = make_plan(PlanConfig(remat=remat), model)
    make = lambda: Stack((Repeat(tuple(letters), depth),), model, nnx.Rngs(0))  # noqa: E731
    graph, params, buffers = nnx.split(jax.eval_shape(make), nnx.Param, ...)

    def step(params, buffers, x_btd, tokens_bt, cotangent_btd):
        def forward(params, x_btd):
            return nnx.merge(graph, params, buffers)(x_btd, Documents(tokens_bt, tokens_bt), plan)[0]

        y_btd, back = jax.vjp(forward, params, x_btd)
        return y_btd, back(cotangent_btd)

    x_btd = jax.ShapeDtypeStruct((work.rows, work.tokens, model.hidden_size), jnp.float32)
    tokens_bt = jax.ShapeDtypeStruct((work.rows, work.tokens), jnp.int32)
    arguments = (params, buffers, x_btd, tokens_bt, x_btd)
    whole = plan.spec()
    return jax.jit(plan.run(step, inputs=whole, outputs=whole)).lower(*arguments).compile(), arguments


def _run(program: Any, arguments: Any) -> dict[str, float]:
    """Seconds of a second run, and the norm of all gradients, with weights drawn by numpy."""
    rng = np.random.default_rng(0)

    def draw(a: Any) -> np.ndarray:
        return rng.normal(0, 0.02, a.shape).astype(a.dtype) if a.dtype == jnp.float32 else np.ones(a.shape, a.dtype)

    arguments = jax.tree.map(draw, arguments)
    jax.block_until_ready(program(*arguments))
    start = time.perf_counter()
    _, grads = jax.block_until_ready(program(*arguments))
    seconds = time.perf_counter() - start
    squares = [float(np.sum(np.square(np.asarray(g, np.float64)))) for g in jax.tree.leaves(grads)]
    return {"seconds": seconds, "gradient_norm": sum(squares) ** 0.5}
