"""Attention mixers against loops in float64, what they may see, plans, and transformers' modules (peer).

Letters: b batch, t time, d model, h heads, k head size.
"""

import importlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.helpers import hybrid, run_config
from tests.model.small import one_device, randomised

from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.layers.documents import Documents, documents
from orogen.model.block import Layer
from orogen.train.verify import verify

SIZE, TIME, HEADS, THETA, EPSILON = 12, 9, 4, 30.0, 3e-3
LATENT_EPSILON = 1e-6  # DeepSeek's, whatever the model's is
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2], [1, 0, 0, 4, 4, 4, 4, 4, 4]], np.int32)


def config(letter: str, **changes: Any) -> ModelConfig:
    sizes = {
        "pattern": letter, "vocab_size": 7, "hidden_size": SIZE, "num_attention_heads": HEADS, "num_key_value_heads": 2,
        "head_dim": 10, "sliding_window": 3, "rope_theta": THETA, "kv_lora_rank": 7, "qk_nope_head_dim": 5,
        "qk_rope_head_dim": 4, "v_head_dim": 3, "layer_norm_epsilon": EPSILON,
    }  # fmt: skip
    return ModelConfig(**(sizes | changes))


def built(model: ModelConfig, seed: int = 0) -> nnx.Module:
    """The mixer of the model's one layer, with random weights and biases."""
    graph, params = nnx.split(jax.eval_shape(lambda: Layer(model.pattern, model, nnx.Rngs(0)).mixer))
    return nnx.merge(graph, jax.tree.map(jnp.asarray, randomised(params, np.random.default_rng(seed))))


def apply(mixer: Any, x_btd, docs: Documents, model: ModelConfig, **plan):
    graph, state = nnx.split(mixer)
    laid = one_device(model, **plan)
    return jax.jit(lambda state, x_btd, docs: nnx.merge(graph, state)(x_btd, docs, laid)[0])(state, x_btd, docs)


def inputs(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*SEGMENTS.shape, SIZE)).astype(np.float32)


# The slow and obvious side: one query at a time, float64.


class Slow:
    """A mixer's weights as float64, and the few operations that both kinds of attention share."""

    def __init__(self, mixer: Any):
        self.mixer = mixer

    def weight(self, name: str):
        found = getattr(self.mixer, name, None)
        return 0 if found is None else np.asarray(found[...], np.float64)

    def project(self, x_d, name: str):
        return x_d @ self.weight(name) + self.weight(f"{name}_bias")

    def norm(self, x_k, name: str, epsilon: float = EPSILON):
        found = getattr(self.mixer, name, None)
        return x_k if found is None else x_k / np.sqrt((x_k**2).mean() + epsilon) * np.asarray(found.weight[...])


