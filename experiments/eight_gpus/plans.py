"""Chooses the plans of the full-size step: `python experiments/eight_gpus/plans.py` writes `h100_*.gin` and
`h200_*.gin`.

Each is the winner of `orogen simulate --search` on eight devices under one way to dispatch tokens. A search keeps the
predicted memory below MEMORY_GIB: what the allocator has, over the largest excess of a compiled step on two GPUs over
its prediction (`experiments/two_gpus/results.jsonl`). Moments are in float32, or in bfloat16 if no plan fits otherwise.
"""

import dataclasses
from pathlib import Path
from typing import Any

from orogen.bench.cpu_train import CONFIGS
from orogen.bench.workload import CHEAP
from orogen.config.checks import ConfigError
from orogen.config.cluster import ClusterConfig
from orogen.config.files import write_atomically
from orogen.config.load import load
from orogen.config.plan import FOR_GPU
from orogen.config.run import RunConfig
from orogen.simulate.predict import predict
from orogen.simulate.search import Ranked, describe, plan_text, search

HERE = Path(__file__).parent
MODEL = CONFIGS / "nemotron3_nano_30b_a3b.gin"
DEVICES = 8
EXCESS = 1.17  # alltoall: 20.4 GB compiled, 17.4 predicted
MEMORY_FRACTION = 0.95  # of the device that the allocator takes
ALLOCATED = {name: gib * MEMORY_FRACTION for name, gib in {"h100": 79.1, "h200": 139.8}.items()}  # GiB
MEMORY_GIB = {name: gib / EXCESS for name, gib in ALLOCATED.items()}
# By name, how tokens reach their experts. Bounded buffers lose assignments under uneven routing; `lossless` none.
DISPATCHES: dict[str, dict[str, Any]] = {
    "ragged": {"dispatch": "ragged", "buffer_factor": 1.5},
    "alltoall": {"dispatch": "alltoall", "capacity_factor": 1.25},
    "lossless": {"dispatch": "ragged"},
}
# The winner with cheap activations recomputed by name, which the search does not try: the reserve if memory is short.
RESERVE, WINNER = "reserve", "ragged"
MOMENT_DTYPE = "OptimizerConfig.moment_dtype"
KERNELS = {field: kernel for field, kernel in FOR_GPU.items() if field != "quantize"} | {"logit_rows": 4096}


def config(plan: Path | None = None, bindings: tuple[str, ...] = ()) -> RunConfig:
    """The full-size run, on the plan in a file if there is one. Raises ConfigError."""
    files = [MODEL, HERE / "nano.gin", *([plan] if plan else [])]
    return load(files, list(bindings))[0]


def files(hardware: str) -> dict[str, Path]:
    """The plans for a kind of hardware, by name, the best first."""
    named = {name: HERE / f"{hardware}_{name}.gin" for name in (*DISPATCHES, RESERVE)}
    return {name: path for name, path in named.items() if path.is_file()}


def main() -> None:
    for hardware, memory in MEMORY_GIB.items():
        cluster = ClusterConfig(hardware=hardware, memory_gib=memory)
        for name, dispatch in DISPATCHES.items():
            run, best = _best({**KERNELS, **dispatch}, cluster)
            _write(f"{hardware}_{name}", run, best)
            if name == WINNER:
                kept = dataclasses.replace(best.plan, remat=tuple(CHEAP[letter] for letter in "ME"))
                found = predict(dataclasses.replace(run, plan=kept), cluster)
                if found.fits:
                    _write(f"{hardware}_{RESERVE}", run, Ranked(kept, found))


def _best(fields: dict[str, Any], cluster: ClusterConfig) -> tuple[RunConfig, Ranked]:
    """The run and the winner of its search, with the widest moments that fit. Raises ConfigError if none do."""
    bound = tuple(f"PlanConfig.{field}={value!r}" for field, value in fields.items())
    wide, narrow = (config(bindings=(*bound, f"{MOMENT_DTYPE}={dtype!r}")) for dtype in ("float32", "bfloat16"))
    try:
        return wide, search(wide, cluster, DEVICES).plans[0]
    except ConfigError as error:
        print(f"float32 moments: {error}")
        return narrow, search(narrow, cluster, DEVICES).plans[0]


def _write(name: str, run: RunConfig, best: Ranked) -> None:
    found, moments = best.prediction, run.optimizer.moment_dtype
    facts = f"{found.tokens_per_second:,.0f} tokens/s, {found.mfu:.1%} MFU, {found.device_memory_bytes / 1e9:.1f} GB"
    text = plan_text(best.plan, f"{DEVICES} x {found.hardware}: {facts} predicted, balanced routing")
    write_atomically(HERE / f"{name}.gin", f"{text}{MOMENT_DTYPE} = {moments!r}\n".encode())
    print(f"{name}: {facts}, {moments} moments; {describe(best.plan)}")


if __name__ == "__main__":
    main()
