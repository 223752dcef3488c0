"""The tensors of one layer in Hugging Face's checkpoints, by mixer: their names, shapes and parts.

PyTorch stores a linear map as (out, in), Orogen as (in, out); so do GPT-2 and gpt-oss's experts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from orogen.config.model import ModelConfig

Path = tuple[str | int, ...]
Shape = tuple[int, ...]


class Part(NamedTuple):
    """A parameter of the layer: its path, where it lies in the tensor, its shape there, and the index of its expert."""

    path: Path
    slices: tuple[slice, ...]
    shape: Shape
    index: tuple[int, ...] = ()


class Rule(NamedTuple):
    """A tensor of one layer: its name after the layer's prefix, its shape, the shape in which it is sliced, its parts,
    whether these are transposed in the model, and whether it stays float32."""

    name: str
    shape: Shape
    view: Shape
    parts: tuple[Part, ...]
    transposed: bool = False
    float32: bool = False


Rules = Iterator[Rule]
ALL = slice(None)


def _whole(name: str, path: Path, shape: Shape, *, transposed: bool = False, index: tuple[int, ...] = ()) -> Rule:
    part = Part(path, (ALL,) * len(shape), shape, index)
    return Rule(name, shape, shape, (part,), transposed)


def vector(name: str, path: Path, size: int) -> Rule:
    """A vector."""
    return _whole(name, path, (size,))


def _matrix(name: str, path: Path, out: int, into: int, *, index: tuple[int, ...] = ()) -> Rule:
    """A PyTorch linear map, (out, in) there and (in, out) here."""
    return _whole(f"{name}.weight", path, (out, into), transposed=True, index=index)


def _rows(
    name: str, blocks: Sequence[tuple[Path, int]], *rest: int, transposed: bool = False, shape: Shape = ()
) -> Rule:
    """A tensor whose rows are consecutive blocks; `shape`: its shape in the file, if not (rows, *rest)."""
    start, parts = 0, []
    for path, size in blocks:
        parts.append(Part(path, (slice(start, start + size), *(ALL for _ in rest)), (size, *rest)))
        start += size
    return Rule(name, shape or (start, *rest), (start, *rest), tuple(parts), transposed)


def _interleaved(name: str, paths: Sequence[Path], lead: Shape, size: int) -> Rule:
    """A tensor whose last axis interleaves the parameters of `paths`."""
    parts = (
        Part(path, (*(ALL for _ in (*lead, size)), slice(i, i + 1)), (*lead, size)) for i, path in enumerate(paths)
    )
    return Rule(name, (*lead, size * len(paths)), (*lead, size, len(paths)), tuple(parts))


# Mixers, by family. The names are those after the layer's prefix.


def mamba2(c: ModelConfig) -> Rules:
    """Mamba-2: in_proj is z | x | B | C | dt, conv1d is x | B | C."""
    inner, states, d, heads = (
        c.mamba_num_heads * c.mamba_head_dim,
        c.n_groups * c.ssm_state_size,
        c.hidden_size,
        c.mamba_num_heads,
    )
    sizes = {"z": inner, "x": inner, "B": states, "C": states, "dt": heads}
    convolved = {name: sizes[name] for name in "xBC"}
    channels, taps = sum(convolved.values()), c.conv_kernel
    yield _rows("mixer.in_proj.weight", [(("mixer", n), s) for n, s in sizes.items()], d, transposed=True)
    if c.mamba_proj_bias:
        biases = [(("mixer", "dt_proj_bias" if n == "dt" else f"{n}_bias"), s) for n, s in sizes.items()]
        yield _rows("mixer.in_proj.bias", biases)
        yield vector("mixer.out_proj.bias", ("mixer", "out_bias"), d)
    weights = [(("mixer", f"conv_{n}", "weight"), s) for n, s in convolved.items()]
    yield _rows("mixer.conv1d.weight", weights, taps, shape=(channels, 1, taps))
    if c.use_conv_bias:
        yield _rows("mixer.conv1d.bias", [(("mixer", f"conv_{n}", "bias"), s) for n, s in convolved.items()])
    for name in ("A_log", "D", "dt_bias"):
        yield vector(f"mixer.{name}", ("mixer", name), heads)
    yield vector("mixer.norm.weight", ("mixer", "norm", "weight"), inner)
    yield _matrix("mixer.out_proj", ("mixer", "out"), d, inner)


def mamba1(c: ModelConfig) -> Rules:
    """Mamba-1: in_proj is x | z, x_proj is dt | B | C."""
    inner, states, rank, d = c.mamba_intermediate_size, c.ssm_state_size, c.time_step_rank, c.hidden_size
    yield _rows("mixer.in_proj.weight", [(("mixer", n), inner) for n in "xz"], d, transposed=True)
    if c.mamba_proj_bias:
        yield _rows("mixer.in_proj.bias", [(("mixer", f"{n}_bias"), inner) for n in "xz"])
        yield vector("mixer.out_proj.bias", ("mixer", "out_bias"), d)
    yield _rows(
        "mixer.conv1d.weight", [(("mixer", "conv", "weight"), inner)], c.conv_kernel, shape=(inner, 1, c.conv_kernel)
    )
    if c.use_conv_bias:
        yield vector("mixer.conv1d.bias", ("mixer", "conv", "bias"), inner)
    blocks = [(("mixer", "dt_down"), rank), (("mixer", "B"), states), (("mixer", "C"), states)]
    yield _rows("mixer.x_proj.weight", blocks, inner, transposed=True)
    yield _matrix("mixer.dt_proj", ("mixer", "dt_up"), inner, rank)
    yield vector("mixer.dt_proj.bias", ("mixer", "dt_bias"), inner)
    yield _whole("mixer.A_log", ("mixer", "A_log"), (inner, states))
    yield vector("mixer.D", ("mixer", "D"), inner)
    yield _matrix("mixer.out_proj", ("mixer", "out"), d, inner)


def _attention(c: ModelConfig, module: str) -> Rules:
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for name, ours, width in (("q", "query", queries), ("k", "key", keys), ("v", "value", keys)):
        yield _matrix(f"{module}.{name}_proj", ("mixer", ours), width, c.hidden_size)
        if c.attention_bias != "none":
            yield vector(f"{module}.{name}_proj.bias", ("mixer", f"{ours}_bias"), width)
    yield _matrix(f"{module}.o_proj", ("mixer", "out"), c.hidden_size, queries)
    if c.attention_bias == "all":
        yield vector(f"{module}.o_proj.bias", ("mixer", "out_bias"), c.hidden_size)
    if c.qk_norm:
        yield vector(f"{module}.q_norm.weight", ("mixer", "query_norm", "weight"), c.head_dim)
        yield vector(f"{module}.k_norm.weight", ("mixer", "key_norm", "weight"), c.head_dim)
    if c.attention_sinks:
        yield vector(f"{module}.sinks", ("mixer", "sinks"), c.num_attention_heads)


def latent_attention(c: ModelConfig) -> Rules:
    """DeepSeek's: kv_a is latent | key's rotary part, kv_b is keys | values head by head."""
    d, heads, latent = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    nope, rope, value, biased = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.attention_bias == "all"
    if c.q_lora_rank is None:
        yield _matrix("self_attn.q_proj", ("mixer", "query"), heads * (nope + rope), d)
    else:
        yield _matrix("self_attn.q_a_proj", ("mixer", "query_down"), c.q_lora_rank, d)
        if biased:
            yield vector("self_attn.q_a_proj.bias", ("mixer", "query_down_bias"), c.q_lora_rank)
        yield vector("self_attn.q_a_layernorm.weight", ("mixer", "query_norm", "weight"), c.q_lora_rank)
        yield _matrix("self_attn.q_b_proj", ("mixer", "query_up"), heads * (nope + rope), c.q_lora_rank)
    down = [("latent_down", latent), ("key_rope", rope)]
    name = "self_attn.kv_a_proj_with_mqa"
    yield _rows(f"{name}.weight", [(("mixer", n), size) for n, size in down], d, transposed=True)
    if biased:
        yield _rows(f"{name}.bias", [(("mixer", f"{n}_bias"), size) for n, size in down])
    yield vector("self_attn.kv_a_layernorm.weight", ("mixer", "latent_norm", "weight"), latent)
    up = (
        Part(("mixer", "key_up"), (ALL, slice(0, nope), ALL), (heads * nope, latent)),
        Part(("mixer", "value_up"), (ALL, slice(nope, nope + value), ALL), (heads * value, latent)),
    )
    shape, view = (heads * (nope + value), latent), (heads, nope + value, latent)
    yield Rule("self_attn.kv_b_proj.weight", shape, view, up, transposed=True)
    yield _matrix("self_attn.o_proj", ("mixer", "out"), d, heads * value)
    if biased:
        yield vector("self_attn.o_proj.bias", ("mixer", "out_bias"), d)


class _MLPNames(NamedTuple):
    """A family's names for an MLP's linear maps; gate is empty if there is none."""

    up: str
    down: str
    gate: str = ""


UP_DOWN = _MLPNames("up_proj", "down_proj")
GATE_UP_DOWN = _MLPNames("up_proj", "down_proj", "gate_proj")


def _mlp(
    module: str,
    path: Path,
    names: _MLPNames,
    size: int,
    hidden: int,
    *,
    bias: bool = False,
    index: tuple[int, ...] = (),
) -> Rules:
    for ours, name in names._asdict().items():
        if name:
            out, into = (size, hidden) if ours == "down" else (hidden, size)
            yield _matrix(f"{module}.{name}", (*path, ours), out, into, index=index)
            if bias:
                yield _whole(f"{module}.{name}.bias", (*path, f"{ours}_bias"), (out,), index=index)


def _router(c: ModelConfig, module: str) -> Rules:
    yield _matrix(module, ("mixer", "router", "gate"), c.n_routed_experts, c.hidden_size)
    if c.router_correction_bias:
        bias = vector(f"{module}.e_score_correction_bias", ("mixer", "router", "bias"), c.n_routed_experts)
        yield bias._replace(float32=True)


def _experts(c: ModelConfig, module: str, names: _MLPNames) -> Rules:
    for e in range(c.n_routed_experts):
        yield from _mlp(
            f"{module}.{e}", ("mixer", "experts"), names, c.expert_width, c.moe_intermediate_size, index=(e,)
        )


def _shared(c: ModelConfig, module: str, names: _MLPNames) -> Rules:
    if c.moe_shared_expert_intermediate_size is not None:
        hidden = c.moe_shared_expert_intermediate_size
        bias = c.shared_expert_bias
        yield from _mlp(module, ("mixer", "shared"), names, c.hidden_size, hidden, bias=bias)
    if c.moe_shared_expert_gate:
        yield _matrix(f"{module}_gate", ("mixer", "shared_gate"), 1, c.hidden_size)


def nemotron_h_experts(c: ModelConfig) -> Rules:
    """Experts between two latent projections, if they have any."""
    yield from _router(c, "mixer.gate")
    yield from _experts(c, "mixer.experts", UP_DOWN)
    yield from _shared(c, "mixer.shared_experts", UP_DOWN)
    if c.moe_latent_size is not None:
        yield _matrix("mixer.fc1_latent_proj", ("mixer", "latent_down"), c.moe_latent_size, c.hidden_size)
        yield _matrix("mixer.fc2_latent_proj", ("mixer", "latent_up"), c.hidden_size, c.moe_latent_size)
        if c.shared_expert_bias:
            yield vector("mixer.fc1_latent_proj.bias", ("mixer", "latent_down_bias"), c.moe_latent_size)
            yield vector("mixer.fc2_latent_proj.bias", ("mixer", "latent_up_bias"), c.hidden_size)


def deepseek_experts(c: ModelConfig) -> Rules:
    """Experts of DeepSeek-V3. Without shared ones, transformers' class still has their tensors, with no columns."""
    yield from _router(c, "mlp.gate")
    yield from _experts(c, "mlp.experts", GATE_UP_DOWN)
    yield from _shared(c, "mlp.shared_experts", GATE_UP_DOWN)
    if c.moe_shared_expert_intermediate_size is None:
        for rule in _mlp("mlp.shared_experts", (), GATE_UP_DOWN, c.hidden_size, 0):
            yield rule._replace(parts=())


