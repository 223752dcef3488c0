"""The comparison of a student's hidden states with a teacher's: residual streams after pairs of layers.

Letters: b batch, t time, d student's model, e teacher's model.
"""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from orogen.config.checks import ConfigError, require
from orogen.config.distill import DistillConfig
from orogen.config.json_file import ListOf, Record, Whole, read_json
from orogen.config.model import ModelConfig
from orogen.config.run import RunConfig
from orogen.data.packing import Batch
from orogen.parallel.plan import Plan

PRUNING = "pruning.json"  # of `orogen prune`, in the folder of the pruned model
EPS = 1e-12  # of squared norms, so that vectors of zeros have a cosine
FORM = Record({"kept": Record({"hidden": (ListOf(Whole()), None)})})


def name(number: int) -> str:
    """The name in `Batch.extras` of the teacher's stream (b, t, d) of a pair, on the channels that are compared."""
    return f"teacher_stream_{number}"


def check_states(config: RunConfig, teacher: ModelConfig) -> None:
    """Raises ConfigError for pairs of layers, widths or plans whose hidden states cannot be compared."""
    distill, student = config.need("distill").distill, config.model
    for place, (who, model) in enumerate((("student", student), ("teacher", teacher))):
        layers, numbers = model.layers.main, [pair[place] for pair in distill.state_pairs]
        inside = not numbers or max(numbers) < len(layers)
        require(inside, distill, "states", f"numbers below {len(layers)}, the layers of the {who}")
        seen = not distill.states or "x" not in layers
        require(seen, distill, "states", f"() for a {who} with layers x, which are given images")
    if distill.states:
        expected = "1 with DistillConfig.states: hidden states of other stages do not reach the one with the losses"
        require(config.plan.stage == 1, config.plan, "stage", expected)
        channels_of(distill, teacher, student)


def channels_of(distill: DistillConfig, teacher: ModelConfig, student: ModelConfig) -> np.ndarray | None:
    """The teacher's channels that the student's are compared with, in their order; None: all. Raises ConfigError."""
    if distill.state_channels is None:
        expected = f"{teacher.hidden_size}, the teacher's, or DistillConfig.state_channels, the folder of a pruning"
        require(student.hidden_size == teacher.hidden_size, student, "hidden_size", expected)
        return None
    file = Path(distill.state_channels) / PRUNING
    found = read_json(file, FORM)["kept"]["hidden"]
    kept = list(range(teacher.hidden_size)) if found is None else found
    valid = len(set(kept)) == len(kept) == student.hidden_size and max(kept) < teacher.hidden_size
    if not valid:
        sizes = f"{student.hidden_size} different ones of the teacher's {teacher.hidden_size}"
        raise ConfigError(f"{file} keeps {len(kept)} channels of the residual stream; expected {sizes}")
    return None if found is None else np.array(kept)


def compared(streams: Sequence[Array], batch: Batch, weights_bt: Array, loss: str, plan: Plan) -> Array:
    """The scalar sum over this device's tokens of weight times the comparison, averaged over the pairs.

    cosine: 1 - cos of the two vectors. mse: their squared difference, averaged over channels. Float32. The teacher's
    streams are in the batch's extras, whole on every rank of `tensor`. Source: NVIDIA/Model-Optimizer,
    `HiddenStateCosineLoss` and `MSELoss`.
    """
    mine = lambda x: plan.deal(plan.own(x))  # noqa: E731
    weight_bt, total = mine(weights_bt), jnp.zeros(())
    for number, stream_btd in enumerate(streams):
        student, teacher = plan.deal(stream_btd).astype(jnp.float32), mine(batch.extras[name(number)])
        apart = _cosine if loss == "cosine" else _square
        total += jnp.sum(weight_bt * apart(student, lax.stop_gradient(teacher).astype(jnp.float32)))
    return total / len(streams)


def _square(one_btd: Array, other_btd: Array) -> Array:
    return jnp.mean(jnp.square(one_btd - other_btd), axis=-1)


def _cosine(one_btd: Array, other_btd: Array) -> Array:
    inner = lambda a, b: jnp.sum(a * b, axis=-1)  # noqa: E731
    squares_bt = (inner(one_btd, one_btd) + EPS) * (inner(other_btd, other_btd) + EPS)
    return 1 - inner(one_btd, other_btd) * lax.rsqrt(squares_bt)
