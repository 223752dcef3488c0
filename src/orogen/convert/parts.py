"""The tensors in which a Hugging Face checkpoint holds a quantised weight: found by name, checked, and decoded.

A weight `M.weight` has its numbers in `M.weight` or `M.weight_packed`, and scales beside it. Stacked experts, which
have no `.weight`, prefix the same suffixes: `M.gate_up_proj`, `M.gate_up_proj_weight_scale`. Scales of inputs
(`M.input_scale`) and of the key/value cache (`k_proj.k_scale`) belong to no parameter; an
engine reads those of the cache.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.convert.names import Table, Tensor
from orogen.convert.quantization import Quantization, Scheme
from orogen.convert.tensor_files import NAMES, PACKED, Spec
from orogen.precision.stored import E4M3, Stored, stored_shapes

WEIGHT = ".weight"
CACHE_SCALE = re.compile(r"(.+)\.(?:[kv]_proj\.)?[kvq]_scale")
SCALES = {np.dtype(np.float32), np.dtype(np.float16), *(d for d in NAMES if d.name == "bfloat16")}


class Parts(NamedTuple):
    """Where a quantised weight is: the names of its tensors, its shape, and whether it is (…, in, out) in the files."""

    scheme: Scheme
    values: str
    scale: str
    global_scale: str | None
    shape: tuple[int, ...]
    turned: bool

    @property
    def names(self) -> tuple[str, ...]:
        """All of its tensors."""
        return tuple(name for name in (self.values, self.scale, self.global_scale) if name is not None)

    @property
    def specs(self) -> dict[str, Spec]:
        """The shape and dtype of each of its tensors as ModelOpt writes them, without axes of size one that a file may
        add. Scales of FP8 are float32."""
        kind, dtype = self.scheme.kind, np.dtype(np.float32)
        shapes = {k: _swapped(s, self.turned, k, kind) for k, s in self._shapes.items()}
        found = {self.values: Spec(shapes["values"], PACKED if kind == "nvfp4" else E4M3)}
        found[self.scale] = Spec(shapes["scale"], E4M3 if kind == "nvfp4" else dtype)
        if self.global_scale is not None:
            found[self.global_scale] = Spec(shapes["global_scale"], dtype)
        return found

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return stored_shapes(self.scheme.kind, _turned(self.shape, self.turned), self.scheme.block)

    def check(self, where: str, have: Mapping[str, Spec]) -> None:
        """Raises ConfigError unless the tensors are there, with shapes and dtypes of the format."""
        for name, spec in self.specs.items():
            if name not in have:
                raise ConfigError(f"{where}: {name} is missing; expected it for a weight in {self.scheme.kind}")
            found = have[name]
            scale_of_fp8 = name == self.scale and self.scheme.kind != "nvfp4"
            if found.dtype not in (SCALES if scale_of_fp8 else {spec.dtype}):
                expected = f"{NAMES[spec.dtype]} for a weight in {self.scheme.kind}"
                raise ConfigError(f"{where}: {name} is {NAMES[found.dtype]}; expected {expected}")
            whole = name == self.global_scale or (name == self.scale and self.scheme.kind == "fp8_tensor")
            free = whole and math.prod(found.shape) == 1  # one scale for all experts
            if not free and _without_ones(found.shape) != _without_ones(spec.shape):
                expected = f"{list(spec.shape)} for {list(self.shape)} in {self.scheme.kind}"
                raise ConfigError(f"{where}: {name} is {list(found.shape)}; expected {expected}")

    def read(self, read: Callable[[str], np.ndarray]) -> Stored:
        """The weight as it is stored, (…, out, in), from a function that reads tensors."""
        kind, shapes = self.scheme.kind, self._shapes
        found: dict[str, Any] = {"values": read(self.values), "scale": read(self.scale)}
        if self.global_scale is not None:
            found["global_scale"] = read(self.global_scale)
        for name, array in found.items():
            if name != "values" and array.size == 1:
                found[name] = np.broadcast_to(array.reshape(()), shapes[name])
            else:
                file = _swapped(shapes[name], self.turned, name, kind)
                found[name] = _swapped_axes(array.reshape(file), self.turned, name, kind)
        shape = _turned(self.shape, self.turned)
        return Stored(format=kind, inverse=self.scheme.inverse, block=self.scheme.block, shape=shape, **found)

    def arrays(self, stored: Stored) -> dict[str, np.ndarray]:
        """The inverse of `read`: the tensors by their names, as in `specs`."""
        kind = self.scheme.kind
        found = {self.values: ("values", stored.values), self.scale: ("scale", stored.scale)}
        if self.global_scale is not None and stored.global_scale is not None:
            found[self.global_scale] = ("global_scale", stored.global_scale)
        return {name: _swapped_axes(array, self.turned, part, kind) for name, (part, array) in found.items()}


class Matched(NamedTuple):
    """parts: of each quantised tensor of the table; scales: the names of all scales that belong to no parameter."""

    parts: dict[str, Parts]
    scales: frozenset[str]


def parts_of(name: str, tensor: Tensor, scheme: Scheme) -> Parts:
    """The parts of the table's tensor `name` in a scheme."""
    stem = name.removesuffix("weight") if name.endswith(WEIGHT) else f"{name}_"
    values = name if scheme.names.values == "weight" else stem + scheme.names.values
    whole = stem + scheme.names.global_scale if scheme.names.global_scale else None
    turned = not any(piece.transposed for piece in tensor.pieces)
    return Parts(scheme, values, stem + scheme.names.scale, whole, tensor.shape, turned)


