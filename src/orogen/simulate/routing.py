"""How tokens are assumed to choose experts: evenly, as a run measured it, or by Zipf's law.

Balanced runs are 1.2 to 2 times as fast as runs of the same models with their own routing (Megatron-Bridge's
verification cards), so every prediction names its routing. Letters: l layers with experts, e experts, r expert ranks.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.plan import PlanConfig

LOADS = "expert_load"
SEED = 0  # places Zipf's popular experts
PLACEMENTS = 64


class Routing(NamedTuple):
    """The share of the assignments that each expert gets.

    kind: `balanced`, `zipf` or `measured`. exponent: of Zipf's law: the i-th most popular expert's share is
    proportional to i to the minus this; seeded permutations place the popular experts. loads_le: measured counts, layer
    by layer, in any unit. source: where they come from.
    """

    kind: str = "balanced"
    exponent: float = 0.0
    loads_le: tuple[tuple[float, ...], ...] = ()
    source: str = ""

    def imbalance(self, experts: int, plan: PlanConfig) -> float:
        """Assignments of the busiest expert rank over an even share, averaged over layers; 1 if they are balanced.

        Raises ConfigError if measured loads are of another number of experts.
        """
        if self.kind == "balanced" or plan.expert == 1:
            return 1.0
        if self.kind == "zipf":
            share_e = np.arange(1, experts + 1, dtype=np.float64) ** -self.exponent
            random = np.random.default_rng(SEED)
            loads_le = np.stack([random.permutation(share_e) for _ in range(PLACEMENTS)])
        else:
            loads_le = np.asarray(self.loads_le, np.float64)
            if loads_le.shape[1] != experts:
                raise ConfigError(
                    f"the loads of {self.source} are of {loads_le.shape[1]} experts; expected "
                    f"ModelConfig.n_routed_experts = {experts}"
                )
        rank_lr = loads_le.reshape(len(loads_le), plan.expert, -1).sum(axis=2)
        return float(np.mean(rank_lr.max(axis=1) / rank_lr.mean(axis=1)))

    def __str__(self) -> str:
        if self.kind == "zipf":
            return f"zipf {self.exponent:g}"
        return self.kind if self.kind == "balanced" else f"measured in {self.source}"


BALANCED = Routing()


def read_routing(text: str) -> Routing:
    """`balanced`, `zipf:1.0`, or the last loads in a run folder or metrics.jsonl. Raises ConfigError."""
    if text == BALANCED.kind:
        return BALANCED
    kind, _, exponent = text.partition(":")
    if kind == "zipf":
        try:
            value = float(exponent)
        except ValueError:
            value = -1.0
        if not 0 <= value < np.inf:
            raise ConfigError(
                f"--routing is {text!r}; expected zipf:EXPONENT with a number of 0 or more, like zipf:1.0"
            )
        return Routing("zipf", exponent=value)
    return _measured(text)


def _measured(text: str) -> Routing:
    path = Path(text)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        expected = "balanced, zipf:EXPONENT, a run folder or its metrics.jsonl"
        raise ConfigError(f"--routing is {text!r}; expected {expected}")
    loads = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            loads = json.loads(line).get(LOADS) or loads
        except (ValueError, AttributeError):
            raise ConfigError(f"{path}, line {number}: expected a JSON object") from None
    if not loads:
        raise ConfigError(f"{path} has no {LOADS!r}; expected the metrics of a model with experts")
    return Routing("measured", loads_le=tuple(map(tuple, loads)), source=text)
