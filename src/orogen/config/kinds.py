"""The kinds of layers: one row per letter of the pattern, through which everything that differs by letter is reached.

The row holds what configs need to know. It refers to objects of the packages above by name, `package.module:name`,
since this package imports none of them and configs are read without jax; these packages resolve the names
(`orogen.model.block.mixer_of`, `orogen.cost.kind.costs_of`).
"""

import functools
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError

# A product with a weight: the weight's kind (config/precision.py), and the number among the layer's products of the
# kind.
Product = tuple[str, int]


class Kind(NamedTuple):
    """A kind of layer.

    name: its name in messages.
    mixer: refers to a callable (ModelConfig, nnx.Rngs) -> the module.
    costs: refers to an `orogen.cost.kind.LayerCosts`: what the layer computes, holds and sends.
    needs, reads: fields of ModelConfig, separated by spaces: those that must be set, and the others that the layer
    reads. plan: fields of PlanConfig that only some layers read, this one among them.
    split: those of its fields whose size is split over `tensor`, which must divide it.
    taps: the field that holds the taps of its causal convolution; "": it has none.
    names: its intermediates (config/remat.py) with a description, without `input` and `norm`, which every layer has.
    selective: the names that `selective` recomputes.
    weights: its kinds of weight (config/precision.py); a mixture of experts may have more.
    products: the product that reads each of the mixer's weights, by the weight's name, for adapters and formats.
    units: refers to a table of `orogen.compress.slices`, the units along its parameters' axes; "": it cannot be pruned.
    """

    name: str
    mixer: str
    costs: str
    needs: str = ""
    reads: str = ""
    plan: str = ""
    split: str = ""
    taps: str = ""
    names: Mapping[str, str] = {}
    selective: frozenset[str] = frozenset()
    weights: tuple[str, ...] = ()
    products: Mapping[str, Product] = {}
    units: str = ""

    @property
    def fields(self) -> frozenset[str]:
        """The fields of ModelConfig and PlanConfig that only some layers read, these among them."""
        return _words(f"{self.needs} {self.reads} {self.plan}")


@functools.cache
def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ROTARY = (
    "attention_bias rope_theta partial_rotary_factor rope_interleave yarn_factor yarn_original_positions "
    "yarn_beta_fast yarn_beta_slow yarn_mscale yarn_mscale_all_dim yarn_truncate"
)
_ACTIVATION = "mlp_hidden_act mlp_gated swiglu_limit"
_BOTH_MAMBAS = "conv_kernel use_conv_bias mamba_proj_bias"

# Arrays of one kind share a name, in one layer and in several kinds of layers.
_PROJECTED = {
    "query": "queries as projected, before their norm and rotation",
    "key": "keys as projected, of `x` those of its images",
    "value": "values as projected, of `x` those of its images",
}
_CORE = {
    "core": "the softmax's output in the compute dtype, with the implementation `full`",
    "attention": "the attention core's output, and log-sum-exps of a fused or ring core",
}
_LATENT = {"latent": "the outputs of projections into a latent: MLA's, and a latent MoE's"}
_MAMBA = {
    "in_proj": "the projections of the input: gate, x, and of Mamba-2 B, C and dt",
    "conv": "the convolutions' outputs, activated",
}
_MLP = {
    "up": "the hidden units before the activation, those of a gate too",
    "activation": "the hidden units",
}
_BRANCH = {"branch": "the output before it is multiplied by the tanh of its gate"}

_MAMBA_PRODUCTS = {"z": ("mamba_in", 0), "x": ("mamba_in", 0), "out": ("mamba_out", 0)}
_ATTENTION_PRODUCTS = {
    "query": ("attention_in", 0), "key": ("attention_in", 0), "value": ("attention_in", 0),
    "out": ("attention_out", 0),
}  # fmt: skip

