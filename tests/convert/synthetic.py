"""Tiny Hugging Face folders with random numbers. Their names and shapes were recorded with transformers 5.23
(fixtures/convert/tensors.json), except those of multi-token-prediction blocks, which transformers drops."""

import functools
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

FILE = Path(__file__).parent.parent / "fixtures" / "convert" / "tensors.json"
CASES = (
    "nemotron_h", "nemotron_h_biased", "nemotron_h_mlp_bias", "mamba2", "mamba", "deepseek_v3", "deepseek_v3_plain",
    "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "nemotron", "gpt2",
)  # fmt: skip
D, V, EXPERTS, LATENT, INNER, SHARED = 32, 96, 6, 18, 14, 22
NEMOTRON_MTP = {
    "mtp.layers.0.enorm.weight": [D],
    "mtp.layers.0.hnorm.weight": [D],
    "mtp.layers.0.eh_proj.weight": [D, 2 * D],
    "mtp.layers.0.norm.weight": [D],
    "mtp.layers.0.mixer.q_proj.weight": [48, D],
    "mtp.layers.0.mixer.k_proj.weight": [24, D],
    "mtp.layers.0.mixer.v_proj.weight": [24, D],
    "mtp.layers.0.mixer.o_proj.weight": [D, 48],
    "mtp.layers.1.norm.weight": [D],
    "mtp.layers.1.final_layernorm.weight": [D],
    "mtp.layers.1.mixer.gate.weight": [EXPERTS, D],
    "mtp.layers.1.mixer.gate.e_score_correction_bias": [EXPERTS],
    "mtp.layers.1.mixer.shared_experts.up_proj.weight": [SHARED, D],
    "mtp.layers.1.mixer.shared_experts.down_proj.weight": [D, SHARED],
    "mtp.layers.1.mixer.fc1_latent_proj.weight": [LATENT, D],
    "mtp.layers.1.mixer.fc2_latent_proj.weight": [D, LATENT],
}
for _expert in range(EXPERTS):
    NEMOTRON_MTP[f"mtp.layers.1.mixer.experts.{_expert}.up_proj.weight"] = [INNER, LATENT]
    NEMOTRON_MTP[f"mtp.layers.1.mixer.experts.{_expert}.down_proj.weight"] = [LATENT, INNER]


@functools.cache
def stored() -> dict:
    """The recorded cases, by name."""
    return json.loads(FILE.read_text())


def shapes(case: str, *, mtp: bool = False) -> tuple[dict, dict[str, list[int]]]:
    """config.json and the shape of every tensor of a case."""
    config, tensors = dict(stored()[case]["config"]), dict(stored()[case]["tensors"])
    if mtp:
        config["num_nextn_predict_layers"] = 1
        tensors |= NEMOTRON_MTP if case == "nemotron_h" else _deepseek_mtp(tensors)
    return config, tensors


def short_nemotron_h(rows: int) -> tuple[dict, dict[str, list[int]]]:
    """Layers 1 to 4 of nemotron_h, one of each type, with a vocabulary of `rows`."""
    config, tensors = shapes("nemotron_h")
    config |= {"layers_block_type": config["layers_block_type"][1:5], "vocab_size": rows}
    found = {"backbone.embeddings.weight": [rows, D], "lm_head.weight": [rows, D]}
    for name, shape in tensors.items():
        layer = re.fullmatch(r"backbone\.layers\.(\d)\.(.+)", name)
        if not layer:
            found.setdefault(name, shape)
        elif 1 <= int(layer[1]) <= 4:
            found[f"backbone.layers.{int(layer[1]) - 1}.{layer[2]}"] = shape
    return config, found


def _deepseek_mtp(tensors: dict[str, list[int]]) -> dict[str, list[int]]:
    """Layer 4 has the tensors of layer 3 and six more, two of them copies."""
    last, block = "model.layers.3.", "model.layers.4."
    found = {block + name.removeprefix(last): s for name, s in tensors.items() if name.startswith(last)}
    found |= {f"{block}{name}.weight": [D] for name in ("enorm", "hnorm", "shared_head.norm")}
    found |= {f"{block}{name}.weight": [V, D] for name in ("embed_tokens", "shared_head.head")}
    return found | {f"{block}eh_proj.weight": [D, 2 * D]}


def write(folder: Path, config: dict, tensors: dict[str, list[int]], dtype: str = "bfloat16") -> dict[str, np.ndarray]:
    """Writes the folder, with correction biases in float32 and true copies; returns its tensors."""
    draw = np.random.default_rng(0)
    arrays = {}
    for name, shape in tensors.items():
        kind = jnp.float32 if name.endswith("e_score_correction_bias") else jnp.dtype(dtype)
        arrays[name] = draw.normal(size=shape).astype(kind)
    for name in arrays:
        if name.startswith("model.layers") and name.endswith("embed_tokens.weight"):
            arrays[name] = arrays["model.embed_tokens.weight"]
        if name.endswith("shared_head.head.weight"):
            arrays[name] = arrays["lm_head.weight"]
    folder.mkdir()
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2))
    return arrays


def read(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, read by safetensors itself."""
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Whether names, shapes, dtypes and bytes are equal."""
    facts = lambda a: (a.dtype, a.shape, a.tobytes())  # noqa: E731
    return first.keys() == second.keys() and all(facts(first[n]) == facts(second[n]) for n in first)
