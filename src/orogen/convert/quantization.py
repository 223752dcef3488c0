"""How a Hugging Face checkpoint says that its weights are quantised, as rules from modules to stored formats.

Three descriptions are read, from `quantization_config` in config.json, and ModelOpt's also from hf_quant_config.json:

- ModelOpt (`quant_method` modelopt): `quant_algo` for all linear maps except `exclude_modules` (`ignore`), or
  MIXED_PRECISION with one for each of `quantized_layers`. Source: NVIDIA/Model-Optimizer, modelopt/torch/export.
- compressed-tensors: `config_groups` with targets, which are class names, names of modules or `re:` patterns, and
  `ignore`. Source: neuralmagic/compressed-tensors, quantization and compressors.
- fp8: blocks with `weight_scale_inv`, as DeepSeek-V3's files have them. Source: transformers, FineGrainedFP8Config.

Rules say nothing about activations: products compute with decoded weights.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import ListOf, MapOf, Record, Whole, check_form
from orogen.precision.stored import FP8_BLOCK, block_of

FILE = "hf_quant_config.json"
FIELD = "quantization_config"
LINEAR = "Linear"  # the class of PyTorch's linear map, as a target
PATTERN = "re:"
# What a pattern may have, and what of it stands for itself: escaped characters, and sets of characters.
MOST_CHARACTERS, MOST_UNBOUNDED, MOST_BRANCHES = 1000, 2, 100
_LITERAL = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_GROUP_KIND = re.compile(r"\(\?(?::|<?[=!])")


class Names(NamedTuple):
    """Suffixes of a module's tensors; global_scale is empty if its format has none. inputs: of scales of its inputs."""

    values: str
    scale: str
    global_scale: str = ""
    inputs: tuple[str, ...] = ("input_scale",)


MODELOPT_FP8 = COMPRESSED_FP8 = Names("weight", "weight_scale")
MODELOPT_NVFP4 = Names("weight", "weight_scale", "weight_scale_2")
COMPRESSED_NVFP4 = Names("weight_packed", "weight_scale", "weight_global_scale", ("input_global_scale",))
FINE_GRAINED = Names("weight", "weight_scale_inv", inputs=("input_scale", "activation_scale"))


class Scheme(NamedTuple):
    """How a weight is stored: a format of `precision.stored`, the rows and columns of its blocks, and its names."""

    kind: str
    names: Names
    block: tuple[int, int] = (1, 1)

    @property
    def inverse(self) -> bool:
        """Whether numbers are divided by the global scale."""
        return self.names == COMPRESSED_NVFP4


# By quant_algo.
MODELOPT = {
    "FP8": Scheme("fp8_tensor", MODELOPT_FP8),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme("fp8_channel", MODELOPT_FP8),
    "FP8_PB_WO": Scheme("fp8_block", MODELOPT_FP8, FP8_BLOCK),
    "NVFP4": Scheme("nvfp4", MODELOPT_NVFP4, block_of("nvfp4")),
    "W4A16_NVFP4": Scheme("nvfp4", MODELOPT_NVFP4, block_of("nvfp4")),
}
MIXED = "MIXED_PRECISION"
FP8_CACHE = "FP8"
CACHE_ALGORITHMS = (FP8_CACHE, "NVFP4")
COMPRESSED_FORMATS = ("float-quantized", "naive-quantized", "nvfp4-pack-quantized", "mixed-precision")
METHODS = ("modelopt", "compressed-tensors", "fp8")

_NAMES = ListOf(str)
_LAYER = Record({}, {"quant_algo": (str, None), "group_size": (Whole(1), None)})
_MODELOPT_FORM = Record(
    {},
    {
        "quant_algo": (str, None),
        "group_size": (Whole(1), None),
        "exclude_modules": (_NAMES, None),
        "ignore": (_NAMES, None),
        "quantized_layers": (MapOf(_LAYER), None),
        "kv_cache_quant_algo": (str, None),
        "kv_cache_scheme": (dict, str, None),
    },
)
_WEIGHTS = Record(
    {"num_bits": Whole(1), "type": str},
    {
        "strategy": (str, None),
        "symmetric": bool,
        "group_size": (int, None),
        "block_structure": (ListOf(Whole(1), 2), str, None),
    },
)
_GROUP = Record({"targets": _NAMES}, {"weights": (_WEIGHTS, None), "format": (str, None)})
_COMPRESSED_FORM = Record(
    {"config_groups": MapOf(_GROUP)},
    {
        "format": (str, None),
        "ignore": (_NAMES, None),
        "kv_cache_scheme": (dict, None),
        "transform_config": (dict, None),
        "sparsity_config": (dict, None),
    },
)
_FP8_FORM = Record({}, {"weight_block_size": (ListOf(Whole(1), 2), None), "modules_to_not_convert": (_NAMES, None)})


