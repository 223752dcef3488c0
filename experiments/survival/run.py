"""Runs that are killed at random moments, and runs whose disk is full: what they lose, and with which bits they end.

`PYTHONPATH=src:. python experiments/survival/run.py --out results.jsonl` writes one line per trial.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.survival import launched
from tests.train import kills

from orogen.report import page

KILLS = ("SIGKILL", "SIGTERM")
MOMENTS = ("compiling", "stepping", "evaluating", "saving", "hashing")


Facts = dict[str, Any]


def kill_trials(count: int, seed: int, recipe: Path, folder: Path, expected: Facts) -> Iterator[Facts]:
    """Each moment by each signal in turn; the call and the delay are random."""
    for number in range(count):
        moment, name = MOMENTS[number % len(MOMENTS)], KILLS[number // len(MOMENTS) % len(KILLS)]
        rng = random.Random(seed * 100_003 + number)
        yield {"kind": "kill"} | kills.trial(rng, number, recipe, folder, expected, name=name, moment=moment)


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of its own. Needs the right to mount."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def kib(folder: Path) -> int:
    """What the files of a folder take on a disk with pages of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*") if path.is_file())


def disk_trial(room: float, recipe: Path, folder: Path, whole: Path, expected: Facts) -> Facts:
    """A run on a disk that has room for so many checkpoints and all else; then there is room again."""
    one = kib(whole / "checkpoints" / "12")
    rest = kib(whole) - kib(whole / "checkpoints")
    with small_disk(folder, 64 * 1024) as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(1024 * (64 * 1024 - rest - int(room * one))))
        status, said = kills.run(recipe, disk / "run", log=folder.with_suffix(".log"))
        kept = sorted(int(path.name) for path in (disk / "run" / "checkpoints").iterdir() if path.name.isdecimal())
        facts = {"kind": "full disk", "room": room, "status": status, "checkpoints": kept}
        facts["said"] = [line for line in said.splitlines() if "could not be" in line or "cannot be" in line]
        wrong = [said] if "Traceback" in said else []
        filler.unlink()
        again, said = kills.run(recipe, disk / "run", log=folder.with_suffix(".log"))
        if again or kills.facts_of(disk / "run") != expected:
            wrong.append(f"status {again}, or other bits: {said[-300:]}")
        return facts | kills.going_on(disk / "run") | {"wrong": wrong}


def read_only_trial(recipe: Path, folder: Path, whole: Path) -> Facts:
    """A finished run on a disk that is read-only now: one line, and every byte as it was."""
    with small_disk(folder, 64 * 1024) as disk:
        subprocess.run(["cp", "-r", whole, disk / "run"], check=True)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        before = {path: path.stat().st_mtime_ns for path in disk.rglob("*")}
        status, said = kills.run(recipe, disk / "run", log=folder.parent / "read_only.log")
        same = before == {path: path.stat().st_mtime_ns for path in disk.rglob("*")}
    wrong = [] if same and len(said.splitlines()) == 1 else [said]
    return {"kind": "read-only disk", "status": status, "said": said.splitlines(), "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=("one", "two"), default="one", help="processes of a run")
    parser.add_argument("--count", type=int, default=20, help="kills; 0 tries only the disks, or missing processes")
    parser.add_argument("--first", type=int, default=0, help="number of the first kill of one of two processes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, options.out.open("a") as out:
        recipe = kills.write_recipe(Path(scratch), kills.MLP)
        wrong = 0
        for facts in (of_one if options.what == "one" else of_two)(options, recipe, Path(scratch)):
            wrong += bool(facts["wrong"])
            print(json.dumps(facts), file=out, flush=True)
    print(f"{wrong} trials are wrong")
    return int(wrong > 0)


def of_two(options: argparse.Namespace, recipe: Path, folder: Path) -> Iterator[Facts]:
    """The trials of two processes."""
    if options.count:
        yield from launched.trials(options.count, options.first, options.seed, recipe, folder)
    else:
        yield from launched.nobody_there(recipe, folder)


def of_one(options: argparse.Namespace, recipe: Path, folder: Path) -> Iterator[Facts]:
    """The trials of one process."""
    kills.prepare()
    # Drawing takes a third of a run's time here, and no part in what is asked.
    page.pictures = lambda *_: []  # pyright: ignore[reportPrivateImportUsage]
    status, said = kills.run(recipe, folder / "whole")
    if status:
        raise SystemExit(f"the run that nobody interrupts ended with status {status}: {said}")
    expected = kills.facts_of(folder / "whole")
    for room in (0.5, 1.5):
        yield disk_trial(room, recipe, folder / f"disk{room}", folder / "whole", expected)
    yield read_only_trial(recipe, folder / "read_only", folder / "whole")
    yield from kill_trials(options.count, options.seed, recipe, folder, expected)


if __name__ == "__main__":
    sys.exit(main())
