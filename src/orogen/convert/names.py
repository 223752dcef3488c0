"""Where every tensor of a Hugging Face checkpoint lies in a LanguageModel: one table for both directions.

PyTorch stores a linear map as (out, in), ours is (in, out); GPT-2 and gpt-oss's experts have ours. Fused tensors are
cut in blocks, experts and the layers of a Repeat are stacked along leading axes. Every rule is linear and invertible.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.model.block import places, repeats

Path = tuple[str | int, ...]
Shape = tuple[int, ...]


class Piece(NamedTuple):
    """A part of a tensor and its place in a parameter: `cut` of the tensor seen as `view` is, reshaped to `shape` and
    transposed if so, what the parameter `path` holds at `index` of its leading axes."""

    path: Path
    index: tuple[int, ...]
    shape: Shape
    view: Shape
    cut: tuple[slice, ...]
    transposed: bool

    @property
    def own_shape(self) -> Shape:
        """The shape in the parameter, behind the leading axes."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """What the parameter holds at `index`, of the tensor: a view of it where that is possible."""
        part = tensor.reshape(self.view)[self.cut].reshape(self.shape)
        return part.swapaxes(-1, -2) if self.transposed else part

    def put(self, tensor: np.ndarray, part: np.ndarray) -> None:
        """The inverse: writes the parameter's part into the contiguous `tensor`."""
        target = tensor.reshape(self.view)[self.cut]
        target[...] = (part.swapaxes(-1, -2) if self.transposed else part).reshape(target.shape)


class Tensor(NamedTuple):
    """A tensor's shape, its pieces, and whether it stays float32 when the others are written in another dtype.

    copy_of: the tensor that it repeats, whose pieces it then has not; such a tensor may be missing. written: whether
    transformers writes that copy.
    """

    shape: Shape
    pieces: tuple[Piece, ...]
    float32: bool = False
    copy_of: str | None = None
    written: bool = True


Table = dict[str, Tensor]


class _Part(NamedTuple):
    """A parameter in its layer, where it lies in the tensor, its shape before it is transposed, and its expert."""

    path: Path
    cut: tuple[slice, ...]
    shape: Shape
    index: tuple[int, ...] = ()


class _Rule(NamedTuple):
    """A tensor of one layer: its name there, its shape, the shape under which it is cut, and its parts."""

    name: str
    shape: Shape
    view: Shape
    parts: tuple[_Part, ...]
    transposed: bool = False
    float32: bool = False


Rules = Iterator[_Rule]
ALL = slice(None)


def _whole(name: str, path: Path, shape: Shape, *, transposed: bool = False, index: tuple[int, ...] = ()) -> _Rule:
    part = _Part(path, (ALL,) * len(shape), shape, index)
    return _Rule(name, shape, shape, (part,), transposed)


def _vector(name: str, path: Path, size: int) -> _Rule:
    return _whole(name, path, (size,))


def _matrix(name: str, path: Path, out: int, into: int, *, index: tuple[int, ...] = ()) -> _Rule:
    """A PyTorch linear map, (out, in) there and (in, out) here."""
    return _whole(f"{name}.weight", path, (out, into), transposed=True, index=index)


def _rows(
    name: str, blocks: Sequence[tuple[Path, int]], *rest: int, transposed: bool = False, shape: Shape = ()
) -> _Rule:
    """A tensor whose rows are one block after another; `shape`: how it is stored, if not as (rows, *rest)."""
    start, parts = 0, []
    for path, size in blocks:
        parts.append(_Part(path, (slice(start, start + size), *(ALL for _ in rest)), (size, *rest)))
        start += size
    return _Rule(name, shape or (start, *rest), (start, *rest), tuple(parts), transposed)


def _interleaved(name: str, paths: Sequence[Path], lead: Shape, size: int) -> _Rule:
    """A tensor whose last axis takes turns between the parameters of `paths`."""
    parts = (
        _Part(path, (*(ALL for _ in (*lead, size)), slice(i, i + 1)), (*lead, size)) for i, path in enumerate(paths)
    )
    return _Rule(name, (*lead, size * len(paths)), (*lead, size, len(paths)), tuple(parts))


