"""A few of many random plans, which together make many pairs of choices: eight for `make test`, twelve for CI.

`python -m tests.train.chosen` chooses again, in seconds, and prints SEEDS and the numbers of pairs.
"""

import itertools
import random
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tests.train.plans import AXES, CHOICES, MODELS, random_run

from orogen.config.readers import READERS
from orogen.parallel.runtime import configure

DRAWN, EIGHT, TWELVE = 600, 8, 12
# The first eight make 791 pairs and all twelve 947, of 1,122 that all the drawn make; eight at random made 685, and
# twenty 909.
SEEDS = (9, 216, 503, 47, 26, 565, 365, 149, 587, 3, 172, 196)
KINDS = {  # of plans, and of how many of the eight
    "a model whose vocabulary tensor does not divide": 2,
    "the whole stream on ranks of tensor": 2,
    "experts that cut an axis of the mesh in two": 3,
    "key heads and groups on fewer ranks than tensor has": 1,
    "dropless experts over ranks": 2,
    **{f"{axis} above 1": 4 for axis in AXES},
}


class Drawn(NamedTuple):
    """A random run, what it chooses of what something reads, and its KINDS."""

    name: str
    run: Any
    choices: frozenset[tuple[str, Any]]
    kinds: frozenset[str]

    @property
    def pairs(self) -> set[tuple]:
        """Every two choices that are made together."""
        return set(itertools.combinations(sorted(self.choices, key=str), 2))


def drawn(seed: int) -> Drawn:
    """The run of a seed."""
    name, run = random_run(random.Random(seed), 8, short=True)
    return Drawn(name, run, frozenset(choices(name, run)), frozenset(_kinds(run)))


def choices(name: str, run: Any) -> set[tuple[str, Any]]:
    """What a run chooses, of what something reads."""
    plan, ranks = run.plan, run.plan.data * run.plan.context
    unread = {field for reader in READERS["plan"] if not reader.holds(run) for field in reader.fields.split()}
    unread |= {"fsdp"} if (plan.fsdp_size or ranks) == 1 else set()
    unread |= {"dispatch"} if plan.expert * plan.expert_tensor == 1 else set()
    made = {(field, getattr(plan, field)) for field in CHOICES if field not in unread}
    made |= {(axis, min(getattr(plan, axis), 4 if axis == "tensor" else 2)) for axis in AXES}
    return made | {
        ("shards on some ranks", 1 < (plan.fsdp_size or 1) < ranks), ("model", name),
        ("vocabulary", run.model.vocab_size),
    }  # fmt: skip


def _kinds(run: Any) -> set[str]:
    from orogen.parallel.plan import make_plan

    plan = run.plan
    axes = make_plan(plan, run.model, abstract=True).mesh.axis_names
    holds = (
        run.model.vocab_size % plan.tensor > 0, plan.stream == "whole" and plan.tensor > 1,
        any("." in axis for axis in axes), plan.tensor > 2, plan.capacity_factor is None and plan.expert > 1,
        *(getattr(plan, axis) > 1 for axis in AXES),
    )  # fmt: skip
    return set(itertools.compress(KINDS, holds))


def unmet(sample: Sequence[Drawn]) -> list[str]:
    """What a sample lacks: values of choices, models, and KINDS."""
    made = set().union(*(one.choices for one in sample))
    wanted = {(field, value) for field, values in CHOICES.items() for value in values}
    wanted |= {("model", name) for name in MODELS} | {("shards on some ranks", True)}
    lacking = [f"{field} {value}" for field, value in sorted(wanted - made, key=str)]
    for kind, least in KINDS.items():
        found = sum(kind in one.kinds for one in sample)
        lacking += [f"{kind}: {found} of {least}"] if found < least else []
    dispatches = {one.run.plan.dispatch for one in sample if "dropless experts over ranks" in one.kinds}
    return lacking + (["two dispatches of dropless experts"] if len(dispatches) < 2 else [])


def count_pairs(sample: Iterable[Drawn]) -> int:
    """How many pairs of choices a sample makes."""
    return len(set().union(*(one.pairs for one in sample)))


def choose(candidates: Sequence[Drawn]) -> list[int]:
    """Of the candidates, eight that lack nothing and, greedily and by swaps, make many pairs; then four more."""
    number = {pair: 1 << i for i, pair in enumerate(set().union(*(one.pairs for one in candidates)))}
    masks = [sum(number[pair] for pair in one.pairs) for one in candidates]

    def joined(chosen: Sequence[int]) -> int:
        mask = 0
        for i in chosen:
            mask |= masks[i]
        return mask.bit_count()

    def worth(chosen: Sequence[int]) -> tuple[int, int]:
        return -len(unmet([candidates[i] for i in chosen])), joined(chosen)

    def added(chosen: list[int], size: int) -> list[int]:
        while len(chosen) < size:
            chosen = [*chosen, max(range(len(masks)), key=lambda i: joined([*chosen, i]))]
        return chosen

    eight, before = added([], EIGHT), None
    while before != eight:
        before = eight
        for place in range(EIGHT):
            swaps = ([*eight[:place], i, *eight[place + 1 :]] for i in range(len(masks)))
            eight = max(itertools.chain([eight], swaps), key=worth)
    return added(eight, TWELVE)


def main() -> int:
    """Prints a choice. Exit status 1 if it lacks something."""
    configure(8)
    candidates = [drawn(seed) for seed in range(DRAWN)]
    chosen = choose(candidates)
    sample = [candidates[i] for i in chosen]
    print("SEEDS =", tuple(chosen))
    counts = [count_pairs(some) for some in (sample[:EIGHT], sample, candidates)]
    print("pairs of the eight, of the twelve and of all: {}, {}, {}".format(*counts))
    at_random = [count_pairs(random.Random(0).sample(candidates, n)) for n in (EIGHT, 20)]
    print("of eight and twenty at random: {}, {}".format(*at_random))
    print("\n".join(lacking := unmet(sample[:EIGHT])))
    return int(bool(lacking))


if __name__ == "__main__":
    sys.exit(main())
