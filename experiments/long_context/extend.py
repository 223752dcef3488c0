"""Trains each model of extended.gin once per seed on rows of 1,024 bytes, and from there each of its arms; measures
loss by position and suites of RULER by length.

A fifth of the training text are examples of the suites, so that a small model can know them; those that are asked for
have another seed. `python experiments/packages.py --out runs/packages` writes the text.

PYTHONPATH=src:. python experiments/long_context/extend.py --models transformer --rate 7e-4 --run DIR
PYTHONPATH=src:. python experiments/long_context/extend.py --models hybrid --rate 2e-3 --run DIR
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from experiments.packed import Packed, turn

from orogen.checkpoint.open import Opened
from orogen.config.data import DataConfig
from orogen.config.evaluate import EvaluateConfig
from orogen.config.files import write_atomically
from orogen.config.load import load_sweep
from orogen.config.run import RunConfig
from orogen.data.corpora import split_of
from orogen.data.loader import open_corpus
from orogen.data.tokenizer import Tokenizer
from orogen.data.vocabulary import make_tokenizer
from orogen.evaluate.likelihood import Row, Scorer
from orogen.evaluate.suites.example import row_of
from orogen.evaluate.suites.run import Part, accuracies, drafts_of, rows_of
from orogen.parallel.runtime import configure
from orogen.sweep.parameters import totals
from orogen.sweep.plan import Run, make_arms
from orogen.sweep.results import Results
from orogen.train.heldout import heldout_plan
from orogen.train.pretraining import train_loader
from orogen.train.run_folder import environment
from orogen.train.state import TrainState, start_state
from orogen.train.step import batch_to_devices

STUDY = Path(__file__).parent / "extended.gin"
SUITES = ("needle", "variable_tracking", "phonebook")
SHORT, LONG, LONGER = 1024, 8192, 16384
LENGTHS = (SHORT, 4096, LONG, LONGER)
TRAINING, TESTING = 7, 0  # seeds of the suites' examples
EXAMPLES = {SHORT: 3000, LONG: 400}  # of each suite, to train on
ASKED, TEXTS = 64, 64  # examples of each suite and length, and held-out texts, that are asked for
HELD_OUT = 0.02
BATCH_TOKENS = 2 * LONGER


def write_texts(out: Path, packages: Path, tokenizer: Tokenizer) -> None:
    """The four sources, and the held-out texts: documents of at least 16,384 bytes that no source has."""
    kept: dict[str, list[str]] = {"text_short": [], "text_long": [], "heldout": []}
    for file in sorted(packages.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            text = json.loads(line)["text"]
            if _held_out(f"{file.name}:{number}"):
                kept["heldout"] += [text] if len(text) >= LONGER and text.isascii() else []
                continue
            kept["text_short"] += [text[start : start + SHORT - 2] for start in range(0, len(text), SHORT - 2)]
            kept["text_long"] += [text] if len(text) >= LONG else []
    for length, name in ((SHORT, "suites_short"), (LONG, "suites_long")):
        asked = EvaluateConfig(tasks=SUITES, lengths=(length - 2,), samples=EXAMPLES[length], seed=TRAINING)
        drafts = [draft for task in SUITES for draft in drafts_of(Part(task, length - 2), tokenizer, asked)]
        kept[name] = [f"{draft.prompt} {', '.join(draft.answers)}" for draft in drafts]
    for name, texts in kept.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        write_atomically(out / f"{name}.jsonl", lines.encode())


def _held_out(key: str) -> bool:
    return split_of(key, config=DataConfig(corpus="packages", tokenizer="byte", heldout_fraction=HELD_OUT)) == "heldout"


def asked_rows(out: Path, tokenizer: Tokenizer) -> dict[str, list[Row]]:
    """By number, the rows whose answers, or whose last 1,024 bytes, are asked for: of the suites; of held-out texts at
    the end of 8,192 and of 16,384 bytes; and, alone, those bytes that end the 8,192."""
    lines = (out / "heldout.jsonl").read_text().splitlines()[:TEXTS]
    texts = [tokenizer.encode_inside(json.loads(line)["text"])[: LONGER - 1] for line in lines]

    def row(ids: np.ndarray) -> Row:
        tokens_t = np.concatenate([[tokenizer.bos_id], ids]).astype(np.int32)
        return Row(tokens_t, np.arange(len(tokens_t)) > len(tokens_t) - SHORT)

    rows = {f"late@{length}": [row(ids[: length - 1]) for ids in texts] for length in (LONG, LONGER)}
    rows[f"alone@{LONG}"] = [row(ids[LONG - SHORT : LONG - 1]) for ids in texts]
    asked = EvaluateConfig(tasks=SUITES, lengths=LENGTHS, samples=ASKED, seed=TESTING)
    for task in SUITES:
        for length in LENGTHS:
            rows[f"{task}@{length}"] = suite_rows(Part(task, length), tokenizer, asked)
    return rows


def suite_rows(part: Part, tokenizer: Tokenizer, config: EvaluateConfig) -> list[Row]:
    """Examples whose answers are scored in one pass, token by token."""
    if part.task == "phonebook":
        return rows_of(part, tokenizer, config)
    return [row_of(tokenizer, draft) for draft in drafts_of(part, tokenizer, config)]


def numbers(scorer: Scorer, rows: dict[str, list[Row]], state: TrainState) -> dict[str, float]:
    """Nats per byte of texts, and the share of the answers' bytes of suites."""
    scores = iter(scorer.score([row for of in rows.values() for row in of], (state.params, state.buffers)))
    found = {name: accuracies([next(scores) for _ in of]) for name, of in rows.items()}
    return {name: x["nats" if "late" in name or "alone" in name else "token_accuracy"] for name, x in found.items()}