# Mixers, by family. The names are those after the layer's prefix.


def _mamba2(c: ModelConfig) -> Rules:
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
        yield _vector("mixer.out_proj.bias", ("mixer", "out_bias"), d)
    weights = [(("mixer", f"conv_{n}", "weight"), s) for n, s in convolved.items()]
    yield _rows("mixer.conv1d.weight", weights, taps, shape=(channels, 1, taps))
    if c.use_conv_bias:
        yield _rows("mixer.conv1d.bias", [(("mixer", f"conv_{n}", "bias"), s) for n, s in convolved.items()])
    for name in ("A_log", "D", "dt_bias"):
        yield _vector(f"mixer.{name}", ("mixer", name), heads)
    yield _vector("mixer.norm.weight", ("mixer", "norm", "weight"), inner)
    yield _matrix("mixer.out_proj", ("mixer", "out"), d, inner)


def _mamba1(c: ModelConfig) -> Rules:
    inner, states, rank, d = c.mamba_intermediate_size, c.ssm_state_size, c.time_step_rank, c.hidden_size
    yield _rows("mixer.in_proj.weight", [(("mixer", n), inner) for n in "xz"], d, transposed=True)
    if c.mamba_proj_bias:
        yield _rows("mixer.in_proj.bias", [(("mixer", f"{n}_bias"), inner) for n in "xz"])
        yield _vector("mixer.out_proj.bias", ("mixer", "out_bias"), d)
    yield _rows(
        "mixer.conv1d.weight", [(("mixer", "conv", "weight"), inner)], c.conv_kernel, shape=(inner, 1, c.conv_kernel)
    )
    if c.use_conv_bias:
        yield _vector("mixer.conv1d.bias", ("mixer", "conv", "bias"), inner)
    blocks = [(("mixer", "dt_down"), rank), (("mixer", "B"), states), (("mixer", "C"), states)]
    yield _rows("mixer.x_proj.weight", blocks, inner, transposed=True)
    yield _matrix("mixer.dt_proj", ("mixer", "dt_up"), inner, rank)
    yield _vector("mixer.dt_proj.bias", ("mixer", "dt_bias"), inner)
    yield _whole("mixer.A_log", ("mixer", "A_log"), (inner, states))
    yield _vector("mixer.D", ("mixer", "D"), inner)
    yield _matrix("mixer.out_proj", ("mixer", "out"), d, inner)


def _attention(c: ModelConfig, module: str) -> Rules:
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for name, ours, width in (("q", "query", queries), ("k", "key", keys), ("v", "value", keys)):
        yield _matrix(f"{module}.{name}_proj", ("mixer", ours), width, c.hidden_size)
        if c.attention_bias != "none":
            yield _vector(f"{module}.{name}_proj.bias", ("mixer", f"{ours}_bias"), width)
    yield _matrix(f"{module}.o_proj", ("mixer", "out"), c.hidden_size, queries)
    if c.attention_bias == "all":
        yield _vector(f"{module}.o_proj.bias", ("mixer", "out_bias"), c.hidden_size)
    if c.qk_norm:
        yield _vector(f"{module}.q_norm.weight", ("mixer", "query_norm", "weight"), c.head_dim)
        yield _vector(f"{module}.k_norm.weight", ("mixer", "key_norm", "weight"), c.head_dim)
    if c.attention_sinks:
        yield _vector(f"{module}.sinks", ("mixer", "sinks"), c.num_attention_heads)


