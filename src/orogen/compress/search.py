"""The search for smaller models under a budget: Minitron's candidates, ranked, or MiniPuzzle's, chosen layer by layer.

Sources: Minitron as Model-Optimizer has it (all that keep the budget, sorted by one metric, the best few scored);
arXiv:2504.03624, section 4 (counts of layers by kind times a width, under the bytes of a long context).
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from orogen.compress.candidates import Candidates, candidates, pattern_of
from orogen.compress.speed import Speed, speed_facts, with_pattern
from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.config.reads import plain_model
from orogen.config.search import SearchConfig

MOST_PREDICTED = 1000  # candidates of one search; each takes milliseconds
# The field of each cost with a budget.
BUDGET_FIELDS = {
    "parameters": "most_parameters",
    "active": "most_active",
    "gib": "most_gib",
    "device_bytes": "fits",
    "seconds": "least_tokens_per_second",
}
# How each word of SearchConfig.order sorts: a cost, and whether the least comes first.
SORTED = {
    "layers": ("layers", False),
    "parameters": ("parameters", False),
    "active": ("active", False),
    "bytes": ("gib", True),
    "tokens_per_second": ("seconds", True),
}


class Found(NamedTuple):
    """A candidate. model: runnable; layers: by letter; costs: by name; score: MiniPuzzle's; speed: as simulated.
    removed: the numbers of the parent's layers that it lacks; None: those that a pruning's scores say."""

    model: ModelConfig
    widths: dict[str, int]
    layers: dict[str, int]
    costs: dict[str, float]
    score: float | None = None
    speed: dict[str, float] | None = None
    removed: tuple[int, ...] | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        facts: dict[str, Any] = {"pattern": self.model.pattern, **self.widths, "layers": self.layers, **self.costs}
        facts |= {} if self.score is None else {"score": self.score}
        return facts | ({} if self.removed is None else {"remove_layers": list(self.removed)}) | (self.speed or {})


class Ranking(NamedTuple):
    """The candidates that were looked at, those that keep the budgets (by estimate, if they are simulated), the best of
    them, and how many were simulated one by one."""

    candidates: int
    feasible: int
    best: list[Found]
    predicted: int = 0


class _Table(NamedTuple):
    """All candidates: the group of each and its number there (n,), and its costs by name (n,)."""

    groups: list[Candidates]
    group_n: np.ndarray
    index_n: np.ndarray
    costs: dict[str, np.ndarray]


def limits(search: SearchConfig, speed: Speed, parent: ModelConfig) -> dict[str, float]:
    """The largest value of each cost that has a budget."""
    found = dict(search.budgets)
    if search.fits:
        found["device_bytes"] = speed.predict(parent).memory_limit_bytes
    if search.least_tokens_per_second is not None:
        found["seconds"] = 1 / search.least_tokens_per_second
    return found


def search_models(parent: ModelConfig, search: SearchConfig, speed: Speed, *, removal: Sequence[int] = ()) -> Ranking:
    """Ranks the candidates that keep the budgets. removal: see `pattern_of`.

    Speed and the engine's memory are estimated to rank candidates, and predicted for the first MOST_PREDICTED: one
    whose prediction breaks a budget is passed over. Raises ConfigError, with the nearest value that can be kept, if
    none keeps the budgets.
    """
    allowed, table = limits(search, speed, parent), _table(parent, search, speed)
    inside_n = np.ones(len(table.group_n), bool)
    for name, most in allowed.items():
        inside_n &= table.costs[name] <= most
    if not inside_n.any():
        raise ConfigError(unmet(table.costs, allowed, len(inside_n)))
    kept = np.flatnonzero(inside_n)
    keys = [table.costs[cost][kept] * (1 if least else -1) for cost, least in map(SORTED.__getitem__, search.order)]
    order = kept[np.lexsort(keys[::-1])]
    every = (_found(parent, table, int(number), removal) for number in order)
    if not search.simulates:
        return Ranking(len(inside_n), len(kept), list(itertools.islice(every, search.best)))
    best, broken = _predicted(every, search, speed, allowed)
    if not best:
        costs = {name: np.array([found.costs[name] for found in broken]) for name in allowed}
        tried = f"none of the {len(broken):,} candidates that were predicted, of {len(kept):,} within the budgets by"
        raise ConfigError(f"{tried} estimate, keeps them; expected {_closest(costs, allowed)}")
    return Ranking(len(inside_n), len(kept), best, len(best) + len(broken))


def _predicted(
    every: Iterable[Found], search: SearchConfig, speed: Speed, allowed: dict[str, float]
) -> tuple[list[Found], list[Found]]:
    """The best of the first candidates, as simulated, and those passed over, with their predicted costs."""
    best: list[Found] = []
    broken: list[Found] = []
    for candidate in itertools.islice(every, MOST_PREDICTED):
        found = with_speed(candidate, speed)
        assert found.speed is not None
        if keeps(found, allowed):
            best.append(found)
        else:
            simulated = {"device_bytes": found.speed["device_memory_bytes"],
                         "seconds": 1 / found.speed["tokens_per_second"]}  # fmt: skip
            broken.append(found._replace(costs=found.costs | simulated))
        if len(best) == search.best:
            break
    return best, broken


def rank_of(ranking_costs: dict[str, np.ndarray], order: Sequence[str], costs: dict[str, float]) -> int:
    """The place, from 1, of a candidate with these costs among others, sorted by `order`."""
    place = np.zeros(len(next(iter(ranking_costs.values()))), bool)
    tied = ~place
    for cost, least in map(SORTED.__getitem__, order):
        sign = 1 if least else -1
        ahead = sign * ranking_costs[cost] < sign * costs[cost]
        place |= tied & ahead
        tied &= ranking_costs[cost] == costs[cost]
    return int(place.sum()) + 1


def feasible_costs(parent: ModelConfig, search: SearchConfig, speed: Speed) -> dict[str, np.ndarray]:
    """The costs by name (n,) of all candidates that keep the budgets, as estimated."""
    table, allowed = _table(parent, search, speed), limits(search, speed, parent)
    inside_n = np.logical_and.reduce([table.costs[name] <= most for name, most in allowed.items()] or [True])
    return {name: values[inside_n] for name, values in table.costs.items()}


def unmet(costs: dict[str, np.ndarray], allowed: dict[str, float], number: int) -> str:
    """A line that says which budget to change, and to what."""
    return f"none of {number:,} candidates keeps the budgets; expected {_closest(costs, allowed)}"


def _closest(costs: dict[str, np.ndarray], allowed: dict[str, float]) -> str:
    """The budget that needs the smallest change if the others stay, with its nearest feasible value; if there is none,
    the values of the candidate that exceeds its budgets least."""
    single = {}
    for name, most in allowed.items():
        others = [costs[other] <= value for other, value in allowed.items() if other != name]
        rest = np.logical_and.reduce(others) if others else np.ones(len(costs[name]), bool)
        if rest.any():
            least = float(costs[name][rest].min())
            single[name] = (least / most, least)
    if single:
        name = min(single, key=lambda one: single[one][0])
        return _at_least(name, single[name][1])
    excess_n = np.max([costs[name] / most for name, most in allowed.items()], axis=0)
    number = int(np.argmin(excess_n))
    return " and ".join(_at_least(name, float(costs[name][number])) for name in allowed)


def _at_least(name: str, value: float) -> str:
    field = f"SearchConfig.{BUDGET_FIELDS[name]}"
    if name == "seconds":
        return f"{field} of at most {_rounded(1 / value, up=False)}"
    if name == "device_bytes":
        return f"a device with at least {_rounded(value / 2**30, up=True)} GiB for {field}"
    return f"{field} of at least {_rounded(value, up=True)}"


def _rounded(value: float, *, up: bool) -> str:
    """Four digits, on the side that can be kept."""
    digits = f"{value:.4g}"
    short = float(digits) < value if up else float(digits) > value
    step = 10 ** (np.floor(np.log10(value)) - 3)
    return f"{float(digits) + (step if up else -step):.4g}" if short else digits


def _table(parent: ModelConfig, search: SearchConfig, speed: Speed) -> _Table:
    groups, columns = list(candidates(parent, search)), []
    for group in groups:
        costs = {**group.costs_n, "layers": group.counts_nk.sum(1).astype(np.float64)}
        if search.simulates:
            rates, held = speed.estimates(group.model, group.counts_nk)
            costs |= {"seconds": 1 / rates, "device_bytes": held}
        columns.append(costs)
    sizes = [len(group.counts_nk) for group in groups]
    costs = {name: np.concatenate([one[name] for one in columns]) for name in columns[0]}
    index_n = np.concatenate([np.arange(size) for size in sizes])
    return _Table(groups, np.repeat(np.arange(len(groups)), sizes), index_n, costs)


def _found(parent: ModelConfig, table: _Table, number: int, removal: Sequence[int]) -> Found:
    group, index = table.groups[table.group_n[number]], table.index_n[number]
    kinds = dict.fromkeys(parent.layers.main)
    layers = dict(zip(kinds, map(int, group.counts_nk[index]), strict=True))
    model = plain_model(with_pattern(group.model, pattern_of(parent, layers, removal)))
    costs = {name: float(values[index]) for name, values in group.costs_n.items()}
    return Found(model, group.widths, layers, costs)


def with_speed(found: Found, speed: Speed) -> Found:
    """The candidate with the simulator's prediction for it."""
    return found._replace(speed=dict(speed_facts(speed.predict(found.model))))


def keeps(found: Found, allowed: dict[str, float]) -> bool:
    """Whether a simulated candidate keeps the budgets of what was simulated."""
    assert found.speed is not None
    held, rate = found.speed["device_memory_bytes"], found.speed["tokens_per_second"]
    return held <= allowed.get("device_bytes", np.inf) and 1 / rate <= allowed.get("seconds", np.inf)
