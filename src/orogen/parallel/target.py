"""The hardware for which programs are being traced: this process's devices, or a GPU that it does not have.

A program can be compiled for a GPU without one (simulate/target.py). The mesh in context then names that GPU, as it
does for Pallas.
"""

import jax

HOPPER = "9.0"  # has the instructions of the Mosaic kernels
# By the name that the driver gives a GPU, its compute capability (https://developer.nvidia.com/cuda/gpus, 2026).
CAPABILITIES = {
    "NVIDIA A100-SXM4-80GB": "8.0",
    "NVIDIA H100 80GB HBM3": HOPPER,
    "NVIDIA H200": HOPPER,
    "NVIDIA GB200": "10.0",
    "NVIDIA GB300": "10.3",
}


def platform() -> str:
    """`cpu`, `gpu` or `tpu`."""
    return jax.default_backend() if _absent_gpu() is None else "gpu"


def compute_capability() -> str | None:
    """The GPU's compute capability, such as `9.0`; None without a GPU. Raises KeyError if the mesh names an unknown
    GPU."""
    kind = _absent_gpu()
    return getattr(jax.devices()[0], "compute_capability", None) if kind is None else CAPABILITIES[kind]


def _absent_gpu() -> str | None:
    """The name of the GPU that the mesh in context is of, if this process has no such GPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform != "gpu" or device.device_kind == jax.devices()[0].device_kind:
        return None
    return device.device_kind
