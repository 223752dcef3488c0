"""The smaller models of a search, and what each costs; no jax.

All costs but speed are linear in the numbers of layers of each kind, so they are computed once per width for all
depths. Letters: n combinations of layer counts, k kinds of layer.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.config.search import SearchConfig
from orogen.config.streams import say
from orogen.cost.kind import request_cache
from orogen.cost.weight import Weight
from orogen.cost.weights import weights

GIB = 2**30
# Widths take a third of a millisecond each, numbers of layers hardly any.
MOST_CANDIDATES, MOST_WIDTHS = 10**7, 10**5
ACTIVATION_BITS = 16  # of the inputs that a convolution keeps, and of hidden units


class Costs(NamedTuple):
    """Of a layer of a kind, or of the model's other parts: parameters, those that one token uses, and GiB."""

    parameters: float
    active: float
    gib: float


class Candidates(NamedTuple):
    """Models of equal widths. model: with these widths and the parent's depth; counts_nk: layers of each kind; costs_n:
    by name."""

    model: ModelConfig
    widths: dict[str, int]
    counts_nk: np.ndarray
    costs_n: dict[str, np.ndarray]


def candidates(parent: ModelConfig, search: SearchConfig) -> Iterator[Candidates]:
    """All candidates, by widths; widths that make no legal model are left out. Raises ConfigError if there are too
    many, or none."""
    widths, counts_nk = search.widths(parent), layer_counts(parent, search)
    combined = math.prod(map(len, widths.values()))
    if combined > MOST_WIDTHS:
        raise ConfigError(f"SearchConfig has {combined:,} combinations of widths; expected at most {MOST_WIDTHS:,}")
    number = len(counts_nk) * combined
    if number > MOST_CANDIDATES:
        raise ConfigError(f"SearchConfig has {number:,} candidates; expected at most {MOST_CANDIDATES:,}")
    refused, why = 0, ""
    for values in itertools.product(*widths.values()):
        chosen = dict(zip(widths, values, strict=True))
        try:
            model = dataclasses.replace(parent, **chosen)
        except ConfigError as error:  # such as heads that the groups do not divide
            refused, why = refused + 1, why or with_nearest(error, parent, chosen)
            continue
        yield Candidates(model, chosen, counts_nk, total_costs(model, search, counts_nk))
    if refused == combined:
        raise ConfigError(f"no widths of SearchConfig make a model: {why}")
    if refused:
        say(f"orogen: warning: {refused:,} of {combined:,} combinations of widths are left out: {why}")


def with_nearest(error: ConfigError, parent: ModelConfig, widths: Mapping[str, int]) -> str:
    """Why the parent cannot have these widths, with widths near to them that it can have together, if some are found:
    one of them changed, after those that the parent could not have even alone."""
    alone = {field: _nearest(parent, {field: value}, field) for field, value in widths.items()}
    for start in (widths, {field: alone[field] or value for field, value in widths.items()}):
        if (found := _with_one_changed(parent, start)) is not None:
            changed = [f"{field} = {size}" for field, size in found.items() if size != widths[field]]
            return f"{error}, such as {' and '.join(changed)}"
    return str(error)


def _with_one_changed(parent: ModelConfig, widths: Mapping[str, int]) -> dict[str, int] | None:
    """The widths if the parent can have them together, or else with the smallest relative change of a single one."""
    if _suits(parent, widths):
        return dict(widths)
    nearest = {field: _nearest(parent, widths, field) for field in widths}
    found = {field: size for field, size in nearest.items() if size is not None}
    if not found:
        return None
    closest = min(found, key=lambda field: abs(math.log(found[field] / widths[field])))
    return {**widths, closest: found[closest]}


def _nearest(parent: ModelConfig, widths: Mapping[str, int], field: str) -> int | None:
    """The size nearest to that of `field` which the parent can have together with the other widths."""
    nearby = sorted(range(1, getattr(parent, field) + 1), key=lambda size: abs(size - widths[field]))
    return next((size for size in nearby if _suits(parent, {**widths, field: size})), None)


def _suits(parent: ModelConfig, widths: Mapping[str, int]) -> bool:
    try:
        dataclasses.replace(parent, **widths)
    except ConfigError:
        return False
    return True


