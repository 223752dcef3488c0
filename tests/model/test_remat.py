"""What each policy of recomputation keeps, byte for byte; what it multiplies again; that gradients do not change."""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.extend import core
from tests.model.small import config, one_device, randomised, relative_error

from orogen.config.checks import ConfigError
from orogen.config.kinds import LAYERS
from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.config.remat import names_of
from orogen.cost.activations import WEIGHTS, activation_bytes, bytes_by_name, kept_by_layer
from orogen.cost.kept import kept_bytes
from orogen.cost.ledger import Workload
from orogen.cost.local import local
from orogen.kernels.grouped_matmul import mosaic
from orogen.layers.documents import documents
from orogen.model.block import Stack
from orogen.model.cross_attention import GatedCrossAttention, Images
from orogen.model.remat import FUSED
from orogen.parallel.plan import make_plan
from orogen.precision.fp8 import E4M3
from orogen.simulate.jaxprs import product_flops
from orogen.simulate.units import unit_of

ROWS, TOKENS = 3, 20
VECTORS = 5  # of a row's images
HALF, SINGLE, WHOLE = 2, 4, 4  # bytes of bfloat16, float32 and int32
EXTRA: dict[str, Any] = {
    "sliding_window": 3, "head_dim": 6, "rope_theta": 30.0, "kv_lora_rank": 7, "q_lora_rank": 9, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 3, "image_feature_size": 3, "image_features": 2, "resampler_latents": 5,
    "resampler_layers": 1,
}  # fmt: skip


def every(letter: str, **changes: Any) -> ModelConfig:
    """A model whose one layer is of `letter`, with all that its type can have."""
    gate = {"moe_shared_expert_gate": True} if letter == "E" else {}
    return config(**{"pattern": letter, "mtp_depths": 0, **(EXTRA if letter in "w+x" else {}), **gate, **changes})


def paper_layer(**changes: Any) -> ModelConfig:
    """The Transformer layer of arXiv:2205.05198: keys as many as queries, hidden units four times the width."""
    sizes = {
        "pattern": "*-", "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6,
        "intermediate_size": 96, "norm": "layer", "attention_bias": "all", "mlp_hidden_act": "gelu_tanh",
        "mlp_bias": True, "mtp_depths": 0, "vocab_size": 32,
    }  # fmt: skip
    return ModelConfig(**(sizes | changes))


@pytest.fixture(autouse=True)
def _layers_are_given_images(monkeypatch):
    """Two images in each row, in the dtype of its tokens. Without them cross-attention (x) computes nothing."""
    honest = GatedCrossAttention.__call__

    def seeing(self, x_btd, docs, plan, given=None):
        image_bt, image_bn = jnp.ones(x_btd.shape[:2], jnp.int32), jnp.ones((x_btd.shape[0], VECTORS), jnp.int32)
        images = Images(jnp.ones((*image_bn.shape, x_btd.shape[2]), x_btd.dtype), image_bn, image_bt)
        return honest(self, x_btd, docs, plan, images)

    monkeypatch.setattr(GatedCrossAttention, "__call__", seeing)


@functools.cache
def kept(letter: str, model: ModelConfig, remat: Any, *, dtype: str = "bfloat16", **plan: Any):
    sizes = PlanConfig(remat=remat, **plan)
    work = Workload(ROWS, TOKENS, HALF)
    return kept_by_layer(letter, model, make_plan(sizes, model, abstract=True), work, dtype=dtype)


def transformer_bytes(model: ModelConfig, remat: Any, **plan: Any) -> int:
    return sum(activation_bytes(kept(letter, model, remat, **plan)) for letter in "*-")


@pytest.mark.parametrize("ranks", (1, 2, 4))
def test_a_transformer_layer_keeps_the_bytes_of_the_papers_formulas(ranks):
    """Table 2 of arXiv:2205.05198 without dropout's masks: sbh (32 + 2as/h) / t, its selective and full rows."""
    model = paper_layer()
    s, b, h, a = TOKENS, ROWS, model.hidden_size, model.num_attention_heads
    expected = {"paper": s * b * h * 32 + 2 * a * s * s * b, "selective": 32 * s * b * h, "full": 2 * 2 * s * b * h}
    found = {remat: transformer_bytes(model, remat, tensor=ranks) for remat in expected}
    assert found == {remat: size / ranks for remat, size in expected.items()}


def test_plain_autodiff_keeps_no_more_than_the_formula_on_one_rank():
    model = paper_layer()
    assert transformer_bytes(model, "none") == transformer_bytes(model, "paper")


