"""What a kind of layer computes, holds and sends: the functions that its row in `config/kinds.py` names."""

from collections.abc import Callable
from typing import NamedTuple

from orogen.config.kinds import kind_of, resolved
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.cost.ledger import Ledger, Workload
from orogen.cost.local import Local, local
from orogen.cost.operation import Operation
from orogen.cost.weight import Weight


class Cached(NamedTuple):
    """What one layer keeps of one request on one device, in numbers.

    token: keys and values of each token, of the last `window` tokens (None: of all). channels: those with an SSM state.
    taps: of convolutions' windows. replayed, replayed_float32: of each token that a replay ring holds, in the compute
    dtype and in float32.
    """

    token: int = 0
    window: int | None = None
    channels: int = 0
    taps: int = 0
    replayed: int = 0
    replayed_float32: int = 0


def _as_named(here: Local, named: dict[str, float]) -> dict[str, float]:
    return {name: size for name, size in named.items() if name != "chosen"}


class LayerCosts(NamedTuple):
    """What one layer of a kind costs. Its norm and its sum with the residual stream are the same for all kinds, and are
    added by the callers.

    flops: operations of the forward pass for one token of a sequence of so many tokens (conventions in `cost.flops`).
    weights: the parameters of its mixer.
    kept: bytes of its named arrays on one device, other than `input` and `norm`.
    collectives: records what it sends, except for its weights.
    operations: its products and memory traffic on one device.
    products: names that `elementwise` keeps: outputs of products with weights and of fused kernels.
    unread: named arrays that no gradient reads, because a later one holds the same.
    workspace: bytes that a kernel of its backward pass works in.
    norms: bytes of the outputs of its mixer's own norms of the model's kind, which have no name.
    kernels: fields of PlanConfig, any of which, if it names a GPU's kernel, says that the layer has no large arrays
    beside its named ones: the field whose kernel does most of its work, or all fields if products that XLA does well on
    any GPU do; (): no kernel does it.
    autodiff: what is kept without remat, given the named bytes.
    cache: what it keeps of a request that is decoded.
    """

    flops: Callable[[ModelConfig, int], float]
    weights: Callable[[ModelConfig], list[Weight]]
    kept: Callable[[Local], dict[str, float]]
    collectives: Callable[[Ledger], None]
    operations: Callable[[Local], list[Operation]]
    products: tuple[str, ...]
    unread: tuple[str, ...] = ()
    workspace: Callable[[Local], float] = lambda here: 0.0
    norms: Callable[[Local], float] = lambda here: 0.0
    kernels: tuple[str, ...] = ()
    autodiff: Callable[[Local, dict[str, float]], dict[str, float]] = _as_named
    cache: Callable[[Local], Cached] = lambda here: Cached()


def costs_of(letter: str) -> LayerCosts:
    """The costs of a letter's layers. Raises ConfigError if there are no such layers."""
    return resolved(kind_of(letter).costs)


def request_cache(letter: str, model: ModelConfig) -> Cached:
    """What one layer keeps of one request that no plan splits."""
    return costs_of(letter).cache(local(model, PlanConfig(), Workload(1, 1)))
