"""Tiny quantised Hugging Face folders, written from the public definitions in numpy, apart from orogen.

Layouts: ModelOpt's FP8, per-channel FP8, NVFP4 and mixed precision, as the Nemotron 3 releases have them;
compressed-tensors' float-quantized, naive-quantized and nvfp4-pack-quantized; the blocks of DeepSeek-V3.
"""

import json
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tests.convert.synthetic import shapes, short_nemotron_h

E4M3, BF16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
PRODUCER = {"name": "modelopt", "version": "0.44.0"}


class Case(NamedTuple):
    """A folder's config.json, hf_quant_config.json if it has one, its tensors, and the numbers of every weight."""

    config: dict
    other: dict | None
    tensors: dict[str, np.ndarray]
    decoded: dict[str, np.ndarray]

    def write(self, folder: Path, *, shards: int = 1) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        if self.other is not None:
            (folder / "hf_quant_config.json").write_text(json.dumps(self.other, indent=4))
        names = list(self.tensors)
        if shards == 1:
            save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return
        files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
        for file, part in files.items():
            save_file({name: self.tensors[name] for name in part}, folder / file)
        weights = {name: file for file, part in files.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


DTYPES = {
    "F8_E4M3": E4M3,
    "BF16": BF16,
    "U8": np.dtype(np.uint8),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
}


def read(folder):
    """Every tensor of a folder; safetensors' own numpy reader has no F8_E4M3."""
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                flat = np.frombuffer(data[start + first : start + last], DTYPES[entry["dtype"]])
                found[name] = flat.reshape(entry["shape"])
    return found


def nearest(ratio, values):
    """Places of the nearest of increasing `values`, decided in float64; of two equally near ones the even place."""
    place = np.abs(ratio[..., None] - values).argmin(-1)
    tie = (place < len(values) - 1) & (ratio == (values[place] + values[np.minimum(place + 1, len(values) - 1)]) / 2)
    return place + (tie & (place % 2 == 1))


def e4m3(ratio):
    values = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float64)
    codes = nearest(np.abs(ratio), values).astype(np.uint8)
    return (codes + np.where(np.signbit(ratio), 128, 0).astype(np.uint8)).view(E4M3)


def fp8(w, scale):
    """Codes for a scale that broadcasts to w, and the numbers that they stand for."""
    codes = e4m3(w.astype(np.float64) / scale)
    return codes, np.float32(codes.astype(np.float64) * np.float64(scale))


def fp8_tensor(w):
    scale = np.float32(np.abs(w).max() / 448)
    return *fp8(w, scale), scale


def fp8_rows(w, dtype=np.float32):
    scale = (np.abs(w).max(1, keepdims=True) / 448).astype(dtype)
    return *fp8(w, scale.astype(np.float64)), scale


