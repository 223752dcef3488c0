"""Runs that a signal ends at a random moment, each compared with an uninterrupted run.

`python -m tests.train.kills --count 40 --seed 1 --out kills.jsonl` makes that many trials and reports what it saw. Each
trial takes two runs, so `make test` has only one kill and one SIGTERM, in test_run.py. Every run is a fork of one
process that has imported everything.
"""

import argparse
import functools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SIGNALS = {"SIGTERM": 0, "SIGHUP": 0, "SIGINT": 130, "SIGKILL": -9}  # and the exit status after each
# Where a signal falls: a function, the last call of it that may be chosen, and the longest delay after that call began.
MOMENTS: dict[str, tuple[str, str, int, float]] = {
    "loading": ("orogen.train.pretraining", "open_corpus", 1, 0.2),
    "compiling": ("orogen.train.loop", "batch_to_devices", 1, 1.0),
    "stepping": ("orogen.train.loop", "batch_to_devices", 11, 0.02),
    "evaluating": ("orogen.train.heldout", "Heldout.sample", 3, 0.2),
    "evaluating last": ("orogen.train.heldout", "Heldout.full", 1, 0.2),
    "saving": ("orogen.checkpoint.steps", "Checkpoints.save", 3, 0.2),
    "hashing": ("orogen.checkpoint.checksums", "write", 3, 0.01),
    "sampling": ("orogen.evaluate.summary", "sample_text", 1, 0.2),
    "reporting": ("orogen.evaluate.summary", "write_report", 1, 0.2),
    "any time": ("orogen.train.run", "_train", 1, 8.0),
}
TIMED = ("step_ms", "tokens_per_second", "compile_seconds", "evaluate_seconds", "save_seconds", "start_seconds",
         "host_ms", "device_ms", "slow_processes")  # fmt: skip
# The model of the trials, and one that compiles in the shortest time.
HYBRID = """
ModelConfig.pattern = 'ME'
ModelConfig.mamba_num_heads = 2
ModelConfig.mamba_head_dim = 4
ModelConfig.n_groups = 1
ModelConfig.ssm_state_size = 3
ModelConfig.chunk_size = 8
ModelConfig.n_routed_experts = 4
ModelConfig.num_experts_per_tok = 2
ModelConfig.moe_intermediate_size = 10
"""
MLP = """
ModelConfig.pattern = '-'
ModelConfig.intermediate_size = 10
"""
RECIPE = """
ModelConfig.vocab_size = 259
ModelConfig.hidden_size = 12
DataConfig.corpus = {corpus!r}
DataConfig.tokenizer = 'byte'
DataConfig.heldout_fraction = 0.2
DataConfig.tuning_fraction = 0.0
TrainConfig.steps = 12
TrainConfig.batch_size = 2
TrainConfig.sequence_length = 24
TrainConfig.seed = 1
TrainConfig.evaluate_every = 5
TrainConfig.evaluate_rows = 4
TrainConfig.checkpoint_every = 4
TrainConfig.sample_prompts = ('a',)
TrainConfig.sample_tokens = 3
TrainConfig.ngram_order = 0
OptimizerConfig.learning_rate = 3e-3
OptimizerConfig.schedule = 'constant'
"""


def write_recipe(folder: Path, model: str = HYBRID) -> Path:
    """A gin file that trains a tiny model on a few documents."""
    corpus = folder / "text"
    corpus.mkdir(parents=True)
    for number in range(30):
        line = f"document {number}: " + " ".join(str(number * k % 97) for k in range(1, 40))
        (corpus / f"{number:02}.txt").write_text(line)
    file = folder / "tiny.gin"
    file.write_text(model + RECIPE.format(corpus=str(corpus)))
    return file


def run(
    recipe: Path,
    run_dir: Path,
    prepare: Callable[[], None] = lambda: None,
    *,
    log: Path | None = None,
    task: str = "train",
    options: Sequence[str] = (),
) -> tuple[int, str]:
    """The exit status of `orogen TASK --resume` in a process of its own, and its output, which goes to the file
    `log`; None: a file beside the run folder."""
    said = run_dir.with_suffix(".log") if log is None else log
    child = os.fork()
    if not child:
        status = 70
        try:
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            from orogen.cli import main

            prepare()
            status = main([task, "--gin_file", str(recipe), "--run", str(run_dir), "--resume", *options])
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, said.read_text()


def interrupt(moment: str, name: str, call: int, seconds: float, *, before: Callable[[], None] = lambda: None) -> None:
    """Makes this process receive the signal `name`, `seconds` after the given call of the moment's function. before:
    is called then."""
    module, path, _, _ = MOMENTS[moment]
    signal_after(module, path, name, call, seconds, before=before)