def test_attention_by_name_with_fewer_keys():
    model, tokens = every("*"), ROWS * TOKENS
    queries, keys = 4 * 5, 2 * 5
    assert bytes_by_name(kept("*", model, "paper")) == {
        "core": HALF * 4 * TOKENS * tokens,
        "query": HALF * queries * tokens,
        "attention": HALF * queries * tokens,
        "input": HALF * 12 * tokens,
        "norm": HALF * 12 * tokens,
        "key": HALF * keys * tokens,
        "value": HALF * keys * tokens,
    }


def test_cross_attention_by_name():
    """As by its formula, for one image per row."""
    model, tokens = every("x"), ROWS * TOKENS
    queries, keys = 4 * 6, 2 * 6
    expected = {
        "core": HALF * 4 * VECTORS * tokens,
        "query": HALF * queries * tokens,
        "attention": HALF * queries * tokens,
        "branch": HALF * 12 * tokens,
        "input": HALF * 12 * tokens,
        "norm": HALF * 12 * tokens,
        "key": HALF * keys * VECTORS * ROWS,
        "value": HALF * keys * VECTORS * ROWS,
    }
    assert bytes_by_name(kept("x", model, "paper")) == expected
    sizes = local(model, PlanConfig(remat="paper"), Workload(ROWS, TOKENS, HALF))
    assert kept_bytes("x", sizes) == (expected, 0)


def test_mamba2_by_name():
    model, tokens = every("M"), ROWS * TOKENS
    inner, states, heads, chunks = 6 * 3, 2 * 7, 6, ROWS * TOKENS // 4
    assert bytes_by_name(kept("M", model, "paper")) == {
        "in_proj": HALF * (2 * inner + 2 * states + heads) * tokens,
        "ssd_states": SINGLE * inner * 7 * chunks,
        "conv": HALF * (inner + 2 * states) * tokens,
        "ssd": 2 * SINGLE * inner * tokens,  # the output, and its part that comes from the states
        "gated_norm": HALF * inner * tokens,
        "input": HALF * 12 * tokens,
        "norm": HALF * 12 * tokens,
    }


def test_a_latent_moe_by_name():
    model, tokens = every("E"), ROWS * TOKENS
    rows = 3 * tokens
    assert bytes_by_name(kept("E", model, "paper")) == {
        "rows": HALF * 9 * rows,
        "expert_out": HALF * 9 * rows,
        "expert_up": HALF * 8 * rows,
        "expert_activation": HALF * 8 * rows,
        "routing": WHOLE * (3 * tokens + 3 * tokens + rows + 6 + ROWS * 6),
        "input": HALF * 12 * tokens,
        "norm": HALF * 12 * tokens,
        "router": SINGLE * 6 * tokens,
        "shared_out": HALF * (12 + 1) * tokens,
        "shared_up": HALF * 10 * tokens,
        "shared_activation": HALF * 10 * tokens,
        "combined": HALF * 9 * tokens,
    }


def test_a_latent_moe_by_what_makes_it(monkeypatch):
    """Products, the router's sorting and what kernels read; of the router's product in three parts the sum alone."""
    monkeypatch.setattr("orogen.moe.dispatch.FEW", 0)  # as many assignments as in training are sorted
    tokens = ROWS * TOKENS
    assert bytes_by_name(kept("E", every("E"), "elementwise")) == {
        "input": HALF * 12 * tokens,
        "router": SINGLE * 6 * tokens,
        "expert_activation": HALF * 8 * 3 * tokens,
        "unnamed": HALF * (9 + 10 + 12 + 1) * tokens + WHOLE * (4 + 3 + 3) * tokens,
    }


@pytest.mark.parametrize("letter", LAYERS)
def test_all_that_a_layer_keeps_has_a_name_and_every_name_is_kept(letter):
    """But for a router's smaller names, which its gradient may not need, as long as larger ones are there."""
    found = {name for name in bytes_by_name(kept(letter, every(letter), "paper")) if name != WEIGHTS}
    expected = set(names_of(letter))
    assert expected - found <= {"latent"}, expected - found  # a latent MoE's, of which the rows are a copy
    assert found <= expected


@pytest.mark.parametrize("letter", LAYERS)
def test_names_are_in_the_layers_that_they_are_said_to_be_in(letter):
    unit = layer_jaxpr(letter, every(letter), "none")
    assert set(names_in(unit)) == set(names_of(letter))


