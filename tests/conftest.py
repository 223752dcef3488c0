"""Set-up of every test: eight fake CPU devices, float32 products in full precision, a compile cache that is kept.

Tests that need an accelerator run on one with JAX_PLATFORMS=cuda,cpu in front of the command.
"""

import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from orogen.parallel.runtime import XLA_FLAGS, compile_cache_folder, make_room_for

# Through the environment, so that the commands which tests start share them; before jax is imported, which reads them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA:CPU warns of each program it takes from the cache
# Tests compile thousands of small programs and run each once.
os.environ.setdefault("XLA_FLAGS", " ".join(XLA_FLAGS["unoptimised"]))
make_room_for(8)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compile_cache_folder()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402 - the lines above speak to it
import pytest  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")


# JAX makes an MLIR context for each program that it lowers, also for one that it then takes from the cache. That takes
# 5 ms with the context's end, a fifth of the processor time of the thousands of tiny programs (measured with jax
# 0.10.1). So programs share one: not too many of them, since it keeps their types and constants.
SHARING = 200
_lowered = 0
_context = functools.lru_cache(maxsize=1)(lambda _, make=mlir.make_ir_context: make())


def _shared_context():
    global _lowered
    _lowered += 1
    return _context(_lowered // SHARING)


mlir.make_ir_context = _shared_context


# Traces make many small objects: by default Python would look through all that it has thousands of times, which took a
# fourteenth of the processor time of tests that trace much (measured with Python 3.11).
COLLECT_AFTER = 20_000  # objects that were made and not freed; 700 by default


gc.set_threshold(COLLECT_AFTER, 10, 10)


def pytest_collection_finish() -> None:
    """Leaves what is imported by now to itself."""
    gc.collect()
    gc.freeze()


# Each program that XLA:CPU compiles takes hundreds of memory mappings, of which Linux allows a process 65,530 (its
# vm.max_map_count); XLA ends with a segmentation fault where none is left (seen on jax 0.10.1, late in this suite).
MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 25_000
COUNT_AFTER = 25  # programs: counting takes 10 ms or more, so that after every test it took a fifteenth of the time
_counted = 0


@pytest.fixture(autouse=True)
def _programs_are_forgotten() -> Iterator[None]:
    """Lets go of what is compiled before it has too many mappings."""
    global _counted
    yield
    if _lowered - _counted < COUNT_AFTER or not MAPPINGS.exists():
        return
    _counted = _lowered
    if MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()  # programs that only circles of objects still hold


@pytest.fixture
def refused(tmp_path, capsys) -> Callable[..., str]:
    """Runs a command that must end with status 2, one line on stderr and every file as it was; gives the line."""
    from tests.helpers import listing

    from orogen.cli import main

    def run(*arguments: str | Path) -> str:
        before = listing(tmp_path)
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("orogen: ") and err.count("\n") == 1, err
        assert listing(tmp_path) == before
        return err.removeprefix("orogen: ").rstrip("\n")

    return run
