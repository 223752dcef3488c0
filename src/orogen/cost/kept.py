"""What a layer keeps for its backward pass, by name, from the configs alone; no jax.

`activations` reads the same from a layer's trace, which takes seconds; tests compare the two. Arrays that are chosen by
name are exact, except for a few bytes of routing. Without remat, what autodiff keeps beyond names is that of the
implementations that run on any device.
"""

from orogen.cost.kind import costs_of
from orogen.cost.local import Local


def kept_bytes(letter: str, here: Local) -> tuple[dict[str, float], float]:
    """The bytes that one device keeps of one layer and microbatch, by name; and the bytes that it offloads."""
    costs, remat = costs_of(letter), here.plan.layer_remat(letter)
    named = named_bytes(letter, here)
    held = {"input": named["input"]}
    if remat.kind == "elementwise":
        held |= {name: named[name] for name in costs.products if name in named}
    elif remat.kind == "names":
        names = (name for name in named if name not in remat.again and name not in ("chosen", *costs.unread))
        held |= {name: named[name] for name in names}
    elif remat.kind == "none":
        held |= costs.autodiff(here, named)
    host = sum(size for name, size in named.items() if name in remat.host)
    return {name: size for name, size in held.items() if name not in remat.host and size}, host


def named_bytes(letter: str, here: Local) -> dict[str, float]:
    """The bytes of each named array of one layer on one device."""
    stream = here.own * here.model.hidden_size * here.itemsize
    return {"input": stream, "norm": stream, **costs_of(letter).kept(here)}