@pytest.mark.parametrize(
    ("letter", "name"),
    [(letter, name) for letter in LAYERS for name in names_of(letter)],
)
def test_a_name_that_is_made_again_is_not_kept_and_the_others_are(letter, name):
    if name == "input":
        return
    every_name = bytes_by_name(kept(letter, every(letter), "paper"))
    found = bytes_by_name(kept(letter, every(letter), f"{letter}:{name}"))
    every_name.pop(name, None)
    assert {n: size for n, size in found.items() if n != "latent"} == {
        n: size for n, size in every_name.items() if n != "latent"
    }


def layer_jaxpr(letter: str, model: ModelConfig, remat: Any, **plan: Any) -> core.Jaxpr:
    """Forward and backward of one layer; experts by an operation whose turns are known."""
    sizes = PlanConfig(remat=remat, **{"grouped_matmul": "ragged_dot", **plan})
    unit = unit_of(letter, model, make_plan(sizes, model, abstract=True), Workload(ROWS, TOKENS), dtype="bfloat16")
    return jax.make_jaxpr(unit.function)(*unit.arguments).jaxpr


def names_in(jaxpr: Any):
    return (equation.params["name"] for equation in equations(jaxpr) if equation.primitive.name == "name")


def equations(jaxpr: Any):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
                    yield from equations(inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner)


@pytest.fixture
def gpu_kernels(monkeypatch):
    """Kernels for GPUs can be traced, though not run."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(mosaic, "_require_hopper", lambda: None)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda *_: 91400)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda *_: False)


@pytest.mark.usefixtures("gpu_kernels")
@pytest.mark.parametrize("linear", ("plain", "fp8"))
@pytest.mark.parametrize("letter", LAYERS)
def test_elementwise_runs_no_kernel_for_gpus_twice(letter, linear):
    """And no derivative rule of theirs holds a constant array, which JAX does not take where some operands alone stand
    behind a barrier."""
    heads = {"head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
    kernels = {**FOR_GPU, "linear": linear}
    if letter == "w":
        kernels["attention"] = "full"  # cuDNN takes no window
    if jax.__version_info__ < (0, 11):
        kernels["grouped_matmul"] = "blocks"  # the Mosaic kernels need jax 0.11

    def count(remat):
        found = collections.Counter(e.primitive.name for e in equations(layer_jaxpr(letter, model, remat, **kernels)))
        return {name: turns for name, turns in found.items() if name in FUSED or "attention" in name}

    model = every(letter, **(heads if letter in "*+" else {}))
    once = count("none")
    assert once
    assert count("elementwise") == once
    if linear == "plain" or letter == "*":  # whether more turns would be seen
        twice = count("full")
        assert all(
            twice[name] > once[name] for name in set(once) & {"pallas_call", "dot_product_attention_fwd_wrapper"}
        )


@pytest.mark.usefixtures("gpu_kernels")
@pytest.mark.parametrize(
    ("remat", "plan", "experts", "shared"),
    [
        ("full", {}, {False}, {False}), ("full", {"fsdp": "optimizer"}, {False}, {False}),
        ("full", {"fsdp": "parameters"}, {True}, {True}), ("full", {"linear": "fp8"}, {True}, {True}),
        ("full", {"linear": "fp8", "quantize": "triton"}, {True}, {True}),
        ("elementwise", {}, {False}, {False}), ("elementwise", {"linear": "fp8"}, {True}, {True}),
        ("elementwise", {"linear": "fp8", "quantize": "triton"}, {False}, set()),
    ],
)  # fmt: skip
def test_weights_stand_before_no_barrier_unless_much_is_made_of_them(remat, plan, experts, shared):
    """Behind one XLA copies them out of their stack; without, it would keep what FSDP gathers, or FP8 rounds. What a
    kernel rounded is kept, so that nothing is made of the shared expert's weights again."""
    model = every("E")
    jaxpr = layer_jaxpr("E", model, remat, **plan, grouped_matmul="blocks")
    (again,) = (e for e in equations(jaxpr) if type(e.params.get("prevent_cse")) is tuple)
    barred = zip((v.aval for v in again.invars), again.params["prevent_cse"], strict=True)
    barred = [(aval.shape, bar) for aval, bar in barred if aval.dtype != E4M3]
    shapes = {
        "experts": (model.n_routed_experts, model.moe_latent_size, model.moe_intermediate_size),
        "shared": (model.hidden_size, model.moe_shared_expert_intermediate_size),
        "input": (ROWS, TOKENS, model.hidden_size),
    }
    found = {name: {bar for found, bar in barred if found == shape} for name, shape in shapes.items()}
    assert found == {"experts": experts, "shared": shared, "input": {True}}


@pytest.mark.parametrize("letter", LAYERS)
def test_nothing_is_multiplied_again_while_every_name_is_kept(letter):
    flops = lambda remat: product_flops(layer_jaxpr(letter, every(letter), remat))  # noqa: E731
    assert flops("paper") == flops("none")


