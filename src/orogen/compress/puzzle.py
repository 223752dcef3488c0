"""MiniPuzzle: for each layer of a model the replacement that costs least in all, by integer programming; no jax.

    minimise Σ_r z_r score_r   with z_r in {0, 1}, Σ_(r of layer l) z_r = 1 for each l, Σ_r z_r cost_r ≤ budget

for each cost (arXiv:2411.19146, section 4.3; arXiv:2504.03624, section 4). Scores are taken to add up. A layer stays as
it is with score 0, or is removed, or has another width; as all layers have one value of each width, one more variable
per value joins their choices. Letters: l layers of the parent, r replacements.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from orogen.compress.candidates import Costs, costs, total_costs, with_nearest
from orogen.compress.search import Found, Ranking, unmet
from orogen.compress.speed import with_pattern
from orogen.config.checks import ConfigError
from orogen.config.json_file import read_object
from orogen.config.model import ModelConfig
from orogen.config.reads import plain_model
from orogen.config.search import WIDTHS, SearchConfig

KEPT, REMOVED = "kept", "removed"
MAX_BYTES = 10**7  # of a file of scores; 1,024 layers with 100 widths take less
NUMBERS = (int, float)


class Replacement(NamedTuple):
    """What may become of a layer. field: KEPT as it is, REMOVED, or the width that gets another value."""

    layer: int
    field: str
    value: int
    score: float


def read_scores(file: Path, parent: ModelConfig, field: str = "scores") -> list[Replacement]:
    """The scores of the file that SearchConfig.`field` names, one object per line. Raises ConfigError with the line's
    number for what is no score, for a layer that the model lacks or that does not read the field, and for two scores of
    one replacement."""
    if not file.is_file():
        raise ConfigError(f"SearchConfig.{field} is {str(file)!r}; expected a file")
    if file.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{file} has {file.stat().st_size} bytes; expected at most {MAX_BYTES}")
    found: dict[tuple[int, str, int], Replacement] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        one = _replacement(read_object(line, where=f"{file}:{number}"), parent, f"{file}:{number}")
        if one[:3] in found:
            raise ConfigError(f"{file}:{number}: layer {one.layer} has a score of this already; expected one")
        found[one[:3]] = one
    if not found:
        raise ConfigError(f"{file} has no scores; expected one object per line")
    return list(found.values())


def _replacement(record: Mapping[str, Any], parent: ModelConfig, where: str) -> Replacement:
    layer: Any = record.get("layer")
    score: Any = record.get("score")
    main = parent.layers.main
    if type(layer) is not int or not 0 <= layer < len(main):
        raise ConfigError(f"{where}: layer is {layer!r}; expected a number from 0 to {len(main) - 1}")
    if type(score) not in NUMBERS or not np.isfinite(score):
        raise ConfigError(f"{where}: score is {score!r}; expected a finite number")
    rest = record.keys() - {"layer", "score"}
    if rest == {REMOVED} and record[REMOVED] is True:
        return Replacement(layer, REMOVED, 0, float(score))
    field = next(iter(rest), "")
    if len(rest) != 1 or main[layer] not in WIDTHS.get(field, ""):
        fields = [name for name, letters in WIDTHS.items() if main[layer] in letters]
        expected = f"removed: true, or one of {', '.join(fields) or 'no width'}, beside layer and score"
        raise ConfigError(f"{where}: layer {layer} has {sorted(rest)}; expected {expected}")
    if type(record[field]) is not int or not 0 < record[field] < getattr(parent, field):
        raise ConfigError(f"{where}: {field} is {record[field]!r}; expected a size below {getattr(parent, field)}")
    return Replacement(layer, field, record[field], float(score))


def removal_order(scores: Sequence[Replacement]) -> list[int]:
    """The layers that have a score of their removal, the least important first."""
    return [one.layer for one in sorted(scores, key=lambda one: one.score) if one.field == REMOVED]


def solve(parent: ModelConfig, search: SearchConfig, scores: Sequence[Replacement]) -> Ranking:
    """The best replacements of all layers, then the next best, up to `SearchConfig.best`.

    Raises ConfigError, with the nearest value that can be kept, if none keeps the budgets; and for budgets of what is
    not linear in the layers, and for widths that the scores do not have.
    """
    _check(parent, search, scores)
    program = _Program(parent, search, scores)
    best: list[Found] = []
    while len(best) < search.best:
        chosen = program.best()
        if chosen is None:
            break
        best.append(program.found(chosen))
        program.forbid(chosen)
    if not best:
        raise ConfigError(program.refusal())
    return Ranking(len(program.options), len(best), best)


def _check(parent: ModelConfig, search: SearchConfig, scores: Sequence[Replacement]) -> None:
    if search.simulates:
        expected = "without scores: budgets of the simulator's speed do not add up over layers"
        raise ConfigError(f"SearchConfig.least_tokens_per_second, fits or order simulates; expected it {expected}")
    by_letter: dict[str, set[str]] = {}
    for one in scores:
        if one.field != REMOVED:
            by_letter.setdefault(parent.layers.main[one.layer], set()).add(one.field)
    for letter, fields in by_letter.items():
        if len(fields) > 1:
            names = ", ".join(sorted(fields))
            raise ConfigError(f"layers of {letter} have scores of {names}; expected those of one width")
    for field, value in dict.fromkeys((one.field, one.value) for one in scores if one.field not in (KEPT, REMOVED)):
        try:
            dataclasses.replace(parent, **{field: value})
        except ConfigError as error:
            refusal = with_nearest(error, parent, {field: value})
            raise ConfigError(f"SearchConfig.scores has scores of {field} = {value}: {refusal}") from None
    if widths := search.widths(parent):
        raise ConfigError(f"SearchConfig.{next(iter(widths))} has values; expected them in the file of scores alone")


class _Program:
    """The integer program. Variables: first one per option of each layer, then one per width and value. table: the
    costs of each variable."""

    def __init__(self, parent: ModelConfig, search: SearchConfig, scores: Sequence[Replacement]):
        self.parent, self.search = parent, search
        layers = range(len(parent.layers.main))
        self.options = [Replacement(layer, KEPT, 0, 0.0) for layer in layers] + list(scores)
        fields = dict.fromkeys(one.field for one in scores if one.field != REMOVED)
        values: dict[str, set[int]]
        values = {f: {getattr(parent, f)} | {one.value for one in scores if one.field == f} for f in fields}
        self.widths = [(field, value) for field in fields for value in sorted(values[field], reverse=True)]
        self.size = len(self.options) + len(self.widths)
        self.other, _ = costs(parent, search)
        self.table = np.array([*map(self._costs, self.options), *itertools.starmap(self._elsewhere, self.widths)])
        self.constraints: list[np.ndarray] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self._constrain()

    def _costs(self, one: Replacement) -> Costs:
        if one.field == REMOVED:
            return Costs(0.0, 0.0, 0.0)
        letter, changes = self.parent.layers.main[one.layer], _changes(one)
        return costs(dataclasses.replace(self.parent, **changes), self.search)[1][letter]

    def _elsewhere(self, field: str, value: int) -> Costs:
        """What a width changes outside the backbone's layers: in those of the multi-token-prediction block."""
        found, _ = costs(dataclasses.replace(self.parent, **{field: value}), self.search)
        return Costs(*(new - old for new, old in zip(found, self.other, strict=True)))

    def _constrain(self) -> None:
        of_options, of_layer = len(self.options), np.array([one.layer for one in self.options])
        for layer in range(len(self.parent.layers.main)):
            self._add(np.flatnonzero(of_layer == layer).tolist(), 1.0, 1.0)
        for field in dict.fromkeys(field for field, _ in self.widths):
            self._add([of_options + i for i, width in enumerate(self.widths) if width[0] == field], 1.0, 1.0)
        for place, (field, value) in enumerate(self.widths, of_options):
            readers = [i for i, one in enumerate(self.options) if self._has(one, field, value)]
            for number in readers:
                self._add([number], -np.inf, 0.0, minus=[place])
            if value != getattr(self.parent, field):  # without layers that have it the block's keep their own
                self._add([place], -np.inf, 0.0, minus=readers)
        main, counts = self.parent.layers.main, self.search.counts(self.parent)
        stays = [i for i, one in enumerate(self.options) if one.field != REMOVED]
        self._add(stays, 1.0, np.inf)
        for letter in counts if self.search.layers else ():
            of_letter = [i for i in stays if main[self.options[i].layer] == letter]
            self._add(of_letter, counts[letter].start, counts[letter].stop - 1)
        if self.search.depth is not None:
            self._add(stays, *self.search.depth)
        for name, most in self.search.budgets.items():
            column = Costs._fields.index(name)
            # In units of the budget, so that the solver's tolerance is one of the budget.
            self._append(self.table[:, column] / most, -np.inf, 1 - self.other[column] / most)

    def _has(self, one: Replacement, field: str, value: int) -> bool:
        """Whether a layer has this value of a width after the replacement."""
        if one.field == REMOVED or self.parent.layers.main[one.layer] not in WIDTHS[field]:
            return False
        return (getattr(self.parent, field) if one.field == KEPT else one.value) == value

    def _add(self, plus: Sequence[int], low: float, high: float, *, minus: Sequence[int] = ()) -> None:
        coefficients = np.zeros(self.size)
        coefficients[list(plus)], coefficients[list(minus)] = 1.0, -1.0
        self._append(coefficients, low, high)

    def _append(self, coefficients: np.ndarray, low: float, high: float) -> None:
        self.constraints.append(coefficients)
        self.low.append(low)
        self.high.append(high)

    def best(self) -> list[int] | None:
        """The numbers of the variables that are chosen; None if nothing keeps the constraints."""
        objective = np.zeros(self.size)
        objective[: len(self.options)] = [one.score for one in self.options]
        return self._solve(objective, range(len(self.constraints)))

    def _solve(self, objective: np.ndarray, constraints: Sequence[int]) -> list[int] | None:
        pick = list(constraints)
        low, high = (np.array(side)[pick] for side in (self.low, self.high))
        constraint: Any = LinearConstraint(np.array(self.constraints)[pick], low, high)  # type: ignore[arg-type]  # per row
        whole = {"integrality": np.ones(self.size), "bounds": Bounds(0, 1), "options": {"mip_rel_gap": 0.0}}
        found = milp(objective, constraints=constraint, **whole)
        if found.x is None:
            return None
        return np.flatnonzero(found.x > 0.5).tolist()

    def forbid(self, chosen: Sequence[int]) -> None:
        """Leaves these choices out from now on."""
        options = [i for i in chosen if i < len(self.options)]
        self._add(options, -np.inf, len(options) - 1)

    def found(self, chosen: Sequence[int]) -> Found:
        """The model with these choices, and their scores' sum."""
        parts = [self.options[i] for i in chosen if i < len(self.options)]
        kept = sorted(one.layer for one in parts if one.field != REMOVED)
        removed = tuple(sorted(one.layer for one in parts if one.field == REMOVED))
        widths: dict[str, int] = {}
        for one in parts:
            widths |= _changes(one)
        main, (_, slash, mtp) = self.parent.layers.main, self.parent.pattern.partition("/")
        pattern = "".join(main[layer] for layer in kept)
        model = plain_model(with_pattern(dataclasses.replace(self.parent, **widths), pattern + slash + mtp))
        counts = {letter: pattern.count(letter) for letter in dict.fromkeys(main)}
        score, present = float(sum(one.score for one in parts)), [counts[letter] for letter in dict.fromkeys(pattern)]
        totals = total_costs(model, self.search, np.array([present]))
        by_name = {name: float(value[0]) for name, value in totals.items()}
        return Found(model, widths, counts, by_name, score, removed=removed)

    def refusal(self) -> str:
        """The least of each cost that the choices can have, as the nearest feasible budget."""
        budgets = self.search.budgets
        constraints = range(len(self.constraints) - len(budgets))  # those of budgets come last
        reached = {}
        if self._solve(np.zeros(self.size), constraints) is None:
            return self._unreachable()
        for name in budgets:
            column = Costs._fields.index(name)
            objective = self.table[:, column]
            chosen = self._solve(objective / max(objective.max(), 1), constraints)
            assert chosen is not None, "there was a choice above"
            total = self.table[chosen].sum(0) + np.array(self.other)
            reached = {n: np.append(reached.get(n, []), total[Costs._fields.index(n)]) for n in budgets}
        return unmet(reached, budgets, len(self.options))

    def _unreachable(self) -> str:
        """Which numbers of layers no choice has, with the nearest that one has."""
        main, counts = self.parent.layers.main, self.search.counts(self.parent)
        removable = [main[one.layer] for one in self.options if one.field == REMOVED]
        least, most = 0, 0
        for letter, wanted in counts.items():
            held, stay = main.count(letter), main.count(letter) - removable.count(letter)
            low, high = (wanted.start, wanted.stop - 1) if self.search.layers else (0, held)
            if high < stay:
                why = f"{stay} of the {held} have no score of their removal"
                return f"SearchConfig.layers allows at most {high} of {letter}; expected at least {stay}: {why}"
            least, most = least + max(low, stay), most + high
        nearest = most if self.search.depth and self.search.depth[0] > most else max(least, 1)
        return f"SearchConfig.depth is {self.search.depth}; expected a range with {nearest}, the nearest depth"


def _changes(one: Replacement) -> dict[str, int]:
    """The width that the replacement changes."""
    return {} if one.field in (KEPT, REMOVED) else {one.field: one.value}
