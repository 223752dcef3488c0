"""What config.json and hf_quant_config.json say about quantised weights, as ModelOpt and compressed-tensors write it.

The inverse of `quantization.py`. Modules are named as in the Hugging Face checkpoint.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.convert.quantization import FIELD, LINEAR, MIXED, MODELOPT
from orogen.precision.stored import FP8_BLOCK, block_of

LAYOUTS = ("modelopt", "compressed-tensors")
# How products treat their inputs: rounded with scales that are in the files (`static`) or measured (`dynamic`), or not
# rounded (`none`).
INPUTS = ("static", "dynamic", "none")
PRODUCER = {"name": "orogen"}
_CACHE = {"num_bits": 8, "type": "float", "dynamic": False}
# By format: ModelOpt's algorithm and how it treats inputs.
ALGORITHMS = {
    ("fp8_tensor", "static"): "FP8",
    ("fp8_channel", "dynamic"): "FP8_PER_CHANNEL_PER_TOKEN",
    ("fp8_block", "none"): "FP8_PB_WO",
    ("nvfp4", "static"): "NVFP4",
    ("nvfp4", "none"): "W4A16_NVFP4",
}


class Description(NamedTuple):
    """quantization_config of config.json; and hf_quant_config.json, None if the layout has none."""

    config: dict[str, Any]
    other: dict[str, Any] | None

    @property
    def values(self) -> dict[str, Any]:
        """The fields that config.json gains."""
        return {FIELD: self.config}


def describe(
    layout: str, kinds: Mapping[str, str], linear: Iterable[str], *, inputs: Mapping[str, str], cache: bool
) -> Description:
    """What files in `layout` say of modules whose weights have the formats `kinds` (names of `precision.stored`).

    linear: all linear maps of the model; those that are not in `kinds` are excluded by name. inputs: by format, one of
    INPUTS; cache: whether keys and values are FP8. Raises ConfigError for what the layout cannot say.
    """
    excluded = sorted(set(linear) - kinds.keys())
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; expected {' or '.join(LAYOUTS)}")
    make = _modelopt if layout == "modelopt" else _compressed
    return make(dict(sorted(kinds.items())), excluded, inputs, cache)


def _modelopt(kinds: dict[str, str], excluded: list[str], inputs: Mapping[str, str], cache: bool) -> Description:
    algorithms = {kind: _algorithm(kind, inputs[kind]) for kind in sorted(set(kinds.values()))}
    layers = {module: _sized(algorithms[kind]) for module, kind in kinds.items()}
    if len(algorithms) == 1:
        stated = _sized(next(iter(algorithms.values()))) | {"exclude_modules": excluded}
        groups = {"group_0": _modelopt_group(next(iter(algorithms)), inputs) | {"targets": [LINEAR]}}
        beside = {"ignore": excluded}
    else:
        stated = {"quant_algo": MIXED, "quantized_layers": layers}
        groups = {}
        for number, kind in enumerate(algorithms):
            targets = [module for module, found in kinds.items() if found == kind]
            groups[f"group_{number}"] = _modelopt_group(kind, inputs) | {"targets": targets}
        beside = {"quantized_layers": layers, "ignore": []}
    other = {"producer": PRODUCER, "quantization": stated | {"kv_cache_quant_algo": "FP8" if cache else None}}
    config = {"quant_method": "modelopt", "quant_algo": stated["quant_algo"], "config_groups": groups, **beside}
    config |= {"kv_cache_scheme": _CACHE} if cache else {}
    return Description(config | {"producer": PRODUCER}, other)


def _algorithm(kind: str, inputs: str) -> str:
    if (kind, inputs) not in ALGORITHMS:
        known = ", ".join(f"{inputs} of {kind}" for kind, inputs in ALGORITHMS)
        raise ConfigError(f"inputs of {kind} are {inputs}; expected one of ModelOpt's: {known}")
    return ALGORITHMS[kind, inputs]


def _sized(algorithm: str) -> dict[str, Any]:
    rows, columns = MODELOPT[algorithm].block
    return {"quant_algo": algorithm} | ({} if rows == columns == 1 else {"group_size": columns})


def _modelopt_group(kind: str, inputs: Mapping[str, str]) -> dict[str, Any]:
    form: dict[str, Any] = {"dynamic": False, "num_bits": 4 if kind == "nvfp4" else 8, "type": "float"}
    form |= {"group_size": block_of(kind)[1]} if kind in ("nvfp4", "fp8_block") else {}
    form |= {"strategy": "channel"} if kind == "fp8_channel" else {}
    found = {"weights": form}
    if inputs[kind] != "none":
        found["input_activations"] = {**form, "dynamic": inputs[kind] == "dynamic"}
    return found


def _compressed(kinds: dict[str, str], excluded: list[str], inputs: Mapping[str, str], cache: bool) -> Description:
    present = sorted(set(kinds.values()))
    groups = {}
    for number, kind in enumerate(present):
        targets = [LINEAR] if len(present) == 1 else [module for module, found in kinds.items() if found == kind]
        form = "nvfp4-pack-quantized" if kind == "nvfp4" else "float-quantized"
        group = {"targets": targets, "weights": _weights(kind), "input_activations": _inputs(kind, inputs[kind])}
        groups[f"group_{number}"] = group | {"output_activations": None, "format": form}
    form = next(iter(groups.values()))["format"] if len(groups) == 1 else "mixed-precision"
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": excluded,
        "kv_cache_scheme": _CACHE | {"strategy": "tensor", "symmetric": True} if cache else None,
    }
    return Description(config, None)


def _weights(kind: str) -> dict[str, Any]:
    strategy = {"fp8_tensor": "tensor", "fp8_channel": "channel", "fp8_block": "block", "nvfp4": "tensor_group"}[kind]
    return {
        "num_bits": 4 if kind == "nvfp4" else 8,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": block_of(kind)[1] if kind == "nvfp4" else None,
        "block_structure": list(FP8_BLOCK) if kind == "fp8_block" else None,
        "dynamic": False,
    }


def _inputs(kind: str, inputs: str) -> dict[str, Any] | None:
    """NVFP4's block scales of inputs are always measured; a static global scale is in the files (`local`)."""
    if inputs == "none":
        return None
    form = {"num_bits": 4 if kind == "nvfp4" else 8, "type": "float", "symmetric": True}
    if kind == "nvfp4":
        dynamic = "local" if inputs == "static" else True
        return form | {"strategy": "tensor_group", "group_size": block_of(kind)[1], "dynamic": dynamic}
    if inputs == "static":
        return form | {"strategy": "tensor", "dynamic": False}
    if kind == "fp8_block":
        return form | {"strategy": "group", "group_size": FP8_BLOCK[1], "dynamic": True}
    return form | {"strategy": "token", "dynamic": True}
