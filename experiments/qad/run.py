"""A trained hybrid in NVFP4: as it is, trained further on text, and trained to predict what it predicted before.

PYTHONPATH=src:. python experiments/qad/run.py --out runs/qad            # three seeds
PYTHONPATH=src:. python experiments/qad/run.py --out runs/qad --quick    # one, short: do the commands work?
PYTHONPATH=src:. python experiments/qad/run.py --draw                    # figure.png and the table of results.jsonl
"""

import argparse
import importlib.util
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orogen.report.metrics import read_metrics

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("minitron", HERE.parent / "minitron" / "run.py")
assert _spec is not None and _spec.loader is not None
minitron: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(minitron)
bound = minitron.bound

SEEDS = (1, 2, 3)
TEACHER_RATE, RATES = 4e-3, (1e-3, 1e-4)
# The student's weights of the divergence from the teacher and of the cross-entropy with the text.
LEARNED = {"qat": (0.0, 1.0), "qad": (1.0, 0.0)}
UNTRAINED = 1e-12  # a rate that moves no weight: one step of it measures rounding alone
WHOLE, QUICK = (1000, 300), (10, 4)  # steps of the teacher and of a student


class Trial:
    """One seed's runs in a folder. steps: the teacher's and a student's; rates: the students' learning rates."""

    def __init__(self, folder: Path, seed: int, steps: tuple[int, int], rates: Sequence[float]):
        self.folder, self.seed, self.steps, self.rates = folder / f"seed{seed}", seed, steps, rates

    def results(self) -> Iterator[dict[str, Any]]:
        """Held-out loss and divergence of the teacher and of its rounding, and of each way to learn at each rate as it
        is measured."""
        teacher = self.run("train", "teacher", self.steps[0], TEACHER_RATE)
        found: dict[str, Any] = {"seed": self.seed, "steps": list(self.steps), "teacher": last(teacher)}
        self.teacher = teacher
        found["ptq"] = self.student("ptq", 1, UNTRAINED, LEARNED["qad"])
        for rate, (name, weights) in itertools.product(self.rates, LEARNED.items()):
            found[f"{name} {rate:g}"] = self.student(f"{name}_{rate:g}", self.steps[1], rate, weights)
            yield found

    def student(self, name: str, steps: int, rate: float, weights: tuple[float, float]) -> dict[str, float]:
        """The teacher in NVFP4 after so many steps."""
        words = "--checkpoint", self.teacher, "--student", self.teacher, "--gin_file", HERE / "quantised.gin"
        learned = bound(DistillConfig__divergence=weights[0], DistillConfig__cross_entropy=weights[1])
        return last(self.run("distill", name, steps, rate, *words, *learned))

    def run(self, task: str, name: str, steps: int, rate: float, *words: object) -> Path:
        """A training run of the task."""
        binds = bound(
            TrainConfig__steps=steps, TrainConfig__seed=self.seed, TrainConfig__evaluate_every=steps,
            OptimizerConfig__learning_rate=rate, OptimizerConfig__warmup_steps=steps // 20,
        )  # fmt: skip
        files = [word for file in ("model.gin", "train.gin") for word in ("--gin_file", HERE / file)]
        minitron.orogen(task, *files, "--run", self.folder / name, *binds, *words)
        return self.folder / name


def last(run: Path) -> dict[str, float]:
    """The scores of a run's whole held-out split at its end."""
    final = read_metrics(run)[-1]
    names = {"loss": "whole_heldout_loss", "divergence": "whole_heldout_divergence"}
    return {short: final[name] for short, name in names.items() if name in final}


def show(records: list[dict[str, Any]], file: Path) -> None:
    """Prints mean and spread by arm, and draws one dot per seed and arm, divergence against loss above the teacher."""
    from orogen.report.pictures import LIGHT, plain_figure, png

    figure, axes = plain_figure(LIGHT, height=3.6)
    arms = [name for name in records[0] if isinstance(records[0][name], dict) and name != "teacher"]
    for number, arm in enumerate(arms):
        loss, divergence = (np.array([r[arm][name] for r in records]) for name in ("loss", "divergence"))
        above = loss - np.array([r["teacher"]["loss"] for r in records])
        spread = [f"{x.mean():.4f} ± {x.std(ddof=1):.4f}" if len(x) > 1 else f"{x[0]:.4f}" for x in (divergence, above)]
        print(f"| {arm} | {' | '.join(spread)} |")
        axes.semilogy(above, divergence, "o", color=f"C{number}", label=arm)
    axes.set_xlabel("held-out loss above the teacher's, nats")
    axes.set_ylabel("divergence from the teacher, nats")
    axes.legend(frameon=False)
    file.write_bytes(png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/qad"), help="a new folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--quick", action="store_true", help="one seed and few steps; nothing is recorded")
    parser.add_argument("--record", type=Path, default=HERE / "results.jsonl", help="the file of results")
    parser.add_argument("--draw", action="store_true", help="only draws results.jsonl")
    options = parser.parse_args()
    if not options.draw:
        for seed in options.seeds[:1] if options.quick else options.seeds:
            began = time.monotonic()
            for found in Trial(options.out, seed, QUICK if options.quick else WHOLE, options.rates).results():
                line = json.dumps(found | {"seconds": round(time.monotonic() - began)})
                print(line, flush=True)
                if not options.quick:
                    minitron.replace_seed(line, options.record)
    if not options.quick:
        show([json.loads(line) for line in options.record.read_text().splitlines()], HERE / "figure.png")


if __name__ == "__main__":
    main()
