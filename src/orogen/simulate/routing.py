"""How tokens are assumed to choose experts: evenly, as a run measured it, or by Zipf's law.

Letters: l layers with experts, e experts.
"""

from typing import NamedTuple

from orogen.config.plan import PlanConfig


class Routing(NamedTuple):
    """The share of the assignments that each expert gets.

    kind: `balanced`, `zipf` or `measured`. exponent: of Zipf's law, the i-th most popular expert's share ∝ 1/iˢ; a
    seeded permutation places the popular experts. loads_le: measured counts, layer by layer, in any unit.
    """

    kind: str = "balanced"
    exponent: float = 0.0
    loads_le: tuple[tuple[float, ...], ...] = ()
    source: str = ""

    def imbalance(self, experts: int, plan: PlanConfig) -> float:
        """Rows of the busiest expert rank over an even share, averaged over the layers; 1 is balanced."""
        raise NotImplementedError


BALANCED = Routing()