def match(quantization: Quantization, table: Table, have: Mapping[str, Spec], exempt: Callable[[str], bool]) -> Matched:
    """The quantised tensors of the table among those that a checkpoint has.

    exempt: of tensors that may be unquantised although their module is not excluded. Raises ConfigError, naming the
    tensor and the file, where exclusions and tensors contradict each other, or parts do not fit.
    """
    parts: dict[str, Parts] = {}
    scales: set[str] = set()
    for name, tensor in table.items():
        original = table[tensor.copy_of] if tensor.copy_of else tensor
        if len(tensor.shape) < 2 or _is_bias(original):
            continue
        linear = is_linear(original)
        scheme = quantization.scheme(module_of(name), linear=linear)
        packed = _packed_name(name, have)
        if scheme is None and packed is None:
            continue
        if scheme is None:
            why = "excludes it" if quantization.ignores(module_of(name)) else "does not name it"
            stated = f"{NAMES[have[packed].dtype] if packed else ''}"
            raise ConfigError(f"{packed} is {stated}; expected an unquantised tensor, since {quantization.where} {why}")
        found = parts_of(name, original, scheme)
        if packed is None:
            if name in have and not (exempt(name) or not linear):
                expected = f"a weight in {scheme.kind}, since {quantization.where} does not exclude it"
                raise ConfigError(f"{name} is {NAMES[have[name].dtype]}; expected {expected}")
            continue
        found.check(quantization.where, have)
        parts[name] = found
        stem = found.scale.removesuffix(scheme.names.scale)
        scales |= {stem + suffix for suffix in scheme.names.inputs if stem + suffix in have}
    modules = {module_of(name) for name in table}
    modules |= {module.rpartition(".")[0] for module in modules}
    for name in have:
        found = CACHE_SCALE.fullmatch(name)
        if found and found[1] in modules:
            scales.add(name)
    for name in scales:
        if have[name].dtype not in SCALES or math.prod(have[name].shape) < 1:
            raise ConfigError(f"{name} is {NAMES[have[name].dtype]}; expected a scale in F32, F16 or BF16")
    return Matched(parts, frozenset(scales))


def module_of(name: str) -> str:
    """The module that a tensor of the table belongs to; stacked experts are the module above their tensors."""
    return name.removesuffix(WEIGHT) if name.endswith(WEIGHT) else name.rpartition(".")[0]


def is_linear(tensor: Tensor) -> bool:
    """Whether the tensor is the weight of linear maps, which the class LINEAR targets: routers' gates have classes of
    their own, and so have embeddings."""
    inside = {part for piece in tensor.pieces for part in piece.path}
    known = "experts" in inside or any(piece.transposed for piece in tensor.pieces)
    return known and "router" not in inside and not _is_bias(tensor)


def _is_bias(tensor: Tensor) -> bool:
    return any(str(piece.path[-1]).endswith("bias") for piece in tensor.pieces)


def _packed_name(name: str, have: Mapping[str, Spec]) -> str | None:
    """The name of the tensor that holds `name` in 8 or 4 bits, None if there is none."""
    packed = f"{name}_packed"
    found = packed if packed in have else name
    return found if found in have and have[found].dtype in (PACKED, E4M3) else None


def _turned(shape: tuple[int, ...], turned: bool) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if turned else shape


def _grid(part: str, kind: str) -> bool:
    """Whether a part has axes of rows and columns."""
    return part == "values" or (part == "scale" and kind in ("fp8_block", "nvfp4"))


def _swapped(shape: tuple[int, ...], turned: bool, part: str, kind: str) -> tuple[int, ...]:
    return _turned(shape, turned and _grid(part, kind))


def _swapped_axes(array: np.ndarray, turned: bool, part: str, kind: str) -> np.ndarray:
    return array.swapaxes(-1, -2) if turned and _grid(part, kind) else array


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
