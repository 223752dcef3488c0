"""`orogen search` in one go: the best candidates pruned, distilled a little and ranked, and the first distilled on.

PYTHONPATH=src python experiments/minipuzzle/search.py --teachers runs/minitron --out runs/minipuzzle   # after run.py

If run.py has trained its own teachers, they are in the folder of --out.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from run import HERE, LEAST, MODEL, SHARE, minitron, teacher_of

from orogen.model.count import count

BEST, LIGHT, LONG = 3, 40, 160  # candidates; steps of each, and of the winner


def training(folder: Path, name: str, corpus: Path, seed: int, steps: int) -> list[Path]:
    """The gin files of a distillation."""
    lines = {"DataConfig.corpus": str(corpus), "TrainConfig.seed": seed, "TrainConfig.steps": steps,
             "OptimizerConfig.warmup_steps": steps // 20}  # fmt: skip
    file = folder / f"{name}.gin"
    file.write_text("".join(f"{name} = {value!r}\n" for name, value in lines.items()))
    return [HERE / "search.gin", file]


def searched(folder: Path, teacher: Path, seed: int) -> dict[str, Any]:
    """What the search finds in a folder of `run.py`, with held-out bits per byte of the winner."""
    trial = minitron.Trial(folder.parent, seed, minitron.WHOLE)
    scored, most = folder / "scored", int(SHARE * count(MODEL)["total"])
    layers = tuple(f"{letter}:{least}-{MODEL.pattern.count(letter)}" for letter, least in LEAST.items())
    binds = minitron.bound(SearchConfig__scores=str(scored / "removal.jsonl"), SearchConfig__best=BEST,
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
    for option, name, steps in (("--training", "light", LIGHT), ("--winner", "long", LONG)):
        for file in training(folder, name, trial.train, seed, steps):
            words += [option, file]
    run = folder / "search"
    told = minitron.orogen(*words, "--run", run, "--out", folder / "best.gin")
    place = told["retrained"][0]["place"]
    bits = {f"candidate_{n}": trial.bits(run / f"candidate_{n}" / "pruned") for n in range(1, BEST + 1)}
    return {"seed": seed, "most": most, "retrained": told["retrained"], "best": place, "pruned_bits": bits,
            "winner_bits": trial.bits(run / "winner")}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teachers", type=Path, required=True, help="the folder of experiments/minitron's runs")
    parser.add_argument("--out", type=Path, required=True, help="the folder of run.py's runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(minitron.SEEDS))
    options = parser.parse_args()
    for seed in options.seeds:
        began = time.monotonic()
        found = searched(options.out / f"seed{seed}", teacher_of(options.teachers, seed), seed)
        line = json.dumps(found | {"seconds": round(time.monotonic() - began)})
        print(line, flush=True)
        minitron.replace_seed(line, HERE / "search.jsonl")


if __name__ == "__main__":
    main()
