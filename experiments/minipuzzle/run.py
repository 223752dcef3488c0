"""The hybrid of experiments/minitron pruned by MiniPuzzle's program, uniformly, and by chance, at equal parameters.

PYTHONPATH=src python experiments/minipuzzle/run.py --teachers runs/minitron --out runs/minipuzzle
"""

import argparse
import dataclasses
import importlib.util
import json
import random
import time
from pathlib import Path
from typing import Any

from orogen.config.load import load
from orogen.model.count import count

HERE = Path(__file__).parent
MINITRON = HERE.parent / "minitron"
_spec = importlib.util.spec_from_file_location("minitron", MINITRON / "run.py")
assert _spec is not None and _spec.loader is not None
minitron: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(minitron)

SHARE, CLOSE = 0.75, 0.96  # of the parameters: the budget, and the least of it that a random choice has
SIZES = (168, 144, 120, 96, 72, 48)
LEAST = {"M": 2, "*": 1, "-": 0}
STEPS, ROWS = 80, 32


def pruned(trial: Any, teacher: Path, name: str, choice: dict[str, Any], *more: object) -> dict[str, Any]:
    """Prunes into the trial's folder; what the command answers."""
    binds = minitron.bound(**{f"PruneConfig__{field}": value for field, value in choice.items()})
    asked = "prune", "--checkpoint", teacher, "--gin_file", MINITRON / "prune.gin", "--out", trial.folder / name
    return minitron.orogen(*asked, *binds, *minitron.bound(DataConfig__corpus=str(trial.train)), *more)


def parameters(model: Any, size: int, removed: tuple[int, ...] = ()) -> int:
    """Of the model with MLPs of this size, without these layers."""
    pattern = "".join(letter for number, letter in enumerate(model.pattern) if number not in removed)
    return count(dataclasses.replace(model, pattern=pattern, intermediate_size=size))["total"]


def by_program(trial: Any, scores: Path, most: int) -> dict[str, Any]:
    """The program's choice, as fields of PruneConfig."""
    layers = [f"{letter}:{least}-{MODEL.pattern.count(letter)}" for letter, least in LEAST.items()]
    binds = minitron.bound(
        SearchConfig__scores=str(scores), SearchConfig__most_parameters=float(most), SearchConfig__layers=tuple(layers),
        SearchConfig__best=1,
    )  # fmt: skip
    best = minitron.orogen("search", "--gin_file", MINITRON / "model.gin", *binds)["best"][0]
    size = best.get("intermediate_size", MODEL.intermediate_size)
    return {"remove_layers": tuple(best["remove_layers"]), "intermediate_size": size}


def at_random(seed: int, most: int) -> dict[str, Any]:
    """One of the choices that remove a layer, within the budget and at most 4 % below it."""
    draw = random.Random(seed)
    while True:
        removed = tuple(number for number in range(len(MODEL.pattern)) if draw.random() < 0.25)
        left = "".join(letter for number, letter in enumerate(MODEL.pattern) if number not in removed)
        size = draw.choice((MODEL.intermediate_size, *SIZES))
        kept = all(left.count(letter) >= least for letter, least in LEAST.items())
        if removed and kept and CLOSE * most <= parameters(MODEL, size, removed) <= most:
            return {"remove_layers": removed, "intermediate_size": size}


def results(trial: Any, teacher: Path) -> dict[str, Any]:
    """Bits per byte of every arm, right after pruning and after distillation."""
    most = int(SHARE * count(MODEL)["total"])
    scored = {"num_layers": len(MODEL.pattern) - 1, "scored_sizes": SIZES, "rows": ROWS, "depth_rows": ROWS}
    pruned(trial, teacher, "scored", scored)
    uniform = max(size for size in range(8, MODEL.intermediate_size, 8) if parameters(MODEL, size) <= most)
    arms = {
        "program": by_program(trial, trial.folder / "scored" / "removal.jsonl", most),
        "uniform": {"intermediate_size": uniform},
        "random": at_random(trial.seed, most),
    }
    found: dict[str, Any] = {"seed": trial.seed, "most": most, "teacher": trial.bits(teacher)}
    for arm, choice in arms.items():
        told = pruned(trial, teacher, f"{arm}_pruned", choice, "--scores", trial.folder / "scored")
        assert CLOSE * most <= told["parameters"][1] <= most or arm != "random", told["parameters"]
        words = "--checkpoint", teacher, "--student", trial.folder / f"{arm}_pruned"
        learned = *words, *minitron.bound(DistillConfig__divergence=1.0)
        recovered = trial.run("distill", arm, STEPS, minitron.RECOVERY_RATE, *learned)
        found[arm] = {
            "pattern": told["pattern"], "intermediate_size": choice["intermediate_size"],
            "parameters": told["parameters"][1], "pruned": trial.bits(trial.folder / f"{arm}_pruned"),
            "recovered": trial.bits(recovered),
        }  # fmt: skip
    return found


def teacher_of(folder: Path, seed: int) -> Path:
    """The run of a seed's teacher."""
    return folder / f"seed{seed}" / "teacher"


MODEL: Any = load([MINITRON / "model.gin"])[0].model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teachers", type=Path, help="the folder of experiments/minitron's runs; None: trains its own")
    parser.add_argument("--out", type=Path, default=Path("runs/minipuzzle"), help="a new folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(minitron.SEEDS))
    options = parser.parse_args()
    for seed in options.seeds:
        began = time.monotonic()
        trial = minitron.Trial(options.out, seed, minitron.WHOLE)
        found = results(trial, trial.teacher() if options.teachers is None else teacher_of(options.teachers, seed))
        line = json.dumps(found | {"seconds": round(time.monotonic() - began)})
        print(line, flush=True)
        minitron.replace_seed(line, HERE / "results.jsonl")


if __name__ == "__main__":
    main()