def qwen_experts(c: ModelConfig) -> Rules:
    """Experts of Qwen2-MoE, whose shared expert has a gate, and of Qwen3-MoE."""
    yield from _router(c, "mlp.gate")
    yield from _experts(c, "mlp.experts", GATE_UP_DOWN)
    yield from _shared(c, "mlp.shared_expert", GATE_UP_DOWN)


def mixtral_experts(c: ModelConfig) -> Rules:
    """Experts of Mixtral: w1 is gate, w2 is down, w3 is up."""
    yield from _router(c, "block_sparse_moe.gate")
    yield from _experts(c, "block_sparse_moe.experts", _MLPNames(up="w3", down="w2", gate="w1"))


def gpt_oss_experts(c: ModelConfig) -> Rules:
    """Experts of gpt-oss: gate and up are interleaved on the last axis; experts are stacked and (in, out), as ours."""
    experts, width, hidden = c.n_routed_experts, c.expert_width, c.moe_intermediate_size
    part = lambda name: ("mixer", "experts", name)  # noqa: E731
    yield _matrix("mlp.router", ("mixer", "router", "gate"), experts, c.hidden_size)
    yield vector("mlp.router.bias", ("mixer", "router", "gate_bias"), experts)
    yield _interleaved("mlp.experts.gate_up_proj", [part("gate"), part("up")], (experts, width), hidden)
    yield _interleaved("mlp.experts.gate_up_proj_bias", [part("gate_bias"), part("up_bias")], (experts,), hidden)
    yield _whole("mlp.experts.down_proj", part("down"), (experts, hidden, width))
    yield _whole("mlp.experts.down_proj_bias", part("down_bias"), (experts, width))