def layer_counts(parent: ModelConfig, search: SearchConfig) -> np.ndarray:
    """(n, k): every combination of layer counts, with a layer in all, k in the order in which the kinds come first
    in the parent's pattern. Raises ConfigError if there is none."""
    ranges = list(search.counts(parent).values())
    number = math.prod(map(len, ranges))
    if number > MOST_CANDIDATES:
        raise ConfigError(f"SearchConfig.layers has {number:,} combinations; expected at most {MOST_CANDIDATES:,}")
    counts_nk = np.array(list(itertools.product(*ranges)), np.int64).reshape(number, len(ranges))
    counts_nk = counts_nk[counts_nk.sum(1) > 0]
    if not len(counts_nk):
        raise ConfigError(f"SearchConfig.layers is {search.layers}; expected some with at least one layer in all")
    if search.depth is not None:
        least, most = search.depth
        depth_n = counts_nk.sum(1)
        inside = counts_nk[(depth_n >= least) & (depth_n <= most)]
        if not len(inside):
            nearest = depth_n[np.argmin(np.maximum(least - depth_n, depth_n - most))]
            raise ConfigError(
                f"SearchConfig.depth is {search.depth}; expected a range with {nearest}, the nearest depth"
            )
        return inside
    return counts_nk


def total_costs(model: ModelConfig, search: SearchConfig, counts_nk: np.ndarray) -> dict[str, np.ndarray]:
    """By name (n,): the costs of the model with such numbers of layers."""
    other, by_kind = costs(model, search)
    table = np.array([by_kind[letter] for letter in dict.fromkeys(model.layers.main)], np.float64)
    totals = counts_nk @ table + np.array(other)
    return dict(zip(Costs._fields, totals.T, strict=True))


def costs(model: ModelConfig, search: SearchConfig) -> tuple[Costs, dict[str, Costs]]:
    """The costs of all that is not a layer of the backbone, and of one layer of each kind."""
    found = weights(model)
    mtp = [w for letter in model.layers.mtp for w in found.layers[letter]] + list(found.mtp)
    others = [w for part in found.parts.values() for w in part]
    shared = _costs(others, model, search, kept=0.0)
    # A token of the text does not use the block that predicts the tokens after the next one.
    deeper = _costs(mtp, model, search, kept=sum(request_bits(letter, model, search) for letter in model.layers.mtp))
    read = search.prefill_chunk * widest_mlp(model) * ACTIVATION_BITS / 8 / GIB
    other = Costs(shared.parameters + deeper.parameters, shared.active, shared.gib + deeper.gib + read)
    kinds = dict.fromkeys(model.layers.main)
    return other, {
        letter: _costs(found.layers[letter], model, search, kept=request_bits(letter, model, search))
        for letter in kinds
    }


def widest_mlp(model: ModelConfig) -> int:
    """The most hidden units that a token has at once in an MLP, or in its experts and the shared one; those of a gate
    count too. Source: Megatron-LM, megatron/elastification/router/flex_budget_utils.py, `get_max_buffer_size`."""
    kinds, routed = model.layers.main, 0
    if "E" in kinds:
        shared = model.moe_shared_expert_intermediate_size or 0
        routed = shared + model.num_experts_per_tok * model.moe_intermediate_size
    return max(model.intermediate_size if "-" in kinds else 0, routed) * (2 if model.mlp_gated else 1)


def request_bits(letter: str, model: ModelConfig, search: SearchConfig) -> float:
    """What one layer keeps of one request of `context` tokens, in bits."""
    cached = request_cache(letter, model)
    seen = search.context if cached.window is None else min(search.context, cached.window)
    states = cached.channels * (model.ssm_state_size or 0) * search.state_bits
    return cached.token * seen * search.cache_bits + states + cached.taps * ACTIVATION_BITS


def _costs(parameters: Sequence[Weight], model: ModelConfig, search: SearchConfig, *, kept: float) -> Costs:
    size = float(sum(math.prod(w.shape) for w in parameters))
    routed = float(sum(math.prod(w.shape) for w in parameters if "expert" in w.axes))
    used = routed / model.n_routed_experts * model.num_experts_per_tok if routed else 0.0
    bits = size * search.weight_bits + search.requests * kept
    return Costs(size, size - routed + used, bits / 8 / GIB)


def pattern_of(parent: ModelConfig, kept: Mapping[str, int], removal: Sequence[int] = ()) -> str:
    """The parent's pattern with so many layers of each kind. removal: the numbers of its layers in the order in which
    they may be removed; of kinds that it does not name enough of, evenly spread layers stay."""
    main, removed = parent.layers.main, set()
    for letter, count in kept.items():
        indices = [index for index, one in enumerate(main) if one == letter]
        excess = len(indices) - count
        named = [index for index in removal if main[index] == letter][:excess]
        left = [index for index in indices if index not in named]
        stay = (
            {left[(2 * i + 1) * len(left) // (2 * count)] for i in range(count)} if len(named) < excess else set(left)
        )
        removed |= set(indices) - stay
    pattern = "".join(letter for index, letter in enumerate(main) if index not in removed)
    _, slash, mtp = parent.pattern.partition("/")
    return pattern + slash + mtp
