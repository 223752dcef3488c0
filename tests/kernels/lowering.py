"""Lowering Triton kernels for a GPU where there is none, alone and inside `shard_map`."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
from jax._src.pallas.triton import lowering as triton
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")


def lowered(function: Callable[..., Any], *arguments: Any) -> str:
    """The program of `function` for a GPU; what asks for the backend while it is traced finds a GPU.

    Triton's checks of a kernel, which run where it is compiled, are run here too.
    """
    lower = triton.lower_jaxpr_to_triton_module

    def lower_and_verify(*arguments: Any, **settings: Any) -> Any:
        result = lower(*arguments, **settings)
        result.module.operation.verify()
        return result

    with (
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
        mock.patch.object(triton, "lower_jaxpr_to_triton_module", lower_and_verify),
        use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)),
    ):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def lowered_on_two(function: Callable[..., Any], by_row: Any, shared: Any) -> str:
    """The program of function(by_row, shared) on two devices, each with half of the rows, checked by `check_vma`.

    Every result is by row.
    """
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=H100)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec()), out_specs=PartitionSpec("data"),
        check_vma=True,
    )  # fmt: skip
    return lowered(mapped, by_row, shared)


def kernels(text: str) -> int:
    """How many calls of a Triton kernel a program has."""
    return text.count("custom_call @__gpu$xla.gpu.triton(")
