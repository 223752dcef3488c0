"""Where each tensor of a Hugging Face `nemotron_h`, `mamba` or `mamba2` checkpoint lives in a LanguageModel, as tables.

PyTorch stores a linear map as (out, in), ours is (in, out). Fused tensors are cut by rows, experts and the layers of a
Repeat are stacked. Every rule is linear, so it maps gradients as it maps weights.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from orogen.config.model import ModelConfig
from orogen.model.block import places, repeats

Tensors = Mapping[str, np.ndarray]
Path = tuple[str | int, ...]


def same(tensor: np.ndarray) -> np.ndarray:
    return tensor


def transposed(tensor_oi: np.ndarray) -> np.ndarray:
    return tensor_oi.T


def taps(tensor_c1k: np.ndarray) -> np.ndarray:
    return tensor_c1k[:, 0]


def mamba2_sizes(config: ModelConfig) -> dict[str, int]:
    inner, states = config.mamba_num_heads * config.mamba_head_dim, config.n_groups * config.ssm_state_size
    return {"z": inner, "x": inner, "B": states, "C": states, "dt": config.mamba_num_heads}


def mamba1_sizes(config: ModelConfig) -> dict[str, int]:
    inner, state = config.mamba_intermediate_size, config.ssm_state_size
    return {"x": inner, "z": inner, "dt_down": config.time_step_rank, "B": state, "C": state}


class Rows(NamedTuple):
    """Those of `part` in a tensor that holds the parts in `order`, of the sizes that a config gives."""

    part: str
    order: tuple[str, ...]
    sizes: Callable[[ModelConfig], dict[str, int]]


class Rule(NamedTuple):
    """A parameter is `change` of rows `rows` (None: all) of tensor `name`; `*` in the name stacks all experts."""

    name: str
    change: Callable[[np.ndarray], np.ndarray] = same
    rows: Rows | None = None


# By letter of the pattern: the parameter's path in its layer, and the tensor's name after `backbone.layers.{i}.`
NORM: dict[Path, Rule] = {("norm", "weight"): Rule("norm.weight")}
OUT: dict[Path, Rule] = {
    ("mixer", "out"): Rule("mixer.out_proj.weight", transposed),
    ("mixer", "out_bias"): Rule("mixer.out_proj.bias"),
}
MAMBA2 = [Rows(part, ("z", "x", "B", "C", "dt"), mamba2_sizes) for part in ("z", "x", "B", "C", "dt")]
MAMBA2_CONV = [Rows(part, ("x", "B", "C"), mamba2_sizes) for part in ("x", "B", "C")]
MAMBA1 = [Rows(part, ("x", "z"), mamba1_sizes) for part in ("x", "z")]
MAMBA1_STEP = [Rows(part, ("dt_down", "B", "C"), mamba1_sizes) for part in ("dt_down", "B", "C")]
LAYERS: dict[str, dict[Path, Rule]] = {
    "M": NORM
    | OUT
    | {("mixer", rows.part): Rule("mixer.in_proj.weight", transposed, rows) for rows in MAMBA2}
    | {
        ("mixer", {"dt": "dt_proj"}.get(rows.part, rows.part) + "_bias"): Rule("mixer.in_proj.bias", same, rows)
        for rows in MAMBA2
    }
    | {("mixer", f"conv_{rows.part}", "weight"): Rule("mixer.conv1d.weight", taps, rows) for rows in MAMBA2_CONV}
    | {("mixer", f"conv_{rows.part}", "bias"): Rule("mixer.conv1d.bias", same, rows) for rows in MAMBA2_CONV}
    | {("mixer", name): Rule(f"mixer.{name}") for name in ("A_log", "D", "dt_bias")}
    | {("mixer", "norm", "weight"): Rule("mixer.norm.weight")},
    "m": NORM
    | OUT
    | {("mixer", rows.part): Rule("mixer.in_proj.weight", transposed, rows) for rows in MAMBA1}
    | {("mixer", f"{rows.part}_bias"): Rule("mixer.in_proj.bias", same, rows) for rows in MAMBA1}
    | {("mixer", rows.part): Rule("mixer.x_proj.weight", transposed, rows) for rows in MAMBA1_STEP}
    | {("mixer", name): Rule(f"mixer.{name}") for name in ("A_log", "D")}
    | {
        ("mixer", "conv", "weight"): Rule("mixer.conv1d.weight", taps),
        ("mixer", "conv", "bias"): Rule("mixer.conv1d.bias"),
        ("mixer", "dt_up"): Rule("mixer.dt_proj.weight", transposed),
        ("mixer", "dt_bias"): Rule("mixer.dt_proj.bias"),
    },
    "*": NORM
    | {
        ("mixer", "query"): Rule("mixer.q_proj.weight", transposed),
        ("mixer", "key"): Rule("mixer.k_proj.weight", transposed),
        ("mixer", "value"): Rule("mixer.v_proj.weight", transposed),
        ("mixer", "out"): Rule("mixer.o_proj.weight", transposed),
    },
    "-": NORM
    | {
        ("mixer", "up"): Rule("mixer.up_proj.weight", transposed),
        ("mixer", "down"): Rule("mixer.down_proj.weight", transposed),
    },
    "E": NORM
    | {
        ("mixer", "router", "gate"): Rule("mixer.gate.weight", transposed),
        ("mixer", "router", "bias"): Rule("mixer.gate.e_score_correction_bias"),
        ("mixer", "experts", "up"): Rule("mixer.experts.*.up_proj.weight", transposed),
        ("mixer", "experts", "down"): Rule("mixer.experts.*.down_proj.weight", transposed),
        ("mixer", "shared", "up"): Rule("mixer.shared_experts.up_proj.weight", transposed),
        ("mixer", "shared", "down"): Rule("mixer.shared_experts.down_proj.weight", transposed),
        ("mixer", "latent_down"): Rule("mixer.fc1_latent_proj.weight", transposed),
        ("mixer", "latent_up"): Rule("mixer.fc2_latent_proj.weight", transposed),
    },
}
MODEL: dict[Path, Rule] = {
    ("embedding", "weight"): Rule("backbone.embeddings.weight"),
    ("norm", "weight"): Rule("backbone.norm_f.weight"),
    ("head", "weight"): Rule("lm_head.weight", transposed),
}
# The MTP block's own tensors lie in its first layer and its last, `mtp.layers.{first}.` and `mtp.layers.{last}.`
MTP: dict[Path, Rule] = {
    ("embedding_norm", "weight"): Rule("{first}.enorm.weight"),
    ("hidden_norm", "weight"): Rule("{first}.hnorm.weight"),
    ("project",): Rule("{first}.eh_proj.weight", transposed),
    ("final_norm", "weight"): Rule("{last}.final_layernorm.weight"),
}


def values(tensors: Tensors, config: ModelConfig) -> dict[Path, np.ndarray]:
    """Every parameter and buffer of a LanguageModel of `config` that `tensors` holds, by path."""
    found = {path: _apply(rule, tensors, config) for path, rule in MODEL.items()}
    found |= _stack(tensors, config, config.layers.main, "backbone.layers", 0, ("backbone",))
    if config.layers.mtp:
        found |= {("mtp", *path): value for path, value in mtp_values(tensors, config, 0).items()}
    return {path: value for path, value in found.items() if value is not None}


def mtp_values(tensors: Tensors, config: ModelConfig, depth: int) -> dict[Path, np.ndarray]:
    """Those of the MTPBlock that a checkpoint with one block a depth applies at `depth`, counted from 0."""
    letters = config.layers.mtp
    first, last = depth * len(letters), (depth + 1) * len(letters) - 1
    found = {}
    for path, rule in MTP.items():
        name = "mtp.layers." + rule.name.format(first=first, last=last)
        found[path] = _apply(rule._replace(name=name), tensors, config)
    return found | _stack(tensors, config, letters, "mtp.layers", first, ("layers",))


def layer_values(tensors: Tensors, config: ModelConfig, letter: str, prefix: str) -> dict[Path, np.ndarray]:
    """Those of one Layer, whose tensors' names begin with `prefix`; None for a tensor that does not exist."""
    return {
        path: _apply(rule._replace(name=f"{prefix}.{rule.name}"), tensors, config)
        for path, rule in LAYERS[letter].items()
    }


