"""`orogen search` in one go: the best candidates pruned, distilled a little and ranked, and the first distilled on.

PYTHONPATH=src python experiments/minipuzzle/search.py --teachers runs/minitron --out runs/minipuzzle   # after run.py

If run.py has trained its own teachers, they are in the folder of --out.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import run
from run import HERE, LEAST, MODEL, SHARE, minitron, teacher_of

from orogen.model.count import count


class Size(NamedTuple):
    """Candidates; steps of each, and of the winner."""

    best: int
    light: int
    long: int


WHOLE, QUICK = Size(3, 40, 160), Size(2, 20, 0)
QUICK_TEACHER, QUICK_ROWS = 200, 8


def training(folder: Path, name: str, corpus: Path, seed: int, steps: int) -> list[Path]:
    """The gin files of a distillation."""
    lines = {"DataConfig.corpus": str(corpus), "TrainConfig.seed": seed, "TrainConfig.steps": steps,
             "OptimizerConfig.warmup_steps": steps // 20}  # fmt: skip
    file = folder / f"{name}.gin"
    file.write_text("".join(f"{name} = {value!r}\n" for name, value in lines.items()))
    return [HERE / "search.gin", file]


def searched(trial: Any, teacher: Path, size: Size) -> dict[str, Any]:
    """What the search finds in a folder of `run.py`, with held-out bits per byte of what it makes."""
    folder = trial.folder
    scored, most = folder / "scored", int(SHARE * count(MODEL)["total"])
    layers = tuple(f"{letter}:{least}-{MODEL.pattern.count(letter)}" for letter, least in LEAST.items())
    binds = minitron.bound(SearchConfig__scores=str(scored / "removal.jsonl"), SearchConfig__best=size.best,
                           SearchConfig__most_parameters=float(most), SearchConfig__layers=layers)  # fmt: skip
    words: list[object] = [
        "search",
        "--gin_file",
        minitron.HERE / "model.gin",
        *binds,
        "--checkpoint",
        teacher,
        "--scores",
        scored,
    ]
    for option, name, steps in (("--training", "light", size.light), ("--winner", "long", size.long)):
        for file in training(folder, name, trial.train, trial.seed, steps) if steps else ():
            words += [option, file]
    made = folder / "search"
    told = minitron.orogen(*words, "--run", made, "--out", folder / "best.gin")
    names = [f"candidate_{number}/{state}" for number in range(1, size.best + 1) for state in ("pruned", "distilled")]
    names += ["winner"] if size.long else []
    bits = {"teacher": trial.bits(teacher), **{name: trial.bits(made / name) for name in names}}
    return {"seed": trial.seed, "most": most, "retrained": told["retrained"], "bits": bits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teachers", type=Path, help="the folder of experiments/minitron's runs")
    parser.add_argument("--out", type=Path, required=True, help="the folder of run.py's runs")
    parser.add_argument("--quick", action="store_true", help="trains and scores its own, short; nothing is recorded")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(minitron.SEEDS))
    options = parser.parse_args()
    for seed in options.seeds:
        began = time.monotonic()
        if options.quick:
            trial = minitron.Trial(options.out, seed, minitron.WHOLE._replace(teacher=QUICK_TEACHER))
            teacher, size = trial.teacher(), QUICK
            choice = {"num_layers": len(MODEL.pattern) - 1, "scored_sizes": run.SIZES, "rows": QUICK_ROWS}
            run.pruned(trial, teacher, "scored", choice | {"depth_rows": QUICK_ROWS})
        else:
            trial = minitron.Trial(options.out, seed, minitron.WHOLE)
            teacher, size = teacher_of(options.teachers, seed), WHOLE
        line = json.dumps(searched(trial, teacher, size) | {"seconds": round(time.monotonic() - began)})
        print(line, flush=True)
        if not options.quick:
            minitron.replace_seed(line, HERE / "search.jsonl")


if __name__ == "__main__":
    main()
