"""Traced and lowered programs in files, so that a later process neither traces nor lowers them.

jax's compile cache saves XLA's work alone. For a model with Mosaic kernels, tracing and lowering take longer than
loading what the cache has. A file holds a program as StableHLO (jax.export); what XLA makes of it is cached as ever.

A file is found by a digest of all that a program depends on: this package's code, the versions of what traces it,
jax's settings, XLA's flags, the devices, the shapes and shardings of the arguments, and a text by which the caller
names the rest. So a program must depend on nothing else: no constants from data.
"""

import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.parallel.runtime import compile_cache_folder

VERSIONED = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "flax", "optax", "numpy", "ml_dtypes", "chex")
# jax promises no stability of these calls between versions. Here the version is part of the name.
CALLS = (
    "__gpu$xla.gpu.triton", "mosaic_gpu", "mosaic_gpu_v2", "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward",
    "__cudnn$fmhaSoftmaxDropout", "__cudnn$fmhaSoftmaxDropoutBackward", "annotate_device_placement",
)  # fmt: skip
DIGEST = hashlib.sha256().digest_size


def kept_program(
    function: Callable[..., Any], arguments: Sequence[Any], *, name: str, folder: Path | None = None
) -> Any:
    """The exported `function` of flat arrays like `arguments`, whose results are arrays in lists, tuples, dicts or
    registered named tuples. It is read from its file; if there is none, or a damaged one, it is traced and written.

    name: a text that determines the function, code aside. folder: by default a part of the compile cache. Raises
    ConfigError without the package flatbuffers, in which jax writes programs.
    """
    from jax import export

    if importlib.util.find_spec("flatbuffers") is None:
        raise ConfigError("the package flatbuffers is not installed; expected it where programs are kept in files")
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)) for x in arguments]
    file = (folder or compile_cache_folder() / "programs") / f"{_digest(name, types)}.program"
    if (written := _read(file)) is not None:
        return export.deserialize(bytearray(written))
    checks = [export.DisabledSafetyCheck.custom_call(call) for call in CALLS]
    made = export.export(jax.jit(function), disabled_checks=checks)(*types)
    payload = bytes(made.serialize())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, hashlib.sha256(payload).digest() + payload)
    return made


def _read(file: Path) -> bytes | None:
    """The program in a file, if it is there and as it was written."""
    try:
        found = file.read_bytes()
    except FileNotFoundError:
        return None
    payload = found[DIGEST:]
    return payload if hashlib.sha256(payload).digest() == found[:DIGEST] else None


def _digest(name: str, types: Sequence[Any]) -> str:
    facts = [name, _code(), os.environ.get("XLA_FLAGS", ""), *map(repr, types)]
    facts += [f"{package} {_version(package)}" for package in VERSIONED]
    # Where caches are, and how much is logged, changes no program.
    facts += [
        f"{key} {value}" for key, value in sorted(jax.config.values.items()) if not key.endswith(("_dir", "_level"))
    ]
    facts += [f"{device.id} {device.device_kind} {device.process_index}" for device in jax.devices()]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """A digest of this package's modules."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for module in sorted(root.rglob("*.py")):
        digest.update(f"{module.relative_to(root)}\0".encode() + module.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
