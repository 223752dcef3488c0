"""The device mesh of a folding, and the check that a model's sizes divide over it."""

import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.parallel.fold import FoldError, Folding, describe, fold


def fold_plan(config: PlanConfig, model: ModelConfig) -> Folding:
    """The folding of `config` for `model`. Raises ConfigError if sizes do not fold or do not divide."""
    _check_divisible(config, model)
    cuts = {}
    norm_groups = model.mamba_norm_groups or model.n_groups
    split = (("kv_heads", model.num_key_value_heads), ("groups", model.n_groups), ("norm_groups", norm_groups))
    for name, pieces in split:
        if pieces is not None and pieces < config.tensor:
            cuts[name] = ("tensor", pieces)
    try:
        return fold(
            stage=config.stage,
            data=config.data,
            context=config.context,
            tensor=config.tensor,
            expert=config.expert,
            expert_tensor=config.expert_tensor,
            cuts=cuts,
        )
    except FoldError as error:
        raise ConfigError(f"PlanConfig: {error}") from None


def make_mesh(folding: Folding, config: PlanConfig, *, abstract: bool) -> Mesh | AbstractMesh:
    """A mesh over the first devices of this process group, or an abstract one, which needs none.

    Raises ConfigError if there are too few devices.
    """
    names, sizes = zip(*(folding.axes or (("data", 1),)), strict=True)
    types = (AxisType.Auto,) * len(names)  # Explicit axes fail six of the nine patterns probed on jax 0.10 and 0.11
    if abstract:
        return AbstractMesh(sizes, names, axis_types=types)
    devices, needed = jax.devices(), config.devices
    if len(devices) < needed:
        axes = describe([(axis, getattr(config, axis)) for axis in ("stage", "data", "context", "tensor")])
        raise ConfigError(
            f"PlanConfig asks for {needed} devices ({axes}); expected at most the {len(devices)} that exist "
            f"(--fake_devices {needed} simulates them)"
        )
    return Mesh(np.asarray(devices[:needed]).reshape(sizes), names, axis_types=types)


def _check_divisible(config: PlanConfig, model: ModelConfig) -> None:
    ranks = config.data * config.context
    replicas = ranks * config.tensor // math.gcd(ranks * config.tensor, config.expert * config.expert_tensor)
    checks = [
        ("vocab_size", "tensor", config.tensor),
        ("num_attention_heads", "tensor", config.tensor),
        ("intermediate_size", "tensor", config.tensor),
        ("mamba_num_heads", "tensor", config.tensor),
        ("mamba_intermediate_size", "tensor", config.tensor),
        ("moe_shared_expert_intermediate_size", "tensor", config.tensor),
        ("n_routed_experts", "expert", config.expert),
        ("moe_intermediate_size", "expert_tensor", config.expert_tensor),
    ]
    if config.context > 1:
        letters = set(model.layers.main + model.layers.mtp)
        ranks_of_heads = config.context * config.tensor
        exchanged = [
            ("num_attention_heads", "*w+", config.context_attention == "alltoall"),
            ("mamba_num_heads", "M", config.context_ssm == "heads"),
            ("mamba_intermediate_size", "m", config.context_ssm == "heads"),
        ]
        checks += [
            (field, "context x tensor", ranks_of_heads)
            for field, layers, asked in exchanged
            if asked and letters & set(layers)
        ]
    if config.fsdp != "none":
        checks += [(field, "data x context", ranks) for field in ("hidden_size", "q_lora_rank", "kv_lora_rank")]
        if model.n_routed_experts is not None:
            field = "moe_latent_size" if model.moe_latent_size else "hidden_size"
            checks.append((field, "expert_data", replicas))
    for field, axis, size in checks:
        value = getattr(model, field)
        if value is not None and value % size:
            raise ConfigError(
                f"ModelConfig.{field} is {value}; expected a multiple of PlanConfig.{axis} = {size} "
                f"(nearest legal {axis}: {_nearest_divisors(value, size)})"
            )
    for field in ("num_key_value_heads", "n_groups", "mamba_norm_groups"):
        value = getattr(model, field)
        tensor = config.tensor
        if value is not None and value % tensor and tensor % value:
            raise ConfigError(
                f"ModelConfig.{field} is {value}; expected a multiple or a divisor of PlanConfig.tensor = {tensor}"
            )


def _nearest_divisors(value: int, size: int) -> str:
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    return ", ".join(str(d) for d in sorted(sorted(divisors, key=lambda d: abs(math.log(d / size)))[:2]))
