"""The device mesh of a folding."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from orogen.config.checks import ConfigError, require
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.parallel.fold import Folding, describe
from orogen.parallel.runtime import asks_for_same_bits
from orogen.parallel.target import HOPPER, compute_capability, platform

# Backends whose devices have memory of their own, so that arrays can be offloaded to the host's.
HAS_HOST_MEMORY = ("gpu", "tpu")


def make_mesh(
    folding: Folding, config: PlanConfig, *, abstract: bool, devices: Sequence[Any] | None = None
) -> Mesh | AbstractMesh:
    """A mesh over the first of `devices` (None: of this process group), or an abstract one, which needs none.

    Raises ConfigError if there are too few devices, if a kernel of `config` needs a GPU, or one of another compute
    capability, or if XLA is asked for results that repeat to the bit and a kernel cannot give them.
    """
    names, sizes = zip(*(folding.axes or (("data", 1),)), strict=True)
    types = (AxisType.Auto,) * len(names)  # Explicit axes failed six of nine patterns with jax 0.10 and 0.11
    if abstract:
        return AbstractMesh(sizes, names, axis_types=types)
    backend = platform()
    for field, kernel in FOR_GPU.items():
        fits = getattr(config, field) != kernel or backend == "gpu"
        require(fits, config, field, f"another on {backend}: {kernel} needs an NVIDIA GPU")
    fits = config.grouped_matmul != FOR_GPU["grouped_matmul"] or compute_capability() in (None, HOPPER)
    require(fits, config, "grouped_matmul", f"blocks on a GPU of compute capability {compute_capability()}")
    # When XLA is asked for the same bits, cuDNN's gradient needs 9 GB for two rows of 8192 tokens and 32 heads of 128
    # (0.8 GB otherwise), 71 GB if they are packed, and a program with several such layers fails at run time (observed
    # on one H100 with jax 0.11.2).
    fits = config.attention != FOR_GPU["attention"] or not asks_for_same_bits()
    require(fits, config, "attention", "blocked where XLA is asked for the same bits (--xla deterministic)")
    for field in ("offload", "offload_optimizer"):
        fits = not getattr(config, field) or backend in HAS_HOST_MEMORY
        expected = f"{type(getattr(config, field))()!r} on {backend}: it has no memory besides the host's"
        require(fits, config, field, expected)
    found, needed = jax.devices() if devices is None else devices, config.devices
    if len(found) < needed:
        axes = describe([(axis, getattr(config, axis)) for axis in ("stage", "data", "context", "tensor")])
        raise ConfigError(
            f"PlanConfig asks for {needed} devices ({axes}); expected at most the {len(found)} that exist "
            f"(--fake_devices {needed} simulates them)"
        )
    return Mesh(np.asarray(found[:needed]).reshape(sizes), names, axis_types=types)
