"""Traced and lowered programs in files, so that a later process neither traces nor lowers them.

jax's compile cache only saves XLA's work. For a model with Mosaic kernels, tracing and lowering take longer than
loading the compiled program from that cache. A file holds a program as StableHLO (jax.export); the result of compiling
it is cached as usual.

A file's name is a digest of everything that a program depends on: this package's code, the versions of the libraries
that trace it, jax's settings, XLA's flags, the devices, the shapes and shardings of the arguments, and a text by which
the caller identifies the rest. So a program must depend on nothing else, such as constants from data.

A program that is read is also run, as with jax's own cache: whoever can write the cache can run code. So the folder
belongs to the user alone, and files of another owner, or that others may write, are not read. The checksum detects
damage only.
"""

import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.parallel.runtime import compile_cache_folder

VERSIONED = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "flax", "optax", "numpy", "ml_dtypes", "chex")
# Custom calls whose stability jax does not promise between versions. Here the versions are part of the file's name.
CALLS = (
    "__gpu$xla.gpu.triton", "mosaic_gpu", "mosaic_gpu_v2", "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward",
    "__cudnn$fmhaSoftmaxDropout", "__cudnn$fmhaSoftmaxDropoutBackward", "annotate_device_placement",
)  # fmt: skip
DIGEST = hashlib.sha256().digest_size


def kept_program(
    function: Callable[..., Any], arguments: Sequence[Any], *, name: str, folder: Path | None = None
) -> Any:
    """The exported `function` of flat arrays like `arguments`, whose results are arrays in lists, tuples, dicts or
    registered NamedTuples. It is read from its file; without one, or if that is damaged, it is traced and written. If
    the file cannot be read or written, one line is printed.

    name: a text that determines the function, code aside. folder: by default a part of jax's compile cache. Raises
    ConfigError as `require_flatbuffers` does.
    """
    from jax import export

    require_flatbuffers()
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)) for x in arguments]
    file = (folder or _folder()) / f"{_digest(name, types)}.program"
    if (written := _read(file)) is not None:
        return export.deserialize(bytearray(written))
    checks = [export.DisabledSafetyCheck.custom_call(call) for call in CALLS]
    made = export.export(jax.jit(function), disabled_checks=checks)(*types)
    payload = bytes(made.serialize())
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(file, hashlib.sha256(payload).digest() + payload)
        file.chmod(0o600)
    except OSError as error:  # a full disk, or one that is read only
        print(f"{file}: {error.strerror or error}; the step's program is not kept", file=sys.stderr)
    return made


def require_flatbuffers() -> None:
    """Raises ConfigError without the package flatbuffers, in which jax writes programs."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ConfigError("the package flatbuffers is not installed; expected it where programs are kept in files")


def _folder() -> Path:
    cache = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not cache or "://" in cache:  # jax's may be in a bucket
        return compile_cache_folder() / "programs"
    return Path(cache) / "programs"


def _read(file: Path) -> bytes | None:
    """The program in a file; None unless the file exists, is undamaged, and belongs to this user alone."""
    try:
        with file.open("rb") as opened:
            facts = os.fstat(opened.fileno())
            if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
                print(f"{file} is another user's, or others may write it; it is not read", file=sys.stderr)
                return None
            found = opened.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        print(f"{file}: {error.strerror or error}; the step's program is traced again", file=sys.stderr)
        return None
    payload = found[DIGEST:]
    return payload if hashlib.sha256(payload).digest() == found[:DIGEST] else None


def _digest(name: str, types: Sequence[Any]) -> str:
    facts = [name, _code(), os.environ.get("XLA_FLAGS", ""), *map(repr, types)]
    facts += [f"{package} {_version(package)}" for package in VERSIONED]
    # Where caches are, and how much is logged, changes no program. jax_optimization_level and jax_memory_fitting_level
    # are for XLA, which compiles a program after it is read.
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
