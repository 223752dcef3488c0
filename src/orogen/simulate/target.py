"""A GPU to compile for where there is none: its description for XLA, and its devices as topologies of jax."""

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from orogen.config.checks import ConfigError
from orogen.simulate.hardware import Hardware

KIB, MIB = 2**10, 2**20
# How the extra `cuda` names what compiles for a GPU.
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# XLA cannot try kernels without a GPU: it takes those that it would try first.
OPTIONS = {"xla_gpu_autotune_level": "0"}


class Chip(NamedTuple):
    """What a data sheet does not have. name: as the driver has it; l2_bytes; clock_ghz: the highest."""

    name: str
    l2_bytes: int
    clock_ghz: float


class Limits(NamedTuple):
    """Of a compute capability: units of float32 and bytes of shared memory per multiprocessor, and the bytes that one
    block can have."""

    units: int
    shared_bytes: int
    shared_bytes_per_block: int


# By ClusterConfig.hardware. Source: the cards that XLA knows, github.com/openxla/xla, xla/backends/gpu/target_config/
# specs (a100_sxm_80, h100_sxm, h200, gb200, gb300), 2026.
CHIPS = {
    "a100": Chip("NVIDIA A100-SXM4-80GB", 40 * MIB, 1.41),
    "h100": Chip("NVIDIA H100 80GB HBM3", 50 * MIB, 1.98),
    "h200": Chip("NVIDIA H200", 50 * MIB, 1.98),
    "gb200": Chip("NVIDIA GB200", 135_528_448, 2.062),
    "gb300": Chip("NVIDIA GB300", 135_528_448, 2.07),
}
# Source: CUDA C++ Programming Guide 13, Compute Capabilities.
LIMITS = {
    "8.0": Limits(64, 164 * KIB, 163 * KIB),
    "9.0": Limits(128, 228 * KIB, 227 * KIB),
    "10.0": Limits(128, 228 * KIB, 227 * KIB),
    "10.3": Limits(128, 228 * KIB, 227 * KIB),
}
# Of every capability above, from the same table. From Hopper on, kernels use instructions of their capability alone.
COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
    "shared_memory_per_block": 48 * KIB,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
}


def check_target(hardware: Hardware) -> None:
    """Raises ConfigError if XLA cannot compile for this hardware here."""
    if hardware.name not in CHIPS:
        expected = f"expected one of {', '.join(CHIPS)} with --compile gpu"
        raise ConfigError(f"ClusterConfig.hardware is {hardware.name!r}; {expected}")
    if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS):
        raise ConfigError(
            "--compile is 'gpu'; expected the extra cuda, whose XLA compiles for GPUs (pip install 'orogen[cuda]'; it "
            "needs no GPU)"
        )


def description(hardware: Hardware, *, cudnn: tuple[int, ...], cuda: tuple[int, ...]) -> str:
    """The card as XLA's GpuTargetConfigProto, in protobuf's text form. cudnn, cuda: versions of the libraries.

    Source: github.com/openxla/xla, xla/stream_executor/device_description.proto.
    """
    from orogen.parallel.target import CAPABILITIES  # imports jax, which takes longer than a prediction

    chip = CHIPS[hardware.name]
    capability = CAPABILITIES[chip.name]
    limits, (major, minor) = LIMITS[capability], capability.split(".")
    accelerated = "feature_extension: ACCELERATED_FEATURES" if int(major) >= 9 else ""
    facts = COMMON | {
        "core_count": hardware.cores,
        "fpus_per_core": limits.units,
        "shared_memory_per_core": limits.shared_bytes,
        "shared_memory_per_block_optin": limits.shared_bytes_per_block,
        "memory_bandwidth": int(hardware.bandwidth),
        "l2_cache_size": chip.l2_bytes,
        "clock_rate_ghz": chip.clock_ghz,
        "device_memory_size": int(hardware.memory_bytes),
    }
    return "\n".join([
        "gpu_device_info {",
        *(f"  {name}: {value}" for name, value in facts.items()),
        f"  cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}",
        "}",
        'platform_name: "CUDA"',
        f"dnn_version_info {_version(cudnn)}",
        f"runtime_version {_version(cuda)}",
        f'device_description_str: "{chip.name}"',
    ])  # fmt: skip


def _version(numbers: tuple[int, ...]) -> str:
    pairs = zip(("major", "minor", "patch"), numbers, strict=True)
    return "{ " + " ".join(f"{name}: {number}" for name, number in pairs) + " }"


def devices(hardware: Hardware, count: int) -> list[Any]:
    """`count` devices of this hardware to compile for, on hosts of its own size; more if hosts are only filled so.

    Raises ConfigError as `check_target` does.
    """
    check_target(hardware)
    from jax._src.lib import cuda_versions  # jax has no public name for them
    from jax.experimental import topologies

    versions: Any = cuda_versions  # None without the plugin, which is there
    cudnn, cuda = versions.cudnn_get_version(), versions.cuda_runtime_get_version()
    text = description(
        hardware, cudnn=(cudnn // 10_000, cudnn // 100 % 100, cudnn % 100), cuda=(cuda // 1000, cuda // 10 % 100, 0)
    )  # fmt: skip
    each = min(count, hardware.node_size)
    shape = f"1x{math.ceil(count / each)}x{each}"
    return list(topologies.get_topology_desc(platform="cuda", target_config=text, topology=shape).devices)


@contextlib.contextmanager
def traced_for(device: Any) -> Iterator[None]:
    """What is traced and lowered inside is for `device`, one of `devices`."""
    from jax._src.cudnn import fused_attention_stablehlo as attention
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    capability = _numbers(device.compute_capability)
    answers = {
        "check_compute_capability": lambda least: capability >= _numbers(least),
        "is_cuda_compute_capability_equal": lambda other: capability == _numbers(other),
    }
    named = AbstractDevice(device.device_kind, device.core_count, "gpu")
    with contextlib.ExitStack() as stack:
        # jax asks the process's own GPUs what their attention can do, not the mesh's (jax 0.11.2).
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(attention, name, answer))
        stack.enter_context(use_abstract_mesh(AbstractMesh((), (), abstract_device=named)))
        yield


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))
