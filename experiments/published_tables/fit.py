"""Fits one set of constants per kind of hardware, and one of the program, on the chosen rows alone.

`python experiments/published_tables/fit.py` writes `constants.json`, by hardware. Its values, rounded, stand in
`simulate/hardware.py`; every fit starts from the values that stood there before the first.

Least squares of the logarithms of predicted over published times, each as if it were known within NOISE (larger errors
count linearly), with each constant held near its value before the fit, within SPREAD of it (of 1, for shares of traffic
that is hidden): what the few rows do not determine stays where measurements put it.
"""

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from tables import FOLDER, PASSES, UNFUSED, Row, both_seconds, cluster, config, fitted, read_rows

from orogen.simulate.hardware import KINDS
from orogen.simulate.predict import predict

CONSTANTS = FOLDER / "constants.json"
NOISE, SPREAD, STEP = 0.05, 0.15, 0.1
# By hardware, with the values before the fit; kinds in one tuple share their constants.
FREE = {
    ("a100",): {"gathers": 1.4},
    ("h100",): {"host": 40e-6, "gathers": 2.0},
    ("gb200", "gb300"): {"matmul": 0.85, "matmul_fp8": 0.50, "grouped": 0.72, "memory": 0.55},
}
PROGRAM = {"overlap_data": 0.8, "contention": 0.6}
UPPER = {"contention": 1.0, "gathers": 4.0, "host": 100e-6}  # of others: 0.95
# Constants that nothing measured bounds more closely.
LOOSE = {"gathers": 0.5, "host": 20e-6}

Floats = NDArray[np.float64]


def parameters() -> list[tuple[tuple[str, ...], str, float]]:
    """(hardware, name, value before the fit) of every constant; those of the program have all but that of 2021."""
    kinds = tuple(name for name in KINDS if name not in UNFUSED)
    shares = [(names, name, value) for names, free in FREE.items() for name, value in free.items()]
    return shares + [(kinds, name, value) for name, value in PROGRAM.items()]


def constants(values: Sequence[float], hardware: str) -> dict[str, float]:
    """The constants of one kind of hardware, by name."""
    found = zip(parameters(), values, strict=True)
    return {name: float(f"{value:.4g}") for (kinds, name, _), value in found if hardware in kinds}


def errors(values: Sequence[float], rows: Sequence[Row]) -> Floats:
    """Of each row, the logarithm of the predicted over the published time."""
    logs = []
    for row in rows:
        run = config(row)
        found = predict(run, cluster(row, constants(values, row["hardware"])), most=PASSES)
        predicted, published = both_seconds(row, run.model, found)
        logs.append(np.log(predicted / published))
    return np.array(logs)


def slopes(values: Floats, rows: Sequence[Row], spread: Floats) -> Floats:
    """The derivatives of `errors`; a constant matters to the rows of its hardware alone."""
    found = np.zeros((len(rows), len(values)))
    for index, (kinds, _, _) in enumerate(parameters()):
        mine = [row for row, _ in enumerate(rows) if rows[row]["hardware"] in kinds]
        moved = values.copy()
        moved[index] += STEP * spread[index]
        some = [rows[row] for row in mine]
        found[mine, index] = (errors(moved, some) - errors(values, some)) / (STEP * spread[index])
    return found


def _spread(name: str, value: float) -> float:
    return LOOSE.get(name, SPREAD if name in PROGRAM or not value else SPREAD * value)


def main() -> None:
    chosen = set(fitted())
    rows = [row for row in read_rows() if row["id"] in chosen]
    before = np.array([value for *_, value in parameters()])
    names = [name for _, name, _ in parameters()]
    spread = np.array([_spread(name, value) for _, name, value in parameters()])
    upper = np.array([UPPER.get(name, 0.95) for name in names])
    start = np.clip(before, 1e-3 * upper, 0.999 * upper)

    def residuals(values: Floats) -> Floats:
        return np.concatenate([errors(values, rows) / NOISE, (values - before) / spread])

    def jacobian(values: Floats) -> Floats:
        return np.concatenate([slopes(values, rows, spread) / NOISE, np.diag(1 / spread)])

    bounds = np.zeros_like(upper), upper
    found = least_squares(residuals, start, jacobian, bounds=bounds, loss="soft_l1", x_scale=spread, max_nfev=8)
    CONSTANTS.write_text(json.dumps({kind: constants(found.x, kind) for kind in KINDS}, indent=1) + "\n")
    first, last = errors(before, rows), errors(found.x, rows)
    print("| row | before | after |\n|---|---|---|")
    for row, was, now in zip(rows, first, last, strict=True):
        print(f"| {row['id']} | {np.expm1(was):+.1%} | {np.expm1(now):+.1%} |")
    print("\n| hardware | constant | before | after |\n|---|---|---|---|")
    for (kinds, name, was), now in zip(parameters(), found.x, strict=True):
        print(f"| {'the program' if len(kinds) > 2 else ', '.join(kinds)} | {name} | {was:.4g} | {now:.4g} |")


if __name__ == "__main__":
    main()