def fill(state: nnx.State, found: Mapping[Path, np.ndarray]) -> nnx.State:
    """`state` with the values found. Raises ValueError if one is missing or has another shape."""
    filled = []
    for path, variable in nnx.to_flat_state(state):
        expected = variable.get_value().shape
        if path not in found or found[path].shape != expected:
            raise ValueError(f"{path} is {found[path].shape if path in found else 'missing'}; expected {expected}")
        filled.append((path, variable.replace(jnp.asarray(found[path]))))
    return nnx.from_flat_state(filled)


def module(build: Callable[[], nnx.Module], found: Mapping[Path, np.ndarray]) -> nnx.Module:
    """The module that `build` makes, with the values found in it, its own never drawn."""
    graph, state = nnx.split(jax.eval_shape(build))
    return nnx.merge(graph, fill(state, found))


def _stack(tensors: Tensors, config: ModelConfig, letters: str, prefix: str, first: int, path: Path) -> dict:
    """The layers of a Stack at `path`: those of a Repeat are stacked, one leading axis a level."""
    items = repeats(letters)
    gathered: dict[Path, dict[tuple[int, ...], np.ndarray]] = {}
    for number, (letter, place) in enumerate(zip(letters, places(items), strict=True), first):
        steps = tuple(step for child in place.path for step in ("children", child))
        for inner, value in layer_values(tensors, config, letter, f"{prefix}.{number}").items():
            if value is not None:
                gathered.setdefault((*path, *steps, *inner), {})[place.index] = value
    return {path: _join(by_index) for path, by_index in gathered.items()}


def _join(by_index: Mapping[tuple[int, ...], np.ndarray]) -> np.ndarray:
    counts = tuple(max(column) + 1 for column in zip(*by_index, strict=True))
    values = [by_index[index] for index in np.ndindex(counts)]
    return np.stack(values).reshape(*counts, *values[0].shape) if counts else values[0]


def _apply(rule: Rule, tensors: Tensors, config: ModelConfig) -> np.ndarray | None:
    if "*" in rule.name:
        names = [rule.name.replace("*", str(expert)) for expert in range(config.n_routed_experts)]
        return np.stack([rule.change(tensors[name]) for name in names]) if names[0] in tensors else None
    if rule.name not in tensors:
        return None
    tensor = tensors[rule.name]
    return rule.change(tensor if rule.rows is None else tensor[_rows(rule.rows, config)])


def _rows(rows: Rows, config: ModelConfig) -> slice:
    sizes = rows.sizes(config)
    start = sum(sizes[part] for part in rows.order[: rows.order.index(rows.part)])
    return slice(start, start + sizes[rows.part])
