"""The place of every tensor of a Hugging Face checkpoint in a LanguageModel: one table for both directions.

Fused tensors are split into blocks; experts, and the layers of a Repeat, are stacked along leading axes. Every rule is
linear and invertible.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.convert.mixers import (
    ALL,
    GATE_UP_DOWN,
    UP_DOWN,
    Path,
    Rules,
    Shape,
    deepseek_experts,
    dense,
    gpt2_attention,
    gpt2_mlp,
    gpt_oss_experts,
    latent_attention,
    mamba1,
    mamba2,
    mixtral_experts,
    nemotron_h_experts,
    plain_attention,
    qwen_experts,
    vector,
)
from orogen.model.block import places, repeats


class Piece(NamedTuple):
    """A part of a tensor and its place in a parameter. The `slices` of the tensor reshaped to `view`, themselves
    reshaped to `shape`, and transposed if `transposed`, are the parameter `path` at `index` of its leading axes."""

    path: Path
    index: tuple[int, ...]
    shape: Shape
    view: Shape
    slices: tuple[slice, ...]
    transposed: bool

    @property
    def own_shape(self) -> Shape:
        """The part's shape in the parameter, after the leading axes."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter's part, from the tensor: a view of it if possible."""
        part = tensor.reshape(self.view)[self.slices].reshape(self.shape)
        return part.swapaxes(-1, -2) if self.transposed else part

    def put(self, tensor: np.ndarray, part: np.ndarray) -> None:
        """The inverse of `take`: writes the parameter's part into the contiguous `tensor`."""
        target = tensor.reshape(self.view)[self.slices]
        target[...] = (part.swapaxes(-1, -2) if self.transposed else part).reshape(target.shape)


class Tensor(NamedTuple):
    """A tensor's shape, its pieces, and whether it stays float32 when the others are written in another dtype.

    copy_of: the tensor that it repeats; a copy has no pieces. Tensors without pieces (copies, and those without
    numbers) may be missing from a folder. written: whether transformers writes the copy.
    """

    shape: Shape
    pieces: tuple[Piece, ...]
    float32: bool = False
    copy_of: str | None = None
    written: bool = True

    @property
    def optional(self) -> bool:
        """Whether a folder may lack it."""
        return not self.pieces


Table = dict[str, Tensor]
HEAD = "lm_head.weight"


# Families


class Family(NamedTuple):
    """A Hugging Face model type: its mixers by letter of the pattern, and the names around them.

    norms: the norms of the residual layers in one numbered layer, in order. old: prefixes of names in older files, as
    (old, new). ignored: suffixes of names that older files have and that hold no parameter. ties: whether its class in
    transformers follows tie_word_embeddings, so that it needs no copy of the head.
    """

    mixers: Mapping[str, Callable[[ModelConfig], Rules]]
    layers: str = "model.layers"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    positions: str = ""
    old: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    ties: bool = True

    def canonical(self, name: str) -> str | None:
        """The table's name for a tensor called `name` in a file; None if it is ignored."""
        if name.endswith(self.ignored):
            return None
        return next((new + name.removeprefix(old) for old, new in self.old if name.startswith(old)), name)