_ATTENTION = Kind(
    name="attention",
    mixer="orogen.model.attention:Attention",
    costs="orogen.cost.kinds.attention:COSTS",
    needs="num_attention_heads num_key_value_heads head_dim",
    reads=f"{_ROTARY} qk_norm attention_sinks",
    plan="attention context_attention",
    split="num_attention_heads",
    names={**_PROJECTED, **_CORE},
    selective=frozenset({"core"}),
    weights=("attention_in", "attention_out"),
    products=_ATTENTION_PRODUCTS,
    units="orogen.compress.slices:ATTENTION",
)

LAYERS: dict[str, Kind] = {
    "M": Kind(
        name="Mamba-2",
        mixer="orogen.model.mamba2:Mamba2",
        costs="orogen.cost.kinds.mamba2:COSTS",
        needs="mamba_num_heads mamba_head_dim n_groups ssm_state_size",
        reads=f"{_BOTH_MAMBAS} chunk_size mamba_norm_groups time_step_min time_step_max",
        plan="ssd causal_conv1d context_ssm",
        split="mamba_num_heads",
        taps="conv_kernel",
        names={
            **_MAMBA,
            "ssd": "what other tokens contribute to the SSD's outputs; with `triton` the whole outputs",
            "ssd_states": "the states that enter the chunks",
            "gated_norm": "the gated norm's output",
        },
        selective=frozenset({"conv", "ssd", "ssd_states", "gated_norm"}),
        weights=("mamba_in", "mamba_out"),
        products={**_MAMBA_PRODUCTS, "B": ("mamba_in", 0), "C": ("mamba_in", 0), "dt": ("mamba_in", 1)},
        units="orogen.compress.slices:MAMBA2",
    ),
    "m": Kind(
        name="Mamba-1",
        mixer="orogen.model.mamba1:Mamba1",
        costs="orogen.cost.kinds.mamba1:COSTS",
        needs="mamba_intermediate_size time_step_rank ssm_state_size",
        reads=_BOTH_MAMBAS,
        plan="selective_scan causal_conv1d context_ssm",
        split="mamba_intermediate_size",
        taps="conv_kernel",
        names={
            **_MAMBA,
            "x_proj": "the time step, B and C as projected from x",
            "scan": "the selective scan's output",
            "scan_states": "the states that enter its chunks",
            "gated": "the scan's output times the gate",
        },
        selective=frozenset({"conv", "scan", "scan_states", "gated"}),
        weights=("mamba_in", "mamba_out"),
        products=_MAMBA_PRODUCTS,
        units="orogen.compress.slices:MAMBA1",
    ),
    "*": _ATTENTION,
    "w": _ATTENTION._replace(
        name="sliding-window attention",
        mixer="orogen.model.attention:sliding_window",
        costs="orogen.cost.kinds.attention:SLIDING_WINDOW",
        needs=f"{_ATTENTION.needs} sliding_window",
    ),
    "+": Kind(
        name="multi-head latent attention",
        mixer="orogen.model.attention:LatentAttention",
        costs="orogen.cost.kinds.latent_attention:COSTS",
        needs="num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rope_theta",
        reads=f"{_ROTARY} q_lora_rank",
        plan="attention context_attention",
        split="num_attention_heads",
        names={**_PROJECTED, **_LATENT, **_CORE},
        selective=frozenset({"core"}),
        weights=("attention_in", "attention_out"),
        products={
            "query": ("attention_in", 0), "query_down": ("attention_in", 0), "latent_down": ("attention_in", 1),
            "key_rope": ("attention_in", 1), "key_up": ("attention_in", 2), "value_up": ("attention_in", 2),
            "query_up": ("attention_in", 3), "out": ("attention_out", 0),
        },
        units="orogen.compress.slices:LATENT",
    ),
    "-": Kind(
        name="dense MLP",
        mixer="orogen.layers.mlp:dense_mlp",
        costs="orogen.cost.kinds.mlp:COSTS",
        needs="intermediate_size",
        reads=f"mlp_bias {_ACTIVATION}",
        split="intermediate_size",
        names=_MLP,
        weights=("dense_up", "dense_down"),
        products={"up": ("dense_up", 0), "gate": ("dense_up", 0), "down": ("dense_down", 0)},
        units="orogen.compress.slices:MLP",
    ),
    "E": Kind(
        name="mixture of experts",
        mixer="orogen.moe.layer:MoE",
        costs="orogen.cost.kinds.experts:COSTS",
        needs="n_routed_experts num_experts_per_tok moe_intermediate_size",
        reads=f"mlp_bias {_ACTIVATION} moe_shared_expert_intermediate_size moe_shared_expert_gate moe_latent_size "
        "moe_bias router_score router_bias router_correction_bias norm_topk_prob routed_scaling_factor n_group "
        "topk_group router_aux_loss_coef router_balance router_z_loss_coef",
        plan="expert expert_tensor dispatch capacity_factor drop_policy buffer_factor grouped_matmul permutation",
        split="moe_shared_expert_intermediate_size",
        names={
            **_LATENT,
            "router": "the router's logits, float32",
            "routing": "where assignments go: experts, positions in the exchange, group sizes",
            "rows": "tokens permuted and sent to this rank's experts",
            "expert_up": "the experts' hidden units before the activation",
            "expert_activation": "the experts' hidden units",
            "expert_out": "the experts' outputs, sent back to the ranks that weight them",
            "combined": "the weighted sums of the experts' outputs",
            "shared_up": "the shared expert's hidden units before the activation",
            "shared_activation": "the shared expert's hidden units",
            "shared_out": "the shared expert's output and its gate, if it has one",
        },
        selective=frozenset({"expert_activation", "shared_activation"}),
        weights=("routed_up", "routed_down"),
        products={"latent_down": ("latent_down", 0), "latent_up": ("latent_up", 0)},
        units="orogen.compress.slices:EXPERTS",
    ),
    "x": Kind(
        name="gated cross-attention",
        mixer="orogen.model.cross_attention:GatedCrossAttention",
        costs="orogen.cost.kinds.cross_attention:COSTS",
        needs="num_attention_heads num_key_value_heads head_dim image_feature_size image_features resampler_latents "
        "resampler_layers",
        reads=f"{_ACTIVATION} retrieved_captions caption_tokens",
        split="num_attention_heads",
        names={**_PROJECTED, **_CORE, **_BRANCH},
        selective=frozenset({"core"}),
    ),
    "g": Kind(
        name="tanh-gated MLP",
        mixer="orogen.model.cross_attention:GatedMLP",
        costs="orogen.cost.kinds.mlp:TANH_GATED",
        needs="intermediate_size",
        reads=f"mlp_bias {_ACTIVATION}",
        split="intermediate_size",
        names={**_MLP, **_BRANCH},
        weights=("dense_up", "dense_down"),
    ),
}  # fmt: skip


def kind_of(letter: str) -> Kind:
    """The row of a letter. Raises ConfigError if there is none."""
    if letter not in LAYERS:
        raise ConfigError(f"{letter!r} is no kind of layer; expected one of {listed(LAYERS)}")
    return LAYERS[letter]


def listed(letters: Iterable[str]) -> str:
    """Letters and what they stand for: `M (Mamba-2), * (attention)`."""
    return ", ".join(f"{letter} ({LAYERS[letter].name})" for letter in letters)


def either(letters: Iterable[str]) -> str:
    """Letters as alternatives, for what a model lacks: `Mamba-2 (M) or attention (*)`."""
    return " or ".join(f"{LAYERS[letter].name} ({letter})" for letter in letters)


def reading(field: str) -> str:
    """The letters whose layers read a field of ModelConfig or PlanConfig; "" if no letters do, or all."""
    return "".join(letter for letter, kind in LAYERS.items() if field in kind.fields)


@functools.cache
def resolved(reference: str) -> Any:
    """The object that `package.module:name` refers to; its module is imported on the first call."""
    return pkgutil.resolve_name(reference)