class Quantization(NamedTuple):
    """Which modules are quantised, and how. where: the file, for messages. ignored, targets: patterns of modules; a
    target is the class LINEAR, a module, one above it, or a pattern. cache: the format of keys and values, one of
    CACHE_ALGORITHMS; None: they are not quantised."""

    where: str
    ignored: tuple[str, ...]
    targets: tuple[tuple[str, Scheme | None], ...]
    cache: str | None = None

    def scheme(self, module: str, *, linear: bool) -> Scheme | None:
        """How the module's weight is stored, None if it is not quantised. linear: whether it is a linear map."""
        if self.ignores(module):
            return None
        named = [(target, scheme) for target, scheme in self.targets if target != LINEAR]
        inside = [pair for pair in named if not pair[0].startswith(PATTERN) and _names(pair[0], module)]
        if inside:
            return max(inside, key=lambda pair: len(pair[0]))[1]
        for target, scheme in named:
            if target.startswith(PATTERN) and _names(target, module):
                return scheme
        return next((scheme for target, scheme in self.targets if target == LINEAR and linear), None)

    def ignores(self, module: str) -> bool:
        """Whether a pattern excludes the module."""
        return any(_names(pattern, module) for pattern in self.ignored)


def read_quantization(values: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> list[Quantization]:
    """What config.json (`values`) and hf_quant_config.json (`other`) say, each on its own; none: not quantised.

    Raises ConfigError for formats that are not implemented, naming the field.
    """
    found = []
    if (stated := values.get(FIELD)) is not None:
        where = f"config.json: {FIELD}"
        if not isinstance(stated, dict) or stated.get("quant_method") not in METHODS:
            method = stated.get("quant_method") if isinstance(stated, dict) else stated
            _refuse(f"{where}.quant_method", method, "one of " + ", ".join(METHODS))
        readers = {"modelopt": _modelopt, "compressed-tensors": _compressed, "fp8": _fine_grained}
        found.append(readers[stated["quant_method"]](stated, where))
    if other is not None:
        check_form(other, Record({"quantization": dict}), where=FILE)
        found.append(_modelopt(other["quantization"], f"{FILE}: quantization"))
    for one in found:
        for pattern in (*one.ignored, *(target for target, _ in one.targets)):
            _check_pattern(pattern, one.where)
    return found


def _modelopt(stated: Mapping[str, Any], where: str) -> Quantization:
    check_form(stated, _MODELOPT_FORM, where=where)
    algorithm = (stated.get("quant_algo") or "").upper()
    ignored = tuple(stated.get("exclude_modules") or stated.get("ignore") or ())
    cache = stated.get("kv_cache_quant_algo") or stated.get("kv_cache_scheme")
    if isinstance(cache, str) and cache.upper() not in CACHE_ALGORITHMS:
        _refuse(f"{where}.kv_cache_quant_algo", cache, f"null or one of {', '.join(CACHE_ALGORITHMS)}")
    kept = _cache_format(cache, where)
    if algorithm == MIXED:
        layers = stated.get("quantized_layers") or {}
        targets = [(name, _of_layer(name, layer, where)) for name, layer in layers.items()]
        return Quantization(where, ignored, tuple(targets), kept)
    scheme = _algorithm(algorithm, stated.get("group_size"), where, "quant_algo", (*MODELOPT, MIXED))
    return Quantization(where, ignored, ((LINEAR, scheme),), kept)


def _of_layer(name: str, layer: Mapping[str, Any], where: str) -> Scheme | None:
    algorithm = (layer.get("quant_algo") or "").upper()
    if algorithm in ("", "NONE", "UNQUANTIZED"):
        return None
    return _algorithm(algorithm, layer.get("group_size"), where, f"quantized_layers.{name}.quant_algo", MODELOPT)


def _algorithm(algorithm: str, group: int | None, where: str, field: str, known: Iterable[str]) -> Scheme:
    if algorithm not in MODELOPT:
        _refuse(f"{where}.{field}", algorithm or None, "one of " + ", ".join(known))
    scheme = MODELOPT[algorithm]
    size = scheme.block[1]
    if group is not None and scheme.block != (1, 1) and group != size:
        _refuse(f"{where}.group_size", group, f"{size}, as {algorithm} defines it")
    return scheme


def _compressed(stated: Mapping[str, Any], where: str) -> Quantization:
    check_form(stated, _COMPRESSED_FORM, where=where)
    if any((stated.get("transform_config") or {}).values()):
        _refuse(f"{where}.transform_config", stated["transform_config"], "none: it is not implemented")
    # What else is said of sparsity describes zeros that are stored like any other number.
    sparsity = (stated.get("sparsity_config") or {}).get("format")
    if sparsity not in (None, "dense"):
        _refuse(f"{where}.sparsity_config.format", sparsity, "'dense': others are not implemented")
    kept = _cache_format(stated.get("kv_cache_scheme"), where)
    targets: list[tuple[str, Scheme | None]] = []
    for name, group in stated["config_groups"].items():
        place = f"{where}.config_groups.{name}"
        form = group.get("format") or stated.get("format")
        if form not in COMPRESSED_FORMATS:
            _refuse(f"{where}.format", form, "one of " + ", ".join(COMPRESSED_FORMATS))
        weights = group.get("weights")
        scheme = None if weights is None else _of_weights(weights, form, f"{place}.weights")
        targets += [(target, scheme) for target in group["targets"]]
    ignored = tuple(stated.get("ignore") or ())
    return Quantization(where, ignored, tuple(targets), kept)


def _of_weights(weights: Mapping[str, Any], form: str, place: str) -> Scheme:
    """compressed-tensors' description of a weight's format."""
    bits, strategy, group = weights["num_bits"], weights.get("strategy") or "tensor", weights.get("group_size")
    if weights.get("symmetric") is False:
        _refuse(f"{place}.symmetric", False, "true: zero points are not implemented")
    if weights["type"] == "float" and bits == 8 and form != "nvfp4-pack-quantized":
        if strategy in ("tensor", "channel"):
            return Scheme(f"fp8_{strategy}", COMPRESSED_FP8)
        if strategy == "block" and (block := _block(weights.get("block_structure"))):
            return Scheme("fp8_block", COMPRESSED_FP8, block)
        if strategy == "group" and group is not None and group > 0:
            return Scheme("fp8_block", COMPRESSED_FP8, (1, group))
        _refuse(f"{place}.strategy", strategy, "tensor, channel, block with block_structure or group with group_size")
    if weights["type"] == "float" and bits == 4 and form != "float-quantized":
        if strategy == "tensor_group" and group == block_of("nvfp4")[1]:
            return Scheme("nvfp4", COMPRESSED_NVFP4, block_of("nvfp4"))
        _refuse(f"{place}.strategy", f"{strategy}, {group}", "tensor_group with a group_size of 16, as NVFP4 has it")
    _refuse(f"{place}.num_bits", f"{bits} of type {weights['type']}", f"a float of 8 or 4 bits that {form} can hold")


def _block(stated: list[int] | str | None) -> tuple[int, int] | None:
    """Rows and columns, from two numbers or, as older files have them, from `128x128`; None: neither."""
    if isinstance(stated, str):
        found = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", stated)
        stated = [int(found[1]), int(found[2])] if found else None
    return (stated[0], stated[1]) if stated else None


def _fine_grained(stated: Mapping[str, Any], where: str) -> Quantization:
    check_form(stated, _FP8_FORM, where=where)
    if stated.get("weight_block_size") is None:
        _refuse(f"{where}.weight_block_size", None, "two numbers, such as [128, 128]")
    rows, columns = stated["weight_block_size"]
    scheme = Scheme("fp8_block", FINE_GRAINED, (rows, columns))
    # transformers never converts the head.
    ignored = (*(stated.get("modules_to_not_convert") or ()), "lm_head")
    return Quantization(where, ignored, ((LINEAR, scheme),))


def _cache_format(scheme: Any, where: str) -> str | None:
    """The format of keys and values. Raises ConfigError unless they are not quantised, or in floats of 8 or 4 bits."""
    if isinstance(scheme, dict) and (scheme.get("num_bits") not in (8, 4) or scheme.get("type") != "float"):
        _refuse(f"{where}.kv_cache_scheme", scheme, "null or a float of 8 bits")
    if isinstance(scheme, dict):
        return FP8_CACHE if scheme["num_bits"] == 8 else CACHE_ALGORITHMS[1]
    return scheme.upper() if scheme else None


def _check_pattern(pattern: str, where: str) -> None:
    """Raises ConfigError unless a `re:` pattern compiles and matches fast. Patterns are untrusted: a match that fails
    has tried every length of each quantifier and every alternative, in all combinations."""
    if not pattern.startswith(PATTERN):
        return
    text = pattern.removeprefix(PATTERN)
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where}: the pattern {shown(pattern)} is not valid ({error}); expected one") from None
    signs = _LITERAL.sub("x", text)
    unbounded = len(re.findall(r"[*+{][?+]?", _GROUP_KIND.sub("(", signs)))
    slow = re.search(r"\)[*+{]", signs) or re.search(r"\(\?[^:=!<]", signs) or unbounded > MOST_UNBOUNDED
    if slow or len(text) > MOST_CHARACTERS or _branches(_GROUP_KIND.sub("(", signs)) > MOST_BRANCHES:
        expected = (
            f"at most {MOST_CHARACTERS} characters, no repeated groups, no flags or names, at most two of * + {{ and "
            f"{MOST_BRANCHES} combinations of alternatives"
        )
        _refuse(f"{where}: the pattern", pattern, expected)


def _branches(signs: str) -> int:
    """A bound on the combinations of alternatives and optional parts of a pattern without literals."""
    found, bars = 2 ** len(re.findall(r"(?<![*+?}])\?", signs)), [0]
    for sign in signs:
        if sign == "(":
            bars.append(0)
        elif sign == ")":
            found *= bars.pop() + 1
        elif sign == "|":
            bars[-1] += 1
    return found * (bars[0] + 1)


def _names(pattern: str, module: str) -> bool:
    """Whether a pattern names the module, or one above it."""
    if pattern.startswith(PATTERN):
        return re.match(pattern.removeprefix(PATTERN), module) is not None
    if pattern == module or module.startswith(f"{pattern}."):
        return True
    return any(sign in pattern for sign in "*?[") and fnmatch.fnmatchcase(module, pattern)


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    raise ConfigError(f"{name} is {shown(value)}; expected {expected}")