def fp8_blocks(w, rows, columns):
    grid = np.zeros((-(-w.shape[0] // rows), -(-w.shape[1] // columns)), np.float32)
    whole = np.zeros(w.shape)
    for i, j in np.ndindex(grid.shape):
        at = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        grid[i, j] = np.abs(w[at]).max() / 448
        whole[at] = grid[i, j]
    return *fp8(w, whole), grid


def nvfp4(w, inverse=False):
    """Packed codes, numbers, block scales and the global scale: a factor, or its inverse."""
    amax = np.float64(np.abs(w).max())
    whole = np.float32(448 * 6 / amax if inverse else amax / (448 * 6))
    factor = 1 / np.float64(whole) if inverse else np.float64(whole)
    out, into = w.shape
    blocks = -(-into // 16)
    scales, codes, numbers = (
        np.zeros((out, blocks), E4M3),
        np.zeros((out, into + into % 2), np.uint8),
        np.zeros(w.shape),
    )
    for i, j in np.ndindex(out, blocks):
        at = slice(16 * j, min(16 * j + 16, into))
        scales[i, j] = e4m3(np.abs(w[i, at]).max() / (6 * factor))
        by = np.float64(scales[i, j]) * factor
        indices = nearest(np.abs(w[i, at]) / by, E2M1)
        codes[i, at] = indices + 8 * (w[i, at] < 0)
        numbers[i, at] = np.where(w[i, at] < 0, -1, 1) * E2M1[indices] * by
    packed = codes[:, 0::2] + 16 * codes[:, 1::2]
    return packed, np.float32(numbers), scales, whole


class _Writer:
    """Random weights: each is written in the format that `kind` gives for its module."""

    def __init__(self, tensors, kind):
        self.tensors, self.decoded = {}, {}
        draw, scales = np.random.default_rng(5), np.random.default_rng(6)
        for name, shape in tensors.items():
            w = (draw.normal(size=shape) / 4).astype(np.float32)
            module = name.removesuffix(".weight")
            made = kind(module) if len(shape) > 1 else None
            if made is None:
                dtype = np.float32 if name.endswith("e_score_correction_bias") else BF16
                self.tensors[name] = w.astype(dtype)
                self.decoded[name] = self.tensors[name].astype(np.float32)
            else:
                parts, self.decoded[name] = made(w.astype(BF16).astype(np.float32), scales)
                self.tensors |= {f"{module}.{part}": array for part, array in parts.items()}

    def case(self, config, other=None):
        return Case(config, other, {name: np.asarray(array) for name, array in self.tensors.items()}, self.decoded)


def modelopt_fp8(w, draw):
    codes, numbers, scale = fp8_tensor(w)
    return {"weight": codes, "weight_scale": scale, "input_scale": np.float32(draw.uniform(0.01, 1))}, numbers


def modelopt_rows(w, draw):
    codes, numbers, scale = fp8_rows(w)
    return {"weight": codes, "weight_scale": scale[:, 0]}, numbers


def modelopt_nvfp4(w, draw):
    packed, numbers, scales, whole = nvfp4(w)
    parts = {"weight": packed, "weight_scale": scales, "weight_scale_2": whole}
    return parts | {"input_scale": np.float32(draw.uniform(0.01, 1))}, numbers


def compressed_rows(w, draw):
    codes, numbers, scale = fp8_rows(w, BF16)
    return {"weight": codes, "weight_scale": scale}, numbers


def compressed_tensor(w, draw):
    codes, numbers, scale = fp8_tensor(w)
    one = np.float32(draw.uniform(0.01, 1)).reshape(1)
    return {"weight": codes, "weight_scale": scale.reshape(1), "input_scale": one}, numbers


def compressed_blocks(w, draw):
    codes, numbers, scale = fp8_blocks(w, 16, 8)
    return {"weight": codes, "weight_scale": scale}, numbers


def compressed_nvfp4(w, draw):
    packed, numbers, scales, whole = nvfp4(w, inverse=True)
    parts = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": whole.reshape(1)}
    return parts | {"input_global_scale": np.float32(draw.uniform(10, 100)).reshape(1)}, numbers


def deepseek_blocks(w, draw):
    codes, numbers, scale = fp8_blocks(w, 16, 8)
    return {"weight": codes, "weight_scale_inv": scale}, numbers


LINEAR = (
    "in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj",
    "fc1_latent_proj", "fc2_latent_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
)  # fmt: skip


def is_linear(module):
    return module.rpartition(".")[2] in LINEAR


def plain(family="nemotron_h", mtp=False):
    """The same weights in bfloat16."""
    config, tensors = shapes(family, mtp=mtp)
    return _Writer(tensors, lambda module: None).case(config)


def nano(kind="FP8"):
    """One format for all linear maps but those of attention, of the Mamba layer in front of it, and the head."""
    config, tensors = shapes("nemotron_h")
    kept = [f"backbone.layers.3.mixer.{name}_proj" for name in "qkvo"]
    kept += ["backbone.layers.2.mixer.in_proj", "backbone.layers.2.mixer.out_proj"]
    exclude = ["lm_head", *kept, *(f"backbone.layers.{n}.mixer.conv1d" for n in (0, 2, 6))]
    make = {"FP8": modelopt_fp8, "NVFP4": modelopt_nvfp4, "FP8_PER_CHANNEL_PER_TOKEN": modelopt_rows}[kind]
    made = _Writer(tensors, lambda module: make if is_linear(module) and module not in kept else None)
    for name in "kv":
        made.tensors[f"backbone.layers.3.mixer.{name}_proj.{name}_scale"] = np.float32(0.25)
    stated = {"quant_algo": kind, "kv_cache_quant_algo": "FP8", "exclude_modules": exclude}
    stated |= {"group_size": 16} if kind == "NVFP4" else {}
    other = {"producer": PRODUCER, "quantization": stated}
    return made.case(config | {"torch_dtype": "bfloat16"}, other)


def super_mixed():
    """Experts in NVFP4, shared experts and some Mamba maps in FP8, the rest and the MTP block in bfloat16."""
    config, tensors = shapes("nemotron_h", mtp=True)

    def algorithm(module):
        leaf = module.rpartition(".")[2]
        if not is_linear(module) or module.startswith("mtp."):
            return None
        if ".experts." in module or module == "backbone.layers.5.mixer.shared_experts.down_proj":
            return "NVFP4"
        fp8_here = ".shared_experts." in module or (leaf == "in_proj" and ".2." not in module) or leaf == "o_proj"
        return "FP8" if fp8_here or module == "backbone.layers.1.mixer.fc1_latent_proj" else None

    make = {"NVFP4": modelopt_nvfp4, "FP8": modelopt_fp8, None: None}
    made = _Writer(tensors, lambda module: make[algorithm(module)])
    for name in "kv":
        made.tensors[f"backbone.layers.3.mixer.{name}_proj.{name}_scale"] = np.float32(0.5)
    layers = {}
    for name in tensors:
        if (found := algorithm(name.removesuffix(".weight"))) is not None:
            layers[name.removesuffix(".weight")] = {"quant_algo": found} | (
                {"group_size": 16} if found == "NVFP4" else {}
            )
    bits = {"FP8": {"num_bits": 8}, "NVFP4": {"num_bits": 4, "group_size": 16}}
    groups = {}
    for number, (kind, size) in enumerate(bits.items()):
        form = {"dynamic": False, "type": "float"} | size
        targets = sorted(module for module, layer in layers.items() if layer["quant_algo"] == kind)
        groups[f"group_{number}"] = {"input_activations": form, "weights": form, "targets": targets}
    config["quantization_config"] = {
        "config_groups": groups,
        "quantized_layers": layers,
        "ignore": [],
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    stated = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": layers}
    return made.case(config, {"producer": PRODUCER, "quantization": stated})


def short(make, kind):
    """Experts, then Mamba: all linear maps but the head in one format of ModelOpt."""
    config, tensors = short_nemotron_h(96)
    config["layers_block_type"] = config["layers_block_type"][:2]
    tensors = {
        name: shape
        for name, shape in tensors.items()
        if not name.startswith(("backbone.layers.2", "backbone.layers.3"))
    }
    made = _Writer(tensors, lambda module: make if is_linear(module) else None)
    return made.case(config, {"quantization": {"quant_algo": kind, "exclude_modules": ["lm_head"]}})


def compressed(form, strategy, make, family="qwen3_moe"):
    """All linear maps but routers and the head, which `re:` patterns exclude."""
    config, tensors = shapes(family)
    made = _Writer(tensors, lambda module: make if is_linear(module) else None)
    four = form == "nvfp4-pack-quantized"
    weights = {"num_bits": 4 if four else 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    weights |= {"group_size": 16 if four else None, "block_structure": [16, 8] if strategy == "block" else None}
    for layer in ("1", "3"):
        made.tensors[f"model.layers.{layer}.self_attn.k_scale"] = np.float32(0.5).reshape(1)
        made.tensors[f"model.layers.{layer}.self_attn.v_scale"] = np.float32(0.75).reshape(1)
    config["quantization_config"] = {
        "config_groups": {
            "group_0": {
                "targets": ["Linear"], "weights": weights, "input_activations": weights, "output_activations": None,
                "format": form,
            }
        },
        "format": form, "quantization_status": "compressed", "quant_method": "compressed-tensors",
        "ignore": ["lm_head", r"re:.*mlp\.gate$"], "kv_cache_scheme": {"num_bits": 8, "type": "float"},
        "sparsity_config": {}, "transform_config": {}, "version": "0.12.2", "global_compression_ratio": None,
    }  # fmt: skip
    return made.case(config)


def deepseek():
    config, tensors = shapes("deepseek_v3", mtp=True)
    made = _Writer(tensors, lambda module: deepseek_blocks if is_linear(module) else None)
    for name in [n for n in made.tensors if n.endswith(("layers.4.embed_tokens.weight", "shared_head.head.weight"))]:
        original = "lm_head.weight" if "head" in name else "model.embed_tokens.weight"
        made.tensors[name], made.decoded[name] = made.tensors[original], made.decoded[original]
    config["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [16, 8],
    }  # fmt: skip
    return made.case(config)


def stacked(kind):
    """gpt-oss's experts, (experts, in, out): FP8 with a scale per expert, or NVFP4 with blocks along the inputs."""
    config, tensors = shapes("gpt_oss")
    made = _Writer(tensors, lambda module: None)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        w = made.decoded[name]
        if kind == "FP8":
            parts = [fp8_tensor(one) for one in w]
            made.tensors[name] = np.stack([p[0] for p in parts])
            made.tensors[f"{name}_weight_scale"] = np.stack([p[2] for p in parts])
            made.decoded[name] = np.stack([p[1] for p in parts])
        else:
            parts = [nvfp4(one.T) for one in w]
            made.tensors[name] = np.stack([np.ascontiguousarray(p[0].T) for p in parts])
            made.tensors[f"{name}_weight_scale"] = np.stack([np.ascontiguousarray(p[2].T) for p in parts])
            made.tensors[f"{name}_weight_scale_2"] = np.stack([p[3] for p in parts])
            made.decoded[name] = np.stack([p[1].T for p in parts])
        made.tensors[f"{name}_input_scale"] = np.float32(0.125)
    layers = {f"model.layers.{n}.mlp.experts": {"quant_algo": kind} for n in range(4)}
    stated = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": layers}
    return made.case(config, {"producer": PRODUCER, "quantization": stated})


CASES = {
    "nano FP8": lambda: nano("FP8"),
    "nano NVFP4": lambda: nano("NVFP4"),
    "nano FP8 by channel": lambda: nano("FP8_PER_CHANNEL_PER_TOKEN"),
    "super": super_mixed,
    "compressed by channel": lambda: compressed("float-quantized", "channel", compressed_rows),
    "compressed by block": lambda: compressed("float-quantized", "block", compressed_blocks),
    "compressed by tensor": lambda: compressed("naive-quantized", "tensor", compressed_tensor),
    "compressed NVFP4": lambda: compressed("nvfp4-pack-quantized", "tensor_group", compressed_nvfp4),
    "deepseek": deepseek,
    "stacked FP8": lambda: stacked("FP8"),
    "stacked NVFP4": lambda: stacked("NVFP4"),
}
