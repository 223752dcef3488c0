"""Runs of `orogen rl` and `orogen sft` that a SIGKILL ends at a random moment: do they go on with the same bits?

Each is compared with a run that nothing happened to: metrics, tables of all samples, and parameters.
`PYTHONPATH=src:. python experiments/survival/posttrained.py --count 9` writes one line per trial.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.train import kills

from orogen.report import page
from orogen.report.metrics import read_metrics

CLOCKS = {"rollout_ms", "verify_ms", "score_ms", "rollout_tokens_per_second", *kills.TIMED}
WORKER = "orogen.posttrain.environments.worker"
MARK = "OROGEN_SURVIVAL_RUN"  # by which a run's processes are told from others, whoever has become their parent
# A function, the last call of it that may be chosen, and the longest delay after that call began.
MOMENTS = {
    "rl": {
        "profiling": ("orogen.posttrain.groups", "Groups._profile", 1, 1.0),
        "writing": ("orogen.posttrain.rollout", "Rollouts._speak", 6, 0.2),
        "verifying": ("orogen.posttrain.environments.pool", "Pool.verify", 6, 0.02),
        "scoring": ("orogen.posttrain.source", "RolloutSource._batch", 5, 0.2),
        "table": ("orogen.posttrain.source", "RolloutSource._write_table", 3, 0.005),
        "evaluating": ("orogen.posttrain.heldout_tasks", "HeldoutTasks.sample", 2, 0.2),
        "stepping": ("orogen.train.loop", "batch_to_devices", 6, 0.02),
        "saving": ("orogen.checkpoint.steps", "Checkpoints.save", 6, 0.1),
        "hashing": ("orogen.checkpoint.checksums", "write", 6, 0.01),
    },
    "sft": {
        "stepping": ("orogen.train.loop", "batch_to_devices", 6, 0.02),
        "saving": ("orogen.checkpoint.steps", "Checkpoints.save", 6, 0.1),
        "hashing": ("orogen.checkpoint.checksums", "write", 6, 0.01),
    },
}
MODEL = """
ModelConfig.pattern = 'M*-'
ModelConfig.vocab_size = 259
ModelConfig.hidden_size = 12
ModelConfig.num_attention_heads = 6
ModelConfig.num_key_value_heads = 2
ModelConfig.head_dim = 5
ModelConfig.intermediate_size = 14
ModelConfig.mamba_num_heads = 2
ModelConfig.mamba_head_dim = 4
ModelConfig.n_groups = 1
ModelConfig.ssm_state_size = 3
ModelConfig.chunk_size = 8
DataConfig.tokenizer = 'byte'
DataConfig.heldout_fraction = 0.2
DataConfig.tuning_fraction = 0.0
TrainConfig.steps = 6
TrainConfig.batch_size = 4
TrainConfig.seed = 1
TrainConfig.evaluate_every = 3
TrainConfig.evaluate_rows = 2
TrainConfig.checkpoint_every = 1
TrainConfig.keep_checkpoints = 2
TrainConfig.sample_tokens = 1
TrainConfig.ngram_order = 0
TrainConfig.loggers = ()
OptimizerConfig.learning_rate = 1e-2
OptimizerConfig.schedule = 'constant'
"""
RL = """
DataConfig.corpus = 'environments'
RLConfig.environments = (@digits/EnvironmentConfig(), @desk/EnvironmentConfig())
digits/EnvironmentConfig.name = 'digits'
digits/EnvironmentConfig.kind = 'synthetic'
digits/EnvironmentConfig.family = 'parity'
digits/EnvironmentConfig.examples = 12
digits/EnvironmentConfig.partial_credit = 0.5
desk/EnvironmentConfig.name = 'desk'
desk/EnvironmentConfig.kind = 'instructions'
desk/EnvironmentConfig.examples = 12
RLConfig.prompts = 4
RLConfig.samples = 3
RLConfig.max_tokens = 4
RLConfig.template = 'plain'
RLConfig.overlong = 'keep'
RLConfig.resample = 1
RLConfig.curriculum = 'gaussian'
RLConfig.profile_samples = 2
RLConfig.profile_every = 2
RLConfig.updates = 2
RLConfig.slots = 3
RLConfig.workers = 1
RLConfig.table_rows = 100
TrainConfig.sequence_length = 96
"""
SFT = """
DataConfig.corpus = {corpus!r}
ChatConfig.template = 'nemotron_3_nano'
TrainConfig.sequence_length = 144
"""


def said(number: int) -> list[dict[str, str]]:
    """The conversation of this number."""
    return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"{number**2}"}]


def write_recipe(task: str, folder: Path) -> Path:
    """The gin file of a task, and its conversations."""
    more = RL
    if task == "sft":
        corpus = folder / "chats"
        corpus.mkdir()
        (corpus / "chats.jsonl").write_text("".join(json.dumps({"messages": said(n)}) + "\n" for n in range(30)))
        more = SFT.format(corpus=str(corpus))
    file = folder / f"{task}.gin"
    file.write_text(MODEL + more)
    return file


def facts_of(run_dir: Path) -> dict[str, Any]:
    """What must be equal to the bit."""
    import jax  # here: a process that is to be forked must not have begun to use it
    import numpy as np

    from orogen.checkpoint.open import open_model

    lines = [{name: value for name, value in line.items() if name not in CLOCKS} for line in read_metrics(run_dir)]
    tables = {file.name: file.read_text() for file in sorted((run_dir / "rollouts").glob("*.jsonl"))}
    last = max((run_dir / "checkpoints").glob("*[0-9]"), key=lambda path: int(path.name))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(open_model(run_dir).params):
        digest.update(np.asarray(leaf).tobytes())
    return {"curve": lines, "tables": tables, "last": last.name, "params": digest.hexdigest()}


def forked_facts(run_dir: Path) -> dict[str, Any]:
    """`facts_of`, found in a process of its own."""
    out = run_dir.with_suffix(".facts")
    child = os.fork()
    if not child:
        status = 70
        try:
            out.write_text(json.dumps(facts_of(run_dir)))
            status = 0
        finally:
            os._exit(status)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit(f"{run_dir} cannot be read")
    return json.loads(out.read_text())


def marked(kill: Callable[[], None], value: str) -> None:
    """Gives this process, and all that it starts from now on, a mark in their environment."""
    os.environ[MARK] = value
    kill()


def survivors(value: str) -> list[str]:
    """Processes that verify with that mark: each ends by itself within a second of its run's end."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:  # it has ended meanwhile, or is another user's
            continue
        if WORKER.encode() in words and f"{MARK}={value}".encode() in variables.split(b"\0"):
            found.append(folder.name)
    return found


