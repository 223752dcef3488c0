"""torch's side of the benchmarks of operations: our operands as torch tensors, and torch functions as Programs.

Importing this does not import torch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from orogen.bench.timing import Program


def to_torch(array: jax.Array) -> Any:
    """A torch tensor over the same memory."""
    import torch  # pyright: ignore[reportMissingImports]

    return torch.from_dlpack(array)


def from_torch(result: Any) -> Any:
    """A torch tensor, or a tuple of them, as jax arrays, once they are computed."""
    import torch  # pyright: ignore[reportMissingImports]

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if isinstance(result, tuple):
        return tuple(from_torch(part) for part in result)
    return jnp.from_dlpack(result.detach().contiguous())


def torch_program(function: Callable[[], Any], *, gradient: bool = False) -> Program:
    """`function` as a Program whose results are jax arrays.

    gradient: whether `function` computes gradients itself; if not, torch records none. temporary_mb: torch's peak
    allocation in the second call, less what was allocated before it and the results; None on a CPU.
    """
    import torch  # pyright: ignore[reportMissingImports]

    on_gpu = torch.cuda.is_available()

    def run() -> Any:
        with torch.set_grad_enabled(gradient):
            return function()

    def wait(_: Any) -> None:
        if on_gpu:
            torch.cuda.synchronize()

    wait(run())
    temporary = None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        results = run()
        wait(results)
        temporary = round((torch.cuda.max_memory_allocated() - held - _bytes(results)) / 2**20)
    return Program(run, wait, from_torch, temporary)


def _bytes(result: Any) -> int:
    """Bytes of a torch tensor, or of a tuple of them."""
    return sum(map(_bytes, result)) if isinstance(result, tuple) else result.nelement() * result.element_size()
