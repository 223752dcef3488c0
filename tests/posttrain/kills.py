"""Runs of reinforcement learning that SIGKILL ends at random moments, several times each, until they are done.

`python -m tests.posttrain.kills --count 6 --seed 1 --out kills.jsonl` makes that many trials of runs whose rollouts are
written in turn with updates: their records, tables and weights must be those of a run that nobody ends, to the bit. It
makes as many of runs that write ahead, which must ask each task as often, each step once. `make test` has one of
each kind that is only played, in test_rl.py and test_ahead.py.
"""

import argparse
import functools
import hashlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.posttrain.test_rl import CLOCKS, RECIPE
from tests.train import kills

MOST = 4  # kills of one run
MOMENTS = {
    "writing": ("orogen.posttrain.rollout", "Rollouts.write", 6, 1.0),
    "judging": ("orogen.posttrain.groups", "Groups._judge", 12, 0.05),
    "scoring": ("orogen.posttrain.likelihood", "Likelihoods.of", 4, 0.2),
    "showing": ("orogen.posttrain.source", "RolloutSource._write_table", 4, 0.01),
    "evaluating": ("orogen.posttrain.heldout_tasks", "HeldoutTasks.sample", 2, 0.3),
    "saving": ("orogen.checkpoint.steps", "Checkpoints.save", 4, 0.2),
    "any time": ("orogen.train.run", "_train", 1, 15.0),
}
TURNS = {
    "in turn": "RLConfig.updates = 2\nTrainConfig.steps = 6\n",
    "ahead": "RLConfig.updates = 1\nTrainConfig.steps = 5\nRLConfig.staleness = 1\n",
}


def recipe_of(folder: Path, turns: str) -> Path:
    """The gin file of a run."""
    lines = [line for line in RECIPE.splitlines() if not line.startswith(("RLConfig.updates", "TrainConfig.steps"))]
    file = folder / f"{turns.replace(' ', '_')}.gin"
    file.write_text("\n".join(lines) + "\n" + TURNS[turns])
    return file


def facts_of(run_dir: Path, turns: str) -> dict[str, Any]:
    """What must be equal."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    tables = {file.name: file.read_bytes() for file in sorted((run_dir / "rollouts").iterdir())}
    if turns == "ahead":
        rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in tables.items()}
        asked = {name: [(row["environment"], row["number"]) for row in some] for name, some in rows.items()}
        old = [line["staleness_max"] for line in lines]
        return {"asked": asked, "steps": [line["step"] for line in lines], "bounded": max(old) <= 1}
    clocks = {*CLOCKS, "start_seconds"}
    curve = [{name: value for name, value in line.items() if name not in clocks} for line in lines]
    return {"curve": curve, "tables": tables, "weights": digest(run_dir)}


def digest(run_dir: Path) -> str:
    """Of the last weights."""
    import jax
    import numpy as np

    from orogen.checkpoint.open import open_model

    opened = open_model(run_dir)
    found = hashlib.sha256()
    for leaf in jax.tree.leaves((opened.params, opened.buffers)):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def trial(rng: random.Random, number: int, recipe: Path, turns: str, folder: Path, expected: Any) -> dict[str, Any]:
    """One run, ended up to MOST times; `wrong` says what was not as it should be."""
    run_dir, ended, statuses = folder / f"{turns}{number}", [], []
    while True:
        moment = rng.choice(list(MOMENTS))
        _, _, calls, longest = MOMENTS[moment]
        at = moment, "SIGKILL", rng.randint(1, calls), rng.uniform(0, longest)
        killed = functools.partial(kills.interrupt, *at) if len(ended) < MOST else lambda: None
        status, said = kills.run(recipe, run_dir, killed, command="rl")
        statuses.append(status)
        if status != -9:
            break
        ended.append(f"{moment} {at[2]} {at[3]:.2f}")
    wrong = [] if status == 0 else [said]
    if not wrong:
        found = apart(facts_of, run_dir, turns)
        wrong = [name for name in expected if found[name] != expected[name]]
    return {"turns": turns, "number": number, "kills": ended, "statuses": statuses, "wrong": wrong}


def apart(function: Any, *arguments: Any) -> Any:
    """The function's result in a process of its own: one that has computed by jax cannot be forked."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> int:
    """Writes a JSON line for each trial. Exit status 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--turns", default=",".join(TURNS))
    options = parser.parse_args()
    kills.prepare()
    kills.MOMENTS.update(MOMENTS)
    wrong = ended = 0
    with tempfile.TemporaryDirectory() as scratch, options.out.open("a") as out:
        folder = Path(scratch)
        for turns in options.turns.split(","):
            recipe = recipe_of(folder, turns)
            status, said = kills.run(recipe, folder / turns, command="rl")
            if status:
                raise SystemExit(f"the run that nobody ends has status {status}: {said}")
            expected = apart(facts_of, folder / turns, turns)
            for number in range(options.count):
                start = time.monotonic()
                facts = trial(random.Random(options.seed * 100_003 + number), number, recipe, turns, folder, expected)
                wrong, ended = wrong + bool(facts["wrong"]), ended + len(facts["kills"])
                print(json.dumps(facts | {"took": round(time.monotonic() - start, 1)}), file=out, flush=True)
    print(f"{wrong} of the runs went wrong; {ended} kills")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
