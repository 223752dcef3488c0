"""A trained hybrid made elastic with three budgets, beside models of the same sizes that are pruned and distilled apart
on as many tokens each, and beside slices of the sorted model without training.

PYTHONPATH=src:. python experiments/elastic/run.py --out runs/elastic            # three seeds
PYTHONPATH=src:. python experiments/elastic/run.py --out runs/elastic --quick    # one, short: do the commands work?
PYTHONPATH=src:. python experiments/elastic/run.py --draw                        # figure.png from results.jsonl
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from experiments.minitron.run import bound, copy_corpus, orogen, replace_seed

from orogen.report.metrics import read_metrics

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
RATE, RECOVERY_RATE = 5e-3, 2e-3
BUDGETS = ("0.6", "0.8")
ARMS = ("elastic", "apart", "sliced")
SCORE = "whole_heldout_bits_per_byte"  # of a run's own split


class Size(NamedTuple):
    """Steps of the teacher and of the elastic model, bytes of held-out text, and rows that units are scored on."""

    teacher: int
    elastic: int
    heldout: int
    rows: int


WHOLE, QUICK = Size(600, 600, 30_000, 64), Size(12, 6, 6_000, 8)


class Trial:
    """One seed's runs in a folder."""

    def __init__(self, folder: Path, seed: int, size: Size):
        self.folder, self.seed, self.size = folder / f"seed{seed}", seed, size
        self.train, self.heldout = copy_corpus(self.folder, size.heldout)

    def bits(self, checkpoint: Path) -> float:
        """Bits per byte of the held-out files."""
        asked = "evaluate", "--checkpoint", checkpoint, "--text", self.heldout, "--max_length", 256
        (metrics,) = orogen(*asked)["results"].values()
        return metrics["bits_per_byte"]

    def run(self, task: str, name: str, steps: int, rate: float, *words: object) -> Path:
        """A training run of the task."""
        binds = bound(
            TrainConfig__steps=steps, TrainConfig__seed=self.seed, DataConfig__corpus=str(self.train),
            OptimizerConfig__learning_rate=rate, OptimizerConfig__warmup_steps=max(1, steps // 20),
        )  # fmt: skip
        orogen(task, "--gin_file", HERE / "train.gin", "--run", self.folder / name, *binds, *words)
        return self.folder / name

    def cut(self, model: Path, settings: Path, name: str) -> tuple[Path, dict[str, Any]]:
        """The submodel of a gin file, and what the command says of it."""
        asked = "prune", "--checkpoint", model, "--gin_file", settings, "--out", self.folder / name
        return self.folder / name, orogen(*asked)

    def results(self) -> dict[str, Any]:
        """Bits per byte of every arm and budget."""
        steps = self.size.elastic
        teacher = self.run("train", "teacher", self.size.teacher, RATE, "--gin_file", HERE / "model.gin")
        sort = bound(DataConfig__corpus=str(self.train), PruneConfig__rows=self.size.rows)
        orogen(
            "prune", "--checkpoint", teacher, "--gin_file", HERE / "sort.gin", "--out", self.folder / "sorted", *sort
        )
        start = self.folder / "sorted"
        learned = "--checkpoint", teacher, *bound(DistillConfig__divergence=1.0)
        elastic = self.run("distill", "elastic", steps, RECOVERY_RATE, *learned, "--student", start,
                           "--gin_file", HERE / "elastic.gin")  # fmt: skip
        found: dict[str, Any] = {"seed": self.seed, "steps": [self.size.teacher, steps]}
        found |= {"teacher": self.bits(teacher), "sorted": self.bits(start), "whole": self.bits(elastic)}
        for budget in BUDGETS:
            file = elastic / f"budget_{budget}.gin"
            inside, told = self.cut(elastic, file, f"elastic_{budget}")
            cut, _ = self.cut(start, file, f"sliced_{budget}")
            words = *learned, "--student", cut
            apart = self.run("distill", f"apart_{budget}", steps // 3, RECOVERY_RATE, *words)
            found[budget] = {"parameters": told["parameters"], "sizes": {k: v[1] for k, v in told["sizes"].items()}}
            found[budget] |= {"elastic": self.bits(inside), "apart": self.bits(apart), "sliced": self.bits(cut)}
            of_run, of_apart = (read_metrics(run)[-1] for run in (elastic, apart))
            split = of_run[f"{SCORE}_at_{budget}"], of_apart[SCORE]
            found[budget]["own_split"] = dict(zip(("elastic", "apart"), split, strict=True))
        return found


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """One dot per seed, arm and budget; the line is the teacher."""
    from orogen.report.pictures import LIGHT, plain_figure, png

    figure, axes = plain_figure(LIGHT, height=3.2)
    for record in records:
        for budget in BUDGETS:
            axes.plot(
                [record[budget][arm] for arm in ARMS], [f"{arm}, {budget}" for arm in ARMS], "o", color=LIGHT.strong
            )
        axes.plot([record["whole"]], ["elastic, 1.0"], "o", color=LIGHT.strong)
        axes.axvline(record["teacher"], color=LIGHT.accent, linewidth=1)
    axes.set_xlabel("held-out bits per byte; line: the model before")
    file.write_bytes(png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/elastic"), help="a new folder")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps; nothing is recorded")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="which seeds run")
    parser.add_argument("--draw", action="store_true", help="only draws results.jsonl")
    options = parser.parse_args()
    recorded = HERE / "results.jsonl"
    if not options.draw:
        seeds, size = ((0,), QUICK) if options.quick else (options.seeds, WHOLE)
        for seed in seeds:
            began = time.monotonic()
            found = Trial(options.out, seed, size).results()
            line = json.dumps(found | {"seconds": round(time.monotonic() - began)})
            print(line, flush=True)
            if not options.quick:
                replace_seed(line, recorded)
    if not options.quick:
        draw([json.loads(line) for line in recorded.read_text().splitlines()], HERE / "figure.png")


if __name__ == "__main__":
    main()