def trial(task: str, number: int, seed: int, recipe: Path, folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """One run that is killed and goes on; `wrong` lists what was not as it should be."""
    rng = random.Random(f"{task} {seed} {number}")
    moment = list(MOMENTS[task])[number % len(MOMENTS[task])]
    module, path, calls, longest = MOMENTS[task][moment]
    facts: dict[str, Any] = {"task": task, "number": number, "moment": moment, "call": rng.randint(1, calls)}
    facts["seconds"] = round(rng.uniform(0, longest), 3)
    run_dir = folder / f"{task}{number}"
    kill = functools.partial(kills.signal_after, module, path, "SIGKILL", facts["call"], facts["seconds"])
    status, output = kills.run(recipe, run_dir, functools.partial(marked, kill, str(run_dir)), task=task)
    facts["too late"] = status == 0
    wrong = [] if status in (-9, 0) else [f"status {status}: {output[-2000:]}"]
    time.sleep(1.5)
    wrong += [f"processes {left} still verify" for left in [survivors(str(run_dir))] if left]
    status, output = kills.run(recipe, run_dir, task=task)
    if status:
        wrong.append(f"going on ended with status {status}: {output[-2000:]}")
    else:
        found = forked_facts(run_dir)
        wrong += [f"other {name}" for name in expected if found[name] != expected[name]]
        facts |= kills.going_on(run_dir)
    wrong += [f"left {left} at the end" for left in kills.leftovers(run_dir)]
    return facts | {"wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=9, help="kills of each task; the moments take turns")
    parser.add_argument("--tasks", default="rl,sft")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "posttrained.jsonl")
    options = parser.parse_args()
    kills.prepare()
    page.pictures = lambda *_: []  # pyright: ignore[reportPrivateImportUsage]
    bad = 0
    with tempfile.TemporaryDirectory() as scratch, options.out.open("a") as out:
        for task in options.tasks.split(","):
            recipe = write_recipe(task, Path(scratch))
            status, output = kills.run(recipe, Path(scratch) / f"{task}_whole", task=task)
            if status:
                raise SystemExit(f"the run that nobody interrupts ended with status {status}: {output}")
            expected = forked_facts(Path(scratch) / f"{task}_whole")
            for number in range(options.count):
                facts = trial(task, number, options.seed, recipe, Path(scratch), expected)
                bad += bool(facts["wrong"])
                print(json.dumps(facts), file=out, flush=True)
    print(f"{bad} trials are wrong")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