def _latent_attention(c: ModelConfig) -> Rules:
    d, heads, latent = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    nope, rope, value, biased = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.attention_bias == "all"
    if c.q_lora_rank is None:
        yield _matrix("self_attn.q_proj", ("mixer", "query"), heads * (nope + rope), d)
    else:
        yield _matrix("self_attn.q_a_proj", ("mixer", "query_down"), c.q_lora_rank, d)
        if biased:
            yield _vector("self_attn.q_a_proj.bias", ("mixer", "query_down_bias"), c.q_lora_rank)
        yield _vector("self_attn.q_a_layernorm.weight", ("mixer", "query_norm", "weight"), c.q_lora_rank)
        yield _matrix("self_attn.q_b_proj", ("mixer", "query_up"), heads * (nope + rope), c.q_lora_rank)
    down = [("latent_down", latent), ("key_rope", rope)]
    name = "self_attn.kv_a_proj_with_mqa"
    yield _rows(f"{name}.weight", [(("mixer", n), size) for n, size in down], d, transposed=True)
    if biased:
        yield _rows(f"{name}.bias", [(("mixer", f"{n}_bias"), size) for n, size in down])
    yield _vector("self_attn.kv_a_layernorm.weight", ("mixer", "latent_norm", "weight"), latent)
    up = (
        _Part(("mixer", "key_up"), (ALL, slice(0, nope), ALL), (heads * nope, latent)),
        _Part(("mixer", "value_up"), (ALL, slice(nope, nope + value), ALL), (heads * value, latent)),
    )
    shape, view = (heads * (nope + value), latent), (heads, nope + value, latent)
    yield _Rule("self_attn.kv_b_proj.weight", shape, view, up, transposed=True)
    yield _matrix("self_attn.o_proj", ("mixer", "out"), d, heads * value)
    if biased:
        yield _vector("self_attn.o_proj.bias", ("mixer", "out_bias"), d)


class _MLPNames(NamedTuple):
    """What a family calls an MLP's linear maps; gate is missing in one that has none."""

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
        bias = _vector(f"{module}.e_score_correction_bias", ("mixer", "router", "bias"), c.n_routed_experts)
        yield bias._replace(float32=True)


def _experts(c: ModelConfig, module: str, names: _MLPNames) -> Rules:
    for e in range(c.n_routed_experts):
        yield from _mlp(
            f"{module}.{e}", ("mixer", "experts"), names, c.expert_width, c.moe_intermediate_size, index=(e,)
        )


def _shared(c: ModelConfig, module: str, names: _MLPNames) -> Rules:
    if c.moe_shared_expert_intermediate_size is not None:
        hidden = c.moe_shared_expert_intermediate_size
        yield from _mlp(module, ("mixer", "shared"), names, c.hidden_size, hidden)
    if c.moe_shared_expert_gate:
        yield _matrix(f"{module}_gate", ("mixer", "shared_gate"), 1, c.hidden_size)


def _nemotron_h_experts(c: ModelConfig) -> Rules:
    yield from _router(c, "mixer.gate")
    yield from _experts(c, "mixer.experts", UP_DOWN)
    yield from _shared(c, "mixer.shared_experts", UP_DOWN)
    if c.moe_latent_size is not None:
        yield _matrix("mixer.fc1_latent_proj", ("mixer", "latent_down"), c.moe_latent_size, c.hidden_size)
        yield _matrix("mixer.fc2_latent_proj", ("mixer", "latent_up"), c.hidden_size, c.moe_latent_size)


def _deepseek_experts(c: ModelConfig) -> Rules:
    yield from _router(c, "mlp.gate")
    yield from _experts(c, "mlp.experts", GATE_UP_DOWN)
    yield from _shared(c, "mlp.shared_experts", GATE_UP_DOWN)


def _qwen_experts(c: ModelConfig) -> Rules:
    yield from _router(c, "mlp.gate")
    yield from _experts(c, "mlp.experts", GATE_UP_DOWN)
    yield from _shared(c, "mlp.shared_expert", GATE_UP_DOWN)


def _mixtral_experts(c: ModelConfig) -> Rules:
    yield from _router(c, "block_sparse_moe.gate")
    yield from _experts(c, "block_sparse_moe.experts", _MLPNames(up="w3", down="w2", gate="w1"))


