"""Chooses the plans of the full-size step: `python experiments/eight_gpus/plans.py` writes `h100_*.gin` and
`h200_*.gin`.

Each is the winner of `orogen simulate --search` on eight devices under one way to dispatch tokens. A search keeps the
memory below MEMORY_GIB, so that the allocator's share and NCCL's buffers have room beside the step.
"""

import dataclasses
from pathlib import Path
from typing import Any

from orogen.bench.cpu_train import CONFIGS
from orogen.bench.workload import CHEAP
from orogen.config.cluster import ClusterConfig
from orogen.config.files import write_atomically
from orogen.config.load import load
from orogen.config.plan import FOR_GPU
from orogen.config.run import RunConfig
from orogen.simulate.predict import predict
from orogen.simulate.search import plan_text, search

HERE = Path(__file__).parent
MODEL = CONFIGS / "nemotron3_nano_30b_a3b.gin"
DEVICES = 8
MEMORY_GIB = {"h100": 73.0, "h200": 130.0}  # of 79.1 and 139.8
# By name, how tokens reach their experts. Bounded buffers lose assignments under uneven routing; `lossless` none.
DISPATCHES: dict[str, dict[str, Any]] = {
    "ragged": {"dispatch": "ragged", "buffer_factor": 1.5},
    "alltoall": {"dispatch": "alltoall", "capacity_factor": 1.25},
    "lossless": {"dispatch": "ragged"},
}
# The winner with cheap activations recomputed by name, which the search does not try: the reserve if memory is short.
RESERVE, WINNER = "reserve", "ragged"
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
            bound = {**KERNELS, **dispatch}
            run = config(bindings=tuple(f"PlanConfig.{field}={value!r}" for field, value in bound.items()))
            best = search(run, cluster, DEVICES).plans[0]
            _write(f"{hardware}_{name}", best.plan, best.prediction)
            if name == WINNER:
                kept = dataclasses.replace(best.plan, remat=tuple(CHEAP[letter] for letter in "ME"))
                found = predict(dataclasses.replace(run, plan=kept), cluster)
                if found.fits:
                    _write(f"{hardware}_{RESERVE}", kept, found)


def _write(name: str, plan: Any, found: Any) -> None:
    facts = f"{found.tokens_per_second:,.0f} tokens/s, {found.mfu:.1%} MFU, {found.device_memory_bytes / 1e9:.1f} GB"
    text = plan_text(plan, f"{DEVICES} x {found.hardware}: {facts} predicted, balanced routing")
    write_atomically(HERE / f"{name}.gin", text.encode())
    print(f"{name}: {facts}")


if __name__ == "__main__":
    main()
