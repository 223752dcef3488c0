"""Settings of jax that must be made before anything asks for devices. Importing this module does not import jax."""

import ctypes
import hashlib
import logging
import os
import pathlib
import platform
from collections.abc import Sequence

from orogen.config.checks import ConfigError

# Of mallopt(3): the free space that glibc keeps at the top of the heap, and the block size from which it uses mmap.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
THREADS_PER_FAKE_DEVICE = 4
# Sets of XLA's flags by purpose. latency_hiding: communication between GPUs overlaps computation, also that of another
# iteration of a loop; deterministic: the same program on the same numbers gives the same bits; unoptimised: XLA:CPU
# compiles with little optimisation, and lowers fusions as it does other operations instead of through MLIR. Each halves
# the time that this takes (measured with jax 0.10.1), for programs that run a few times.
XLA_FLAGS = {
    "latency_hiding": (
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        "--xla_gpu_enable_pipelined_all_gather=true",
        "--xla_gpu_enable_pipelined_reduce_scatter=true",
        "--xla_gpu_enable_pipelined_all_reduce=true",
        "--xla_gpu_enable_while_loop_double_buffering=true",
    ),
    "deterministic": ("--xla_gpu_deterministic_ops=true",),
    "unoptimised": (
        "--xla_backend_optimization_level=0",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    ),
}


def compile_cache_folder() -> pathlib.Path:
    """Where compiled programs are cached: one folder per user and kind of processor, since code compiled for another
    kind may have instructions that this one lacks."""
    try:
        described = pathlib.Path("/proc/cpuinfo").read_text()
        flags = next((line for line in described.splitlines() if line.startswith(("flags", "Features"))), "")
    except FileNotFoundError:  # not Linux
        flags = platform.processor()
    kind = f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "orogen" / "jax" / kind


def configure(fake_devices: int | None = None, xla: Sequence[str] = ()) -> None:
    """Simulates `fake_devices` CPU devices if any, caches compiled programs between runs, silences libraries.

    xla: names of XLA_FLAGS. The environment's own settings of jax's compile cache and of these flags take precedence.
    Raises ConfigError on an unknown name.
    """
    add_xla_flags(xla)
    # XLA:CPU warns of its own pseudo-features for every program that it loads from the cache.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if fake_devices:
        make_room_for(fake_devices)
    import jax

    _keep_freed_memory()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax reports every file it writes, and raises what fails
    if fake_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", fake_devices)
    if getattr(jax.config, "jax_compilation_cache_dir") is None:  # noqa: B009 - set at run time, unknown to types
        jax.config.update("jax_compilation_cache_dir", str(compile_cache_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def add_xla_flags(names: Sequence[str]) -> None:
    """Puts the named sets in front of the environment's XLA_FLAGS, so that flags already there win. Call it before jax
    makes its devices. Raises ConfigError on an unknown name."""
    unknown = [name for name in names if name not in XLA_FLAGS]
    if unknown:
        raise ConfigError(f"--xla has {unknown[0]!r}; expected some of {', '.join(XLA_FLAGS)}")
    given = os.environ.get("XLA_FLAGS", "")
    flags = [flag for name in names for flag in XLA_FLAGS[name] if flag not in given.split()]
    if flags:
        os.environ["XLA_FLAGS"] = f"{' '.join(flags)} {given}".strip()


def asks_for_same_bits() -> bool:
    """Whether the environment's XLA_FLAGS ask for results that repeat to the bit on a GPU."""
    name = XLA_FLAGS["deterministic"][0].partition("=")[0]
    given = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag.partition("=")[0] == name]
    return bool(given) and given[-1].partition("=")[2].lower() not in ("false", "0")


def make_room_for(devices: int) -> None:
    """Keeps `devices` simulated devices from a deadlock. Call it before jax makes its devices.

    On XLA:CPU a collective holds a thread of a pool until its last participant arrives, and the pool has one thread per
    device. If each device of a program can wait in two collectives at once (one inside a loop, one outside), waiting
    threads may fill the pool while a participant has none to run on; XLA aborts after 40 seconds (observed with jax
    0.10.1: a step of 8 devices on a busy machine). More threads help; NPROC sets their number. Devices that reach a
    loop's collectives and others in different orders can still deadlock, so no collective may run concurrently with a
    loop that contains some.
    """
    threads = THREADS_PER_FAKE_DEVICE * devices
    if not os.environ.get("NPROC", "").isdecimal() or int(os.environ["NPROC"]) < threads:
        os.environ["NPROC"] = str(threads)
    # Devices that share few cores may also be late simply because they are slow.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=1800"
    flags = os.environ.get("XLA_FLAGS", "")
    if patience.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{patience} {flags}".strip()


def _keep_freed_memory() -> None:
    """Lets glibc reuse large blocks. By default it returns each to the system and faults it in again: for the temporary
    arrays of XLA:CPU that costs a quarter of a training step's CPU time (observed with jax 0.10.1)."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            library.mallopt(parameter, 2**30)