def signal_after(
    module: str, path: str, name: str, call: int, seconds: float, *, before: Callable[[], None] = lambda: None
) -> None:
    """`interrupt`, by the module and the path of a function in it."""
    import importlib

    owner: Any = importlib.import_module(module)
    *parents, last = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    honest, calls = getattr(owner, last), [0]

    @functools.wraps(honest)
    def watched(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            threading.Timer(seconds, lambda: (before(), os.kill(os.getpid(), signal.Signals[name]))).start()
        return honest(*arguments, **named)

    setattr(owner, last, watched)


def facts_of(run_dir: Path) -> dict[str, Any]:
    """What must be equal to the bit: the samples, and every step's metrics except timings."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    curve = [{key: value for key, value in line.items() if key not in TIMED} for line in lines]
    return {"curve": curve, "samples": (run_dir / "samples.txt").read_text()}


def leftovers(run_dir: Path) -> list[str]:
    """Files that only an unfinished run may have."""
    names = [path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*")]
    return [name for name in names if name.endswith((".tmp", ".partial", ".removed")) or "run.lock" in name]


def going_on(run_dir: Path) -> dict[str, Any]:
    """What a kill lost, as (step gone back to, last step lost); the first step of the last process; and the seconds
    from that process's start, once it has imported everything, to the end of that step."""
    from orogen.report.lost import read_lost

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    facts: dict[str, Any] = {"lost": [(loss.to, loss.until) for loss in read_lost(run_dir)]}
    for line in lines:
        if "start_seconds" in line:
            seconds = line["start_seconds"] + line.get("compile_seconds", 0.0) + line["step_ms"] / 1e3
            facts |= {"first_step": line["step"], "going_on_s": round(seconds, 2)}
    return facts


def trial(
    rng: random.Random,
    number: int,
    recipe: Path,
    folder: Path,
    expected: dict[str, Any],
    *,
    name: str | None = None,
    moment: str | None = None,
) -> dict[str, Any]:
    """One run, interrupted by a signal and resumed; `wrong` lists what was not as it should be."""
    from orogen.checkpoint import checksums

    name, moment = name or rng.choice(list(SIGNALS)), moment or list(MOMENTS)[number % len(MOMENTS)]
    _, _, calls, longest = MOMENTS[moment]
    facts: dict[str, Any] = {"number": number, "signal": name, "moment": moment}
    facts |= {"call": rng.randint(1, calls), "seconds": round(rng.uniform(0, longest), 3)}
    run_dir = folder / f"run{number}"
    ended = functools.partial(interrupt, moment, name, facts["call"], facts["seconds"])
    facts["status"], said = run(recipe, run_dir, ended)
    facts["said"] = said.strip().splitlines()[-1:]
    wrong = []
    done = facts["status"] == 0 and "report:" in said  # the signal came too late
    if facts["status"] != SIGNALS[name] and not done:
        wrong.append(f"status {facts['status']}; expected {SIGNALS[name]}")
    if "Traceback" in said:
        wrong.append(said)
    if name != "SIGKILL":
        wrong += [f"left {left}" for left in leftovers(run_dir)]
    for checkpoint in sorted((run_dir / "checkpoints").glob("*[0-9]")):
        if checkpoint.name.isdecimal():
            checksums.check(checkpoint)
    before = time.monotonic()
    status, said = run(recipe, run_dir)
    facts |= going_on(run_dir) | {"second_run_s": round(time.monotonic() - before, 1)}
    if status:
        wrong.append(f"going on ended with status {status}: {said}")
    elif facts_of(run_dir) != expected:
        wrong.append("another curve, or other samples, than without the signal")
    elif not (run_dir / "report.html").is_file():
        wrong.append("no report")
    wrong += [f"left {left} at the end" for left in leftovers(run_dir)]
    return facts | {"too late": done, "wrong": wrong}


def prepare() -> None:
    """Makes this process ready to be forked."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as `orogen` sets it, before it imports jax
    # Imported before the forks: they need not import again, and run this code even if the files change meanwhile.
    import orogen.cli
    import orogen.evaluate.summary
    import orogen.train.run  # noqa: F401

    for name in SIGNALS.keys() - {"SIGKILL"}:  # background jobs of a shell ignore some of them
        usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
        signal.signal(signal.Signals[name], usual)


def main() -> int:
    """Tries random moments one after another; writes a JSON line for each. Exit status 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="number of the first; the moments take turns")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    prepare()
    wrong = late = 0
    with tempfile.TemporaryDirectory() as scratch, options.out.open("a") as out:
        folder = Path(scratch)
        recipe = write_recipe(folder)
        status, said = run(recipe, folder / "whole")
        if status:
            raise SystemExit(f"the run that nobody interrupts ended with status {status}: {said}")
        expected = facts_of(folder / "whole")
        for number in range(options.first, options.first + options.count):
            start = time.monotonic()
            facts = trial(random.Random(options.seed * 100_003 + number), number, recipe, folder, expected)
            wrong, late = wrong + bool(facts["wrong"]), late + facts["too late"]
            print(json.dumps(facts | {"took": round(time.monotonic() - start, 1)}), file=out, flush=True)
    print(f"{options.count - wrong} of {options.count} runs went on to the same bits; {late} signals came too late")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