def _gpt_oss_experts(c: ModelConfig) -> Rules:
    """gate and up take turns on the last axis; experts are stacked and (in, out) there too."""
    experts, width, hidden = c.n_routed_experts, c.expert_width, c.moe_intermediate_size
    part = lambda name: ("mixer", "experts", name)  # noqa: E731
    yield _matrix("mlp.router", ("mixer", "router", "gate"), experts, c.hidden_size)
    yield _vector("mlp.router.bias", ("mixer", "router", "gate_bias"), experts)
    yield _interleaved("mlp.experts.gate_up_proj", [part("gate"), part("up")], (experts, width), hidden)
    yield _interleaved("mlp.experts.gate_up_proj_bias", [part("gate_bias"), part("up_bias")], (experts,), hidden)
    yield _whole("mlp.experts.down_proj", part("down"), (experts, hidden, width))
    yield _whole("mlp.experts.down_proj_bias", part("down_bias"), (experts, width))


def _gpt2_attention(c: ModelConfig) -> Rules:
    """q, k and v are column blocks of one map, which is (in, out) there too."""
    d, paths = c.hidden_size, [("mixer", name) for name in ("query", "key", "value")]
    weights = (_Part(path, (ALL, slice(i, i + 1), ALL), (d, d)) for i, path in enumerate(paths))
    yield _Rule("attn.c_attn.weight", (d, 3 * d), (d, 3, d), tuple(weights))
    yield _rows("attn.c_attn.bias", [(("mixer", f"{name}_bias"), d) for _, name in paths])
    yield _whole("attn.c_proj.weight", ("mixer", "out"), (d, d))
    yield _vector("attn.c_proj.bias", ("mixer", "out_bias"), d)


def _gpt2_mlp(c: ModelConfig) -> Rules:
    d, hidden = c.hidden_size, c.intermediate_size
    for name, ours, into, out in (("c_fc", "up", d, hidden), ("c_proj", "down", hidden, d)):
        yield _whole(f"mlp.{name}.weight", ("mixer", ours), (into, out))
        yield _vector(f"mlp.{name}.bias", ("mixer", f"{ours}_bias"), out)


def _dense(names: _MLPNames, module: str) -> Callable[[ModelConfig], Rules]:
    return lambda c: _mlp(module, ("mixer",), names, c.hidden_size, c.intermediate_size, bias=c.mlp_bias)


def _plain_attention(module: str) -> Callable[[ModelConfig], Rules]:
    return lambda c: _attention(c, module)


# Families


class Family(NamedTuple):
    """A Hugging Face model type: its mixers by letter of the pattern, and the names around them.

    norms: of the residual layers that one numbered layer holds, in order. old: names in older files, as (start, new
    start); ignored: ends of names that older files have and that hold no parameter.
    """

    mixers: Mapping[str, Callable[[ModelConfig], Rules]]
    layers: str = "model.layers"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    positions: str = ""
    old: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def canonical(self, name: str) -> str | None:
        """The name in the table of a tensor called `name` in a file; None for one that is ignored."""
        if name.endswith(self.ignored):
            return None
        return next((new + name.removeprefix(old) for old, new in self.old if name.startswith(old)), name)


