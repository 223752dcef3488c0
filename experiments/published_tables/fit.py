"""Fits one set of constants per kind of hardware, and one of the program, on the chosen rows alone.

`python experiments/published_tables/fit.py` writes `constants.json`, by hardware; `run.py --constants` takes it. The
values stand in `simulate/hardware.py`.

Least squares of the logarithms of predicted over published times, each weighted as if it were known within NOISE, with
each constant held near its value before the fit, within SPREAD of it (of 1, for shares of traffic that is hidden): with
fewer rows than constants of interest, what the rows do not determine stays where measurements put it.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from orogen.simulate.hardware import KINDS, PROGRAMS
from scipy.optimize import least_squares
from tables import FOLDER, both_seconds, cluster, config, fitted, read_rows

from orogen.simulate.predict import predict

CONSTANTS = FOLDER / "constants.json"
NOISE, SPREAD, STEP = 0.05, 0.15, 0.02
# By hardware; kinds in one tuple share their constants.
FREE = {
    ("a100",): ("matmul", "scores", "memory", "node", "network", "congestion"),
    ("h100",): ("matmul", "matmul_fp8", "grouped", "attention_backward", "memory", "node", "network", "congestion"),
    ("gb200", "gb300"): ("matmul", "matmul_fp8", "grouped", "memory", "node", "network"),
}
PROGRAM = ("overlap_tensor", "overlap_data", "overlap_expert", "overlap_stage", "contention")
UPPER = {"congestion": 0.3, "contention": 1.0}  # of others: 0.95

Floats = NDArray[np.float64]


def parameters() -> list[tuple[tuple[str, ...], str, float]]:
    """(hardware, name, value before the fit) of every constant; those of the program have all hardware."""
    kinds = tuple(KINDS)
    shares = [(names, name, getattr(KINDS[names[0]].shares, name)) for names, free in FREE.items() for name in free]
    return shares + [(kinds, name, getattr(PROGRAMS["megatron"], name)) for name in PROGRAM]


def constants(values: Sequence[float], hardware: str) -> dict[str, float]:
    """The constants of one kind of hardware, by name."""
    found = zip(parameters(), values, strict=True)
    return {name: round(float(value), 4) for (kinds, name, _), value in found if hardware in kinds}


def errors(values: Sequence[float], rows: Sequence[dict[str, Any]]) -> Floats:
    """Of each row, the logarithm of the predicted over the published time."""
    logs = []
    for row in rows:
        run = config(row)
        found = predict(run, cluster(row, constants(values, row["hardware"])))
        predicted, published = both_seconds(row, run.model, found)
        logs.append(np.log(predicted / published))
    return np.array(logs)


def main() -> None:
    chosen = set(fitted())
    rows = [row for row in read_rows() if row["id"] in chosen]
    before = np.array([value for *_, value in parameters()])
    names = [name for _, name, _ in parameters()]
    spread = np.array([SPREAD if name in PROGRAM or not value else SPREAD * value for _, name, value in parameters()])
    upper = np.array([UPPER.get(name, 0.95) for name in names])
    start = np.clip(before, 1e-3, upper - 1e-3)

    def residuals(values: Floats) -> Floats:
        return np.concatenate([errors(values, rows) / NOISE, (values - before) / spread])

    found = least_squares(residuals, start, bounds=(np.zeros_like(upper), upper), diff_step=STEP, max_nfev=12)
    CONSTANTS.write_text(json.dumps({kind: constants(found.x, kind) for kind in KINDS}, indent=1) + "\n")
    first, last = errors(before, rows), errors(found.x, rows)
    print("| row | before | after |\n|---|---|---|")
    for row, was, now in zip(rows, first, last, strict=True):
        print(f"| {row['id']} | {np.expm1(was):+.1%} | {np.expm1(now):+.1%} |")
    print("\n| hardware | constant | before | after |\n|---|---|---|---|")
    for (kinds, name, was), now in zip(parameters(), found.x, strict=True):
        print(f"| {'the program' if len(kinds) > 2 else ', '.join(kinds)} | {name} | {was:.3f} | {now:.3f} |")


if __name__ == "__main__":
    main()
