"""What a layer keeps for its backward pass, by name, from the configs alone; no jax.

`activations` reads the same from a layer's trace, which takes seconds; tests compare the two. Arrays that are chosen by
name are exact, except for a few bytes of routing, and so is what `elementwise` keeps of the kernels of a GPU. Without
remat, what autodiff keeps beyond names is that of the implementations that run on any device.
"""

from orogen.config.plan import FOR_GPU
from orogen.cost.kind import costs_of
from orogen.cost.local import Local

# By operation, what `elementwise` keeps too if a kernel for GPUs makes it, which would otherwise run twice.
KERNEL_PRODUCTS = {
    "rms_norm": ("norm", "gated_norm"),
    "causal_conv1d": ("conv",),
    "ssd": ("ssd", "ssd_states"),
    "permutation": ("rows",),
    "grouped_matmul": ("expert_up", "expert_out"),
}


def kept_bytes(letter: str, here: Local) -> tuple[dict[str, float], float]:
    """The bytes that one device keeps of one layer and microbatch, by name; and the bytes that it offloads."""
    costs, remat = costs_of(letter), here.plan.layer_remat(letter)
    named = named_bytes(letter, here)
    held = {"input": named["input"]}
    if remat.kind == "elementwise":
        held |= {name: named[name] for name in (*costs.products, *_by_kernels(here)) if name in named}
        if _norms_by_kernel(here):
            held["unnamed"] = costs.norms(here)
    elif remat.kind == "names":
        names = (name for name in named if name not in remat.again and name not in ("chosen", *costs.unread))
        held |= {name: named[name] for name in names}
    elif remat.kind == "none":
        held |= costs.autodiff(here, named)
    host = sum(size for name, size in named.items() if name in remat.host)
    return {name: size for name, size in held.items() if name not in remat.host and size}, host


def _by_kernels(here: Local) -> list[str]:
    """Names of what the plan's kernels for GPUs make."""
    mine = {field: names for field, names in KERNEL_PRODUCTS.items() if getattr(here.plan, field) == FOR_GPU[field]}
    made = [name for names in mine.values() for name in names]
    return made if _norms_by_kernel(here) else [name for name in made if name != "norm"]


def _norms_by_kernel(here: Local) -> bool:
    """Whether a kernel computes the model's norms. Mamba-2's gated one is the same in every model."""
    return here.model.norm == "rms" and here.plan.rms_norm == FOR_GPU["rms_norm"]


def named_bytes(letter: str, here: Local) -> dict[str, float]:
    """The bytes of each named array of one layer on one device."""
    stream = here.own * here.model.hidden_size * here.itemsize
    return {"input": stream, "norm": stream, **costs_of(letter).kept(here)}