def gpt2_attention(c: ModelConfig) -> Rules:
    """GPT-2's attention: q, k and v are column blocks of one map, which is (in, out), as ours."""
    d, paths = c.hidden_size, [("mixer", name) for name in ("query", "key", "value")]
    weights = (Part(path, (ALL, slice(i, i + 1), ALL), (d, d)) for i, path in enumerate(paths))
    yield Rule("attn.c_attn.weight", (d, 3 * d), (d, 3, d), tuple(weights))
    yield _rows("attn.c_attn.bias", [(("mixer", f"{name}_bias"), d) for _, name in paths])
    yield _whole("attn.c_proj.weight", ("mixer", "out"), (d, d))
    yield vector("attn.c_proj.bias", ("mixer", "out_bias"), d)


def gpt2_mlp(c: ModelConfig) -> Rules:
    """GPT-2's MLP, (in, out), as ours."""
    d, hidden = c.hidden_size, c.intermediate_size
    for name, ours, into, out in (("c_fc", "up", d, hidden), ("c_proj", "down", hidden, d)):
        yield _whole(f"mlp.{name}.weight", ("mixer", ours), (into, out))
        yield vector(f"mlp.{name}.bias", ("mixer", f"{ours}_bias"), out)


def dense(names: _MLPNames, module: str) -> Callable[[ModelConfig], Rules]:
    """A dense MLP under `module`."""
    return lambda c: _mlp(module, ("mixer",), names, c.hidden_size, c.intermediate_size, bias=c.mlp_bias)


def plain_attention(module: str) -> Callable[[ModelConfig], Rules]:
    """Grouped-query attention under `module`."""
    return lambda c: _attention(c, module)
