"""A dense model as a mixture of experts (arXiv:2410.07524).

Letters: d model, f hidden units of the dense MLP, s of one shard (f / granularity), c copies, g shards of a copy, e
experts, in the order (c, g).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from orogen.compress.rewrite import Arrays, Source
from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.config.upcycle import UpcycleConfig
from orogen.convert.names import Path as Leaf

DENSE, EXPERTS = "-", "E"
# By how much the output of an MLP without gate grows, as a power, if its first matrix grows.
DEGREES = {"relu2": 2, "relu": 1}


def upcycled_config(model: ModelConfig, upcycle: UpcycleConfig) -> ModelConfig:
    """The config of the upcycled model. Raises ConfigError for one that has no such experts."""
    chosen = chosen_layers(model, upcycle)
    if EXPERTS in _letters(model):
        raise ConfigError(f"ModelConfig.pattern is {model.pattern!r}; expected a model without experts")
    if model.mlp_bias:
        raise ConfigError("ModelConfig.mlp_bias is True; expected False: experts would add their biases several times")
    width, shards = model.intermediate_size, upcycle.granularity
    if width % shards:
        raise ConfigError(
            f"UpcycleConfig.granularity is {shards}; expected a divisor of ModelConfig.intermediate_size = {width}"
        )
    _factors(model, upcycle)
    numbers = iter(range(len(_letters(model))))
    pattern = "".join(c if c in "|/" else EXPERTS if next(numbers) in chosen else c for c in model.pattern)
    dense_left = DENSE in pattern
    return dataclasses.replace(
        model, pattern=pattern, intermediate_size=width if dense_left else None,
        n_routed_experts=upcycle.experts, num_experts_per_tok=upcycle.top_k, moe_intermediate_size=width // shards,
        moe_shared_expert_intermediate_size=upcycle.shared * width // shards or None,
        router_score=upcycle.router_score, norm_topk_prob=upcycle.norm_topk_prob,
        router_correction_bias=upcycle.router_correction_bias, router_aux_loss_coef=upcycle.router_aux_loss_coef,
    )  # fmt: skip


def chosen_layers(model: ModelConfig, upcycle: UpcycleConfig) -> set[int]:
    """The numbers of the layers that become experts. Raises ConfigError unless all of them are dense MLPs."""
    dense = {number for number, letter in enumerate(_letters(model)) if letter == DENSE}
    chosen = set(upcycle.layers) or dense
    if not chosen or not chosen <= dense:
        raise ConfigError(
            f"UpcycleConfig.layers is {upcycle.layers}; expected numbers of dense MLPs, which in "
            f"{model.pattern!r} are {sorted(dense)}"
        )
    return chosen


class Upcycled:
    """Makes the upcycled model's parameters from those of the dense one; see `rewrite`."""

    def __init__(self, source: Source, upcycle: UpcycleConfig):
        self._source, self._upcycle = source, upcycle
        self._chosen = chosen_layers(source.config, upcycle)

    def layer(self, number: int) -> Arrays:
        """The layer's parameters: copied, or an MLP's in experts with a router of its own."""
        arrays = self._source.layer(number).arrays()
        if number not in self._chosen:
            return arrays
        made = {name: array for name, array in arrays.items() if name[0] != "mixer"}
        first, second, shared = _factors(self._source.config, self._upcycle)
        up_df, down_fd = arrays["mixer", "up"], arrays["mixer", "down"]
        gate_df = arrays.get(("mixer", "gate"))
        made["mixer", "experts", "up"] = self._inward(up_df, first)
        made["mixer", "experts", "down"] = self._outward(down_fd, second)
        if gate_df is not None:
            made["mixer", "experts", "gate"] = self._inward(gate_df, 1.0)
        made |= self._router(number, len(up_df))
        if self._upcycle.shared:
            copies = self._upcycle.shared // self._upcycle.granularity
            made["mixer", "shared", "up"] = np.tile(up_df, (1, copies))
            made["mixer", "shared", "down"] = _times(np.tile(down_fd, (copies, 1)), shared)
            if gate_df is not None:
                made["mixer", "shared", "gate"] = np.tile(gate_df, (1, copies))
        return made

    def rest(self, path: Leaf) -> np.ndarray:
        """A parameter outside the layers: unchanged."""
        return self._source.read(path)

    def _inward(self, weight_df: np.ndarray, factor: float) -> np.ndarray:
        """(e, d, s)"""
        shards_gds = np.stack(np.split(weight_df, self._upcycle.granularity, axis=1))
        return _times(np.tile(shards_gds, (self._upcycle.expansion, 1, 1)), factor)

    def _outward(self, weight_fd: np.ndarray, factor: float) -> np.ndarray:
        """(e, s, d)"""
        shards_gsd = np.stack(np.split(weight_fd, self._upcycle.granularity, axis=0))
        return _times(np.tile(shards_gsd, (self._upcycle.expansion, 1, 1)), factor)

    def _router(self, number: int, size: int) -> Arrays:
        upcycle = self._upcycle
        groups = upcycle.expansion if upcycle.virtual_groups else upcycle.experts
        random = np.random.default_rng([upcycle.seed, number])
        gate_dc = random.normal(0.0, self._source.config.init_std, (size, groups)).astype(np.float32)
        gate_de = np.repeat(gate_dc, upcycle.experts // groups, axis=1)
        made: Arrays = {("mixer", "router", "gate"): gate_de}
        if upcycle.router_correction_bias:
            made["mixer", "router", "bias"] = np.zeros(upcycle.experts, np.float32)
        return made


def _factors(model: ModelConfig, upcycle: UpcycleConfig) -> tuple[float, float, float]:
    """What the first and the second matrix of the experts, and the second one of the shared expert, are multiplied by.

    Of the dense output, top_k experts that form whole copies give Σ weights / granularity, and the shared expert gives
    shared / granularity. Both together are scaled to 1 and contribute by their numbers of shards. The sum of weights is
    1 if they are normalised, otherwise top_k / experts, which it is if the router prefers none (equation 6, with
    expansion · granularity² / top_k).
    """
    if upcycle.scale == "none":
        return 1.0, 1.0, 1.0
    active = upcycle.top_k + upcycle.shared
    normalised = upcycle.router_score == "softmax_topk" or upcycle.norm_topk_prob
    weights = 1.0 if normalised else upcycle.top_k / upcycle.experts
    factor = upcycle.granularity / weights * upcycle.top_k / active
    shared = upcycle.granularity / active
    if upcycle.scale == "output":
        return 1.0, factor, shared
    degree = 1 if model.mlp_gated and model.swiglu_limit is None else DEGREES.get(model.mlp_hidden_act)
    if degree is None or model.swiglu_limit is not None:
        raise ConfigError(
            "UpcycleConfig.scale is 'both'; expected 'output' or 'none': the MLP is not homogeneous "
            f"(ModelConfig.mlp_hidden_act is {model.mlp_hidden_act!r}, swiglu_limit {model.swiglu_limit!r})"
        )
    root = math.pow(factor, 1 / (degree + 1))
    return root, root, shared


def _times(array: np.ndarray, factor: float) -> np.ndarray:
    """The product in float32, in the array's dtype."""
    return array if factor == 1.0 else (array.astype(np.float32) * np.float32(factor)).astype(array.dtype)


def _letters(model: ModelConfig) -> Sequence[str]:
    return model.layers.main + model.layers.mtp