SELF_ATTENTION = {letter: _plain_attention("self_attn") for letter in "*w"}
BACKBONE = {
    "layers": "backbone.layers",
    "norms": ("norm",),
    "embedding": "backbone.embeddings",
    "final_norm": "backbone.norm_f",
    "old": (("backbone.embedding.", "backbone.embeddings."),),
}
FAMILIES: dict[str, Family] = {
    "nemotron_h": Family(
        {
            "M": _mamba2,
            "*": _plain_attention("mixer"),
            "-": _dense(UP_DOWN, "mixer"),
            "E": _nemotron_h_experts,
        },
        **BACKBONE,
    ),
    "mamba2": Family({"M": _mamba2}, **BACKBONE),
    "mamba": Family({"m": _mamba1}, **BACKBONE),
    "deepseek_v3": Family({"+": _latent_attention, "-": _dense(GATE_UP_DOWN, "mlp"), "E": _deepseek_experts}),
    "mixtral": Family({**SELF_ATTENTION, "E": _mixtral_experts}),
    "qwen2_moe": Family({**SELF_ATTENTION, "-": _dense(GATE_UP_DOWN, "mlp"), "E": _qwen_experts}),
    "qwen3_moe": Family({**SELF_ATTENTION, "-": _dense(GATE_UP_DOWN, "mlp"), "E": _qwen_experts}),
    "gpt_oss": Family({**SELF_ATTENTION, "E": _gpt_oss_experts}),
    "nemotron": Family({"*": _plain_attention("self_attn"), "-": _dense(UP_DOWN, "mlp")}),
    "gpt2": Family(
        {"*": _gpt2_attention, "-": _gpt2_mlp},
        layers="transformer.h",
        norms=("ln_1", "ln_2"),
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        positions="transformer.wpe",
        old=tuple((start, f"transformer.{start}") for start in ("h.", "wte.", "wpe.", "ln_f.")),
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
}


def table(family: str, config: ModelConfig, *, mtp_blocks: int = 1) -> Table:
    """Every tensor of a checkpoint of `family` that holds a model of `config`, by name.

    mtp_blocks: how often the multi-token-prediction block is written; all but the first are copies.
    """
    names, found = FAMILIES[family], {}
    found[f"{names.embedding}.weight"] = _outer(("embedding", "weight"), (config.vocab_size, config.hidden_size))
    if names.positions and config.learned_positions is not None:
        shape = (config.learned_positions, config.hidden_size)
        found[f"{names.positions}.weight"] = _outer(("embedding", "positions"), shape)
    found |= _stack(names, config, config.layers.main, ("backbone",), names.layers, 0)
    found |= {f"{names.final_norm}.{part}": _norm(config, ("norm", part)) for part in _norm_parts(config)}
    head = (config.vocab_size, config.hidden_size)
    if config.tie_word_embeddings:
        found["lm_head.weight"] = Tensor(head, (), copy_of=f"{names.embedding}.weight", written=False)
    else:
        found["lm_head.weight"] = _outer(("head", "weight"), head, transposed=True)
    for block in range(mtp_blocks if config.layers.mtp else 0):
        tensors = MTP[family](config, block)
        if block:
            originals = dict(zip(tensors, MTP[family](config, 0), strict=True))
            copies = {name: tensor.copy_of or originals[name] for name, tensor in tensors.items()}
            tensors = {n: Tensor(t.shape, (), t.float32, copy_of=copies[n]) for n, t in tensors.items()}
        found |= tensors
    return found


def leaf_shapes(tensors: Table) -> dict[Path, Shape]:
    """The shape of every parameter that the table fills."""
    lead: dict[Path, Shape] = {}
    own: dict[Path, Shape] = {}
    for tensor in tensors.values():
        for piece in tensor.pieces:
            counts = tuple(i + 1 for i in piece.index)
            lead[piece.path] = tuple(map(max, zip(lead.get(piece.path, counts), counts, strict=True)))
            own[piece.path] = piece.own_shape
    return {path: (*lead[path], *own[path]) for path in own}


def gather(tensors: Table, values: Mapping[str, np.ndarray]) -> dict[Path, np.ndarray]:
    """Every parameter by path, from all tensors in memory. Gradients map as weights do."""
    shapes = leaf_shapes(tensors)
    found: dict[Path, np.ndarray] = {}
    for name, tensor in tensors.items():
        for piece in tensor.pieces:
            if piece.path not in found:
                found[piece.path] = np.empty(shapes[piece.path], values[name].dtype)
            found[piece.path][piece.index] = piece.take(values[name])
    return found


def _outer(path: Path, shape: Shape, *, transposed: bool = False) -> Tensor:
    return Tensor(shape, (Piece(path, (), shape, shape, (ALL,) * len(shape), transposed),))


def _norm_parts(config: ModelConfig) -> tuple[str, ...]:
    return ("weight",) if config.norm.startswith("rms") else ("weight", "bias")


def _norm(config: ModelConfig, path: Path) -> Tensor:
    return _outer(path, (config.hidden_size,))


def _stack(family: Family, config: ModelConfig, letters: str, path: Path, prefix: str, first: int) -> Table:
    """The layers of the Stack at `path`, numbered from `first`."""
    found: Table = {}
    for number, (letter, place) in enumerate(zip(letters, places(repeats(letters)), strict=True)):
        layer, norm = divmod(number, len(family.norms))
        here = (*path, *(step for child in place.path for step in ("children", child)))
        for rule in _layer(family, config, letter, family.norms[norm]):
            pieces = tuple(
                Piece(
                    (*here, *part.path), (*place.index, *part.index), part.shape, rule.view, part.cut, rule.transposed
                )
                for part in rule.parts
            )
            found[f"{prefix}.{first + layer}.{rule.name}"] = Tensor(rule.shape, pieces, rule.float32)
    return found


def _layer(family: Family, config: ModelConfig, letter: str, norm: str) -> Rules:
    for part in _norm_parts(config):
        yield _vector(f"{norm}.{part}", ("norm", part), config.hidden_size)
    if letter not in family.mixers:
        raise ConfigError(f"pattern letter {letter!r} has no tensors in this family; expected {''.join(family.mixers)}")
    yield from family.mixers[letter](config)


# The multi-token-prediction block


def _nemotron_h_mtp(config: ModelConfig, block: int) -> Table:
    """Its own tensors lie in its first layer and its last."""
    d, letters = config.hidden_size, config.layers.mtp
    first, last = block * len(letters), (block + 1) * len(letters) - 1
    found = _stack(FAMILIES["nemotron_h"], config, letters, ("mtp", "layers"), "mtp.layers", first)
    found |= _joined(config, f"mtp.layers.{first}")
    found[f"mtp.layers.{last}.final_layernorm.weight"] = _outer(("mtp", "final_norm", "weight"), (d,))
    return found


def _deepseek_mtp(config: ModelConfig, block: int) -> Table:
    """One more numbered layer, with copies of embedding and head."""
    number = len(config.layers.main) // 2 + block
    prefix, vocabulary = f"model.layers.{number}", (config.vocab_size, config.hidden_size)
    found = _stack(FAMILIES["deepseek_v3"], config, config.layers.mtp, ("mtp", "layers"), "model.layers", number)
    found |= _joined(config, prefix)
    found[f"{prefix}.shared_head.norm.weight"] = _outer(("mtp", "final_norm", "weight"), (config.hidden_size,))
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    found[f"{prefix}.embed_tokens.weight"] = Tensor(vocabulary, (), copy_of="model.embed_tokens.weight")
    found[f"{prefix}.shared_head.head.weight"] = Tensor(vocabulary, (), copy_of=head)
    return found


def _joined(config: ModelConfig, prefix: str) -> Table:
    d = config.hidden_size
    return {
        f"{prefix}.enorm.weight": _outer(("mtp", "embedding_norm", "weight"), (d,)),
        f"{prefix}.hnorm.weight": _outer(("mtp", "hidden_norm", "weight"), (d,)),
        f"{prefix}.eh_proj.weight": _outer(("mtp", "project"), (d, 2 * d), transposed=True),
    }


MTP: dict[str, Callable[[ModelConfig, int], Table]] = {"nemotron_h": _nemotron_h_mtp, "deepseek_v3": _deepseek_mtp}


def mtp_name(family: str, config: ModelConfig) -> Callable[[str], bool]:
    """Whether a tensor's name is one of the multi-token-prediction block's."""
    number = len(config.layers.main) // 2
    start = "mtp." if family == "nemotron_h" else f"model.layers.{number}."
    return lambda name: name.startswith(start)
