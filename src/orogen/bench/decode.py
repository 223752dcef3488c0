"""All operations of decoding in one run: state updates, replay, paged attention, and products of few rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orogen.bench import few_rows, operation, paged_attention, replay, state_update, thin_matmul
from orogen.bench.operation import Operation
from orogen.config.checks import ConfigError

MODULES = (state_update, replay, paged_attention, few_rows, thin_matmul)
OPERATIONS = tuple(module.OPERATION for module in MODULES)


def bench(
    operations: Sequence[Operation] = OPERATIONS,
    *,
    shapes: Sequence[str],
    implementations: Sequence[str],
    samples: int,
    seed: int,
    profile: Path | None = None,
    ceiling_sizes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Runs `operation.bench` for each operation, with those of the implementations and shapes that it has, and joins
    the records. An operation that has none of the shapes is left out.

    Raises ConfigError on a name that no operation has, and on an operation that has none of the implementations.
    """
    _require_known("implementation", implementations, [name for o in operations for name in o.implementations])
    _require_known("--shape", shapes, [name for o in operations for name in o.shapes])
    chosen = []
    for one in operations:
        names = [name for name in implementations if name in one.implementations]
        mine = [name for name in shapes or one.shapes if name in one.shapes]
        if not names:
            raise ConfigError(f"no implementation of {one.name}; expected some of {', '.join(one.implementations)}")
        if mine:
            chosen.append((one, names, mine))
    facts: dict[str, Any] = {}
    records = []
    for one, names, mine in chosen:
        folder = None if profile is None else profile / one.name
        facts = operation.bench(
            one, shapes=mine, implementations=names, peer=None, samples=samples, seed=seed, profile=folder,
            ceiling_sizes=ceiling_sizes,
        )  # fmt: skip
        records += facts["records"]
    return {**facts, "bench": "decode", "records": records}


def _require_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{what} {name!r}; expected some of {', '.join(dict.fromkeys(known))}")
