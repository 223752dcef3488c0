"""What is quantised here is written as others write it: tensors to the bit, and descriptions that they would read."""

import json

import numpy as np
import pytest
from tests.convert.quantised import (
    compressed,
    compressed_nvfp4,
    compressed_rows,
    compressed_tensor,
    nano,
    plain,
    read,
    stacked,
    super_mixed,
)

from orogen.checkpoint.open import open_folder
from orogen.checkpoint.quantised import linear_modules, parts_by_name, write_quantised
from orogen.checkpoint.transfer import export, from_hf
from orogen.config.checks import ConfigError
from orogen.convert.describe import describe
from orogen.convert.names import table
from orogen.convert.quantization import read_quantization
from orogen.precision.stored import encode


def assert_same(found, expected):
    """Names, shapes, dtypes and bytes."""
    assert found.keys() == expected.keys()
    facts = lambda a: (a.dtype, a.shape, a.tobytes())  # noqa: E731
    assert [name for name in found if facts(found[name]) != facts(expected[name])] == []


def by_largest(name, x, parts):
    scheme = parts.scheme
    return encode(x, scheme.kind, block=scheme.block, inverse=scheme.inverse)[0]


def written(case, description, tmp_path, *, family="nemotron_h", mtp=False, source="hf"):
    """The tensors, config.json and hf_quant_config.json that an export of the quantised folder has."""
    plain(family, mtp).write(tmp_path / "hf")
    if source == "ours":
        from_hf(tmp_path / "hf", tmp_path / "ours")
    scales = {n: a for n, a in case.tensors.items() if "input" in n or n.endswith(("k_scale", "v_scale"))}
    with open_folder(tmp_path / source) as folder:
        size = write_quantised(folder, tmp_path / "quantised", description, by_largest, scales=scales)
    export(tmp_path / "quantised", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    other = tmp_path / "back" / "hf_quant_config.json"
    found = read(tmp_path / "back")
    assert size == sum(array.nbytes for array in found.values())
    return found, config, json.loads(other.read_text()) if other.exists() else None


def modules(case, *suffixes):
    return [n.removesuffix(".weight") for n in case.tensors if n.removesuffix(".weight").endswith(suffixes)]


@pytest.mark.parametrize(("algorithm", "kind"), [("FP8", "fp8_tensor"), ("NVFP4", "nvfp4")])
@pytest.mark.parametrize("source", ["hf", "ours"])
def test_modelopt_with_one_format(tmp_path, algorithm, kind, source):
    case = nano(algorithm)
    quantised = {n.removesuffix(".weight_scale") for n in case.tensors if n.endswith(".weight_scale")}
    linear = linear_modules(table("nemotron_h", from_plain()))
    description = describe("modelopt", dict.fromkeys(quantised, kind), linear, inputs={kind: "static"}, cache=True)
    found, config, other = written(case, description, tmp_path, source=source)
    assert_same(found, case.tensors)
    stated = other["quantization"]
    excluded = [n for n in case.other["quantization"]["exclude_modules"] if not n.endswith("conv1d")]
    assert stated == case.other["quantization"] | {"exclude_modules": sorted(excluded)}
    there = config["quantization_config"]
    assert there["ignore"] == sorted(excluded) and there["quant_method"] == "modelopt"
    assert there["quant_algo"] == algorithm and there["kv_cache_scheme"]["num_bits"] == 8
    assert config.keys() - {"dtype"} == plain().config.keys() - {"dtype"} | {"quantization_config"}


def from_plain(family="nemotron_h", mtp=False):
    from orogen.convert.config import read_config

    return read_config(plain(family, mtp).config)[1]


def test_modelopt_with_several_formats(tmp_path):
    case = super_mixed()
    kinds = {"FP8": "fp8_tensor", "NVFP4": "nvfp4"}
    layers = case.other["quantization"]["quantized_layers"]
    chosen = {module: kinds[layer["quant_algo"]] for module, layer in layers.items()}
    linear = linear_modules(table("nemotron_h", from_plain(mtp=True)))
    assert "mtp.layers.0.eh_proj" in linear and "backbone.layers.1.mixer.gate" not in linear
    description = describe("modelopt", chosen, linear, inputs=dict.fromkeys(kinds.values(), "static"), cache=True)
    found, config, other = written(case, description, tmp_path, mtp=True)
    assert_same(found, case.tensors)
    assert other["quantization"] == case.other["quantization"]
    ours, theirs = config["quantization_config"], case.config["quantization_config"]
    assert ours["quantized_layers"] == theirs["quantized_layers"]
    targets = [
        {g["weights"]["num_bits"]: sorted(g["targets"]) for g in c["config_groups"].values()} for c in (ours, theirs)
    ]
    assert targets[0] == targets[1]


@pytest.mark.parametrize(
    ("form", "strategy", "make", "kind", "inputs"),
    [
        ("float-quantized", "channel", compressed_rows, "fp8_channel", "dynamic"),
        ("float-quantized", "tensor", compressed_tensor, "fp8_tensor", "static"),
        ("nvfp4-pack-quantized", "tensor_group", compressed_nvfp4, "nvfp4", "static"),
    ],
)
def test_compressed_tensors(tmp_path, form, strategy, make, kind, inputs):
    case = compressed(form, strategy, make)
    linear = linear_modules(table("qwen3_moe", from_plain("qwen3_moe")))
    chosen = [module for module in linear if not module.endswith("lm_head")]
    description = describe("compressed-tensors", dict.fromkeys(chosen, kind), linear, inputs={kind: inputs}, cache=True)
    found, config, other = written(case, description, tmp_path, family="qwen3_moe")
    if kind == "fp8_channel":  # theirs are bfloat16 (rows, 1)
        scales = {n for n in found if n.endswith("weight_scale")}
        assert all(found[n].ndim == 1 and found[n].dtype == np.float32 for n in scales)
        case.tensors.update({n: found[n] for n in scales | {n.replace("_scale", "") for n in scales}})
    reshaped = {n: a.reshape(found[n].shape) for n, a in case.tensors.items()}
    assert_same(found, reshaped)
    assert other is None
    ours, theirs = (c["config_groups"]["group_0"] for c in (config["quantization_config"], description.config))
    assert ours == theirs and ours["targets"] == ["Linear"] and ours["weights"]["strategy"] == strategy
    assert config["quantization_config"]["ignore"] == ["lm_head"] and config["quantization_config"]["format"] == form


def test_several_formats_of_compressed_tensors_and_blocks():
    linear = ["a.up_proj", "a.down_proj", "b.up_proj", "lm_head"]
    kinds = {"a.up_proj": "nvfp4", "b.up_proj": "fp8_block"}
    inputs = {"nvfp4": "none", "fp8_block": "dynamic"}
    description = describe("compressed-tensors", kinds, linear, inputs=inputs, cache=False)
    assert description.config["format"] == "mixed-precision" and description.config["kv_cache_scheme"] is None
    (found,) = read_quantization(description.values)
    schemes = [found.scheme(module, linear=True) for module in linear]
    assert [s and (s.kind, s.block) for s in schemes] == [("nvfp4", (1, 16)), None, ("fp8_block", (128, 128)), None]
    assert [g["input_activations"] is None for g in description.config["config_groups"].values()] == [False, True]


@pytest.mark.parametrize("kind", ["FP8", "NVFP4"])
def test_stacked_experts(tmp_path, kind):
    """gpt-oss's own layout holds them (experts, in, out)."""
    case = stacked(kind)
    ours = {"FP8": "fp8_tensor", "NVFP4": "nvfp4"}[kind]
    layers = case.other["quantization"]["quantized_layers"]
    linear = linear_modules(table("gpt_oss", from_plain("gpt_oss")))
    description = describe("modelopt", dict.fromkeys(layers, ours), linear, inputs={ours: "static"}, cache=False)
    found, _, _ = written(case, description, tmp_path, family="gpt_oss")
    assert_same(found, case.tensors)


def test_what_a_layout_cannot_say_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="inputs of fp8_tensor are none; expected one of ModelOpt's: static"):
        describe("modelopt", {"a": "fp8_tensor"}, ["a"], inputs={"fp8_tensor": "none"}, cache=False)
    with pytest.raises(ConfigError, match="layout is 'gguf'; expected modelopt or compressed-tensors"):
        describe("gguf", {"a": "fp8_tensor"}, ["a"], inputs={"fp8_tensor": "none"}, cache=False)
    plain().write(tmp_path / "hf")
    description = describe("modelopt", {"a": "nvfp4"}, ["a"], inputs={"nvfp4": "none"}, cache=False)
    description.config["ignore"] += linear_modules(table("nemotron_h", from_plain()))
    assert parts_by_name(table("nemotron_h", from_plain()), description) == {}
    with open_folder(tmp_path / "hf") as folder, pytest.raises(ConfigError, match="no weight is to be quantised"):
        write_quantised(folder, tmp_path / "out", description, by_largest)
    assert not (tmp_path / "out").exists()


def test_an_error_in_the_middle_leaves_nothing(tmp_path):
    plain().write(tmp_path / "hf")
    linear = linear_modules(table("nemotron_h", from_plain()))
    description = describe("modelopt", dict.fromkeys(linear, "nvfp4"), linear, inputs={"nvfp4": "none"}, cache=False)

    def failing(name, x, parts):
        if "experts.4" in name:
            raise ConfigError("not finite")
        return by_largest(name, x, parts)

    with open_folder(tmp_path / "hf") as folder, pytest.raises(ConfigError, match="not finite"):
        write_quantised(folder, tmp_path / "out", description, failing)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
