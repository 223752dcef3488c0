"""A trained hybrid pruned to about three quarters of its parameters by width, by depth and at random, then distilled,
beside a model of the pruned sizes that is trained from scratch on as many tokens.

PYTHONPATH=src python experiments/minitron/run.py --out runs/minitron            # three seeds
PYTHONPATH=src python experiments/minitron/run.py --out runs/minitron --quick    # one, short: do the commands work?
PYTHONPATH=src python experiments/minitron/run.py --draw                         # figure.png from results.jsonl
"""

import argparse
import contextlib
import io
import json
import shutil
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orogen import cli

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
RATE, RECOVERY_RATE = 5e-3, 2e-3
# New sizes of the arms: 213,824 parameters of 290,208 by width, 210,568 by depth.
WIDTH = {"hidden_size": 56, "intermediate_size": 160, "mamba_num_heads": 6}
DEPTH = {"layers": {"M": 3, "-": 3}}
PRUNED = {
    "width": WIDTH, "depth": DEPTH, "random": WIDTH | {"width_scores": "random"},
    "contributions": WIDTH | {"width_scores": "contributions"},
}  # fmt: skip
ARMS = (*PRUNED, "scratch")
TRAIN_BYTES, HELDOUT_EVERY = 1_200_000, 25


class Size(NamedTuple):
    """Steps of the teacher and of a recovery, bytes of held-out text, and rows that units and layers are scored on."""

    teacher: int
    recovery: int
    heldout: int
    rows: int
    depth_rows: int


WHOLE, QUICK = Size(800, 160, 40_000, 128, 32), Size(40, 8, 12_000, 32, 8)


def orogen(*words: object) -> dict[str, Any]:
    """What a task answers with --json. Raises SystemExit if it fails."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = cli.main([*map(str, words), "--json"])
    if status:
        raise SystemExit(status)
    return json.loads(out.getvalue())


def bound(**values: Any) -> list[str]:
    """Bindings as arguments: Class__field = value."""
    pairs = ((name.replace("__", "."), value) for name, value in values.items())
    return [word for name, value in pairs for word in ("--gin_bindings", f"{name} = {value!r}")]


def copy_corpus(folder: Path, heldout: int) -> tuple[Path, Path]:
    """The standard library's files, in two folders: to train on, and held out."""
    found = {"train": 0, "heldout": 0}
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) + sorted(
        Path(sysconfig.get_path("stdlib")).glob("[a-h]*/*.py")
    )
    for number, file in enumerate(files):
        name = "train" if number % HELDOUT_EVERY else "heldout"
        size = file.stat().st_size
        if found[name] + size > (TRAIN_BYTES if number % HELDOUT_EVERY else heldout):
            continue
        found[name] += size
        (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / name / f"{number}.txt")
    return folder / "train", folder / "heldout"


class Trial:
    """One seed's runs in a folder."""

    def __init__(self, folder: Path, seed: int, size: Size, text: Path | None = None):
        """text: the folder of an earlier trial's texts; None: they are copied from the standard library."""
        self.folder, self.seed, self.size = folder / f"seed{seed}", seed, size
        copied = None if text is None else (text / "train", text / "heldout")
        self.train, self.heldout = copied or copy_corpus(self.folder, size.heldout)

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

    def results(self, arms: Sequence[str] = ARMS) -> Iterator[dict[str, Any]]:
        """Bits per byte of the arms, one after another: after pruning, and after recovery on equal tokens."""
        yield {"seed": self.seed, "steps": [self.size.teacher, self.size.recovery]}
        if "scratch" in arms:
            yield {"scratch": self.scratch()}
        pruned = [arm for arm in PRUNED if arm in arms]
        if not pruned:
            return
        teacher = self.teacher()
        yield {"teacher": self.bits(teacher)}
        for arm in pruned:
            yield {arm: self.pruned(arm, teacher)}

    def teacher(self) -> Path:
        """The run of the model that is pruned."""
        return self.run("train", "teacher", self.size.teacher, RATE, "--gin_file", HERE / "model.gin")

    def scratch(self) -> dict[str, float]:
        """The model of the pruned sizes, trained from scratch."""
        sizes = bound(**{f"ModelConfig__{field}": value for field, value in WIDTH.items()})
        run = self.run("train", "scratch", self.size.recovery, RATE, "--gin_file", HERE / "model.gin", *sizes)
        return {"recovered": self.bits(run)}

    def pruned(self, arm: str, teacher: Path) -> dict[str, Any]:
        """The teacher pruned as the arm says, and distilled from it; of width, also trained without a teacher."""
        student = self.folder / f"{arm}_pruned"
        binds = bound(**{f"PruneConfig__{field}": value for field, value in PRUNED[arm].items()},
                      PruneConfig__rows=self.size.rows, PruneConfig__depth_rows=self.size.depth_rows,
                      PruneConfig__seed=self.seed, DataConfig__corpus=str(self.train))  # fmt: skip
        told = orogen("prune", "--checkpoint", teacher, "--gin_file", HERE / "prune.gin", "--out", student, *binds)
        words = "--checkpoint", teacher, "--student", student, *bound(DistillConfig__divergence=1.0)
        recovered = self.run("distill", arm, self.size.recovery, RECOVERY_RATE, *words)
        found = {"parameters": told["parameters"][1], "pruned": self.bits(student), "recovered": self.bits(recovered)}
        if arm == "width":  # the same start and tokens without a teacher
            words = "--checkpoint", student
            found["trained"] = self.bits(self.run("train", "width_trained", self.size.recovery, RECOVERY_RATE, *words))
        return found


def replace_seed(line: str, file: Path) -> None:
    """Adds a seed's results to the file, in place of its earlier ones."""
    lines = file.read_text().splitlines() if file.exists() else []
    others = [one for one in lines if json.loads(one)["seed"] != json.loads(line)["seed"]]
    file.write_text("".join(one + "\n" for one in [*others, line]))


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """One dot per seed and arm, after recovery; the line is the teacher."""
    from orogen.report.pictures import LIGHT, plain_figure, png

    figure, axes = plain_figure(LIGHT, height=3.2)
    for record in records:
        values = [record[arm]["recovered"] for arm in ARMS] + [record["width"]["trained"]]
        axes.plot(values, [*ARMS, "width, trained"], "o", color=LIGHT.strong)
        axes.axvline(record["teacher"], color=LIGHT.accent, linewidth=1)
    axes.set_xlabel("held-out bits per byte; line: the model before it was pruned")
    file.write_bytes(png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/minitron"), help="a new folder")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps; nothing is recorded")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="which seeds run")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="some alone are only printed")
    parser.add_argument("--text", type=Path, help="the folder of an earlier trial, whose texts are used")
    parser.add_argument("--draw", action="store_true", help="only draws results.jsonl")
    options = parser.parse_args()
    recorded = HERE / "results.jsonl"
    if not options.draw:
        seeds, size = ((0,), QUICK) if options.quick else (options.seeds, WHOLE)
        for seed in seeds:
            began, found = time.monotonic(), {}
            for part in Trial(options.out, seed, size, options.text).results(options.arms):
                found |= part
                line = json.dumps(found | {"seconds": round(time.monotonic() - began)})
                print(line, flush=True)
            if not options.quick and set(options.arms) == set(ARMS):
                replace_seed(line, recorded)
    if not options.quick:
        draw([json.loads(line) for line in recorded.read_text().splitlines()], HERE / "figure.png")


if __name__ == "__main__":
    main()
