"""What a step's record says: the numbers that every task has, and those of its metrics; how parameters are named."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from orogen.config.run import RunConfig
from orogen.cost.flops import training_flops
from orogen.data.packing import Batch, document_lengths
from orogen.train.step import StepMetrics


def step_record(
    batch: Batch, metrics: StepMetrics, seconds: float, *, config: RunConfig, peak: float | None
) -> dict[str, Any]:
    """The record of a step that took `seconds`, without its number. peak: of one device, FLOP/s;
    None if it is not known."""
    tokens = int(metrics.tokens)
    record = {
        "objective": float(metrics.loss),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "step_ms": 1e3 * seconds,
        "grad_norm": float(metrics.grad_norm),
        "learning_rate": float(metrics.learning_rate),
        "skipped_steps": int(metrics.skipped),
    }
    if metrics.load_le.size:
        record |= {"expert_load": metrics.load_le.tolist(), "dropped_tokens": int(metrics.dropped)}
        if config.plan.buffer_factor is not None:
            record["overflow_rows"] = int(metrics.overflow)
    if peak:
        operations = training_flops(config.model, document_lengths(batch.segments_bt))
        if config.lora is not None:  # frozen weights have no gradient; the products with factors are not counted
            operations *= 2 / 3
        record["mfu"] = operations / seconds / config.plan.devices / peak
    means = {name: np.asarray(metric.mean, np.float64).tolist() for name, metric in metrics.metrics.items()}
    return joined(record, means)


def joined(record: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The union of both. Raises ValueError if they share a name."""
    if shared := record.keys() & more.keys():
        raise ValueError(f"a task's metric or score is named {sorted(shared)[0]!r}; expected a name that is not taken")
    return record | more


def leaf_name(params: nnx.State, index: int) -> str:
    """The path of the parameter that is leaf `index`."""
    path, _ = jax.tree_util.tree_leaves_with_path(params)[index]
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