class Model:
    """One model of the study: its runs by row length, and what asks it."""

    def __init__(self, examples: list[RunConfig], rows: dict[str, list[Row]]):
        self.rows = rows
        self.packed = {self._key(config): Packed(config, open_corpus(config.data)) for config in examples}
        first = examples[0]
        built = next(iter(self.packed.values())).built
        opened = Opened(first.model, heldout_plan(first), built, built.params, built.buffers, None)
        self.scorer = Scorer(opened, dtype=first.train.compute_dtype, batch_tokens=BATCH_TOKENS)

    @staticmethod
    def _key(config: RunConfig) -> tuple[Any, ...]:
        return config.train.batch_size, config.data

    def compile(self) -> None:
        """All programs, so that no run waits for the compiler."""
        for packed in self.packed.values():
            state = packed.start(0)
            batch = next(train_loader(packed.config, packed.corpus))
            state, _ = packed.step(state, batch_to_devices(batch, packed.plan))
        longest = {len(row.tokens_t): row for of in self.rows.values() for row in of[:1]}
        for row in longest.values():
            self.scorer.score([row] * ASKED, (state.params, state.buffers))

    def base(self, config: RunConfig) -> TrainState:
        packed = self.packed[self._key(config)]
        return packed.steps(packed.start(config.train.seed), config)[0]

    def extend(self, base: TrainState, config: RunConfig) -> dict[str, float]:
        packed = self.packed[self._key(config)]
        params, buffers = jax.tree.map(jnp.copy, (base.params, base.buffers))
        begun = start_state(params, buffers, packed.built, packed.optimizer, packed.plan)
        state, found = packed.steps(begun, config)
        return {**found, **numbers(self.scorer, self.rows, state)}


def base_of(config: RunConfig, steps: int, rate: float) -> RunConfig:
    """The run that a model's arms begin with: that of its short rows, longer."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate, warmup_steps=steps // 10)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps), optimizer=optimizer)


def run_model(runs: list[Run], rows: dict[str, list[Row]], results: Results, options: argparse.Namespace) -> None:
    """The runs of one model that have no result yet, seed by seed."""
    short = {run.config.train.seed: run for run in runs if run.arm.values[1] == "short"}
    began = time.perf_counter()
    model = Model([run.config for run in runs[: len(runs) // len(short)]], rows)
    model.compile()
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    parameters = totals([runs[0].config.model])[0]
    known = environment()
    for seed, first in short.items():
        waiting = [run for run in runs if run.config.train.seed == seed and results.of(run) is None]
        if not waiting:
            continue
        with turn(options.lock):
            base = model.base(base_of(first.config, options.steps, options.rate))
            jax.block_until_ready(base)
        for run in waiting:
            with turn(options.lock):
                began = time.perf_counter()
                found = model.extend(base, run.config)
                seconds = round(time.perf_counter() - began, 3)
            metric, *further = options.numbers
            facts = {
                "metric": metric, "value": found[metric], "further": {name: found[name] for name in further},
                "train_loss": found["train_loss"], "seconds": seconds, "parameters": parameters,
                "base": {"steps": options.steps, "learning_rate": options.rate},
                **{name: known[name] for name in ("commit", "packages", "devices")},
            }  # fmt: skip
            results.add(run, facts)
            print(run.name, {name: round(value, 4) for name, value in found.items()}, seconds, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gin_file", type=Path, default=STUDY, metavar="STUDY")
    parser.add_argument("--gin_bindings", action="append", default=[], metavar="X.y=1", help="on top of the file's")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="where results.jsonl is written")
    parser.add_argument("--models", default="", metavar="NAME,NAME", help="those to run; all by default")
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="the text")
    parser.add_argument(
        "--texts", type=Path, default=Path("runs/long_context/extended"), help="where texts are written"
    )
    parser.add_argument("--steps", type=int, default=1000, help="of the model that the arms begin with")
    parser.add_argument("--rate", type=float, default=2e-3, help="its peak rate")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="of all processes that train in turn")
    options = parser.parse_args()
    sweep, _ = load_sweep([options.gin_file], options.gin_bindings)
    names = list(dict.fromkeys(arm.values[0] for arm in sweep.arms()))
    chosen = options.models.split(",") if options.models else names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--models has {unknown[0]!r}; expected some of {', '.join(names)}")
    arms = make_arms(sweep, [options.gin_file], options.gin_bindings, totals)
    options.numbers = sweep.numbers
    configure(0)
    for folder in (options.run, options.texts):
        folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(next(iter(arms.configs.values())).data, ())
    with turn(options.lock):
        if not (options.texts / "suites_long.jsonl").exists():  # the last one written
            write_texts(options.texts, options.packages, tokenizer)
    results = Results(options.run, sweep.numbers)
    rows = asked_rows(options.texts, tokenizer)
    for name in chosen:
        run_model([run for run in arms.runs({}) if run.arm.values[0] == name], rows, results, options)


if __name__ == "__main__":
    main()
