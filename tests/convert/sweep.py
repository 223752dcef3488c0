"""Every field of every family's config.json left out, null or under its other name, and how transformers 5.23 reads
that: recorded in fixtures/convert/defaults.json, which `make test-peer` compares with transformers."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.convert.synthetic import CASES, stored

FILE = Path(__file__).parent.parent / "fixtures" / "convert" / "defaults.json"
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# For defaults that have no effect in the case itself.
VARIANTS = {
    "qwen2_moe windowed": {
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": None,
        "max_window_layers": 2,
    },
    "qwen3_moe windowed": {"use_sliding_window": True, "sliding_window": 9},
    "mixtral windowed": {"sliding_window": 9},
    "mixtral yarn": {"rope_parameters": YARN, "max_position_embeddings": 512},
    "qwen2_moe yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
    "qwen3_moe older": {"rope_parameters": None, "rope_theta": 77.0, "rope_scaling": YARN},
    "gpt_oss older": {"rope_parameters": None, "rope_theta": 77.0},
    "gpt_oss plain": {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}, "layer_types": None},
    "nemotron older": {"rope_parameters": None, "rope_theta": 77.0, "partial_rotary_factor": 0.34},
    "mixtral partial": {"rope_parameters": None, "rope_theta": 77.0, "partial_rotary_factor": 0.25},
    "nemotron_h mtp": {"num_nextn_predict_layers": 1},
    "nemotron_h attention_bias": {"attention_bias": True},
}
OTHER_NAMES = {
    "nemotron_h": {
        "layers_block_type": "layer_types", "n_routed_experts": "num_local_experts", "n_groups": "mamba_n_groups",
        "conv_kernel": "mamba_d_conv", "chunk_size": "mamba_chunk_size", "use_conv_bias": "mamba_conv_bias",
        "time_step_limit": "mamba_dt_limit",
    },
    "deepseek_v3": {"n_routed_experts": "num_local_experts", "num_nextn_predict_layers": "num_mtp_layers"},
    "mixtral": {"num_local_experts": "num_experts"},
    "qwen3_moe": {"num_local_experts": "num_experts", "num_experts": "num_local_experts"},
    "gpt_oss": {"num_local_experts": "num_experts"},
    "gpt2": {
        "n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
    },
}  # fmt: skip
UNREAD = (
    "model_type", "architectures", "transformers_version", "dtype", "_name_or_path", "chunk_size_feed_forward",
    "id2label", "label2id", "is_encoder_decoder", "output_attentions", "output_hidden_states", "problem_type",
    "return_dict",
)  # fmt: skip
GONE = "(gone)"


def bases() -> dict[str, dict]:
    """The configs that edits start from, by name."""
    found = {case: stored()[case]["config"] for case in CASES}
    for name, fields in VARIANTS.items():
        changed = found[name.split()[0]] | fields
        found[name] = {k: v for k, v in changed.items() if v is not None or k not in fields}
    return found


def edits(base: dict) -> Iterator[tuple[str, dict]]:
    """Every edit of a config by name, and the config that it gives."""
    yield "as it is", base
    yield "nothing but model_type", {"model_type": base["model_type"]}
    for field in sorted(base.keys() - set(UNREAD)):
        without = {k: v for k, v in base.items() if k != field}
        yield f"{field} left out", without
        yield f"{field} null", without | {field: None}
        if other := OTHER_NAMES.get(base["model_type"], {}).get(field):
            yield f"{field} as {other}", without | {other: base[field]}


def changed(values: dict, changes: dict) -> dict:
    """`values` with `changes`; a field changed to GONE is removed."""
    return {k: v for k, v in (values | changes).items() if v != GONE}


@functools.cache
def recorded() -> dict[str, dict[str, dict | None]]:
    """For each base, how transformers completes it, and how the completed config of each edit differs from that; None
    if transformers refuses it."""
    return json.loads(FILE.read_text())


def complete(base: dict, load: Callable[[dict], dict]) -> dict[str, dict | None]:
    """The record of one base, made by transformers. load: completes a config.json as transformers does."""
    names, found, before = edits(base), {}, base
    for name, values in names:
        try:
            whole = load(values)
        except Exception:  # whatever its validation raises
            found[name] = None
            continue
        keys = sorted((before.keys() | whole.keys()) - set(UNREAD))
        found[name] = {k: whole.get(k, GONE) for k in keys if before.get(k, GONE) != whole.get(k, GONE)}
        if name == "as it is":
            before = changed(base, found[name])
    return found