def test_selective_recomputation_multiplies_queries_and_keys_again():
    model = every("*")
    flops = lambda remat: product_flops(layer_jaxpr("*", model, remat))  # noqa: E731
    scores = 2 * ROWS * 4 * TOKENS * TOKENS * 5
    assert flops("selective") - flops("none") == scores
    assert flops("*:core,attention") - flops("none") == 2 * scores  # and probabilities with values


def test_selective_recomputation_of_mamba2_multiplies_its_ssd_again():
    model = every("M")
    flops = lambda remat: product_flops(layer_jaxpr("M", model, remat))  # noqa: E731
    chunk, chunks, states, inner = 4, ROWS * TOKENS // 4, 7, 6 * 3
    into_and_out_of_states = 2 * 2 * chunks * chunk * states * inner
    inside = 2 * chunks * chunk * chunk * (2 * states + inner)
    sums_of_decays = 2 * chunks * chunk * chunk * (2 * 6 + 1)  # coarse and fine of each head, and the changes
    assert flops("selective") - flops("none") == into_and_out_of_states + inside + sums_of_decays


@pytest.mark.parametrize("letter", "*M-E")
def test_what_is_selected_is_large(letter):
    model = every(letter)
    selective, paper = (activation_bytes(kept(letter, model, remat)) for remat in ("selective", "paper"))
    assert (selective < paper) == bool(LAYERS[letter].selective)


# With each pattern, what recomputes something in its layers: `paper` all without a name, and the rest some more.
REMATS = {
    "*M": ("full", "elementwise", "paper", ("core", "M:conv,ssd_states,norm")),
    "mE": ("full", "elementwise", "selective", "paper", ("m:layernorm", "E:moe")),
    "w+-": ("full", "elementwise", "selective", "paper", ("mla_up_proj", "-:activation,layernorm")),
}


@pytest.mark.parametrize("pattern", REMATS)
def test_gradients_are_the_same_whatever_is_recomputed(pattern):
    model = dataclasses.replace(config(**(EXTRA if "w" in pattern else {})), pattern=pattern, mtp_depths=0)
    graph, *states = nnx.split(jax.eval_shape(lambda: Stack(tuple(pattern), model, nnx.Rngs(0))), nnx.Param, ...)
    rng = jax.random.key(1)
    params, buffers = (jax.tree.map(jnp.asarray, randomised(s, np.random.default_rng(0))) for s in states)
    x_btd = jax.random.normal(rng, (2, 9, 12))
    docs = documents(jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 2, 2, 2]]))

    def grads(remat, **changes):
        # Not asked whether the backend has a memory of its own: on a CPU moving to the host's is no move.
        plan = dataclasses.replace(one_device(model), config=PlanConfig(remat=remat, **changes))

        def total(params, x_btd):
            return jnp.sum(nnx.merge(graph, params, buffers)(x_btd, docs, plan)[0] ** 2)

        return jax.jit(jax.grad(total, argnums=(0, 1)))(params, x_btd)

    plain = grads("none")
    for remat in REMATS[pattern]:
        assert relative_error(grads(remat), plain) < 2e-6, remat
    assert relative_error(grads("none", offload=("norm", "input")), plain) < 2e-6


# The host's memory. A CPU has no other, so what is moved there is read from traces; values are the same there too.


def in_host(kept) -> set[str]:
    return {array.name for array in kept if array.host}


def test_offloaded_names_wait_in_the_hosts_memory_and_nothing_else_does():
    model = every("M")
    found = kept("M", model, "none", offload=("ssd_states", "input"))
    assert in_host(found) == {"ssd_states", "input"}
    assert bytes_by_name(found) == bytes_by_name(kept("M", model, "paper"))
    assert in_host(kept("M", model, "paper")) == set()
    only = kept("M", model, "full", offload=("input",))
    assert in_host(only) == set(bytes_by_name(only)) == {"input"}
    chosen = kept("M", model, "selective", offload=("conv",))
    assert in_host(chosen) == {"conv"} and "ssd" not in bytes_by_name(chosen)


def test_offloading_multiplies_nothing_again():
    flops = lambda **plan: product_flops(layer_jaxpr("M", every("M"), "none", **plan))  # noqa: E731
    assert flops(offload=("ssd_states", "in_proj")) == flops()


def test_a_cpu_refuses_to_offload_in_one_line():
    for change in ({"offload": ("input",)}, {"offload_optimizer": True}):
        with pytest.raises(ConfigError, match="on cpu: it has no memory besides the host's"):
            one_device(config(), **change)
