"""Set-up of every test: eight fake CPU devices, float32 products in full precision, a compile cache that is kept.

Tests that need an accelerator run on one with JAX_PLATFORMS=cuda,cpu in front of the command.
"""

import hashlib
import os
import pathlib
import platform


def _cache_folder() -> pathlib.Path:
    """A folder of this user for this kind of processor: code compiled for another may hold illegal instructions."""
    try:
        described = pathlib.Path("/proc/cpuinfo").read_text()
        flags = next((line for line in described.splitlines() if line.startswith(("flags", "Features"))), "")
    except FileNotFoundError:  # not Linux
        flags = platform.processor()
    kind = f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "orogen" / "jax" / kind


# Through the environment, so that the commands which tests start share them; before jax is imported, which reads them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_folder()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