def turn(x_k, position: int, size: int):
    """The first `size` numbers of a head turned, pair (f, f + size / 2) by position · theta^(-2f / size)."""
    turned = x_k.copy()
    for f in range(size // 2):
        angle, a, b = position * THETA ** (-2 * f / size), x_k[f], x_k[f + size // 2]
        turned[f] = a * math.cos(angle) - b * math.sin(angle)
        turned[f + size // 2] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def slow_heads(mixer: Any, x_btd, docs: Documents, model: ModelConfig):
    """q, k (b, t, h, k) and v of either kind, key heads repeated for each query head."""
    slow, x_btd = Slow(mixer), x_btd.astype(np.float64)
    q, k, v = ([[None] * TIME for _ in x_btd] for _ in range(3))
    for b, t in np.ndindex(x_btd.shape[:2]):
        x_d, position = x_btd[b, t], int(docs.positions_bt[b, t])
        if model.pattern == "+":
            nope, rope = model.qk_nope_head_dim, model.qk_rope_head_dim
            latent = slow.norm(slow.project(x_d, "latent_down"), "latent_norm", LATENT_EPSILON)
            shared = turn(slow.project(x_d, "key_rope"), position, rope)
            plain = slow.project(latent, "key_up").reshape(HEADS, nope)
            k[b][t] = [np.concatenate([head, shared]) for head in plain]
            v[b][t] = slow.project(latent, "value_up").reshape(HEADS, model.v_head_dim)
            if model.q_lora_rank:
                x_d = slow.norm(slow.project(x_d, "query_down"), "query_norm", LATENT_EPSILON)
            heads = slow.project(x_d, "query_up" if model.q_lora_rank else "query").reshape(HEADS, nope + rope)
            q[b][t] = [np.concatenate([head[:nope], turn(head[nope:], position, rope)]) for head in heads]
        else:
            size = model.head_dim
            turned = int(size * model.partial_rotary_factor) if model.rope_theta else 0
            ready = lambda head, name: turn(slow.norm(head, name), position, turned)  # noqa: E731, B023
            q[b][t] = [ready(head, "query_norm") for head in slow.project(x_d, "query").reshape(-1, size)]
            keys = [ready(head, "key_norm") for head in slow.project(x_d, "key").reshape(-1, size)]
            k[b][t] = np.repeat(keys, HEADS // len(keys), 0)
            v[b][t] = np.repeat(slow.project(x_d, "value").reshape(-1, size), HEADS // len(keys), 0)
    return np.array(q), np.array(k), np.array(v)


def slow_attention(mixer: Any, x_btd, docs: Documents, model: ModelConfig):
    q_bthk, k_bthk, v_bthk = slow_heads(mixer, x_btd, docs, model)
    slow, window = Slow(mixer), model.sliding_window if model.pattern == "w" else TIME
    y_bthk = np.zeros(v_bthk.shape)
    for b, t, h in np.ndindex(y_bthk.shape[:3]):
        seen = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t] and t - s < window]
        weight = np.exp(k_bthk[b, seen, h] @ q_bthk[b, t, h] / math.sqrt(q_bthk.shape[-1]))
        sink = np.exp(slow.weight("sinks")[h]) if model.attention_sinks else 0
        y_bthk[b, t, h] = weight @ v_bthk[b, seen, h] / (weight.sum() + sink)
    return slow.project(y_bthk.reshape(*y_bthk.shape[:2], -1), "out")


CHOICES = {
    "plain": ("*", {"rope_theta": None}),
    "rotary": ("*", {}),
    "partial": ("*", {"partial_rotary_factor": 0.4}),
    "norm": ("*", {"qk_norm": True}),
    "qkv biases": ("*", {"attention_bias": "qkv"}),
    "sinks": ("*", {"attention_sinks": True}),
    "window": ("w", {}),
    "all": ("w", {"qk_norm": True, "attention_bias": "all", "attention_sinks": True, "partial_rotary_factor": 0.6}),
    "latent": ("+", {}),
    "latent queries": ("+", {"q_lora_rank": 6, "attention_bias": "all"}),
}


@pytest.mark.parametrize("kernel", ["full", "blocked"])
@pytest.mark.parametrize("name", CHOICES)
def test_equals_loops(name, kernel):
    letter, changes = CHOICES[name]
    model = config(letter, **changes)
    mixer, x_btd, docs = built(model), inputs(), documents(SEGMENTS)
    expected = slow_attention(mixer, x_btd, docs, model)
    # Sums of up to HEADS · 10 products.
    np.testing.assert_allclose(apply(mixer, x_btd, docs, model, attention=kernel), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("letter", "reach"), [("*", TIME), ("w", 3), ("+", TIME)])
def test_a_token_depends_on_its_document_up_to_itself(letter, reach):
    model = config(letter)
    mixer, docs = built(model), documents(SEGMENTS)
    x_btd = inputs()
    depends = jax.jit(jax.jacrev(lambda x: apply(mixer, x, docs, model).sum(-1)))(jnp.asarray(x_btd))
    for b, t in np.ndindex(SEGMENTS.shape):
        expected = [SEGMENTS[b, s] == SEGMENTS[b, t] and 0 <= t - s < reach for s in range(TIME)]
        assert (depends[b, t, b] != 0).any(-1).tolist() == expected
        assert not depends[b, t, 1 - b].any()


@pytest.mark.parametrize("letter", "*w+")
def test_positions_matter_by_their_distance(letter):
    model = config(letter)
    mixer, x_btd, docs = built(model), inputs(), documents(SEGMENTS)
    run = lambda positions_bt: apply(mixer, x_btd, docs._replace(positions_bt=positions_bt), model)  # noqa: E731
    before = run(docs.positions_bt)
    np.testing.assert_allclose(run(docs.positions_bt + 50), before, atol=1e-4)
    assert jnp.abs(run(docs.positions_bt * 2) - before).max() > 0.01


def test_yarn_enlarges_the_scores_of_latent_attention():
    yarn = {"yarn_factor": 40.0, "yarn_original_positions": 64, "yarn_mscale": 1.0}
    scales = [
        built(config("+", **changes)).scale
        for changes in ({}, yarn, yarn | {"yarn_mscale_all_dim": 1.0}, yarn | {"yarn_mscale_all_dim": 0.5})
    ]
    assert scales == pytest.approx(
        [s / 3 for s in (1, 1, (0.1 * math.log(40) + 1) ** 2, (0.05 * math.log(40) + 1) ** 2)]
    )


def test_initial_values():
    for letter, changes in (CHOICES["all"], CHOICES["latent queries"]):
        model = config(letter, **changes, hidden_size=64, num_attention_heads=256, num_key_value_heads=256)
        drawn = jax.jit(lambda letter=letter, model=model: nnx.state(Layer(letter, model, nnx.Rngs(0)).mixer))()
        for path, variable in nnx.to_flat_state(drawn):
            if path[-1].endswith("bias") or path[-1] == "weight":
                assert (variable[...] == (path[-1] == "weight")).all()
            else:
                assert variable[...].std() == pytest.approx((0.8 / 64) ** 0.5, rel=0.15), path


@pytest.mark.parametrize("letter", "w+")
def test_half_precision_keeps_its_dtype(letter):
    model = config(letter, **({} if letter == "+" else CHOICES["all"][1]))
    mixer, docs = built(model), documents(SEGMENTS)
    half = jax.tree.map(lambda v: v if v.ndim == 1 else v.astype(jnp.bfloat16), nnx.state(mixer))
    y_btd = apply(nnx.merge(nnx.graphdef(mixer), half), jnp.asarray(inputs(), jnp.bfloat16), docs, model)
    assert y_btd.dtype == jnp.bfloat16
    expected = apply(mixer, inputs(), docs, model)
    assert jnp.linalg.norm(y_btd - expected) < 0.03 * jnp.linalg.norm(expected)


FULL = {
    "rope_theta": 100.0, "qk_norm": True, "attention_bias": "all", "attention_sinks": True, "sliding_window": 5,
    "partial_rotary_factor": 0.5, "mtp_depths": 0,
}  # fmt: skip
LATENT = {
    "rope_theta": 100.0, "attention_bias": "all", "q_lora_rank": 10, "kv_lora_rank": 6, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2, "v_head_dim": 3, "mtp_depths": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "plan"),
    [
        (hybrid(pattern="*ww", **FULL), {"tensor": 4}),
        (hybrid(pattern="w", **FULL), {"tensor": 2, "data": 2, "fsdp": "parameters"}),
        (hybrid(pattern="++", **LATENT), {"tensor": 4}),
        (hybrid(pattern="+", **LATENT), {"tensor": 2, "data": 2, "fsdp": "parameters"}),
        (hybrid(pattern="+", **LATENT | {"q_lora_rank": None}), {"tensor": 2}),
    ],
    ids=["grouped over 4", "grouped, sharded", "latent over 4", "latent, sharded", "direct queries"],
)
def test_a_plan_equals_one_device(model, plan):
    verdict = verify(run_config(model, plan=plan), optimizers=("adamw",))
    assert verdict.passed, verdict
    assert not verdict.zero_leaves


def test_latent_widths_must_divide_over_the_ranks_that_share_them():
    model, plan = hybrid(pattern="+", **LATENT | {"q_lora_rank": 7}), {"data": 2, "fsdp": "parameters"}
    with pytest.raises(ConfigError, match="q_lora_rank is 7; expected a multiple of PlanConfig.data x context = 2"):
        verify(run_config(model, plan=plan))


# transformers


class Peer(NamedTuple):
    """A family of transformers: its module's name, its class prefix, its settings beyond ours, and our choices."""

    family: str
    prefix: str
    settings: dict[str, Any]
    letter: str
    changes: dict[str, Any]


PEER_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
OUR_YARN = {"yarn_factor": 8.0, "yarn_original_positions": 16, "yarn_beta_fast": 4.0}


def latent_peer(rank: int | None, *, interleave: bool, weights: tuple[float, float] | None) -> Peer:
    """DeepSeek-V3; weights: YaRN's mscale and mscale_all_dim, None without YaRN."""
    mscales = {} if weights is None else PEER_YARN | dict(zip(("mscale", "mscale_all_dim"), weights, strict=True))
    settings = {"rope_interleave": interleave, "rope_parameters": mscales, "attention_bias": True}
    changes: dict[str, Any] = {"q_lora_rank": rank, "rope_interleave": interleave, "attention_bias": "all"}
    if weights is not None:
        changes |= OUR_YARN | {"yarn_mscale": weights[0], "yarn_mscale_all_dim": weights[1]}
    return Peer("deepseek_v3", "DeepseekV3", settings, "+", changes)


GPT_OSS = {"attention_bias": True, "rope_parameters": PEER_YARN | {"truncate": False}}
OUR_GPT_OSS = {"attention_bias": "all", "attention_sinks": True, **OUR_YARN, "yarn_truncate": False}
PEERS = {
    "nemotron": Peer(
        "nemotron", "Nemotron",
        {"attention_bias": True, "rope_parameters": {"partial_rotary_factor": 0.4}}, "*",
        {"attention_bias": "all", "partial_rotary_factor": 0.4},
    ),
    "llama": Peer("llama", "Llama", {"rope_parameters": PEER_YARN}, "*", OUR_YARN),
    "qwen2_moe": Peer("qwen2_moe", "Qwen2Moe", {"qkv_bias": True}, "*", {"attention_bias": "qkv"}),
    "qwen3_moe": Peer("qwen3_moe", "Qwen3Moe", {}, "*", {"qk_norm": True}),
    "gpt_oss window": Peer("gpt_oss", "GptOss", {**GPT_OSS, "layer_types": ["sliding_attention"]}, "w", OUR_GPT_OSS),
    "gpt_oss full": Peer("gpt_oss", "GptOss", {**GPT_OSS, "layer_types": ["full_attention"]}, "*", OUR_GPT_OSS),
    "deepseek_v3": latent_peer(6, interleave=True, weights=(1.0, 1.0)),
    "deepseek_v3 other mscale": latent_peer(6, interleave=False, weights=(1.0, 0.5)),
    "deepseek_v3 direct": latent_peer(None, interleave=True, weights=None),
    "deepseek_v3 direct halves": latent_peer(None, interleave=False, weights=(0.7, 0.9)),
}  # fmt: skip


def peer_attention(peer: Peer, model: ModelConfig, x_btd: np.ndarray, positions_bt: np.ndarray):
    """The output of transformers' attention module, random weights, and its tensors by name."""
    import torch

    library = importlib.import_module(f"transformers.models.{peer.family}.modeling_{peer.family}")
    settings: dict[str, Any] = {
        "hidden_size": SIZE, "num_attention_heads": HEADS, "num_key_value_heads": 2, "num_hidden_layers": 1,
        "max_position_embeddings": 128, "rms_norm_eps": EPSILON, "sliding_window": model.sliding_window,
        "attn_implementation": "eager", **peer.settings,
    }  # fmt: skip
    if peer.letter == "+":
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        settings |= {name: getattr(model, name) for name in names} | {"num_key_value_heads": HEADS}
    else:
        settings["head_dim"] = model.head_dim
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": THETA} | settings.get("rope_parameters", {})
    found = getattr(importlib.import_module("transformers"), f"{peer.prefix}Config")(**settings)
    torch.manual_seed(0)
    module = getattr(library, f"{peer.prefix}Attention")(found, layer_idx=0).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, positions = torch.tensor(x_btd), torch.tensor(positions_bt)
    distance = torch.arange(TIME)[:, None] - torch.arange(TIME)
    seen = (distance >= 0) & (distance < (model.sliding_window if peer.letter == "w" else TIME))
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        turned = getattr(library, f"{peer.prefix}RotaryEmbedding")(found)(x, positions)
        y, _ = module(x, position_embeddings=turned, attention_mask=mask)
    return y.numpy(), {name: tensor.detach().numpy() for name, tensor in module.named_parameters()}


def renamed(tensors: dict[str, np.ndarray], model: ModelConfig) -> dict[str, np.ndarray]:
    """transformers' tensors under our names, `query_norm.weight` or `query_bias`; matrices transposed."""
    names = {
        "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out", "q_a_proj": "query_down",
        "q_b_proj": "query_up", "q_norm": "query_norm", "k_norm": "key_norm", "q_a_layernorm": "query_norm",
        "kv_a_layernorm": "latent_norm", "sinks": "sinks",
    }  # fmt: skip
    ours = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.partition(".")
        if stem == "kv_a_proj_with_mqa":
            for part, ending in zip(np.split(tensor, [model.kv_lora_rank]), ("latent_down", "key_rope"), strict=True):
                ours[ending if kind == "weight" else f"{ending}_bias"] = part.T
        elif stem == "kv_b_proj":
            heads = tensor.reshape(HEADS, -1, model.kv_lora_rank)
            for part, ending in zip(np.split(heads, [model.qk_nope_head_dim], 1), ("key_up", "value_up"), strict=True):
                ours[ending] = part.reshape(-1, model.kv_lora_rank).T
        elif "norm" in stem:
            ours[f"{names[stem]}.weight"] = tensor
        else:
            ours[names[stem] + ("_bias" if kind == "bias" else "")] = tensor.T
    return ours


@pytest.mark.peer
@pytest.mark.parametrize("name", PEERS)
def test_equals_transformers(name):
    peer = PEERS[name]
    # The norms inside MLA keep transformers' default epsilon, whatever its config says.
    epsilon = {"layer_norm_epsilon": 1e-6} if peer.letter == "+" else {}
    model = config(peer.letter, **peer.changes, **epsilon)
    x_btd = inputs()
    positions_bt = np.broadcast_to(np.arange(TIME, dtype=np.int32), SEGMENTS.shape) + np.array([[0], [21]], np.int32)
    expected, tensors = peer_attention(peer, model, x_btd, positions_bt)
    mixer = built(model)
    graph, state = nnx.split(mixer)
    flat, values = nnx.to_flat_state(state), renamed(tensors, model)
    assert {".".join(path): v.shape for path, v in flat} == {key: value.shape for key, value in values.items()}
    filled = nnx.from_flat_state([(path, v.replace(jnp.asarray(values[".".join(path)]))) for path, v in flat])
    docs = Documents(jnp.ones(SEGMENTS.shape, jnp.int32), jnp.asarray(positions_bt))
    found = apply(nnx.merge(graph, filled), x_btd, docs, model)
    assert np.abs(found - expected).max() <= 1e-5 * np.ptp(expected)