SELF_ATTENTION = {letter: plain_attention("self_attn") for letter in "*w"}
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
            "M": mamba2,
            "*": plain_attention("mixer"),
            "-": dense(UP_DOWN, "mixer"),
            "E": nemotron_h_experts,
        },
        ties=False,
        **BACKBONE,
    ),
    "mamba2": Family({"M": mamba2}, **BACKBONE),
    "mamba": Family({"m": mamba1}, **BACKBONE),
    "deepseek_v3": Family({"+": latent_attention, "-": dense(GATE_UP_DOWN, "mlp"), "E": deepseek_experts}),
    "mixtral": Family({**SELF_ATTENTION, "E": mixtral_experts}),
    "qwen2_moe": Family({**SELF_ATTENTION, "-": dense(GATE_UP_DOWN, "mlp"), "E": qwen_experts}),
    "qwen3_moe": Family({**SELF_ATTENTION, "-": dense(GATE_UP_DOWN, "mlp"), "E": qwen_experts}),
    "gpt_oss": Family({**SELF_ATTENTION, "E": gpt_oss_experts}),
    "nemotron": Family({"*": plain_attention("self_attn"), "-": dense(UP_DOWN, "mlp")}),
    "gpt2": Family(
        {"*": gpt2_attention, "-": gpt2_mlp},
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

    mtp_blocks: how many times the multi-token-prediction block is written; all but the first are copies.
    """
    names, found = FAMILIES[family], {}
    found[f"{names.embedding}.weight"] = _outer(("embedding", "weight"), (config.vocab_size, config.hidden_size))
    if names.positions and config.learned_positions is not None:
        shape = (config.learned_positions, config.hidden_size)
        found[f"{names.positions}.weight"] = _outer(("embedding", "positions"), shape)
    found |= _stack(names, config, config.layers.main, ("backbone",), prefix=names.layers, first=0)
    found |= {f"{names.final_norm}.{part}": _norm(config, ("norm", part)) for part in _norm_parts(config)}
    head = (config.vocab_size, config.hidden_size)
    if config.tie_word_embeddings:
        found[HEAD] = Tensor(head, (), copy_of=f"{names.embedding}.weight", written=not names.ties)
    else:
        found[HEAD] = _outer(("head", "weight"), head, transposed=True)
    for block in range(mtp_blocks if config.layers.mtp else 0):
        tensors = MTP[family](config, block)
        if block:
            originals = dict(zip(tensors, MTP[family](config, 0), strict=True))
            copies = {name: tensor.copy_of or originals[name] for name, tensor in tensors.items()}
            tensors = {n: Tensor(t.shape, (), t.float32, copy_of=copies[n]) for n, t in tensors.items()}
        found |= tensors
    return found


def ignored(family: object) -> Callable[[str], bool]:
    """Whether a tensor of this name holds no parameter in files of the family; always False for an unknown family."""
    known = FAMILIES.get(family) if isinstance(family, str) else None
    return lambda name: known is not None and known.canonical(name) is None


def head_and_embedding(family: str) -> tuple[str, str]:
    """The names of the head's tensor and of the embedding's."""
    return HEAD, f"{FAMILIES[family].embedding}.weight"


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


def _outer(path: Path, shape: Shape, *, transposed: bool = False) -> Tensor:
    return Tensor(shape, (Piece(path, (), shape, shape, (ALL,) * len(shape), transposed),))


def _norm_parts(config: ModelConfig) -> tuple[str, ...]:
    return ("weight",) if config.norm.startswith("rms") else ("weight", "bias")


def _norm(config: ModelConfig, path: Path) -> Tensor:
    return _outer(path, (config.hidden_size,))


def _stack(family: Family, config: ModelConfig, letters: str, path: Path, *, prefix: str, first: int) -> Table:
    """The tensors of the layers of the Stack at `path`, numbered from `first`."""
    found: Table = {}
    for number, (letter, place) in enumerate(zip(letters, places(repeats(letters)), strict=True)):
        layer, norm = divmod(number, len(family.norms))
        here = (*path, *(step for child in place.path for step in ("children", child)))
        for rule in _layer(family, config, letter, family.norms[norm]):
            pieces = tuple(
                Piece(
                    (*here, *part.path),
                    (*place.index, *part.index),
                    part.shape,
                    rule.view,
                    part.slices,
                    rule.transposed,
                )
                for part in rule.parts
            )
            found[f"{prefix}.{first + layer}.{rule.name}"] = Tensor(rule.shape, pieces, rule.float32)
    return found


def _layer(family: Family, config: ModelConfig, letter: str, norm: str) -> Rules:
    for part in _norm_parts(config):
        yield vector(f"{norm}.{part}", ("norm", part), config.hidden_size)
    if letter not in family.mixers:
        raise ConfigError(f"pattern letter {letter!r} has no tensors in this family; expected {''.join(family.mixers)}")
    yield from family.mixers[letter](config)


# The multi-token-prediction block


def _nemotron_h_mtp(config: ModelConfig, block: int) -> Table:
    """The block's own tensors are in its first layer and its last."""
    d, letters = config.hidden_size, config.layers.mtp
    first, last = block * len(letters), (block + 1) * len(letters) - 1
    found = _stack(FAMILIES["nemotron_h"], config, letters, ("mtp", "layers"), prefix="mtp.layers", first=first)
    found |= _joined(config, f"mtp.layers.{first}")
    found[f"mtp.layers.{last}.final_layernorm.weight"] = _outer(("mtp", "final_norm", "weight"), (d,))
    return found


def _deepseek_mtp(config: ModelConfig, block: int) -> Table:
    """One more numbered layer, with copies of embedding and head."""
    number = len(config.layers.main) // 2 + block
    prefix, vocabulary = f"model.layers.{number}", (config.vocab_size, config.hidden_size)
    found = _stack(
        FAMILIES["deepseek_v3"], config, config.layers.mtp, ("mtp", "layers"), prefix="model.layers", first=number
    )
    found |= _joined(config, prefix)
    found[f"{prefix}.shared_head.norm.weight"] = _outer(("mtp", "final_norm", "weight"), (config.hidden_size,))
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else HEAD
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


DEEPSEEK_MTP_LAYER = 61  # DeepSeek-V3's own; transformers' class recognises no other number


def remarks(family: str, config: ModelConfig, *, mtp_blocks: int) -> list[str]:
    """What transformers 5.23 does differently with an export, one line each."""
    found = []
    if family == "nemotron_h" and config.time_step_max is not None:
        found.append(f"transformers has no upper limit on time steps, which is {config.time_step_max} here")
    first = len(config.layers.main) // 2
    blocks = range(first, first + mtp_blocks) if family == "deepseek_v3" and config.layers.mtp else ()
    if others := [f"model.layers.{number}.*" for number in blocks if number != DEEPSEEK_MTP_LAYER]:
        found.append(
            f"{', '.join(others)} hold the multi-token-prediction block, which transformers recognises only as "
            f"layer {DEEPSEEK_MTP_LAYER}: it drops them as unexpected"
        )
    return found
