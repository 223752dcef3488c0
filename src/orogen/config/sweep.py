"""A sweep: runs that differ in named bindings and in their seeds, and how they are compared."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NamedTuple

from orogen.config.checks import check_types, require, require_choice, require_not_negative, require_positive

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=-]*")
MAX_ARMS = 10**4


def arm_name(values: Iterable[str]) -> str:
    """The name of the arm with these values on the axes."""
    return "+".join(values)


class Arm(NamedTuple):
    """One cell of the matrix: its value on each axis, and their bindings in the order of the axes."""

    values: tuple[str, ...]
    bindings: tuple[str, ...]

    @property
    def name(self) -> str:
        """The values, joined by `+`: part of the names of its runs."""
        return arm_name(self.values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Runs of one recipe that differ in bindings and seeds.

    matrix: {axis: {value: [binding, ...]}}; an arm takes one value of each axis. The files must be complete without
    these bindings: they may be the control, which then binds nothing. budget: what is equal for all arms, by the number
    of their steps: tokens; flops, by `cost.flops`, of the forward and backward passes; or steps, which each arm then
    binds itself. Warm-up, decay and phases keep their shares of the steps. learning_rates: each arm first trains once
    with each of them for search_share of its steps, and then runs with the one whose metric is best.

    metric, further: numbers of metrics.jsonl, of which a run's last one counts, or load_violation: the mean of
    max / mean - 1 of the experts' loads, over MoE layers and the last tenth of the steps. checkpoints: an arm with such
    a value begins with the weights of the folder; {seed} in its name stands for the run's seed.
    """

    matrix: Annotated[dict, "by axis, by value, the bindings of that value"]
    control: Annotated[tuple[str, ...], "the control's value on each axis, in their order"]
    seeds: Annotated[tuple[int, ...], "values of TrainConfig.seed: each arm runs once with each of them"]
    budget: Annotated[str, "what the arms have equal: tokens, flops or steps"] = "tokens"
    parameters_within: Annotated[
        float, "largest difference of an arm's parameters from the control's, as a share of these; 0: any"
    ] = 0.0
    learning_rates: Annotated[tuple[float, ...], "peaks to choose from for each arm; none: as bound"] = ()
    search_share: Annotated[float, "share of an arm's steps that each run of the search takes"] = 0.25
    search_seed: Annotated[int, "TrainConfig.seed of the search, which no run has"] = 10**6
    metric: Annotated[str, "the number in metrics.jsonl that arms are compared by"] = "whole_heldout_loss"
    lower_is_better: Annotated[bool, "whether a smaller metric is better"] = True
    further: Annotated[tuple[str, ...], "more numbers that are kept, and compared in tables of their own"] = ()
    checkpoints: Annotated[dict | None, "{value: folder} for values of some axis; None: all arms start afresh"] = None

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("control", "seeds", "learning_rates", "further"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        self._check_matrix()
        require_choice(self, "budget", ("tokens", "flops", "steps"))
        require(len(self.seeds) > 0 and len(set(self.seeds)) == len(self.seeds), self, "seeds", "different numbers")
        require(self.search_seed not in self.seeds, self, "search_seed", "a number that is not among the seeds")
        require_not_negative(self, "parameters_within")
        require_positive(self, "search_share")
        require(self.search_share <= 1, self, "search_share", "at most 1")
        rates = self.learning_rates
        require(all(rate > 0 for rate in rates) and len(set(rates)) == len(rates), self, "learning_rates",
                "different numbers above 0")  # fmt: skip
        require(len(rates) != 1, self, "learning_rates", "none, or at least two to choose from")
        require(self.metric != "", self, "metric", "the name of a number in metrics.jsonl")
        names = (self.metric, *self.further)
        require(
            "" not in names and len(set(names)) == len(names),
            self,
            "further",
            "other names than the metric's, each once",
        )
        self._check_checkpoints()

    def _check_matrix(self) -> None:
        expected = "{axis: {value: [binding, ...]}} with names of letters, digits and _ . , = -"
        axes = self.matrix.values()
        good = len(self.matrix) > 0 and all(isinstance(axis, dict) and axis for axis in axes)
        good = good and all(_is_name(name) for name in (*self.matrix, *itertools.chain(*axes)))
        good = good and all(_are_bindings(bindings) for axis in axes for bindings in axis.values())
        require(good, self, "matrix", expected)
        size = len(self.control)
        expected = f"one value for each of the axes {', '.join(self.matrix)}"
        known = size == len(self.matrix) and all(v in axis for v, axis in zip(self.control, axes, strict=False))
        require(known, self, "control", expected)
        count = 1
        for axis in axes:
            count *= len(axis)
        require(count <= MAX_ARMS, self, "matrix", f"at most {MAX_ARMS} arms")

    def _check_checkpoints(self) -> None:
        values = set(itertools.chain(*self.matrix.values()))
        good = all(value in values and isinstance(folder, str) and folder for value, folder in self._folders())
        require(good, self, "checkpoints", f"{{value: folder}} with values among {sorted(values)}")
        for arm in self.arms():
            expected = f"at most one for the values of arm {arm.name}"
            require(sum(value in arm.values for value, _ in self._folders()) <= 1, self, "checkpoints", expected)

    def _folders(self) -> list[tuple[str, str]]:
        return list((self.checkpoints or {}).items())

    def checkpoint(self, arm: Arm, seed: int) -> str | None:
        """The folder whose weights a run begins with; None: it starts afresh."""
        found = [folder for value, folder in self._folders() if value in arm.values]
        return found[0].replace("{seed}", str(seed)) if found else None

    @property
    def numbers(self) -> tuple[str, ...]:
        """The metric and the further numbers."""
        return (self.metric, *self.further)

    def arms(self) -> Iterator[Arm]:
        """All arms; the last axis varies fastest."""
        for cell in itertools.product(*(axis.items() for axis in self.matrix.values())):
            yield Arm(tuple(value for value, _ in cell), tuple(b for _, bindings in cell for b in bindings))


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _are_bindings(bindings: Any) -> bool:
    return isinstance(bindings, list | tuple) and all(isinstance(b, str) and "=" in b for b in bindings)
