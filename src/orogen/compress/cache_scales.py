"""The largest magnitudes of keys and values over calibration text, which become their scales in FP8.

The stack is given empty caches with room for all tokens of a batch, so its layers keep exactly what they would keep
while serving.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError, require
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.quantize import ATTENTION
from orogen.config.recipe import Scales
from orogen.data.packing import Batch
from orogen.layers.documents import Documents
from orogen.model.cache import KeyValues, Rows, caches, map_layers
from orogen.model.homes import homes
from orogen.parallel import placement
from orogen.precision.policy import working_copy
from orogen.precision.rounding import FORMATS
from orogen.precision.stored import float32_scale
from orogen.train.step import BATCH_AXES, batch_to_devices

LATENT = "+"


def cache_scales(opened: Opened, batches: Iterable[Batch], dtype: str = "float32") -> tuple[Scales | None, ...]:
    """By layer of the pattern, the scales of keys and of values: the largest magnitude of each over all tokens, heads
    and devices, over E4M3's largest number; None for layers without any. Latent attention has one scale for both.

    Raises ConfigError as `require_keys_and_values` does, and for numbers that are not finite.
    """
    require_keys_and_values(opened.config, opened.plan.config)
    main = opened.config.layers.main
    measured, params = _measuring(opened, dtype), placement.working(opened.params, opened.plan)
    total = np.zeros((len(main), 2), np.float32)
    for batch in batches:
        kept = jax.device_get(measured(params, opened.buffers, batch_to_devices(batch, opened.plan)))
        for number, home in enumerate(homes(opened.config)[: len(main)]):
            if home.letter in ATTENTION:
                tree: Any = kept
                for part in home.path:
                    tree = tree[part] if isinstance(part, int) else tree
                total[number] = np.maximum(total[number], tree[home.index])
    if not np.isfinite(total).all():
        raise ConfigError(f"layer {np.argwhere(~np.isfinite(total))[0][0]}: keys or values are not finite; expected "
                          "finite numbers")  # fmt: skip
    scale = lambda largest: float(float32_scale(largest, FORMATS["e4m3"].largest))  # noqa: E731
    pairs = ((pair.max(), pair.max()) if letter == LATENT else pair for letter, pair in zip(main, total, strict=True))
    found = ((scale(k), scale(v)) for k, v in pairs)
    return tuple(one if letter in ATTENTION else None for letter, one in zip(main, found, strict=True))


def require_keys_and_values(model: ModelConfig, plan: PlanConfig) -> None:
    """Raises ConfigError for a plan that splits sequences, and a model without attention."""
    require(plan.context == 1, plan, "context", "1 where keys and values are calibrated")
    if not set(model.layers.main) & set(ATTENTION):
        raise ConfigError("QuantizeConfig.key_values is 'fp8'; expected 'none': the model has no attention")


def _measuring(opened: Opened, dtype: str) -> Any:
    """The jitted function (parameters, buffers, batch) -> of each attention layer the largest magnitudes (2,), in the
    form of a stack's caches."""
    plan, built = opened.plan, opened.built

    def on_device(params: nnx.State, buffers: nnx.State, batch: Batch) -> Any:
        model = nnx.merge(built.graph, working_copy(params, dtype), buffers)
        docs = Documents(batch.segments_bt, batch.positions_bt)
        empty = plan.vary(model.backbone.start(Rows(*batch.tokens_bt.shape), jnp.dtype(dtype)))
        _, kept = model.hidden(batch.tokens_bt, docs, plan, empty)
        return map_layers(lambda one: _largest(one, plan), caches(kept))

    inputs = plan.specs(built.params), plan.specs(built.buffers), plan.spec(*BATCH_AXES)
    return jax.jit(plan.run(on_device, inputs=inputs, outputs=plan.spec()))


def _largest(kept: Any, plan: Any) -> Array | None:
    """(…, 2), after the axes of repetitions: the largest magnitudes of keys and values of tokens, not of padding."""
    if not isinstance(kept, KeyValues):
        return None

    def of(values: Array) -> Array:
        lead = kept.segments_bs.ndim - 2
        there = jnp.expand_dims(kept.segments_bs > 0, range(lead + 2, values.ndim))
        return jnp.max(jnp.where(there, jnp.abs(values.astype(jnp.float32)), 0), axis=range(lead, values.ndim))

    return plan.agreed(jnp.stack([of(values) for values in kept.values], axis=-1))
